# SPDX-License-Identifier: Apache-2.0
"""Figures of the page as files for a paper, by Matplotlib: PDF, PNG or SVG."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyads.comparing.comparison import Comparison
from dyads.errors import ConfigError
from dyads.report.content import colours, curves_of
from dyads.report.learned import learned_by

__all__ = ["write_figures"]

_PALETTE = ("#57606a", "#0b6bbf", "#c2410c", "#0f8a5f", "#a3279f", "#8a6d00", "#b3123c", "#0e8092")
_STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "dyads",
    "text.parse_math": False,  # names are no mathematics
}
_WIDTH = 5.5
"""Inches: the text width of a conference paper."""


def write_figures(comparison: Comparison, folder: Path, formats: Sequence[str], *, model: bool = True) -> list[Path]:
    """Write every figure in every format; ConfigError without Matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("figures need Matplotlib: run `pip install 'dyads[report]'`, or leave --figures out")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    written: list[Path] = []
    names: set[str] = set()
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        for first, draw, height in _figures(comparison, model):
            figure = Figure(figsize=(_WIDTH, height), layout="constrained")
            draw(figure)
            name, number = first, 1
            while name in names:  # of tasks whose names differ in signs alone
                number += 1
                name = f"{first}-{number}"
            names.add(name)
            for form in formats:
                path = folder / f"{name}.{form}"
                metadata = {"CreationDate": None} if form == "pdf" else {"Date": None} if form == "svg" else None
                figure.savefig(path, dpi=200, metadata=metadata)
                written.append(path)
    return written


def _figures(comparison: Comparison, model: bool) -> Iterator[tuple[str, Any, float]]:
    columns, tasks = comparison.columns, comparison.tasks
    yield "scores", lambda figure: _scores(figure, comparison), 0.6 + 0.25 * len(columns)
    yield "scores-by-task", lambda figure: _by_task(figure, comparison), 0.8 + 0.11 * len(tasks) * (len(columns) + 1)
    if len(columns) > 1:
        yield "win-rates", lambda figure: _win_rates(figure, comparison), 1.2 + 0.35 * len(columns)
    for curve in curves_of(comparison):
        yield f"curve-{_slug(curve['name'])}", lambda figure, curve=curve: _curve(figure, curve), 2.8
    for entry in learned_by(comparison, model=model)[0]:
        for heat in entry["maps"]:
            name = f"{_slug(entry['name'])}-{_slug(heat['title'])}"
            yield name, lambda figure, heat=heat: _heat(figure, heat), 1.0 + 0.16 * max(len(heat["rows"]), 4)


def _slug(text: str) -> str:
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-") or "figure"


def _scores(figure: Any, comparison: Comparison) -> None:
    axes = figure.subplots()
    palette = colours(comparison)
    for i, column in enumerate(comparison.columns):
        _interval(axes, column.macro, i, _PALETTE[palette[i]])
    axes.set_yticks(range(len(comparison.columns)), [c.label for c in comparison.columns])
    axes.invert_yaxis()
    axes.set_xlabel("mean over tasks, 95 % interval")
    axes.grid(axis="x", linewidth=0.3)


def _interval(axes: Any, score: Any, y: float, colour: str) -> None:
    if math.isfinite(score.low):
        axes.plot([score.low, score.high], [y, y], color=colour, linewidth=1.2)
    axes.plot([score.value], [y], "o", color=colour, markersize=3.5)


def _by_task(figure: Any, comparison: Comparison) -> None:
    axes = figure.subplots()
    columns, palette = comparison.columns, colours(comparison)
    step = len(columns) + 1
    for t in range(len(comparison.tasks)):
        for i, column in enumerate(columns):
            _interval(axes, column.scores[t], t * step + i, _PALETTE[palette[i]])
    for i, column in enumerate(columns):
        axes.plot([], [], "o-", color=_PALETTE[palette[i]], markersize=3.5, label=column.label)
    axes.set_yticks(
        [t * step + (len(columns) - 1) / 2 for t in range(len(comparison.tasks))], [t.task for t in comparison.tasks]
    )
    axes.invert_yaxis()
    axes.set_xlabel("score, 95 % interval")
    axes.grid(axis="x", linewidth=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)


def _win_rates(figure: Any, comparison: Comparison) -> None:
    labels = [c.label for c in comparison.columns]
    values = np.full((len(labels), len(labels)), np.nan)
    for pair in comparison.pairs:
        values[labels.index(pair.row), labels.index(pair.column)] = 100 * pair.win_rate
    axes = figure.subplots()
    axes.imshow(values, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black")
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_title("row ahead of column, % of the tasks", fontsize=8)


def _curve(figure: Any, curve: dict[str, Any]) -> None:
    axes = figure.subplots()
    named = set()
    for series in curve["series"]:
        points = [(x, y) for x, y in series["points"] if y is not None]
        label = series["label"].split(", seed ")[0]
        shown = None if label in named else label
        named.add(label)
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.plot(x, y, color=_PALETTE[series["colour"]], linewidth=1, alpha=0.5 if series["faint"] else 1, label=shown)
    axes.set_xlabel("step")
    axes.set_ylabel(curve["name"])
    axes.legend(frameon=False)


def _heat(figure: Any, heat: dict[str, Any]) -> None:
    axes = figure.subplots()
    values = np.array([[np.nan if v is None else v for v in row] for row in heat["values"]])
    image = axes.imshow(
        values, vmin=heat["low"], vmax=heat["high"], cmap="Blues", aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(len(heat["rows"])), heat["rows"])
    every = max(1, len(heat["columns"]) // 24)
    at = range(0, len(heat["columns"]), every)
    axes.set_xticks(at, [heat["columns"][j] for j in at], rotation=90)
    axes.set_title(heat["title"], fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8)

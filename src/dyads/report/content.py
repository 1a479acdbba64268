# SPDX-License-Identifier: Apache-2.0
"""Content of the page's tables and dot plots: texts and positions, from a comparison and its run folders."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from dyads.comparing.comparison import Column, Comparison, Pair
from dyads.comparing.intervals import Interval
from dyads.comparing.tables import (
    all_notes,
    headline,
    loss_text,
    p_text,
    range_text,
    signed_text,
    time_text,
    verdict_text,
)
from dyads.console import size
from dyads.errors import shortened
from dyads.runs.folder import RunFolder

__all__ = ["answer_to", "colours", "content_of", "curves_of", "marks", "peak_memory"]

_COLOURS = 8
_TITLE = 6
"""Methods in the title."""
_SHOWN = 3
"""Differences that are named in the sentence at the top."""


def colours(comparison: Comparison) -> list[int]:
    """A colour for every column: 0 for references, then 1 to 7, again and again."""
    found, trained = [], 0
    for column in comparison.columns:
        trained += not column.reference
        found.append(0 if column.reference else (trained - 1) % (_COLOURS - 1) + 1)
    return found


def marks(comparison: Comparison) -> list[str]:
    """By column, the classes of its marks after the letter c: its colour, and for a zero-shot run hollow marks."""
    found = zip(comparison.columns, colours(comparison), strict=True)
    return [f"{colour} hollow" if column.method == "zero-shot" else str(colour) for column, colour in found]


def content_of(comparison: Comparison) -> dict[str, Any]:
    """Everything on the page but instances, curves, and what adapters learned."""
    columns, palette = comparison.columns, marks(comparison)
    low, high, ticks = _scale(comparison)
    place = {column.label: i for i, column in enumerate(columns)}

    def plotted(score: Interval, i: int, query: str, on: str) -> dict[str, Any]:
        known = math.isfinite(score.low)

        def x(value: float) -> float:
            return round(100 * (min(max(value, low), high) - low) / (high - low), 2)

        interval = f" (95 % interval {range_text(score)})" if known else ""
        return {
            "value": score.value,
            "low": score.low if known else None,
            "high": score.high if known else None,
            "x": x(score.value),
            "x_low": x(score.low) if known else 0,
            "x_high": x(score.high) if known else 0,
            "colour": palette[i],
            "href": f"#instances?{query}method={i}",
            "tip": f"{columns[i].shown}, {on}: {score.value:.1f}{interval}",
        }

    names = [c.label for c in columns if not c.reference] or [c.label for c in columns]
    return {
        "title": " · ".join([*names[:_TITLE], *["…"] * (len(names) > _TITLE)]),
        "asked": headline(comparison),
        "answer": answer_to(comparison),
        "ticks": ticks,
        "baseline": comparison.baseline if len(columns) > 1 else None,
        "several_seeds": any(len(c.seeds) > 1 for c in columns),
        "outcome": [
            _row(comparison, column, plotted(column.macro, i, "", "mean over tasks"))
            for i, column in enumerate(columns)
        ],
        "pairs": [_pair(pair, place) for pair in comparison.differences],
        "notes": all_notes(comparison),
        "tasks": _tasks(comparison, plotted),
        "wins": _wins(comparison, palette) if len(columns) > 1 else [],
        "costs": _costs(columns, palette),
        "commands": _commands(comparison),
        "runs": [_run(RunFolder(path), seed) for c in columns for seed, path in zip(c.seeds, c.runs, strict=True)],
        "recipes": [{"shown": c.shown, "text": RunFolder(c.runs[0]).recipe().resolved_yaml()} for c in columns],
        "training_notes": _training_notes(columns),
    }


def answer_to(comparison: Comparison) -> str:
    """One sentence: which differences on the mean over tasks are beyond chance, after the correction."""
    columns = comparison.columns
    if len(columns) == 1:
        column = columns[0]
        mean = f"{column.macro.value:.1f} as a mean over tasks"
        return f"{column.shown} scores {mean} (95 % interval {range_text(column.macro)})."
    trained = [c.label for c in columns if not c.reference]
    family = [p for p in comparison.differences if p.row in trained and p.column in trained]
    decided = [
        p if p.macro.value > 0 else comparison.pair(p.column, p.row) for p in family if p.macro_verdict != "undecided"
    ]
    decided.sort(key=lambda p: -p.macro.value)
    best = max(columns, key=lambda c: c.macro.value)
    most = f"{best.shown} has the highest mean over tasks, {best.macro.value:.1f}"
    if len(trained) < 2:
        return f"{most}."
    if not family:
        return f"{most}. Trained methods are compared with {comparison.baseline} here, not with each other."
    if not decided:
        against = "between trained methods" if comparison.baseline is None else f"from {comparison.baseline}"
        return f"No difference {against} is beyond chance: {most} ({range_text(best.macro)})."
    listed = [
        f"{p.row} is ahead of {p.column} by {p.macro.value:.1f} ({range_text(p.macro)})" for p in decided[:_SHOWN]
    ]
    more = f", and {len(decided) - _SHOWN} more differences are beyond chance" if len(decided) > _SHOWN else ""
    known = all(p.macro.over_seeds for p in decided[:_SHOWN])
    alone = "" if known else " For these trained adapters alone: there is one seed."
    return f"As a mean over tasks, {'; '.join(listed)}{more}.{alone}"


def _scale(comparison: Comparison) -> tuple[float, float, list[dict[str, Any]]]:
    """The range of all scores and their intervals, in tens, and its ticks."""
    intervals = [s for c in comparison.columns for s in (*c.scores, c.macro)]
    bounds = [x for s in intervals for x in (s.value, s.low, s.high) if math.isfinite(x)]
    low = max(-100.0, 10 * math.floor(min(bounds) / 10))
    high = max(min(100.0, 10 * math.ceil(max(bounds) / 10)), low + 10)
    step = next(s for s in (10, 20, 25, 50) if (high - low) / s <= 6)
    first = math.ceil(low / step) * step
    ticks = list(range(int(first), int(high) + 1, step))
    return low, high, [{"x": round(100 * (t - low) / (high - low), 2), "text": str(t)} for t in ticks]


def _row(comparison: Comparison, column: Column, dot: dict[str, Any]) -> dict[str, Any]:
    pair = next((p for p in comparison.differences if (p.row, p.column) == (column.label, comparison.baseline)), None)
    return {
        **dot,
        "shown": column.shown,
        "parameters": "–" if column.reference else f"{column.parameters:,}",
        "macro": _finite(column.macro),
        "micro": _finite(column.micro),
        "difference": f"{signed_text(pair.macro)} ({range_text(pair.macro)})" if pair else "",
        "verdict": verdict_text(pair.macro, pair.macro_verdict) if pair else "",
        "seeds": ", ".join(f"{value:.1f}" for value in column.macro_by_seed),
    }


def _finite(interval: Interval) -> dict[str, float | None]:
    values = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _pair(pair: Pair, place: dict[str, int]) -> dict[str, str]:
    return {
        "name": f"{pair.row} − {pair.column}",
        "href": f"#instances?method={place[pair.row]}&against={place[pair.column]}",
        "value": signed_text(pair.macro),
        "range": range_text(pair.macro),
        "p": p_text(pair.macro_holm),
        "verdict": verdict_text(pair.macro, pair.macro_verdict),
    }


def _tasks(comparison: Comparison, plotted: Any) -> list[dict[str, Any]]:
    """The tasks, those with the largest difference between trained methods first."""
    columns = comparison.columns
    found = []
    for t, task in enumerate(comparison.tasks):
        rows = [plotted(c.scores[t], i, f"task={t}&", task.task) for i, c in enumerate(columns)]
        trained = [c.scores[t].value for c in columns if not c.reference] or [r["value"] for r in rows]
        found.append(
            {
                "name": task.task,
                "metric": task.metric,
                "n": task.n,
                "href": f"#instances?task={t}",
                "rows": rows,
                "height": 5 + 11 * len(rows),
                "spread": round(max(trained) - min(trained), 3),
                "score": round(fmean(trained), 3),
            }
        )
    return sorted(found, key=lambda task: -task["spread"])


def _wins(comparison: Comparison, palette: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for i, one in enumerate(comparison.columns):
        cells: list[dict[str, Any] | None] = []
        for j, other in enumerate(comparison.columns):
            if i == j:
                cells.append(None)
                continue
            pair = comparison.pair(one.label, other.label)
            counts = f"{pair.wins} tasks, behind on {pair.losses}, {pair.ties} ties"
            cells.append(
                {
                    "rate": round(pair.win_rate, 3),
                    "text": f"{100 * pair.win_rate:.0f}",
                    "href": f"#instances?method={i}&against={j}",
                    "tip": f"{one.shown} ahead of {other.shown} on {counts}",
                }
            )
        rows.append({"shown": one.shown, "colour": palette[i], "cells": cells})
    return rows


def _costs(columns: Sequence[Column], palette: Sequence[str]) -> list[dict[str, Any]]:
    memory = [peak_memory(column) for column in columns]
    steps = [None if c.reference or not c.steps else c.train_seconds / c.steps for c in columns]
    rows = []
    bars: tuple[list[float | None], ...] = (
        [None if c.reference else float(c.parameters) for c in columns],
        [None if c.reference else c.train_seconds for c in columns],
        steps,
        memory,
        [float(c.evaluate_seconds) for c in columns],
    )
    most = [max([value for value in bar if value is not None], default=0.0) or 1.0 for bar in bars]
    for i, column in enumerate(columns):
        shares = [
            None if bar[i] is None else round((bar[i] or 0) / top, 3) for bar, top in zip(bars, most, strict=True)
        ]
        step, peak = steps[i], memory[i]
        texts = [
            (f"{column.parameters:,}" if not column.reference else "–", shares[0]),
            (f"{column.steps:,}" if not column.reference else "–", None),
            (time_text(column.train_seconds) if not column.reference else "–", shares[1]),
            ("–" if step is None else f"{step:.2f} s" if step >= 1 else f"{1000 * step:.0f} ms", shares[2]),
            ("–" if peak is None else size(peak), shares[3]),
            (time_text(column.evaluate_seconds), shares[4]),
            (loss_text(column.curves), None),
        ]
        cells = [{"text": text, "share": share} for text, share in texts]
        rows.append({"shown": column.shown, "colour": palette[i], "cells": cells})
    return rows


def peak_memory(column: Column) -> float | None:
    """Mean peak memory of the trainings in bytes; None where no log has it."""
    found = [
        float(line["peak_memory"])
        for path in column.runs
        for line in RunFolder(path).log()
        if line.get("event") == "trained" and isinstance(line.get("peak_memory"), int | float)
    ]
    return fmean(found) if found else None


def curves_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Curves over the steps: training loss, validation loss, rate, gradient norm, and validation loss by task.

    A curve has a series for every run that logged it: (step, value), value None where it was not finite.
    """
    palette = colours(comparison)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for i, column in enumerate(comparison.columns):
        for seed, path in zip(column.seeds, column.runs, strict=True):
            name = column.shown if len(column.seeds) == 1 else f"{column.shown}, seed {seed}"
            for kind, points in _points(RunFolder(path)).items():
                series = {
                    "label": name,
                    "colour": palette[i],
                    "faint": len(column.seeds) > 1,
                    "points": sorted(points.items()),
                }
                kinds.setdefault(kind, []).append(series)
    first = ["training loss", "validation loss", "auxiliary loss", "learning rate", "gradient norm"]
    order = [*(k for k in first if k in kinds), *sorted(k for k in kinds if k not in first)]
    return [{"name": kind, "series": kinds[kind]} for kind in order]


_LOGGED = {
    "training loss": "loss",
    "auxiliary loss": "auxiliary_loss",
    "learning rate": "learning_rate",
    "gradient norm": "grad_norm",
}


def _points(folder: RunFolder) -> dict[str, dict[int, float | None]]:
    """By curve and step. A resumed run logs some steps twice, and the later line replaces the earlier."""
    found: dict[str, dict[int, float | None]] = {}
    for line in folder.log():
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for kind, key in _LOGGED.items():
            if "loss" in line and key in line:
                found.setdefault(kind, {})[step] = _number(line[key])
        if line.get("event") == "validated":
            found.setdefault("validation loss", {})[step] = _number(line.get("validation_loss"))
            by_task = line.get("tasks")
            for task, loss in by_task.items() if isinstance(by_task, dict) else ():
                found.setdefault(f"validation loss: {shortened(task, 60)}", {})[step] = _number(loss)
    return found


def _number(value: object) -> float | None:
    """Five digits of a number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _training_notes(columns: Sequence[Column]) -> list[str]:
    notes = []
    for column in columns:
        for seed, path in zip(column.seeds, column.runs, strict=True):
            for line in RunFolder(path).log():
                if line.get("event") == "collapsed" and isinstance(line.get("layers"), dict):
                    of_seed = f", seed {seed}" if len(column.seeds) > 1 else ""
                    layers = len(line["layers"])
                    place = f"step {line.get('step')}, in {layers} layer{'s' * (layers != 1)}"
                    notes.append(f"{column.shown}{of_seed}: routers collapsed at {place}")
    return notes


def _commands(comparison: Comparison) -> str:
    paths = [path for column in comparison.columns for path in column.runs]
    lines = [
        _command(column.label, seed, RunFolder(path))
        for column in comparison.columns
        for seed, path in zip(column.seeds, column.runs, strict=True)
    ]
    baseline = f" --baseline {shlex.quote(comparison.baseline)}" if comparison.baseline else ""
    every = " ".join(map(shlex.quote, paths))
    return "\n".join(
        [
            "# The recipes are below; save each as the file that is named here.",
            *lines,
            f"dyads compare {every}{baseline}",
            f"dyads report {every}{baseline}",
        ]
    )


def _command(label: str, seed: int, run: RunFolder) -> str:
    """The command that made a run from the recipe of its label."""
    recipe, facts = run.recipe(), run.environment() if run.has_environment else {}
    file, out = f"{label}.yaml", ["--out", str(run.path)]
    if "adapter" in facts:  # scores beside another run
        how = recipe.evaluate
        words = ["evaluate", str(facts["adapter"]), *(["--tasks", file] if how.tasks == "all" else [])]
        words += ["--split", how.split, *(["--limit", str(how.limit)] if how.limit else [])]
        words += ["--unseen", how.unseen] if how.unseen != "error" else []
        words += ["--nearest-by", how.nearest_by] if how.nearest_by != "inputs" else []
    else:
        words = ["train", file]
        out += ["--set", f"seed={seed}"]
        if recipe.adapt is not None:  # each seed adapts a run of its own
            out += ["--set", f"adapt.run={recipe.adapt.run}"]
    return shlex.join(["dyads", *words, *out])


def _run(folder: RunFolder, seed: int) -> dict[str, Any]:
    facts = folder.environment() if folder.has_environment else {}
    versions = facts.get("versions")
    listed = ", ".join(f"{k} {v}" for k, v in versions.items() if v) if isinstance(versions, dict) else "unknown"
    shown = {key: shortened(str(facts.get(key) or "–"), 40) for key in ("device", "threads", "date")}
    return {
        **shown,
        "path": str(folder.path),
        "seed": seed,
        "git": shortened(str(facts.get("git") or "–"))[:19],
        "versions": listed,
    }

# SPDX-License-Identifier: Apache-2.0
"""What the adapters of a comparison learned, for the page: heat maps, maps of the tasks, tokens with their experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dyads.analysis.gates import INSTANCES, Reader, TaskGates, gates_of
from dyads.analysis.inspection import kinds_of
from dyads.analysis.ranks import ranks, ranks_of
from dyads.analysis.redundancy import redundancy
from dyads.analysis.routing import routing_of
from dyads.analysis.tasks import task_similarity_of
from dyads.analysis.tokens import token_experts_of
from dyads.comparing.comparison import Column, Comparison
from dyads.errors import DyadsError, visible
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter

__all__ = ["learned_by", "plane"]

_TOKENS = 3
"""Instances whose tokens are shown, each of another task."""
_LONGEST = 400
"""Tokens of an instance that are shown."""
_MOST_PAIRED = 100
"""Tasks that are compared pair by pair; pairs of more would make the page large, and their squares cannot be read."""
Numbers = npt.NDArray[np.float64]


def learned_by(
    comparison: Comparison,
    *,
    model: bool = True,
    tokens: bool = True,
    progress: Callable[[str], object] = lambda name: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """(what each trained method's first run learned, notes on what is left out).

    Without `model` no base model is loaded; without `tokens` no text of an instance is in it.
    """
    found: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}  # the columns of each, as several often share one
    for column in comparison.columns:
        if column.reference:
            continue
        progress(column.label)
        try:
            of_column = _of_column(column, model, tokens)
        except (DyadsError, OSError) as error:
            notes.setdefault(visible(str(error)), []).append(column.shown)
            continue
        if of_column["maps"]:
            found.append(of_column)
        for note in of_column.pop("notes"):
            notes.setdefault(note, []).append(column.shown)
    return found, [f"{', '.join(shown)}: {note}" for note, shown in notes.items()]


def _of_column(column: Column, model: bool, tokens: bool) -> dict[str, Any]:
    folder = RunFolder(column.runs[0])
    adapter = SavedAdapter.read(folder.path)
    content: dict[str, Any] = {"name": visible(column.shown), "maps": [], "taskmaps": [], "tokens": None, "notes": []}
    if len(column.runs) > 1:
        content["notes"].append(f"seed {column.seeds[0]} is shown")
    if adapter.layers[0].core is None:
        of_lora = ranks(folder)
        content["maps"] = [
            _by_layer(
                "Effective rank of the update",
                "How many directions the update of each layer uses.",
                of_lora.effective.values,
                of_lora.effective.axes,
            )
        ]
        content["notes"] += of_lora.notes
        return content
    by_token = bool(adapter.looks_at & {"x", "h"})
    if by_token and not model:
        content["notes"].append("its gates depend on the layer's input, and no model was to be loaded (--no-model)")
        content["maps"] = _overlaps(folder, pairs=False)  # gates of tokens have no update of a task
        return content
    reader = Reader(folder) if by_token else None
    gates = gates_of(folder, INSTANCES, reader)
    content["notes"] += gates.notes
    pairs = len(gates.tasks) <= _MOST_PAIRED
    if not pairs:
        content["notes"].append(
            f"{len(gates.tasks):,} tasks are too many for a map of their pairs;"
            f" `dyads inspect {folder.path} --what tasks` compares them"
        )
    similarities = _similarities(gates, content) if pairs else []
    content["maps"] = [*_routing(gates), *_ranks(gates), *similarities, *_overlaps(folder, pairs=pairs)]
    if reader is not None and tokens:
        content["tokens"] = _tokens(reader)
    return content


def _map(
    title: str,
    about: str,
    values: Numbers,
    rows: Sequence[str],
    columns: Sequence[str],
    names: tuple[str, str],
    bounds: tuple[float | None, float | None] = (None, None),
) -> dict[str, Any]:
    """A heat map; bounds of the colours that are None are those of the values."""
    known = values[np.isfinite(values)]
    low, high = (float(f(known)) if known.size else 0.0 for f in (np.min, np.max))
    return {
        "title": title,
        "about": about,
        "rows": list(map(visible, rows)),
        "columns": list(map(visible, columns)),
        "row": names[0],
        "column": names[1],
        "values": [[_digits(v) for v in row] for row in values],
        "low": _digits(low if bounds[0] is None else bounds[0]),
        "high": _digits(high if bounds[1] is None else bounds[1]),
    }


def _digits(value: float) -> float | None:
    return float(f"{value:.3g}") if np.isfinite(value) else None


def _by_layer(
    title: str, about: str, values: Numbers, axes: dict[str, tuple[str, ...]], top: float | None = None
) -> dict[str, Any]:
    """(task layer) with the layers kind by kind."""
    order, names = _layers(axes["layer"])
    return _map(title, about, values[:, order], axes["task"], names, ("task", "layer"), (0, top))


def _layers(modules: Sequence[str]) -> tuple[list[int], list[str]]:
    """The order of modules kind by kind, and their names in it."""
    kinds, places = kinds_of(modules)
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    order = sorted(range(len(modules)), key=lambda i: (first[kinds[i]], i))
    return order, [f"{kinds[i]} {places[i]}".strip() for i in order]


def _routing(gates: TaskGates) -> list[dict[str, Any]]:
    if len(gates.weights.axes["expert"]) < 2:
        return []
    found = routing_of(gates)
    axes = found.weights.axes
    order, layers = _layers(axes["layer"])
    experts = [f"expert {e}" for e in axes["expert"]]
    by_layer = found.weights.mean("task", "choice").values[order]
    maps = [
        _map(
            "Experts by task",
            "Mean weight of every expert for each task, over layers and choices.",
            found.weights.mean("layer", "choice").values,
            axes["task"],
            experts,
            ("task", "expert"),
            (0, None),
        ),
        _map(
            "Experts by layer",
            "Mean weight of every expert in each layer, over tasks and choices.",
            by_layer.T,
            experts,
            layers,
            ("expert", "layer"),
            (0, None),
        ),
    ]
    if gates.tokens:
        maps.append(
            _by_layer(
                "Entropy of a token's gates",
                "0: a token uses one expert; 1: all experts have equal weights.",
                found.entropy.mean("choice").values,
                axes,
                1,
            )
        )
    return maps


def _ranks(gates: TaskGates) -> list[dict[str, Any]]:
    found = ranks_of(gates)
    largest = float(found.largest.values.max())
    maps = []
    if found.chosen is not None:
        maps.append(
            _by_layer("Ranks that tasks chose", "By task and layer.", found.chosen.values, found.chosen.axes, largest)
        )
    about = "How many directions the update of a task uses: exp of the entropy of its singular values."
    maps.append(_by_layer("Effective rank of the update", about, found.effective.values, found.effective.axes, largest))
    return maps


def _similarities(gates: TaskGates, content: dict[str, Any]) -> list[dict[str, Any]]:
    if len(gates.tasks) < 2:
        return []
    found = task_similarity_of(gates)
    maps = []
    tasks = list(map(visible, gates.tasks))
    for by in found.similarity.axes["by"]:
        values, order = found.similarity.at(by=by).values, found.order(by)
        names = [tasks[i] for i in order]
        maps.append(
            _map(
                f"Similarity of tasks by {by}",
                "Cosine, with the tasks in the order of the dendrogram.",
                values[np.ix_(order, order)],
                names,
                names,
                ("task", "task"),
            )
        )
        x, y = plane(values)
        others = values - 2 * np.eye(len(values))
        near = [[tasks[int(j)], _digits(values[i, j])] for i, j in enumerate(others.argmax(1))]
        merges = [[int(a), int(b), float(f"{d:.4g}")] for a, b, d, _ in found.merges.at(by=by).values]
        content["taskmaps"].append(
            {"by": by, "tasks": tasks, "x": x, "y": y, "near": near, "merges": merges, "order": order}
        )
    return maps


def plane(similarity: Numbers) -> tuple[list[float], list[float]]:
    """Positions of tasks in a plane, 0 to 1, by classical scaling of 1 - similarity."""
    n = len(similarity)
    distance = np.clip(1 - similarity, 0, None)
    centred = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(-centred @ distance**2 @ centred / 2)
    top = vectors[:, ::-1][:, :2] * np.sqrt(np.clip(values[::-1][:2], 0, None))
    top *= np.sign(top[np.abs(top).argmax(0), range(top.shape[1])])  # eigenvectors have no sign of their own
    low, high = top.min(0), top.max(0)
    scaled = np.where(high - low > 1e-9, (top - low) / np.maximum(high - low, 1e-9), 0.5)
    return [round(float(v), 3) for v in scaled[:, 0]], [round(float(v), 3) for v in scaled[:, 1]]


def _overlaps(folder: RunFolder, *, pairs: bool) -> list[dict[str, Any]]:
    try:
        found = redundancy(folder, tasks=pairs)
    except DyadsError:  # one expert, and one update for all tasks
        return []
    maps = []
    for what, array in (("experts", found.experts), ("tasks", found.tasks)):
        for side in ("down", "up") if array is not None else ():
            assert array is not None
            of_side = array.at(side=side).mean("layer")
            names = next(iter(of_side.axes.values()))
            labels = [f"expert {name}" for name in names] if what == "experts" else names
            about = "Mean overlap of their subspaces over layers; 1: the one contains the other, 0: orthogonal."
            one = what[:-1]
            title = f"Overlap of {what}, {side}-projections"
            maps.append(_map(title, about, of_side.values, labels, labels, (one, one), (0, 1)))
    return maps


def _tokens(reader: Reader) -> dict[str, Any] | None:
    """Of the first instance of some tasks: by layer the most used expert of every token, and its weight in percent."""
    instances = []
    layers: list[str] = []
    experts = 0
    for task in reader.tasks[:: max(1, len(reader.tasks) // _TOKENS)][:_TOKENS]:
        examples = reader.examples(task)
        if not examples:
            continue
        try:
            found = token_experts_of(reader, task, examples[0])
        except DyadsError:  # no layer sees the tokens one by one
            return None
        order, names = _layers(found.weights.axes["layer"])
        values = found.weights.mean("choice").values[:_LONGEST]
        values = np.concatenate([values.mean(1, keepdims=True), values[:, order]], axis=1)  # (token layer expert)
        layers, experts = ["mean over layers", *names], values.shape[-1]
        instances.append(
            {
                "title": visible(f"{task.name}, {examples[0].id}"),
                "texts": [visible(text, keep="\n\t") for text in found.texts[:_LONGEST]],
                "expert": values.argmax(-1).T.tolist(),
                "weight": np.rint(100 * values.max(-1)).astype(int).T.tolist(),
            }
        )
    return {"layers": layers, "experts": experts, "instances": instances} if instances else None

# SPDX-License-Identifier: Apache-2.0
"""How do runs compare, task by task and over all? Reads folders, nothing else.

Runs of one name are one column, over their seeds. Runs that were not scored on the same instances of the same tasks
with the same model are refused (comparing/comparable.py says which); what else differs (budget, learning rate, mixture,
decoding) becomes a note. Every mean has its interval (comparing/intervals.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from dyads.comparing.comparable import Curve, ScoredRun, changed, find, grouped, read
from dyads.comparing.intervals import Array, Interval, Resampled, interval, resample
from dyads.comparing.metric_moments import score
from dyads.errors import RunError, did_you_mean
from dyads.recipe.spec import UNTRAINED, Recipe
from dyads.runs.folder import RunFolder, ScoreRow

__all__ = ["Column", "Comparison", "Pair", "TaskRow", "compare"]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task, as all runs were scored on it."""

    task: str
    category: str
    metric: str
    version: int
    fingerprint: str
    n: int


@dataclass(frozen=True, slots=True)
class Column:
    """The runs of one name. Scores are means over seeds."""

    label: str
    method: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    parameters: int
    steps: int
    train_seconds: float
    evaluate_seconds: float
    scores: tuple[Interval, ...]  # one a task, in the order of Comparison.tasks
    micro: Interval
    macro: Interval
    micro_by_seed: tuple[float, ...]
    macro_by_seed: tuple[float, ...]
    curves: tuple[Curve, ...]  # of the runs whose log has enough lines

    @property
    def reference(self) -> bool:
        """Whether it trains nothing and only shows what was there before."""
        return self.method in UNTRAINED


@dataclass(frozen=True, slots=True)
class Pair:
    """One column against another, both ways round in a Comparison."""

    row: str
    column: str
    wins: int  # tasks on which row is ahead of column
    ties: int
    losses: int
    p_value: float  # sign test against even chances, ties left out
    micro: Interval  # row minus column
    macro: Interval

    @property
    def win_rate(self) -> float:
        """Share of the tasks on which row is ahead; a tie counts half."""
        return (self.wins + self.ties / 2) / (self.wins + self.ties + self.losses)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that a table or page needs."""

    split: str
    model: str
    tasks: tuple[TaskRow, ...]
    columns: tuple[Column, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]
    baseline: str | None
    resamples: int
    bootstrap_seed: int

    def pair(self, row: str, column: str) -> Pair:
        """The pair of two labels."""
        return next(p for p in self.pairs if (p.row, p.column) == (row, column))


def compare(
    folders: Sequence[str | Path | RunFolder],
    *,
    baseline: str | None = None,
    resamples: int = 10_000,
    bootstrap_seed: int = 0,
) -> Comparison:
    """Compare runs: run folders, or folders that hold some. `baseline` names the column that differences refer to."""
    if not folders:
        raise RunError("nothing to compare: name at least one run folder")
    if resamples < 1:
        raise RunError(f"at least one bootstrap resample is needed, got {resamples}")
    found, left_out = find(folders)
    runs = [read(folder) for folder in found]
    groups = grouped(runs)
    if baseline is not None and baseline not in groups:
        raise RunError(f"no run is named '{baseline}'{did_you_mean(baseline, groups)}")

    labels = list(groups)
    tasks = list(runs[0].headline)
    ordered = [run for label in labels for run in groups[label]]
    matrices = [_matrix(task, ordered) for task in tasks]
    values = [partial(score, runs[0].headline[task]["metric"]) for task in tasks]
    sizes = np.array([m.shape[1] for m in matrices], dtype=np.float64)
    seeds = {label: tuple(run.seed for run in groups[label]) for label in labels}
    boot = resample(matrices, values, seeds, resamples, bootstrap_seed)

    per_run = np.stack([of(m.mean(axis=1)) for of, m in zip(values, matrices, strict=True)])  # (tasks, runs)
    micro_runs, macro_runs = sizes / sizes.sum() @ per_run, per_run.mean(axis=0)
    columns: list[Column] = []
    means = np.empty((len(tasks), len(labels)))
    start = 0
    for i, label in enumerate(labels):
        here = slice(start, start := start + len(groups[label]))
        means[:, i] = per_run[:, here].mean(axis=1)
        columns.append(_column(groups[label], means[:, i], micro_runs[here], macro_runs[here], boot, i))
    pairs = tuple(_pair(columns, means, boot, i, j) for i, j in permutations(range(len(labels)), 2))
    return Comparison(
        split=runs[0].scores["split"],
        model=next((r for r in runs if r.recipe.method.name != "majority"), runs[0]).recipe.model.name,
        tasks=tuple(
            TaskRow(t, row["category"], row["metric"], row["version"], row["fingerprint"], row["n"])
            for t, row in runs[0].headline.items()
        ),
        columns=tuple(columns),
        pairs=pairs,
        notes=(*left_out, *_notes(groups, columns, runs[0].headline)),
        baseline=baseline,
        resamples=resamples,
        bootstrap_seed=bootstrap_seed,
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


def _matrix(task: str, runs: Sequence[ScoredRun]) -> Array:
    """What instances give to a task's headline score, (runs, instances, k); the instances in one order for all."""
    ids = list(runs[0].values[task])
    return np.array([[run.values[task][i] for i in ids] for run in runs], dtype=np.float64)


def _column(group: Sequence[ScoredRun], means: Array, micro: Array, macro: Array, boot: Resampled, i: int) -> Column:
    first = group[0]
    return Column(
        label=first.label,
        method=first.scores["method"],
        runs=tuple(run.path for run in group),
        seeds=tuple(run.seed for run in group),
        parameters=first.scores["parameters"],
        steps=first.scores["steps"],
        train_seconds=_mean(run.scores["seconds"]["train"] for run in group),
        evaluate_seconds=_mean(run.scores["seconds"]["evaluate"] for run in group),
        scores=tuple(
            Interval(float(m), float(low), float(high))
            for m, (low, high) in zip(means, boot.by_task[:, :, i], strict=True)
        ),
        micro=interval(micro.mean(), boot.micro[:, i]),
        macro=interval(macro.mean(), boot.macro[:, i]),
        micro_by_seed=tuple(map(float, micro)),
        macro_by_seed=tuple(map(float, macro)),
        curves=tuple(run.curve for run in group if run.curve is not None),
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _pair(columns: Sequence[Column], means: Array, boot: Resampled, i: int, j: int) -> Pair:
    gap = means[:, i] - means[:, j]
    wins, losses = int((gap > 1e-9).sum()), int((gap < -1e-9).sum())
    return Pair(
        row=columns[i].label,
        column=columns[j].label,
        wins=wins,
        ties=len(gap) - wins - losses,
        losses=losses,
        p_value=float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
        micro=interval(columns[i].micro.value - columns[j].micro.value, boot.micro[:, i] - boot.micro[:, j]),
        macro=interval(columns[i].macro.value - columns[j].macro.value, boot.macro[:, i] - boot.macro[:, j]),
    )


# --- notes ------------------------------------------------------------------------------------------------------------


def _notes(
    groups: Mapping[str, list[ScoredRun]], columns: Sequence[Column], tasks: Mapping[str, ScoreRow]
) -> list[str]:
    notes = []
    metrics = Counter(row["metric"] for row in tasks.values())
    if len(metrics) > 1:
        listed = ", ".join(f"{metric} ({count} task{'s' * (count > 1)})" for metric, count in metrics.most_common())
        notes.append(f"micro and macro average over different metrics: {listed}")
    seeds = {c.label: c.seeds for c in columns if not c.reference}
    if len(set(seeds.values())) > 1:
        notes.append("seeds differ: " + _values({k: "+".join(map(str, v)) for k, v in seeds.items()}))
    if any(len(s) == 1 for s in seeds.values()):
        notes.append("intervals of columns with one seed are about the instances alone, not about another training")
    trained = {c.label: c.parameters for c in columns if not c.reference}
    if trained and max(trained.values()) > 1.05 * min(trained.values()):
        notes.append(
            "trainable parameters differ by more than 5 %: " + _values({k: f"{v:,}" for k, v in trained.items()})
        )
    notes += _recipe_notes(groups)
    for column in columns:
        falling = [c for c in column.curves if c.falls]
        if falling:
            before, last = _mean(c.before for c in falling), _mean(c.last for c in falling)
            which = f" ({len(falling)} of {len(column.runs)} seeds)" if len(column.runs) > 1 else ""
            notes.append(
                f"{column.label}: training loss still fell in the last tenth of the steps, "
                f"{before:.3f} → {last:.3f}{which}"
            )
    unlogged = [c.label for c in columns if not c.reference and len(c.curves) < len(c.runs)]
    if unlogged:
        notes.append(f"too few log lines to say whether the loss had flattened: {', '.join(unlogged)}")
    common = [c.micro.value for c in columns if c.method == "majority"]
    for column in columns:
        if column.method == "zero-shot" and (_has_zero(column) or column.micro.value < max(common, default=0.0)):
            notes.append(
                f"{column.label}: an untrained model rarely answers in the expected form, "
                "so a low score says little about what it knows"
            )
    # Heads are random before they are trained, so an encoder has no zero-shot run.
    headed = any(RunFolder(run.path).heads.is_file() for group in groups.values() for run in group)
    possible = ("majority",) if headed else UNTRAINED
    absent = [name for name in possible if all(c.method != name for c in columns)]
    if absent and trained:
        notes.append(f"no {' and no '.join(absent)} run here: add one to see how much of a score was learned")
    return notes


def _has_zero(column: Column) -> bool:
    return any(round(score.value, 1) == 0 for score in column.scores)  # as the tables show it


def _recipe_notes(groups: Mapping[str, list[ScoredRun]]) -> list[str]:
    """What the recipes of trained columns differ in besides the method; of references only how they decode."""
    recipes = {label: group[0].recipe for label, group in groups.items()}
    trained = [label for label, recipe in recipes.items() if recipe.method.trains]
    decoding = [label for label, recipe in recipes.items() if recipe.method.name != "majority"]
    notes = []
    for labels, sections in ((trained, ("train.", "mixture.", "adapt")), (decoding, ("evaluate.", "model."))):
        flat = {label: recipes[label] for label in labels}
        keys = dict.fromkeys(
            key
            for a, b in pairwise(flat.values())
            for key in changed(a, b)
            if key.startswith(sections) and key not in ("evaluate.split", "evaluate.limit")
        )
        notes += [f"{key} differs: " + _values({k: _get(recipe, key) for k, recipe in flat.items()}) for key in keys]
    return notes


def _get(recipe: Recipe, dotted: str) -> Any:
    value: Any = recipe.resolved()
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _values(by_label: Mapping[str, Any]) -> str:
    """`0.001 (lora, mode), 0.002 (more)`: each value once, with the columns that have it."""
    grouped: dict[str, list[str]] = {}
    for label, value in by_label.items():
        grouped.setdefault(str(value), []).append(label)
    return ", ".join(f"{value} ({', '.join(labels)})" for value, labels in grouped.items())

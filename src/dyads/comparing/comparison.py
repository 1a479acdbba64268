# SPDX-License-Identifier: Apache-2.0
"""Comparison of runs, task by task and over all, read from their folders.

Runs of one name are one column, over their seeds. Runs that were not scored on the same instances of the same tasks
with the same model are refused (comparing/scored_runs.py); other differences (budget, learning rate, mixture, decoding)
become notes. Every mean and difference has its interval (comparing/intervals.py).

The differences that a table shows are a family: from the baseline, or of every pair. Among many null differences the
intervals of some exclude zero by chance, so verdicts rest on p-values with Holm's correction over the family, for micro
and macro each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np

from dyads.comparing.intervals import LEVEL, Array, Interval, Sample, holm, sign_flip_p
from dyads.comparing.notes import notes_on
from dyads.comparing.scored_runs import Curve, ScoredRun, find, grouped, read
from dyads.errors import ConfigError, RunError, did_you_mean
from dyads.recipe.spec import UNTRAINED
from dyads.runs.folder import RunFolder

__all__ = ["GIVEN_TASK", "Column", "Comparison", "Pair", "TaskRow", "Verdict", "compare"]

GIVEN_TASK = "†"
"""Mark of columns whose gates are given the task."""

MANY_PAIRS = 15
"""More pairs than these are not all shown without a baseline."""

Verdict = Literal["ahead", "behind", "undecided"]


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
    given_task: bool  # whether the gates are given each instance's task, which the others read from the prompt alone

    @property
    def reference(self) -> bool:
        """Whether nothing is trained: the majority answer, or the base model alone."""
        return self.method in UNTRAINED

    @property
    def shown(self) -> str:
        """The label with the mark of a method that is given the task."""
        return f"{self.label} {GIVEN_TASK}" if self.given_task else self.label


@dataclass(frozen=True, slots=True)
class Pair:
    """One column minus another; a Comparison has both directions."""

    row: str
    column: str
    wins: int  # tasks on which row is ahead of column
    ties: int
    losses: int
    p_value: float | None  # of wins - losses, by flips within seeds; None: the two have different seeds
    micro: Interval
    macro: Interval
    micro_holm: float | None = None  # corrected p-values; None outside the family of shown differences
    macro_holm: float | None = None

    @property
    def win_rate(self) -> float:
        """Share of the tasks on which row is ahead; a tie counts half."""
        return (self.wins + self.ties / 2) / (self.wins + self.ties + self.losses)

    @property
    def micro_verdict(self) -> Verdict:
        """Whether row is ahead over all instances, after the correction."""
        return _verdict(self.micro, self.micro_holm)

    @property
    def macro_verdict(self) -> Verdict:
        """Whether row is ahead on the mean over tasks, after the correction."""
        return _verdict(self.macro, self.macro_holm)


def _verdict(difference: Interval, p: float | None) -> Verdict:
    if p is None or p >= 1 - LEVEL:
        return "undecided"
    return "ahead" if difference.value > 0 else "behind"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tasks, columns, pairs and notes: all that a table or page shows."""

    split: str
    model: str
    tasks: tuple[TaskRow, ...]
    columns: tuple[Column, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]
    baseline: str | None
    """The label that was given, or was chosen where all pairs are too many."""
    samples: tuple[Sample, ...] = field(default=(), repr=False, compare=False)
    """Scores over seeds and instances, one a column; in no table."""

    def difference(self, row: str, column: str) -> Sample:
        """One column minus another over seeds and instances, paired as in `pair`."""
        i, j = ([c.label for c in self.columns].index(label) for label in (row, column))
        return _difference(self.columns, self.samples, i, j)[0]

    def weights(self, on: str) -> Array:
        """The weights of the tasks in a mean: macro, micro, or a task's name for its score alone."""
        sizes = np.array([task.n for task in self.tasks], dtype=np.float64)
        if on in ("macro", "micro"):
            return sizes / sizes.sum() if on == "micro" else np.full(len(sizes), 1 / len(sizes))
        names = [task.task for task in self.tasks]
        if on not in names:
            raise RunError(f"'{on}' is neither macro, micro nor a task{did_you_mean(on, names)}")
        alone: Array = np.eye(len(names))[names.index(on)]
        return alone

    def pair(self, row: str, column: str) -> Pair:
        """The pair of two labels."""
        return next(p for p in self.pairs if (p.row, p.column) == (row, column))

    @property
    def differences(self) -> tuple[Pair, ...]:
        """The family of pairs that tables show, with corrected p-values."""
        return tuple(pair for pair in self.pairs if pair.macro_holm is not None)


def compare(folders: Sequence[str | Path | RunFolder], *, baseline: str | None = None) -> Comparison:
    """Compare runs: run folders, or folders that hold some. `baseline` names the column that differences refer to."""
    if not folders:
        raise RunError("nothing to compare: name at least one run folder")
    found, left_out = find(folders)
    runs = [read(folder) for folder in found]
    groups = grouped(runs)
    if baseline is not None and baseline not in groups:
        raise RunError(f"no run is named '{baseline}'{did_you_mean(baseline, groups)}")

    rows = runs[0].headline
    tasks = tuple(
        TaskRow(t, row["category"], row["metric"], row["version"], row["fingerprint"], row["n"])
        for t, row in rows.items()
    )
    ids = {task: list(runs[0].values[task]) for task in rows}
    samples = [_sample(group, ids) for group in groups.values()]
    sizes = np.array([task.n for task in tasks], dtype=np.float64)
    micro, macro = sizes / sizes.sum(), np.full(len(tasks), 1 / len(tasks))
    columns = tuple(
        _column(group, sample, micro, macro) for group, sample in zip(groups.values(), samples, strict=True)
    )
    labels = list(groups)
    notes = [*left_out, *notes_on(groups, columns, rows)]
    every = len(labels) * (len(labels) - 1) // 2
    if baseline is None and every > MANY_PAIRS:
        baseline = next((c.label for c in columns if not c.reference), labels[0])
        notes.insert(0, f"of {every} differences those from {baseline} are shown; --baseline chooses")
    return Comparison(
        split=runs[0].scores["split"],
        model=next((r for r in runs if r.recipe.method.name != "majority"), runs[0]).recipe.model.name,
        tasks=tasks,
        columns=columns,
        pairs=_corrected(_pairs(columns, samples, micro, macro), labels, baseline),
        notes=tuple(notes),
        baseline=baseline,
        samples=tuple(samples),
    )


def _sample(group: Sequence[ScoredRun], ids: Mapping[str, Sequence[str]]) -> Sample:
    """Scores of a column's runs and the contributions of instances, in the same order for all columns."""
    scores = np.array([[run.headline[task]["value"] for task in ids] for run in group], dtype=np.float64)
    instances = [np.array([[run.values[task][i] for i in order] for run in group]) for task, order in ids.items()]
    return Sample(scores, instances, seedless=not group[0].recipe.method.trains)


def _column(group: Sequence[ScoredRun], sample: Sample, micro: Array, macro: Array) -> Column:
    first = group[0]
    return Column(
        label=first.label,
        method=first.scores["method"],
        runs=tuple(run.path for run in group),
        seeds=tuple(run.seed for run in group),
        parameters=first.scores["parameters"],
        steps=first.scores["steps"],
        train_seconds=fmean(run.scores["seconds"]["train"] for run in group),
        evaluate_seconds=fmean(run.scores["seconds"]["evaluate"] for run in group),
        scores=tuple(sample.interval(weights) for weights in np.eye(len(macro))),
        micro=sample.interval(micro),
        macro=sample.interval(macro),
        micro_by_seed=tuple(map(float, sample.scores @ micro)),
        macro_by_seed=tuple(map(float, sample.scores @ macro)),
        curves=tuple(run.curve for run in group if run.curve is not None),
        given_task=_given_task(first),
    )


def _given_task(run: ScoredRun) -> bool:
    """As the scores say, which older runs do not."""
    try:
        known = run.scores.get("given_task")
        return run.recipe.method.reads_task if known is None else known
    except ConfigError:  # an older run with options that are refused now
        return False


def _difference(columns: Sequence[Column], samples: Sequence[Sample], i: int, j: int) -> tuple[Sample, bool]:
    """(column i minus column j, whether their seeds are paired)."""
    a, b = samples[i], samples[j]
    paired = columns[i].seeds == columns[j].seeds or any(s.seedless and len(s.scores) == 1 for s in (a, b))
    return a.minus(b, paired=paired), paired


def _pairs(columns: Sequence[Column], samples: Sequence[Sample], micro: Array, macro: Array) -> list[Pair]:
    """Every ordered pair, without corrected p-values."""
    pairs: dict[tuple[int, int], Pair] = {}
    for i, j in combinations(range(len(columns)), 2):
        difference, paired = _difference(columns, samples, i, j)
        gap = difference.scores.mean(axis=0)
        wins, losses = int((gap > 1e-9).sum()), int((gap < -1e-9).sum())
        p = sign_flip_p(difference.scores) if paired else None
        one, two = columns[i].label, columns[j].label
        over_instances, over_tasks, ties = (
            difference.interval(micro),
            difference.interval(macro),
            len(gap) - wins - losses,
        )
        pairs[i, j] = Pair(one, two, wins, ties, losses, p, over_instances, over_tasks)
        pairs[j, i] = Pair(two, one, losses, ties, wins, p, -over_instances, -over_tasks)
    return [pairs[key] for key in permutations(range(len(columns)), 2)]


def _corrected(pairs: Sequence[Pair], labels: Sequence[str], baseline: str | None) -> tuple[Pair, ...]:
    """The pairs, with Holm's p-values for the family: all minus the baseline, or each later column minus an earlier."""
    place = {label: i for i, label in enumerate(labels)}
    family = [
        i
        for i, pair in enumerate(pairs)
        if (place[pair.row] > place[pair.column] if baseline is None else pair.column == baseline)
    ]
    result = list(pairs)
    micro, macro = holm([pairs[i].micro.p for i in family]), holm([pairs[i].macro.p for i in family])
    for i, one, two in zip(family, micro, macro, strict=True):
        result[i] = replace(pairs[i], micro_holm=one, macro_holm=two)
    return tuple(result)

# SPDX-License-Identifier: Apache-2.0
"""Interference and forgetting: the scores of each task alone, in the mixture, and after an adaptation.

Every difference has its interval over the instances (and over seeds, where several runs are given), paired by instance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dyads.analysis.named_array import NamedArray, Table
from dyads.comparing.intervals import Sample
from dyads.comparing.scored_runs import ScoredRun, changed, read
from dyads.errors import RunError
from dyads.runs.folder import RunFolder

__all__ = ["Interference", "answer", "interference"]

QUESTION = "of scored runs: what do tasks lose in a mixture?"

Runs = Sequence[str | Path | RunFolder]
BOUNDS = ("value", "low", "high")


@dataclass(frozen=True)
class Interference:
    """Scores of tasks in several settings, and their differences from the mixture."""

    scores: NamedArray
    """(setting task): headline scores, means over runs; nan where a setting does not have the task."""
    differences: NamedArray
    """(setting task bound): a setting minus the mixture, with its 95 % interval."""
    mean: NamedArray
    """(setting bound): the mean difference over the tasks of all settings, with its 95 % interval; nan where tasks have
    different seeds."""
    notes: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """Scores, and differences with their intervals."""
        settings, tasks = self.scores.axes["setting"], self.scores.axes["task"]
        rows = []
        for j, task in enumerate(tasks):
            cells = []
            for i, setting in enumerate(settings):
                value = self.scores.values[i, j]
                cells.append("–" if np.isnan(value) else f"{value:.1f}")
                if setting in self.differences.axes["setting"]:
                    cells.append(_shown(self.differences.at(setting=setting, task=task).values))
            rows.append((task, *cells))
        shared = ~np.isnan(self.scores.values).any(axis=0)
        if shared.sum() > 1:
            cells = []
            for i, setting in enumerate(settings):
                cells.append(f"{self.scores.values[i, shared].mean():.1f}")
                if setting in self.mean.axes["setting"]:
                    cells.append(_shown(self.mean.at(setting=setting).values))
            rows.append((f"mean of {shared.sum()} tasks", *cells))
        header = ["task"]
        for setting in settings:
            header += [setting] + (["minus mixture"] if setting in self.differences.axes["setting"] else [])
        return (Table("Scores by setting", tuple(header), tuple(rows)),)


def answer(runs: Sequence[Path]) -> Interference:
    """The answer of `dyads inspect --what interference`: a run that adapted another is a later one of the mixture, one
    of a single task has it alone, and all others are mixtures."""
    settings: dict[str, list[RunFolder]] = {"mixture": [], "alone": [], "adapted": []}
    for run in map(RunFolder.open, runs):
        trained = _trained(run)
        tasks = trained.task_names() or {row["task"] for row in trained.scores()["scores"]}
        settings["adapted" if trained.recipe().adapt else "alone" if len(tasks) == 1 else "mixture"].append(run)
    return interference(**settings)


def interference(mixture: Runs, alone: Mapping[str, Runs] | Runs = (), adapted: Runs = ()) -> Interference:
    """Compare the scores of runs that learned all tasks with those of single tasks, and of adapted runs.

    `alone` are runs of a single task each, `adapted` are runs of the mixture's tasks after `dyads adapt` learned
    further ones. Runs of a setting with the same task are seeds of one recipe. RunError where they are not, and where
    instances differ.
    """
    given = [run for runs in alone.values() for run in runs] if isinstance(alone, Mapping) else list(alone)
    groups = {"mixture": _by_task(mixture), "alone": _by_task(given), "adapted": _by_task(adapted)}
    groups = {name: found for name, found in groups.items() if found}
    if "mixture" not in groups or len(groups) < 2:
        raise RunError("interference compares a mixture with tasks alone, or after an adaptation: give scored runs")
    tasks = list(groups["mixture"])
    others = [name for name in groups if name != "mixture"]
    scores = np.full((len(groups), len(tasks)), np.nan)
    differences = np.full((len(others), len(tasks), 3), np.nan)
    mean = np.full((len(others), 3), np.nan)
    samples: dict[tuple[str, str], Sample] = {}
    for i, (setting, by_task) in enumerate(groups.items()):
        for j, task in enumerate(tasks):
            if task in by_task:
                _refuse_unlike(groups["mixture"][task][0], by_task[task], task)
                samples[setting, task] = _sample(by_task[task], task, list(groups["mixture"][task][0].values[task]))
                scores[i, j] = samples[setting, task].scores.mean()
    seeds = {(name, t): [run.seed for run in runs] for name, by in groups.items() for t, runs in by.items()}
    shared = [task for task in tasks if all(task in by_task for by_task in groups.values())]
    for i, setting in enumerate(others):
        for j, task in enumerate(tasks):
            if task in groups[setting]:
                paired = seeds[setting, task] == seeds["mixture", task]
                interval = samples[setting, task].minus(samples["mixture", task], paired=paired).interval(np.ones(1))
                differences[i, j] = interval.value, interval.low, interval.high
        if shared and all(
            seeds[name, task] == seeds[name, shared[0]] for name in (setting, "mixture") for task in shared[1:]
        ):
            one, other = (_joined([samples[name, task] for task in shared]) for name in (setting, "mixture"))
            paired = seeds[setting, shared[0]] == seeds["mixture", shared[0]]
            interval = one.minus(other, paired=paired).interval(np.full(len(shared), 1 / len(shared)))
            mean[i] = interval.value, interval.low, interval.high
    if not np.isfinite(differences[..., 0]).any():
        raise RunError("the runs have no task in common")
    one_seed = any(len(runs) == 1 for by_task in groups.values() for runs in by_task.values())
    notes = ("one seed: intervals are about the instances alone, not about another training",) if one_seed else ()
    return Interference(
        NamedArray.of(scores, setting=list(groups), task=tasks),
        NamedArray.of(differences, setting=others, task=tasks, bound=BOUNDS),
        NamedArray.of(mean, setting=others, bound=BOUNDS),
        notes,
    )


def _trained(run: RunFolder) -> RunFolder:
    """The run whose adapter was scored: another one where the scores stand beside it."""
    scored = run.environment().get("adapter") if run.has_environment else None
    if not scored:
        return run
    if not RunFolder(scored).is_run:
        raise RunError(
            f"'{run.path}' has the scores of the adapter in '{scored}', which is not there: run this in the folder"
            " where it was scored"
        )
    return RunFolder(scored)


def _joined(samples: Sequence[Sample]) -> Sample:
    """Several tasks of the same seeds as one sample."""
    return Sample(np.concatenate([x.scores for x in samples], axis=1), [i for x in samples for i in x.instances])


def _shown(bounds: npt.NDArray[np.float64]) -> str:
    value, low, high = bounds
    return "–" if np.isnan(value) else f"{value:+.1f} ({low:.1f} to {high:.1f})"


def _by_task(runs: Runs) -> dict[str, list[ScoredRun]]:
    """Scored runs by task, in the order of their seeds."""
    found: dict[str, list[ScoredRun]] = {}
    scored = [read(run if isinstance(run, RunFolder) else RunFolder.open(run)) for run in runs]
    for run in sorted(scored, key=lambda run: run.seed):
        for task in run.headline:
            found.setdefault(task, []).append(run)
    return found


def _refuse_unlike(first: ScoredRun, runs: Sequence[ScoredRun], task: str) -> None:
    """Refuse runs of a task that are no seeds of one recipe, and other instances than those of the mixture."""
    for a, b in pairwise(runs):
        keys = [key for key in changed(a.recipe, b.recipe) if not key.startswith("tasks")]
        if keys or a.seed == b.seed:
            what = f"they differ in {', '.join(keys)}" if keys else f"both have seed {a.seed}"
            raise RunError(
                f"'{a.path}' and '{b.path}' would be seeds of one setting of task '{task}', but {what}: give the runs"
                " of one method"
            )
    for run in runs:
        one: Mapping[str, object] = first.headline[task]
        other: Mapping[str, object] = run.headline[task]
        unlike = next((key for key in ("version", "metric", "fingerprint") if one[key] != other[key]), None)
        if unlike or first.values[task].keys() != run.values[task].keys():
            raise RunError(
                f"task '{task}' was scored otherwise in '{first.path}' and '{run.path}'"
                f" ({unlike or 'instances'} differ):"
                " score both with the same tasks, split and evaluate.limit"
            )


def _sample(runs: Sequence[ScoredRun], task: str, ids: Sequence[str]) -> Sample:
    scores = np.array([[run.headline[task]["value"]] for run in runs], dtype=np.float64)
    return Sample(scores, [np.array([[run.values[task][i] for i in ids] for run in runs])])

# SPDX-License-Identifier: Apache-2.0
"""How do runs compare, task by task and over all? Reads folders, nothing else.

Runs of one name are one column, over their seeds. Runs that were not scored on the same instances of the same tasks
with the same model are refused; what else differs (budget, learning rate, mixture, decoding) becomes a note.

Intervals are percentile bootstrap intervals, 10,000 resamples, computed here and not by scipy.stats.bootstrap, which
cannot do the three things that matter: resample within each task (the tasks are fixed, so an interval says nothing
about other tasks), draw the *same* instances for every run (so that a difference is paired and what is hard for all
cancels), and draw the seeds too, as a level above the instances (the same seeds for columns that have the same).
With one seed an interval is about the instances alone: it holds for these trained adapters, not for the method.
Few seeds make an interval too narrow; the spread over seeds stands beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from dyads.errors import RunError, did_you_mean
from dyads.runs.config import UNTRAINED, Recipe, differences
from dyads.runs.folder import RunFolder, ScoreRow, Scores

__all__ = ["Column", "Comparison", "Curve", "Interval", "Pair", "TaskRow", "compare"]

_Array = npt.NDArray[np.float64]

_LEVEL = 0.95
_FLAT = 0.02  # a loss that still falls by more than this share between the last two tenths has not flattened
_UNIMPORTANT = (
    "name",
    "seed",
    "evaluate.batch_size",
    "evaluate.limit",  # what was scored is compared itself, since it may differ from the recipe's
    "evaluate.split",
    "train.bucket_window",
    "train.gradient_accumulation",
    "train.gradient_checkpointing",
    "train.logging_steps",
    "train.report_to",
    "train.save_steps",
    "train.threads",
)
"""Recipe keys that two runs may differ in without a word."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


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
class Curve:
    """A run's training loss: its mean over the last tenth of the steps, and over the tenth before."""

    seed: int
    before: float
    last: float

    @property
    def falls(self) -> bool:
        """Whether it had not flattened."""
        return self.before - self.last > _FLAT * abs(self.before)


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


@dataclass(frozen=True)
class _Run:
    path: str
    recipe: Recipe
    scores: Scores
    headline: dict[str, ScoreRow]
    values: dict[str, dict[str, float]]  # task -> instance id -> headline score
    curve: Curve | None

    @property
    def label(self) -> str:
        return self.scores["run"]

    @property
    def seed(self) -> int:
        return self.scores["seed"]


def compare(
    folders: Sequence[str | Path | RunFolder],
    *,
    baseline: str | None = None,
    resamples: int = 10_000,
    bootstrap_seed: int = 0,
) -> Comparison:
    """Compare runs. `baseline` names the column that tables of differences refer to."""
    if not folders:
        raise RunError("nothing to compare: name at least one run folder")
    if resamples < 1:
        raise RunError(f"at least one bootstrap resample is needed, got {resamples}")
    runs = [_read(f if isinstance(f, RunFolder) else RunFolder.open(f)) for f in folders]
    for run in runs[1:]:
        _refuse_unlike(runs[0], run)
    _refuse_other_models(runs)
    groups = _groups(runs)
    if baseline is not None and baseline not in groups:
        raise RunError(f"no run is named '{baseline}'{did_you_mean(baseline, groups)}")

    labels = list(groups)
    tasks = list(runs[0].headline)
    ordered = [run for label in labels for run in groups[label]]
    matrices = [_matrix(task, ordered) for task in tasks]
    sizes = np.array([m.shape[1] for m in matrices], dtype=np.float64)
    seeds = {label: tuple(run.seed for run in groups[label]) for label in labels}
    boot = _bootstrap(matrices, seeds, resamples, bootstrap_seed)

    per_run = np.stack([m.mean(axis=1) for m in matrices])  # (tasks, runs)
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
        notes=tuple(_notes(groups, columns, runs[0].headline)),
        baseline=baseline,
        resamples=resamples,
        bootstrap_seed=bootstrap_seed,
    )


# --- reading and refusing ---------------------------------------------------------------------------------------------


def _read(folder: RunFolder) -> _Run:
    scores = folder.scores()
    again = f"run `dyads evaluate {folder.path}` again"
    headline: dict[str, ScoreRow] = {}
    values: dict[str, dict[str, float]] = {}
    for row in scores["scores"]:
        if not row["headline"]:
            continue
        task, metric = row["task"], row["metric"]
        if task in headline:
            raise RunError(f"'{folder.path}' has two headline scores for task '{task}'; {again}")
        if not row["higher_is_better"]:
            raise RunError(f"task '{task}' has the headline metric {metric}, of which less is better: no average of it")
        predictions = folder.predictions(task)
        lacking = [p["id"] for p in predictions if metric not in p["scores"]]
        if lacking:
            raise RunError(
                f"'{folder.path}': instance '{lacking[0]}' of task '{task}' has no {metric} of its own, "
                f"which intervals need; {again}"
            )
        instances = {p["id"]: p["scores"][metric] for p in predictions}
        mean = sum(instances.values()) / max(1, len(instances))
        if len(instances) != row["n"] or len(predictions) != row["n"] or abs(mean - row["value"]) > 0.01:
            raise RunError(
                f"'{folder.path}': the predictions of task '{task}' ({len(predictions)} instances, {metric} "
                f"{mean:.2f}) are not those that were scored ({row['n']} instances, {row['value']:.2f}); {again}"
            )
        headline[task], values[task] = row, instances
    if not headline:
        raise RunError(f"'{folder.path}' has no headline score of any task; {again}")
    return _Run(str(folder.path), folder.recipe(), scores, headline, values, _curve(folder, scores["seed"]))


def _curve(folder: RunFolder, seed: int) -> Curve | None:
    # A resumed run logs the steps after its checkpoint again; the later line counts.
    points = {line["step"]: line["loss"] for line in folder.log() if _is_number(line.get("loss")) and "step" in line}
    if not points:
        return None
    end = max(points)
    last = [loss for step, loss in points.items() if step > 0.9 * end]
    before = [loss for step, loss in points.items() if 0.8 * end < step <= 0.9 * end]
    return Curve(seed, sum(before) / len(before), sum(last) / len(last)) if before and last else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_unlike(a: _Run, b: _Run) -> None:
    def refuse(what: str, way_out: str) -> RunError:
        return RunError(f"cannot compare '{a.path}' with '{b.path}': {what}. {way_out}")

    if a.scores["split"] != b.scores["split"]:
        raise refuse(
            f"they differ in evaluate.split ({a.scores['split']} and {b.scores['split']})",
            "Evaluate one of them on the other's split.",
        )
    for one, other in ((a, b), (b, a)):
        lacking = [task for task in one.headline if task not in other.headline]
        if lacking:
            shown = ", ".join(lacking[:5]) + (f", … ({len(lacking)} in all)" if len(lacking) > 5 else "")
            raise refuse(f"they differ in tasks, '{other.path}' lacks {shown}", "Give both the same tasks.")
    for task, left in a.headline.items():
        right = b.headline[task]
        for key in ("version", "metric", "n", "fingerprint"):
            if left[key] != right[key]:
                name = "the number of scored instances (evaluate.limit)" if key == "n" else key
                values = f"{left[key]} and {right[key]}"
                way_out = "Evaluate both with the same limit." if key == "n" else "Evaluate both with the same tasks."
                raise refuse(f"task '{task}' differs in {name}: {values}", way_out)
        if a.values[task].keys() != b.values[task].keys():
            example = next(iter(a.values[task].keys() - b.values[task].keys()))
            raise refuse(
                f"task '{task}' was scored on other instances ('{example}' only in the first)",
                "Evaluate both with the same evaluate.limit.",
            )


def _refuse_other_models(runs: Sequence[_Run]) -> None:
    """One model for all; majority reads no model, so it goes with any."""
    with_model = [run for run in runs if run.recipe.method.name != "majority"]
    for run in with_model[1:]:
        first, model = with_model[0].recipe.model, run.recipe.model
        for key in ("name", "kind", "revision"):
            left, right = getattr(first, key), getattr(model, key)
            if left != right:
                raise RunError(
                    f"cannot compare '{with_model[0].path}' with '{run.path}': they differ in model.{key} "
                    f"({left} and {right}). Compare the runs of each model on their own."
                )


def _groups(runs: Sequence[_Run]) -> dict[str, list[_Run]]:
    """Runs by label, the references first, each group in the order of its seeds."""
    groups: dict[str, list[_Run]] = {}
    for run in sorted(runs, key=lambda r: r.recipe.method.trains):
        groups.setdefault(run.label, []).append(run)
    for label, group in groups.items():
        group.sort(key=lambda r: r.seed)
        for a, b in pairwise(group):
            changed = _important(a.recipe, b.recipe)
            if changed:
                shown = "; ".join(f"{key} ({left} and {right})" for key, (left, right) in changed.items())
                raise RunError(
                    f"'{a.path}' and '{b.path}' are both named '{label}' but differ in {shown}. "
                    "Give different recipes different names."
                )
            if a.seed == b.seed:
                raise RunError(f"'{a.path}' and '{b.path}' are the same run: both are '{label}' with seed {a.seed}")
            if a.scores["parameters"] != b.scores["parameters"]:
                raise RunError(
                    f"'{a.path}' and '{b.path}' are both named '{label}' but have {a.scores['parameters']:,} and "
                    f"{b.scores['parameters']:,} parameters"
                )
    return groups


def _important(a: Recipe, b: Recipe) -> dict[str, tuple[Any, Any]]:
    return {k: v for k, v in differences(a.resolved(), b.resolved()).items() if k not in _UNIMPORTANT}


# --- numbers ----------------------------------------------------------------------------------------------------------


def _matrix(task: str, runs: Sequence[_Run]) -> _Array:
    """A task's headline scores, (runs, instances); the instances in one order for all."""
    ids = list(runs[0].values[task])
    return np.array([[run.values[task][i] for i in ids] for run in runs], dtype=np.float64)


@dataclass(frozen=True)
class _Boot:
    """Resampled means: over all instances and over tasks, (resamples, columns); by task only their quantiles."""

    micro: _Array
    macro: _Array
    by_task: _Array  # (tasks, low and high, columns)


def _bootstrap(
    matrices: Sequence[_Array], seeds: Mapping[str, tuple[int, ...]], resamples: int, bootstrap_seed: int
) -> _Boot:
    rng = np.random.default_rng(bootstrap_seed)
    # How often each run is drawn: (resamples, runs, columns). Columns with the same seeds share one draw.
    shares: dict[tuple[int, ...], _Array] = {}
    total = sum(map(len, seeds.values()))
    weights = np.zeros((resamples, total, len(seeds)))
    start = 0
    for i, group in enumerate(seeds.values()):
        k = len(group)
        if group not in shares:
            shares[group] = rng.multinomial(k, np.full(k, 1 / k), size=resamples) / k
        weights[:, start : start + k, i] = shares[group]
        start += k
    instances = sum(m.shape[1] for m in matrices)
    micro = np.zeros((resamples, len(seeds)))
    macro = np.zeros((resamples, len(seeds)))
    by_task = []
    for matrix in matrices:
        n = matrix.shape[1]
        means = np.einsum("sr,src->sc", _resampled_means(matrix, resamples, rng), weights)
        by_task.append(_quantiles(means))
        micro += means * (n / instances)
        macro += means / len(matrices)
    return _Boot(micro, macro, np.stack(by_task))


def _resampled_means(matrix: _Array, resamples: int, rng: np.random.Generator) -> _Array:
    """Every run's mean over n instances drawn with replacement, the same ones for all runs: (resamples, runs)."""
    n = matrix.shape[1]
    rows = max(1, 4_000_000 // n)  # bounds the memory of one draw
    parts = []
    for done in range(0, resamples, rows):
        size = min(rows, resamples - done)
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        parts.append(counts @ matrix.T / n)
    return np.concatenate(parts)


def _quantiles(draws: _Array) -> _Array:
    result: _Array = np.quantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
    return result


def _interval(value: float, draws: _Array) -> Interval:
    low, high = _quantiles(draws)
    return Interval(float(value), float(low), float(high))


def _column(group: Sequence[_Run], means: _Array, micro: _Array, macro: _Array, boot: _Boot, i: int) -> Column:
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
        micro=_interval(micro.mean(), boot.micro[:, i]),
        macro=_interval(macro.mean(), boot.macro[:, i]),
        micro_by_seed=tuple(map(float, micro)),
        macro_by_seed=tuple(map(float, macro)),
        curves=tuple(run.curve for run in group if run.curve is not None),
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _pair(columns: Sequence[Column], means: _Array, boot: _Boot, i: int, j: int) -> Pair:
    gap = means[:, i] - means[:, j]
    wins, losses = int((gap > 1e-9).sum()), int((gap < -1e-9).sum())
    return Pair(
        row=columns[i].label,
        column=columns[j].label,
        wins=wins,
        ties=len(gap) - wins - losses,
        losses=losses,
        p_value=float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
        micro=_interval(columns[i].micro.value - columns[j].micro.value, boot.micro[:, i] - boot.micro[:, j]),
        macro=_interval(columns[i].macro.value - columns[j].macro.value, boot.macro[:, i] - boot.macro[:, j]),
    )


# --- notes ------------------------------------------------------------------------------------------------------------


def _notes(groups: Mapping[str, list[_Run]], columns: Sequence[Column], tasks: Mapping[str, ScoreRow]) -> list[str]:
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
    absent = [name for name in UNTRAINED if all(c.method != name for c in columns)]
    if absent and trained:
        notes.append(f"no {' and no '.join(absent)} run here: add one to see how much of a score was learned")
    return notes


def _recipe_notes(groups: Mapping[str, list[_Run]]) -> list[str]:
    """What the recipes of trained columns differ in besides the method; of references only how they decode."""
    recipes = {label: group[0].recipe for label, group in groups.items()}
    trained = [label for label, recipe in recipes.items() if recipe.method.trains]
    decoding = [label for label, recipe in recipes.items() if recipe.method.name != "majority"]
    notes = []
    for labels, sections in ((trained, ("train.", "mixture.")), (decoding, ("evaluate.", "model."))):
        flat = {label: recipes[label] for label in labels}
        keys = dict.fromkeys(
            key
            for a, b in pairwise(flat.values())
            for key in _important(a, b)
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

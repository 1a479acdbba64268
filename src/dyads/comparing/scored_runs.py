# SPDX-License-Identifier: Apache-2.0
"""Reader of scored runs, and the check that they are comparable.

Runs stand side by side if they were scored on the same instances of the same tasks, with the same model. Runs of one
name are one column, over their seeds, and may differ in nothing else that changes a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dyads.comparing.metric_moments import CLASS_METRICS, METRICS, contributions
from dyads.errors import RunError, shortened
from dyads.recipe.spec import Recipe, differences
from dyads.runs.contents import ScoreRow, Scores
from dyads.runs.folder import RunFolder

__all__ = ["Curve", "ScoredRun", "changed", "find", "grouped", "read"]

_FLAT = 0.02  # a loss that still falls by more than this share between the last two tenths has not flattened
_UNIMPORTANT = (
    "name",
    "seed",
    "adapt.run",  # every seed adapts a run of its own
    "evaluate.batch_size",
    "evaluate.limit",  # what was scored is compared itself, since it may differ from the recipe's
    "evaluate.split",
    "evaluate.tasks",
    "train.gradient_accumulation",
    "train.gradient_checkpointing",
    "train.logging_steps",
    "train.report_to",
    "train.save_steps",
    "train.threads",
    "train.trainer.disable_tqdm",
    "train.validation_limit",
    "train.validation_steps",
)
"""Recipe keys that no score depends on."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Mean training loss of a run over the last tenth of its steps, and over the tenth before.

    Auxiliary losses of a method (contrastive, load-balancing) are not in it.
    """

    seed: int
    before: float
    last: float

    @property
    def falls(self) -> bool:
        """Whether the loss had not flattened."""
        return self.before - self.last > _FLAT * abs(self.before)


@dataclass(frozen=True)
class ScoredRun:
    """A run's recipe, scores, contributions of instances and end of the training loss."""

    path: str
    recipe: Recipe
    scores: Scores
    headline: dict[str, ScoreRow]
    values: dict[str, dict[str, float]]  # task -> instance id -> contribution to the headline score
    curve: Curve | None

    @property
    def label(self) -> str:
        return self.scores["run"]

    @property
    def seed(self) -> int:
        return self.scores["seed"]


def find(places: Sequence[str | Path | RunFolder]) -> tuple[list[RunFolder], list[str]]:
    """The run folders among `places` and the scored ones inside its other folders; with notes on those left out.

    Adaptations are left out where they are scored on other tasks than the other runs of their folder.
    """
    runs: list[RunFolder] = []
    notes: list[str] = []
    for place in places:
        folder = place if isinstance(place, RunFolder) else RunFolder(place)
        if folder.is_run or not folder.path.is_dir():
            runs.append(RunFolder.open(folder.path))
            continue
        inside = [RunFolder(p) for p in sorted(folder.path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
        if not any(run.is_scored for run in inside):
            raise _no_scored_run(folder, inside)
        scored = [run for run in inside if run.is_scored]
        unscored = [run.path.name for run in inside if not run.is_scored and (run.is_run or _holds_runs(run.path))]
        if unscored:
            notes.append(f"left out of {folder.path}, as they have no scores: {', '.join(unscored)}")
        if adapted := _adapted_to_others(scored):
            scored = [run for run in scored if run not in adapted]
            names = ", ".join(run.path.name for run in adapted)
            notes.append(f"left out of {folder.path}, as `dyads adapt` taught them other tasks: {names}")
        runs += scored
    return runs, notes


def _holds_runs(folder: Path) -> bool:
    return any(RunFolder(path).is_run for path in folder.iterdir())


def _adapted_to_others(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """The adaptations among runs that are scored on other tasks than the first run that is none."""
    adapted = [run for run in runs if run.recipe().adapt is not None]
    first = next((run for run in runs if run not in adapted), None)
    return [run for run in adapted if first is not None and _scored_tasks(run) != _scored_tasks(first)]


def _scored_tasks(run: RunFolder) -> set[str]:
    return {row["task"] for row in run.scores()["scores"]}


def _no_scored_run(folder: RunFolder, inside: Sequence[RunFolder]) -> RunError:
    """Error for a folder without a scored run: names unscored runs, or the folders that hold runs."""
    unscored = [run for run in inside if run.is_run]
    if unscored:
        names = ", ".join(run.path.name for run in unscored)
        return RunError(
            f"no run in '{folder.path}' has scores ({names}); `dyads evaluate {unscored[0].path}` scores the first"
        )
    deeper = [run.path for run in inside if _holds_runs(run.path)]
    if deeper:
        return RunError(f"'{folder.path}' holds no run itself; name the folders that do: {', '.join(map(str, deeper))}")
    return RunError(f"'{folder.path}' is no run and holds none; `dyads train` makes such folders")


def read(folder: RunFolder) -> ScoredRun:
    """A run's headline scores with the contributions of their instances; refused if the two do not agree."""
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
            raise RunError(
                f"task '{task}' has the headline metric {metric}, where lower is better; it cannot be averaged"
            )
        predictions = folder.predictions(task)
        if metric in CLASS_METRICS and "labels" not in row:
            raise RunError(
                f"'{folder.path}': scores.json has no labels of task '{task}', which {metric} needs; {again}"
            )
        lacking = [p["id"] for p in predictions if metric not in p["scores"] and metric not in METRICS]
        if lacking:
            raise RunError(
                f"'{folder.path}': instance '{lacking[0]}' of task '{task}' has no {metric} of its own, "
                f"and intervals need one; {again}"
            )
        mean, parts = contributions(metric, predictions, row.get("labels", [])) if predictions else (0.0, ())
        instances = dict(zip((p["id"] for p in predictions), map(float, parts), strict=True))
        if len(instances) != row["n"] or len(predictions) != row["n"] or abs(mean - row["value"]) > 0.01:
            raise RunError(
                f"'{folder.path}': the predictions of task '{task}' ({len(predictions)} instances, {metric} "
                f"{mean:.2f}) are not those that were scored ({row['n']} instances, {row['value']:.2f}); {again}"
            )
        headline[task], values[task] = row, instances
    if not headline:
        raise RunError(f"'{folder.path}' has no headline score of any task; {again}")
    return ScoredRun(str(folder.path), folder.recipe(), scores, headline, values, _curve(folder, scores["seed"]))


def _curve(folder: RunFolder, seed: int) -> Curve | None:
    # A resumed run logs the steps after its checkpoint again; the later line replaces the earlier.
    lines = [line for line in folder.log() if _is_number(line.get("loss")) and "step" in line]
    points = {line["step"]: line["loss"] - (line.get("auxiliary_loss") or 0.0) for line in lines}
    if not points:
        return None
    end = max(points)
    last = [loss for step, loss in points.items() if step > 0.9 * end]
    before = [loss for step, loss in points.items() if 0.8 * end < step <= 0.9 * end]
    return Curve(seed, sum(before) / len(before), sum(last) / len(last)) if before and last else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def grouped(runs: Sequence[ScoredRun]) -> dict[str, list[ScoredRun]]:
    """Runs by label, untrained references first, each group in the order of its seeds; refused if not comparable."""
    for run in runs[1:]:
        _refuse_unlike(runs[0], run)
    _refuse_other_models(runs)
    groups: dict[str, list[ScoredRun]] = {}
    for run in sorted(runs, key=lambda r: r.recipe.method.trains):
        groups.setdefault(run.label, []).append(run)
    for label, group in groups.items():
        group.sort(key=lambda r: r.seed)
        for a, b in pairwise(group):
            unlike = changed(a.recipe, b.recipe)
            if unlike:
                shown = "; ".join(
                    f"{key} ({shortened(str(left))} and {shortened(str(right))})"
                    for key, (left, right) in unlike.items()
                )
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


def changed(a: Recipe, b: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys in which two recipes differ, with both values, except those that no score depends on."""
    return {k: v for k, v in differences(a.resolved(), b.resolved()).items() if k not in _UNIMPORTANT}


def _refuse_unlike(a: ScoredRun, b: ScoredRun) -> None:
    def refuse(what: str, way_out: str) -> RunError:
        return RunError(f"cannot compare '{a.path}' with '{b.path}': {what}. {way_out}")

    if a.scores["split"] != b.scores["split"]:
        raise refuse(
            f"they differ in evaluate.split ({a.scores['split']} and {b.scores['split']})",
            f"Score both alike: `dyads evaluate {b.path} --split {a.scores['split']}`.",
        )
    for one, other in ((a, b), (b, a)):
        lacking = [task for task in one.headline if task not in other.headline]
        if lacking:
            shown = ", ".join(lacking[:5]) + (f", … ({len(lacking)} in all)" if len(lacking) > 5 else "")
            raise refuse(
                f"they differ in tasks, '{other.path}' lacks {shown}",
                "Give both the same tasks, and the same evaluate.tasks.",
            )
    for task, left in a.headline.items():
        right = b.headline[task]
        for key in ("version", "metric", "n", "fingerprint"):
            if left[key] != right[key]:
                name = "the number of scored instances (evaluate.limit)" if key == "n" else key
                values = f"{left[key]} and {right[key]}"
                way_out = "Evaluate both with the same tasks."
                if key == "n":
                    longer, least = (a, right) if left["n"] > right["n"] else (b, left)
                    way_out = f"Score both alike: `dyads evaluate {longer.path} --limit {least['n']}`."
                raise refuse(f"task '{task}' differs in {name}: {values}", way_out)
        if a.values[task].keys() != b.values[task].keys():
            example = next(iter(a.values[task].keys() - b.values[task].keys()))
            raise refuse(
                f"task '{task}' was scored on other instances ('{example}' only in the first)",
                "Evaluate both with the same evaluate.limit.",
            )


def _refuse_other_models(runs: Sequence[ScoredRun]) -> None:
    """All runs need the same base model; `majority` reads none and is exempt."""
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

# SPDX-License-Identifier: Apache-2.0
"""Notes below a comparison: differences between columns besides the method, and limits of their scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dyads.comparing.scored_runs import ScoredRun, changed
from dyads.recipe.spec import UNTRAINED, Recipe
from dyads.runs.contents import ScoreRow
from dyads.runs.folder import RunFolder

if TYPE_CHECKING:
    from dyads.comparing.comparison import Column

__all__ = ["notes_on"]

ENOUGH_SEEDS = 5


def notes_on(
    groups: Mapping[str, list[ScoredRun]], columns: Sequence[Column], tasks: Mapping[str, ScoreRow]
) -> list[str]:
    """Notes on differences, few seeds, unfinished training and missing references, in this order."""
    notes = []
    metrics = Counter(row["metric"] for row in tasks.values())
    if len(metrics) > 1:
        listed = ", ".join(f"{metric} ({count} task{'s' * (count > 1)})" for metric, count in metrics.most_common())
        notes.append(f"micro and macro average over different metrics: {listed}")
    seeds = {c.label: c.seeds for c in columns if not c.reference}
    if len(set(seeds.values())) > 1:
        notes.append("seeds differ: " + _values({k: "+".join(map(str, v)) for k, v in seeds.items()}))
    alone = [label for label, s in seeds.items() if len(s) == 1]
    if alone:
        which = "" if len(alone) == len(seeds) else f" ({', '.join(alone)})"
        notes.append(
            f"one seed{which}: intervals are about the instances alone, not about another training; "
            "verdicts that rest on them stand in brackets"
        )
    few = [label for label, s in seeds.items() if 1 < len(s) < ENOUGH_SEEDS]
    if few:
        notes.append(
            f"fewer than five seeds ({', '.join(few)}): the spread over seeds is estimated from few values, "
            "so intervals are wide; with five or more they narrow"
        )
    trained = {c.label: c.parameters for c in columns if not c.reference}
    if trained and max(trained.values()) > 1.05 * min(trained.values()):
        notes.append(
            "trainable parameters differ by more than 5 %: " + _values({k: f"{v:,}" for k, v in trained.items()})
        )
    notes += _recipe_notes(groups)
    for column in columns:
        falling = [c for c in column.curves if c.falls]
        if falling:
            before, last = fmean(c.before for c in falling), fmean(c.last for c in falling)
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
    if any(run.recipe.evaluate.tasks == "unseen" for group in groups.values() for run in group):
        possible = ("zero-shot",)  # there is no majority answer without training examples
    absent = [name for name in possible if all(c.method != name for c in columns)]
    if absent and trained:
        notes.append(f"no {' and no '.join(absent)} run here: add one to see how much of a score was learned")
    return notes


def _has_zero(column: Column) -> bool:
    return any(round(score.value, 1) == 0 for score in column.scores)  # as the tables show it


def _recipe_notes(groups: Mapping[str, list[ScoredRun]]) -> list[str]:
    """Differences of the trained columns' recipes besides the method; of references only those in decoding."""
    recipes = {label: group[0].recipe for label, group in groups.items()}
    trained = [label for label, recipe in recipes.items() if recipe.method.trains]
    decoding = [label for label, recipe in recipes.items() if recipe.method.name != "majority"]
    notes = []
    for labels, sections in ((trained, ("train.", "mixture.", "adapt")), (decoding, ("evaluate.", "model."))):
        flat = {label: recipes[label] for label in labels}
        keys = dict.fromkeys(
            key for a, b in pairwise(flat.values()) for key in changed(a, b) if key.startswith(sections)
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

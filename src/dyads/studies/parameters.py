# SPDX-License-Identifier: Apache-2.0
"""Parameters of a study's cells, counted and held to its budget before anything trains."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dyads.errors import ConfigError
from dyads.models import budget
from dyads.recipe.spec import Recipe
from dyads.recipe.yaml_source import read_text, to_yaml
from dyads.studies.grid import SEED, Cell, Combination, Study
from dyads.tasks import load_suite

__all__ = ["check_budget", "parameters", "task_names"]


def parameters(recipe: Recipe) -> int:
    """The trained parameters of a recipe's method, without an encoder's heads; 0 for a method that trains nothing."""
    if not recipe.method.trains:
        return 0
    return budget.count(recipe.model.name, recipe.method.name, recipe.method.options, task_names(recipe)).trainable


def check_budget(study: Study, cells: Mapping[Combination, Cell]) -> dict[str, int]:
    """The parameters of every trained cell by its name; ConfigError with all cells outside the budget.

    Adaptations are not counted: what trains in them depends on the run that they adapt.
    """
    spec = study.spec.budget
    if spec is None:
        return {}
    counts: dict[str, int] = {}
    known: dict[str, int] = {}
    for cell in cells.values():
        if cell.recipe.method.trains and cell.recipe.adapt is None:
            key = to_yaml([cell.recipe.resolved()[k] for k in ("model", "method", "tasks")])
            if key not in known:
                known[key] = parameters(cell.recipe)
            counts[cell.name] = known[key]
    mistakes: dict[str, str] = {}
    for combination, cell in cells.items():
        if cell.name not in counts:
            continue
        target = spec.parameters or _like(study, cells, combination, counts)
        found = counts[cell.name]
        if abs(found - target) > spec.within / 100 * target:
            place = ", ".join([cell.label, *(v.name for v in study.table_of(combination))])
            mistakes.setdefault(
                place,
                f"{place}: {found:,} parameters, {100 * (found - target) / target:+.1f} % from {target:,}; "
                + _nearest(cell.recipe, target, spec.within),
            )
    if mistakes:
        raise ConfigError(
            f"{study.path}: outside the budget ({spec.within:g} %), so nothing was trained\n  "
            + "\n  ".join(mistakes.values())
        )
    return counts


def _like(study: Study, cells: Mapping[Combination, Cell], combination: Combination, counts: Mapping[str, int]) -> int:
    """The count of the cell with the budget's value on its axis and this combination's on the others."""
    assert study.spec.budget is not None
    assert study.spec.budget.like is not None
    value = study.find(study.spec.budget.like, "budget.like")
    wanted = {(v.axis, v.name) for v in combination if v.axis not in (value.axis, SEED)}
    for other, cell in cells.items():
        if value in other and {(v.axis, v.name) for v in other if v.axis not in (value.axis, SEED)} == wanted:
            if cell.name not in counts:
                what = "is an adaptation" if cell.recipe.method.trains else "trains nothing"
                raise ConfigError(f"{study.path}: 'budget.like' names '{value.name}', which {what}")
            return counts[cell.name]
    raise ConfigError(
        f"{study.path}: 'budget.like' names '{value.name}', which has no cell to hold '{cells[combination].name}' to:"
        " keep it in the grid, or give `budget: {parameters: NUMBER}`"
    )


def _nearest(recipe: Recipe, target: int, within: float) -> str:
    """The r, and where it meets the budget better the num_experts, that comes nearest to it."""
    options = recipe.method.options
    found = []
    for free in ("r", "num_experts"):
        if free == "num_experts" and free not in options:
            continue
        rest = {k: v for k, v in options.items() if k != free}
        try:
            value, count = budget.solve(
                recipe.model.name,
                recipe.method.name,
                rest,
                free="r" if free == "r" else "num_experts",
                parameters=target,
                task_names=task_names(recipe),
            )
        except ConfigError:
            continue
        off = 100 * (count.trainable - target) / target
        found.append((abs(off), f"{free}: {value} has {count.trainable:,} ({off:+.1f} %)"))
        if abs(off) <= within:
            return f"the nearest is {found[-1][1]}"
    return "no r fits" + (f": the nearest is {min(found)[1]}" if found else "")


def task_names(recipe: Recipe) -> tuple[str, ...]:
    """The names of a recipe's tasks that are trained on, for which gates have rows."""
    return tuple(name for name, trained in _names_of(to_yaml(recipe.resolved()["tasks"])) if trained)


def scored_names(recipe: Recipe) -> tuple[str, ...]:
    """The names of the tasks that a recipe scores."""
    unseen = recipe.evaluate.tasks == "unseen"
    return tuple(name for name, trained in _names_of(to_yaml(recipe.resolved()["tasks"])) if not (unseen and trained))


@cache
def _names_of(tasks: str) -> tuple[tuple[str, bool], ...]:
    """Every task's name, and whether it has training examples."""
    return tuple((task.name, bool(task.train)) for task in load_suite(read_text(tasks, "tasks").data).tasks)

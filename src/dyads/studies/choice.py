# SPDX-License-Identifier: Apache-2.0
"""Choice of a value, such as the learning rate, for each method by validation loss in short trainings.

All methods read the same examples. From two neighbours a method steps towards the lower loss until it rises, so the
best value has a worse one on either side. A training that diverges has an infinite loss; where both neighbours diverge,
the steps go down until one does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dyads.errors import ConfigError
from dyads.recipe.yaml_source import YamlSource, read_text, to_yaml
from dyads.runs.folder import RunFolder
from dyads.studies.grid import Cell, Combination, Study, Value, chosen_source, has_key

__all__ = ["check_choice", "next_values", "trial", "validation_loss"]


def next_values(values: Sequence[Any], start: Sequence[Any] | None, losses: Mapping[Any, float]) -> list[Any]:
    """The values to try next, given the losses so far; none when the best is known."""
    first = [value for value in (start or values) if value not in losses]
    if first or start is None:
        return first
    step = 1 if losses[start[1]] < losses[start[0]] else -1
    at = values.index(start[step == 1])
    while 0 <= at + step < len(values):
        beside = values[at + step]
        if beside not in losses:
            return [beside]
        if losses[beside] >= losses[values[at]] and not math.isinf(losses[values[at]]):
            break
        at += step
    return []


def trial(study: Study, combination: Combination, value: Any) -> Cell:
    """The short training of a combination with one of the values."""
    choose = study.spec.choose
    assert choose is not None
    last = choose.key.rpartition(".")[2]
    layers = [study.trial, chosen_source(choose.key, value)]
    steps = study.cell(combination, layers).recipe.train.steps
    # A loss that is logged at the last step is there before the adapter is, whatever interrupts the run.
    layers.append(read_text(to_yaml({"train": {"validation_steps": steps}}), "choose"))
    return study.cell(combination, layers, extra=Value(last, to_yaml(value, one_line=True), YamlSource({}, {}), True))


def validation_loss(folder: RunFolder) -> float | None:
    """The last validation loss of a complete trial, inf where it is not finite; None before its end."""
    if not folder.is_run or not folder.has_adapter:
        return None
    found = [line["validation_loss"] for line in folder.log() if line.get("event") == "validated"]
    if not found:
        return None
    return math.inf if found[-1] is None else float(found[-1])


def check_choice(study: Study, cells: Mapping[Combination, Cell]) -> None:
    """Refuse a choice that an axis, `adjust` or --set makes too, or that has no validation instances."""
    choose = study.spec.choose
    if choose is None:
        return
    place = choose.key.split(".")
    sources = {value.name: value.source for values in study.axes.values() for value in values}
    sources |= {f"adjust.{i}": source for i, source in enumerate(study.adjustments)}
    for name, source in {**sources, "--set": study.overrides}.items():
        if has_key(source, place):
            raise ConfigError(f"{study.path}: 'choose' chooses {choose.key}, but '{name}' sets it: drop one of them")
    for combination, cell in cells.items():
        if cell.recipe.method.trains:
            found = trial(study, combination, choose.values[0])
            if not found.recipe.train.validation_limit:
                raise ConfigError(
                    f"{study.path}: 'choose' needs validation losses, but '{cell.name}' has none: set"
                    " train.validation_limit"
                )

# SPDX-License-Identifier: Apache-2.0
"""Tasks: examples with references, and the metrics that score predictions.

Every file of this folder is imported here. A file that registers a family of tasks, such as `starter.py`, is all that a
new family needs; `family.py` has the recipe for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from dyads.errors import ConfigError, TaskError, shortened
from dyads.tasks.family import FamilySpec, Suite, TasksSpec, families, register_family
from dyads.tasks.metrics import metric, metric_names
from dyads.tasks.task import SPLITS, Example, Score, Task

__all__ = [
    "SPLITS",
    "Example",
    "FamilySpec",
    "Score",
    "Suite",
    "Task",
    "TasksSpec",
    "families",
    "load",
    "load_suite",
    "metric",
    "metric_names",
    "register_family",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


Spec: TypeAlias = FamilySpec | Mapping[str, Any]
"""A family with its options: a `FamilySpec`, or a mapping with the key `family`."""


def load_suite(spec: Spec | Sequence[Spec]) -> Suite:
    """The tasks and notes of a family, or of several in turn."""
    if not isinstance(spec, FamilySpec):
        try:
            spec = TypeAdapter[FamilySpec](TasksSpec).validate_python(spec)
        except ValidationError as error:
            raise ConfigError(
                "tasks: " + "; ".join(_mistake(found["loc"], found) for found in error.errors())
            ) from None
    try:
        return spec.load()
    except OSError as error:
        raise TaskError(f"cannot read '{shortened(str(error.filename))}': {error.strerror or error}") from error
    except RuntimeError as error:  # `~user` in a path, where there is no such user
        raise TaskError(f"cannot read the tasks: {shortened(str(error))}") from error


def _mistake(place: Sequence[str | int], error: Mapping[str, Any]) -> str:
    """The sentence for one of pydantic's errors; the place of a key begins with its family, or entry and family."""
    if error["type"] == "extra_forbidden":
        return families()[str(place[-2])].unknown_key(str(place[-1]))
    return ".".join(map(str, place)) + ": " * bool(place) + str(error["msg"])


def load(spec: Spec | Sequence[Spec]) -> list[Task]:
    """The tasks of a family, or of several in turn. A task's index in the list is its integer id everywhere."""
    return list(load_suite(spec).tasks)

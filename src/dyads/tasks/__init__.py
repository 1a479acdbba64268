# SPDX-License-Identifier: Apache-2.0
"""What is asked, and what counts as right?

One file is one family of tasks (`sni`, `files`, `starter`, …); each file registers its family by being imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dyads.errors import ConfigError
from dyads.tasks.family import FamilySpec, Suite, TasksSpec, families, register_family
from dyads.tasks.files import FilesSpec
from dyads.tasks.metrics import metric, metric_names
from dyads.tasks.sni import SNISpec
from dyads.tasks.starter import StarterSpec
from dyads.tasks.task import SPLITS, Example, Score, Task

__all__ = [
    "SPLITS",
    "Example",
    "FamilySpec",
    "FilesSpec",
    "SNISpec",
    "Score",
    "StarterSpec",
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

for _module in iter_modules(__path__):  # a new family is one new file in this folder, and nothing else
    import_module(f"{__name__}.{_module.name}")


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[FamilySpec]:
    return TypeAdapter(TasksSpec)


def load_suite(spec: FamilySpec | Mapping[str, Any]) -> Suite:
    """The tasks of a spec (a model, or a mapping with a key `family`) together with notes about them."""
    if not isinstance(spec, FamilySpec):
        try:
            spec = _adapter().validate_python(dict(spec))
        except ValidationError as error:
            wrong = (".".join(map(str, e["loc"])) + ": " * bool(e["loc"]) + e["msg"] for e in error.errors())
            raise ConfigError("tasks: " + "; ".join(wrong)) from None
    return spec.load()


def load(spec: FamilySpec | Mapping[str, Any]) -> list[Task]:
    """The tasks of a spec; a task's place in the list is its integer id everywhere."""
    return list(load_suite(spec).tasks)

# SPDX-License-Identifier: Apache-2.0
"""What is a family of tasks, and how does a recipe's `tasks:` section find the right one?

A family is one file: a pydantic model of its options, registered at its definition, that loads its own tasks.

    @register_family
    class GlueSpec(FamilySpec):
        family: Literal["glue"] = "glue"
        path: Path

        def load(self) -> Suite: ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from dyads.errors import TaskError, did_you_mean
from dyads.tasks.task import Task

__all__ = ["FamilySpec", "Suite", "TasksSpec", "families", "register_family"]


@dataclass(frozen=True, slots=True)
class Suite:
    """Loaded tasks in the order of their ids, and what a reader should know about them."""

    tasks: tuple[Task, ...]
    notes: tuple[str, ...] = ()
    """One sentence each: what was found, what was missing, what was dropped."""

    def __post_init__(self) -> None:
        names = [t.name for t in self.tasks]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise TaskError(f"two tasks have the same name: {', '.join(twice)}")


class FamilySpec(BaseModel, ABC):
    """The options of one family. Unknown keys are refused with a suggestion."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    family: str

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            for key in given:
                if key not in cls.model_fields:
                    family = cls.model_fields["family"].default
                    raise ValueError(
                        f"unknown key '{key}' for tasks of family '{family}'{did_you_mean(str(key), cls.model_fields)}"
                    )
        return given

    @abstractmethod
    def load(self) -> Suite:
        """Read or make the tasks. Anything wrong with them is a TaskError that names the place."""


_FAMILIES: dict[str, type[FamilySpec]] = {}

Spec = TypeVar("Spec", bound=FamilySpec)


def register_family(spec: type[Spec]) -> type[Spec]:
    """Make a family known under the default of its `family` field."""
    name = str(spec.model_fields["family"].default)
    if name in _FAMILIES and _FAMILIES[name] is not spec:
        raise TaskError(f"a task family named '{name}' is already registered: choose another name")
    _FAMILIES[name] = spec
    return spec


def families() -> dict[str, type[FamilySpec]]:
    """Every registered family: its name and the model of its options."""
    return dict(_FAMILIES)


class _ByFamily:
    """Pydantic glue: a union of the registered families, told apart by `family`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        union = core_schema.tagged_union_schema(
            {name: handler.generate_schema(spec) for name, spec in _FAMILIES.items()}, discriminator="family"
        )
        return core_schema.no_info_before_validator_function(_known_family, union)


def _known_family(given: Any) -> Any:
    if isinstance(given, FamilySpec):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"tasks must be a mapping with a key 'family', got {type(given).__name__}")
    if "family" not in given:
        raise ValueError(f"tasks needs a key 'family'{did_you_mean('', _FAMILIES)}")
    if given["family"] not in _FAMILIES:
        raise ValueError(f"unknown task family '{given['family']}'{did_you_mean(str(given['family']), _FAMILIES)}")
    return given


TasksSpec = Annotated[FamilySpec, _ByFamily()]
"""The type of a recipe's `tasks:` field. It knows the families registered before the field is defined."""

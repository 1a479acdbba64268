# SPDX-License-Identifier: Apache-2.0
"""Task families: the registry behind `family` in the section `tasks` of a recipe.

A family is a pydantic model of its options, registered at its definition, whose `load` returns tasks. A new family is
one new file in this folder; no other source file changes:

    # SPDX-License-Identifier: Apache-2.0
    '''Family `parity`: is a number even?'''

    from __future__ import annotations

    from typing import Literal

    from pydantic import Field

    from dyads.tasks.family import FamilySpec, Suite, register_family
    from dyads.tasks.task import Example, Task

    @register_family
    class ParitySpec(FamilySpec):
        '''Numbers that are even or odd.'''

        family: Literal["parity"] = "parity"
        '''Numbers that are even or odd.'''
        count: int = Field(default=100, ge=3)
        '''Number of examples.'''

        def load(self) -> Suite:
            answers = [("yes", "no")[i % 2] for i in range(self.count)]
            examples = tuple(Example(str(i), f"Is {i} even? Answer: ", (a,)) for i, a in enumerate(answers))
            task = Task(
                name="parity",
                version=1,
                train=examples[2:],
                validation=examples[1:2],
                test=examples[:1],
                metric="accuracy",
                metrics=("accuracy",),
            )
            return Suite((task,))

Recipes, the command line and the tests find the family in the registry; `dyads train --keys` prints the docstrings of
its options. Two steps keep its prompts from changing unnoticed:

- An option without a default, such as a path, needs a value in the tests: a fixture `parity_options` in
  tests/tasks/conftest.py makes small files and returns the options that read them.
- `DYADS_GOLDEN=write pytest tests/tasks/test_golden.py` writes the first prompts to a golden file, to be committed.

A program that imports dyads may register a family too, and then use it in that program's recipes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    SerializeAsAny,
    TypeAdapter,
    model_serializer,
)
from pydantic_core import CoreSchema, core_schema

from dyads.errors import TaskError, did_you_mean, listed, shortened
from dyads.tasks.task import Task

__all__ = ["FamilySpec", "SeveralSpec", "Suite", "TasksSpec", "families", "register_family"]


@dataclass(frozen=True, slots=True)
class Suite:
    """Several tasks in the order of their ids, with notes on how they were loaded."""

    tasks: tuple[Task, ...]
    notes: tuple[str, ...] = ()
    """One sentence each about what was found, missing or dropped."""

    def __post_init__(self) -> None:
        names = Counter(task.name for task in self.tasks)
        if repeated := sorted(name for name, times in names.items() if times > 1):
            raise TaskError(f"two tasks have the same name: {listed(repeated)}; rename one")


class FamilySpec(BaseModel, ABC):
    """The options of one family. Unknown keys are refused; `unknown_key` is the message."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    family: str

    @classmethod
    def unknown_key(cls, key: str) -> str:
        """The error about a key that is no option of this family, with the nearest option."""
        family = cls.model_fields["family"].default
        return f"unknown key '{key}' for tasks of family '{family}'{did_you_mean(key, cls.model_fields)}"

    @abstractmethod
    def load(self) -> Suite:
        """Read or generate the tasks. Errors in the data are TaskErrors that name file and line."""


_FAMILIES: dict[str, type[FamilySpec]] = {}

Spec = TypeVar("Spec", bound=FamilySpec)


def register_family(spec: type[Spec]) -> type[Spec]:
    """Register a family under the default value of its field `family`."""
    name = str(spec.model_fields["family"].default)
    if name in _FAMILIES and _FAMILIES[name] is not spec:
        raise TaskError(f"a task family named '{name}' is already registered: choose another name")
    _FAMILIES[name] = spec
    return spec


def families() -> dict[str, type[FamilySpec]]:
    """The registered families by name."""
    return dict(_FAMILIES)


class _UnionOf:
    """Annotation for a pydantic union of families, distinguished by `family`."""

    def __init__(self, specs: tuple[type[FamilySpec], ...]) -> None:
        self.specs = specs

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {spec.model_fields["family"].default: handler.generate_schema(spec) for spec in self.specs}
        return core_schema.tagged_union_schema(choices, discriminator="family")


@lru_cache(maxsize=4)
def _union(specs: tuple[type[FamilySpec], ...]) -> TypeAdapter[FamilySpec]:
    return TypeAdapter(Annotated[FamilySpec, _UnionOf(specs)])


class SeveralSpec(FamilySpec):
    """Several families in one suite: a list in the recipe. The tasks of an entry follow those of the entries before."""

    family: str = "several"
    """The names of the families, for display."""
    entries: tuple[SerializeAsAny[FamilySpec], ...]

    @model_serializer
    def _as_list(self) -> list[dict[str, Any]]:
        return [entry.model_dump() for entry in self.entries]

    def load(self) -> Suite:
        suites = [entry.load() for entry in self.entries]
        first: dict[str, int] = {}
        for number, suite in enumerate(suites, start=1):
            for task in suite.tasks:
                if first.setdefault(task.name, number) != number:
                    raise TaskError(
                        f"entries {first[task.name]} and {number} of `tasks` both have a task '{task.name}'; "
                        "rename one or leave it out"
                    )
        tasks = tuple(task for suite in suites for task in suite.tasks)
        return Suite(tasks, tuple(note for suite in suites for note in suite.notes))


def _validated(given: Any) -> FamilySpec:
    if isinstance(given, (list, tuple)):
        if not given:
            raise ValueError("tasks is an empty list; name at least one family")
        entries = tuple(_entries().validate_python(list(given)))
        return SeveralSpec(family=" + ".join(entry.family for entry in entries), entries=entries)
    return _one(given)


def _one(given: Any) -> FamilySpec:
    if isinstance(given, FamilySpec):
        return given
    if not isinstance(given, Mapping):
        found = "nothing" if given in (None, "") else shortened(given, 60)
        raise ValueError(
            f"tasks must be a section such as {{family: files, path: my.jsonl}}, or a list of such, got {found}"
        )
    if "family" not in given:
        raise ValueError(f"tasks needs a key 'family'{did_you_mean('', _FAMILIES)}")
    family = str(given["family"])
    if family not in _FAMILIES:
        raise ValueError(f"unknown task family '{family}'{did_you_mean(family, _FAMILIES)}")
    return _union(tuple(_FAMILIES.values())).validate_python(given)


class _OneRegistered:
    """Annotation that makes pydantic validate a mapping as the registered family that its key `family` names."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_one)


@lru_cache(maxsize=1)
def _entries() -> TypeAdapter[list[FamilySpec]]:
    return TypeAdapter(list[Annotated[FamilySpec, _OneRegistered()]])


class _Registered:
    """Annotation for one family, or a list of families.

    The registry is read at validation, so families registered after the field was defined are found.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_validated)


TasksSpec = Annotated[FamilySpec, _Registered()]
"""The type of a recipe's field `tasks`."""

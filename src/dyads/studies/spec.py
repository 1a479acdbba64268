# SPDX-License-Identifier: Apache-2.0
"""Study file: a base recipe, what varies, a budget of parameters, and the claims that the runs decide.

The same strictness as in recipes: unknown keys and wrong values are refused with their line. The docstring under a
field is its help text in `dyads study --keys`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, field_validator

from dyads.recipe.recipe_errors import Key, keys_of
from dyads.recipe.spec import PositiveInt, Section, check_folder_name

__all__ = ["AdjustSpec", "BudgetSpec", "ChooseSpec", "ClaimSpec", "StudySpec", "study_keys"]


def _one_or_many(value: object) -> object:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


Names: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
"""A name, or a list of names."""


class BudgetSpec(Section):
    """The number of trained parameters that every cell has, counted before anything trains."""

    like: str | None = None
    """The number of the cells with this value, such as a method's name, and the same values on the other axes"""
    parameters: PositiveInt | None = None
    """The number itself, in the place of `like`"""
    within: float = Field(default=3.0, ge=0)
    """Largest difference from that number, in percent"""

    def contradictions(self) -> Iterator[str]:
        if (self.like is None) == (self.parameters is None):
            yield "a budget is either `like: NAME` or `parameters: NUMBER`"


class AdjustSpec(Section):
    """Overrides of some combinations, such as the rank of one method at one size."""

    where: dict[str, Any] = Field(min_length=1)
    """Values of axes, one or a list for each"""
    recipe: dict[str, Any] = Field(min_length=1)
    """Overrides of the recipe in the combinations that have these values, over those of the values"""


class ClaimSpec(Section):
    """A sentence about two values of an axis: `{ahead: MoDE, of: LoRA, by: 1}` or `{equal: MoDE, to: LoRA, within: 1}`.

    It is decided for each combination of the other axes.
    """

    ahead: Names | None = None
    """The value, or values, that should score higher; each makes a claim of its own"""
    of: str | None = None
    """The value that they are compared with"""
    by: float = 0.0
    """The smallest difference that the claim means, in points of the score"""
    clear_of: float | None = None
    """The number that the interval must lie above for the claim to be supported; null: `by`. `by: 1, clear_of: 0` is
    supported by a difference of 1 whose interval excludes 0"""
    equal: Names | None = None
    """In the place of `ahead`: the value, or values, that should score the same"""
    to: str | None = None
    """The value that they should equal"""
    within: float | None = Field(default=None, gt=0)
    """The largest difference, either way, that counts as equal"""
    on: str = "macro"
    """macro (mean over tasks), micro (mean over instances), or the name of a task"""
    where: dict[str, Any] = Field(default_factory=dict)
    """Values of other axes, one or a list for each, that the claim is restricted to"""

    def contradictions(self) -> Iterator[str]:
        if (self.ahead is None) == (self.equal is None):
            yield "a claim is either `ahead: A, of: B` or `equal: A, to: B, within: X`"
            return
        for key in sorted(key for key in self.model_fields_set if key in (_EQUAL if self.ahead else _AHEAD)):
            yield f"'{key}' does not go with '{'ahead' if self.ahead else 'equal'}'"
        if self.ahead and self.of is None:
            yield "'of' is missing: the value that 'ahead' is compared with"
        for key in ("to", "within") if self.equal else ():
            if getattr(self, key) is None:
                yield f"'{key}' is missing beside 'equal'"
        if self.clear_of is not None and self.clear_of > self.by:
            yield f"clear_of {self.clear_of:g} is above by {self.by:g}: leave it out"

    @property
    def rows(self) -> tuple[str, ...]:
        """The values that the claim is about."""
        return self.ahead or self.equal or ()

    @property
    def column(self) -> str:
        """The value that they are compared with."""
        return self.of or self.to or ""


_AHEAD, _EQUAL = ("of", "by", "clear_of"), ("to", "within")


class ChooseSpec(Section):
    """A key that every method gets at its own best value: that of the lowest validation loss in a short training.

    A method is a combination of all axes but the seed. The trials are trained before the cells, with the first seed,
    and need `train.validation_limit`.
    """

    key: str = "train.learning_rate"
    """The dotted key of the recipe"""
    values: Annotated[tuple[float | str, ...], BeforeValidator(_one_or_many), Field(min_length=2)]
    """The values to choose from, in order"""
    start: Annotated[tuple[float | str, float | str], BeforeValidator(_one_or_many)] | None = None
    """Two neighbours among them. From these, trials step towards the lower loss until it rises; null: all are tried"""
    trial: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the recipe for the trials, such as fewer steps"""

    def contradictions(self) -> Iterator[str]:
        if len(set(self.values)) < len(self.values):
            yield "values has a value twice"
        unknown = [value for value in self.start or () if value not in self.values]
        for value in unknown:
            yield f"start has {value}, which is not among the values"
        if self.start and not unknown and self.values.index(self.start[1]) != self.values.index(self.start[0]) + 1:
            yield f"start must be two neighbours among the values in their order, got {self.start}"


class StudySpec(Section):
    """The complete description of a study."""

    name: str = Field(min_length=1)
    """The study's name; its runs lie in runs/studies/NAME"""
    recipe: str | dict[str, Any]
    """The base recipe: its path from this file, or its sections"""
    vary: dict[str, Any] = Field(min_length=1)
    """The axes of the grid. An axis named as a key of the recipe (`seed`, `train.learning_rate`) has a list of values;
    any other has named values, each a section of overrides or the path of a recipe that is laid over the base"""
    adjust: tuple[AdjustSpec, ...] = Field(default=(), strict=False)
    """Overrides for single combinations, over those of their values"""
    only: tuple[dict[str, Any], ...] = Field(default=(), strict=False)
    """Combinations of values that are run, if not all; each names a value, or a list of values, of some axes"""
    without: tuple[dict[str, Any], ...] = Field(default=(), strict=False)
    """Combinations of values that are not run, in the same form"""
    tables: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = ()
    """Axes that get a table for each of their values, besides those that change the tasks, the model or the scored
    instances, whose runs cannot share a table"""
    baseline: str | None = None
    """The value that the tables show differences from; null: that of the claims, if all name the same one"""
    budget: BudgetSpec | None = None
    """The number of trained parameters that every cell has, counted before anything trains"""
    choose: ChooseSpec | None = None
    """A key that every method gets at its own best value, by validation loss"""
    claims: tuple[ClaimSpec, ...] = Field(default=(), strict=False)
    """The sentences that the study decides"""

    _name_fits_a_folder = field_validator("name")(check_folder_name)


def study_keys() -> Iterator[Key]:
    """Every key of a study file, those of the recipes in it excepted."""
    yield from keys_of(StudySpec)

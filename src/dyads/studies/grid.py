# SPDX-License-Identifier: Apache-2.0
"""Grid of a study: every combination of the values on its axes, and its cells, which are runs with complete recipes.

A cell's recipe is the base recipe, the overrides of its value on each axis in turn, adjustments of its combination, and
the overrides of the command line.
Seeds and training settings make no difference to methods that train nothing: these have one cell for all of them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias
from unicodedata import normalize

from dyads.errors import ConfigError, RunError, did_you_mean, shortened
from dyads.recipe.file_names import name_mistake
from dyads.recipe.load import recipe_keys
from dyads.recipe.recipe_errors import validated
from dyads.recipe.spec import UNTRAINED, Recipe, differences
from dyads.recipe.yaml_source import KeyPath, YamlSource, read_file, read_overrides, to_yaml
from dyads.studies.spec import StudySpec, study_keys

__all__ = ["SEED", "Cell", "Combination", "Study", "Value", "has_key", "load_study", "scored_differences"]

SEED = "seed"
"""The axis whose values repeat a run."""

_MOST_COMBINATIONS, _MOST_PATTERNS = 2000, 100
_TABLE_KEYS: tuple[tuple[str, ...], ...] = (
    ("tasks",),
    ("model", "name"),
    ("model", "kind"),
    ("model", "revision"),
    ("evaluate", "split"),
    ("evaluate", "tasks"),
    ("evaluate", "limit"),
)
"""Keys that say what is scored: runs that differ in them cannot share a table."""
_OF_TRAINING = ("name", "seed", "train", "mixture", "adapt")
"""Sections without effect on a method that trains nothing, but for those in _OF_SCORING."""
_OF_SCORING = (("train", "max_prompt_tokens"), ("train", "max_target_tokens"))
"""Keys of training that prompts are cut by in scoring too."""
_OWN_FILES = ("recipes", "logs", "choose", "verdict.md", "verdict.json")
"""What lies beside the runs in the folder of a study."""


@dataclass(frozen=True)
class Value:
    """A value of an axis, and the overrides that it makes in the recipe."""

    axis: str
    name: str
    source: YamlSource = field(compare=False)
    scalar: bool
    """Whether the axis is a key of the recipe."""

    @property
    def slug(self) -> str:
        """The name with only letters, digits and . + _ -."""
        return re.sub(r"[^\w.+-]+", "-", self.name).strip("-.")

    @property
    def label(self) -> str:
        """The value in the labels of tables."""
        return f"{self.axis.rpartition('.')[2]} {self.name}" if self.scalar else self.name

    @property
    def folder(self) -> str:
        """The value in the names of folders."""
        return f"{self.axis.rpartition('.')[2]}{self.slug}" if self.scalar else self.slug

    def has(self, *place: str) -> bool:
        """Whether it overrides a key of the recipe, or one below it."""
        return has_key(self.source, place)

    @property
    def of_training(self) -> bool:
        """Whether it makes no difference to a method that trains nothing."""
        return not any(self.has(*place) for place in _OF_SCORING) and all(
            key in _OF_TRAINING or (key == "method" and not self.has("method", "name")) for key in self.source.data
        )


Combination: TypeAlias = tuple[Value, ...]
"""A value of every axis, in the order of the axes."""


@dataclass(frozen=True)
class Cell:
    """A run of the study."""

    name: str
    """Of its folder."""
    recipe: Recipe

    @property
    def label(self) -> str:
        """The column in its table: the same for all seeds."""
        return self.recipe.name

    @property
    def steps(self) -> int:
        """Optimizer steps; 0 for a method that trains nothing."""
        return self.recipe.train.steps if self.recipe.method.trains else 0


@dataclass(frozen=True)
class Study:
    """A study as it was read, and its cells."""

    path: Path
    spec: StudySpec
    base: YamlSource
    overrides: YamlSource
    axes: dict[str, tuple[Value, ...]]
    table_axes: tuple[str, ...]
    adjustments: tuple[YamlSource, ...]
    """The overrides of each `adjust`."""
    trial: YamlSource
    """The overrides of `choose.trial`."""
    combinations: tuple[Combination, ...] = field(default=())
    """Those that are run, seed by seed."""

    def find(self, name: str, place: str) -> Value:
        """The value of that name; ConfigError if no axis has it, or two. `place` is the key that names it."""
        found = [v for values in self.axes.values() for v in values if v.name == name]
        if len(found) == 1:
            return found[0]
        if found:
            axes = " and ".join(f"'{v.axis}'" for v in found)
            raise ConfigError(f"{self.path}: '{place}' names '{name}', which is a value of {axes}: rename one of them")
        names = [v.name for axis, values in self.axes.items() if axis != SEED for v in values]
        raise ConfigError(f"{self.path}: '{place}' names '{name}', which no axis has{did_you_mean(name, names)}")

    def matches(self, combination: Combination, pattern: Mapping[str, Any], place: str) -> bool:
        """Whether a combination has the values that a pattern names, one or a list for each of some axes."""
        by_axis = {v.axis: v.name for v in combination}
        for axis, wanted in pattern.items():
            if axis not in self.axes:
                raise ConfigError(f"{self.path}: '{place}' names '{axis}', no axis{did_you_mean(axis, self.axes)}")
            names = [str(w) if isinstance(w, str) else to_yaml(w, one_line=True) for w in _listed(wanted)]
            known = [v.name for v in self.axes[axis]]
            for name in names:
                if name not in known:
                    raise ConfigError(
                        f"{self.path}: '{place}' names '{name}', no value of '{axis}'{did_you_mean(name, known)}"
                    )
            if by_axis[axis] not in names:
                return False
        return True

    def table_of(self, combination: Combination) -> Combination:
        """The values that tell a combination's table from others; empty where there is one table."""
        return tuple(v for v in combination if v.axis in self.table_axes)

    def group_of(self, combination: Combination) -> Combination:
        """The combination without its seed: what `choose` chooses a value for."""
        return tuple(v for v in combination if v.axis != SEED)

    def cells(self, chosen: Mapping[Combination, Any] | None = None) -> dict[Combination, Cell]:
        """The cell of every combination; combinations that make the same untrained run share one.

        `chosen` has the values that were chosen for groups.
        """
        cells: dict[Combination, Cell] = {}
        untrained: dict[str, Cell] = {}
        folders: dict[str, Cell] = {}
        for combination in self.combinations:
            group = self.group_of(combination)
            layers = []
            if self.spec.choose is not None and chosen is not None and group in chosen:
                layers.append(chosen_source(self.spec.choose.key, chosen[group]))
            cell = self.cell(combination, layers)
            if not cell.recipe.method.trains:
                resolved = cell.recipe.resolved()
                used = {k: v for k, v in resolved.items() if k not in _OF_TRAINING}
                used |= {".".join(place): resolved[place[0]][place[1]] for place in _OF_SCORING}
                cell = untrained.setdefault(to_yaml(used), cell)
            cells[combination] = cell
            mistake = name_mistake(cell.name)
            if cell.name.casefold() in _OWN_FILES:
                mistake = "a study has a file or folder of that name beside its runs"
            if mistake:
                raise ConfigError(
                    f"{self.path}: a cell would have the folder '{shortened(cell.name)}', and {mistake}: give its"
                    " values other names"
                )
            other = folders.setdefault(normalize("NFC", cell.name).casefold(), cell)  # as some file systems compare
            if other is not cell:
                raise ConfigError(
                    f"{self.path}: two cells would have the folder '{cell.name}': give their values different names"
                )
        return cells

    def cell(self, combination: Combination, layers: Sequence[YamlSource] = (), extra: Value | None = None) -> Cell:
        """The cell of a combination, with further layers over the values and below the command line's overrides.

        `extra` is a value that its name and label have too.
        """
        source = self.base
        for value in combination:
            source = value.source.over(source)
        adjusted = (
            layer
            for i, (spec, layer) in enumerate(zip(self.spec.adjust, self.adjustments, strict=True))
            if self.matches(combination, spec.where, f"adjust.{i}.where")
        )
        for layer in (*adjusted, *layers, self.overrides):
            source = layer.over(source)
        data = dict(source.data)
        named = combination
        method = data.get("method")
        if isinstance(method, Mapping) and method.get("name") in UNTRAINED:
            named = tuple(v for v in combination if not all(other.of_training for other in self.axes[v.axis]))
            data.pop("adapt", None)
            if any(v.has("method") and not v.has("method", "name") for v in combination):  # options of trained methods
                data["method"] = next((v.source.data["method"] for v in named if v.has("method")), method)
        if extra is not None:
            named = (*named, extra)
        columns = [v.label for v in named if v.axis != SEED and v.axis not in self.table_axes]
        data["name"] = ", ".join(columns) or str(data.get("name", self.spec.name))
        name = "-".join(v.folder for v in named) or "run"
        return Cell(name, self._recipe(YamlSource(data, source.origins), combination, name))

    def _recipe(self, source: YamlSource, combination: Combination, name: str) -> Recipe:
        where = f"{self.path} (cell {name})"
        adapt = source.data.get("adapt")
        if not isinstance(adapt, Mapping) or not isinstance(adapt.get("run"), str):
            return validated(Recipe, source, where, recipe_keys)
        from dyads.training.adapt import adaptation  # imports torch

        slugs = {v.axis: v.slug for v in combination}
        try:
            run = re.sub(r"\{([^{}]*)\}", lambda found: slugs[found[1]], adapt["run"])
            base = adaptation(Path(run), {k: v for k, v in adapt.items() if k != "run"})
        except KeyError as error:
            raise ConfigError(
                f"{where}: adapt.run {adapt['run']!r} has {{}} around {error}: known are {', '.join(slugs)}"
            ) from None
        except RunError as error:
            raise RunError(f"{where}: adapt.run: {error}") from error
        own = {k: v for k, v in source.data.items() if k not in ("adapt", "model", "method")}
        return validated(Recipe, YamlSource(own, source.origins).over(base), where, recipe_keys)


def has_key(source: YamlSource, place: Sequence[str]) -> bool:
    """Whether a source sets the key at `place`, or one below it."""
    data: Any = source.data
    for key in place:
        if not isinstance(data, Mapping) or key not in data:
            return False
        data = data[key]
    return True


def chosen_source(key: str, value: Any) -> YamlSource:
    """The override of one dotted key."""
    return read_overrides([f"{key}={to_yaml(value, one_line=True)}"], "choose")


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The study in a file; `overrides` (`a.b=c`) are laid over the recipe of every cell."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no study at '{path}'")
    source = read_file(path)
    spec = validated(StudySpec, source, str(path), study_keys)
    base = part_of(source, ("recipe",)) if isinstance(spec.recipe, dict) else read_file(path.parent / spec.recipe)
    files: dict[str, YamlSource] = {}
    axes = {axis: tuple(_values(path, axis, source, files)) for axis in spec.vary}
    varied = [o for o in overrides if o.partition("=")[0].strip() in axes]
    if varied:
        raise ConfigError(f"--set {varied[0]}: the study varies that key; --only runs a part of its cells")
    adjustments = tuple(_undotted(part_of(source, ("adjust", i, "recipe"))) for i in range(len(spec.adjust)))
    trial = _undotted(part_of(source, ("choose", "trial"))) if spec.choose and spec.choose.trial else YamlSource({}, {})
    study = Study(path, spec, base, read_overrides(overrides), axes, _table_axes(path, spec, axes), adjustments, trial)
    if (many := math.prod(map(len, axes.values()))) > _MOST_COMBINATIONS:
        raise ConfigError(f"{path}: 'vary' has {many:,} combinations; at most {_MOST_COMBINATIONS:,} are read")
    for key in ("only", "without", "adjust"):
        if (patterns := len(getattr(spec, key))) > _MOST_PATTERNS:
            raise ConfigError(f"{path}: '{key}' has {patterns:,} entries; at most {_MOST_PATTERNS} are read")
    combinations = [
        c
        for c in product(*axes.values())
        if (not spec.only or any(study.matches(c, pattern, "only") for pattern in spec.only))
        and not any(study.matches(c, pattern, "without") for pattern in spec.without)
    ]
    if not combinations:
        raise ConfigError(f"{path}: 'only' and 'without' leave no combination to run")
    seeds = [v.name for v in axes.get(SEED, ())]
    combinations.sort(key=lambda c: [seeds.index(v.name) for v in c if v.axis == SEED])
    return replace(study, combinations=tuple(combinations))


def _values(path: Path, axis: str, source: YamlSource, files: dict[str, YamlSource]) -> Iterator[Value]:
    """The values of an axis: a list of scalars for a key of the recipe, or named overrides.

    `files` holds the recipes that were read, for values that name one again.
    """
    given, place = source.data["vary"][axis], ("vary", axis)
    origin = source.origins.get(place, str(path))
    if not given or not isinstance(given, list | dict):
        raise ConfigError(f"{origin}: axis '{axis}' must be a list of values or named sections of overrides")
    if isinstance(given, list):
        seen = set()
        for i, scalar in enumerate(given):
            at = source.origins.get((*place, i), origin)
            if isinstance(scalar, list | dict):
                raise ConfigError(f"{at}: the values of '{axis}' are no scalars: name them, `NAME: {{KEY: VALUE}}`")
            name = scalar if isinstance(scalar, str) else to_yaml(scalar, one_line=True)
            if name in seen:
                raise ConfigError(f"{at}: '{axis}' has the value {name} twice")
            seen.add(name)
            yield Value(axis, name, _undotted(YamlSource({axis: scalar}, {(axis,): at})), scalar=True)
        return
    for key, overrides in given.items():
        name = str(key)
        at = source.origins.get((*place, name), origin)
        if isinstance(overrides, str):
            file = os.path.normpath(path.parent / overrides)
            if file not in files:
                files[file] = read_file(path.parent / overrides)
                files[file].data.pop("name", None)  # runs are named by their values
            laid = files[file]
        elif overrides is None or isinstance(overrides, dict):
            laid = _undotted(part_of(source, (*place, name)))
            if "name" in laid.data:
                raise ConfigError(f"{at}: '{axis}.{name}' sets 'name', but runs are named by their values: drop it")
        else:
            raise ConfigError(f"{at}: '{axis}.{name}' must be a section of overrides or the path of a recipe")
        value = Value(axis, name, laid, scalar=False)
        if not value.slug:
            raise ConfigError(f"{at}: '{name}' cannot name a folder: give the value letters or digits")
        yield value


def part_of(source: YamlSource, place: KeyPath) -> YamlSource:
    """A section of a source as a source of its own."""
    data: Any = source.data
    for key in place:
        data = data[key] if isinstance(key, int) else next(value for k, value in data.items() if str(k) == key)
    n = len(place)
    return YamlSource(dict(data or {}), {k[n:]: line for k, line in source.origins.items() if k[:n] == place})


def _undotted(source: YamlSource) -> YamlSource:
    """The same with `a.b: c` as `a: {b: c}`."""
    result = YamlSource({}, {})
    for key, value in source.data.items():
        parts = tuple(str(key).split("."))
        nested: Any = value
        for part in reversed(parts):
            nested = {part: nested}
        origins = {(*parts, *k[1:]): line for k, line in source.origins.items() if k[:1] == (str(key),)}
        origins |= {parts[:i]: origins[parts] for i in range(1, len(parts)) if parts in origins}
        result = YamlSource(nested, origins).over(result)
    return result


def _table_axes(path: Path, spec: StudySpec, axes: Mapping[str, tuple[Value, ...]]) -> tuple[str, ...]:
    for axis in spec.tables:
        if axis not in axes or axis == SEED:
            raise ConfigError(f"{path}: 'tables' names '{axis}', which is no axis{did_you_mean(axis, axes)}")
    scored = {
        axis
        for axis, values in axes.items()
        if any(v.has(*key) for v in values for key in _TABLE_KEYS if not _is_untrained(v))
    }
    return tuple(axis for axis in axes if axis in scored or axis in spec.tables)


def scored_differences(a: Recipe, b: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys in which two recipes differ, with both values, so that their scores cannot share a table."""
    found = differences(a.resolved(), b.resolved())
    return {
        key: values
        for key, values in found.items()
        if any(tuple(key.split("."))[: len(place)] == place for place in _TABLE_KEYS)
    }


def _is_untrained(value: Value) -> bool:
    method = value.source.data.get("method")
    return isinstance(method, Mapping) and method.get("name") in UNTRAINED


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

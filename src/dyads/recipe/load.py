# SPDX-License-Identifier: Apache-2.0
"""Loading of recipes: a YAML file, the files that it extends and the command line's overrides become one Recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dyads.recipe.recipe_errors import Key, keys_of, validated
from dyads.recipe.spec import Recipe, Section, further_mistakes
from dyads.recipe.yaml_source import YamlSource, read_file, read_overrides, read_text
from dyads.tasks import FamilySpec, TasksSpec

__all__ = ["load_recipe", "parse_recipe", "parse_tasks", "recipe_keys"]


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check: bool = True) -> Recipe:
    """The recipe in a file, with overrides `a.b=c` (values in YAML) on top; `check` also finds `further_mistakes`.

    Sections are merged key by key, lists are replaced. A section that names another method or task family than the one
    below it replaces that section whole, because options belong to their method or family.
    """
    path = Path(path)
    source = read_file(path)
    if overrides:
        source = read_overrides(overrides).over(source)
    further = further_mistakes if check else None
    return validated(Recipe, source, str(path), recipe_keys, remedy=_how_to_add, further=further)


def _how_to_add(key: str) -> str:
    """Examples for a section that a recipe for several methods leaves to `--set`."""
    return "add --set method.name=lora, or `method: {name: lora}`; see `dyads methods`" if key == "method" else ""


def parse_recipe(text: str, name: str) -> Recipe:
    """The recipe in a YAML text, without Recipe.check and its slow imports; errors call the text `name`."""
    return validated(Recipe, read_text(text, name), name, recipe_keys)


class _TasksAlone(Section):
    tasks: TasksSpec
    """The tasks that are learned and scored: a family and its options, or a list of such"""


def parse_tasks(source: YamlSource, name: str, remedy: Callable[[str], str]) -> FamilySpec:
    """The section `tasks` of a source; its other sections are ignored.

    Errors call the source `name`, and `remedy` says how to add a missing key.
    """
    alone = YamlSource({key: value for key, value in source.data.items() if key == "tasks"}, source.origins)
    return validated(_TasksAlone, alone, name, recipe_keys, remedy=remedy).tasks


def recipe_keys() -> Iterator[Key]:
    """Every key of a recipe file. A section with variants, such as `tasks`, lists the keys of each variant in turn."""
    yield Key("extends", "Another recipe, by its path from this file; the keys given here override its own")
    yield from keys_of(Recipe)

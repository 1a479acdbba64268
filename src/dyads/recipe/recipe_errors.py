# SPDX-License-Identifier: Apache-2.0
"""Which keys does a section of a recipe have, and how is a mistake in one told?

Both walk pydantic models: their fields make the list of keys, and what pydantic finds wrong becomes a sentence that
names the place, the key, the value and the way out.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dyads.errors import ConfigError, did_you_mean
from dyads.recipe.yaml_source import KeyPath, Layer, to_yaml
from dyads.tasks import FamilySpec, families

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["Key", "keys_of", "validated"]

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Key:
    """A key that a recipe can hold."""

    name: str
    """Its dotted path."""
    help: str
    default: str = ""
    """As YAML; empty where the key must be given."""
    choices: tuple[str, ...] = field(default=())
    """The values it allows, where they can be counted. A single one stands for the variant whose keys follow."""


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key of a section and of the sections in it. One with variants gives all their keys, each after its own."""
    for name, info in model.model_fields.items():
        if model.model_fields.keys() == {"name", "options"} and name == "options":
            name = "<option>"  # a method's options stand beside its name
        sections = _models_in(info.annotation)
        choices = tuple(to_yaml(value, one_line=True) for value in _choices(info.annotation))
        default = "" if sections or info.is_required() or len(choices) == 1 or name == "<option>" else _default(info)
        if len(sections) > 1:
            yield Key(f"{prefix}{name}.family", info.description or "", choices=tuple(families()))
        elif not sections:
            yield Key(f"{prefix}{name}", info.description or "", default, choices)
        for section in sections:
            yield from keys_of(section, f"{prefix}{name}.")


def _choices(annotation: Any) -> list[Any]:
    """The values of the Literals in an annotation; None too where it may stand in their place."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    found = [value for part in get_args(annotation) if part is not type(None) for value in _choices(part)]
    return [*found, None] if found and type(None) in get_args(annotation) else found


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True)
    return to_yaml(list(value) if isinstance(value, tuple) else value, one_line=True)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def validated(
    model: type[Model],
    layer: Layer,
    source: str,
    keys: Callable[[], Iterable[Key]],
    *,
    ask: Callable[[str], str] | None = None,
) -> Model:
    """The section that a layer holds, or a ConfigError with a line for every mistake in it.

    `source` is named where a mistake has no line of its own, `keys` gives those to suggest; `ask` says how to
    give a key that is missing.
    """
    try:
        return model.model_validate(layer.data)
    except ValidationError as error:
        known = list(keys())
        mistakes = [_explained(found, model, layer, known, ask) for found in error.errors(include_url=False)]
    placed = [f"{origin or source}: {message}" for origin, message in mistakes]
    if len(placed) == 1:
        raise ConfigError(placed[0])
    raise ConfigError("\n  ".join([f"{source}: {len(placed)} mistakes", *placed]))


def _explained(
    error: ErrorDetails, root: type[BaseModel], layer: Layer, keys: Sequence[Key], ask: Callable[[str], str] | None
) -> tuple[str | None, str]:
    """Where (file and line, or override) and what, in a sentence that names the key, the value and the way out."""
    path, model = _place(error["loc"], root, layer.data)
    dotted = ".".join(map(str, path))
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    origin = next((layer.origins[path[:i]] for i in range(len(path), 0, -1) if path[:i] in layer.origins), None)
    if kind == "extra_forbidden":
        return origin, f"unknown key '{dotted}'{_hint(path, keys)}"
    if kind == "missing":
        info = model.model_fields.get(str(path[-1])) if model else None
        what = f" ({info.description.rstrip('.')})" if info is not None and info.description else ""
        return origin, f"'{dotted}' is missing{what}" + (f": {ask(str(path[-1]))}" if ask else "")
    if kind == "union_tag_not_found":
        return origin, f"'{dotted}.{context['discriminator'].strip(chr(39))}' is missing"
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", context["expected_tags"])
        key = f"{dotted}.{context['discriminator'].strip(chr(39))}"
        place = layer.origins.get((*path, context["discriminator"].strip(chr(39))), origin)
        return place, f"unknown '{key}' '{context['tag']}'{did_you_mean(str(context['tag']), tags)}"
    if kind == "value_error":
        message = str(context.get("error", error["msg"]))
        named = re.match(r"unknown key '([^']*)'", message)
        if named:
            origin = layer.origins.get((*path, named[1]), origin)
        says_it = named or message.startswith((f"{dotted} ", "unknown task family"))
        return origin, message if says_it else f"'{dotted}': {message}"
    if kind == "literal_error":
        wanted = re.findall(r"'([^']*)'", context["expected"])
        near = did_you_mean(str(value), wanted)
        return origin, f"'{dotted}' must be {context['expected']}, got {_short(value)}" + (
            near if "did you mean" in near else ""
        )
    wanted_type = _WANTED.get(kind)
    wanted_text = wanted_type.format(**context) if wanted_type else None
    return origin, (f"'{dotted}' must be {wanted_text}" if wanted_text else f"'{dotted}': {error['msg']}") + (
        f", got {_short(value)}"
    )


_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (put it in quotes)",
    "path_type": "a path",
    "string_too_short": "text, not empty",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "dict_type": "a section of `key: value` lines",
    "model_type": "a section of `key: value` lines",
    "model_attributes_type": "a section of `key: value` lines",
    "mapping_type": "a section of `key: value` lines",
}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _hint(path: KeyPath, keys: Sequence[Key]) -> str:
    """The nearest key of the same section; else the same key in another one; else all of the section."""
    *section, name = map(str, path)
    if path == ("extends",):
        return " – it is for recipe files only: one file extends another"
    prefix = "".join(f"{part}." for part in section)
    known = list(dict.fromkeys(k.name[len(prefix) :].split(".")[0] for k in keys if k.name.startswith(prefix)))
    if not difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.6):
        elsewhere = [key.name for key in keys if key.name.rsplit(".", 1)[-1] == name]
        if elsewhere:
            return f" – did you mean '{elsewhere[0]}'?"
    return did_you_mean(name, known)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows: itself, or the members of a union."""
    if annotation is FamilySpec:
        return list(families().values())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []


def _place(loc: Iterable[str | int], root: type[BaseModel], data: Any) -> tuple[KeyPath, type[BaseModel] | None]:
    """The key that a pydantic location means, without the tags of unions in it, and the section that holds it."""
    path: list[str | int] = []
    models: list[type[BaseModel]] = [root]
    holder: type[BaseModel] | None = root
    for step in loc:
        tagged = [m for m in models if _tagged(m, step)]
        if len(models) > 1 and tagged and not (isinstance(data, Mapping) and step in data):
            models = tagged
            continue
        path.append(step)
        data = data.get(step) if isinstance(data, Mapping) else None
        holder = models[0] if models else None
        info = holder.model_fields.get(str(step)) if holder else None
        models = _models_in(info.annotation) if info else []
    return tuple(path), holder


def _tagged(model: type[BaseModel], tag: object) -> bool:
    return any(
        get_origin(info.annotation) is Literal and tag in get_args(info.annotation)
        for info in model.model_fields.values()
    )

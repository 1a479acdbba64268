# SPDX-License-Identifier: Apache-2.0
"""Errors in recipes: each of pydantic's becomes a sentence with the line, the key, the value and a suggestion.

The suggestions come from the list of a recipe's keys, which is read off the fields of its pydantic models and which
`dyads train --keys` prints.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dyads.errors import ConfigError, did_you_mean, shortened
from dyads.recipe.yaml_source import KeyPath, YamlSource, to_yaml
from dyads.tasks import FamilySpec, families

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["Key", "keys_of", "validated"]

Model = TypeVar("Model", bound=BaseModel)
_MOST_MISTAKES = 20
"""Errors of a recipe that are listed; every one costs a comparison with all keys."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a recipe."""

    name: str
    """The dotted path."""
    help: str
    default: str = ""
    """As YAML; empty where the key is required."""
    choices: tuple[str, ...] = field(default=())
    """The allowed values, where they can be listed. A single one names the variant whose keys follow."""


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key of a section and of the sections in it. A section with variants lists the keys of each in turn."""
    for name, info in model.model_fields.items():
        if model.model_fields.keys() == {"name", "options"} and name == "options":
            name = "<option>"  # a method's options stand beside its name
        text = " ".join((info.description or "").split())  # one line, to be wrapped anew
        sections = _models_in(info.annotation)
        choices = tuple(to_yaml(value, one_line=True) for value in _choices(info.annotation))
        default = "" if sections or info.is_required() or len(choices) == 1 or name == "<option>" else _default(info)
        if len(sections) > 1:
            yield Key(f"{prefix}{name}.family", text, choices=tuple(families()))
        elif not sections:
            yield Key(f"{prefix}{name}", text, default, choices)
        for section in sections:
            yield from keys_of(section, f"{prefix}{name}.")


def _choices(annotation: Any) -> list[Any]:
    """The values of the Literals in an annotation, and None where it is optional."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    found = [value for part in get_args(annotation) if part is not type(None) for value in _choices(part)]
    return [*found, None] if found and type(None) in get_args(annotation) else found


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True)
    return to_yaml(list(value) if isinstance(value, tuple) else value, one_line=True)


# --- errors -----------------------------------------------------------------------------------------------------------


def validated(
    model: type[Model],
    source: YamlSource,
    name: str,
    keys: Callable[[], Iterable[Key]],
    *,
    remedy: Callable[[str], str] | None = None,
    further: Callable[[Mapping[str, Any]], Iterable[tuple[KeyPath, str]]] | None = None,
) -> Model:
    """The section that a source holds, or a ConfigError with a line for every error in it.

    Errors without a line of their own call the source `name`; `keys` lists the keys to suggest, and `remedy`
    says how to add a missing key, or nothing. `further` finds mistakes that the model does not know, by their keys, in
    data that may have others.
    """
    valid: Model | None = None
    explained: list[tuple[str | None, str]] = []
    many = 0
    try:
        valid = model.model_validate(source.data)
    except ValidationError as error:
        known = list(keys())
        errors = error.errors(include_url=False)
        errors += _beside(errors, model, source.data)
        many = len(errors)
        explained = [_explained(found, model, source, known, remedy) for found in errors[:_MOST_MISTAKES]]
    others = list(islice(further(source.data), _MOST_MISTAKES + 1)) if further else []
    many += len(others)
    explained += [(_origin(path, source), message) for path, message in others[: _MOST_MISTAKES - len(explained)]]
    if valid is not None and not many:
        return valid
    placed = [f"{origin or name}: {message}" for origin, message in explained]
    if many == 1:
        raise ConfigError(placed[0])
    more = ["…"] * (many > len(placed))
    count = f"{many}" if len(others) <= _MOST_MISTAKES else f"more than {many - 1}"
    raise ConfigError("\n  ".join([f"{name}: {count} mistakes", *placed, *more]))


def _beside(errors: Sequence[ErrorDetails], root: type[BaseModel], data: Mapping[str, Any]) -> list[ErrorDetails]:
    """The contradictions among the other values of sections with wrong values or unknown keys.

    pydantic looks for contradictions in sections whose values all fit, so the data is validated again without the
    wrong ones. A contradiction that names a key left out is no finding: it is with that key's default.
    """
    rest: Any = deepcopy(dict(data))
    left_out: set[str] = set()
    for error in errors:
        path = _key_path(error["loc"], root, data)[0]
        names = path[: next((i for i, part in enumerate(path) if isinstance(part, int)), len(path))]
        section = rest
        for name in names[:-1]:
            section = section.get(name) if isinstance(section, dict) else None
        contradiction = error["type"] == "value_error" and isinstance(error["input"], Mapping)
        if names and isinstance(section, dict) and not contradiction:
            section.pop(names[-1], None)
            left_out.add(str(names[-1]))
    try:
        root.model_validate(rest)
    except ValidationError as error:
        reported = {(found["loc"], found["msg"]) for found in errors}
        return [
            found
            for found in error.errors(include_url=False)
            if found["type"] == "value_error"
            and (found["loc"], found["msg"]) not in reported
            and not left_out & set(re.findall(r"\w+", found["msg"]))
        ]
    return []


def _origin(path: KeyPath, source: YamlSource) -> str | None:
    """The file and line, or the override, of a key or of the nearest section around it."""
    return next((source.origins[path[:i]] for i in range(len(path), 0, -1) if path[:i] in source.origins), None)


def _explained(
    error: ErrorDetails,
    root: type[BaseModel],
    source: YamlSource,
    keys: Sequence[Key],
    remedy: Callable[[str], str] | None,
) -> tuple[str | None, str]:
    """The origin (file and line, or override) and the sentence for one of pydantic's errors."""
    path, model = _key_path(error["loc"], root, source.data)
    dotted = shortened(".".join(map(str, path)))
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    origins = source.origins
    origin = _origin(path, source)
    if kind == "extra_forbidden" and model is not None and issubclass(model, FamilySpec):
        return origin, model.unknown_key(str(path[-1]))
    if kind == "extra_forbidden":
        return origin, f"unknown key '{dotted}'{_suggestion(path, keys)}"
    if kind == "missing":
        info = model.model_fields.get(str(path[-1])) if model else None
        what = f" ({info.description.rstrip('.')})" if info is not None and info.description else ""
        mended = remedy(str(path[-1])) if remedy else ""
        return origin, f"'{dotted}' is missing{what}" + (f": {mended}" if mended else "")
    if kind == "union_tag_not_found":
        return origin, f"'{dotted}.{context['discriminator'].strip(chr(39))}' is missing"
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", context["expected_tags"])
        key = context["discriminator"].strip(chr(39))
        origin = origins.get((*path, key), origin)
        tag = shortened(str(context["tag"]), 60)
        return origin, f"unknown '{dotted}.{key}' '{tag}'{did_you_mean(str(context['tag']), tags)}"
    if kind == "value_error":
        message = str(context.get("error", error["msg"]))
        unknown = re.match(r"unknown key '([^']*)'", message)
        if unknown:
            origin = origins.get((*path, unknown[1]), origin)
        names_the_key = unknown or message.startswith((f"{dotted} ", "unknown task family"))
        return origin, message if names_the_key else f"'{dotted}': {message}"  # the message is one of ours
    if kind == "literal_error":
        near = did_you_mean(str(value), re.findall(r"'([^']*)'", context["expected"]))
        return origin, f"'{dotted}' must be {context['expected']}, got {_given(value)}" + (
            near if "did you mean" in near else ""
        )
    wanted = f"must be {_WANTED[kind].format(**context)}" if kind in _WANTED else None
    field = model.model_fields.get(str(path[-1])) if kind == "model_type" and model else None
    section = _models_in(field.annotation) if field is not None else []  # an item of a list is no field
    mended = ""
    if isinstance(value, str) and any("name" in found.model_fields for found in section):
        mended = f": write {dotted}: {{name: {to_yaml(value, one_line=True)}}}"
    sentence = f"'{dotted}' {wanted}" if wanted else f"'{dotted}': {error['msg']}"
    return origin, f"{sentence}, got {_given(value)}{mended}"


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


def _given(value: object) -> str:
    return shortened(repr(value) if isinstance(value, str) else value, 60)


def _suggestion(path: KeyPath, keys: Sequence[Key]) -> str:
    """A similar key of the same section, else the same key of another section, else all keys of the section."""
    *section, name = (str(part) for part in path if isinstance(part, str))  # places in a list are no keys
    if path == ("extends",):
        return " – only a recipe file can have it: one file extends another"
    prefix = "".join(f"{part}." for part in section)
    known = list(dict.fromkeys(k.name[len(prefix) :].split(".")[0] for k in keys if k.name.startswith(prefix)))
    if not difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.6):
        elsewhere = [key.name for key in keys if key.name.rsplit(".", 1)[-1] == name]
        if elsewhere:
            return f" – did you mean '{elsewhere[0]}'?"
    return did_you_mean(name, known)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in an annotation: itself, or the members of a union or of a list."""
    if annotation is FamilySpec:
        return list(families().values())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, tuple):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []


def _key_path(loc: Iterable[str | int], root: type[BaseModel], data: Any) -> tuple[KeyPath, type[BaseModel] | None]:
    """The key at a pydantic location, which also holds tags of unions, and the section of that key."""
    path: list[str | int] = []
    models: list[type[BaseModel]] = [root]
    holder: type[BaseModel] | None = root
    for step in loc:
        if len(models) > 1 and issubclass(models[0], FamilySpec) and not isinstance(step, int):
            models = [m for m in models if m.model_fields["family"].default == step]
            continue
        tagged = [m for m in models if _has_tag(m, step)]
        if len(models) > 1 and tagged and not (isinstance(data, Mapping) and step in data):
            models = tagged
            continue
        if isinstance(data, str | int | float):  # one value for a list, or for every task
            continue
        path.append(step)
        if isinstance(step, int):
            data = data[step] if isinstance(data, list) and step < len(data) else None
            continue
        data = data.get(step) if isinstance(data, Mapping) else None
        holder = models[0] if models else None
        info = holder.model_fields.get(str(step)) if holder else None
        models = _models_in(info.annotation) if info else []
    return tuple(path), holder


def _has_tag(model: type[BaseModel], tag: object) -> bool:
    return any(
        get_origin(info.annotation) is Literal and tag in get_args(info.annotation)
        for info in model.model_fields.values()
    )

# SPDX-License-Identifier: Apache-2.0
"""What does a recipe's text say, and which line said it?

A recipe file may name another one that it `extends`, and `--set a.b=c` lies on top of both: layers of plain data, each
key with the place it came from. What the keys mean is none of this file's business.

YAML is read as version 1.2 reads it: `2e-3` is a number, `on` and `no` are words, a key given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from dyads.errors import ConfigError

__all__ = ["KeyPath", "Layer", "of_file", "of_overrides", "of_text", "to_yaml"]

KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class Layer:
    """Plain data, and for every key in it the place it came from (file and line, or override)."""

    data: dict[str, Any]
    origins: dict[KeyPath, str]

    def over(self, base: Layer) -> Layer:
        """This layer on top of another."""
        return Layer(_merged(base.data, self.data), {**base.origins, **self.origins})


def of_file(path: Path, trail: tuple[Path, ...] = ()) -> Layer:
    """A file on top of those it extends. `trail` holds the files that extend this one."""
    real = path.resolve()
    if real in trail:
        circle = " → ".join(p.name for p in (*trail[trail.index(real) :], real))
        raise ConfigError(f"{trail[-1]}: recipes extend each other in a circle: {circle}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        by = f" (extended by {trail[-1]})" if trail else ""
        raise ConfigError(f"there is no recipe at '{path}'{by}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe '{path}': {error}") from error
    layer = of_text(text, str(path))
    parent = layer.data.pop("extends", None)
    if parent is None:
        return layer
    if not isinstance(parent, str):
        raise ConfigError(f"{layer.origins[('extends',)]}: 'extends' must be the path of one recipe, got {parent!r}")
    return layer.over(of_file(path.parent / parent, (*trail, real)))


def of_text(text: str, source: str) -> Layer:
    """A text on its own. `source` names it in errors."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        origins: dict[KeyPath, str] = {}
        if node is not None:
            _locate(node, (), source, origins, set())
        data = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error}") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    finally:
        loader.dispose()
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a recipe is a list of `key: value` lines, got {type(data).__name__}")
    return Layer(data, origins)


def _locate(node: yaml.Node, path: KeyPath, source: str, origins: dict[KeyPath, str], above: set[int]) -> None:
    """Write down the line of every key; refuse a key given twice, of which YAML would silently drop the first."""
    if id(node) in above:
        raise ConfigError(f"{source}:{node.start_mark.line + 1}: an alias that contains itself")
    above = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _locate(item, (*path, i), source, origins, above)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = str(key.value)
        if name in seen:
            dotted = ".".join(map(str, (*path, name)))
            raise ConfigError(f"{source}:{line}: '{dotted}' is given twice (first in line {seen[name]})")
        seen[name] = line
        place = (*path, name)
        origins[place] = f"{source}:{line}"
        _locate(value, place, source, origins, above)


def of_overrides(overrides: Sequence[str], flag: str = "--set") -> Layer:
    """`a.b=c` each, the value in YAML; a later one wins. `flag` is what stood before them on the command line."""
    data: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        path = tuple(dotted.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"{flag} {override}: write it as key=value (a.b=value for a key in a section)")
        try:
            value = yaml.load(text, Loader=_Loader)  # a SafeLoader with other number patterns
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or error
            raise ConfigError(f"{flag} {override}: the value is not valid YAML: {problem}") from error
        nested: Any = value
        for key in reversed(path):
            nested = {key: nested}
        data = _merged(data, nested)
        # Its sections too: what is contradictory only together with the override is the override's doing.
        origins.update({path[:i]: f"{flag} {override}" for i in range(1, len(path) + 1)})
    return Layer(data, origins)


_TAGS: dict[KeyPath, str] = {("method",): "name", ("tasks",): "family"}
"""Sections whose other keys only have a meaning together with this one."""


def _merged(base: Mapping[str, Any], top: Mapping[str, Any], path: KeyPath = ()) -> dict[str, Any]:
    tag = _TAGS.get(path)
    if tag is not None and tag in base and tag in top and base[tag] != top[tag]:
        return dict(top)
    out = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value, (*path, key)) if both else value
    return out


# --- YAML 1.2 scalars -------------------------------------------------------------------------------------------------


def to_yaml(value: Any, *, one_line: bool = False) -> str:
    """YAML that `of_text` reads back to the same."""
    text: str = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=one_line,
        width=10_000 if one_line else 120,
    )
    return text.removesuffix("...\n").strip() if one_line else text


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where `2e-3` is text, `no` is false, `010` is eight and `1:30` is ninety."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 – as PyYAML declares it


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would misread."""

    yaml_implicit_resolvers = dict(yaml.SafeDumper.yaml_implicit_resolvers)  # noqa: RUF012 – as PyYAML declares it

    def ignore_aliases(self, data: Any) -> bool:
        return True


_FLOAT = re.compile(r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$", re.I)
for _loader in (_Loader, _Dumper):
    _loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$", re.I), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))

# SPDX-License-Identifier: Apache-2.0
"""YAML sources: the plain data of a recipe file, and the line that each key stands in.

A recipe file may extend another one, and `--set a.b=c` overrides both: three sources, put on top of one another. What
the keys mean is left to recipe/spec.py.

Scalars follow YAML 1.2: `2e-3` is a number, `on`, `no` and `2024-01-01` are text. A key given twice is an error.

Built on PyYAML, which transformers and PEFT import anyway. ruamel.yaml, which keeps the line of each key itself, was
tried: 180 lines instead of 186, because its own scalar types, dates and 1_000 have to be undone and aliases that
contain themselves still found; it imports in 20 ms instead of 35 but reads our 48 recipes in 170 ms instead of 75.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from dyads.errors import ConfigError

__all__ = ["KeyPath", "YamlSource", "read_file", "read_overrides", "read_text", "to_yaml"]

KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlSource:
    """Plain data, and for every key in it the file and line, or the override, that it came from."""

    data: dict[str, Any]
    origins: dict[KeyPath, str]

    def over(self, base: YamlSource) -> YamlSource:
        """Both sources in one; this one's values win."""
        return YamlSource(_merged(base.data, self.data), {**base.origins, **self.origins})


def read_file(path: Path, extended_by: tuple[Path, ...] = ()) -> YamlSource:
    """A file on top of the files that it extends; `extended_by` is the chain of files that led here."""
    real = path.resolve()
    if real in extended_by:
        circle = " → ".join(p.name for p in (*extended_by[extended_by.index(real) :], real))
        raise ConfigError(f"{extended_by[-1]}: recipes extend each other in a circle: {circle}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        by = f" (extended by {extended_by[-1]})" if extended_by else ""
        raise ConfigError(f"there is no recipe at '{path}'{by}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe '{path}': {error}") from error
    source = read_text(text, str(path))
    parent = source.data.pop("extends", None)
    if parent is None:
        return source
    if not isinstance(parent, str):
        raise ConfigError(f"{source.origins[('extends',)]}: 'extends' must be the path of one recipe, got {parent!r}")
    return source.over(read_file(path.parent / parent, (*extended_by, real)))


def read_text(text: str, name: str) -> YamlSource:
    """A YAML text alone; `name` stands for it in errors."""
    loader = _Loader(text)
    origins: dict[KeyPath, str] = {}
    try:
        node = loader.get_single_node()
        if node is not None:
            _locate(node, (), name, origins, frozenset())
        data = {} if node is None else loader.construct_document(node)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    finally:
        loader.dispose()
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: a recipe is a list of `key: value` lines, got {type(data).__name__}")
    return YamlSource(data, origins)


def _locate(node: yaml.Node, path: KeyPath, name: str, origins: dict[KeyPath, str], above: frozenset[int]) -> None:
    """Record the line of every key; refuse a key given twice, of which PyYAML would silently drop the first."""
    if id(node) in above:
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: an alias that contains itself")
    above |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            place: KeyPath = (*path, i)
            origins[place] = f"{name}:{item.start_mark.line + 1}"
            _locate(item, place, name, origins, above)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key_node, value in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in lines:
                dotted = ".".join(map(str, (*path, key)))
                raise ConfigError(f"{name}:{line}: '{dotted}' is given twice (first in line {lines[key]})")
            lines[key] = line
            place = (*path, key)
            origins[place] = f"{name}:{line}"
            _locate(value, place, name, origins, above)


def read_overrides(overrides: Sequence[str], flag: str = "--set") -> YamlSource:
    """Overrides `a.b=c` with values in YAML, of which a later one wins; `flag` is their command-line option."""
    data: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        path = tuple(dotted.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"{flag} {override}: write it as key=value (a.b=value for a key in a section)")
        try:
            nested: Any = yaml.load(text, Loader=_Loader)  # a SafeLoader with other number patterns
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or error
            raise ConfigError(f"{flag} {override}: the value is not valid YAML: {problem}") from error
        for key in reversed(path):
            nested = {key: nested}
        data = _merged(data, nested)
        # The sections above the key too: an error about two keys that contradict each other names the section.
        origins.update({path[:i]: f"{flag} {override}" for i in range(1, len(path) + 1)})
    return YamlSource(data, origins)


_VARIANT_KEYS: dict[KeyPath, str] = {("method",): "name", ("tasks",): "family"}
"""Sections whose other keys depend on the value of this one: another value replaces the section whole."""


def _merged(base: Mapping[str, Any], top: Mapping[str, Any], path: KeyPath = ()) -> dict[str, Any]:
    variant = _VARIANT_KEYS.get(path)
    if variant is not None and variant in base and variant in top and base[variant] != top[variant]:
        return dict(top)
    out = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value, (*path, key)) if both else value
    return out


# --- YAML 1.2 scalars -------------------------------------------------------------------------------------------------


def to_yaml(value: Any, *, one_line: bool = False) -> str:
    """YAML that `read_text` reads back to the same value."""
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
    """SafeLoader follows YAML 1.1, where `2e-3` is text, `no` is false, `010` is eight and `1:30` is ninety."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 – as PyYAML declares it


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""

    yaml_implicit_resolvers = dict(yaml.SafeDumper.yaml_implicit_resolvers)  # noqa: RUF012 – as PyYAML declares it

    def ignore_aliases(self, data: Any) -> bool:
        return True


_FLOAT = re.compile(r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$", re.I)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$", re.I), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))

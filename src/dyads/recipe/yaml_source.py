# SPDX-License-Identifier: Apache-2.0
"""YAML sources: the plain data of a recipe file, and the line that each key stands in.

A recipe file may extend another one, and `--set a.b=c` overrides both: three sources, put on top of one another. What
the keys mean is left to recipe/spec.py.

Scalars follow YAML 1.2: `2e-3` is a number, `on`, `no` and `2024-01-01` are text. A key given twice is an error, and so
are tags of other types, keys that are no text, control characters, and files beyond the limits below.

Built on PyYAML, which transformers and PEFT import anyway. ruamel.yaml, which keeps the line of each key itself, was
tried: 180 lines instead of 186, because its own scalar types, dates and 1_000 have to be undone and aliases that
contain themselves still found; it imports in 20 ms instead of 35 but reads our 48 recipes in 170 ms instead of 75.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from dyads.errors import ConfigError, shortened, similar_file
from dyads.reading import DEEPEST
from dyads.reading import read_text as read_file_text

__all__ = ["KeyPath", "YamlSource", "read_file", "read_overrides", "read_text", "to_yaml"]

KeyPath: TypeAlias = tuple[str | int, ...]

_LARGEST = 2**17
"""Bytes of a recipe file, with those that it extends; PyYAML reads about 100 kB in a second."""
_MOST_VALUES = 20_000
"""Values of a file, those below an alias counted at each of its uses: aliases of aliases multiply."""
_LONGEST_CHAIN = 20
"""Files that extend one another."""


@dataclass(frozen=True)
class YamlSource:
    """Plain data, and for every key in it the file and line, or the override, that it came from."""

    data: dict[str, Any]
    origins: dict[KeyPath, str]

    def over(self, base: YamlSource) -> YamlSource:
        """Both sources in one; this one's values win."""
        return YamlSource(_merged(base.data, self.data), {**base.origins, **self.origins})


def read_file(path: Path, extended_by: tuple[Path, ...] = (), size: int = 0) -> YamlSource:
    """A file on top of the files that it extends.

    `extended_by` is the chain of files that led here, and `size` the number of their characters.
    """
    by = f" (extended by {extended_by[-1]})" if extended_by else ""
    try:
        text = read_file_text(path, error=ConfigError, most=_LARGEST)
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe at '{shortened(str(path))}'{by}{similar_file(path)}") from None
    size += len(text)
    if size > _LARGEST:
        raise ConfigError(
            f"{path}{by}: recipes that extend one another have more than {_LARGEST:,} characters together"
        )
    real = path.resolve()
    if real in extended_by:
        circle = " → ".join(p.name for p in (*extended_by[extended_by.index(real) :], real))
        raise ConfigError(f"{extended_by[-1]}: recipes extend each other in a circle: {circle}")
    if len(extended_by) == _LONGEST_CHAIN:
        raise ConfigError(f"{path}: more than {_LONGEST_CHAIN} recipes extend one another; put their keys into one")
    source = read_text(text, str(path))
    parent = source.data.pop("extends", None)
    if parent is None:
        return source
    if not isinstance(parent, str):
        raise ConfigError(
            f"{source.origins[('extends',)]}: 'extends' must be the path of one recipe, got {shortened(parent, 60)}"
        )
    return source.over(read_file(path.parent / parent, (*extended_by, real), size))


def read_text(text: str, name: str) -> YamlSource:
    """A YAML text alone; errors call it `name`."""
    if len(text) > _LARGEST:
        raise ConfigError(f"{name}: more than {_LARGEST:,} characters, the limit for a recipe")
    data, origins = deepcopy(_kept(text, name))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: a recipe is a list of `key: value` lines, got {type(data).__name__}")
    return YamlSource(data, origins)


@lru_cache(maxsize=8)
def _kept(text: str, name: str) -> tuple[Any, dict[KeyPath, str]]:
    """Kept for the same text: a run reads its config.yaml at half a dozen places, each for 20 ms."""
    return _parsed(text, name)


def _parsed(text: str, name: str, *, lines: bool = True) -> tuple[Any, dict[KeyPath, str]]:
    """The plain data of a YAML text, and the place of every key: `name`, with `lines` followed by the line."""
    origins: dict[KeyPath, str] = {}
    if _DEEP.search(text):  # found at once, where PyYAML would take a second
        raise ConfigError(f"{name}: not valid YAML: more than {DEEPEST} levels of lists and sections")

    def place(mark: yaml.Mark) -> str:
        return f"{name}:{mark.line + 1}" if lines else name

    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, origins
            _Checks(loader, place, origins).check(node, (), 0)
            return loader.construct_document(node), origins
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        reason = shortened(" ".join(str(getattr(error, "problem", None) or error).split()))
        if "'\\t'" in reason:
            reason = "a tab, where YAML takes blanks alone"
        raise ConfigError(f"{place(mark) if mark else name}: not valid YAML: {reason}") from error
    except RecursionError:
        raise ConfigError(f"{name}: not valid YAML: more than {DEEPEST} levels of lists and sections") from None


@dataclass
class _Checks:
    """Checks of a document's nodes before they become data, and the line of every key."""

    loader: _Loader
    place: Callable[[Any], str]
    origins: dict[KeyPath, str]
    values: int = 0
    above: set[int] = field(default_factory=set)

    def check(self, node: yaml.Node, path: KeyPath, depth: int) -> None:
        where = self.place(node.start_mark)
        self.values += 1
        if self.values > _MOST_VALUES:
            raise ConfigError(f"{where}: more than {_MOST_VALUES:,} values, those below an alias counted at each use")
        if depth > DEEPEST:
            raise ConfigError(f"{where}: more than {DEEPEST} levels of lists and sections")
        if id(node) in self.above:
            raise ConfigError(f"{where}: an alias that contains itself")
        self.above.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, _Loader.DEFAULT_SEQUENCE_TAG, where)
            for i, item in enumerate(node.value):
                at: KeyPath = (*path, i)
                self.origins[at] = self.place(item.start_mark)
                self.check(item, at, depth + 1)
        elif isinstance(node, yaml.MappingNode):
            self._check_tag(node, _Loader.DEFAULT_MAPPING_TAG, where)
            self._check_section(node, path, depth)
        else:
            self._check_scalar(node, where)
        self.above.discard(id(node))

    def _check_section(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> None:
        """Refuse a key that is no text, and one given twice, of which PyYAML would silently drop the first."""
        lines: dict[str, int] = {}
        for key_node, value in node.value:
            where, line = self.place(key_node.start_mark), key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{where}: a key is a list or a section, not a text")
            if key_node.tag not in (_TEXT, _MERGE):
                raise ConfigError(f"{where}: the key {shortened(key_node.value, 60)} is no text; put it in quotes")
            self._check_scalar(key_node, where)
            key = str(key_node.value)
            if key in lines:
                dotted = ".".join(map(str, (*path, key)))
                raise ConfigError(f"{where}: '{shortened(dotted)}' is given twice (first in line {lines[key]})")
            lines[key] = line
            at = (*path, key)
            self.origins[at] = where
            self.check(value, at, depth + 1)

    def _check_tag(self, node: yaml.Node, expected: str, where: str) -> None:
        if node.tag != expected:
            raise ConfigError(f"{where}: the tag {shortened(node.tag, 60)} does not fit; leave it out")

    def _check_scalar(self, node: yaml.Node, where: str) -> None:
        text = node.value
        resolved = self.loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        if node.tag not in (_TEXT, resolved):
            raise ConfigError(f"{where}: {shortened(text, 60)} does not fit the tag {shortened(node.tag, 60)}")
        if hidden := re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]", text):
            raise ConfigError(f"{where}: a text has the control character {hidden[0]}: remove it")
        if len(text) > _LONGEST_NUMBER and node.tag == _INT:
            raise ConfigError(f"{where}: a number of {len(text)} digits")


def read_overrides(overrides: Sequence[str], flag: str = "--set") -> YamlSource:
    """Overrides `a.b=c` with values in YAML, of which a later one wins; `flag` is their command-line option."""
    data: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        path = tuple(dotted.strip().split("."))
        shown = f"{flag} {shortened(override)}"
        if not equals or not all(path) or len(path) > DEEPEST:
            raise ConfigError(f"{shown}: write it as key=value (a.b=value for a key in a section)")
        nested, _ = _parsed(text, shown, lines=False)
        for key in reversed(path):
            nested = {key: nested}
        data = _merged(data, nested)
        # The sections above the key too: an error about two keys that contradict each other names the section.
        origins.update({path[:i]: shown for i in range(1, len(path) + 1)})
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


_TEXT, _INT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int", "tag:yaml.org,2002:merge"
_LONGEST_NUMBER = 40
_DEEP = re.compile(rf"(?:[\[{{]\s*){{{DEEPEST + 1}}}")
_FLOAT = re.compile(r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$", re.I)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$", re.I), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))

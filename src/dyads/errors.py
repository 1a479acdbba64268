# SPDX-License-Identifier: Apache-2.0
"""Exceptions of dyads, the suggestion at the end of an error about an unknown name, and text that is safe to print.

DyadsError
├── ConfigError   a config, recipe or option contradicts itself   (also a ValueError)
├── TaskError     a task, its data or its name
├── RunError      a run folder, a checkpoint, a training that cannot continue
├── RoutingError  a task that is missing, unknown or does not match the batch   (also a ValueError)
├── MergeError    a merge that would not be exact   (also a ValueError)
└── VersionError  a PEFT or transformers that is not supported   (also an ImportError)
"""

from __future__ import annotations

import dataclasses
import logging
import re
import reprlib
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import TypeVar

__all__ = [
    "ConfigError",
    "DyadsError",
    "MergeError",
    "RoutingError",
    "RunError",
    "TaskError",
    "VersionError",
    "did_you_mean",
    "listed",
    "notice",
    "reason_of",
    "shortened",
    "similar_file",
    "similar_name",
    "visible",
    "visible_in",
]

T = TypeVar("T")

_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters, with the escape that starts a terminal's commands
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that change the direction of the text after them
    "\u2028\u2029\u200b\u2060-\u2064\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # line ends, and marks without width
    "\ud800-\udfff]"  # half of a surrogate pair, which no output stream encodes
)
_LONGEST = 200
"""Characters of the input that a message repeats at most."""
_LONGEST_LINE = 1500
_LONG = re.compile(rf"(?<=')[^'\n]{{{_LONGEST + 1},}}(?=')|[^\s']{{{_LONGEST + 1},}}")
"""A quotation or a word that is longer."""
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 2 * _LONGEST
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 20


def visible(text: str, keep: str = "") -> str:
    r"""The text with control, escape and bidirectional characters written as \uXXXX, except those in `keep`.

    >>> print(visible("a\x1b[31mb\u202ec\n"))
    a\u001b[31mb\u202ec\u000a
    """
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def visible_in(value: T) -> T:
    """A value with every text in it made visible: in dataclasses, lists, tuples and dicts."""
    if isinstance(value, str):
        return visible(value)  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(map(visible_in, value))  # type: ignore[return-value]
    if isinstance(value, dict):
        return {visible_in(key): visible_in(item) for key, item in value.items()}  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: visible_in(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def shortened(value: object, most: int = _LONGEST) -> str:
    """A value from a file as text for a message: visible, and of at most `most` characters, without its middle."""
    try:
        text = value if isinstance(value, str) else _REPR.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a long {type(value).__name__}"
    if len(text) > 2 * most:
        text = text[:most] + text[-most:]  # making a long text visible takes long
    text = visible(text)
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[len(text) + 1 - (most - most * 2 // 3) :]}"


def notice(message: str) -> None:
    """A line about a step taken, such as a damaged file that is not used, for the logger `dyads`: by default stderr."""
    logging.getLogger("dyads").warning(visible(message))


def reason_of(error: BaseException) -> str:
    """The first line of a foreign error's message, or the name of its class, for a message of ours."""
    return shortened((str(error).strip() or type(error).__name__).splitlines()[0])


def listed(names: Iterable[object]) -> str:
    """Names from a file, with commas, for a message."""
    return shortened(", ".join(map(str, names)))


class DyadsError(Exception):
    """Base class. The message says what was given, what is allowed, and the command or argument that mends it.

    Characters that would change what a terminal shows are made visible; long quotations, words and lines are shortened.
    """

    exit_code = 2
    """Of the command that ends with this error."""

    def __init__(self, message: str = "") -> None:
        safe = _LONG.sub(lambda text: shortened(text[0]), visible(str(message), keep="\n"))
        super().__init__("\n".join(shortened(line, _LONGEST_LINE) for line in safe.split("\n")))


class ConfigError(DyadsError, ValueError):
    """A config, recipe or option that contradicts itself or has an unknown name in it."""


class TaskError(DyadsError):
    """A task, its data or its name."""


class RunError(DyadsError):
    """A run folder, a checkpoint, or a training that cannot continue."""


class RoutingError(DyadsError, ValueError):
    """A task that is missing, unknown, or does not match the batch."""


class MergeError(DyadsError, ValueError):
    """A merge that would not be exact."""


class VersionError(DyadsError, ImportError):
    """An installed version of PEFT or transformers outside the supported range."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the most similar known names, else all known names.

    >>> did_you_mean("lerning_rate", ["learning_rate", "steps"])
    " – did you mean 'learning_rate'?"
    """
    names = [str(n) for n in known]
    lowered = {n.lower(): n for n in names}
    # Comparing long texts takes seconds, and no name is that long.
    near = [lowered[n] for n in get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)] if len(name) < 100 else []
    if near:
        return " – did you mean " + " or ".join(f"'{shortened(n)}'" for n in near) + "?"
    if not names:
        return ""
    shown = ", ".join(shortened(n, 60) for n in names[:20])
    shown += f", … ({len(names)} in all)" if len(names) > 20 else ""
    return f" – known: {shown}"


def similar_file(path: Path) -> str:
    """The end of an error about a missing file: the files of its folder with the most similar names, if any."""
    try:
        names = [file.name for file in path.parent.iterdir()]
    except (OSError, ValueError):  # a name with a null character
        return ""
    return similar_name(path.name, names)


def similar_name(name: str, names: Iterable[str]) -> str:
    """The end of an error about a missing file or folder: the name beside it that differs by a slip, if any.

    Such names share whole words, as in `LoRA-9-seed0` and `MoRE-9-seed0`: the words that differ are compared.

    >>> similar_name("lora-9-sed0", ["lora-9-seed0", "more-9-seed0"])
    " – did you mean 'lora-9-seed0'?"
    """
    lowered = {n.lower(): n for n in names}
    near = get_close_matches(name.lower(), lowered, n=20, cutoff=0.8) if len(name) < 100 else []
    best = max(near, key=lambda n: _likeness(name.lower(), n), default="")
    return did_you_mean(name, [lowered[best]]) if best and _likeness(name.lower(), best) >= 0.8 else ""


def _likeness(a: str, b: str) -> float:
    """1 for equal names, 0 for names without a common part; words that both begin or end with are left out."""
    left, right = re.split(r"[-_. ]", a), re.split(r"[-_. ]", b)
    for end in (0, -1):
        while min(len(left), len(right)) > 1 and left[end] == right[end]:
            del left[end], right[end]
    return SequenceMatcher(None, "-".join(left), "-".join(right)).ratio()

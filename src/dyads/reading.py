# SPDX-License-Identifier: Apache-2.0
"""Reader of text files and of JSON, with limits: a hostile or damaged file is refused with its place and the reason.

Every file that the library reads as text or JSON is read here. A path that is no ordinary file (a folder, a device, a
pipe), a file beyond its limit, text that is not UTF-8, and JSON that is nested deeper than `DEEPEST`, has numbers of
thousands of digits, halves of surrogate pairs, or NaN where the caller does not allow it, are refused with the error
class of the caller.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from dyads.errors import DyadsError, shortened

__all__ = ["DATA", "DEEPEST", "SETTINGS", "parse_json", "read_bytes", "read_json", "read_text"]

SETTINGS, DATA = 64 * 2**20, 2**30
"""Limits in bytes, of a file of settings or scores, and of a file of examples, predictions or log lines."""
DEEPEST = 100
"""Levels of lists and objects in each other."""
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def read_bytes(path: str | os.PathLike[str], *, error: type[DyadsError], most: int = DATA) -> bytes:
    """The content of an ordinary file of at most `most` bytes; FileNotFoundError passes through."""
    shown = shortened(os.fspath(path))
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise error(f"cannot read '{shown}': it is no ordinary file")
            content = file.read(most + 1)
    except (DyadsError, FileNotFoundError):
        raise
    except (OSError, ValueError) as cause:  # ValueError: a path with NUL in it
        raise error(f"cannot read '{shown}': {getattr(cause, 'strerror', None) or cause}") from cause
    if len(content) > most:
        raise error(f"cannot read '{shown}': it has more than {most:,} bytes, the limit for such a file; split it")
    return content


def _without_waiting(path: str, flags: int) -> int:
    """A file descriptor; opening a pipe does not wait for its other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: str | os.PathLike[str], *, error: type[DyadsError], most: int = DATA) -> str:
    """The text of a UTF-8 file, without its byte order mark; FileNotFoundError passes through."""
    try:
        return read_bytes(path, error=error, most=most).decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(
            f"{shortened(os.fspath(path))}: not UTF-8 text (byte {cause.start}); save it as UTF-8, or restore the"
            " original file"
        ) from None


def parse_json(
    text: str, place: str, *, error: type[DyadsError], remedy: str = "", lines: bool = False, nan: bool = False
) -> Any:
    """The value of a JSON text; `place` (file, or file and line) starts the message of an error, `remedy` ends it.

    With `lines`, the text has several lines and the message names the one with the mistake. With `nan`, NaN and
    Infinity are read as floats.
    """
    tail = f"; {remedy}" if remedy else ""
    try:
        value = json.loads(text) if nan else json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if text.count("[") + text.count("{") > DEEPEST:
            _check_depth(value)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as cause:
        line = f", line {cause.lineno}" if lines else ""
        raise error(f"{place}{line}, column {cause.colno}: not valid JSON: {cause.msg}{tail}") from None
    except RecursionError:
        raise error(f"{place}: not valid JSON: more than {DEEPEST} levels of lists and objects{tail}") from None
    except UnicodeEncodeError:
        raise error(f"{place}: not valid JSON: half of a surrogate pair (\\uD800 to \\uDFFF) in a text{tail}") from None
    except ValueError as cause:
        reason = "a number of thousands of digits" if "digits" in str(cause) else cause
        raise error(f"{place}: not valid JSON: {reason}{tail}") from None
    return value


def read_json(path: Path, *, error: type[DyadsError], remedy: str = "", most: int = SETTINGS, nan: bool = False) -> Any:
    """The value in a JSON file; FileNotFoundError passes through."""
    text = read_text(path, error=error, most=most)
    return parse_json(text, str(path), error=error, remedy=remedy, lines=True, nan=nan)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is larger than any number that a float holds")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError

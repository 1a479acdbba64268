# SPDX-License-Identifier: Apache-2.0
"""Strategies for hostile and damaged files: valid documents with values replaced, and texts with bytes changed."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from click.testing import CliRunner
from hypothesis import strategies as st

from dyads.cli import main
from dyads.errors import DyadsError

LONGEST = 2.0
"""Seconds of computing; other processes do not count."""
DIGITS = "9" * 5000
VALUES = [
    None,
    True,
    -1,
    0,
    10**30,
    10**400,
    10**9,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "\0",
    "\x1b[31m\x07",
    "\u202eabc\u2028",
    "\ud800",
    "a" * 10_000,
    "../" * 100,
    "/dev/zero",
    "名" * 300,
    [],
    {},
    [[]],
    {"a": {"b": 1}},
    [1, "a", None],
    json.loads("[" * 90 + "]" * 90),
]
"""Values that a field of a file may have instead of its own."""
TOKENS = [
    *("\0", "\x1b[2J", "\u202e", "\ufeff", "\r", "\t", "\n", " ", "\x85", "\u2028"),
    *("!!int abc", "!!float x", "!!bool x", "!!binary =", "!!python/object:os.system x", "!!timestamp x", "!!set {a}"),
    *("&a ", "*a", "*b", "<<: *a", "<<: [*a, *a]", "? ", "- ", ": ", "{", "}", "[", "]", "|", ">", "%YAML 9.9", "---"),
    *("[" * 3000, "{a: " * 300, "- " * 300, '{"a":' * 300, DIGITS, "1e999", ".nan", "NaN", "-Infinity", '"\\ud800"'),
    *("null", "true", "0x10", "1_000", "''", '"', "'", ",", "extends: /dev/zero", "extends: .", "a: 1", "x" * 5000),
]
"""Texts that are put into a file."""


HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that no message and no screen shows as they are."""


@dataclass
class Tally:
    """The inputs that were tried."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    """Seconds of computing."""


TALLY = Tally()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A document with some values replaced, removed, or given under another key."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        where = draw(st.sampled_from([(), *places(document)]))
        value = copy.deepcopy(draw(st.sampled_from(VALUES) | st.text(max_size=20) | st.integers() | st.floats()))
        if not where:
            if draw(st.integers(0, 9)) == 0:
                document = value
            elif isinstance(document, dict):
                document[draw(st.text(max_size=12) | st.sampled_from(["a" * 300, "\x1b", "extends"]))] = value
            continue
        *above, last = where
        holder = document
        for key in above:
            holder = holder[key]
        if draw(st.booleans()) or not isinstance(holder, dict):
            holder[last] = value
        else:
            del holder[last]
    return document


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some changed, removed, repeated, or with one of TOKENS between them."""
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["token", "flip", "cut", "end", "repeat", "bytes"]))
        if kind == "token":
            token = draw(st.sampled_from(TOKENS)).encode("utf-8", "surrogatepass")
            content = content[:at] + token + content[at:]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at] + content[at + draw(st.integers(1, 30)) :]
        elif kind == "end":
            content = content[:at]
        elif kind == "repeat":
            content = content[:at] * 2 + content[at:]
        else:
            content = content[:at] + draw(st.binary(max_size=8)) + content[at:]
    return content


def as_json(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=True).encode()


def accepted_or_refused(work: Callable[[], object], content: bytes = b"") -> None:
    """The work succeeds, or ends with an error of ours that is safe to print and repeats little of the content."""
    start = time.process_time()
    try:
        work()
        TALLY.accepted += 1
    except DyadsError as error:
        TALLY.refused += 1
        message = str(error)
        assert message
        assert not re.search(r"\S{210}", message), message[:500]
        assert not HIDDEN.search(message), ascii(message)
        assert len(message) < 10_000, len(message)
        text = content.decode("utf-8", "replace")
        assert not any(message[i : i + 201] in text for i in range(len(message) - 200)), message
    seconds = time.process_time() - start
    TALLY.slowest = max(TALLY.slowest, seconds)
    assert seconds < LONGEST, "it takes too long"


def shown(*arguments: object, exit_codes: Sequence[int] = (0, 2)) -> None:
    """A command ends with its result or with an error of ours, and its screen has nothing hidden."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in exit_codes
    assert not HIDDEN.search(result.output), ascii(result.output)

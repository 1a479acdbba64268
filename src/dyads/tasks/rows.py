# SPDX-License-Identifier: Apache-2.0
"""How are the rows of public benchmark files read: TSV, JSON lines, JSON lists?

A fault names its file and line, or for a JSON list the number of the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyads.errors import TaskError

__all__ = ["Row", "first_file", "read_json", "read_jsonl", "read_tsv"]


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it stands."""

    place: str
    number: int
    """From 0, over the records of its file, so that ids stay when a row is left out."""
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        """A field that must be text, or a number or truth value that can be written as one; stripped."""
        value = self[name]
        if isinstance(value, (dict, list)) or value is None:
            raise TaskError(f"{self.place}: '{name}' must be text, got {json.dumps(value)[:60]}")
        return str(value).strip()

    def __getitem__(self, name: str) -> Any:
        if name not in self.fields:
            raise TaskError(f"{self.place}: no field '{name}'; it has {', '.join(map(str, self.fields)) or 'none'}")
        return self.fields[name]


def first_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the names that is a file in the folder."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_tsv(path: Path, columns: Sequence[str] | None = None) -> tuple[list[Row], int]:
    """The rows, and how many were left out because they have another number of cells than the header.

    A cell is what stands between two tabs: a quotation mark is a character like any other. `columns` names the columns
    of a file without a header.
    """
    lines = [(n, line.removesuffix("\r")) for n, line in enumerate(_text(path).split("\n"), start=1)]
    lines = [(n, line) for n, line in lines if line.strip()]
    if columns is None:
        columns = [name.strip() for name in lines[0][1].split("\t")] if lines else []
        lines = lines[1:]
    rows, left_out = [], 0
    for number, (line_number, line) in enumerate(lines):
        cells = line.split("\t")
        if len(cells) != len(columns):
            left_out += 1
            continue
        rows.append(Row(f"{path}, line {line_number}", number, dict(zip(columns, cells, strict=True))))
    if left_out and not rows:
        raise TaskError(f"{path}: no row has {len(columns)} cells ({', '.join(columns)}); cells are divided by tabs")
    return rows, left_out


def read_jsonl(path: Path) -> list[Row]:
    """One JSON object a line."""
    return list(_jsonl(path))


def _jsonl(path: Path) -> Iterator[Row]:
    # Only \n separates records: str.splitlines would also cut at U+2028 and others that JSON allows inside a text.
    lines = [(n, line) for n, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]
    for number, (line_number, line) in enumerate(lines):
        place = f"{path}, line {line_number}"
        try:
            given = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(
                f"{place}, column {error.colno}: not valid JSON: {error.msg}; fetch the file again"
            ) from None
        yield _record(place, number, given)


def read_json(path: Path) -> list[Row]:
    """One JSON list of objects."""
    try:
        given = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise TaskError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}; fetch the file again"
        ) from None
    if not isinstance(given, list):
        raise TaskError(f"{path}: expected a JSON list of rows, got {type(given).__name__}")
    return [_record(f"{path}, row {number + 1}", number, row) for number, row in enumerate(given)]


def _record(place: str, number: int, given: object) -> Row:
    if not isinstance(given, dict):
        raise TaskError(f"{place}: expected a JSON object, got {json.dumps(given)[:60]}")
    return Row(place, number, given)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 text (byte {error.start}): fetch the file again") from None

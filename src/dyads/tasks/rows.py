# SPDX-License-Identifier: Apache-2.0
"""Readers of record files: JSON lines, JSON lists, and comma- or tab-separated values.

Every JSONL file of the library is read by `read_jsonl`. Errors name the file and the line, or the number of the record
in a JSON list.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyads import reading
from dyads.errors import DyadsError, TaskError, listed
from dyads.reading import parse_json

__all__ = [
    "Row",
    "first_file",
    "json_of_cell",
    "read_csv",
    "read_json",
    "read_jsonl",
    "read_text",
    "read_tsv",
    "shortened",
]

_LARGEST_CELL = 2**31 - 1  # the largest limit that the csv module takes on every system

DOWNLOAD_AGAIN = "download the file again"
"""The way out of an error in a file of a public benchmark."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file."""

    place: str
    """File and line, or file and number of the record: the start of an error message."""
    number: int
    """Position among the records of the file, from 0. Example ids contain it, so it counts dropped records too."""
    fields: Mapping[str, Any]
    line: int = 0
    """Line of the file, from 1; 0 for a record of a JSON list."""

    def text(self, name: str) -> str:
        """A field as stripped text. Numbers and booleans are converted; null, lists and objects are refused."""
        value = self[name]
        if isinstance(value, (dict, list)) or value is None:
            raise TaskError(f"{self.place}: '{name}' must be text, got {shortened(value)}")
        return str(value).strip()

    def __getitem__(self, name: str) -> Any:
        if name not in self.fields:
            raise TaskError(f"{self.place}: no field '{name}'; it has {listed(self.fields) or 'none'}")
        return self.fields[name]


def first_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the names that is a file in the folder; None without one."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_text(path: Path, *, error: type[DyadsError] = TaskError) -> str:
    """The text of a UTF-8 file, without its byte order mark; FileNotFoundError passes through."""
    return reading.read_text(path, error=error)


def read_tsv(path: Path, columns: Sequence[str] | None = None) -> tuple[list[Row], int]:
    """The rows of a tab-separated file, and the number of rows dropped because they have too few or too many cells.

    Quotation marks are ordinary characters. `columns` names the columns of a file without a header line.
    """
    lines = [(n, line.removesuffix("\r")) for n, line in enumerate(read_text(path).split("\n"), start=1)]
    lines = [(n, line) for n, line in lines if line.strip()]
    if columns is None:
        columns = [name.strip() for name in lines[0][1].split("\t")] if lines else []
        lines = lines[1:]
    rows, dropped = [], 0
    for number, (line_number, line) in enumerate(lines):
        cells = line.split("\t")
        if len(cells) != len(columns):
            dropped += 1
            continue
        fields = dict(zip(columns, cells, strict=True))
        rows.append(Row(f"{path}, line {line_number}", number, fields, line_number))
    if dropped and not rows:
        raise TaskError(f"{path}: no row has {len(columns)} cells ({listed(columns)}); separate cells with tabs")
    return rows, dropped


def read_csv(path: Path) -> tuple[list[str], list[Row]]:
    """Column names and rows of a CSV file; cells may hold commas and line breaks in quotation marks."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[Row] = []
    limit = csv.field_size_limit(_LARGEST_CELL)  # a setting of the whole process; its default is 128 KiB
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), None)):
            raise TaskError(f"{path}, line 1: cells are separated by {other!r}; save the file with commas")
        if len(set(header)) < len(header):
            raise TaskError(f"{path}, line 1: a column name is used twice: {listed(header)}")
        line = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    raise TaskError(
                        f"{path}, line {line}: {len(cells)} cells for {len(header)} columns ({listed(header)}); "
                        f'put a text with commas or line breaks in "quotes"'
                    )
                rows.append(Row(f"{path}, line {line}", len(rows), dict(zip(header, cells, strict=True)), line))
            line = reader.line_num + 1
    except csv.Error as error:
        raise TaskError(f"{path}, line {line}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return header, rows


def read_jsonl(path: Path, *, error: type[DyadsError] = TaskError, remedy: str = DOWNLOAD_AGAIN) -> list[Row]:
    """The objects of a JSON lines file; empty lines are skipped.

    A line that is not a JSON object raises `error`, and its message ends with `remedy`. A missing file is the caller's
    to explain: FileNotFoundError passes through.
    """
    # Only \n separates records: str.splitlines would also split at U+2028 and others that JSON allows inside a text.
    lines = read_text(path, error=error).split("\n")
    filled = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    rows = []
    for number, (line_number, line) in enumerate(filled):
        place = f"{path}, line {line_number}"
        record = parse_json(line, place, error=error, remedy=remedy)
        if not isinstance(record, dict):
            raise error(f"{place}: expected a JSON object, got {shortened(record)}; {remedy}")
        rows.append(Row(place, number, record, line_number))
    return rows


def read_json(path: Path) -> list[Row]:
    """The objects of a JSON file that holds one list of them."""
    records = parse_json(read_text(path), str(path), error=TaskError, remedy=DOWNLOAD_AGAIN, lines=True)
    if not isinstance(records, list):
        raise TaskError(f"{path}: expected a JSON list of objects, got {type(records).__name__}; {DOWNLOAD_AGAIN}")
    rows = [Row(f"{path}, row {number + 1}", number, record) for number, record in enumerate(records)]
    for row in rows:
        if not isinstance(row.fields, dict):
            raise TaskError(f"{row.place}: expected a JSON object, got {shortened(row.fields)}; {DOWNLOAD_AGAIN}")
    return rows


def json_of_cell(text: str, mistake: str) -> Any:
    """The value of JSON in a cell of a table; TaskError with `mistake`, the reason and the text where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "it is nested too deeply, or has a number of thousands of digits")
        raise TaskError(f"{mistake}: {reason} in {shortened(text)}") from None


def shortened(value: object) -> str:
    """A value as JSON of at most 60 characters, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"

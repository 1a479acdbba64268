# SPDX-License-Identifier: Apache-2.0
"""Family `files`: your own tasks from JSONL or CSV files.

A row has `task, input, output` and optionally `split` (train, validation, test), `id`, `instruction`, `metric`,
`labels`.

    {"task": "capitals", "input": "France", "output": "Paris"}
    {"task": "capitals", "input": "Bolivia", "output": ["Sucre", "La Paz"], "split": "test"}

The first of several references is the training target. In CSV, several are a JSON list in the cell, which then starts
with `["`; any other cell is one reference.
The prompt is the instruction (if any), an empty line, the input and a line break; the answer follows. A model with a
chat template reads it as a user's message. With `labels` a task is a classification: its answers are verbalizers, and
an encoder with a head reads the input only. Files are read in the order of `path`, those of a folder by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from dyads.errors import TaskError, similar_file
from dyads.tasks.family import register_family
from dyads.tasks.own_rows import QUESTION_COLUMNS, OwnRow, OwnRowsSpec
from dyads.tasks.rows import Row, json_of_cell, read_csv, read_json, read_jsonl

__all__ = ["FilesSpec", "RowFilesSpec"]

_EXAMPLE = '{"task": "capital", "input": "France", "output": "Paris"}'


class RowFilesSpec(OwnRowsSpec):
    """Rows from files."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".csv")
    example: ClassVar[str]
    """A row, for errors."""
    needs_task: ClassVar[bool]
    """Whether a row needs the column `task`; else the file's name is the default."""

    path: tuple[Path, ...] = Field(min_length=1)
    """A file, a list of files, or a folder of them."""

    @field_validator("path", mode="before")
    @classmethod
    def _one_path_is_a_list(cls, given: object) -> object:
        return (given,) if isinstance(given, (str, Path)) else given

    def _source(self) -> str:
        return ", ".join(map(str, self.path))

    def own_rows(self, notes: list[str]) -> Iterable[OwnRow]:
        paths = _files(self.path, self.suffixes)
        names = Counter(path.name for path in paths)
        for number, path in enumerate(paths, start=1):
            short = path.name if names[path.name] == 1 else f"{number}/{path.name}"
            for row in self._rows(path):
                yield OwnRow(row, f"{short}:{row.line or row.number + 1}", "" if self.needs_task else path.stem)

    def _rows(self, path: Path) -> Sequence[Row] | Iterator[Row]:
        suffix = path.suffix.lower()
        if suffix == ".jsonl":
            return read_jsonl(path, remedy=f"write one JSON object per line, such as {self.example}")
        if suffix == ".json":
            return read_json(path)
        header, rows = read_csv(path)
        self.check_required(f"{path}, line 1", header, "" if self.needs_task else path.stem)
        self.check_columns(f"{path}, line 1", header)
        output = self._name("output") or ""
        cells = ({name: _cell(row, name, output) for name in row.fields} for row in rows)
        return (replace(row, fields=filled) for row, filled in zip(rows, cells, strict=True))


@register_family
class FilesSpec(RowFilesSpec):
    """Your own tasks from JSONL or CSV files."""

    known: ClassVar[tuple[str, ...]] = QUESTION_COLUMNS
    version: ClassVar[int] = 2
    example: ClassVar[str] = _EXAMPLE
    needs_task: ClassVar[bool] = True

    family: Literal["files"] = "files"
    """Your own tasks from JSONL or CSV files."""


def _files(paths: tuple[Path, ...], suffixes: tuple[str, ...]) -> list[Path]:
    found: list[Path] = []
    for path in (p.expanduser() for p in paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and p.is_file())
            if not inside:
                raise TaskError(f"no {' or '.join(f'*{suffix}' for suffix in suffixes)} file in folder {path}")
            found += inside
        elif not path.exists():
            where = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise TaskError(f"no file or folder {path}{similar_file(path) or where}")
        elif path.suffix.lower() not in suffixes:
            hint = "; family: dataset reads it" if path.suffix.lower() in (".parquet", ".arrow") else ""
            raise TaskError(f"{path}: cannot read '{path.suffix}' files; use {' or '.join(suffixes)}{hint}")
        else:
            found.append(path)
    if twice := [str(path) for path, times in Counter(found).items() if times > 1]:
        raise TaskError(f"`path` has a file twice: {', '.join(twice)}; give every file once")
    return found


def _cell(row: Row, name: str, output: str) -> object:
    """The text of a CSV cell; for the output a list where it starts like a JSON list of texts."""
    text = row.fields[name]
    if name != output or not text.lstrip().startswith('["'):
        return text
    return json_of_cell(text, f"{row.place}: output starts like a JSON list but is not valid JSON")

# SPDX-License-Identifier: Apache-2.0
"""Family `files`: your own tasks from JSONL or CSV files.

A row has `task, input, output` and optionally `split` (train, validation, test), `id`, `instruction`, `metric`.

    {"task": "capitals", "input": "France", "output": "Paris"}
    {"task": "capitals", "input": "Bolivia", "output": ["Sucre", "La Paz"], "split": "test"}

The first of several references is the training target. In CSV, several are a JSON list in the cell, which then starts
with `["`; any other cell is one reference.
The prompt is the instruction (if any), an empty line, the input and a line break; the answer follows. With the option
`labels` a task is a classification: its answers are verbalizers, and an encoder with a head reads the input only.
All rows of a task have a split, or none has: then it is divided 80/10/10 by a hash of seed and prompt, and rows with
the same prompt are in one split. Tasks are ordered by their first rows; files are read in the order of `path`, those of
a folder by name.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from dyads.errors import TaskError, did_you_mean
from dyads.tasks.divide import divide
from dyads.tasks.family import FamilySpec, Suite, register_family
from dyads.tasks.metrics import metric as metric_named
from dyads.tasks.rows import read_jsonl, read_text, shortened
from dyads.tasks.task import SPLITS, Example, Task
from dyads.tasks.template import Template

__all__ = ["FilesSpec"]

VERSION = 1
REQUIRED = ("task", "input", "output")
OPTIONAL = ("split", "id", "instruction", "metric")
DEFAULT_METRICS = ("rouge_l", "exact_match")
LABELLED_METRICS = ("accuracy", "macro_f1")
SUFFIXES = (".jsonl", ".csv")
_JSON_EXAMPLE = '{"task": "capital", "input": "France", "output": "Paris"}'
HELD_OUT = 0.10  # share of a task's rows for the test split, and the same for validation


@register_family
class FilesSpec(FamilySpec):
    """Your own tasks from JSONL or CSV files."""

    family: Literal["files"] = "files"
    """Your own tasks from JSONL or CSV files."""
    path: tuple[Path, ...] = Field(min_length=1)
    """A file, a list of files, or a folder with *.jsonl and *.csv."""
    instructions: dict[str, str] = Field(default_factory=dict)
    """Text before every input of a task, by task; instead of a column `instruction`."""
    labels: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """All answers of a classification task in the order of their class ids, by task; the positive of two is second."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Limit of a generated answer."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Limit of a prompt; longer ones are cut. None: `train.max_prompt_tokens` alone."""
    seed: int = 0
    """Seed of the splits of tasks whose rows have none; independent of the training seed."""

    @field_validator("path", mode="before")
    @classmethod
    def _one_path_is_a_list(cls, given: object) -> object:
        return (given,) if isinstance(given, (str, Path)) else given

    def load(self) -> Suite:
        by_task: dict[str, list[_Row]] = {}
        paths = _files(self.path)
        for path in paths:
            for row in _READERS[path.suffix.lower()](path):
                by_task.setdefault(row.task, []).append(row)
        if not by_task:
            raise TaskError(
                f"no rows in {', '.join(map(str, self.path))}; write at least train and test rows of one task"
            )
        for option, named in (("instructions", self.instructions), ("labels", self.labels)):
            for name in named:
                if name not in by_task:
                    raise TaskError(f"{option} for an unknown task '{name}'{did_you_mean(name, by_task)}")
        notes: list[str] = []
        names = Counter(path.name for path in paths)
        short_names = {p: p.name if names[p.name] == 1 else f"{k}/{p.name}" for k, p in enumerate(paths, start=1)}
        return Suite(tuple(self._task(name, rows, short_names, notes) for name, rows in by_task.items()), tuple(notes))

    def _task(self, name: str, rows: list[_Row], short_names: dict[Path, str], notes: list[str]) -> Task:
        instruction = self.instructions.get(name)
        template = _template(instruction, rows)
        examples = []
        for row in rows:
            if instruction is not None and row.instruction:
                raise TaskError(
                    f"{row.place}: task '{name}' has an instruction in this row and in `instructions`; drop one"
                )
            examples.append(
                template.example(
                    {"input": row.input, **({"instruction": row.instruction} if row.instruction else {})},
                    id=row.id or f"{short_names[row.path]}:{row.line}",
                    references=row.output,
                    place=row.place,
                )
            )
        _refuse_repeated_ids(name, rows, examples)
        unsplit = [row for row in rows if not row.split]
        if not unsplit:
            parts = {s: tuple(e for e, r in zip(examples, rows, strict=True) if r.split == s) for s in SPLITS}
            for split in ("train", "test"):
                if not parts[split]:
                    files = ", ".join(sorted({str(row.path) for row in rows}))
                    raise TaskError(
                        f"task '{name}' has no {split} rows in {files}; give some the split '{split}', or "
                        f"leave the column `split` out for a seeded 80/10/10 split"
                    )
            trained = {e.prompt for e in parts["train"]}
            if shared := sum(e.prompt in trained for e in parts["test"]):
                notes.append(f"{name}: {shared} of {len(parts['test'])} test prompts are also in its train split")
        elif len(unsplit) == len(rows):
            held_out = max(1, round(HELD_OUT * len(rows)))
            salt = f"files/{self.seed}/{name}"
            train, test, validation = divide(examples, [held_out, held_out], salt=salt, task=name)
            parts = {"train": train, "validation": validation, "test": test}
        else:
            raise TaskError(
                f"{unsplit[0].place}: task '{name}' has a split in {len(rows) - len(unsplit)} rows and none in "
                f"{len(unsplit)}, of which this is the first; give it in every row or in none"
            )
        labels = self.labels.get(name, ())
        metrics = _metrics(name, rows, LABELLED_METRICS if labels else DEFAULT_METRICS)
        return Task(
            name=name,
            version=VERSION,
            train=parts["train"],
            validation=parts["validation"],
            test=parts["test"],
            metric=metrics[0],
            metrics=metrics,
            max_new_tokens=self.max_new_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            labels=labels,
            description=(instruction or rows[0].instruction).strip(),
            template=template,
        )


@dataclass(frozen=True, slots=True)
class _Row:
    path: Path
    line: int
    task: str
    input: str
    output: tuple[str, ...]
    split: str
    id: str
    instruction: str
    metric: str

    @property
    def place(self) -> str:
        return f"{self.path}, line {self.line}"


def _template(instruction: str | None, rows: list[_Row]) -> Template:
    """Instruction, empty line and input; an instruction that all rows share is the default of later rows."""
    given = {row.instruction for row in rows} if instruction is None else {instruction}
    with_, without = "{instruction:strip}\n\n{input}", "{input}"
    texts = (with_,) if all(text.strip() for text in given) else (with_, without) if any(given) else (without,)
    defaults = {"instruction": min(given)} if len(given) == 1 and texts == (with_,) else {}
    return Template(texts=texts, segments=("{input}",), defaults=defaults, ends_line=True)


def _refuse_repeated_ids(task: str, rows: list[_Row], examples: list[Example]) -> None:
    first: dict[str, _Row] = {}
    for row, example in zip(rows, examples, strict=True):
        if example.id in first:
            raise TaskError(
                f"{row.place}: id '{example.id}' of task '{task}' is already used in {first[example.id].place}; "
                f"give every row its own id, or leave the column `id` out"
            )
        first[example.id] = row


def _metrics(task: str, rows: list[_Row], default: tuple[str, ...]) -> tuple[str, ...]:
    named = {row.metric: row for row in rows if row.metric}
    if not named:
        return default
    if len(named) > 1:
        (a, first), (b, second), *_ = named.items()
        raise TaskError(
            f"task '{task}' has two metrics: '{a}' in {first.place} and '{b}' in {second.place}; choose one"
        )
    ((name, row),) = named.items()
    try:
        metric_named(name)
    except TaskError as error:
        raise TaskError(f"{row.place}: {error}") from None
    return (name, *(m for m in default if m != name))


# ----- reading


def _files(paths: tuple[Path, ...]) -> list[Path]:
    found: list[Path] = []
    for path in (p.expanduser() for p in paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise TaskError(f"no *.jsonl or *.csv file in folder {path}")
            found += inside
        elif not path.exists():
            raise TaskError(f"no file or folder {path}")
        elif path.suffix.lower() not in SUFFIXES:
            raise TaskError(f"{path}: cannot read '{path.suffix}' files; use {' or '.join(SUFFIXES)}")
        else:
            found.append(path)
    if twice := [str(path) for path, times in Counter(found).items() if times > 1]:
        raise TaskError(f"`path` has a file twice: {', '.join(twice)}; give every file once")
    return found


def _read_jsonl(path: Path) -> Iterator[_Row]:
    for record in read_jsonl(path, remedy=f"write one JSON object per line, such as {_JSON_EXAMPLE}"):
        _check_columns(record.place, record.fields)
        yield _row(path, record.line, {k: v for k, v in record.fields.items() if v is not None})


def _read_csv(path: Path) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    start = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_columns(f"{path}, line 1", header)
        start = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    raise TaskError(
                        f"{path}, line {start}: {len(cells)} cells for {len(header)} columns ({', '.join(header)}); "
                        f'put a text with commas or line breaks in "quotes"'
                    )
                given = dict(zip(header, cells, strict=True))
                yield _row(path, start, {**given, "output": _cell(f"{path}, line {start}", given["output"])})
            start = reader.line_num + 1
    except csv.Error as error:
        raise TaskError(f"{path}, line {start}: not valid CSV: {error}") from None


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv}


def _check_columns(place: str, columns: Mapping[str, object] | list[str]) -> None:
    if missing := [name for name in REQUIRED if name not in columns]:
        raise TaskError(
            f"{place}: column '{missing[0]}' is missing; it has {', '.join(map(str, columns)) or 'none'}, "
            f"a row needs {', '.join(REQUIRED)} and may have {', '.join(OPTIONAL)}"
        )
    if isinstance(columns, list) and len(set(columns)) < len(columns):
        raise TaskError(f"{place}: a column name is used twice: {', '.join(columns)}")


def _row(path: Path, line: int, given: Mapping[str, object]) -> _Row:
    place = f"{path}, line {line}"
    texts = {}
    for name in ("task", "input", *OPTIONAL):
        value = given.get(name, "")
        if name == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise TaskError(f"{place}: '{name}' must be text, got {shortened(value)}; put it in quotes")
        texts[name] = value if name == "input" else value.strip()
    for name in ("task", "input"):
        if not texts[name].strip():
            raise TaskError(f"{place}: '{name}' is empty")
    if texts["split"] and texts["split"] not in SPLITS:
        raise TaskError(
            f"{place}: unknown split '{texts['split']}'{did_you_mean(texts['split'], SPLITS)}; use {', '.join(SPLITS)}"
        )
    return _Row(path=path, line=line, output=_references(place, given.get("output")), **texts)


def _cell(place: str, output: str) -> object:
    """The references in a CSV cell: a list where it starts like a JSON list of texts, else one text."""
    if not output.lstrip().startswith('["'):
        return output
    try:
        return json.loads(output)
    except json.JSONDecodeError as error:
        raise TaskError(
            f"{place}: output starts like a JSON list but is not valid JSON: {error.msg} in {shortened(output)}"
        ) from None


def _references(place: str, output: object) -> tuple[str, ...]:
    references = [output] if isinstance(output, str) else output
    if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
        raise TaskError(
            f"{place}: 'output' must be a text or a list of texts, got {shortened(output)}; put numbers in quotes"
        )
    kept = tuple(r.strip() for r in references if r.strip())
    if not kept:
        raise TaskError(f"{place}: 'output' is empty; write an answer, or leave the row out")
    return kept

# SPDX-License-Identifier: Apache-2.0
"""Family `dataset`: rows that the library `datasets` reads, from the hub or from disk, and parquet and arrow files.

    tasks: {family: dataset, path: org/name, columns: {input: question, output: answer}}
    tasks: {family: dataset, path: rows.parquet, columns: {input: "{title}\\n{text}", output: label}}

Rows have the columns of the families `files` and `chat`, under their own names or those in `columns`, where a dot
reaches into a nested column (`answers.text`). Numbers are written as text. A column of class labels gives their names,
and as the output the task's labels; rows without a label (-1) are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from dyads.errors import TaskError, did_you_mean, reason_of
from dyads.tasks.family import register_family
from dyads.tasks.own_rows import CHAT_COLUMNS, OwnRow, OwnRowsSpec
from dyads.tasks.rows import Row
from dyads.tasks.task import SPLITS

__all__ = ["DatasetSpec"]


@register_family
class DatasetSpec(OwnRowsSpec):
    """Rows that the library datasets reads, from the hub or from disk."""

    known: ClassVar[tuple[str, ...]] = CHAT_COLUMNS
    version: ClassVar[int] = 1

    family: Literal["dataset"] = "dataset"
    """Rows that the library datasets reads, from the hub or from disk"""
    path: str = Field(min_length=1)
    """A hub id, a folder that datasets saved or that holds parquet files, or a .parquet or .arrow file"""
    config: str | None = None
    """The configuration of a hub data set that has several"""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; null: its default branch"""
    split: str | dict[Literal["train", "validation", "test"], str] | None = None
    """One split, which is divided 80/10/10 where its rows have no column `split`, or {train: train, test: validation};
    null: the splits train, validation and test, or the only one. A split may be a slice, train[:1000], on the hub"""

    def _source(self) -> str:
        return f"data set '{self.path}'"

    def own_rows(self, notes: list[str]) -> Iterable[OwnRow]:
        name = self.config or Path(self.path).expanduser().resolve().stem
        dropped = 0
        for ours, theirs, rows in self._splits():
            place = f"{self._source()}, {theirs}" if theirs else self._source()
            columns = list(rows.column_names)
            reachable = [*columns, *(n for n in self._read() if n not in columns and n.split(".")[0] in columns)]
            self.check_required(place, reachable, name)
            ignored = self.check_columns(place, reachable)
            if self.columns:
                rows = rows.select_columns([c for c in columns if c not in ignored or self._nested(c)])
            classes = {n: f.names for n, f in rows.features.items() if type(f).__name__ == "ClassLabel"}
            for number, fields in enumerate(rows):
                row = self._row(fields, classes)
                if row is None:
                    dropped += 1
                    continue
                yield OwnRow(
                    Row(f"{place}, row {number + 1}", number, row),
                    f"{theirs or 'row'}-{number}",
                    name,
                    split=ours or "",
                )
        if dropped:
            notes.append(f"left out {dropped} rows of {self._source()} without a label")

    def _read(self) -> list[str]:
        """The names of all columns that may be read."""
        return [name for ours in self.known if ours != "input" and (name := self._name(ours))] + list(self._inputs())

    def _nested(self, column: str) -> bool:
        return any(name.split(".")[0] == column for name in self._read())

    def _row(self, fields: Mapping[str, Any], classes: Mapping[str, list[str]]) -> dict[str, Any] | None:
        """The fields of a row as a file would have them; None for a row whose class is missing."""
        row: dict[str, Any] = dict(fields)
        for path in self._read():
            if path not in row and "." in path:
                row[path] = _inside(fields, path)
        output, labels = str(self._name("output")), self._name("labels")
        for name, names in classes.items():
            if row.get(name) is None or row[name] < 0:
                if name == output:
                    return None
                row[name] = None
                continue
            row[name] = names[row[name]]
        if output in classes and labels is not None and labels not in row and "labels" not in self.columns:
            row[labels] = classes[output]
        texts = {self._name(n) for n in ("task", "output", "instruction", "id", "system")} | set(self._inputs())
        for name in row:
            row[name] = _as_text(row[name]) if name in texts else row[name]
        return row

    def _splits(self) -> Iterator[tuple[str, str, Any]]:
        """(our name of the split or "", its name in the data set, its rows)."""
        if isinstance(self.split, str):
            yield "", self.split, self._load([self.split])[self.split]
            return
        given = self._load(None if self.split is None else list(self.split.values()))
        if self.split is None and len(given) == 1:
            ((name, rows),) = given.items()
            yield "", name, rows
            return
        wanted: dict[str, str] = {name: name for name in SPLITS if name in given}
        if self.split is not None:
            wanted = {str(ours): theirs for ours, theirs in self.split.items()}
        if lacking := [split for split in ("train", "test") if split not in wanted]:
            raise TaskError(
                f"{self._source()} has the splits {', '.join(given)}: name the one for {lacking[0]}, as in "
                "`split: {train: train, test: validation}`"
            )
        for ours, theirs in wanted.items():
            if twice := [other for other in wanted if other != ours and wanted[other] == theirs]:
                raise TaskError(
                    f"{self._source()}: `split` reads '{theirs}' as {ours} and as {twice[0]}, and no row may be in two"
                    f" splits: leave validation out, or cut '{theirs}' in two, as in '{theirs}[:50%]'"
                )
            yield ours, theirs, given[theirs]

    def _load(self, splits: list[str] | None) -> dict[str, Any]:
        """The data set's splits by name: all of them, or the given ones."""
        try:
            import datasets
        except ImportError:
            raise TaskError("family 'dataset' needs the package datasets: pip install 'dyads[datasets]'") from None
        local = Path(self.path).expanduser()
        try:
            with _quiet(datasets):
                if local.is_file():
                    found = _file(datasets, local)
                elif (local / "dataset_dict.json").is_file() or (local / "dataset_info.json").is_file():
                    found = datasets.load_from_disk(str(local))
                elif local.is_dir():
                    found = datasets.load_dataset(str(local), self.config)
                else:
                    options = {"revision": self.revision}
                    if splits is not None:
                        many = datasets.load_dataset(self.path, self.config, split=splits, **options)
                        return dict(zip(splits, many, strict=True))
                    found = datasets.load_dataset(self.path, self.config, **options)
        except TaskError:
            raise
        except Exception as error:  # datasets raises many kinds of errors
            reason = reason_of(error)
            raise TaskError(
                f"cannot load {self._source()}: {reason}; give a hub id, a folder that datasets saved, or a .parquet or"
                " .arrow file"
            ) from error
        named = dict(found.items()) if isinstance(found, Mapping) else {"": found}
        if splits is None:
            return named
        if unknown := [split for split in splits if split not in named]:
            raise TaskError(
                f"{self._source()} has no split '{unknown[0]}'{did_you_mean(unknown[0], filter(None, named))}"
            )
        return {split: named[split] for split in splits}


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _file(datasets: Any, path: Path) -> Any:
    if path.suffix.lower() == ".parquet":
        return datasets.Dataset.from_parquet(str(path))
    if path.suffix.lower() != ".arrow":
        raise TaskError(f"{path}: family 'dataset' reads .parquet and .arrow files; files and chat read JSONL and CSV")
    import pyarrow

    try:
        return datasets.Dataset.from_file(str(path))
    except pyarrow.ArrowInvalid:  # the file form of Arrow, not its stream
        with pyarrow.memory_map(str(path)) as source:
            return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.ipc.open_file(source).read_all()))


def _inside(fields: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = fields
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    return [_as_text(one) for one in value] if isinstance(value, list) else value

# SPDX-License-Identifier: Apache-2.0
"""Reader of a checkout of natural-instructions: task files and lists of tasks.

A checkout has one `tasks/<name>.json` per task, and `splits/<track>/<train|test|excluded>_tasks.txt` with one name per
line. It may be partial: a listed task need not have a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dyads.errors import TaskError, did_you_mean, shortened, similar_file
from dyads.reading import DATA, read_json, read_text
from dyads.tasks.rows import DOWNLOAD_AGAIN

__all__ = ["Checkout", "Demonstration", "Instance", "TaskFile", "read_task"]


class Demonstration(BaseModel):
    """A positive example."""

    input: str
    output: str

    @field_validator("output", mode="before")
    @classmethod
    def _first_of_several(cls, given: object) -> object:
        return given[0] if isinstance(given, list) and given else given


class Instance(BaseModel):
    """An input with its references, which may be empty texts."""

    id: str = ""
    input: str
    output: list[str]

    @field_validator("output", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: object) -> object:
        return [given] if isinstance(given, str) else given


class TaskFile(BaseModel):
    """The keys of a task file that are used; others are ignored."""

    model_config = ConfigDict(populate_by_name=True)

    definition: list[str] = Field(alias="Definition", min_length=1)
    categories: list[str] = Field(alias="Categories", default=[])
    output_language: list[str] = Field(alias="Output_language", default=[])
    positive_examples: list[Demonstration] = Field(alias="Positive Examples", default=[])
    instances: list[Instance] = Field(alias="Instances")

    @field_validator("definition", "categories", "output_language", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: object) -> object:
        return [given] if isinstance(given, str) else given


def read_task(path: Path) -> TaskFile:
    """Read one task file. Errors name line and column, or the key."""
    try:
        # The public collection has NaN among the URLs of eight tasks, which are not read.
        read = read_json(path, error=TaskError, remedy=DOWNLOAD_AGAIN, most=DATA, nan=True)
        content = TaskFile.model_validate(read)
    except ValidationError as error:
        first = error.errors()[0]
        where = shortened(".".join(map(str, first["loc"]))) or "the top level"
        raise TaskError(
            f"{path}: {where}: {first['msg']} ({error.error_count()} such problems): a task file has Definition, "
            f"Positive Examples and Instances with input and output"
        ) from None
    return content


class Checkout:
    """A whole or partial checkout."""

    def __init__(self, path: Path, track: str) -> None:
        self.path, self.track, self.tasks = path, track, path / "tasks"
        for needed in (path, self.tasks, path / "splits" / track):
            if not needed.is_dir():
                near = similar_file(path) if needed == path else ""
                raise TaskError(
                    f"no folder {needed}{near}: `path` must be a checkout of natural-instructions with tasks/*.json "
                    f"and splits/{track}/train_tasks.txt, test_tasks.txt, or the file of one task"
                )
        self.files = {p.stem: p for p in sorted(self.tasks.glob("*.json"))}
        if not self.files:
            raise TaskError(f"no task file (*.json) in {self.tasks}")

    def split_path(self, which: str) -> Path:
        return self.path / "splits" / self.track / f"{which}_tasks.txt"

    def listed(self, which: str) -> list[str]:
        """The names in the train or test list of the track, including tasks without a file."""
        path = self.split_path(which)
        try:
            lines = read_text(path, error=TaskError).splitlines()
        except FileNotFoundError:
            raise TaskError(
                f"no file {path}: it must list the {which} tasks of track '{self.track}', one name per line"
            ) from None
        return [line.strip() for line in lines if line.strip()]

    def full_name(self, name: str, suites: Iterable[str] = ()) -> str:
        """The name of a task that has a file, from its name or its number (`task024`, `024`)."""
        if name in self.files:
            return name
        if number := re.fullmatch(r"(?:task)?(\d{1,9})", name):
            prefix = f"task{int(number[1]):03d}_"
            fits = [n for n in self.files if n.startswith(prefix)]
            if len(fits) == 1:
                return fits[0]
            if fits:
                raise TaskError(f"'{name}' is ambiguous in {self.tasks}: {', '.join(fits)}; give the full name")
            raise TaskError(f"no task file {prefix}*.json in {self.tasks} ({len(self.files)} task files)")
        if any(name in self.listed(which) for which in ("train", "test")):
            raise TaskError(
                f"task '{name}' of track '{self.track}' has no file {self.tasks / name}.json (there are "
                f"{len(self.files)} task files); add the file or leave the name out"
            )
        raise TaskError(f"unknown task '{name}' in {self.tasks}{did_you_mean(name, [*suites, *self.files])}")

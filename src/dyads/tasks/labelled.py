# SPDX-License-Identifier: Apache-2.0
"""Base class of the families with labels: prompts, verbalizers, class ids and splits from benchmark files.

A family defines the *form* of every task (prompt, labels, metrics) and reads its own files. Choosing tasks, holding out
validation examples, limiting splits and the notes on all that are shared.

A prompt ends in a line break (or in the white space of its form), so that a decoder sees where the question ends. T5's
tokenizer drops trailing white space, so an encoder-decoder reads the published prompt exactly. The answer is a label as
text.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from dyads.errors import TaskError, did_you_mean
from dyads.tasks.divide import divide, take
from dyads.tasks.family import FamilySpec, Suite
from dyads.tasks.rows import Row
from dyads.tasks.task import Example, Task
from dyads.tasks.template import Template

__all__ = ["Form", "LabelledSpec", "NotAtHandError", "Parts", "is_unlabelled", "merge_notes", "verbalizer"]

MAX_NEW_TOKENS = 10  # MoRE's value; the longest verbalizer has about six tokens


class NotAtHandError(TaskError):
    """A task without files or training examples: an error if the recipe names the task, else it is left out."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """Prompt, labels and metrics of one task, independent of its file format."""

    description: str
    """One sentence."""
    prompt: str
    """A format string over the texts: "rte sentence1: {sentence1} sentence2: {sentence2}"."""
    segments: tuple[str, ...] = ()
    """Format strings of the texts that an encoder with a head reads; empty: the prompt."""
    labels: tuple[str, ...] = ()
    """Verbalizers in the order of their class ids; empty: regression."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Those of the benchmark, the headline first."""

    def example(
        self,
        id: str,  # noqa: A002 – an example's id is called that everywhere
        texts: Mapping[str, str],
        references: Sequence[str],
        *,
        choices: Sequence[str] = (),
        group: str = "",
    ) -> Example:
        """The example with these texts."""
        return self.template.example(texts, id=id, references=references, choices=choices, group=group)

    @cached_property
    def template(self) -> Template:
        """The form of the prompts."""
        ends = "" if self.prompt[-1].isspace() else "\n"
        return Template(texts=(self.prompt + ends,), segments=self.segments)


@dataclass(slots=True)
class Parts:
    """The examples of one task in the splits of its source."""

    train: Sequence[Example]
    test: Sequence[Example]
    """For most benchmarks the public validation file."""
    validation: Sequence[Example] | None = None
    """None: a share of train is held out."""
    notes: list[str] = field(default_factory=list)
    max_prompt_tokens: int | None = None


class LabelledSpec(FamilySpec):
    """The options that all families with labels share."""

    forms: ClassVar[Mapping[str, Form]]
    version: ClassVar[int]

    path: tuple[Path, ...] = Field(min_length=1)
    """One or more folders; a task is read from the first that has it."""
    names: tuple[str, ...] | None = None
    """Tasks in the order of their ids; None: all tasks with files, in the order of the family."""
    train_per_task: int | None = Field(default=None, ge=1)
    """Limit of training examples per task, chosen by the seed."""
    validation_per_task: int | None = Field(default=None, ge=1)
    """Limit of validation examples per task, chosen by the seed."""
    test_per_task: int | None = Field(default=None, ge=1)
    """Limit of test examples per task, chosen by the seed."""
    validation_share: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of train that is held out for validation, where the source has no validation split of its own."""
    split_dev: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Share of the scored file to train on, for a task without a train file; 0: score it without training.

    None: such a task is left out, or an error if `names` has it.
    """
    seed: int = 0
    """Seed of splits and limits; independent of the training seed, so that all runs have the same test split."""

    @field_validator("path", "names", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: object) -> object:
        return (given,) if isinstance(given, (str, Path)) else given

    @field_validator("names")
    @classmethod
    def _known_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is None:
            return None
        for name in names:
            if name not in cls.forms:
                raise ValueError(f"unknown task '{name}'{did_you_mean(name, cls.forms)}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"names must be one or more different tasks, got {list(names)}")
        return names

    @abstractmethod
    def parts(self, name: str) -> Parts:
        """Read the examples of one task; NotAtHandError if its files are missing."""

    def metrics_of(self, form: Form) -> tuple[str, ...]:
        """The metrics of a task, the headline first."""
        return form.metrics

    def load(self) -> Suite:
        for root in self.path:
            if not root.expanduser().is_dir():
                raise TaskError(f"no folder {root}: `path` must be a folder with the files of family '{self.family}'")
        tasks, notes = [], []
        for name in self.names or tuple(self.forms):
            try:
                task, notes_of_task = self._task(name)
            except NotAtHandError as error:
                if self.names:
                    raise
                notes.append(f"left out: {error}")
                continue
            tasks.append(task)
            notes += notes_of_task
        if not tasks:
            raise TaskError(f"no task of family '{self.family}' can be read:\n" + "\n".join(notes))
        return Suite(tuple(tasks), tuple(notes))

    def _task(self, name: str) -> tuple[Task, list[str]]:
        form, parts = self.forms[name], self.parts(name)
        salt = f"{self.family}/{self.seed}/{name}"
        train, test, validation = tuple(parts.train), tuple(parts.test), parts.validation
        notes = [f"{name}: {note}" for note in parts.notes]
        if not test:
            raise NotAtHandError(f"task '{name}' has no labelled example to score: add its validation file")
        if not train:
            if self.split_dev is None:
                raise NotAtHandError(
                    f"task '{name}' has no train file: add it, or set `split_dev: 0.5` to train on half of its "
                    f"{len(test)} test examples (0: score it without training)"
                )
            whole = len(test)
            if self.split_dev > 0:
                test, train = divide(test, [max(1, round(self.split_dev * whole))], salt=f"{salt}/dev", task=name)
                notes.append(
                    f"{name}: no train file; {len(train)} of the {whole} examples of the test file are trained on, "
                    f"so its scores are not comparable with published ones"
                )
            else:
                notes.append(f"{name}: no train file; it is scored without training")
        if validation is None:
            validation = ()
            if train and self.validation_share > 0:
                size = max(1, round(self.validation_share * len(train)))
                train, validation = divide(train, [size], salt=salt, task=name)
        train = take(train, self.train_per_task, salt=salt)
        test = take(test, self.test_per_task, salt=salt)
        trained = {e.prompt for e in train}
        if shared := sum(e.prompt in trained for e in test):
            notes.append(f"{name}: {shared} of {len(test)} test prompts are also in its train split")
        used = {e.references[0] for e in train}
        if train and (unseen := [label for label in form.labels if label not in used]):
            notes.append(f"{name}: no training example has the label {', '.join(unseen)}")
        task = Task(
            name=name,
            version=self.version,
            train=train,
            validation=take(validation, self.validation_per_task, salt=salt),
            test=test,
            metric=self.metrics_of(form)[0],
            metrics=self.metrics_of(form),
            max_new_tokens=MAX_NEW_TOKENS,
            max_prompt_tokens=parts.max_prompt_tokens,
            labels=form.labels,
            regression=not form.labels,
            description=form.description,
            template=form.template,
        )
        return task, notes


def is_unlabelled(raw: str) -> bool:
    """Whether a raw label is missing, as in test files and where the annotators of MNLI disagreed."""
    return raw in ("", "-", "-1")


def verbalizer(row: Row, raw: str, labels: Sequence[str], aliases: Mapping[str, str] | None = None) -> str:
    """The label of a raw value: the label itself, its class id, or an alias."""
    if raw in labels:
        return raw
    if raw.isdecimal() and len(raw) < 10 and int(raw) < len(labels):
        return labels[int(raw)]
    if aliases and raw in aliases:
        return aliases[raw]
    known = [*labels, *(f"{i}" for i in range(len(labels))), *(aliases or ())]
    raise TaskError(f"{row.place}: label '{raw}' is not one of {', '.join(known)}")


def merge_notes(counts: Iterable[tuple[int, str]]) -> list[str]:
    """A note for every count above 0: "dropped 131 rows without a label"."""
    return [f"dropped {n} {'row' if n == 1 else 'rows'} {why}" for n, why in counts if n]

# SPDX-License-Identifier: Apache-2.0
"""How do the files of a benchmark with labels become tasks with prompts, verbalizers, class ids and three splits?

A family names its *forms* (what each task asks, in which words) and reads its own files; what is the same for all of
them stands here: which tasks, which examples are validated on, how many of each split, and the notes.

A prompt ends in a line break (or in the blank it is given), so that a decoder sees where the question ends; T5's
tokenizer drops trailing white space, so an encoder-decoder reads the published prompt to the character. The answer is a
label, written out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from dyads.errors import TaskError, did_you_mean
from dyads.tasks.divide import divide, take
from dyads.tasks.family import FamilySpec, Suite
from dyads.tasks.rows import Row
from dyads.tasks.task import Example, Task

__all__ = ["Form", "LabelledSpec", "NotAtHandError", "Parts", "is_unlabelled", "merge_notes", "verbalizer"]

MAX_NEW_TOKENS = 10  # MoRE's generation length; the longest verbalizer has about six tokens


class NotAtHandError(TaskError):
    """A task whose files are missing, or that has nothing to train on: refused if it was named, else left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What one task asks, in whatever file its rows stand."""

    description: str
    """One sentence."""
    prompt: str
    """With a place for each text: "rte sentence1: {sentence1} sentence2: {sentence2}"."""
    segments: tuple[str, ...] = ()
    """What an encoder with a head reads, in the same manner; empty: the prompt."""
    labels: tuple[str, ...] = ()
    """Verbalizers in the order of their class ids; empty: the answer is a number."""
    metrics: tuple[str, ...] = ("accuracy",)
    """The benchmark's own, the headline first."""
    paper_metrics: tuple[str, ...] = ("accuracy",)
    """MoRE's."""

    def example(
        self,
        id: str,  # noqa: A002 – an example's id is called that everywhere
        texts: Mapping[str, str],
        references: Sequence[str],
        *,
        choices: Sequence[str] = (),
        group: str = "",
    ) -> Example:
        """The example that these texts make."""
        prompt = self.prompt.format_map(texts)
        return Example(
            id=id,
            prompt=prompt if self.prompt[-1].isspace() else prompt + "\n",
            references=tuple(references),
            segments=tuple(segment.format_map(texts) for segment in self.segments),
            choices=tuple(choices),
            group=group,
        )


@dataclass(slots=True)
class Parts:
    """The examples of one task as its source divides them."""

    train: Sequence[Example]
    test: Sequence[Example]
    """What is scored: for most benchmarks the public validation file."""
    validation: Sequence[Example] | None = None
    """None: to be held out from train."""
    notes: list[str] = field(default_factory=list)
    max_prompt_tokens: int | None = None


class LabelledSpec(FamilySpec):
    """The options that all families of labelled tasks share."""

    forms: ClassVar[Mapping[str, Form]]
    version: ClassVar[int]

    path: tuple[Path, ...] = Field(min_length=1)
    """A folder, or several: a task is read from the first that has it."""
    names: tuple[str, ...] | None = None
    """Tasks in the order of their ids; None takes all that are found, in the family's order."""
    train_per_task: int | None = Field(default=None, ge=1)
    """At most this many train examples a task, chosen by the seed."""
    validation_per_task: int | None = Field(default=None, ge=1)
    """At most this many validation examples a task, chosen by the seed."""
    test_per_task: int | None = Field(default=None, ge=1)
    """At most this many test examples a task, chosen by the seed."""
    validation_share: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of train that is held out for validation, where the source has no validation examples to spare."""
    split_dev: float | None = Field(default=None, ge=0.0, lt=1.0)
    """For a task without a train file: this share of its scored file is trained on instead; 0 scores it untrained.

    None: such a task is left out, or refused if it was named.
    """
    seed: int = 0
    """Of the splits and limits; independent of the training seed, so that seeds share their test data."""

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
        """The examples of one task. `NotAtHandError` where its files are missing."""

    def metrics_of(self, form: Form) -> tuple[str, ...]:
        """What is reported for a task, the headline first."""
        return form.metrics

    def load(self) -> Suite:
        for root in self.path:
            if not root.expanduser().is_dir():
                raise TaskError(f"no folder {root}: `path` is where the files of family '{self.family}' lie")
        tasks, notes = [], []
        for name in self.names or tuple(self.forms):
            try:
                task, said = self._task(name)
            except NotAtHandError as error:
                if self.names:
                    raise
                notes.append(f"left out: {error}")
                continue
            tasks.append(task)
            notes += said
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
                    f"task '{name}' has no train file: add it, or say which share of the {len(test)} examples that "
                    f"would be scored is trained on instead, `split_dev: 0.5` (0: it is scored untrained)"
                )
            whole = len(test)
            if self.split_dev > 0:
                test, train = divide(test, [max(1, round(self.split_dev * whole))], salt=f"{salt}/dev", task=name)
                notes.append(
                    f"{name}: no train file; {len(train)} of the {whole} examples that are scored elsewhere are "
                    f"trained on, so its scores do not compare with published ones"
                )
            else:
                notes.append(f"{name}: no train file; it is scored and not trained")
        if validation is None:
            validation = ()
            if train and self.validation_share > 0:
                size = max(1, round(self.validation_share * len(train)))
                train, validation = divide(train, [size], salt=salt, task=name)
        train = take(train, self.train_per_task, salt=salt)
        test = take(test, self.test_per_task, salt=salt)
        asked = {e.prompt for e in train}
        if shared := sum(e.prompt in asked for e in test):
            notes.append(f"{name}: {shared} of {len(test)} test prompts also stand in its train split")
        used = {e.references[0] for e in train}
        if train and (unseen := [label for label in form.labels if label not in used]):
            notes.append(f"{name}: no train example is labelled {', '.join(unseen)}")
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
        )
        return task, notes


def is_unlabelled(raw: str) -> bool:
    """Whether a row carries no label: test rows have none, and MNLI's annotators sometimes did not agree."""
    return raw in ("", "-", "-1")


def verbalizer(row: Row, raw: str, labels: Sequence[str], aliases: Mapping[str, str] | None = None) -> str:
    """The label that a file means by `raw`: the label itself, its class id, or another name for it."""
    if raw in labels:
        return raw
    if raw.isdecimal() and int(raw) < len(labels):
        return labels[int(raw)]
    if aliases and raw in aliases:
        return aliases[raw]
    known = [*labels, *(f"{i}" for i in range(len(labels))), *(aliases or ())]
    raise TaskError(f"{row.place}: label '{raw}' is none of {', '.join(known)}")


def merge_notes(counts: Iterable[tuple[int, str]]) -> list[str]:
    """A note for every count that is not 0: "dropped 131 rows without a label"."""
    return [f"dropped {n} {'row' if n == 1 else 'rows'} {why}" for n, why in counts if n]

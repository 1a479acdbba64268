# SPDX-License-Identifier: Apache-2.0
"""Base class of the families of a user's own rows: which columns they have, and how tasks are made of them.

    task, input, output        one question and its answer, or a list of right answers
    instruction                text before the input; where it is given, `input` may be empty or missing
    messages, conversations    instead of input and output: a conversation whose last answer is scored (messages.py)
    system                     a chat model's system message
    split, id, metric, labels  the row's split and id; its task's metric, and labels as a list

A family reads rows and says which of the forms it accepts. Texts are kept as they are: an answer may begin with blanks.
All rows of a task have a split, or none has: then it is divided 80/10/10 by a hash of seed and prompt, and rows with
the same prompt are in one split. Tasks are ordered by their first rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, Field

from dyads.errors import TaskError, did_you_mean, listed
from dyads.tasks.divide import divide, take
from dyads.tasks.family import FamilySpec, Suite
from dyads.tasks.messages import ASSISTANT, CONVERSATIONS, MESSAGES, SYSTEM, Message, read_messages
from dyads.tasks.metrics import metric as metric_named
from dyads.tasks.rows import Row, json_of_cell, shortened
from dyads.tasks.task import SPLITS, Example, Task
from dyads.tasks.template import Template, columns_of

__all__ = ["ANY", "CHAT_COLUMNS", "OwnRow", "OwnRowsSpec", "for_every_task"]

ANY = "*"
"""Key of an option's value for every task."""
QUESTION_COLUMNS = ("task", "input", "output", "split", "id", "instruction", "metric", "labels")
CHAT_COLUMNS = (*QUESTION_COLUMNS, SYSTEM, MESSAGES, CONVERSATIONS)
DEFAULT_METRICS = ("rouge_l", "exact_match")
LABELLED_METRICS = ("accuracy", "macro_f1")
_PLURALS = {"metric": "metrics", "labels": "lists of labels"}
HELD_OUT = 0.10  # share of a task's rows for the test split, and the same for validation


def for_every_task(value: object) -> object:
    """An option by task as it is, and one value as that of every task."""
    return value if isinstance(value, Mapping) else {ANY: value}


V = TypeVar("V")
_ByTask = Annotated[dict[str, V], BeforeValidator(for_every_task)]


@dataclass(frozen=True, slots=True)
class OwnRow:
    """A row as a family reads it."""

    row: Row
    id: str
    """Used where the row has none; unique among the rows of the suite."""
    task: str = ""
    """Used where the row has none; empty: the column is required."""
    split: str = ""
    """The split that the row was found in."""


@dataclass(frozen=True, slots=True)
class _Record:
    """The contents of a row."""

    place: str
    task: str
    id: str
    split: str
    metric: str
    labels: tuple[str, ...]
    instruction: str
    system: str
    output: tuple[str, ...]
    question: Mapping[str, Any]
    """The columns of the task's template that the row fills."""
    messages: tuple[Message, ...]
    unanswered: bool
    """Whether the conversation went on after its last answer."""


class OwnRowsSpec(FamilySpec):
    """The options that all families of own rows share."""

    known: ClassVar[tuple[str, ...]] = CHAT_COLUMNS
    """The columns that a row may have."""
    version: ClassVar[int]

    columns: dict[str, str | None] = Field(default_factory=dict)
    """Our columns by yours: {input: question, output: answer}; input may join several, "{title}: {text}", and null
    leaves a column out. With it, other columns are ignored; without it, unknown ones are refused"""
    instructions: _ByTask[str] = Field(default_factory=dict)
    """Text before every input, by task or one for all; instead of a column `instruction`"""
    labels: _ByTask[tuple[str, ...]] = Field(default_factory=dict)
    """All answers of a classification task in the order of their class ids, by task or one list for all; the positive
    of two is second. Instead of a column `labels`"""
    metric: _ByTask[str] = Field(default_factory=dict)
    """The headline metric, by task or one for all; instead of a column `metric`. Default: rouge_l, with labels
    accuracy"""
    train_per_task: int | None = Field(default=None, ge=1)
    """Limit of training examples per task, chosen by the seed"""
    validation_per_task: int | None = Field(default=None, ge=1)
    """Limit of validation instances per task, chosen by the seed"""
    test_per_task: int | None = Field(default=None, ge=1)
    """Limit of test instances per task, chosen by the seed"""
    max_new_tokens: int = Field(default=128, ge=1)
    """Limit of a generated answer"""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Limit of a prompt; longer ones are cut. None: `train.max_prompt_tokens` alone"""
    seed: int = 0
    """Seed of the splits of tasks whose rows have none, and of the limits; independent of the training seed"""

    @abstractmethod
    def own_rows(self, notes: list[str]) -> Iterable[OwnRow]:
        """The rows in the order of the tasks."""

    def load(self) -> Suite:
        for ours in self.columns:
            if ours not in self.known:
                raise TaskError(
                    f"unknown column '{ours}' in `columns` of family '{self.family}'{did_you_mean(ours, self.known)}"
                )
        notes: list[str] = []
        by_task: dict[str, list[_Record]] = {}
        ignored: dict[str, None] = {}
        unanswered = 0
        for own in self.own_rows(notes):
            record = self._record(own, ignored)
            unanswered += record.unanswered
            by_task.setdefault(record.task, []).append(record)
        if not by_task:
            raise TaskError(f"no rows in {self._source()}; write at least train and test rows of one task")
        for option in ("instructions", "labels", "metric"):
            for name in getattr(self, option):
                if name != ANY and name not in by_task:
                    raise TaskError(f"{option} for an unknown task '{name}'{did_you_mean(name, by_task)}")
        alike: dict[str, str] = {}
        notes += [
            f"tasks '{first}' and '{name}' differ in case alone"
            for name in by_task
            if (first := alike.setdefault(name.casefold(), name)) != name
        ]
        if ignored:
            notes.append(f"columns that are not read: {listed(ignored)}")
        if unanswered:
            notes.append(f"{unanswered} conversations go on after their last answer; those turns are left out")
        return Suite(tuple(self._task(name, records, notes) for name, records in by_task.items()), tuple(notes))

    def _source(self) -> str:
        return f"family '{self.family}'"

    # ----- rows

    def _name(self, ours: str) -> str | None:
        """The name of one of our columns in the data; None where it is left out."""
        return self.columns.get(ours, ours)

    def _inputs(self) -> tuple[str, ...]:
        """The columns of the data that make the input."""
        name = self._name("input") or ""
        return columns_of(name) if "{" in name else (name,)

    def check_columns(self, place: str, given: Iterable[str]) -> dict[str, None]:
        """Refuse unknown columns; returns those that are ignored."""
        given = tuple(given)
        read = {self._name(ours) for ours in self.known if ours != "input"} | set(self._inputs())
        left_out = {ours for ours, name in self.columns.items() if name is None}
        unread = [name for name in given if name not in read | left_out]
        for name in unread:
            if not self.columns:
                chat = name in (MESSAGES, CONVERSATIONS)
                raise TaskError(
                    f"{place}: unknown column '{name}'{did_you_mean(str(name), self.known)}; "
                    + (
                        f"family: chat reads {name}"
                        if chat
                        else "`columns` names the ones to read, and ignores the rest"
                    )
                )
            open_ = [n for n in self.known if n not in self.columns and n not in given and n not in left_out]
            if name not in self.known and (near := get_close_matches(str(name), open_, n=1, cutoff=0.8)):
                raise TaskError(
                    f"{place}: column '{name}' is not read – did you mean '{near[0]}'? Rename it, or add to `columns` "
                    f"{near[0]}: {name} or {near[0]}: null"
                )
        return dict.fromkeys(unread)

    def check_required(self, place: str, given: Iterable[str], task: str = "") -> None:
        """Refuse a row, or the columns of a table, without a question and an answer."""
        given = tuple(given)
        if self._conversation_columns(given):
            return
        needed = [] if task else [("task", self._name("task"))]
        if self._name("instruction") not in given:
            needed += [("input", name) for name in self._inputs()]
        needed.append(("output", self._name("output")))
        missing = [(ours, str(name)) for ours, name in needed if name not in given]
        if not missing:
            return
        quoted, renamed = [], []
        for ours, name in missing:
            near = get_close_matches(name, [n for n in given if n not in self.known], n=1)
            quoted.append(f"'{name}'" + (f" (is it '{listed(near)}'?)" if near else ""))
            if ours not in self.columns:
                renamed.append(f"{ours}: {listed(near) or 'NAME'}")
        if chat := [name for name in (MESSAGES, CONVERSATIONS) if name in given]:
            mended = f"; family: chat reads {chat[0]}"
        else:
            mended = f"; `columns: {{{', '.join(renamed)}}}` reads other names" if renamed and given else ""
        raise TaskError(
            f"{place}: column{'s' * (len(quoted) > 1)} {' and '.join(quoted)} {'are' if quoted[1:] else 'is'} missing; "
            f"it has {listed(given) or 'none'}, a row needs {listed(name for _, name in needed)}"
            f"{' (or messages)' if MESSAGES in self.known else ''}{mended}"
        )

    def _record(self, own: OwnRow, ignored: dict[str, None]) -> _Record:
        place = own.row.place
        fields = {str(name): value for name, value in own.row.fields.items() if value is not None}
        self.check_required(place, fields, own.task)
        ignored.update(self.check_columns(place, fields))
        _refuse_half_pairs(place, fields)
        texts = {}
        for ours in ("task", "split", "id", "instruction", "metric", SYSTEM):
            name = self._name(ours) if ours in self.known else None
            value = fields.get(name, "") if name is not None else ""
            if ours in ("id", "task") and isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str):
                raise TaskError(f"{place}: '{name}' must be text, got {shortened(value)}; put it in quotes")
            texts[ours] = value if ours in (SYSTEM, "instruction") else value.strip()
        task = texts.pop("task") or own.task
        if not task:
            raise TaskError(f"{place}: '{self._name('task')}' is empty")
        if own.split and texts["split"]:
            raise TaskError(
                f"{place}: the row has a split, '{texts['split']}', in split '{own.split}' of the data set; leave the "
                "column out with `columns: {split: null}`"
            )
        texts["split"] = texts["split"] or own.split
        if texts["split"] and texts["split"] not in SPLITS:
            near = did_you_mean(texts["split"], SPLITS)
            raise TaskError(f"{place}: unknown split '{texts['split']}'{near}")
        labels = self._row_labels(place, fields)
        if conversation := self._conversations(fields):
            messages, output, unanswered = self._conversation(place, fields, conversation, texts[SYSTEM])
            question: dict[str, Any] = {}
        else:
            messages, unanswered, question = (), False, self._question(place, fields, texts["instruction"])
            output = _references(place, str(self._name("output")), fields.get(self._name("output") or ""))
        return _Record(
            place,
            task=task,
            id=texts.pop("id") or own.id,
            labels=labels,
            output=output,
            question=question,
            messages=messages,
            unanswered=unanswered,
            **texts,
        )

    def _conversation_columns(self, given: Iterable[str]) -> list[str]:
        """Our names of the columns for conversations that are among the given ones."""
        given = set(given)
        return [n for n in (MESSAGES, CONVERSATIONS) if n in self.known and self._name(n) in given]

    def _conversations(self, fields: Mapping[str, Any]) -> list[str]:
        """The columns that hold the row's conversation; an empty one counts where the row has no question either."""
        there = self._conversation_columns(fields)
        filled = [n for n in there if fields[str(self._name(n))] not in ("", [])]
        return filled or ([] if {*self._inputs(), self._name("instruction")} & fields.keys() else there)

    def _row_labels(self, place: str, fields: Mapping[str, Any]) -> tuple[str, ...]:
        name = self._name("labels")
        given = fields.get(name, ()) if name is not None else ()
        if isinstance(given, str) and given.strip().startswith("["):
            given = json_of_cell(given, f"{place}: '{name}' is not a valid JSON list")
        if given == "":
            return ()
        if not isinstance(given, (list, tuple)) or not all(isinstance(label, str) for label in given):
            raise TaskError(
                f'{place}: \'{name}\' must be a list of texts such as ["no", "yes"], got {shortened(given)}; '
                "`columns: {labels: null}` leaves a column of another meaning out"
            )
        return tuple(given)

    def _question(self, place: str, fields: Mapping[str, Any], instruction: str) -> dict[str, Any]:
        question: dict[str, Any] = {}
        for name in self._inputs():
            value = fields.get(name, "")
            if not isinstance(value, str):
                raise TaskError(f"{place}: '{name}' must be text, got {shortened(value)}; put it in quotes")
            if value.strip() or "{" in (self._name("input") or ""):
                question[name] = value
        if instruction.strip():
            question[str(self._name("instruction"))] = instruction
        if not any(value.strip() for value in question.values()):
            raise TaskError(f"{place}: '{self._inputs()[0]}' is empty")
        return question

    def _conversation(
        self, place: str, fields: Mapping[str, Any], names: Sequence[str], system: str
    ) -> tuple[tuple[Message, ...], tuple[str, ...], bool]:
        """The turns before the last answer, that answer, and whether there are turns after it."""
        for ours in ("input", "output", "instruction"):
            if self._name(ours) in fields and str(fields[self._name(ours) or ""]).strip():
                raise TaskError(f"{place}: '{names[0]}' and '{self._name(ours)}' are both given; leave one out")
        if len(names) > 1:
            raise TaskError(f"{place}: {' and '.join(names)} are both given; leave one out")
        given = fields[self._name(names[0]) or ""]
        messages = read_messages(given, place)
        if system.strip():
            if messages[0].role == SYSTEM:
                raise TaskError(f"{place}: a system message is in '{names[0]}' and in '{SYSTEM}'; leave one out")
            messages = (Message(SYSTEM, system), *messages)
        answered = max((i for i, m in enumerate(messages) if m.role == ASSISTANT), default=-1)
        if not any(m.role == "user" for m in messages[: max(answered, 0)]):
            raise TaskError(
                f"{place}: the messages have no answer of the assistant to the user; add one, or leave it out"
            )
        if not messages[answered].content.strip():
            raise TaskError(f"{place}: the last answer of the assistant is empty; write it, or leave the row out")
        return messages[:answered], (messages[answered].content,), answered < len(messages) - 1

    # ----- tasks

    def _task(self, name: str, records: list[_Record], notes: list[str]) -> Task:
        instruction = self.instructions.get(name, self.instructions.get(ANY, ""))
        for record in records:
            if instruction and record.instruction.strip():
                raise TaskError(
                    f"{record.place}: task '{name}' has an instruction in this row and in `instructions`; drop one"
                )
            if instruction.strip() and record.messages:
                raise TaskError(
                    f"{record.place}: task '{name}' has `instructions`, which a conversation does not read: write them"
                    " as its system message, or into the column `system`"
                )
        labels = tuple(label.strip() for label in self._agreed(name, "labels", records))
        if labels:
            records = [replace(r, output=tuple(o.strip() for o in r.output)) for r in records]
            if absent := set(labels).difference(*(r.output for r in records)):
                notes.append(f"{name}: no row has the label {listed(label for label in labels if label in absent)}")
        template = self._template(instruction, records)
        examples = [_example(template, record) for record in records]
        _refuse_repeated_ids(name, records)
        metrics = self._metrics(name, records, LABELLED_METRICS if labels else DEFAULT_METRICS)
        parts = self._parts(name, records, examples, notes)
        limits = (self.train_per_task, self.validation_per_task, self.test_per_task)
        salt = f"{self.family}/{self.seed}/{name}"
        train, validation, test = (take(parts[s], n, salt=salt) for s, n in zip(SPLITS, limits, strict=True))
        notes += [f"{name}: {note}" for note in _unread(metrics, test)]
        return Task(
            name=name,
            version=self.version,
            train=train,
            validation=validation,
            test=test,
            metric=metrics[0],
            metrics=metrics,
            max_new_tokens=self.max_new_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            labels=labels,
            description=(instruction or records[0].instruction).strip(),
            template=template,
        )

    def _template(self, instruction: str, records: Sequence[_Record]) -> Template:
        """Instruction, empty line and input; what all rows share is the default of later rows."""
        given = self._name("input") or ""
        question = given if "{" in given else f"{{{given}}}"
        column = str(self._name("instruction"))
        before = f"{{{column}:strip}}"
        rows = [r for r in records if r.question]
        before_of = {instruction or r.instruction for r in rows}
        inputs = set(self._inputs())
        forms = {(bool((instruction or r.instruction).strip()), bool(inputs & r.question.keys())) for r in rows}
        texts = {(True, True): f"{before}\n\n{question}", (False, True): question, (True, False): before}
        defaults = {}
        if len(before_of) == 1 and (shared := min(before_of)).strip() and forms == {(True, True)}:
            defaults[column] = shared
        systems = {r.messages[0].content if r.messages and r.messages[0].role == SYSTEM else r.system for r in records}
        if len(systems) == 1 and (system := min(systems)).strip():
            defaults[SYSTEM] = system
        conversation = any(r.messages for r in records)
        return Template(
            texts=tuple(text for form, text in texts.items() if form in forms) or ("{input}",),
            segments=(question,) if all(has for _, has in forms) and not conversation else (),
            defaults=defaults,
            ends_line=True,
            chat=True,
            conversation=conversation,
            strips_answers=False,
        )

    def _agreed(self, name: str, what: str, records: Sequence[_Record]) -> Any:
        """The value of the column `metric` or `labels`, which all rows that have one share, or of the option."""
        own: dict[Any, _Record] = {}
        for record in records:
            if value := getattr(record, what):
                own.setdefault(value, record)
        if len(own) > 1:
            (a, first), (b, second), *_ = own.items()
            raise TaskError(
                f"task '{name}' has two {_PLURALS[what]}: {_shown(a)} in {first.place} and {_shown(b)} in "
                f"{second.place}; choose one"
            )
        option = getattr(self, what).get(name, getattr(self, what).get(ANY))
        if not own:
            return option or ()
        ((value, row),) = own.items()
        if option and option != value:
            raise TaskError(f"{row.place}: '{what}' is {_shown(value)}, but {_shown(option)} in the recipe; choose one")
        return value

    def _metrics(self, name: str, records: Sequence[_Record], default: tuple[str, ...]) -> tuple[str, ...]:
        headline = self._agreed(name, "metric", records)
        if not headline:
            return default
        try:
            metric_named(headline)
        except TaskError as error:
            place = next((f"{r.place}: " for r in records if r.metric), "tasks.metric: ")
            raise TaskError(f"{place}{error}") from None
        return (headline, *(m for m in default if m != headline))

    def _parts(
        self, name: str, records: Sequence[_Record], examples: Sequence[Example], notes: list[str]
    ) -> dict[str, tuple[Example, ...]]:
        unsplit = [r for r in records if not r.split]
        if not unsplit:
            parts = {s: tuple(e for e, r in zip(examples, records, strict=True) if r.split == s) for s in SPLITS}
            for split in ("train", "test"):
                if not parts[split]:
                    raise TaskError(
                        f"task '{name}' has no {split} rows in {self._source()}; give some the split '{split}', or "
                        f"leave the column `split` out for a seeded 80/10/10 split"
                    )
            trained = {e.prompt for e in parts["train"]}
            if shared := sum(e.prompt in trained for e in parts["test"]):
                notes.append(f"{name}: {shared} of {len(parts['test'])} test prompts are also in its train split")
            return parts
        if len(unsplit) < len(records):
            raise TaskError(
                f"{unsplit[0].place}: task '{name}' has a split in {len(records) - len(unsplit)} rows and none in "
                f"{len(unsplit)}, of which this is the first; give it in every row or in none"
            )
        held_out = max(1, round(HELD_OUT * len(records)))
        salt = f"{self.family}/{self.seed}/{name}"
        train, test, validation = divide(examples, [held_out, held_out], salt=salt, task=name)
        return {"train": train, "validation": validation, "test": test}


def _example(template: Template, record: _Record) -> Example:
    row = dict(record.question)
    if record.system.strip() and not record.messages:
        row[SYSTEM] = record.system
    if record.messages:
        row = {MESSAGES: [message._asdict() for message in record.messages]}
    return template.example(row, id=record.id, references=record.output, place=record.place)


def _references(place: str, name: str, output: object) -> tuple[str, ...]:
    references = [output] if isinstance(output, str) else output
    if not isinstance(references, (list, tuple)) or not all(isinstance(r, str) for r in references):
        raise TaskError(
            f"{place}: '{name}' must be a text or a list of texts, got {shortened(output)}; put numbers in quotes"
        )
    kept = tuple(r for r in references if r.strip())
    if not kept:
        raise TaskError(f"{place}: '{name}' is empty; write an answer, or leave the row out")
    return kept


def _refuse_half_pairs(place: str, value: Any) -> None:
    """TaskError for half of a surrogate pair in a text: it is no character, and no tokenizer reads it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise TaskError(
                f"{place}: {half} is half of a surrogate pair and no character; write the whole pair, or remove it"
            ) from None
    elif isinstance(value, (list, tuple, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _refuse_half_pairs(place, inner)


def _refuse_repeated_ids(task: str, records: Sequence[_Record]) -> None:
    first: dict[str, _Record] = {}
    for record in records:
        if record.id in first:
            raise TaskError(
                f"{record.place}: id '{record.id}' of task '{task}' is already used in {first[record.id].place}; "
                f"give every row its own id, or leave the column `id` out"
            )
        first[record.id] = record


def _unread(metrics: Sequence[str], examples: Sequence[Example]) -> list[str]:
    """A note for every metric that cannot compare some references."""
    found = []
    for name in metrics:
        if (unread := metric_named(name).unread) is None:
            continue
        parts = [part for e in examples if all(map(unread, e.references)) and (part := unread(e.references[0]))]
        if parts:
            found.append(
                f"metric {name} cannot score {len(parts)} of {len(examples)} test references: it does not read "
                f"{shortened(parts[0])}; set `metric: exact_match`, or rouge_l_words for words between blanks"
            )
    return found


def _shown(value: str | Sequence[str]) -> str:
    return f"'{value}'" if isinstance(value, str) else shortened(list(value))

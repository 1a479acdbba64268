# SPDX-License-Identifier: Apache-2.0
"""Templates: how a task turns a row of columns into a prompt, in training and for every later question.

    Template(texts=("Words: {input}\\nWhich word comes last?\\nAnswer: ",)).prompt({"input": "fox lake"})

A template is data: a run folder keeps the one of each task, so that `dyads generate --task` renders a row as the
training did. In a text `{column}` is the row's value, and braces of the text itself are doubled (`escape`).
`{column:strip}` is the value without surrounding white space. `{column:sentence}` also has a full stop at its end,
unless it ends in punctuation, as the release of Super-NaturalInstructions writes its inputs.

With `chat`, the prompt is a user's message, which a model with a chat template reads as a turn. A row may then have a
column `system`, and with `conversation` a column `messages`: the turns before the answer.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dyads.errors import TaskError, did_you_mean, listed
from dyads.tasks.example import Example
from dyads.tasks.messages import MESSAGES, SYSTEM, USER, Message, read_messages, transcript

__all__ = ["Template", "columns_of", "escape", "sentence"]


class Template(BaseModel):
    """The form of a task's prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    texts: tuple[str, ...] = Field(min_length=1)
    """Texts over the columns of a row: the first with all columns filled is used, else the first with all given."""
    shorter: tuple[str, ...] = ()
    """Versions of the first text with fewer demonstrations, longest first."""
    segments: tuple[str, ...] = ()
    """Texts that an encoder with a head reads instead; empty: the prompt."""
    defaults: dict[str, str] = {}
    """Values of columns that a row leaves out, such as the task's instruction."""
    ends_line: bool = False
    """Whether a line break is added to a prompt that does not end in white space."""
    chat: bool = False
    """Whether the prompt is a user's message; else it is read as it is, by chat models too."""
    conversation: bool = False
    """Whether a row may have `messages` in place of the columns of the texts."""
    strips_answers: bool = True
    """Whether white space around an answer is removed."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Limit of a generated answer, in a run's templates; None elsewhere."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """The task's own limit of a prompt, in a run's templates; None elsewhere, and for a task without one."""

    @field_validator("texts", "shorter", "segments")
    @classmethod
    def _known_forms(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            _pieces(text)
        return texts

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row may have, in the order of the texts."""
        names = [name for text in (*self.texts, *self.shorter, *self.segments) for name in columns_of(text)]
        return tuple(dict.fromkeys([*names, *[SYSTEM] * self.chat, *[MESSAGES] * self.conversation]))

    @property
    def input_column(self) -> str | None:
        """The column that a single text fills: the only one without a default; None where there are several."""
        open_ = [name for name in self.columns if name not in {*self.defaults, SYSTEM, MESSAGES}]
        return open_[0] if len(open_) == 1 else None

    @property
    def form(self) -> str:
        """The first text with the defaults filled in, its other columns as {column}."""
        filled = {name: self.defaults.get(name, f"{{{name}}}") for name in self.columns}
        text = _fill(self.texts[0], filled)
        return text + "\n" if self.ends_line and not text[-1:].isspace() else text

    def fits(self, prompt: str) -> bool:
        """Whether a prompt has the form of one of the texts, whatever its columns hold; white space at its end apart.

        Where the task's prompts end a line, this one must do so too.
        """
        if self.ends_line and not prompt[-1:].isspace():
            return False
        return any(self._has_form(text, prompt.rstrip()) for text in map(str.rstrip, (*self.texts, *self.shorter)))

    def _has_form(self, text: str, prompt: str) -> bool:
        """Whether a prompt is a text with any values in its columns, found without backtracking."""
        literals = [""]
        for literal, name, form in _pieces(text):
            literals[-1] += literal
            if name in self.defaults:
                literals[-1] += _FORMS[form](self.defaults[name])
            elif name is not None:
                literals.append("")
        first, *middle = literals
        if not middle:
            return prompt == first
        *middle, last = middle
        at, end = len(first), len(prompt) - len(last)
        if at > end or not prompt.startswith(first) or not prompt.endswith(last):
            return False
        for literal in middle:
            if (at := prompt.find(literal, at, end)) < 0:
                return False
            at += len(literal)
        return True

    def prompt(self, row: Mapping[str, Any], place: str = "the row") -> str:
        """The prompt for a row. TaskError, starting with `place`, for a column that is missing, unknown or no text."""
        return self.example(row, place=place).prompt

    def example(
        self,
        row: Mapping[str, Any],
        *,
        id: str = "",  # noqa: A002 – an example's id is called that everywhere
        references: Sequence[str] = ("",),
        choices: Sequence[str] = (),
        group: str = "",
        details: str = "",
        place: str = "the row",
    ) -> Example:
        """The example for a row; without references it is a question that is not scored."""
        values = {**self.defaults, **self._values(row, place)}
        system = [Message(SYSTEM, values[SYSTEM])] if self.chat and values.get(SYSTEM, "").strip() else []
        turns: tuple[Message, ...] = ()
        shorter: tuple[str, ...] = ()
        segments: tuple[str, ...] = ()
        if self.conversation and MESSAGES in row:
            turns = read_messages(row[MESSAGES], place)
            if turns[0].role != SYSTEM:
                turns = (*system, *turns)
            if turns[-1].role != USER:
                raise TaskError(f"{place}: the last message must be the user's, got one of the {turns[-1].role}")
            prompt = turns[-1].content
        else:
            prompt = _fill(self._text(row, values, place), values)
            shorter = tuple(_fill(text, values) for text in self.shorter)
            segments = tuple(_fill(text, values) for text in self.segments)
            if self.chat:
                turns = (*system, Message(USER, prompt))
        if len(turns) > 1:
            prompt = transcript(turns)
        elif self.ends_line and not prompt[-1:].isspace():
            prompt += "\n"
        return Example(
            id=id,
            prompt=prompt,
            references=tuple(references),
            shorter=shorter,
            segments=segments,
            choices=tuple(choices),
            group=group,
            details=details,
            messages=turns,
        )

    def _text(self, row: Mapping[str, Any], values: Mapping[str, str], place: str) -> str:
        """The text that fits the row."""
        filled = {name for name, value in values.items() if value.strip()}
        for given in (filled, set(values)):
            for text in self.texts:
                if given.issuperset(columns_of(text)):
                    return text
        needed = columns_of(self.texts[-1])
        missing = next(name for name in needed if name not in values)
        raise TaskError(
            f"{place}: column '{missing}' is missing; it has {listed(row) or 'no columns'}, the task's prompt needs "
            f"{', '.join(needed)}"
        )

    def _values(self, row: Mapping[str, Any], place: str) -> dict[str, str]:
        """The columns of the texts."""
        columns, values = self.columns, {}
        for name, value in row.items():
            if name not in columns:
                raise TaskError(f"{place}: unknown column '{name}'{did_you_mean(str(name), columns)}")
            if name == MESSAGES and self.conversation:
                continue
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise TaskError(f"{place}: '{name}' must be text, got {str(value)[:60]}; put it in quotes")
            values[name] = str(value)
        return values


def escape(text: str) -> str:
    """A text with its braces doubled, so that a template repeats them."""
    return text.replace("{", "{{").replace("}", "}}")


def sentence(text: str) -> str:
    """The text, with a full stop unless it ends in punctuation."""
    return text if text and text[-1] in string.punctuation else text + "."


_FORMS: dict[str, Callable[[str], str]] = {
    "": str,
    "strip": str.strip,
    "sentence": lambda value: sentence(value.strip()),
}


@lru_cache(maxsize=512)
def _pieces(text: str) -> tuple[tuple[str, str | None, str], ...]:
    """The text as (literal, column after it or None, form of the column's value)."""
    try:
        pieces = [(literal, name, form or "") for literal, name, form, _ in string.Formatter().parse(text)]
    except ValueError as error:
        raise TaskError(
            f"template {text[:60]!r}: {error}; double a brace that is not a column's: {{{{ or }}}}"
        ) from None
    for _, name, form in pieces:
        if name is not None and (not name or form not in _FORMS):
            raise TaskError(
                f"template {text[:60]!r}: {{{name}{':' * bool(form)}{form}}} is not {{column}}, {{column:strip}} or "
                "{column:sentence}; double the braces that are not a column's"
            )
    return tuple(pieces)


@lru_cache(maxsize=512)
def columns_of(text: str) -> tuple[str, ...]:
    """The columns in a text, in their order."""
    return tuple(dict.fromkeys(name for _, name, _ in _pieces(text) if name is not None))


def _fill(text: str, values: Mapping[str, str]) -> str:
    return "".join(
        literal if name is None else literal + _FORMS[form](values[name]) for literal, name, form in _pieces(text)
    )

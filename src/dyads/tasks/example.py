# SPDX-License-Identifier: Apache-2.0
"""Examples: a prompt with its reference answers."""

from __future__ import annotations

from dataclasses import dataclass

from dyads.errors import TaskError
from dyads.tasks.messages import Message

__all__ = ["Example"]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its reference answers: an instance when it is scored, an example when it is trained on."""

    id: str
    """Unique within the task."""
    prompt: str
    """The text that the model reads."""
    references: tuple[str, ...]
    """Correct answers, at least one; the first is the training target."""
    shorter: tuple[str, ...] = ()
    """Shorter versions of the prompt (fewer demonstrations), longest first. Used when the prompt exceeds its limit."""
    segments: tuple[str, ...] = ()
    """The text or pair of texts that an encoder with a head reads; empty: it reads the prompt."""
    choices: tuple[str, ...] = ()
    """Candidate answers of this example, where they differ between examples; empty: the task's labels."""
    group: str = ""
    """Examples with the same group are parts of one question (MultiRC): `group_accuracy` needs all of them correct."""
    details: str = ""
    """What the task's own scorer needs besides the references (a `detail_metric`)."""
    messages: tuple[Message, ...] = ()
    """The turns before the answer, which a chat template renders; empty: the prompt is read as it is."""

    def __post_init__(self) -> None:
        if not self.references:
            raise TaskError(f"example '{self.id}' has no reference; give at least one, or leave the example out")
        if len(self.segments) > 2:
            raise TaskError(f"example '{self.id}' has {len(self.segments)} segments: an encoder reads one text or two")
        if self.choices:
            if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices):
                raise TaskError(f"example '{self.id}' needs two or more different choices, got {list(self.choices)}")
            if unlisted := [r for r in self.references if r not in self.choices]:
                raise TaskError(
                    f"example '{self.id}': the reference '{unlisted[0]}' is not one of its choices "
                    f"{', '.join(self.choices)}"
                )

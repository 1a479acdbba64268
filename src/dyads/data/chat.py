# SPDX-License-Identifier: Apache-2.0
"""Chat templates: a conversation as token ids, with the spans of the assistant that a model learns.

    <|im_start|>user⏎ … <|im_end|>⏎<|im_start|>assistant⏎  … <|im_end|>      the prompt, then the answer with its end

The template's own special tokens are special, those in messages are text. An answer is put where the template begins
the assistant's turn, character by character, and ends with the special token that the template writes after an answer
(or with eos, where it writes none). The tokens of a prompt are the same in training and in generation: each span is
tokenised after the ones before it, on its own where they would join.

Without a template a conversation of several messages is read as a transcript: "User: …", "Assistant: …", a line each.
"""

from __future__ import annotations

import signal
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dyads.data.text_tokens import TextTokenizer
from dyads.errors import ConfigError, TaskError, reason_of
from dyads.tasks.messages import ASSISTANT, SYSTEM, USER, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "TRANSCRIPT", "ChatTemplate"]

IGNORED = -100
"""The label of positions without loss."""

TRANSCRIPT = """\
{% for message in messages %}\
{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}\
{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}\
{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

_DATE = datetime(2025, 1, 1)
"""The date that templates write into a prompt: fixed, so that a run is scored on the prompts it was trained on."""
_CLOCK = "".join(
    f" | replace('{code}', '{_DATE.strftime(code)}')" for code in ("%d", "%b", "%B", "%Y", "%m", "%A", "%y")
)
# transformers passes no functions to a template, so this one takes the place of its global function.
_FIXED_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_CLOCK} }}}}{{% endmacro %}}"
_PROBE = "an answer 4711"
_PROBE_SECONDS = 1.0


class ChatTemplate:
    """A chat template of a tokenizer, which renders messages as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.tokenizer, self.source = tokenizer, source
        self._rendered = _FIXED_CLOCK + source if "strftime_now" in source else source
        self.text = TextTokenizer(tokenizer, source)
        # In messages a special token is replaced by a stand-in until the template's own are marked.
        self._stand_ins = {token: f"{name[:-1]}-text>" for token, name in self.text.names.items()}
        question = [Message(USER, "a question")]
        try:
            with _limited(_PROBE_SECONDS):
                prompt = self._render(question, True)
                whole = self._render([*question, Message(ASSISTANT, _PROBE)], False)
        except TaskError as error:
            raise ConfigError(f"{error}; give another one as `model.chat_template`, or none") from error
        if _PROBE not in whole:
            raise ConfigError(
                "the chat template does not render the assistant's messages; give another one as"
                " `model.chat_template`, or none"
            )
        before, after = whole.split(_PROBE, 1)
        self.lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        """Text between the start of the assistant's turn and its answer."""
        first = min((name for name in self.text.names.values() if name in after), key=after.index, default=None)
        self.trail = after[: after.index(first)] if first else ""
        """Text between an answer and the special token that ends it."""
        self._end_name = first
        token = next((token for token, name in self.text.names.items() if name == first), tokenizer.eos_token)
        if token is None:
            raise ConfigError("neither the chat template nor the tokenizer has a token that ends an answer")
        self.end = self.text.id_of(token)
        """The token that ends an answer: the template's, or eos where it writes none."""

    def prompt(self, messages: Sequence[Message], limit: int | None = None) -> tuple[list[int], list[int]]:
        """(ids, labels) of the messages up to the start of the next answer; labels are the assistant's tokens.

        Where they exceed the limit, the oldest exchanges are left out, and a last one that is still too long loses its
        middle.
        """
        ids, labels = self._encode(messages)
        if limit is not None and len(ids) > limit and (shorter := _without_oldest(messages)):
            first = bisect_left(shorter, True, key=lambda kept: len(self._encode(kept)[0]) <= limit)
            ids, labels = self._encode(shorter[min(first, len(shorter) - 1)])
        if limit is not None and len(ids) > limit:
            tail = limit // 2
            cut = slice(limit - tail, len(ids) - tail)
            del ids[cut], labels[cut]
        return ids, labels

    def answer(self, messages: Sequence[Message], answer: str) -> list[int]:
        """The tokens of an answer to the messages, with their end."""
        text = self.lead + answer + self.trail + (self._end_name or "")
        *_, ids = self._pieces([self._render(messages, True), text])
        return ids if self._end_name else [*ids, self.end]

    def _encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        whole = self._render(messages, True)
        cuts = [0]
        for place, message in enumerate(messages):
            if message.role != ASSISTANT or not any(m.role == USER for m in messages[:place]):
                continue
            start = self._render(messages[:place], True)
            if not whole.startswith(start):
                continue  # a template that renders an answer's past otherwise than its present: it is not learned
            end = self._end_of(whole, messages, place, len(start))
            if len(start) >= cuts[-1] and end is not None:
                cuts += [len(start), end]
        pieces = [whole[a:b] for a, b in zip(cuts, [*cuts[1:], len(whole)], strict=True)]
        ids: list[int] = []
        labels: list[int] = []
        for number, piece in enumerate(self._pieces(pieces)):
            ids += piece
            labels += piece if number % 2 else [IGNORED] * len(piece)
        return ids, labels

    def _end_of(self, whole: str, messages: Sequence[Message], place: int, start: int) -> int | None:
        """Where the answer that starts at `start` ends, its closing token included; None if that cannot be found."""
        if self._end_name:
            at = whole.find(self._end_name, start)
            return at + len(self._end_name) if at >= 0 else None
        answered = self._render(messages[: place + 1], False)
        return len(answered) if whole.startswith(answered) and len(answered) > start else None

    def _pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """The tokens of every piece, which follow those of the pieces before it."""
        found: list[list[int]] = []
        text, before = "", list[int]()  # of the pieces before, since their last special token
        for last, piece in pairwise(("", *pieces)):
            if (special := max((last.rfind(name) for name in self.text.names.values()), default=-1)) >= 0:
                text = last[special:]
                (before,) = self.text([text])
            elif found:
                text, before = text + last, before + found[-1]
            (ids,) = self.text([text + piece])
            if ids[: len(before)] == before:
                new = ids[len(before) :]
            else:  # a token would join the end of the piece before with the start of this one
                (new,) = self.text([piece])
            found.append(new)
        return found

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """The rendered text, in which the template's own special tokens are marked."""
        given = [{"role": m.role, "content": self.text.marked(m.content, self._stand_ins)} for m in messages]
        options: dict[str, Any] = {
            "enable_thinking": False,  # Qwen3 and SmolLM3: an answer without a chain of thought
            "date_string": _DATE.strftime("%d %b %Y"),
        }
        try:
            text: str = self.tokenizer.apply_chat_template(
                given,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                chat_template=self._rendered,
                **options,
            )
        except Exception as error:  # a template raises what it likes, Jinja's errors for those in itself
            reason = reason_of(error)
            raise TaskError(
                f"the chat template refuses the messages ({', '.join(m.role for m in messages)}): {reason}"
            ) from error
        text = self.text.marked(text)
        for token, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, token)
        return text


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds of computing, where the system has such a timer: a template may never end."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "ITIMER_VIRTUAL"):
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _without_oldest(messages: Sequence[Message]) -> list[list[Message]]:
    """The messages without the first exchange, without the first two, …; the last one has the last alone."""
    start = 1 if messages[0].role == SYSTEM else 0
    users = [i for i, m in enumerate(messages) if m.role == USER and i > start]
    return [[*messages[:start], *messages[i:]] for i in users]

# SPDX-License-Identifier: Apache-2.0
"""Text of an answer while its tokens arrive: what is certain is given out, up to a stop string.

Held back is what later tokens may change: a character of which bytes are missing, the beginning of a stop string, white
space at the start, which may be that of the prompt's end, and, where white space around answers is removed, at the end;
also what the prompt's form puts around an answer, and what may be the beginning of that.

The text of a growing answer is put together from that of its last tokens (`GrowingText`); the text of an ended one is
decoded whole, so that it is the one of `dyads generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

__all__ = ["AnswerText", "GrowingText"]

_INCOMPLETE = "\ufffd"
"""What tokenizers decode the bytes of an incomplete character to."""
_TAIL = 16
"""Tokens that are decoded again before the new ones, since the first one of a text may lose its space."""

Decode = Callable[[list[int]], str]


class GrowingText:
    """The certain text of an answer that goes on, of which only the last tokens are decoded at every call.

    `decode` gives the text of any tokens. `lead` and `trail` are what the prompt's form puts around the answer.
    `byte_tokens` are tokens of one byte each, of which a tokenizer decodes each sequence as a whole (SentencePiece).
    """

    def __init__(
        self, decode: Decode, *, lead: str = "", trail: str = "", byte_tokens: Collection[int] = frozenset()
    ) -> None:
        self._decode, self._lead, self._trail, self._bytes = decode, lead, trail, byte_tokens
        self._before = ""
        """The text of the tokens up to `_done`."""
        self._start = self._done = self._skipped = 0
        """The tokens from `_start` are decoded again; those up to `_done` give `_skipped` characters of that."""
        self.length = 0
        """Characters after the lead, also those that may be of the trail."""

    def __call__(self, tokens: Sequence[int]) -> str:
        """The certain text of all tokens, which are those of the last call and new ones."""
        count = len(tokens)
        while count > self._done and tokens[count - 1] in self._bytes:
            count -= 1
        text = self._before + self._decode(list(tokens[self._start : count]))[self._skipped :]
        certain = text.rstrip(_INCOMPLETE)
        if text == certain and count - self._start >= 2 * _TAIL:
            self._move(tokens, count, text)
        if self._lead.startswith(certain):
            return ""
        certain = certain.removeprefix(self._lead)
        self.length = len(certain)
        return certain[: len(certain) - _begun(certain, (self._trail,), whole=True)]

    def _move(self, tokens: Sequence[int], done: int, text: str) -> None:
        """Decode fewer tokens again from now on, where the last ones alone have the same text."""
        tail = self._decode(list(tokens[done - _TAIL : done]))
        if tail.strip() and text.endswith(tail):
            self._before, self._start, self._done, self._skipped = text, done - _TAIL, done, len(tail)


class AnswerText:
    """The text of one answer; `decode` gives that of all its tokens, and `growing` the certain one before the end."""

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str] = (),
        *,
        strip: bool = False,
        growing: GrowingText | None = None,
    ) -> None:
        self._decode, self._stops, self._strip = decode, tuple(stops), strip
        self._growing = growing or GrowingText(decode)
        self._length = 0
        self.text = ""
        """What was given out."""
        self.offset = 0
        """Where in the text the newest token begins."""
        self.stopped = False
        """Whether a stop string came, which ends the answer."""

    def extend(self, tokens: list[int], *, ended: bool) -> str:
        """The text that the new ones among all tokens make certain; all that is left where the answer has `ended`."""
        self.offset = self._length
        whole = self._decode(tokens) if ended else self._growing(tokens)
        begin = len(whole) - len(whole.lstrip()) if self._strip else 0
        self._length = max(0, self._growing.length - begin)
        at = min((at for stop in self._stops if (at := whole.find(stop)) >= 0), default=None)
        if at is not None:
            whole, self.stopped = whole[:at], True
        elif not ended:
            whole = whole[: len(whole) - _begun(whole, self._stops)]
            if not whole.strip():
                return ""
        if self._strip:
            whole = whole.strip()
        if ended or self.stopped:
            self.offset = min(self.offset, len(whole))
        elif not whole.startswith(self.text):
            return ""
        new = whole[len(self.text) :]
        self.text += new
        return new


def _begun(text: str, strings: Sequence[str], *, whole: bool = False) -> int:
    """The length of the longest beginning of a string at the end of the text; `whole`: or of all of it."""
    return max(
        (n for string in strings for n in range(1, len(string) + whole) if text.endswith(string[:n])),
        default=0,
    )

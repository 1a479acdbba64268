# SPDX-License-Identifier: Apache-2.0
"""Text of an answer while its tokens arrive: what is certain is given out, up to a stop string.

Held back is what later tokens may change: a character of which bytes are missing, the beginning of a stop string, white
space at the start, which may be that of the prompt's end, and, where white space around answers is removed, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["AnswerText"]

_INCOMPLETE = "\ufffd"
"""What tokenizers decode the bytes of an incomplete character to."""


class AnswerText:
    """The text of one answer; `decode` gives the text of all its tokens."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = (), *, strip: bool = False) -> None:
        self._decode, self._stops, self._strip = decode, tuple(stops), strip
        self.text = ""
        """What was given out."""
        self.stopped = False
        """Whether a stop string came, which ends the answer."""

    def extend(self, tokens: list[int], *, ended: bool) -> str:
        """The text that the new ones among all tokens make certain; all that is left where the answer has `ended`."""
        whole = self._decode(tokens)
        at = min((at for stop in self._stops if (at := whole.find(stop)) >= 0), default=None)
        if at is not None:
            whole, self.stopped = whole[:at], True
        elif not ended:
            whole = whole.rstrip(_INCOMPLETE)
            whole = whole[: len(whole) - self._begun(whole)]
            if not whole.strip():
                return ""
        if self._strip:
            whole = whole.strip()
        if not whole.startswith(self.text):
            return ""
        new = whole[len(self.text) :]
        self.text = whole
        return new

    def _begun(self, text: str) -> int:
        """The length of the longest beginning of a stop string at the end of the text."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )

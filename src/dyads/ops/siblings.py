# SPDX-License-Identifier: Apache-2.0
"""Who sees the same input? Layers such as q, k and v, which then share what is made from it alone.

It is seen as they are called: one after the other with the very same tensor. The first of them knows the others from
the pass before, and computes for all; each of them finds what is its own. One that is called with another tensor, or
with one that was changed since, computes by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Generic, TypeVar

from torch import Tensor

__all__ = ["Siblings"]

Who = TypeVar("Who")
What = TypeVar("What")


class Siblings(Generic[Who, What]):
    """Who was called after whom with the same tensor, and what was computed for them that they have not taken yet.

    Within `torch.inference_mode` tensors do not count their changes: there they must not be changed in between.
    """

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = 0
        self._first: weakref.ref[Who] | None = None
        self._found: dict[int, What] = {}
        self._after: weakref.WeakKeyDictionary[Who, list[weakref.ref[Who]]] = weakref.WeakKeyDictionary()

    def first_of(self, x: Tensor) -> Who | None:
        """Who was the first to see x; None where nobody has seen it, as it is now."""
        if self._x is None or self._first is None or self._x() is not x or _version(x) != self._version:
            return None
        return self._first()

    def take(self, who: Who) -> What | None:
        """What the first computed for `who` too; None where there is nothing."""
        return self._found.pop(id(who), None)

    def add(self, first: Who, who: Who) -> None:
        """From its next tensor on, `first` computes for `who` too."""
        after = self._after.setdefault(first, [])
        if first is not who and all(one() is not who for one in after):
            after.append(weakref.ref(who))

    def begin(self, who: Who, x: Tensor) -> list[Who]:
        """`who` is the first to see x: for whom it should compute too."""
        self.settle()
        self._x, self._version, self._first = weakref.ref(x), _version(x), weakref.ref(who)
        return [one for ref in self._after.get(who, ()) if (one := ref()) is not None]

    def keep(self, whose: Iterable[Who], what: Iterable[What]) -> None:
        """Keep what was computed for the others until they take it."""
        self._found = {id(one): theirs for one, theirs in zip(whose, what, strict=True)}

    def settle(self, *, failed: bool = False) -> None:
        """The end of a tensor, or of a pass. Who has not taken what was computed for it is no sibling any more.

        But nothing is learned from a pass that an error ended.
        """
        first = self._first() if self._first is not None else None
        if self._found and first is not None and not failed:
            self._after[first] = [ref for ref in self._after.get(first, ()) if id(ref()) not in self._found]
        self._x, self._first = None, None
        self._found.clear()


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version

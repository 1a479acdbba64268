# SPDX-License-Identifier: Apache-2.0
"""Who sees the same input? Layers such as q, k and v, which then share what is made from it alone.

It is seen as they are called: one after the other with the very same tensor. The first of them knows the others from
the pass before, and computes for all; each of them finds what is its own. One that is called with another tensor, or
with one that was changed since, computes by itself. (What is written through `.data`, or within `torch.inference_mode`,
PyTorch does not count as a change: there an input must not be changed between two calls.)
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

__all__ = ["Shared", "Siblings"]

Who = TypeVar("Who")
What = TypeVar("What")


class Shared(Generic[Who, What]):
    """A tensor that several see: who was the first, for whom it computes too, and what of that is not taken yet."""

    __slots__ = ("_first", "_state", "_version", "_x", "found", "others")

    def __init__(self, first: Who, x: Tensor, state: Any, others: Sequence[Who]) -> None:
        self._first, self._x, self._version, self._state = weakref.ref(first), weakref.ref(x), _version(x), state
        self.others = others
        self.found: dict[int, What] = {}

    def is_of(self, x: Tensor, state: Any) -> bool:
        return self._x() is x and self._version == _version(x) and self._state is state

    @property
    def first(self) -> Who | None:
        return self._first()

    def take(self, who: Who) -> What | None:
        """What was computed for `who`; None where there is nothing."""
        return self.found.pop(id(who), None)

    def keep(self, whose: Sequence[Who], what: Sequence[What]) -> None:
        """Keep what was computed for others until they take it."""
        self.found.update((id(one), theirs) for one, theirs in zip(whose, what, strict=True))


class Siblings(Generic[Who, What]):
    """Who was called after whom with the same tensor.

    Passes in several threads disturb each other only in that less is shared: what belongs to a tensor is one object.
    """

    def __init__(self) -> None:
        self._now: Shared[Who, What] | None = None
        self._after: weakref.WeakKeyDictionary[Who, list[weakref.ref[Who]]] = weakref.WeakKeyDictionary()

    def at(self, x: Tensor, state: Any = None) -> Shared[Who, What] | None:
        """What is shared of x, as it is now; None where nobody has seen it. `state` is what else must be the same."""
        now = self._now
        return now if now is not None and now.is_of(x, state) else None

    def begin(self, who: Who, x: Tensor, state: Any = None) -> Shared[Who, What]:
        """`who` is the first to see x."""
        self.settle()
        others = [one for ref in self._after.get(who, ()) if (one := ref()) is not None]
        now = self._now = Shared(who, x, state, others)
        return now

    def add(self, first: Who, who: Who) -> None:
        """From its next tensor on, `first` computes for `who` too."""
        after = self._after.setdefault(first, [])
        if first is not who and all(one() is not who for one in after):
            after.append(weakref.ref(who))

    def settle(self, *, failed: bool = False) -> None:
        """The end of a tensor, or of a pass. Who has not taken what was computed for it is no sibling any more; but
        that says nothing where an error ended the pass."""
        now, self._now = self._now, None
        first = now.first if now is not None else None
        if now is not None and now.found and first is not None and not failed:
            self._after[first] = [ref for ref in self._after.get(first, ()) if id(ref()) not in now.found]


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version

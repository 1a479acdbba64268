# SPDX-License-Identifier: Apache-2.0
"""How is a frozen weight multiplied by without being prepared for it every time?

Before MKL multiplies by a weight in fp32 it copies it into the order that the processor likes. Of a product of few rows
that is a good part: a third with 16 of them, 6 % with 512 (LOG.md, 2026-11-23). A weight that does not change needs it
once. MKL prepares for one number of rows: that is done when the same number has come three times one after the other,
and holds until another one has. What was prepared takes as much memory as the weight, forward and backward each, and at
most a gigabyte in all.

It changes no bit of a result: on the spot, the packed product is compared with the plain one, and where they are not
the same (MKL adds up in another order, as with widths from about 900 on) it is not used. (A weight that is written to
through `.data` in place, PyTorch does not count as changed: make it anew instead, as merging does.)
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dyads.ops.switch import Switch

__all__ = ["Packs", "packs", "unpacked"]

_FEWEST, _MOST = 16, 1024
"""Numbers of rows where it pays: with fewer MKL has other ways, with more the copy is small beside the product."""
_TIMES = 3
_ROOM = 2**30
_PLAIN = (Tensor, torch.nn.Parameter)  # and no other kind, which may keep its numbers elsewhere
_ENABLED = Switch()  # see `unpacked`


class _Product:
    """x Wᵀ for one weight that stays as it is: plain, and packed once it is known for how many rows."""

    __slots__ = ("_for", "_last", "_packed", "_refused", "_times")

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._for = self._last = (0, 0)  # rows and threads
        self._refused: set[tuple[int, int]] = set()
        self._times = 0

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        now = (x.shape[:-1].numel(), torch.get_num_threads())
        if now == self._for:
            self._last = now
            packed: Tensor = torch.ops.mkl._mkl_linear(x, self._packed, weight, bias, now[0])
            return packed
        y = F.linear(x, weight, bias)
        self._times = self._times + 1 if now == self._last else 1
        self._last = now
        if self._times == _TIMES and now not in self._refused:
            self._pack(x, weight, bias, y)
        return y

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    def _pack(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        self._packed, self._for = None, (0, 0)
        if _taken() + weight.nbytes > _ROOM:
            return
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), self._last[0])
        if torch.equal(torch.ops.mkl._mkl_linear(x, packed, weight, bias, self._last[0]), y):
            self._packed, self._for = packed, self._last
        else:
            self._refused.add(self._last)


class Packs:
    """What is packed of a weight W (o d) as it is now."""

    __slots__ = ("_back", "_bytes", "_of", "_there")

    def __init__(self, weight: Tensor) -> None:
        self._of, self._bytes = _state(weight), weight.nbytes
        self._there, self._back = _Product(), _Product()

    def are_of(self, weight: Tensor) -> bool:
        """Whether it still has the numbers that it had."""
        return self._of == _state(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias (… o), the bits of `F.linear`."""
        return self._there(x, weight, bias)

    def back(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy W (n d), the bits of `dy @ weight`."""
        return self._back(dy, weight.t(), None) if self.are_of(weight) else dy @ weight

    @property
    def taken(self) -> int:
        """Bytes, about: as MKL packs, it allocates more than it writes to."""
        return self._bytes * (self._there.is_packed + self._back.is_packed)


_PACKS: MutableMapping[Tensor, Packs] = WeakTensorKeyDictionary()  # type: ignore[no-untyped-call]


def packs(x: Tensor, weight: Tensor) -> Packs | None:
    """What is packed of a frozen weight, for products with inputs like x; None where there is nothing to gain.

    Which is on other processors than CPUs with MKL, in other types than fp32, and where somebody looks on who has to
    know every operation.
    """
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu" or not _ENABLED:
        return None
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or weight.is_inference():
        return None
    if not _FEWEST <= x.shape[:-1].numel() <= _MOST:
        return None
    if torch._C._len_torch_dispatch_stack() or not weight.is_contiguous() or not _can_pack():
        return None
    found = _PACKS.get(weight)
    if found is None or not found.are_of(weight):
        found = _PACKS[weight] = Packs(weight)
    return found


def unpacked() -> AbstractContextManager[None]:
    """Within this context every product is the plain one."""
    return _ENABLED.off()


def _state(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


def _taken() -> int:
    return sum(one.taken for one in _PACKS.values())


@cache
def _can_pack() -> bool:
    if os.environ.get("DYADS_PACK") == "0" or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    return hasattr(torch.ops.mkl, "_mkl_linear")

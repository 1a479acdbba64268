# SPDX-License-Identifier: Apache-2.0
"""How is a frozen weight multiplied by without being prepared for it every time?

Before MKL multiplies by a weight in fp32 it copies it into the order that the processor likes. Of a product of few rows
that is a good part: a third with 16 of them, 6 % with 512 (LOG.md, 2026-11-23). A weight that does not change needs it
once. MKL prepares for one number of rows: that is done when the same number comes twice in a row, and holds until
another one does. What was prepared takes as much memory as the weight, forward and backward each, and at most a
gigabyte in all.

It changes no bit of a result: a packed product is first compared with the plain one on random numbers, and where they
are not the same (MKL adds up in another order, as with widths from about 900 on) it is not used. (A weight that is
written to through `.data` in place, PyTorch does not count as changed: make it anew instead, as merging does.)
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from functools import cache
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from dyads.ops.switch import Switch, runs_plainly

__all__ = ["Packs", "forget", "packs", "unpacked"]

_FEWEST, _MOST = 16, 1024
"""Numbers of rows where it pays: with fewer MKL has other ways, with more the copy is small beside the product."""
_ROOM = 2**30
_PLAIN = (Tensor, torch.nn.Parameter)  # and no other kind, which may keep its numbers elsewhere
_ENABLED = Switch()  # see `unpacked`
_LOCK = Lock()


class _Product:
    """x Wᵀ for one weight that stays as it is: plain, and packed once it is known for how many rows."""

    __slots__ = ("_last", "_ready", "_refused")

    def __init__(self) -> None:
        # Rows and threads, and what is packed for them: set at once, as other threads may read it.
        self._ready: tuple[tuple[int, int], Tensor] | None = None
        self._last = (0, 0)
        self._refused: set[tuple[int, int]] = set()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not x.is_contiguous():
            return F.linear(x, weight, bias)  # MKL is called in another way then
        now, ready = (x.shape[:-1].numel(), torch.get_num_threads()), self._ready
        if (ready is None or ready[0] != now) and now == self._last and now not in self._refused:
            ready = self._pack(now, weight, bias)
        self._last = now
        if ready is None or ready[0] != now:
            return F.linear(x, weight, bias)
        packed: Tensor = torch.ops.mkl._mkl_linear(x, ready[1], weight, bias, now[0])
        return packed

    @property
    def is_packed(self) -> bool:
        return self._ready is not None

    def _pack(self, now: tuple[int, int], weight: Tensor, bias: Tensor | None) -> tuple[tuple[int, int], Tensor] | None:
        with _LOCK:
            self._ready = None
            if _taken() + weight.nbytes > _ROOM:
                self._refused.add(now)  # asking costs a look at every weight
                return None
            packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), now[0])
            # Not on x: zeros add up to the same in every order.
            probe = torch.randn(now[0], weight.shape[1], generator=torch.Generator().manual_seed(0))
            given = torch.ops.mkl._mkl_linear(probe, packed, weight, bias, now[0])
            if not torch.equal(given, F.linear(probe, weight, bias)):
                self._refused.add(now)
                return None
            self._ready = (now, packed)
            return self._ready


class Packs:
    """What is packed of a weight W (o d) as it is now."""

    __slots__ = ("_back", "_bytes", "_of", "_storage", "_there")

    def __init__(self, weight: Tensor) -> None:
        # While it is held, no other storage gets the identity of this one.
        self._storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
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

    Which is on other processors than CPUs with MKL, in other types than fp32 or where fp32 may be computed as something
    else, and where somebody looks on who has to know every operation.
    """
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not (x.is_cpu and weight.is_cpu and _ENABLED):
        return None
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or not _FEWEST <= x.shape[:-1].numel() <= _MOST:
        return None
    if not _can_pack() or not runs_plainly() or not _is_exact() or weight.is_inference() or not weight.is_contiguous():
        return None
    found = _PACKS.get(weight)
    if found is None or not found.are_of(weight):
        with _LOCK:
            found = _PACKS[weight] = Packs(weight)
    return found


def forget(weight: Tensor) -> None:
    """Give back the memory of what is packed of a weight."""
    with _LOCK:
        _PACKS.pop(weight, None)


def unpacked() -> AbstractContextManager[None]:
    """Within this context every product is the plain one."""
    return _ENABLED.off()


def _state(weight: Tensor) -> tuple[int, ...]:
    return weight.untyped_storage()._cdata, weight._version, weight.storage_offset(), *weight.shape


def _taken() -> int:
    return sum(one.taken for one in _PACKS.values())


def _is_exact() -> bool:
    """Whether products in fp32 are computed in fp32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set in PyTorch's newer way too, and to something else
        return False


@cache
def _can_pack() -> bool:
    if os.environ.get("DYADS_PACK") == "0" or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    return hasattr(torch.ops.mkl, "_mkl_linear")

# SPDX-License-Identifier: Apache-2.0
"""How are matrices in fp32 multiplied faster than fp32 is, where the processor has a unit for bf16?

Intel's Xeons since 2023 multiply tiles of bf16 (AMX) 16 times as fast as vectors of fp32. A number of fp32 is a sum of
three of bf16, and six of the nine products of two such sums are all that fp32 can tell apart: `tiles.c` adds them up,
in fp32. The result is as near to the exact one as that of a product in fp32, and differs from it by rounding.

    x y = Σᵢⱼ xᵢ yⱼ + ε,  i + j ≤ 4,  |ε| < 2⁻²⁴ |x y|  where |x|, |y| and |x y| are above 1e-31 and below 3.39e38

It is compiled when it is first needed (`compile`). Where that fails, on other processors, and where `DYADS_TILES=0` is
set, PyTorch's products serve.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dyads.ops.compile import Library, compile_c
from dyads.ops.switch import PLAIN, Switch, runs_plainly, seen_by_profilers

__all__ = ["Right", "Tiles", "tiles_for", "times", "untiled"]

_SOURCE = Path(__file__).with_name("tiles.c")
_ROWS, _DEPTH, _COLUMNS, _TOGETHER, _WORK = 96, 64, 32, 256, 2**24
"""Least m, k, n, sum of n and m k n. With less, bringing matrices into order costs what is won (LOG.md, 2026-11-23)."""
_ALONE = 2**21  # multiplications that pay for another thread
_ENABLED = Switch()  # see `untiled`
_LOG = logging.getLogger(__name__)


class Right(NamedTuple):
    """A matrix (k n) that others are multiplied by."""

    matrix: Tensor
    onto: Tensor | None = None
    """(m n), what the product is added to, in place; no other product may be added to it in the same call."""
    scale: float = 1.0
    """What the matrix is multiplied by first."""


class _Right(ctypes.Structure):
    """The same in C."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("numbers", "c")),
        *((name, ctypes.c_int64) for name in ("n", "row", "column", "width", "add")),
        ("scale", ctypes.c_float),
    )


class Tiles:
    """The compiled functions."""

    is_parallel: bool
    """Whether several threads share a product."""

    def __init__(self, library: Library) -> None:
        self.is_parallel = "-fopenmp" in library.flags
        self._room, self._products = library.functions.tiles_room, library.functions.tiles_products
        self._room.argtypes, self._room.restype = [ctypes.c_int64] * 3, ctypes.c_int64
        self._products.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 6
        self._products.restype = None

    def products(self, left: Tensor, rights: Sequence[Right]) -> list[Tensor]:
        """scale · left right (m n) of every right matrix, for a left one (m k)."""
        row, column = _strides(left)
        (m, k), work, outs = left.shape, 0, []
        given = (_Right * len(rights))()
        for c, (matrix, onto, scale) in zip(given, rights, strict=True):
            if matrix.shape[:1] != (k,):
                raise ValueError(f"a matrix {m} × {k} cannot multiply one of {tuple(matrix.shape)}")
            n = matrix.shape[1]
            out = left.new_empty(m, n) if onto is None else onto
            if out.shape != (m, n) or not _takes(out):
                raise ValueError(
                    f"tiles add a product {m} × {n} to a matrix in fp32 on the CPU with contiguous rows, got"
                    f" {tuple(out.shape)} in {out.dtype} with strides {out.stride()} on {out.device}"
                )
            c.numbers, c.c, c.n, c.width = matrix.data_ptr(), out.data_ptr(), n, max(out.stride(0), n)
            (c.row, c.column), c.add, c.scale = _strides(matrix), onto is not None, scale
            work += m * n * k
            outs.append(out)
        threads = max(1, min(torch.get_num_threads(), work // _ALONE))
        room = left.new_empty(self._room(m, k, threads), dtype=torch.bfloat16)
        with seen_by_profilers("tiles"):
            self._products(left.data_ptr(), given, room.data_ptr(), m, k, row, column, len(rights), threads)
        return outs


def times(left: Tensor, *rights: Right) -> list[Tensor]:
    """scale · left right (m n) of every right matrix, added in place where there is something to add to.

    For use where no gradients are recorded.
    """
    found, taken = tiles_for(left), []
    if found is not None:
        taken = [_is_taken(right) for right in rights]
        together = sum(right.matrix.shape[1] for right in compress(rights, taken))
        if together < _TOGETHER or left.numel() * together < _WORK:
            found = None
    if found is None:
        return [_plain(left, right) for right in rights]
    outs = iter(found.products(left, list(compress(rights, taken))))
    return [next(outs) if by_tiles else _plain(left, right) for right, by_tiles in zip(rights, taken, strict=True)]


def tiles_for(left: Tensor) -> Tiles | None:
    """What multiplies a matrix (m k) by others, where these are large enough; None where PyTorch does: with few rows or
    columns, and where fp32 may be computed as something else or somebody looks on."""
    if not _ENABLED or not _is_plain(left) or not runs_plainly() or left.shape[0] < _ROWS or left.shape[1] < _DEPTH:
        return None
    found = _tiles() if _is_exact() else None
    return found if found is not None and (found.is_parallel or torch.get_num_threads() == 1) else None


def untiled() -> AbstractContextManager[None]:
    """Within this context PyTorch's products serve."""
    return _ENABLED.off()


def _plain(left: Tensor, right: Right) -> Tensor:
    matrix, onto, scale = right
    if onto is not None:
        return onto.addmm_(left, matrix, alpha=scale)
    return (left if scale == 1.0 else left * scale) @ matrix


def _is_taken(right: Right) -> bool:
    """Whether tiles multiply by it."""
    matrix, onto, _ = right
    return _is_plain(matrix) and matrix.shape[1] >= _COLUMNS and (onto is None or (_is_plain(onto) and _takes(onto)))


def _is_plain(t: Tensor) -> bool:
    """Whether its numbers are those in its memory, in fp32, side by side in rows or columns."""
    return (
        type(t) in PLAIN and t.dtype == torch.float32 and t.is_cpu and t.layout == torch.strided
        and not t.is_neg() and not t._is_zerotensor() and 1 in t.stride()
    )  # fmt: skip


def _takes(out: Tensor) -> bool:
    """Whether results can be written there."""
    contiguous = out.ndim == 2 and (out.stride(1) == 1 or out.shape[1] == 1)
    return contiguous and out.dtype == torch.float32 and out.is_cpu and (out.stride(0) >= out.shape[1] or len(out) == 1)


@cache
def _tiles() -> Tiles | None:
    """Compiled, or found, once in a process; None where it is not wanted or cannot be had."""
    if os.environ.get("DYADS_TILES") == "0":
        return None
    library = next(compile_c(_SOURCE), None)
    try:
        if library is not None and library.functions.tiles_ready():
            return Tiles(library)
    except AttributeError as hidden:  # a compiler that was told to hide what it compiles
        _LOG.debug("%s: %s", _SOURCE.name, hidden)
        return None
    _LOG.debug("%s: no unit for bf16, or the system does not give it to this process", _SOURCE.name)
    return None


def _is_exact() -> bool:
    """Whether products in fp32 are computed in fp32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set in PyTorch's newer way too, and to something else
        return False


def _strides(t: Tensor) -> tuple[int, int]:
    """How far a row lies from the next, and a column. What is wrong here would be read past the end of its memory."""
    if t.ndim == 2 and t.dtype == torch.float32 and t.is_cpu and t.numel():
        row, column = t.stride()
        if column == 1 or t.shape[1] == 1:
            return row, 1
        if row == 1 or t.shape[0] == 1:
            return 1, column
    raise ValueError(
        "tiles take a matrix in fp32 on the CPU whose rows or columns are contiguous, got"
        f" {tuple(t.shape)} in {t.dtype} with strides {t.stride()} on {t.device}"
    )

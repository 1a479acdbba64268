# SPDX-License-Identifier: Apache-2.0
"""How is the operator computed in few passes over memory on a CPU, where a C compiler is at hand?

With PyTorch's operations a gate and its gradients are some thirty small operations per layer and step, each of which
reads and writes memory that has gone cold since the last; `gates.c` does the same in two calls, for fp32 and bf16,
while gradients are recorded. For a few rows, as while decoding, an operation costs more than what it computes; `few.c`
makes two calls of a layer. Both are compiled when they are first needed (`compile`). Where that fails, and where
`DYADS_KERNEL=0` is set, PyTorch's operations serve as before; the results differ by rounding.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyads.ops.compile import Library, compile_c
from dyads.ops.switch import Switch, runs_plainly, seen_by_profilers

__all__ = ["Choice", "Kernel", "choice_of", "kernel", "without_kernel"]

_SOURCES = (Path(__file__).with_name("few.c"), Path(__file__).with_name("gates.c"))
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MOST = 2048  # numbers of a token, held on the stack for 128 of them: one megabyte
_PANEL = 32  # columns, see few.c
_EIGHT = 8  # rows
_ALONE = 2**14  # numbers of a matrix that pay for another thread
_ENABLED = Switch()  # see `without_kernel`


@dataclass(frozen=True)
class Choice:
    """Softmax gates of a core: K groups of n experts, g = softmax(scores / temperature) over the experts of a group."""

    groups: int
    """K."""
    experts: int
    """n."""
    ranks: int
    """S: of a group, where every rank meets all gates (h has K·S numbers, u K·S·n); or of an expert, see `own`."""
    own: bool = False
    """Whether every expert has ranks of its own (K = 1; h and u have n·S numbers)."""
    temperature: float = 1.0

    @staticmethod
    @lru_cache(maxsize=256)
    def of(groups: int, experts: int, ranks: int, own: bool = False, temperature: float = 1.0) -> Choice:
        """The choice with these fields: always the same object, as it is asked for at every call of a layer."""
        return Choice(groups, experts, ranks, own, temperature)

    @cached_property
    def p(self) -> int:
        """Numbers of h."""
        return self.ranks * (self.experts if self.own else self.groups)

    @cached_property
    def s(self) -> int:
        """Numbers of scores, or gates."""
        return self.groups * self.experts

    @cached_property
    def q(self) -> int:
        """Numbers of u."""
        return self.p if self.own else self.p * self.experts

    @cached_property
    def fits(self) -> bool:
        """Whether the kernel has room for it."""
        return self.p + self.s + self.q + self.experts <= _MOST

    @cached_property
    def _as_c(self) -> tuple[int, int, int, int]:
        return self.groups, self.ranks, self.experts, self.own


class Kernel:
    """The compiled functions."""

    compiler: list[str]
    """The command that compiled them."""
    flags: tuple[str, ...]
    """What it was told."""

    def __init__(self, library: Library) -> None:
        self.compiler, self.flags = library.compiler, library.flags
        pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        takes = {
            "mix": [pointer] * 2 + [whole] * 6 + [real, whole],
            "gradients": [pointer] * 4 + [whole] * 6 + [real, real, whole],
            "coefficients": [pointer] * 4 + [whole] * 8 + [real, whole],
            "add": [pointer] * 3 + [whole] * 4,
        }
        self._of: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        for name, arguments in takes.items():
            for dtype, suffix in _SUFFIX.items():
                function = getattr(library.functions, f"{name}_{suffix}")
                function.argtypes, function.restype = arguments, None
                self._of[name, dtype] = function

    def mix(self, z: Tensor, choice: Choice) -> Tensor:
        """u = h ∘ g (tokens q) from z = [h, scores] (tokens p + s), whose scores become the gates g.

        z may be some columns of a matrix that is contiguous.
        """
        tokens = z.shape[0]
        width = _width(z, tokens, choice.p + choice.s, z.dtype)
        u = z.new_empty(tokens, choice.q)
        with seen_by_profilers("gates"):
            self._of["mix", z.dtype](
                z.data_ptr(), u.data_ptr(), width, *choice._as_c, tokens, 1 / choice.temperature,
                torch.get_num_threads(),
            )  # fmt: skip
        return u

    def gradients(
        self, z: Tensor, du: Tensor, choice: Choice, scale: float = 1.0, dz: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """u (q tokens) again and the gradient of z (p + s tokens), from z = [h, g] and that of scale · u (tokens q).

        The gradient of z is written into `dz` where that is given.
        """
        tokens = z.shape[0]
        width = _width(z, tokens, choice.p + choice.s, z.dtype)
        if _width(du, tokens, choice.q, z.dtype) != choice.q:
            raise ValueError(f"the kernel takes a contiguous du, got {tuple(du.shape)} with strides {du.stride()}")
        if dz is None:
            dz = z.new_empty(z.shape[1], tokens)
        elif dz.shape != (z.shape[1], tokens) or dz.dtype != z.dtype or not dz.is_contiguous():
            raise ValueError(
                f"the kernel writes a contiguous matrix of {z.shape[1]} × {tokens} in {z.dtype}, got {tuple(dz.shape)}"
                f" with strides {dz.stride()} in {dz.dtype}"
            )
        u = z.new_empty(choice.q, tokens)
        with seen_by_profilers("gates"):
            self._of["gradients", z.dtype](
                z.data_ptr(), du.data_ptr(), u.data_ptr(), dz.data_ptr(), width, *choice._as_c, tokens,
                1 / choice.temperature, scale, torch.get_num_threads(),
            )  # fmt: skip
        return u, dz

    @staticmethod
    def panels(matrix: Tensor) -> Tensor:
        """A matrix (k n) as `coefficients` and `add` take it: (n/32 k 32) in fp32, zeros after the last column."""
        k, n = matrix.shape
        return F.pad(matrix.float(), (0, -n % _PANEL)).view(k, -1, _PANEL).transpose(0, 1).contiguous()

    def coefficients(self, x: Tensor, down: Tensor, choice: Choice, layers: int = 1) -> Tensor:
        """u (layers rows q) in fp32 of layers that see x (rows d); `down`: the panels of their [A; W]ᵀ side by side.

        There is room for whole eights of rows; those after the last of x are zeros.
        """
        rows, d = x.shape
        needs = (-(-layers * (choice.p + choice.s) // _PANEL), d, _PANEL)
        if not (
            x.is_contiguous() and down.is_contiguous() and down.shape == needs and down.dtype == torch.float32
            and x.is_cpu and down.is_cpu
        ):  # fmt: skip
            raise ValueError(
                f"the kernel takes a contiguous x and panels {needs} in fp32 on the CPU, got {tuple(x.shape)} with"
                f" strides {x.stride()} on {x.device} and {tuple(down.shape)} in {down.dtype} on {down.device}"
            )
        room = -(-rows // _EIGHT) * _EIGHT
        u, work = down.new_empty(layers, room, choice.q), down.new_empty(room * (d + needs[0] * _PANEL))
        with seen_by_profilers("few"):
            self._of["coefficients", x.dtype](
                x.data_ptr(), down.data_ptr(), work.data_ptr(), u.data_ptr(), rows, d, needs[0], layers, *choice._as_c,
                1 / choice.temperature, _threads(down.numel()),
            )  # fmt: skip
        return u

    def add(self, u: Tensor, up: Tensor, y: Tensor) -> None:
        """y (rows o) += u B in place, with u (rows in whole eights q) from `coefficients` and `up` the panels of B."""
        rows, o = y.shape
        room, q = u.shape
        if not (
            y.is_contiguous() and u.is_contiguous() and up.is_contiguous() and room == -(-rows // _EIGHT) * _EIGHT
            and u.dtype == up.dtype == torch.float32 and up.shape == (-(-o // _PANEL), q, _PANEL)
            and y.is_cpu and u.is_cpu and up.is_cpu
        ):  # fmt: skip
            raise ValueError(
                f"the kernel adds u (rows q) and panels (o/{_PANEL} q {_PANEL}) in fp32 to a contiguous y, all on the"
                f" CPU, got {tuple(u.shape)} in {u.dtype} on {u.device}, {tuple(up.shape)} in {up.dtype} on"
                f" {up.device}, and {tuple(y.shape)} with strides {y.stride()} on {y.device}"
            )
        with seen_by_profilers("few"):
            self._of["add", y.dtype](
                u.data_ptr(), up.data_ptr(), y.data_ptr(), rows, q, o, _threads(up.numel())
            )  # fmt: skip


def _width(t: Tensor, rows: int, columns: int, dtype: torch.dtype) -> int:
    """How far one row lies from the next. What is wrong here would be read and written past the end of its memory."""
    apart, step = t.stride() if t.ndim == 2 else (0, 0)
    side_by_side = (step == 1 or columns == 1) and (apart >= columns or rows <= 1)
    if t.shape != (rows, columns) or t.dtype != dtype or not side_by_side:
        raise ValueError(
            f"the kernel takes a matrix of {rows} × {columns} in {dtype} whose rows are contiguous, got"
            f" {tuple(t.shape)} with strides {t.stride()} in {t.dtype}"
        )
    return apart if rows > 1 else columns


def choice_of(core: Any, A: Tensor, W: Tensor | None, B: Tensor) -> Choice | None:
    """The choice that a core makes, where it is one and fits the matrices of a layer; else None."""
    choice: Choice | None = core.choice() if core.keeps_gates and W is not None else None
    if choice is None or W is None or (choice.p, choice.s, choice.q) != (A.shape[0], W.shape[0], B.shape[0]):
        return None
    return choice


def kernel(z: Tensor, choice: Choice | None) -> Kernel | None:
    """The kernel, if it can serve: plain tensors in fp32 or bf16 on a CPU, and a compiler; else None."""
    if choice is None or not _ENABLED or z.dtype not in _SUFFIX or z.device.type != "cpu" or type(z) is not Tensor:
        return None
    return _kernel() if choice.fits and runs_plainly() else None


def without_kernel() -> AbstractContextManager[None]:
    """Within this context PyTorch's operations serve."""
    return _ENABLED.off()


@cache
def _kernel() -> Kernel | None:
    """Compiled, or found, once in a process; None where it is not wanted or cannot be had."""
    if os.environ.get("DYADS_KERNEL") == "0":
        return None
    return next(filter(None, map(_of_library, compile_c(*_SOURCES))), None)


def _of_library(library: Library) -> Kernel | None:
    try:
        return Kernel(library)
    except AttributeError:  # a compiler that was told to hide what it compiles
        return None


def _threads(numbers: int) -> int:
    return max(1, min(torch.get_num_threads(), numbers // _ALONE))

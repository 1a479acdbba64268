# SPDX-License-Identifier: Apache-2.0
"""How are softmax gates computed on a CPU in one pass, where a C compiler is at hand?

With PyTorch's operations a gate and its gradients are some thirty small operations per layer and step, each of which
reads and writes memory that has gone cold since the last. `gates.c` does the same in two calls. It is compiled when it
is first needed (two seconds), once in a process, and nothing of it stays. Where that fails, and where `DYADS_KERNEL=0`
is set, PyTorch's operations serve as before; the results differ by rounding.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Choice", "Kernel", "kernel", "without_kernel"]

_SOURCE = Path(__file__).with_name("gates.c")
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
# One attempt after the other, as not every compiler knows every flag: all processors, one, whatever it knows.
_FLAGS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
_MOST = 2048  # numbers of a token, held on the stack for 128 of them
_ENABLED = True  # see `without_kernel`


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
        return self.p + self.s + self.q <= _MOST

    @cached_property
    def _as_c(self) -> tuple[int, int, int, int]:
        return self.groups, self.ranks, self.experts, self.own


class Kernel:
    """The compiled functions."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._mix, self._gradients = {}, {}
        for dtype, suffix in _SUFFIX.items():
            mix, gradients = (getattr(library, f"{name}_{suffix}") for name in ("mix", "gradients"))
            mix.argtypes = [pointer] * 2 + [whole] * 5 + [real, whole]
            gradients.argtypes = [pointer] * 4 + [whole] * 5 + [real, real, whole]
            mix.restype = gradients.restype = None
            self._mix[dtype], self._gradients[dtype] = mix, gradients

    def mix(self, z: Tensor, choice: Choice) -> Tensor:
        """u = h ∘ g (tokens q) from a contiguous z = [h, scores] (tokens p + s): its scores become the gates g."""
        u = z.new_empty(len(z), choice.q)
        self._mix[z.dtype](
            z.data_ptr(), u.data_ptr(), *choice._as_c, len(z), 1 / choice.temperature, torch.get_num_threads(),
        )  # fmt: skip
        return u

    def gradients(self, z: Tensor, du: Tensor, choice: Choice, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """u (q tokens) again and the gradient of z (p + s tokens), from z = [h, g] and that of scale · u (tokens q)."""
        (tokens, width), q = z.shape, choice.q
        u, dz = z.new_empty(q, tokens), z.new_empty(width, tokens)
        self._gradients[z.dtype](
            z.data_ptr(), du.data_ptr(), u.data_ptr(), dz.data_ptr(), *choice._as_c, tokens, 1 / choice.temperature,
            scale, torch.get_num_threads(),
        )  # fmt: skip
        return u, dz


def kernel(z: Tensor, choice: Choice | None) -> Kernel | None:
    """The kernel, if it can serve: plain tensors in fp32 or bf16 on a CPU, and a compiler; else None."""
    if choice is None or not _ENABLED or z.dtype not in _SUFFIX or z.device.type != "cpu" or type(z) is not Tensor:
        return None
    return _kernel() if choice.fits else None


@contextmanager
def without_kernel() -> Iterator[None]:
    """Within this context PyTorch's operations serve."""
    global _ENABLED
    before, _ENABLED = _ENABLED, False
    try:
        yield
    finally:
        _ENABLED = before


@cache
def _kernel() -> Kernel | None:
    """Compiled once in a process; None where it is not wanted or cannot be had."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if os.environ.get("DYADS_KERNEL") == "0" or sys.platform == "win32" or shutil.which(compiler[0]) is None:
        return None
    return next(filter(None, (_attempt(compiler, flags) for flags in _FLAGS)), None)


def _attempt(compiler: list[str], flags: tuple[str, ...]) -> Kernel | None:
    try:
        return Kernel(_compiled(compiler, flags))
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None


def _compiled(compiler: list[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library. It is linked without OpenMP's own: PyTorch has loaded one, and a second would fight over cores."""
    with tempfile.TemporaryDirectory(prefix="dyads-") as folder:
        parts = [f"{folder}/gates.o", f"{folder}/gates.so"]
        for command in (
            [*compiler, "-std=gnu11", "-O3", "-fPIC", *flags, "-c", str(_SOURCE), "-o", parts[0]],
            [*compiler, "-shared", *parts[:1], "-o", parts[1]],
        ):
            subprocess.run(command, capture_output=True, check=True, timeout=60)
        return ctypes.CDLL(parts[1])

# SPDX-License-Identifier: Apache-2.0
"""How are softmax gates computed on a CPU in one pass, where a C compiler is at hand?

With PyTorch's operations a gate and its gradients are some thirty small operations per layer and step, each of which
reads and writes memory that has gone cold since the last. `gates.c` does the same in two calls, for fp32 and bf16,
while gradients are recorded. GCC or Clang compiles it when it is first needed (two seconds), once in a process, and
nothing of it stays. Where that fails, and where `DYADS_KERNEL=0` is set, PyTorch's operations serve as before; the
results differ by rounding. Why it failed is logged at level DEBUG.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from dyads.ops.switch import Switch

__all__ = ["Choice", "Kernel", "kernel", "without_kernel"]

_SOURCE = Path(__file__).with_name("gates.c")
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
# GCC knows -march=native on x86 only, and -mcpu=native elsewhere.
_NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
# One attempt after the other: all threads, one, whatever processor.
_FLAGS = ((_NATIVE, "-fopenmp"), (_NATIVE,), ())
_MOST = 2048  # numbers of a token, held on the stack for 128 of them: one megabyte
_LOG = logging.getLogger(__name__)
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

    def __init__(self, library: ctypes.CDLL, compiler: list[str], flags: tuple[str, ...]) -> None:
        self.compiler, self.flags = compiler, flags
        pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._mix, self._gradients = {}, {}
        for dtype, suffix in _SUFFIX.items():
            mix, gradients = (getattr(library, f"{name}_{suffix}") for name in ("mix", "gradients"))
            mix.argtypes = [pointer] * 2 + [whole] * 6 + [real, whole]
            gradients.argtypes = [pointer] * 4 + [whole] * 6 + [real, real, whole]
            mix.restype = gradients.restype = None
            self._mix[dtype], self._gradients[dtype] = mix, gradients

    def mix(self, z: Tensor, choice: Choice) -> Tensor:
        """u = h ∘ g (tokens q) from z = [h, scores] (tokens p + s), whose scores become the gates g.

        z may be some columns of a matrix that is contiguous.
        """
        tokens = z.shape[0]
        width = _width(z, tokens, choice.p + choice.s, z.dtype)
        u = z.new_empty(tokens, choice.q)
        with _seen_by_profilers():
            self._mix[z.dtype](
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
        with _seen_by_profilers():
            self._gradients[z.dtype](
                z.data_ptr(), du.data_ptr(), u.data_ptr(), dz.data_ptr(), width, *choice._as_c, tokens,
                1 / choice.temperature, scale, torch.get_num_threads(),
            )  # fmt: skip
        return u, dz


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


def _seen_by_profilers() -> AbstractContextManager[object]:
    """What is no operation of PyTorch, a profiler does not see by itself."""
    if torch._C._autograd._profiler_enabled():
        return torch.profiler.record_function("dyads::gates")
    return nullcontext()


def kernel(z: Tensor, choice: Choice | None) -> Kernel | None:
    """The kernel, if it can serve: plain tensors in fp32 or bf16 on a CPU, and a compiler; else None."""
    if choice is None or not _ENABLED or z.dtype not in _SUFFIX or z.device.type != "cpu" or type(z) is not Tensor:
        return None
    return _kernel() if choice.fits else None


def without_kernel() -> AbstractContextManager[None]:
    """Within this context PyTorch's operations serve."""
    return _ENABLED.off()


@cache
def _kernel() -> Kernel | None:
    """Compiled once in a process; None where it is not wanted or cannot be had."""
    if os.environ.get("DYADS_KERNEL") == "0" or sys.platform == "win32":
        return None
    compiler = _compiler()
    for flags in _FLAGS if compiler else ():
        found = _attempt(compiler, flags)
        if found is not None:
            return found
    return None


def _compiler() -> list[str]:
    """The command in $CC, else cc; empty where there is none."""
    try:
        command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError:  # a quotation without an end
        return []
    return command if shutil.which(command[0]) else []


def _attempt(compiler: list[str], flags: tuple[str, ...]) -> Kernel | None:
    try:
        return Kernel(_compiled(compiler, flags), compiler, flags)
    except subprocess.CalledProcessError as failed:
        _LOG.debug("gates.c with %s: %s", flags, failed.stderr)
    except (OSError, subprocess.TimeoutExpired, AttributeError) as failed:
        _LOG.debug("gates.c with %s: %s", flags, failed)
    return None


def _compiled(compiler: list[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library. It is linked without OpenMP's own: PyTorch has loaded one, and a second would fight over cores."""
    with tempfile.TemporaryDirectory(prefix="dyads-", ignore_cleanup_errors=True) as folder:
        parts = [f"{folder}/gates.o", f"{folder}/gates.so"]
        for arguments in (
            ["-std=gnu11", "-O3", "-fPIC", *flags, "-c", str(_SOURCE), "-o", parts[0]],
            ["-shared", parts[0], "-o", parts[1]],
        ):
            command = [*compiler, *arguments]
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=20)
        return ctypes.CDLL(parts[1])

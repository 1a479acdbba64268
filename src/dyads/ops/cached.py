# SPDX-License-Identifier: Apache-2.0
"""Cache for decoding: the operator for weights that do not change, joined and cast once for many small calls."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dyads.ops.operator import Frozen, Gating, dyadic, forward, is_fusable, join, require_present

__all__ = ["CachedOperator"]

# On a CPU a half-precision product costs about 40 µs before it starts; in that time fp32 does about this many
# multiplications (LOG.md, 2026-11-22).
_SMALL_PRODUCT = 2**21
_HALF = (torch.bfloat16, torch.float16)


class CachedOperator:
    """`operator(x, task, frozen=…)` is `fused(x, A, B, core, task, scale=scale, frozen=…)`, without gradients.

    Decoding consists of many calls of few rows, in which every operation counts: [A; R] and scale · B are formed once
    per dtype, and so are a task's scores on a CPU. The caller drops the object when weights change, and does not use it
    inside autocast.
    """

    __slots__ = ("A", "B", "_task_rows", "_weights", "core", "scale")

    def __init__(self, A: Tensor, B: Tensor, core: Gating, scale: float) -> None:
        self.A, self.B, self.core, self.scale = A, B, cast(Any, core), scale
        self._weights: dict[torch.dtype, tuple[Tensor, Tensor | None, Tensor]] = {}
        self._task_rows: dict[int, Tensor] = {}

    def __call__(
        self, x: Tensor, task: Tensor | None = None, *, out: Tensor | None = None, frozen: Frozen | None = None
    ) -> Tensor:
        """Shapes as in `dyadic`."""
        if not is_fusable(self.core):
            return dyadic(x, self.A, self.B, self.core, task, scale=self.scale, out=out, frozen=frozen)
        joined, R, up = self._weights_in(self._dtype(x), x)
        rows, p = self.task_scores(task), self.A.shape[0]
        y, _ = forward(x, joined, R, up, self.core, rows, p, 1.0, out, frozen)  # the scale is in `up`
        return y if out is not None or frozen is not None else y.to(x.dtype)  # else in the dtype of what it adds to

    def _dtype(self, x: Tensor) -> torch.dtype:
        """fp32 for few rows in half precision on a CPU, else the dtype of x."""
        small = x.numel() * max(self.A.shape[0], self.B.shape[1]) <= _SMALL_PRODUCT
        return torch.float32 if small and x.device.type == "cpu" and x.dtype in _HALF else x.dtype

    def _weights_in(self, dtype: torch.dtype, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """[A; R], R and scale · B, cast."""
        found = self._weights.get(dtype)
        if found is None:
            require_present(x, self.A, self.B)
            R = self.core.router_weight()
            up = self.B if self.scale == 1.0 else self.B * self.scale
            R = None if R is None else R.to(dtype)
            found = self._weights[dtype] = (join(self.A.to(dtype), R, self.core, dtype), R, up.to(dtype))
        return found

    def task_scores(self, task: Tensor | None) -> Tensor | None:
        """core.task_scores(task); on a CPU the row of a task is computed once.

        Every task is computed alone, so its row does not depend, not even by rounding, on the others in the batch.
        """
        if task is None or task.device.type != "cpu" or not len(task):  # reading ids would make an accelerator wait
            return cast("Tensor | None", self.core.task_scores(task))
        ids: list[int] = task.tolist()
        for one in set(ids) - self._task_rows.keys():
            row = self.core.task_scores(task.new_tensor([one]))
            if row is None:
                return None
            self._task_rows[one] = row
        first = self._task_rows[ids[0]]
        if ids.count(ids[0]) == len(ids):
            return first.expand(len(ids), *first.shape[1:])
        return torch.cat([self._task_rows[one] for one in ids])

# SPDX-License-Identifier: Apache-2.0
"""How is the operator computed for weights that stay as they are, as while decoding?

Decoding consists of many calls of few rows each, in which every operation counts: what only depends on weights is
computed once, and layers that see the same input share their products down and their gates. Softmax gates on a CPU are
compiled code with the products before and after them, where that can be had (`kernel`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dyads.ops.dyadic import Frozen, Gating, dyadic
from dyads.ops.kernel import Choice, Kernel, choice_of, kernel
from dyads.ops.products import cheap_dtype, is_small, join, linears, split, up
from dyads.ops.siblings import Siblings
from dyads.ops.switch import FAST

__all__ = ["Held", "Together"]


_Way = torch.dtype | Kernel
"""What computes for few rows: PyTorch's operations, in this dtype, or compiled code."""


class Held:
    """The operator for weights that stay as they are and ask for no gradients: joined and cast once for many calls.

    Decoding consists of such calls, of few rows each, in which every operation counts. `held(x, task, base=…)` is
    `fused(x, A, B, gating, task, scale=…, base=…)`; it serves while gradients and autocast are off, and it is on its
    user to drop it when the weights change. On a CPU, what the gates need from a task is computed once too.
    """

    __slots__ = ("A", "B", "__weakref__", "_choice", "_made", "_of_tasks", "_rows", "_splits", "core", "scale")

    def __init__(self, A: Tensor, B: Tensor, gating: Gating, scale: float) -> None:
        self.A, self.B, self.core, self.scale = A, B, cast(Any, gating), scale
        self._splits = getattr(gating, "splits", False)
        self._rows = max(A.shape[0], B.shape[0])
        self._choice = choice_of(gating, A, self.core.router_rows(), B) if self._splits else None
        self._made: dict[Any, Tensor] = {}
        self._of_tasks: dict[int, Tensor] = {}

    def __call__(
        self,
        x: Tensor,
        task: Tensor | None = None,
        *,
        onto: Tensor | None = None,
        base: Frozen | None = None,
        together: Together | None = None,
    ) -> Tensor:
        """`together` serves layers that see the same x one after the other."""
        if not FAST or not self._splits:
            return dyadic(x, self.A, self.B, self.core, task, scale=self.scale, onto=onto, base=base)
        few, together = is_small(x, self._rows), together if task is None else None
        if few and task is None and base is not None and (compiled := self._compiled(x)) is not None:
            u = self.coefficients(x, compiled) if together is None else together.coefficients(self, x, compiled)
            y = F.linear(x, *base)
            compiled.add(u, self._once(compiled, "up"), y.view(-1, y.shape[-1]))
            return y
        dtype = cheap_dtype(x, self._rows)
        if few and together is not None:
            u = together.coefficients(self, x, dtype)
        elif few:
            u = self.coefficients(x, dtype, self.of_task(task))
        else:
            if together is not None:
                together.see(self, x)
            u = self._of_many(x, dtype, self.of_task(task))
        if base is not None:
            onto = F.linear(x, *base) if few else next(linears(x, x.reshape(-1, x.shape[-1]), [base]))
        return up(u, self._once(dtype, "up"), 1.0, x, onto, ours=base is not None)

    def _compiled(self, x: Tensor) -> Kernel | None:
        """What can take x in two calls."""
        found = kernel(x, self._choice)
        return found if x.is_contiguous() else None

    def coefficients(self, x: Tensor, way: _Way, of_task: Tensor | None = None) -> Tensor:
        """What the rows of B are multiplied by, for few rows: (… q), or compiled (rows q) in whole eights of rows."""
        return self.coefficients_of(x, way, self._once(way, "down"), 1, of_task)[0]

    def coefficients_of(
        self, x: Tensor, way: _Way, down: Tensor, layers: int, of_task: Tensor | None = None
    ) -> Sequence[Tensor]:
        """The same of several layers, with the weights of all of them in `down`."""
        if isinstance(way, Kernel):
            return way.coefficients(x.view(-1, x.shape[-1]), down, cast(Choice, self._choice), layers).unbind()
        z = torch.mm(x.reshape(-1, x.shape[-1]).to(way), down)
        if of_task is not None:
            z = z.view(*x.shape[:-1], z.shape[-1])  # gates that look at no task see rows, whatever a sample is
        if layers == 1:
            return (self._gated(z, of_task),)
        return self._gated(z.view(*z.shape[:-1], layers, z.shape[-1] // layers), of_task).unbind(-2)

    def _of_many(self, x: Tensor, dtype: torch.dtype, of_task: Tensor | None) -> Tensor:
        # As in `products.down`: the tokens innermost where they are many.
        z = torch.mm(self._once(dtype, "rows"), x.reshape(-1, x.shape[-1]).to(dtype).t()).t()
        return self._gated(z if of_task is None else z.view(*x.shape[:-1], z.shape[-1]), of_task)

    def _gated(self, z: Tensor, of_task: Tensor | None) -> Tensor:
        h, scores = split(z, self.A.shape[0])
        u: Tensor = self.core.mix(h, self.core.select(h, scores, of_task))
        return u

    def of_task(self, task: Tensor | None) -> Tensor | None:
        """core.of_task(task); for a task that was seen before, what it was then."""
        if task is None or task.device.type != "cpu":  # an accelerator would have to wait for the ids
            return cast("Tensor | None", self.core.of_task(task))
        ids: list[int] = task.tolist()
        for one in set(ids) - self._of_tasks.keys():
            # Every task by itself: its row must not depend, not even by rounding, on which others there are.
            row = self.core.of_task(task.new_tensor([one]))
            if row is None:
                return None
            self._of_tasks[one] = row
        first = self._of_tasks[ids[0]]
        if ids.count(ids[0]) == len(ids):
            return first.expand(len(ids), *first.shape[1:])
        return torch.cat([self._of_tasks[one] for one in ids])

    def _once(self, way: _Way, what: str) -> Tensor:
        """[A; W] (`rows`), the same as few rows are multiplied by (`down`), or scale · B (`up`)."""
        made = self._made.get((way, what))
        if made is None:
            if what == "down":
                made = down_of((self,), way)
            elif what == "rows":
                made = rows_of((self,), cast(torch.dtype, way))
            else:
                made = self.B * self.scale if self.scale != 1.0 else self.B
                made = way.panels(made) if isinstance(way, Kernel) else made.to(way)
            self._made[way, what] = made
        return made

    def is_like(self, other: Held) -> bool:
        """Whether one call of `select` and `mix` can serve both: cores that differ in nothing but their weights."""
        ours, theirs = (one.core.router_rows() for one in (self, other))
        alike = type(self.core) is type(other.core) and self.A.shape == other.A.shape
        alike = alike and len(self.B) == len(other.B) and (ours is None) == (theirs is None)
        alike = alike and (ours is None or ours.shape == theirs.shape) and _plain(self.core) == _plain(other.core)
        return alike and not any(True for core in (self.core, other.core) for _ in core.buffers())


def rows_of(layers: Sequence[Held], dtype: torch.dtype) -> Tensor:
    """[A; W] of one layer above those of the next."""
    return join([matrix for one in layers for matrix in (one.A, one.core.router_rows())], dtype)


def down_of(layers: Sequence[Held], way: _Way) -> Tensor:
    """The same as a product of few rows takes it: turned, or in panels."""
    if isinstance(way, Kernel):
        return way.panels(rows_of(layers, torch.float32).t())
    return rows_of(layers, way).t().contiguous()


def _plain(core: Any) -> dict[str, Any]:
    """What a core is made with: its attributes that are neither PyTorch's nor weights."""
    return {key: value for key, value in vars(core).items() if not key.startswith("_")}


class Together:
    """Layers of one adapter that see the same input, such as q, k and v: their products down are one, and their gates.

    For operators that are alike (`Held.is_like`); others with the same input compute by themselves.
    """

    def __init__(self) -> None:
        self._siblings: Siblings[Held, Tensor] = Siblings()
        self._way: _Way | None = None
        self._made: dict[tuple[_Way, tuple[int, ...]], Tensor] = {}

    def see(self, held: Held, x: Tensor) -> None:
        """Who sees the same x, for calls of few rows to come: many rows gain nothing from each other."""
        shared = self._siblings.at(x)
        if shared is None:
            self._siblings.begin(held, x)
        else:
            self._learn(shared.first, held)

    def _learn(self, first: Held | None, held: Held) -> None:
        if first is not None and held.is_like(first):
            self._siblings.add(first, held)

    def coefficients(self, held: Held, x: Tensor, way: _Way) -> Tensor:
        """As `Held.coefficients`, for an operator whose gates look at no task."""
        shared = self._siblings.at(x)
        if shared is not None:
            if way is not self._way:  # than that of those who share x
                return held.coefficients(x, way)
            found = shared.take(held)
            if found is not None:
                return found
            self._learn(shared.first, held)
            return held.coefficients(x, way)
        shared, self._way = self._siblings.begin(held, x), way
        if not shared.others:
            return held.coefficients(x, way)
        all_of_them = (held, *shared.others)
        key = (way, tuple(map(id, all_of_them)))
        down = self._made.get(key)
        if down is None:
            down = self._made[key] = down_of(all_of_them, way)
        mine, *theirs = held.coefficients_of(x, way, down, len(all_of_them))
        shared.keep(shared.others, theirs)
        return mine

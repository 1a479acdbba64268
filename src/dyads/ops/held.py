# SPDX-License-Identifier: Apache-2.0
"""How is the operator computed for weights that stay as they are, as while decoding?

Decoding consists of many calls of few rows each, in which every operation counts: what only depends on weights is
computed once, and layers that see the same input share their products down and their gates.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dyads.ops.dyadic import Frozen, Gating, dyadic
from dyads.ops.packed import packs
from dyads.ops.products import cheap_dtype, is_small, join, split, up
from dyads.ops.siblings import Siblings
from dyads.ops.switch import FAST

__all__ = ["Held", "Together"]


class Held:
    """The operator for weights that stay as they are and ask for no gradients: joined and cast once for many calls.

    Decoding consists of such calls, of few rows each, in which every operation counts. `held(x, task, base=…)` is
    `fused(x, A, B, gating, task, scale=…, base=…)`; it serves while gradients and autocast are off, and it is on its
    user to drop it when the weights change. On a CPU, what the gates need from a task is computed once too.
    """

    __slots__ = ("A", "B", "__weakref__", "_made", "_of_tasks", "_rows", "_splits", "core", "scale")

    def __init__(self, A: Tensor, B: Tensor, gating: Gating, scale: float) -> None:
        self.A, self.B, self.core, self.scale = A, B, cast(Any, gating), scale
        self._splits = getattr(gating, "splits", False)
        self._rows = max(A.shape[0], B.shape[0])
        self._made: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
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
        few, packed = is_small(x, self._rows), None
        dtype = cheap_dtype(x, self._rows)
        down, B = self.weights(dtype)
        if base is not None and not few:  # of a few rows, looking it up takes a part that counts
            packed = packs(x, base[0])
        if together is not None and task is None and few:
            u = together.coefficients(self, x, dtype)
        else:
            u = self.coefficients(x, down, self.of_task(task))
        return up(u, B, 1.0, x, onto, base, packed)

    def coefficients(self, x: Tensor, down: Tensor, of_task: Tensor | None = None, layers: int = 1) -> Tensor:
        """What the rows of B are multiplied by: (… q), or (… layers q) with the weights of several layers in `down`."""
        rows = x.reshape(-1, x.shape[-1]).to(down.dtype)
        # As in `products.down`: the tokens innermost where they are many.
        z = torch.mm(rows, down) if is_small(x, self._rows) else torch.mm(down.t(), rows.t()).t()
        if of_task is not None:
            z = z.view(*x.shape[:-1], z.shape[-1])  # gates that look at no task see rows, whatever a sample is
        if layers > 1:
            z = z.view(*z.shape[:-1], layers, z.shape[-1] // layers)
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

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[A; W]ᵀ and scale · B."""
        made = self._made.get(dtype)
        if made is None:
            down = join((self.A, self.core.router_rows()), dtype).t().contiguous()
            B = (self.B * self.scale).to(dtype) if self.scale != 1.0 else self.B.to(dtype)
            made = self._made[dtype] = (down, B)
        return made

    def is_like(self, other: Held) -> bool:
        """Whether one call of `select` and `mix` can serve both: cores that differ in nothing but their weights."""
        ours, theirs = (one.core.router_rows() for one in (self, other))
        alike = type(self.core) is type(other.core) and self.A.shape == other.A.shape
        alike = alike and len(self.B) == len(other.B) and (ours is None) == (theirs is None)
        alike = alike and (ours is None or ours.shape == theirs.shape) and _plain(self.core) == _plain(other.core)
        return alike and not any(True for core in (self.core, other.core) for _ in core.buffers())


def _plain(core: Any) -> dict[str, Any]:
    """What a core is made with: its attributes that are neither PyTorch's nor weights."""
    return {key: value for key, value in vars(core).items() if not key.startswith("_")}


class Together:
    """Layers of one adapter that see the same input, such as q, k and v: their products down are one, and their gates.

    For operators that are alike (`Held.is_like`); others with the same input compute by themselves.
    """

    def __init__(self) -> None:
        self._siblings: Siblings[Held, Tensor] = Siblings()
        self._made: dict[tuple[torch.dtype, tuple[int, ...]], Tensor] = {}

    def coefficients(self, held: Held, x: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Held.coefficients`, for an operator whose gates look at no task."""
        shared = self._siblings.at(x)
        if shared is not None:
            found = shared.take(held)
            if found is not None:
                return found
            if shared.first is not None and held.is_like(shared.first):
                self._siblings.add(shared.first, held)
            return held.coefficients(x, held.weights(dtype)[0])
        shared = self._siblings.begin(held, x)
        if not shared.others:
            return held.coefficients(x, held.weights(dtype)[0])
        all_of_them = (held, *shared.others)
        key = (dtype, tuple(map(id, all_of_them)))
        down = self._made.get(key)
        if down is None:
            down = self._made[key] = torch.cat([one.weights(dtype)[0] for one in all_of_them], 1)
        mine, *theirs = held.coefficients(x, down, layers=len(all_of_them)).unbind(-2)
        shared.keep(shared.others, theirs)
        return mine

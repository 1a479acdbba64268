# SPDX-License-Identifier: Apache-2.0
"""How is the gated sum of dyads computed?

    delta(x) = scale · Bᵀ mix(A x; g)        g = route(A x, x, task)

In rank space the whole mixture is one product down, a gate on a handful of numbers per token, and one product up.
Nothing of shape (token, expert, d_out) is ever built, and no loop runs over experts.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Frozen", "Gating", "dyadic"]

Frozen = tuple[Tensor, Tensor | None]
"""Weight (o d) and bias (o) of a linear map that gets no gradients."""


class Gating(Protocol):
    """The two halves that make a method: where its gates come from, and what they do to the inner coefficients."""

    def route(self, h: Tensor, x: Tensor, task: Tensor | None) -> Tensor:
        """Gates from h = A x (… p), the layer's input x (… d) and the tasks (b), whichever the method looks at."""
        ...

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        """Inner coefficients (… p) to outer coefficients (… q). Linear in h."""
        ...


def dyadic(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gating: Gating,
    task: Tensor | None = None,
    *,
    scale: float = 1.0,
    onto: Tensor | None = None,
    base: Frozen | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    """delta(x) = scale · Bᵀ mix(A x; route(A x, x, task)), or onto + delta(x), or base(x) + delta(x).

    Shapes: x (… d), A (p d), B (q o), task (b) with b = x.shape[0], onto and the result (… o). `inner` replaces x in
    A x but not in the gate's view (adapter dropout); it has the shape of x. A and B are brought to the dtype of x, so
    that fp32 masters serve a half-precision base; inside autocast the products follow autocast. `base` is the frozen
    layer that is adapted, in the dtype of x, and stands in the place of `onto`.
    """
    if base is not None:
        onto = F.linear(x, *base)
    h = F.linear(x if inner is None else inner, A.to(x.dtype))
    u = gating.mix(h, gating.route(h, x, task))
    if scale != 1.0:
        u = u * scale
    # One product both projects up and adds: the sum needs no memory of its own.
    if onto is None:
        return u @ B.to(x.dtype)
    dtype = onto.dtype  # not always that of x: a quantised base layer may answer in another one
    flat = torch.addmm(onto.reshape(-1, B.shape[-1]), u.reshape(-1, B.shape[0]).to(dtype), B.to(dtype))
    return flat.view(onto.shape)

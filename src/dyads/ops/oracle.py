# SPDX-License-Identifier: Apache-2.0
"""Oracle of the operator: a plain double sum of rank-one terms, slow on purpose."""

from __future__ import annotations

from torch import Tensor

__all__ = ["dyadic_sum"]


def dyadic_sum(x: Tensor, A: Tensor, B: Tensor, G: Tensor, *, scale: float = 1.0) -> Tensor:
    """delta(x) = scale · Σ_j Σ_i G_ji (a_i · x) b_j, with a_i the rows of A and b_j the columns of B.

    Shapes: x (… d), A (p d), B (o q), result (… o). G = mix(I; g) is the method written out: (q p), or one matrix per
    token (… q p); it broadcasts against the leading axes of x. Read it, and test with it.
    """
    y = x.new_zeros(*x.shape[:-1], B.shape[0])
    for j, b in enumerate(B.t()):
        for i, a in enumerate(A):
            y = y + (G[..., j, i] * (x @ a)).unsqueeze(-1) * b
    return scale * y

# SPDX-License-Identifier: Apache-2.0
"""Reduced-rank regression of a layer's update on its input, in closed form, and two simple rivals.

The adapter adds y = B u to a layer's output, with u (q) = mix(A x; g) from gates that may differ from token to token. A
LoRA adds ΔW x. Over tokens, with the ridge Λ and a prior W₀,

    f(ΔW) = Σ |ΔW x − y|² + |(ΔW − W₀) Λ^½|²  =  |(ΔW − D) C^½|² + const        C = Σ x xᵀ + Λ
    D = B P                                                                     P = (Σ u xᵀ + P₀ Λ) C⁻¹,  W₀ = B P₀

so the best ΔW of rank R is the truncated SVD of D C^½, times C^-½ (Eckart and Young). Any square root of C serves; here
it is the Cholesky factor L. With B = Q S (QR), the SVD is that of the small matrix S P L (q d), and

    ΔW = (Q U) (Uᵀ S P)        U: its first R left singular vectors

The prior is the mean update, B E[G] A: where the data says nothing about a direction of x, the LoRA does what the
adapter does on average, and an adapter with constant gates is recovered exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyads.export.lora import factors

__all__ = ["RIDGE", "mean_gates", "mean_update", "reduced_rank"]

RIDGE = 1e-2
"""Λ as a share of the diagonal of Σ x xᵀ: a hundredth of each feature's own energy, whatever its scale."""
_FLOOR = 1e-6
"""Smallest entry of Λ, as a share of the mean of that diagonal: features that are always 0 need one."""


@torch.no_grad()
def reduced_rank(
    B: Tensor, xx: Tensor, ux: Tensor, prior: Tensor, rank: int, *, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """(up (o k), down (k d)) of the best ΔW of rank k = min(rank, q, o, d), in double precision.

    B (o q) has the scale multiplied in; xx (d d) and ux (q d) are the moments Σ x xᵀ and Σ u xᵀ; prior (q d) is P₀.
    """
    B, xx, ux, prior = (t.double() for t in (B, xx, ux, prior))
    energy = xx.diagonal()
    penalty = ridge * energy + _FLOOR * energy.mean().clamp(min=torch.finfo(energy.dtype).tiny)
    L: Tensor = torch.linalg.cholesky(xx + penalty.diag())
    P = torch.cholesky_solve((ux + prior * penalty).T, L).T
    Q, S = torch.linalg.qr(B)
    U: Tensor = torch.linalg.svd(S @ P @ L, full_matrices=False)[0]
    k = min(rank, U.shape[1])
    return Q @ U[:, :k], U[:, :k].T @ (S @ P)


@torch.no_grad()
def mean_gates(B: Tensor, G: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up, down) of the adapter with its gates frozen at their mean G (q p): at most `rank` of its rank-one terms.

    The terms with the largest norm are kept.
    """
    U, V = factors(G)
    up, down = B.double() @ U.double(), V.double() @ A.double()
    kept = (up.norm(dim=0) * down.norm(dim=1)).argsort(descending=True, stable=True)[:rank].sort().values
    return up[:, kept], down[kept]


@torch.no_grad()
def mean_update(B: Tensor, G: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up, down) of the truncated SVD of the mean update B G A."""
    Q, S = torch.linalg.qr(B.double())
    R, T = torch.linalg.qr(A.double().T)
    U, values, V = torch.linalg.svd(S @ G.double() @ T.T, full_matrices=False)
    k = min(rank, len(values))
    return Q @ (U[:, :k] * values[:k]), V[:k] @ R.T

# SPDX-License-Identifier: Apache-2.0
"""Which pieces of routing do several methods need?

A gate has three stages: *score* (what the router sees, and how), *select* (from scores to weights) and *combine* (which
coefficients a weight multiplies). Each function here is one stage of one kind.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "combine_experts",
    "combine_groups",
    "per_token",
    "select_prefix",
    "select_softmax",
    "softmax_expert_gradients",
    "softmax_group_gradients",
]


def select_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis; computed in fp32 where the scores are half precision, returned in their dtype."""
    if scores.stride(-1) == 1:
        half = scores.dtype in (torch.float16, torch.bfloat16)
        return scores.softmax(-1, dtype=torch.float32 if half else None).to(scores.dtype)
    # Along an axis that is not the last in memory PyTorch's kernels compute in fp32 by themselves.
    return _as_it_lies(scores, Tensor.softmax)


def _as_it_lies(t: Tensor, along: Callable[[Tensor, int], Tensor]) -> Tensor:
    """along(t, last axis), done in the order in which t lies in memory: the same numbers, laid out as t is.

    The fused operator lays tokens innermost. For a softmax PyTorch would first copy that, and what a sum gives would be
    laid out otherwise, at six times the cost (LOG.md, 2026-11-22).
    """
    order = sorted(range(t.ndim), key=t.stride, reverse=True)
    back = sorted(range(t.ndim), key=order.__getitem__)
    return along(t.permute(order), order.index(t.ndim - 1)).permute(back)


def _sum(t: Tensor, *, keepdim: bool = False) -> Tensor:
    """Sum over the last axis; where that is not the innermost one in memory, without changing the layout."""
    if t.stride(-1) != 1:
        t = _as_it_lies(t, lambda laid, axis: laid.sum(axis, keepdim=True))
        return t if keepdim else t.squeeze(-1)
    return t.sum(-1, keepdim=keepdim)


def select_prefix(scores: Tensor) -> Tensor:
    """Straight-through choice of a rank: scores (… r) → gates (… r), 1 for the first k ranks and 0 for the others.

        p = softmax(scores)      k = argmax p      g_i = 1[i ≤ k] · (1 + p_k − stopgrad(p_k))

    The value is exactly a prefix of ones; the gradient reaches the scores through the chosen entry of p (MoRE).
    """
    p = scores.softmax(-1)
    top, k = p.max(-1, keepdim=True)
    prefix = (torch.arange(scores.shape[-1], device=scores.device) <= k).to(scores.dtype)
    return prefix * (1 + (top - top.detach()))


def per_token(g: Tensor, like: Tensor) -> Tensor:
    """Gates of samples (b …) spread over their tokens: ones are inserted until g broadcasts against `like` (b … p)."""
    if like.ndim == 1:
        return g.squeeze(0)
    return g.view(g.shape[0], *[1] * (like.ndim - 2), *g.shape[1:])


def combine_groups(h: Tensor, g: Tensor) -> Tensor:
    """Every rank of group k gets the n gates of its group: h (… K·s), g (… K n) → (… K·s·n), rank by rank."""
    groups = g.shape[-2]
    h = h.reshape(*h.shape[:-1], groups, h.shape[-1] // groups, 1)
    return (h * g.unsqueeze(-2)).flatten(-3)


def combine_experts(h: Tensor, g: Tensor) -> Tensor:
    """Every expert's ranks get the expert's gate: h (… n·r), g (… n) → (… n·r), expert by expert."""
    experts = g.shape[-1]
    return (h.reshape(*h.shape[:-1], experts, h.shape[-1] // experts) * g.unsqueeze(-1)).flatten(-2)


def softmax_group_gradients(h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u = combine_groups(h, softmax(s)) for h and s, from g = softmax(s) and that for u; in fp32 or wider.

        t = du ∘ g      dh = Σ_i t      ds = Σ_j h ∘ t − g Σ_j h ∘ dh

    with i over the experts and j over the ranks of a group: Σ_j h ∘ t is g ∘ dg, and Σ_j h ∘ dh its sum over i.
    """
    wide = torch.promote_types(g.dtype, torch.float32)
    h, g, (groups, experts) = h.to(wide), g.to(wide), g.shape[-2:]
    h = h.reshape(*h.shape[:-1], groups, h.shape[-1] // groups, 1)  # (… K s 1)
    t = du.to(wide).view(*h.shape[:-1], experts) * g.unsqueeze(-2)  # (… K s n)
    dh = _sum(t, keepdim=True)
    if h.shape[-2] == 1:
        ds = torch.addcmul(t, g.unsqueeze(-2), dh, value=-1).mul_(h).squeeze(-2)
    else:
        ds = torch.addcmul(_sum((t * h).transpose(-1, -2)), g, _sum((h * dh).squeeze(-1), keepdim=True), value=-1)
    return dh.flatten(-3), ds.flatten(-2)


def softmax_expert_gradients(h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """The same for combine_experts(h, softmax(s)), with j over the ranks of an expert: dh is t = du ∘ g itself."""
    wide = torch.promote_types(g.dtype, torch.float32)
    h, g, experts = h.to(wide), g.to(wide), g.shape[-1]
    h = h.reshape(*h.shape[:-1], experts, h.shape[-1] // experts)
    t = du.to(wide).view(h.shape) * g.unsqueeze(-1)
    c = _sum(t * h)
    return t.flatten(-2), torch.addcmul(c, g, _sum(c, keepdim=True), value=-1)

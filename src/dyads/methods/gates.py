# SPDX-License-Identifier: Apache-2.0
"""Pieces of gates that several methods use.

A gate has three stages: *score* (from the router's input to scores), *select* (from scores to weights) and *combine*
(which coefficients a weight multiplies). Each function here is one stage of one kind; `balance` is a loss on scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dyads.ops import without_autocast

__all__ = [
    "balance",
    "combine_experts",
    "combine_groups",
    "per_token",
    "score_cosine",
    "score_task",
    "select_one",
    "select_prefix",
    "select_sigmoid",
    "select_softmax",
    "select_top_k",
    "softmax_expert_gradients",
    "softmax_group_gradients",
]


def score_cosine(seen: Tensor, keys: Tensor) -> Tensor:
    """Cosine between the router's input and every key: (… f), (s f) → (… s), in fp32 or wider; 0 for a zero row."""
    wide = torch.promote_types(seen.dtype, torch.float32)
    along = F.linear(seen, F.normalize(keys.to(wide), dim=-1).to(seen.dtype)).to(wide)
    length: Tensor = torch.linalg.vector_norm(seen, dim=-1, keepdim=True, dtype=wide)
    return along / length.clamp_min(1e-12)


def score_task(embeddings: Tensor, W: Tensor) -> Tensor:
    """W e_t of the samples' tasks: (b e), (s e) → (b s), in fp32 or wider.

    Also inside autocast: training, evaluation and merging must choose the same expert where two are nearly tied.
    """
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    with without_autocast(embeddings.device.type):
        return F.linear(embeddings.to(wide), W.to(wide))


def select_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis; computed in fp32 where the scores are half precision, returned in their dtype."""
    if scores.stride(-1) == 1 and scores.dtype in (torch.float16, torch.bfloat16):
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    # Along an axis that is not the last in memory PyTorch's kernels compute in fp32 by themselves.
    return _in_memory_order(Tensor.softmax, scores)


def _in_memory_order(along: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """along(*tensors, last axis), with the axes permuted to the order in which the first tensor lies in memory.

    The values do not change, and the result is laid out as the first tensor is. The operator keeps the tokens of rank
    space innermost in memory; a softmax over an axis of such a tensor would first copy it, and a sum would lay its
    result out otherwise, at six times the cost (LOG.md, 2026-11-22).
    """
    first = tensors[0]
    order = sorted(range(first.ndim), key=first.stride, reverse=True)
    back = sorted(range(first.ndim), key=order.__getitem__)
    return along(*(t.permute(order) for t in tensors), order.index(first.ndim - 1)).permute(back)


def _sum(t: Tensor) -> Tensor:
    """Sum over the last axis, which does not change the order of the others in memory."""
    if t.stride(-1) == 1:
        return t.sum(-1)
    return _in_memory_order(lambda t, axis: t.sum(axis, keepdim=True), t).squeeze(-1)


def _softmax_gradient(dg: Tensor, g: Tensor) -> Tensor:
    """ds = g ∘ (dg − Σ g ∘ dg) for g = softmax(s) over the last axis; sums are formed in fp32 or wider."""
    return _in_memory_order(lambda g, dg, axis: torch._softmax_backward_data(dg, g, axis, g.dtype), g, dg)


def select_sigmoid(scores: Tensor) -> Tensor:
    """Independent gates in (0, 1); their sum is not fixed."""
    return scores.sigmoid()


def select_top_k(scores: Tensor, k: int, *, renormalise: bool = True) -> Tensor:
    """The k largest entries of the softmax, zeros elsewhere; renormalised they sum to 1, else to what they had.

    Exactly k are kept, also among ties. The dropped ones get a gradient through the softmax; renormalised, none.
    """
    kept = torch.zeros_like(scores).scatter(-1, scores.topk(k, dim=-1).indices, 1)
    p = select_softmax(scores) * kept
    return p / p.sum(-1, keepdim=True) if renormalise else p


def select_one(scores: Tensor) -> Tensor:
    """Straight-through choice of one: the value is one-hot at the largest score, the gradient that of the softmax."""
    p = select_softmax(scores)
    chosen = torch.zeros_like(p).scatter(-1, scores.argmax(-1, keepdim=True), 1)
    return chosen + (p - p.detach())


def balance(scores: Tensor, k: int = 1, weight: Tensor | None = None) -> Tensor:
    """Load-balancing loss of a token-level choice among n (Fedus et al., 2021, eq. 4), averaged over groups.

        L = n Σ_i f_i P_i      f_i = share of the tokens that have i among their k largest, over k      P_i = mean p_i

    with p = softmax(scores), scores (… [groups] n) with one row of tokens first: (tokens …). It is 1 for tokens spread
    evenly, and n for tokens that all choose the same one. `weight` (tokens) says which tokens count, and how much.
    """
    p = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
    chosen = torch.zeros_like(p).scatter(-1, scores.topk(k, dim=-1).indices, 1 / k)
    if weight is None:
        share, mean = chosen.mean(0), p.mean(0)
    else:
        weight = (weight / weight.sum().clamp_min(1)).to(p.dtype).view(-1, *[1] * (p.ndim - 1))
        share, mean = (chosen * weight).sum(0), (p * weight).sum(0)
    return scores.shape[-1] * (share * mean).sum(-1).mean()


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
    """Gradients of u = combine_groups(h, softmax(s)) for h and s, given g = softmax(s) and du.

        dh_kj = Σ_i g_ki du_kji      dg_ki = Σ_j h_kj du_kji      ds = softmax gradient of dg

    with k over the groups, j over the ranks of a group and i over the experts: h (… K·S), g (… K n), du (… K·S·n).
    """
    groups, experts = g.shape[-2:]
    h = h.view(*h.shape[:-1], groups, h.shape[-1] // groups, 1)  # (… K S 1)
    du = du.view(*du.shape[:-1], groups, h.shape[-2], experts)  # (… K S n)
    dh = _sum(du * g.unsqueeze(-2))
    dg = du * h
    dg = dg.squeeze(-2) if h.shape[-2] == 1 else _sum(dg.transpose(-1, -2))
    return dh.flatten(-2), _softmax_gradient(dg, g).flatten(-2)


def softmax_expert_gradients(h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u = combine_experts(h, softmax(s)) for h and s, given g = softmax(s) and du.

        dh_ij = g_i du_ij      dg_i = Σ_j h_ij du_ij      ds = softmax gradient of dg

    with i over the experts and j over the ranks of an expert: h and du (… n·r), g (… n).
    """
    experts = g.shape[-1]
    h, du = (t.view(*t.shape[:-1], experts, t.shape[-1] // experts) for t in (h, du))  # (… n r)
    return (du * g.unsqueeze(-1)).flatten(-2), _softmax_gradient(_sum(du * h), g)

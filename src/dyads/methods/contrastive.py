# SPDX-License-Identifier: Apache-2.0
"""MoRE's contrastive loss, which pulls task embeddings towards their samples (arXiv 2505.22694).

    L = mean over samples s of −log softmax_k(cos(h_s, e_k) / τ)[t_s]

h_s is one vector for sample s, pooled from an adapted layer's input; t_s is the sample's task, and e_k are the
embeddings of all tasks in that layer. Batches may mix tasks. With one task L is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dyads.methods.gates import score_task

__all__ = ["POOLS", "contrastive_loss", "pool", "similarity"]

POOLS = ("mean", "first", "last")
"""How the tokens of a sample become its h_s: their mean, the first, or the last of them."""


def pool(x: Tensor, task: Tensor, mask: Tensor | None, how: str = "mean") -> tuple[Tensor, Tensor]:
    """(h, task): a row for every sample (b d), and the samples' tasks (b).

    x (b t d) are tokens of samples; mask (b t) is nonzero for real ones, and does not apply where it has another number
    of entries. Rows (n d) are the samples themselves, unless the mask has n entries: then they are their tokens, one
    sample after the other. task has an entry for every row of the first axis of x. A sample without a real token gives
    zeros for the mean, and any token for first and last.
    """
    if x.ndim == 1:
        return x.unsqueeze(0), task
    if x.ndim == 2:
        if mask is None or mask.numel() != len(x):
            return x, task
        x, task = x.view(*mask.shape, -1), task.view(mask.shape)[:, 0]
    x = x.flatten(1, -2)
    if mask is None or mask.shape != x.shape[:2]:
        return (x.mean(1) if how == "mean" else x[:, 0 if how == "first" else -1]), task
    real = mask.ne(0)
    if how == "mean":
        weights = real.to(x.dtype) / real.sum(1, keepdim=True).clamp_min(1).to(x.dtype)
        return (weights.unsqueeze(1) @ x).squeeze(1), task
    place = real.int().argmax(1) if how == "first" else real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return x[torch.arange(len(x), device=x.device), place], task


def similarity(h: Tensor, embeddings: Tensor) -> Tensor:
    """cos(h_s, e_k) of samples (b d) and embeddings of all tasks (T d): (b T), in fp32 or wider."""
    wide = torch.promote_types(h.dtype, torch.float32)
    h, embeddings = F.normalize(h.to(wide), dim=-1), F.normalize(embeddings.to(wide), dim=-1)
    return score_task(h, embeddings)  # a product outside of autocast


def contrastive_loss(h: Tensor, embeddings: Tensor, task: Tensor, temperature: float) -> Tensor:
    """L from the samples (b d), the embeddings of all tasks (T d) and the samples' tasks (b); in fp32 or wider."""
    return F.cross_entropy(similarity(h, embeddings) / temperature, task)

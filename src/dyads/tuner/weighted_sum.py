# SPDX-License-Identifier: Apache-2.0
"""Weighted sum of adapters as one more adapter, exactly: PEFT's `add_weighted_adapter` with `cat`.

    Σ_k w_k ΔW_k = Σ_k w_k scale_k B_k G_k A_k = [… w_k scale_k B_k G_k …] [… A_k …]

For adapters whose gates look at nothing, or at one named task. The sum is a LoRA, that is MoDE with one expert.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dyads.methods.mode import MoDEConfig
from dyads.tuner.layer import DyadsLinear

__all__ = ["Factors", "factors_of_sum", "sum_config"]

Factors = dict[str, tuple[Tensor, Tensor]]
"""A (p d) and B (o p) by the path of a layer."""


@torch.no_grad()
def factors_of_sum(layers: Sequence[DyadsLinear], adapters: Sequence[str], weights: Sequence[float]) -> Factors:
    """The factors of the sum in every layer that has one of the adapters; MergeError where one is no weight update."""
    found: Factors = {}
    for layer in layers:
        downs, ups = [], []
        for adapter, weight in zip(adapters, weights, strict=True):
            if adapter in layer.lora_A:
                A, G, B = layer.product(adapter)
                downs.append(A.to(G.dtype))
                ups.append(weight * layer.scaling[adapter] * (B.to(G.dtype) @ G))
        if downs:
            found[layer.key] = (torch.cat(downs), torch.cat(ups, dim=1))
    return found


def sum_config(factors: Factors) -> MoDEConfig:
    """The config of the sum: one expert, scale 1, and the rank of every layer."""
    ranks = {key: len(A) for key, (A, _) in factors.items()}
    largest = max(ranks.values())
    smaller = {f"^{re.escape(key)}": rank for key, rank in ranks.items() if rank < largest}
    return MoDEConfig(r=largest, lora_alpha=None, num_experts=1, target_modules=list(ranks), rank_pattern=smaller)

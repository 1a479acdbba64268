# SPDX-License-Identifier: Apache-2.0
"""How is attention computed on a CPU without copying keys and values for every query head?

Where several query heads share a key/value head, transformers' eager attention first repeats keys and values for each
of them. Here those query heads become rows of one product with the keys that they share:

    softmax(scale · Q Kᵀ + mask) V        Q (b h·n t d), K and V (b h s d), read as Q (b h n·t d)

with n query heads to each of h key/value heads. The sums and roundings are eager attention's own, the softmax is in
fp32. Importing this file makes it known to transformers under the name "grouped".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import eager_mask

from dyads.errors import ConfigError

__all__ = ["GROUPED", "grouped_attention", "is_plain"]

GROUPED = "grouped"
PLAIN = frozenset({"gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"})
"""Kinds of models whose attention is the formula above, unless their config says otherwise (each is tested)."""
NOT_PLAIN = ("sliding_window", "attention_chunk_size", "attn_logit_softcapping", "alibi")
UNKNOWN = ("softcap", "s_aux", "position_bias", "sliding_window")


def is_plain(config: PreTrainedConfig) -> bool:
    """Whether models with this config may compute attention as "grouped"."""
    full = {"full_attention"} >= set(getattr(config, "layer_types", None) or ())
    return config.model_type in PLAIN and full and not any(getattr(config, key, None) for key in NOT_PLAIN)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention, with the arguments and results of transformers' attention functions: (b t h·n d), weights."""
    if asked := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        raise ConfigError(
            f"attention '{GROUPED}' knows no {asked[0]}, which {type(module).__name__} asks for: use eager"
        )
    (b, heads, t, d), (h, s) = query.shape, key.shape[1:3]
    scale = d**-0.5 if scaling is None else scaling
    weights = (query.reshape(b, h, -1, d) @ key.mT * scale).view(b, heads, t, s)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.promote_types(weights.dtype, torch.float32))
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    mixed = (weights.view(b, h, -1, s) @ value).view(b, heads, t, -1)
    return mixed.transpose(1, 2).contiguous(), weights


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, eager_mask)

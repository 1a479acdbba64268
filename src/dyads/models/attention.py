# SPDX-License-Identifier: Apache-2.0
"""Grouped attention: eager attention without copies of the keys and values that query heads share.

Where several query heads share a key/value head, transformers' eager attention first repeats keys and values for each
of them. Here the query heads of a group are rows of one product with their common keys:

    softmax(scale · Q Kᵀ + mask) V        Q (b h·n t d), K and V (b h s d), read as Q (b h n·t d)

with n query heads to each of h key/value heads. Sums and roundings are those of eager attention, the softmax is in
fp32. Importing this module registers it with transformers under the name "grouped".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import eager_mask

from dyads.errors import ConfigError

__all__ = ["GROUPED", "GROUPED_TYPES", "grouped_attention", "supports_grouped"]

GROUPED = "grouped"
GROUPED_TYPES = frozenset({"gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"})
"""Model types whose attention is the formula above, unless their config sets one of the keys below (all tested)."""
_OTHER_CONFIG = ("sliding_window", "attention_chunk_size", "attn_logit_softcapping", "alibi")
_OTHER_ARGUMENTS = ("softcap", "s_aux", "position_bias", "sliding_window")


def supports_grouped(config: PreTrainedConfig) -> bool:
    """Whether "grouped" is correct for a model with this config."""
    full = {"full_attention"} >= set(getattr(config, "layer_types", None) or ())
    return config.model_type in GROUPED_TYPES and full and not any(getattr(config, key, None) for key in _OTHER_CONFIG)


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
    """Output (b t h·n d) and weights, with the signature of transformers' attention functions."""
    if given := [name for name in _OTHER_ARGUMENTS if kwargs.get(name) is not None]:
        raise ConfigError(
            f"attention '{GROUPED}' does not support {given[0]}, which {type(module).__name__} passes: use eager"
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

# SPDX-License-Identifier: Apache-2.0
"""Grouped attention is eager attention, gradients too, for every model type that supports it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dyads.errors import ConfigError
from dyads.models.attention import GROUPED, GROUPED_TYPES, grouped_attention, supports_grouped

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_of(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)


def run(model: PreTrainedModel, attention: str) -> list[Tensor]:
    """Logits where tokens are, and the gradients of all weights."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    ids = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 5:] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", sorted(GROUPED_TYPES))
def test_outputs_and_gradients_are_those_of_eager_attention(kind: str) -> None:
    model = tiny_of(kind)
    assert supports_grouped(model.config)
    assert_close(run(model, GROUPED), run(model, "eager"))


@pytest.mark.parametrize("heads", [1, 6])  # 2 of 6 above
def test_any_number_of_query_heads_may_share_keys_and_values(heads: int) -> None:
    model = tiny_of("llama", torch.float64, num_key_value_heads=heads)
    # Compared to sdpa, because the softmax of eager attention is in fp32 for a float64 model too.
    assert_close(run(model, GROUPED), run(model, "sdpa"))


def test_dropout_is_applied_to_the_weights_in_training_only() -> None:
    q, k, v = torch.randn(1, 6, 5, 8), torch.randn(1, 2, 5, 8), torch.ones(1, 2, 5, 8)
    module = nn.Module()
    out, weights = grouped_attention(module, q, k, v, None, dropout=0.5)
    assert out.shape == (1, 5, 6, 8)
    assert weights.shape == (1, 6, 5, 5)
    assert bool((weights == 0).any())
    assert_close(grouped_attention(module.eval(), q, k, v, None, dropout=0.5)[0], torch.ones_like(out))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("gemma2", {}),
        ("mistral", {"sliding_window": 4}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
)
def test_models_with_windows_or_caps_or_of_unknown_kinds_do_not_support_it(kind: str, changes: dict[str, Any]) -> None:
    assert not supports_grouped(AutoConfig.for_model(kind, **changes))


def test_an_argument_that_it_does_not_support_is_refused() -> None:
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(
        ConfigError, match="attention 'grouped' does not support softcap, which Linear passes: use eager"
    ):
        grouped_attention(nn.Linear(1, 1), x, x, x, None, softcap=30.0)

# SPDX-License-Identifier: Apache-2.0
"""Tiny models and one adapter config per method variant: a method gets its tests by existing in the registry."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dyads.methods import Core, DyadsConfig, methods
from dyads.tuner import DyadsLinear

TASKS = ("rte", "cola", "sst2")


# What a method refuses among the options that all variants share, or needs to be small.
SMALL: dict[str, dict[str, Any]] = {
    "comol": {"lora_dropout": 0.0},
    "hmora": {"lora_dropout": 0.0, "task_dim": 5, "divergence": 0.0},
    "hydralora": {"lora_dropout": 0.0},
    "moelora": {"num_experts": 2, "task_dim": 5},
    # The paper's form, without its loss, which is tested in tuner/test_auxiliary_losses.py.
    "more": {"selector": "straight_through", "linear_scaling": "ranks", "task_dim": None, "embedding_init": "normal"},
    "smora": {"top_k": 2},
    "task_mode": {"task_dim": 5},
}


@dataclass(frozen=True)
class Variant:
    """A method with options that make it small and unlike its neighbours."""

    key: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def id(self) -> str:
        return "-".join([self.key, *(f"{k}={v}" for k, v in self.options)])

    def config(self, **extra: Any) -> DyadsConfig:
        config_class = next(m.config for m in methods() if m.key == self.key)
        names = {f.name for f in fields(config_class)}
        options: dict[str, Any] = {"r": 4}
        if "num_experts" in names:
            options["num_experts"] = 3
        if "tasks" in names:
            options["tasks"] = list(TASKS)
        options |= SMALL.get(self.key, {})
        return config_class(**{**options, **dict(self.options), **extra})

    @property
    def looks_at(self) -> frozenset[str]:
        return self.config().core(4).looks_at


VARIANTS = [
    *(Variant(m.key) for m in methods()),
    Variant("mode", (("group_size", 2),)),
    Variant("mode", (("num_experts", 1),)),
    Variant("mode", (("score", "h"),)),
    Variant("mode", (("score", "random"), ("select", "top_k"), ("top_k", 2))),
    Variant("molora", (("shared_down", True),)),
    Variant("task_mode", (("score", "h+task"),)),
    Variant("more", (("task_dim", 5), ("lora_alpha", 8), ("selector", "soft"), ("linear_scaling", "none"))),
    Variant("more", (("embedding", "shared"), ("task_dim", 5), ("selector", "soft"), ("linear_scaling", "update"))),
    Variant("more", (("embedding", "none"), ("selector", "subset"))),
    Variant("more", (("selector", "frozen_random"), ("linear_scaling", "update"))),
    Variant("mtl_lora", (("diagonal", True),)),
    Variant("poly", (("num_splits", 2),)),
]

UNLIKE = [Variant("mode"), Variant("more"), Variant("smora"), Variant("poly", (("num_splits", 2),))]
"""Variants unlike each other for a model: gates of tokens; of tasks, with a nested module; buffers; feature blocks."""

KINDS = ("llama", "gpt2", "t5", "bert")

PLACED = list(zip(VARIANTS, cycle(KINDS), strict=False))
"""Every variant in one kind of model, and every kind with several variants."""


TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "t5": ["q", "v", "wi", "wo"],
    "bert": ["query", "value", "dense"],
}


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, blocks: int = 2) -> PreTrainedModel:
    """The same weights every time."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: PreTrainedModel
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": blocks, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**common, **sizes, num_key_value_heads=2, max_position_embeddings=64))
    elif kind == "gpt2":
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**common, **drops, n_embd=32, n_layer=blocks, n_head=4, n_positions=64))
    elif kind == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 44, "num_hidden_layers": blocks, "num_attention_heads": 4}
        model = OPTForCausalLM(OPTConfig(**common, **sizes, word_embed_proj_dim=32, max_position_embeddings=64))
    elif kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": blocks, "num_heads": 4, "dropout_rate": 0.0}
        model = T5ForConditionalGeneration(T5Config(**{**common, "decoder_start_token_id": 0}, **sizes))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": blocks, "num_attention_heads": 4}
        drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(
            BertConfig(vocab_size=61, pad_token_id=0, **sizes, **drops, max_position_embeddings=64)
        )
    torch.random.set_rng_state(state)
    return model.to(dtype)


def batch(kind: str, rows: int = 3, width: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Token ids for a tiny model; no padding, no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (rows, width), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, 61, (rows, 5), generator=generator)
    return inputs


def tiny_layer(
    variant: Variant, b: int, t: int, d: int, o: int, dtype: torch.dtype = torch.float64
) -> tuple[Core, Tensor, Tensor, Tensor, Tensor]:
    """A core with random parameters, x (b t d), A (p d), B (o q) and a task for every sample."""
    core = variant.config().core(d).to(dtype).eval()
    core.reset_parameters()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x, A, B = (torch.randn(*shape).to(dtype) for shape in ((b, t, d), (core.p, d), (o, core.q)))
    return core, x, A, B, torch.arange(b) % len(TASKS)


def task_of(config: DyadsConfig, *tasks: int | str) -> dict[str, Any]:
    """`task=` for a method that looks at one, nothing for the others; a single task is for all rows."""
    if config.task_names is None:
        return {}
    return {"task": tasks[0] if len(tasks) == 1 else list(tasks)}


class MLP(nn.Module):
    """A model that is not from transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(6, 8)
        self.lin1 = nn.Linear(8, 10, bias=False)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.lin1(torch.tanh(self.lin0(x)))))


def adapted_layers(model: nn.Module) -> list[DyadsLinear]:
    return [m for m in model.modules() if isinstance(m, DyadsLinear)]

# SPDX-License-Identifier: Apache-2.0
"""Saved adapters whose weights are set by hand, so that what an analysis must find is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from dyads.methods import Core
from tiny import TARGETS, Variant, adapted_layers, tiny_model

Change = Callable[[Core, Tensor, Tensor], object]
"""Sets the core, A (p d) and B (o q) of a layer in place."""


def save_adapter(path: Path, variant: Variant, change: Change, kind: str = "llama", **extra: Any) -> Path:
    """The folder of an adapter, each of whose layers was changed."""
    config = variant.config(**{"target_modules": TARGETS[kind], "init_weights": False, **extra})
    model = get_peft_model(tiny_model(kind), config)
    with torch.no_grad():
        for layer in adapted_layers(model):
            change(layer.core("default"), layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    model.save_pretrained(path)
    return path


def orthonormal(core: Core, A: Tensor, B: Tensor) -> None:
    """Rows of A and columns of B that are orthonormal."""
    A.copy_(torch.eye(*A.shape))
    B.copy_(torch.eye(*B.shape))


def choose_experts(*experts: int) -> Change:
    """Gates of MOELoRA: task t uses the expert experts[t] alone; A and B are orthonormal."""

    def change(core: Any, A: Tensor, B: Tensor) -> None:
        orthonormal(core, A, B)
        core.embedding.zero_()
        core.task_router.zero_()
        for expert in set(experts):
            core.task_router[expert, expert] = 1
        for task, expert in enumerate(experts):
            core.embedding[task, expert] = 1000

    return change

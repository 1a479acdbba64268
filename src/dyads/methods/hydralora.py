# SPDX-License-Identifier: Apache-2.0
"""HydraLoRA – an asymmetric LoRA with one A and several B (Tian et al., NeurIPS 2024, arXiv 2404.19245).

    delta(x) = alpha/r · Σ_i ω_i(x) B_i A x        ω(x) = softmax(W_g x)

MoLORA-SD under another name, so it has the core of MoDE with one group of all r ranks; what is here are the defaults of
its public code: A and router Kaiming-uniform, r 4, alpha 32, dropout 0.05, four B.

Ours ↔ theirs: num_experts ↔ lora_nums (the number of B matrices), router ↔ lora_route.
We differ in nothing that we know of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from dyads.methods.config import DyadsConfig
from dyads.methods.mode import MoDE
from dyads.methods.registry import register

__all__ = ["HydraLoRAConfig"]


@register("hydralora", "one A, several B, one gate per B and token: MoLORA-SD with HydraLoRA's defaults")
@dataclass
class HydraLoRAConfig(DyadsConfig):
    """Config of HydraLoRA. For other routers and starts take MoLoRAConfig(shared_down=True), the same method."""

    r: int = field(default=4, metadata={"help": "Rank of the shared A, and of each B."})
    lora_alpha: float | None = field(default=32, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of A, in [0, 1)."})
    num_experts: int = field(default=4, metadata={"help": "B matrices. 1 is LoRA."})

    PAPER: ClassVar[dict[str, Any]] = {"lora_alpha": 32}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("num_experts")

    def core(self, d: int) -> MoDE:
        return MoDE(d, self.r, self.num_experts, self.r, router_std=None)

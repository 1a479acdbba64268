# SPDX-License-Identifier: Apache-2.0
"""MoLORA – mixture of LoRAs (Zadouri et al., 2023, arXiv 2309.05444), and MoLORA-SD, its variant with one shared A.

    MoLORA      delta(x) = Σ_i R_i(x) B_i A_i x          R(x) = softmax(W x) over the experts
    MoLORA-SD   delta(x) = Σ_i R_i(x) B_i A x            one A for all ("LoRA-MoE-SD" in the MoDE paper; = HydraLoRA)

Dense token-level routing, one weight per expert. Ours ↔ the MoDE paper: num_experts ↔ m, d ↔ P, o ↔ Q.
We differ: the public code of MoLORA adds a router bias and scales by alpha / r = 16 / 4; the MoDE paper's equations and
parameter counts have neither, and neither do we (lora_alpha is there to set). With one expert there is nothing to
choose: no router is made, and both are LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dyads.methods.base import Core, DyadsConfig, register
from dyads.methods.gates import combine_experts, select_softmax, softmax_expert_gradients
from dyads.methods.mode import MoDE

__all__ = ["MoLoRA", "MoLoRAConfig"]


@register("molora", "mixture of LoRAs, one gate per expert and token; shared_down=true is MoLORA-SD")
@dataclass
class MoLoRAConfig(DyadsConfig):
    """Config of MoLORA and, with `shared_down`, of MoLORA-SD."""

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    num_experts: int = field(default=4, metadata={"help": "Experts, each of rank r (the paper's m). 1 is LoRA."})
    shared_down: bool = field(default=False, metadata={"help": "One A for all experts: MoLORA-SD, HydraLoRA."})
    init_std: float | None = field(
        default=0.02, metadata={"help": "Standard deviation of A at the start. None: Kaiming-uniform, as LoRA."}
    )
    router_std: float = field(default=0.02, metadata={"help": "Standard deviation of the router at the start."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("num_experts")
        self.require(isinstance(self.shared_down, bool), "shared_down", "must be true or false")
        if self.shared_down:
            self.require(
                self.router_std > 0, "router_std", "must be above 0: equal gates on one A never tell experts apart"
            )
        self.require(self.router_std >= 0, "router_std", "must not be negative")

    def core(self, d: int) -> Core:
        if self.shared_down:
            # One group of all r ranks: MoLORA-SD is MoDE m×r×r, and the same core.
            return MoDE(d, self.r, self.num_experts, self.r, self.router_std)
        return MoLoRA(d, self.r, self.num_experts, self.router_std)


class MoLoRA(Core):
    """One softmax over the experts, each with its own A and B; gates (… n). Rows go expert by expert."""

    keeps_gates = True

    def __init__(self, d: int, r: int, num_experts: int, router_std: float = 0.02) -> None:
        super().__init__()
        self.p = self.q = num_experts * r
        self.num_experts, self.router_std = num_experts, router_std
        self.looks_at = frozenset({"x"} if num_experts > 1 else ())
        if num_experts > 1:
            self.router = nn.Parameter(torch.empty(num_experts, d))

    def reset_parameters(self) -> None:
        if self.num_experts > 1:
            nn.init.normal_(self.router, std=self.router_std)

    def router_rows(self) -> Tensor | None:
        return self.router if self.num_experts > 1 else None

    def select(self, h: Tensor, scores: Tensor | None, of_task: Tensor | None) -> Tensor:
        return h.new_ones(1) if scores is None else select_softmax(scores)  # (… n)

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return combine_experts(h, g)

    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_expert_gradients(h, g, du)

# SPDX-License-Identifier: Apache-2.0
"""MoLORA – mixture of LoRAs (Zadouri et al., 2023, arXiv 2309.05444), and MoLORA-SD, its variant with one shared A.

    MoLORA      delta(x) = Σ_i R_i(x) B_i A_i x          R(x) = softmax(W x) over the experts
    MoLORA-SD   delta(x) = Σ_i R_i(x) B_i A x            one A for all ("LoRA-MoE-SD" in the MoDE paper; = HydraLoRA)

Dense token-level routing, one weight per expert, unless `score` and `select` say otherwise (stages.py).

Ours ↔ the MoDE paper: num_experts ↔ m, d ↔ P, o ↔ Q.
We differ: the public code of MoLORA adds a router bias, which the MoDE paper's equations and parameter counts leave
out, as we do. It scales by alpha / r = 16 / 4 and draws A ~ N(0, 0.02²); ours has lora_alpha 16 too, and LoRA's start
of A. `preset: paper` has scale 1, as the MoDE paper's equations, and the public code's start. With one expert there is
nothing to choose: no router is made, and both are LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from dyads.methods.core import Core
from dyads.methods.gates import combine_experts, softmax_expert_gradients
from dyads.methods.mode import MoDE
from dyads.methods.registry import register
from dyads.methods.stages import StagedConfig, StagedCore, Stages

__all__ = ["MoLoRA", "MoLoRAConfig"]


@register("molora", "mixture of LoRAs, one gate per expert and token; shared_down=true is MoLORA-SD")
@dataclass
class MoLoRAConfig(StagedConfig):
    """Config of MoLORA and, with `shared_down`, of MoLORA-SD."""

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    num_experts: int = field(default=4, metadata={"help": "Experts, each of rank r (the paper's m). 1 is LoRA."})
    shared_down: bool = field(default=False, metadata={"help": "One A for all experts: MoLORA-SD, HydraLoRA."})
    router_std: float = field(default=0.02, metadata={"help": "Standard deviation of the router at the start."})

    PAPER: ClassVar[dict[str, Any]] = {"init_std": 0.02}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(isinstance(self.shared_down, bool), "shared_down", "must be true or false")
        if self.shared_down:
            self.require(
                self.router_std > 0, "router_std", "must be above 0: equal gates on one A never tell experts apart"
            )
        self.require(self.router_std >= 0, "router_std", "must not be negative")

    def core(self, d: int) -> Core:
        if self.shared_down:
            # One group of all r ranks: MoLORA-SD is MoDE m×r×r, and the same core.
            return MoDE(d, self.r, self.num_experts, self.r, self.router_std, self.stages(d))
        return MoLoRA(d, self.r, self.num_experts, self.router_std, self.stages(d))


class MoLoRA(StagedCore):
    """One choice among the experts, each with its own A and B; gates (… n).

    Rows of A and columns of B go expert by expert.
    """

    closed_form = True

    def __init__(
        self, d: int, r: int, num_experts: int, router_std: float | None = 0.02, stages: Stages | None = None
    ) -> None:
        super().__init__(d, (num_experts,), router_std=router_std, stages=stages, inner=num_experts * r)
        self.p = self.q = num_experts * r

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return combine_experts(h, g)

    def softmax_gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_expert_gradients(h, g, du)

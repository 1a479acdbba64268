# SPDX-License-Identifier: Apache-2.0
"""MoDE – mixture of dyadic experts (Ning et al., Findings of NAACL 2025, arXiv 2408.01505).

    delta(x) = Σ_k Σ_i R_ik(x) Σ_{j in group k} (a_j · x) b_ij        R_·k(x) = softmax_i(W_k x)

One shared A. The r ranks form K = r / group_size groups, and every group has its own token-level router over
num_experts up-vectors per rank. group_size 1 is MoDE proper (one router per rank), group_size r is MoLORA-SD, and one
expert is LoRA of rank r: then there is nothing to choose, no router is made, and the adapter merges exactly.

Ours ↔ theirs: num_experts ↔ m, group_size ↔ p, d ↔ P, o ↔ Q. Rows of B are ordered rank by rank, then by expert.
We differ: lora_alpha / r scaling is ours (the paper has none: leave lora_alpha out to match). On average gates start
at 1/m, so every expert sees 1/m of the signal; lora_alpha = r · num_experts undoes it, if you want that. The paper does
not say how routers start; ours draw N(0, 0.02²), as the public code of MoLORA does. All-equal routers would keep the
experts of a rank equal for ever: the same gates on the same zero rows get the same gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dyads.methods.base import Core, DyadsConfig, register
from dyads.methods.gates import combine_groups, select_softmax, softmax_group_gradients

__all__ = ["MoDE", "MoDEConfig"]


@register("mode", "mixture of dyadic experts: every rank (or group of ranks) routes over rank-one experts")
@dataclass
class MoDEConfig(DyadsConfig):
    """Config of MoDE and of its generalisation m×r×p (num_experts × r × group_size)."""

    r: int = field(
        default=8, metadata={"help": "Rows of the shared A; each rank, or group of them, has its own router."}
    )
    num_experts: int = field(default=4, metadata={"help": "Experts per rank (the paper's m). 1 is LoRA."})
    group_size: int = field(default=1, metadata={"help": "Ranks that share a router (the paper's p); divides r."})
    init_std: float | None = field(
        default=0.01, metadata={"help": "Standard deviation of A at the start. None: Kaiming-uniform, as LoRA."}
    )
    router_std: float = field(default=0.02, metadata={"help": "Standard deviation of the routers at the start."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("num_experts")
        self.require_whole("group_size")
        divisors = [p for p in range(1, self.r + 1) if self.r % p == 0]
        self.require(
            self.r % self.group_size == 0,
            "group_size",
            f"must divide r = {self.r}, that is be one of {divisors}",
        )
        self.require(self.router_std > 0, "router_std", "must be above 0: equal routers never tell experts apart")

    def core(self, d: int) -> MoDE:
        return MoDE(d, self.r, self.num_experts, self.group_size, self.router_std)


class MoDE(Core):
    """K groups of ranks, each with its own softmax over the experts; gates (… K n)."""

    gate_axes = 2
    keeps_gates = True

    def __init__(self, d: int, r: int, num_experts: int, group_size: int, router_std: float = 0.02) -> None:
        super().__init__()
        self.p, self.q = r, r * num_experts
        self.num_experts, self.groups, self.router_std = num_experts, r // group_size, router_std
        self.looks_at = frozenset({"x"} if num_experts > 1 else ())
        if num_experts > 1:
            self.router = nn.Parameter(torch.empty(self.groups * num_experts, d))

    def reset_parameters(self) -> None:
        if self.num_experts > 1:
            nn.init.normal_(self.router, std=self.router_std)

    def router_rows(self) -> Tensor | None:
        return self.router if self.num_experts > 1 else None

    def select(self, h: Tensor, scores: Tensor | None, of_task: Tensor | None) -> Tensor:
        if scores is None:
            return h.new_ones(self.groups, 1)
        return select_softmax(scores.view(*scores.shape[:-1], self.groups, self.num_experts))  # (… K n)

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return combine_groups(h, g)

    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_group_gradients(h, g, du)

# SPDX-License-Identifier: Apache-2.0
"""MoDE – mixture of dyadic experts (Ning et al., Findings of NAACL 2025, arXiv 2408.01505).

    delta(x) = Σ_k Σ_i R_ik(x) Σ_{j in group k} (a_j · x) b_ij        R_·k(x) = softmax_i(W_k x)

One shared A. The r ranks form K = r / group_size groups, and every group has its own token-level router over
num_experts up-vectors per rank. group_size 1 is MoDE proper (one router per rank), group_size r is MoLORA-SD, and one
expert is LoRA of rank r: then there is nothing to choose, no router is made, and the adapter merges exactly.

Ours ↔ theirs: num_experts ↔ m, group_size ↔ p, d ↔ P, o ↔ Q. Columns of B are ordered rank by rank, then by expert.
We differ: the paper has no scale, and A ~ N(0, 0.01²); by default ours has lora_alpha / r with one lora_alpha for all
methods, and LoRA's start of A, under which one learning rate suits all methods (LOG.md, 2026-11-28). `preset: paper` is
the paper's. The paper does not say how routers start; ours draw N(0, 0.02²), as the public code of MoLORA does.
All-equal routers would keep the experts of a rank equal for ever: the same gates on the same zero columns of B get the
same gradients.

Its *combine* stage is group_size. *Score* and *select* are the paper's linear score of the token and softmax, unless
`score` and `select` say otherwise (stages.py); the paper names top-k routing as future work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from dyads.methods.gates import combine_groups, softmax_group_gradients
from dyads.methods.registry import register
from dyads.methods.stages import StagedConfig, StagedCore, Stages

__all__ = ["MoDE", "MoDEConfig"]


@register("mode", "mixture of dyadic experts: every rank (or group of ranks) routes over rank-one experts")
@dataclass
class MoDEConfig(StagedConfig):
    """Config of MoDE and of its generalisation m×r×p (num_experts × r × group_size)."""

    r: int = field(
        default=8, metadata={"help": "Rows of the shared A; each rank, or group of them, has its own router."}
    )
    num_experts: int = field(default=4, metadata={"help": "Experts per rank (the paper's m). 1 is LoRA."})
    group_size: int = field(default=1, metadata={"help": "Ranks that share a router (the paper's p); divides r."})
    router_std: float = field(default=0.02, metadata={"help": "Standard deviation of the routers at the start."})

    PAPER: ClassVar[dict[str, Any]] = {"init_std": 0.01}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("group_size")
        divisors = [p for p in range(1, self.r + 1) if self.r % p == 0]
        self.require(
            self.r % self.group_size == 0,
            "group_size",
            f"must divide r = {self.r}, that is be one of {divisors}",
        )
        self.require(self.router_std > 0, "router_std", "must be above 0: equal routers never tell experts apart")

    def core(self, d: int) -> MoDE:
        return MoDE(d, self.r, self.num_experts, self.group_size, self.router_std, self.stages(d))


class MoDE(StagedCore):
    """K groups of ranks, each with its own choice among the experts; gates (… K n)."""

    gate_axes = 2
    closed_form = True

    def __init__(
        self,
        d: int,
        r: int,
        num_experts: int,
        group_size: int,
        router_std: float | None = 0.02,
        stages: Stages | None = None,
    ) -> None:
        super().__init__(d, (r // group_size, num_experts), router_std=router_std, stages=stages, inner=r)
        self.p, self.q = r, r * num_experts
        # A subclass that overrides `select` or `mix` has no `mix_columns`.
        self._mixes_columns = self.is_softmax_of_tokens and type(self).mix is MoDE.mix

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return combine_groups(h, g)

    def mix_columns(self, z: Tensor) -> Tensor | None:
        if not self._mixes_columns:
            return None
        groups, experts = self.gate_shape
        h, scores = z.split_with_sizes((self.p, groups * experts))
        g = scores.view(groups, 1, experts, -1).softmax(2)
        return (g * h.view(groups, self.p // groups, 1, -1)).reshape(self.q, -1)

    def softmax_gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_group_gradients(h, g, du)

# SPDX-License-Identifier: Apache-2.0
"""Poly – Polytropon (Ponti et al., EACL 2023, arXiv 2202.13914), and MHR, its multi-head routing (Caccia et al.,
NeurIPS 2023, arXiv 2211.03831).

    delta_t(x) = alpha/r · (Σ_i α_ti B_i) (Σ_i α_ti A_i) x        α_t = σ(Z_t) / Σ_i σ(Z_ti)

A task mixes the skills' A and their B, each by itself, and then multiplies: the coefficients of all skills melt into r
numbers before they spread again. So `mix` is not a gate per coefficient, and G = α α^T ⊗ I is full; it still is linear
in h. For a named task it merges exactly.
MHR cuts the layer's inputs and outputs into num_splits parts, and every part has a row of Z of its own.

Ours ↔ theirs: num_experts ↔ n_skills, num_splits ↔ n_splits, num_tasks ↔ n_tasks, logits ↔ module_logits (Z).
Rows of A and columns of B are ordered part by part, then by skill, then by rank.
We differ: lora_alpha is 16 by default, and 1 with `preset: paper`. PEFT draws α at random in training (a relaxed
Bernoulli variable around σ(Z)); ours is σ(Z) always, as in the authors' later code, so a layer that is run again for
gradient checkpointing gives the same. At inference both agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dyads.errors import ConfigError
from dyads.methods.config import TaskConditioned
from dyads.methods.core import Core
from dyads.methods.gates import per_token
from dyads.methods.registry import register

__all__ = ["Poly", "PolyConfig"]


@register("poly", "a task mixes skills: their A and their B are averaged separately; num_splits above 1 is MHR")
@dataclass
class PolyConfig(TaskConditioned):
    """Config of Poly and, with several splits, of MHR. Name the tasks, or say how many there are."""

    r: int = field(default=8, metadata={"help": "Rank of each skill."})
    num_experts: int = field(default=4, metadata={"help": "Skills. 1 is LoRA, with num_splits: 1."})
    num_splits: int = field(
        default=1, metadata={"help": "Parts of the layer's features, each with a mixture of its own (MHR)."}
    )

    PAPER: ClassVar[dict[str, Any]] = {"lora_alpha": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("num_experts")
        self.require_whole("num_splits")

    @property
    def feature_blocks(self) -> int:
        return self.num_splits

    def core(self, d: int) -> Poly:
        assert self.num_tasks is not None
        if d % self.num_splits:
            raise ConfigError(
                f"poly: num_splits = {self.num_splits} does not divide a layer's {d} input features: choose another"
                " number, or leave the layer out with exclude_modules"
            )
        return Poly(self.r, self.num_experts, self.num_tasks, self.num_splits)


class Poly(Core):
    """A share of every skill for every task and part; gates (b 1… S n)."""

    gate_axes = 2
    linear_scores = True

    def __init__(self, r: int, num_experts: int, num_tasks: int, num_splits: int = 1) -> None:
        super().__init__()
        self.p = self.q = num_splits * num_experts * r
        self.feature_blocks, self.rank = num_splits, r
        # With one skill every share is 1 whatever Z is.
        self.looks_at = frozenset({"task"} if num_experts > 1 else ())
        self.shape = (num_splits, num_experts)
        if num_experts > 1:
            self.logits = nn.Parameter(torch.empty(num_tasks, num_splits * num_experts))

    def reset_parameters(self) -> None:
        if self.looks_at:
            nn.init.uniform_(self.logits, -1e-3, 1e-3)

    def task_scores(self, task: Tensor | None) -> Tensor | None:
        if not self.looks_at:
            return None
        assert task is not None, "the layer resolves the task before it routes"
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        shares = self.logits[task].to(wide).sigmoid().view(-1, *self.shape)
        return shares / (shares.sum(-1, keepdim=True) + 1e-12)

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        if task_scores is None:
            return h.new_ones(self.shape)
        return per_token(task_scores.to(h.dtype), h)

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        shares = g.unsqueeze(-1)  # (… S n 1)
        h = h.reshape(*h.shape[:-1], *self.shape, self.rank)
        melted = (h * shares).sum((-3, -2), keepdim=True)  # (… 1 1 r)
        return (melted * shares).flatten(-3)

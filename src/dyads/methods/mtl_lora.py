# SPDX-License-Identifier: Apache-2.0
"""MTL-LoRA – a LoRA with a transformation and a mixture of up-projections per task (Yang et al., AAAI 2025,
arXiv 2410.09437).

    delta_t(x) = alpha/r · Σ_i ω_ti B_i Λ_t A x        ω_t = softmax(w_t / τ) over num_experts up-projections

A is shared by all tasks, Λ_t (r r) transforms its coefficients for the task, and w_t weighs the shared B_i. The gates
are Λ_t and ω_t together; mix applies the one and then the other, and for a named task it merges exactly. With Λ = I and
one up-projection it is LoRA.

Ours ↔ theirs: num_experts ↔ n (B_num), temperature ↔ τ (B_scale), num_tasks ↔ lambda_num, diagonal ↔ diagonal_format,
transform ↔ lora_lambdas, weights ↔ lora_B_w. Columns of B are ordered rank by rank, then by up-projection.
We differ in nothing that we know of.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dyads.methods.config import TaskConditioned
from dyads.methods.core import Core
from dyads.methods.gates import combine_groups, per_token
from dyads.methods.registry import register

__all__ = ["MTLLoRA", "MTLLoRAConfig"]


@register("mtl_lora", "one A, a small transformation per task, and the task's mixture of B; merges for a task")
@dataclass
class MTLLoRAConfig(TaskConditioned):
    """Config of MTL-LoRA. Name the tasks, or say how many there are."""

    num_experts: int = field(default=3, metadata={"help": "Up-projections that the tasks share (the paper's n)."})
    temperature: float = field(default=0.1, metadata={"help": "A task's weights are divided by it. Small is sharp."})
    diagonal: bool = field(default=False, metadata={"help": "A number per rank and task in place of a matrix r×r."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("num_experts")
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        self.require(number and self.temperature > 0, "temperature", "must be a number above 0")
        self.require(isinstance(self.diagonal, bool), "diagonal", "must be true or false")

    def core(self, d: int) -> MTLLoRA:
        assert self.num_tasks is not None
        return MTLLoRA(self.r, self.num_experts, self.num_tasks, self.temperature, self.diagonal)


class MTLLoRA(Core):
    """Gates (b 1… r·r + n): Λ_t row by row (r numbers where it is diagonal), then ω_t."""

    looks_at = frozenset({"task"})
    linear_scores = True

    def __init__(self, r: int, num_experts: int, num_tasks: int, temperature: float, diagonal: bool) -> None:
        super().__init__()
        self.p, self.q = r, r * num_experts
        self.num_experts, self.temperature, self.diagonal = num_experts, temperature, diagonal
        self.transform = nn.Parameter(torch.empty((num_tasks, r) if diagonal else (num_tasks, r, r)))
        self.weights = nn.Parameter(torch.empty(num_tasks, num_experts))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.transform.copy_(torch.ones(self.p) if self.diagonal else torch.eye(self.p))
        nn.init.kaiming_uniform_(self.weights, a=5**0.5)

    def task_scores(self, task: Tensor | None) -> Tensor:
        assert task is not None, "the layer resolves the task before it routes"
        wide = torch.promote_types(self.weights.dtype, torch.float32)
        shares = (self.weights[task].to(wide) / self.temperature).softmax(-1)
        return torch.cat([self.transform[task].to(wide).flatten(1), shares], dim=-1)

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        assert task_scores is not None
        return per_token(task_scores.to(h.dtype), h)

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        L, shares = g[..., : -self.num_experts], g[..., -self.num_experts :]
        if self.diagonal:
            return combine_groups(h * L, shares.unsqueeze(-2))
        # Not as a product of matrices: that would copy Λ for every token.
        h = torch.einsum("...jk,...k->...j", L.reshape(*L.shape[:-1], self.p, self.p), h)
        return combine_groups(h, shares.unsqueeze(-2))

    def choices(self, h: Tensor, x: Tensor, task: Tensor | None) -> Tensor:
        return self.route(h, x, task)[..., None, -self.num_experts :]

    def gates_of_expert(self, expert: int, like: Tensor) -> Tensor:
        alone = super().gates_of_expert(expert - self.num_experts, like)
        unchanged = torch.ones(self.p) if self.diagonal else torch.eye(self.p).flatten()
        alone[..., : -self.num_experts] = unchanged.to(alone)  # Λ = I
        return alone

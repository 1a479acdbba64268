# SPDX-License-Identifier: Apache-2.0
"""MOELoRA – a mixture of low-rank experts gated by the task (Liu et al., SIGIR 2024, arXiv 2310.18339).

    delta_t(x) = alpha/r · Σ_i ω_i B_i A_i x        ω = softmax(W_T e_t) over the experts, each of rank r / num_experts

All tokens of a task have the same gates, so for a named task it merges exactly. It is MoLORA's core with experts of
rank r / num_experts and a score of the task's embedding alone; a LoRA of the same r has equally many parameters in A
and B.

Ours ↔ theirs: num_experts ↔ N (expert_num), task_dim ↔ task_embedding_dim (64), embedding ↔ E, task_router ↔ W_T.
We differ: a token passes through r / num_experts ranks, not r, so lora_alpha is 16 · 8 by default where LoRA's is 16,
and A starts as LoRA's; `preset: paper` has scale 1 and A ~ N(0, 0.01²). Their table has a row more than there are
tasks, which no task uses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from dyads.methods.config import TaskConditioned
from dyads.methods.molora import MoLoRA
from dyads.methods.registry import register
from dyads.methods.stages import Stages

__all__ = ["MOELoRAConfig"]


@register("moelora", "mixture of small LoRAs whose gates look at the task's embedding; merges for a task")
@dataclass
class MOELoRAConfig(TaskConditioned):
    """Config of MOELoRA. Name the tasks, or say how many there are."""

    r: int = field(default=16, metadata={"help": "Rank of all experts together; num_experts divides it."})
    num_experts: int = field(default=8, metadata={"help": "Experts, each of rank r / num_experts. 1 is LoRA."})
    task_dim: int = field(default=64, metadata={"help": "Dimension of a task's embedding."})
    lora_alpha: float | None = field(
        default=128,
        metadata={"help": "The update is scaled by lora_alpha / r; 16 for each of 8 experts. None: the scale is 1."},
    )

    PAPER: ClassVar[dict[str, Any]] = {"init_std": 0.01}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("num_experts")
        self.require_whole("task_dim")
        divisors = [n for n in range(1, self.r + 1) if self.r % n == 0]
        self.require(
            self.r % self.num_experts == 0,
            "num_experts",
            f"must divide r = {self.r}, the rank of all experts together, that is be one of {divisors}",
        )

    @property
    def needs_tasks(self) -> bool:
        return self.num_experts > 1

    def core(self, d: int) -> MoLoRA:
        stages = Stages(score="task", num_tasks=self.num_tasks or 0, task_dim=self.task_dim)
        return MoLoRA(d, self.r // self.num_experts, self.num_experts, router_std=None, stages=stages)

# SPDX-License-Identifier: Apache-2.0
"""MoRE – mixture of low-rank experts (Findings of ACL 2025, arXiv 2505.22694).

    delta(x) = Σ_{i ≤ k_t} (a_i · x) b_i        k_t = argmax softmax(W_g e_t + b_g)

The ranks of one LoRA are nested experts: expert k is the first k ranks. A gate on the task's learned embedding e_t
picks k_t for every task and layer; it is trained straight-through. Every layer has its own embeddings and gate, as in
the public code; an embedding has the layer's input dimension unless task_dim says otherwise.

Ours ↔ theirs: r ↔ r (= number of experts), num_tasks ↔ |T|. At full rank this is LoRA, and for a named task it merges
exactly.
We differ: in the public code a guard keeps the trainable branch from ever running, so its ranks stay at what the random
gate first picked, the gate gets no gradient, and the embeddings get none from the task's own loss. Here both do. Not
here yet: the linear scaling of low ranks and the contrastive loss.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyads.errors import ConfigError
from dyads.methods.base import Core, DyadsConfig, register
from dyads.methods.gates import per_token, select_prefix

__all__ = ["MoRE", "MoREConfig"]


@register("more", "mixture of low-rank experts: a gate on the task's embedding picks how many ranks it uses")
@dataclass
class MoREConfig(DyadsConfig):
    """Config of MoRE. Name the tasks, or say how many there are."""

    r: int = field(default=8, metadata={"help": "Largest rank that a task can use."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Names of the tasks, in the order of their ids."})
    num_tasks: int | None = field(default=None, metadata={"help": "Number of tasks, where they have no names."})
    task_dim: int | None = field(
        default=None, metadata={"help": "Dimension of a task's embedding. Not set: the layer's input dimension."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(not isinstance(self.tasks, str), "tasks", "must be a list of names, such as ['rte', 'cola']")
        if self.tasks is not None:
            self.tasks = [str(name) for name in self.tasks]
            twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
            self.require(not twice, "tasks", f"must differ from one another ({', '.join(twice)} is there twice)")
            self.require(len(self.tasks) > 0, "tasks", "must name at least one task")
            if self.num_tasks not in (None, len(self.tasks)):
                raise ConfigError(
                    f"more: num_tasks = {self.num_tasks}, but tasks names {len(self.tasks)}: leave num_tasks out"
                )
            self.num_tasks = len(self.tasks)
        if self.num_tasks is None:
            raise ConfigError("more: tell it the tasks, either by name (tasks=['rte', …]) or by number (num_tasks=8)")
        self.require_whole("num_tasks")
        if self.task_dim is not None:
            self.require_whole("task_dim")

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(self.tasks) if self.tasks else tuple(str(i) for i in range(self.num_tasks or 0))

    def core(self, d: int) -> MoRE:
        assert self.num_tasks is not None
        return MoRE(self.r, self.num_tasks, self.task_dim or d)


class MoRE(Core):
    """Embeddings of the tasks and a gate on them; gates (b 1… r), a prefix of ones."""

    looks_at = frozenset({"task"})

    def __init__(self, r: int, num_tasks: int, task_dim: int) -> None:
        super().__init__()
        self.p = self.q = r
        self.embedding = nn.Parameter(torch.empty(num_tasks, task_dim))
        self.gate = nn.Linear(task_dim, r)

    def reset_parameters(self) -> None:
        # The public code's: embeddings N(0, 0.01²); gate weights Kaiming-uniform for a ReLU, gate bias as PyTorch's.
        nn.init.normal_(self.embedding, std=0.01)
        self.gate.reset_parameters()
        nn.init.kaiming_uniform_(self.gate.weight, nonlinearity="relu")

    def scores(self, task: Tensor) -> Tensor:
        """W_g e_t + b_g of the given tasks (b) → (b r), in fp32 or wider.

        Also inside autocast: training, evaluation and merging must choose the same rank where two are nearly tied.
        """
        wide = torch.promote_types(self.embedding.dtype, torch.float32)
        kind = self.embedding.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return F.linear(self.embedding[task].to(wide), self.gate.weight.to(wide), self.gate.bias.to(wide))

    def ranks(self) -> Tensor:
        """The rank every task uses in this layer: (T), from 1 to r."""
        return self.scores(torch.arange(len(self.embedding), device=self.embedding.device)).argmax(-1) + 1

    def of_task(self, task: Tensor | None) -> Tensor:
        assert task is not None, "the layer resolves the task before it routes"
        return self.scores(task)  # (b r)

    def select(self, h: Tensor, scores: Tensor | None, of_task: Tensor | None) -> Tensor:
        assert of_task is not None
        return per_token(select_prefix(of_task).to(h.dtype), h)  # (b 1… r)

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return h * g

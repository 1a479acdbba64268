# SPDX-License-Identifier: Apache-2.0
"""HMoRA – hierarchical mixture of LoRA experts (Liao et al., ICLR 2025, openreview lTkHiXeuDl).

    delta_t(x) = alpha/√r · Σ_i g_i(x, t) B_i A_i x
    g(x, t)    = (1 − σ(s)) p(x) + σ(s) p_t        p(x) = softmax(R x + b)        p_t = softmax(V e_t + c)
    s          = ε (2 l/L − 1) + μ at the start, in block l of 0 to L; learned
    loss       = the task's + λ · (D(p(x) of the tokens) + D(p_t of the tasks))
    D(p)       = relu((γ_b − γ_c) log n − min(H(mean p), γ_b log n) + mean of max(H(p), γ_c log n)) / log n

A token router and a task router each weigh the n experts, and a learned share, one number a layer, mixes the two: the
first blocks look at the token, the last at the task (eqs. 7 and 8). D is the constrained generalised Jensen–Shannon
divergence (eqs. 11 and 12), with H the entropy: it is 0 where each token's gates are certain and the experts evenly
used, both up to a limit. With top_k the k largest g are kept, and their softmax is the gates. `shared_down` is one A
for all experts.

Ours ↔ theirs: num_experts ↔ E, top_k ↔ top_k_routing_strategy, depth_slope ↔ ε (epsilon_alpha), depth_offset ↔ μ
(alpha_shift), share_logit ↔ alpha, divergence ↔ λ (lambda_auxiliary), certainty ↔ γ_c, evenness ↔ γ_b, shared_down ↔
use_hydra_lora, router_groups ↔ share_router_for_qkv and share_router_for_w_i, router ↔ TokenRouter, task_router ↔
TaskRouter.
We differ: their e is the output of a small transformer that reads the whole prompt, so that unseen tasks have one too;
gates here depend on a token and its task alone, and e_t is a learned embedding per task and router, as MOELoRA's. Their
routers read the input with dropout, ours without. Their loss is summed over the routers, and the second D is over the
samples of a batch; ours is the mean over the routers, and the second D counts every task once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyads.errors import ConfigError, did_you_mean
from dyads.methods.config import TaskConditioned
from dyads.methods.core import Core
from dyads.methods.gates import combine_experts, combine_groups, per_token, score_task
from dyads.methods.registry import register

__all__ = ["HMoRA", "HMoRAConfig", "divergence"]


@register("hmora", "experts weighed by a token router in the first blocks, and by a task router in the last")
@dataclass
class HMoRAConfig(TaskConditioned):
    """Config of HMoRA. Name the tasks, or say how many there are."""

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: float | None = field(
        default=8, metadata={"help": "The update is scaled by lora_alpha / √r. Not set: the scale is 1."}
    )
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout on the input of A, in [0, 1)."})
    num_experts: int = field(default=8, metadata={"help": "Experts, each of rank r. 1 is LoRA."})
    shared_down: bool = field(default=False, metadata={"help": "One A for all experts, as HydraLoRA."})
    top_k: int | None = field(default=2, metadata={"help": "Experts that a token uses. Not set: all."})
    task_dim: int = field(default=64, metadata={"help": "Dimension of a task's embedding."})
    depth_slope: float = field(
        default=2.0,
        metadata={
            "help": "ε of the task router's share at the start: σ(μ − ε) in the first block to σ(μ + ε) in the last."
        },
    )
    depth_offset: float = field(default=0.0, metadata={"help": "μ of that share."})
    divergence: float = field(
        default=0.005, metadata={"help": "Weight of the loss for certain gates and evenly used experts. 0: none."}
    )
    certainty: float = field(
        default=0.5, metadata={"help": "γ_c: no gates need less entropy than this part of the largest possible."}
    )
    evenness: float = field(
        default=0.98, metadata={"help": "γ_b: mean gates need no more entropy than this part of the largest possible."}
    )
    router_groups: list[list[str]] | None = field(
        default=None,
        metadata={
            "help": "Modules of a block that share their routers, such as [[q_proj, k_proj, v_proj], [gate_proj,"
            " up_proj]]. Not set: every module has its own."
        },
    )

    PAPER: ClassVar[dict[str, Any]] = {"lora_alpha": 8}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("num_experts")
        self.require_whole("task_dim")
        self.require(isinstance(self.shared_down, bool), "shared_down", "must be true or false")
        if self.top_k is not None:
            self.require_whole("top_k")
            if self.num_experts > 1:  # with one there is nothing to choose
                self.require(
                    self.top_k <= self.num_experts, "top_k", f"must be at most num_experts = {self.num_experts}"
                )
                self.require(self.top_k > 1, "top_k", "of 1 makes every gate 1, and the routers learn nothing")
        for name in ("depth_slope", "depth_offset", "divergence", "certainty", "evenness"):
            value = getattr(self, name)
            self.require(isinstance(value, (int, float)) and not isinstance(value, bool), name, "must be a number")
        self.require(self.divergence >= 0, "divergence", "must not be negative (0 leaves the loss out)")
        self.require(0 <= self.certainty <= 1, "certainty", "must be from 0 to 1")
        self.require(
            self.certainty < self.evenness <= 1, "evenness", f"must be above certainty = {self.certainty} and at most 1"
        )
        self._check_router_groups()

    def _check_router_groups(self) -> None:
        groups = self.router_groups
        if groups is None:
            return
        lists = isinstance(groups, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in groups)
        names = [name for group in groups for name in group] if lists else []
        self.require(
            lists and all(isinstance(name, str) for name in names) and all(len(group) > 1 for group in groups),
            "router_groups",
            "must be a list of lists of two names or more, such as [[q_proj, k_proj, v_proj], [gate_proj, up_proj]]",
        )
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        self.require(not twice, "router_groups", f"must name a module once ({', '.join(twice)} is there twice)")

    @property
    def scaling(self) -> float:
        """lora_alpha / √r, or 1 where lora_alpha is not set."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / math.sqrt(self.r)

    @property
    def needs_tasks(self) -> bool:
        return self.num_experts > 1

    def sharing_groups(self, modules: Sequence[str]) -> list[str]:
        """Modules of the same parent that `router_groups` names together; every other module is a group of its own."""
        group_of = {name: str(i) for i, group in enumerate(self.router_groups or ()) for name in group}
        places = [path.rpartition(".") for path in modules]
        found = {own for _, _, own in places}
        for name in group_of:
            if name not in found:
                raise ConfigError(
                    f"hmora: router_groups names '{name}', and no adapted module has that name"
                    f"{did_you_mean(name, sorted(found))}"
                )
        return [
            f"{parent}.{group_of[own]}" if own in group_of else path
            for path, (parent, _, own) in zip(modules, places, strict=True)
        ]

    def core(self, d: int) -> HMoRA:
        return HMoRA(
            d,
            self.r,
            self.num_experts,
            self.num_tasks or 0,
            self.task_dim,
            shared_down=self.shared_down,
            top_k=self.top_k,
            depth=(self.depth_slope, self.depth_offset),
            loss=(self.divergence, self.certainty, self.evenness),
        )


class HMoRA(Core):
    """Two routers and the share of the second; gates (… n)."""

    linear_scores = True

    def __init__(
        self,
        d: int,
        r: int,
        num_experts: int,
        num_tasks: int,
        task_dim: int,
        *,
        shared_down: bool = False,
        top_k: int | None = None,
        depth: tuple[float, float] = (2.0, 0.0),
        loss: tuple[float, float, float] = (0.0, 0.5, 0.98),
    ) -> None:
        super().__init__()
        self.p, self.q = (r if shared_down else num_experts * r), num_experts * r
        self.num_experts, self.shared_down, self.top_k = num_experts, shared_down, top_k
        self.depth_slope, self.depth_offset = depth
        self.weight, self.certainty, self.evenness = loss
        if num_experts == 1:
            return
        self.looks_at = frozenset({"x", "task"})
        self.has_auxiliary_loss = self.weight > 0
        self.router = nn.Parameter(torch.empty(num_experts, d))
        self.router_bias = nn.Parameter(torch.empty(num_experts))
        self.embedding = nn.Parameter(torch.empty(num_tasks, task_dim))
        self.task_router = nn.Parameter(torch.empty(num_experts, task_dim))
        self.task_router_bias = nn.Parameter(torch.empty(num_experts))
        self.share_logit = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        if "router" in self._parameters:  # neither with one expert nor where another layer has the routers
            for weight, bias in ((self.router, self.router_bias), (self.task_router, self.task_router_bias)):
                nn.init.kaiming_uniform_(weight, a=5**0.5)  # as nn.Linear, and its bias too
                nn.init.uniform_(bias, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
            nn.init.normal_(self.embedding)  # as tokens of unit variance
            self.set_depth(0.5)

    def set_depth(self, depth: float) -> None:
        if "share_logit" in self._parameters:
            nn.init.constant_(self.share_logit, self.depth_slope * (2 * depth - 1) + self.depth_offset)

    def share_with(self, first: Core) -> None:
        """Use the routers of the group's first layer, and leave their loss to it."""
        if first is self or not self.looks_at:
            return
        assert isinstance(first, HMoRA)
        if first.router.shape != self.router.shape:
            raise ConfigError(
                f"hmora: modules of one router group have {first.router.shape[1]} and {self.router.shape[1]} input"
                " features; router_groups joins modules with the same input"
            )
        for name in list(self._parameters):
            delattr(self, name)
        self.has_auxiliary_loss = False
        # Not through nn.Module, which would register the first core as a submodule of this one.
        self.__dict__["_first"] = first

    def router_weight(self) -> Tensor | None:
        first: HMoRA | None = self.__dict__.get("_first")
        if first is not None:
            return cast(Tensor, first(first.router_weight))  # in a call of its own: it may be offloaded
        return self.router if self.looks_at else None

    def task_scores(self, task: Tensor | None) -> Tensor | None:
        """b, σ(s) p_t and 1 − σ(s): (b n + n + 1)."""
        if not self.looks_at:
            return None
        first: HMoRA | None = self.__dict__.get("_first")
        if first is not None:
            return cast(Tensor, first(first.task_scores, task))
        assert task is not None, "the layer resolves the task before it routes"
        of_task = self._task_gates(task)
        bias, share = self.router_bias.to(of_task).expand(len(task), -1), self.share_logit.to(of_task).sigmoid()
        return torch.cat([bias, share * of_task, (1 - share).expand(len(task), 1)], dim=-1)

    def _task_gates(self, task: Tensor) -> Tensor:
        """p_t of the given tasks: (b n), in fp32 or wider."""
        scores = score_task(self.embedding[task], self.task_router)
        return (scores + self.task_router_bias.to(scores.dtype)).softmax(-1)

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        if scores is None:
            return h.new_ones(1)
        assert task_scores is not None
        spread, n = per_token(task_scores, h), self.num_experts
        bias, of_task, rest = spread[..., :n], spread[..., n:-1], spread[..., -1:]
        g = rest * (scores + bias).softmax(-1) + of_task
        if self.top_k is not None:
            kept = torch.zeros_like(g, dtype=torch.bool).scatter(-1, g.topk(self.top_k, dim=-1).indices, 1)
            g = g.masked_fill(~kept, -math.inf).softmax(-1)
        return g.to(h.dtype)

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return combine_groups(h, g.unsqueeze(-2)) if self.shared_down else combine_experts(h, g)

    def auxiliary_loss(self, x: Tensor, task: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """λ (D over the real tokens + D over the tasks); None where λ = 0, and where another layer has the routers."""
        if not self.has_auxiliary_loss:
            return None
        wide = torch.promote_types(x.dtype, torch.float32)
        p = (F.linear(x, self.router.to(x.dtype)).to(wide) + self.router_bias).softmax(-1).reshape(-1, self.num_experts)
        weight = mask.reshape(-1) if mask is not None and mask.numel() == len(p) else None
        of_tasks = self._task_gates(torch.arange(len(self.embedding), device=x.device))
        limits = self.certainty, self.evenness
        return self.weight * (divergence(p, *limits, weight) + divergence(of_tasks, *limits))


def divergence(p: Tensor, certainty: float, evenness: float, weight: Tensor | None = None) -> Tensor:
    """D of gates p (rows n), each row summing to 1; `weight` (rows) says which rows count, and how much."""
    largest = math.log(p.shape[-1])
    if weight is None:
        weight = p.new_ones(len(p))
    weight = (weight / weight.sum().clamp_min(1)).to(p.dtype)
    # Sums, as products would be of half precision inside autocast.
    of_mean = _entropy((weight.unsqueeze(-1) * p).sum(0)).clamp(max=evenness * largest)
    mean_of = (weight * _entropy(p).clamp(min=certainty * largest)).sum()
    return F.relu((evenness - certainty) * largest - of_mean + mean_of) / largest


def _entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-9).log()).sum(-1)

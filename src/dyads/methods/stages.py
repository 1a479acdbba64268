# SPDX-License-Identifier: Apache-2.0
"""Gates whose three stages can be swapped one by one.

    scores = score(x, A x, e_t) / temperature        g = select(scores)        u = combine(A x; g)

A method that chooses among experts is a `StagedCore` with a `combine` of its own; fields of its config name the score
and the select. The defaults, a linear score of the token and a softmax, are what the papers of MoLORA and MoDE use; the
others are ablations and extensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dyads.errors import did_you_mean
from dyads.methods.config import TaskConditioned
from dyads.methods.contrastive import contrastive_loss, pool, similarity
from dyads.methods.core import Core
from dyads.methods.gates import (
    balance,
    per_token,
    score_cosine,
    score_task,
    select_one,
    select_sigmoid,
    select_softmax,
    select_top_k,
)

__all__ = ["SCORES", "SELECTS", "StagedConfig", "StagedCore", "Stages"]

SCORES: dict[str, frozenset[str]] = {
    "x": frozenset({"x"}),
    "h": frozenset({"h"}),
    "task": frozenset({"task"}),
    "x+task": frozenset({"x", "task"}),
    "h+task": frozenset({"h", "task"}),
    "cosine": frozenset({"x"}),
    "uniform": frozenset(),
    "random": frozenset(),
}
"""Every score, with what the gates then depend on (`Core.looks_at`)."""

ROUTED = ("x", "h", "x+task", "h+task")
"""Scores of a linear router, R x or R h, to which scores of the task may be added."""

SELECTS = ("softmax", "sigmoid", "top_k", "straight_through")


@dataclass(frozen=True)
class Stages:
    """The choices of the first two stages, checked by the config that makes them."""

    score: str = "x"
    select: str = "softmax"
    temperature: float = 1.0
    learn_temperature: bool = False
    top_k: int | None = None
    renormalise: bool = True
    num_tasks: int = 0
    task_dim: int = 0
    load_balance: float = 0.0
    contrastive: float = 0.0
    contrastive_temperature: float = 0.05


@dataclass
class StagedConfig(TaskConditioned):
    """The fields of a method whose stages can be swapped."""

    num_experts: int = field(default=4, metadata={"help": "Experts to choose among. 1 is LoRA."})
    score: str = field(
        default="x",
        metadata={
            "help": "What the router reads: x (the token), h (A x, a smaller router), task (the task's embedding),"
            " x+task, h+task, cosine (between token and keys), uniform (no router), random (fixed random gates)."
        },
    )
    select: str = field(
        default="softmax", metadata={"help": "From scores to gates: softmax, sigmoid, top_k or straight_through."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Scores are divided by it. Small is sharp."})
    learn_temperature: bool = field(
        default=False, metadata={"help": "Train the temperature, from its value on. With score: cosine."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Experts kept for every choice. With select: top_k."})
    renormalise: bool = field(default=True, metadata={"help": "Whether the gates kept by top_k sum to 1 again."})
    task_dim: int | None = field(
        default=None, metadata={"help": "Dimension of a task's embedding. Not set: the layer's input dimension."}
    )
    load_balance: float = field(
        default=0.0, metadata={"help": "Weight of a loss that spreads the tokens over the experts. 0: none."}
    )
    contrastive: float = field(
        default=0.0,
        metadata={
            "help": "Weight of MoRE's contrastive loss on the embeddings, where the score reads the task. 0: none."
        },
    )
    contrastive_temperature: float = field(
        default=0.05, metadata={"help": "Temperature of the contrastive loss. Small is sharp."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("num_experts")
        for name, known in (("score", tuple(SCORES)), ("select", SELECTS)):
            value = getattr(self, name)
            near = did_you_mean(str(value), known)
            self.require(value in known, name, f"must be one of {', '.join(known)}{near}")
        for name in ("temperature", "load_balance", "contrastive", "contrastive_temperature"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            self.require(number, name, "must be a number")
        for name in ("learn_temperature", "renormalise"):
            self.require(isinstance(getattr(self, name), bool), name, "must be true or false")
        for name in ("temperature", "contrastive_temperature"):
            self.require(getattr(self, name) > 0, name, "must be above 0")
        self._check_top_k()
        self.require(
            not self.learn_temperature or self.score == "cosine",
            "learn_temperature",
            "only counts with score: cosine, as every other router learns the size of its scores by itself",
        )
        if self.task_dim is not None:
            self.require_whole("task_dim")
            self.require(
                "task" in SCORES[self.score],
                "task_dim",
                f"only counts where the score reads the task: {self._near_task}",
            )
        if self.score == "uniform":
            for name, default in (("select", "softmax"), ("temperature", 1.0)):
                self.require(
                    getattr(self, name) == default,
                    name,
                    "changes nothing with score: uniform, whose gates are all 1 / num_experts: leave it out, or choose"
                    " another score",
                )
        for name in ("load_balance", "contrastive"):
            self.require(getattr(self, name) >= 0, name, "must not be negative (0 leaves the loss out)")
        self.require(
            self.contrastive == 0 or "task" in SCORES[self.score],
            "contrastive",
            f"compares samples with embeddings of tasks, and score: {self.score} has none: {self._near_task}",
        )
        if self.load_balance > 0:
            self.require(
                bool(SCORES[self.score]) and "h" not in SCORES[self.score],
                "load_balance",
                f"needs a router that reads the layer's input or the task, not score: {self.score}",
            )
            self.require(
                self.select != "sigmoid",
                "load_balance",
                "balances a choice, and sigmoid gates do not compete: use softmax, top_k or straight_through",
            )

    @property
    def _near_task(self) -> str:
        return "choose score: task, x+task or h+task, or leave it out"

    def _check_top_k(self) -> None:
        if self.select != "top_k":
            self.require(self.top_k is None, "top_k", "only counts with select: top_k")
            self.require(self.renormalise, "renormalise", "only counts with select: top_k")
            return
        self.require(self.top_k is not None, "top_k", "must say how many experts select: top_k keeps")
        self.require_whole("top_k")
        assert self.top_k is not None
        if self.num_experts > 1:  # with one there is nothing to choose
            self.require(self.top_k <= self.num_experts, "top_k", f"must be at most num_experts = {self.num_experts}")
            self.require(
                self.top_k > 1 or not self.renormalise or self.score == "random",
                "top_k",
                "of 1 makes every gate 1 once renormalised, and the router learns nothing: set renormalise: false, or"
                " select: straight_through",
            )

    @classmethod
    def learns_tasks(cls, options: dict[str, Any]) -> bool:
        return "task" in SCORES.get(str(options.get("score", cls.score)), ())

    @property
    def needs_tasks(self) -> bool:
        return "task" in SCORES.get(self.score, ()) and self.num_experts > 1

    def stages(self, d: int) -> Stages:
        """The stages for a layer with d input features."""
        return Stages(
            score=self.score,
            select=self.select,
            temperature=self.temperature,
            learn_temperature=self.learn_temperature,
            top_k=self.top_k,
            renormalise=self.renormalise,
            num_tasks=self.num_tasks or 0,
            task_dim=self.task_dim or d,
            load_balance=self.load_balance,
            contrastive=self.contrastive,
            contrastive_temperature=self.contrastive_temperature,
        )


class StagedCore(Core):
    """Choices among n experts. `gate_shape` is (n), or (groups n); gates have the shape (… *gate_shape).

    With one expert there is nothing to choose: no router is made, and every gate is 1.
    """

    linear_scores = True  # except for score: cosine, see __init__

    embedding: nn.Parameter
    """Of the tasks (T task_dim), where the score reads the task."""
    fixed_scores: Tensor

    def __init__(
        self, d: int, gate_shape: tuple[int, ...], *, router_std: float | None, stages: Stages | None, inner: int
    ) -> None:
        """`inner` is the number of rows of A, the router's input size with score: h.

        `router_std` None is Kaiming-uniform, as nn.Linear.
        """
        super().__init__()
        self.stages = stages = stages or Stages()
        self.gate_shape, self.router_std = gate_shape, router_std
        self.num_experts = gate_shape[-1]
        if self.num_experts == 1:
            self.closed_form = False
            return
        self.looks_at = SCORES[stages.score]
        rows = math.prod(gate_shape)
        if "h" in self.looks_at:
            self.router_input = "h"
        if self.looks_at & {"x", "h"}:
            self.router = nn.Parameter(torch.empty(rows, inner if self.router_input == "h" else d))
        if "task" in self.looks_at:
            self.embedding = nn.Parameter(torch.empty(stages.num_tasks, stages.task_dim))
            self.task_router = nn.Parameter(torch.empty(rows, stages.task_dim))
            if stages.contrastive > 0 and stages.task_dim != d:
                self.projection = nn.Parameter(torch.empty(stages.task_dim, d))  # of samples, to be compared
        if stages.score == "random":
            self.register_buffer("fixed_scores", torch.empty(rows))
        if stages.learn_temperature:
            self.log_scale = nn.Parameter(torch.empty(1))
        self.compares_samples = stages.contrastive > 0
        self.has_auxiliary_loss = stages.load_balance > 0 or stages.contrastive > 0
        if stages.score == "cosine":
            self.linear_scores = False
        if stages.score not in ROUTED or stages.select != "softmax":
            self.closed_form = False

    def reset_parameters(self) -> None:
        """Embeddings ~ N(0, 1), so that to a router a task looks like a token of unit variance; scores ~ N(0, 1)."""
        for name in ("router", "task_router"):
            if hasattr(self, name):
                weight = getattr(self, name)
                if self.router_std is None:
                    nn.init.kaiming_uniform_(weight, a=5**0.5)
                else:
                    nn.init.normal_(weight, std=self.router_std)
        for name in ("embedding", "fixed_scores"):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name))
        if hasattr(self, "projection"):
            nn.init.kaiming_uniform_(self.projection, a=5**0.5)
        if hasattr(self, "log_scale"):
            nn.init.zeros_(self.log_scale)

    def router_weight(self) -> Tensor | None:
        return self.router if self.num_experts > 1 and self.stages.score in ROUTED else None

    def task_scores(self, task: Tensor | None) -> Tensor | None:
        if "task" not in self.looks_at:
            return None
        assert task is not None, "the layer resolves the task before it routes"
        return score_task(self.embedding[task], self.task_router)  # (b s)

    def score(self, h: Tensor, x: Tensor) -> Tensor | None:
        if self.num_experts == 1:
            return None
        if self.stages.score == "cosine":
            cosine = score_cosine(x, self.router)
            return cosine * self.log_scale.exp() if self.stages.learn_temperature else cosine
        return super().score(h, x)

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        if self.num_experts == 1:
            return h.new_ones(self.gate_shape)
        if self.stages.score == "uniform":
            return h.new_full(self.gate_shape, 1 / self.num_experts)
        scores = self._scores(h, scores, task_scores)
        stages = self.stages
        if stages.select == "softmax":
            g = select_softmax(scores)
        elif stages.select == "sigmoid":
            g = select_sigmoid(scores)
        elif stages.select == "straight_through":
            g = select_one(scores)
        else:
            assert stages.top_k is not None
            g = select_top_k(scores, stages.top_k, renormalise=stages.renormalise)
        return g.to(h.dtype)

    def _scores(self, like: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        """Scores of tokens, of tasks, of both, or the fixed ones, over the temperature: (… *gate_shape)."""
        if self.stages.score == "random":
            scores = self.fixed_scores.to(torch.promote_types(self.fixed_scores.dtype, torch.float32))
        if task_scores is not None:
            task_scores = per_token(task_scores, like)
            scores = task_scores if scores is None else scores + task_scores
        assert scores is not None
        if self.stages.temperature != 1.0:
            scores = scores / self.stages.temperature
        return scores.view(*scores.shape[:-1], *self.gate_shape)

    @property
    def is_softmax_of_tokens(self) -> bool:
        """Whether the gates are the softmax of the router's scores alone."""
        stages, own = self.stages, type(self)
        plain = stages.select == "softmax" and stages.score in ("x", "h") and stages.temperature == 1.0
        inherited = own.select is StagedCore.select and own._scores is StagedCore._scores
        return plain and inherited and self.num_experts > 1

    def softmax_gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of u = mix(h; softmax(s)) for h and s."""
        raise NotImplementedError

    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        dh, ds = self.softmax_gradients(h, g, du)
        return dh, ds if self.stages.temperature == 1.0 else ds / self.stages.temperature

    def auxiliary_loss(self, x: Tensor, task: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """load_balance · `balance` over the real tokens, and contrastive · MoRE's loss on the embeddings."""
        losses = []
        if self.has_auxiliary_loss and self.stages.load_balance > 0:
            losses.append(self.stages.load_balance * self._balance(x, task, mask))
        if self.has_auxiliary_loss and self.stages.contrastive > 0:
            losses.append(self.stages.contrastive * self._contrast(x, task, mask))
        return sum(losses[1:], losses[0]) if losses else None

    def _contrast(self, x: Tensor, task: Tensor | None, mask: Tensor | None) -> Tensor:
        assert task is not None, "the layer resolves the task before it routes"
        h, task = self._samples(x, task, mask)
        return contrastive_loss(h, self.embedding, task, self.stages.contrastive_temperature)

    def similarity(self, x: Tensor, mask: Tensor | None) -> Tensor:
        tasks = torch.zeros(x.shape[:1], dtype=torch.long, device=x.device)  # not used by the mean of a sample
        return similarity(self._samples(x, tasks, mask)[0], self.embedding)

    def _samples(self, x: Tensor, task: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        h, task = pool(x, task, mask)
        return (score_task(h, self.projection) if hasattr(self, "projection") else h), task

    def _balance(self, x: Tensor, task: Tensor | None, mask: Tensor | None) -> Tensor:
        scores = self._scores(x, self.score(x, x), self.task_scores(task))
        scores = scores.expand(*x.shape[:-1], *self.gate_shape).reshape(-1, *self.gate_shape)
        weight = mask.reshape(-1) if mask is not None and mask.numel() == len(scores) else None
        return balance(scores, self.stages.top_k or 1, weight)

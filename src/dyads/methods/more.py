# SPDX-License-Identifier: Apache-2.0
"""MoRE – mixture of low-rank experts (Findings of ACL 2025, arXiv 2505.22694).

    paper:    delta_t(x) = Σ_{i ≤ k_t} c_i (a_i · x) b_i        k_t = argmax p_t        p_t = softmax(W_g e_t + b_g)
              loss       = the task's + λ · contrastive loss between layers' inputs and embeddings (contrastive.py)
    default:  delta_t(x) = α/r · Σ_i P(k ≥ i) (a_i · x) b_i     k ~ p_t

The ranks of one LoRA are nested experts: expert k is the first k ranks. A gate on the task's learned embedding e_t
picks k_t for every task and layer. For a named task it merges exactly. At full rank and without scaling this is LoRA.

`preset: paper` picks one k_t, trained straight-through, with the linear scaling c_i, which holds back the low ranks
that many tasks share, and with the contrastive loss. By default the gate is soft, the expectation of that sum over
k ~ p_t, without c_i and λ: at the paper's settings the method learns less than LoRA at every learning rate, because c_i
leaves the first of 16 ranks 1/256 (LOG.md, 2026-11-28). Gates are ½ on average, so lora_alpha is twice LoRA's.

Every part is a switch: `embedding` (a table per layer, one for all layers, or none), `embedding_init`, `task_dim`,
`linear_scaling`, `selector` and `contrastive`. The paper's ablations are one switch each.

Ours ↔ theirs: r ↔ r (= number of experts), num_tasks ↔ |T|, contrastive ↔ λ, contrastive_temperature ↔ τ.
We differ: in the public code a guard keeps the trainable branch from ever running, so its ranks stay at what the random
gate first picked, the gate gets no gradient, and the embeddings get none from the task's own loss. Here both do;
`selector="frozen_random"` is what the public code trains. Its contrastive loss takes a sample's first token, which in a
decoder has seen nothing of the sample, and leaves the decoder out; ours takes the mean of the real tokens, in all
adapted layers. The paper's linear scaling, k_t/|T| on the update, grows beyond 1 where there are more ranks than tasks;
`linear_scaling="ranks"` is the public code's, which stays at most 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyads.errors import did_you_mean
from dyads.methods.config import TaskConditioned
from dyads.methods.contrastive import POOLS, contrastive_loss, pool, similarity
from dyads.methods.core import Core
from dyads.methods.gates import per_token, score_task, select_prefix
from dyads.methods.registry import register

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MoRE", "MoREConfig"]

EMBEDDINGS = ("layer", "shared", "none")
INITS = ("kaiming", "normal")
SCALINGS = ("none", "update", "ranks")
SELECTORS = ("soft", "straight_through", "subset", "frozen_random")


@register("more", "mixture of low-rank experts: a gate on the task's embedding picks how many ranks it uses")
@dataclass
class MoREConfig(TaskConditioned):
    """Config of MoRE. Name the tasks, or say how many there are."""

    r: int = field(default=8, metadata={"help": "Largest rank that a task can use."})
    lora_alpha: float | None = field(
        default=32,
        metadata={"help": "The update is scaled by lora_alpha / r; twice LoRA's, as gates are ½ on average."},
    )
    embedding: str = field(
        default="layer",
        metadata={
            "help": "Embeddings of the tasks: a table per layer, one shared by all layers, or none (free scores in the"
            " place of gate and embedding)."
        },
    )
    task_dim: int | None = field(
        default=16,
        metadata={"help": "Dimension of a task's embedding, where there are any. None: the layer's input dimension."},
    )
    embedding_init: str = field(
        default="kaiming", metadata={"help": "Embeddings at the start: normal, N(0, 0.01²), or kaiming (uniform)."}
    )
    linear_scaling: str = field(
        default="none",
        metadata={
            "help": "none, update (k/T on the update of a task with k ranks, of T tasks) or ranks (i/r on row i of A"
            " and column i of B)."
        },
    )
    scaled_tasks: int | None = field(
        default=None,
        metadata={
            "help": "T of linear_scaling: update. Not set: num_tasks. Where a task is added later, it stays as it was."
        },
    )
    selector: str = field(
        default="soft",
        metadata={
            "help": "How scores become ranks: soft (the expected prefix), straight_through (the paper's), subset (any"
            " ranks) or frozen_random (what a random gate picks)."
        },
    )
    contrastive: float = field(
        default=0.0, metadata={"help": "Weight of the contrastive loss (the paper's is 0.1); 0: none."}
    )
    contrastive_temperature: float = field(
        default=0.05, metadata={"help": "Temperature of the contrastive loss. Small is sharp."}
    )
    contrastive_pool: str = field(
        default="mean",
        metadata={"help": "What stands for a sample there: the mean of its tokens, the first, the last."},
    )

    PAPER: ClassVar[dict[str, Any]] = {
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "task_dim": None,
        "embedding_init": "normal",
        "linear_scaling": "ranks",
        "selector": "straight_through",
        "contrastive": 0.1,
    }

    @classmethod
    def paper_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        found = super().paper_options(options)
        if options.get("embedding") == "none":
            found["contrastive"] = 0.0  # there is nothing to compare samples with
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("embedding", EMBEDDINGS),
            ("embedding_init", INITS),
            ("linear_scaling", SCALINGS),
            ("selector", SELECTORS),
            ("contrastive_pool", POOLS),
        ):
            value = getattr(self, name)
            near = did_you_mean(str(value), known)
            self.require(value in known, name, f"must be one of {', '.join(known)}{near}")
        for name in ("contrastive", "contrastive_temperature"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            self.require(number, name, "must be a number")
        self.require(self.contrastive >= 0, "contrastive", "must not be negative (0 leaves the loss out)")
        self.require(self.contrastive_temperature > 0, "contrastive_temperature", "must be above 0")
        self.require(
            self.contrastive == 0 or self.embedding != "none",
            "contrastive",
            "compares samples with embeddings, and with embedding: none there are none: leave it out",
        )
        if self.scaled_tasks is not None:
            self.require_whole("scaled_tasks")
            self.require(self.linear_scaling == "update", "scaled_tasks", "only counts with linear_scaling: update")
        if self.task_dim is not None:
            self.require_whole("task_dim")
        self.require(
            self.embedding != "shared" or self.task_dim is not None,
            "task_dim",
            "must be set with embedding: shared, as layers differ in their input dimension",
        )

    def with_tasks(self, names: Sequence[str]) -> Self:
        larger = super().with_tasks(names)
        if self.linear_scaling == "update" and self.scaled_tasks is None:
            larger.scaled_tasks = self.num_tasks  # else the scale of the present tasks would change
        return larger

    def core(self, d: int) -> MoRE:
        assert self.num_tasks is not None
        return MoRE(
            d,
            self.r,
            self.num_tasks,
            task_dim=self.task_dim,
            embedding=self.embedding,
            embedding_init=self.embedding_init,
            linear_scaling=self.linear_scaling,
            scaled_tasks=self.scaled_tasks,
            selector=self.selector,
            contrastive=self.contrastive,
            temperature=self.contrastive_temperature,
            pool=self.contrastive_pool,
        )


class MoRE(Core):
    """Embeddings of the tasks and a gate on them; gates (b 1… r), a scaled prefix of ones."""

    looks_at = frozenset({"task"})
    linear_scores = True

    embedding: nn.Parameter
    """Of the tasks (T task_dim), where there are any, and where they are not another layer's."""
    projection: nn.Parameter | None
    """(task_dim d), where samples have another dimension than embeddings and are compared with them."""
    fixed_choice: Tensor
    """The ranks of frozen_random as rows of one-hot scores (T r), which every dtype holds exactly."""

    def __init__(
        self,
        d: int,
        r: int,
        num_tasks: int,
        *,
        task_dim: int | None = None,
        embedding: str = "layer",
        embedding_init: str = "normal",
        linear_scaling: str = "ranks",
        scaled_tasks: int | None = None,
        selector: str = "straight_through",
        contrastive: float = 0.0,
        temperature: float = 0.05,
        pool: str = "mean",
    ) -> None:
        super().__init__()
        self.p = self.q = r
        self.num_tasks, self.task_dim = num_tasks, task_dim or d
        self.embeds, self.embedding_init = embedding, embedding_init
        self.linear_scaling, self.selector = linear_scaling, selector
        self.scaled_tasks = scaled_tasks or num_tasks
        self.contrastive, self.temperature, self.pool = contrastive, temperature, pool
        self.has_auxiliary_loss = self.compares_samples = contrastive > 0
        chooses = selector != "frozen_random"
        if embedding != "none" and (chooses or contrastive > 0):
            self.embedding = nn.Parameter(torch.empty(num_tasks, self.task_dim))
        if not chooses:
            self.register_buffer("fixed_choice", torch.empty(num_tasks, r))
        elif embedding == "none":
            self.logits = nn.Parameter(torch.empty(num_tasks, r))
        else:
            self.gate_weight = nn.Parameter(torch.empty(r, self.task_dim))
            self.gate_bias = nn.Parameter(torch.empty(r))
        needs_projection = contrastive > 0 and self.task_dim != d
        self.projection = nn.Parameter(torch.empty(self.task_dim, d)) if needs_projection else None

    def reset_parameters(self) -> None:
        # The public code's: gate weights Kaiming-uniform for a ReLU, gate bias as PyTorch's.
        for name in ("embedding", "logits"):
            if name in self._parameters:
                self._start_embedding(getattr(self, name))
        if hasattr(self, "gate_weight"):
            self._start_gate(self.gate_weight, self.gate_bias)
        if self.projection is not None:
            nn.init.kaiming_uniform_(self.projection, a=5**0.5)
        if self.selector == "frozen_random":
            with torch.no_grad():
                chosen = self._random_scores().argmax(-1)
                self.fixed_choice.copy_(nn.functional.one_hot(chosen, self.p))

    def _start_embedding(self, table: Tensor) -> None:
        if self.embedding_init == "normal":
            nn.init.normal_(table, std=0.01)
        else:
            nn.init.kaiming_uniform_(table, nonlinearity="relu")

    def _start_gate(self, weight: Tensor, bias: Tensor) -> None:
        with torch.no_grad():
            bias.copy_(nn.Linear(self.task_dim, self.p).bias)
        nn.init.kaiming_uniform_(weight, nonlinearity="relu")

    def _random_scores(self) -> Tensor:
        """Scores of all tasks (T r) as they are before training; the embeddings are those there are, or drawn."""
        if self.embeds == "none":
            drawn = torch.empty(self.num_tasks, self.p)
            self._start_embedding(drawn)
            return drawn
        table: Tensor | None = self._parameters.get("embedding")
        if table is None:
            table = torch.empty(self.num_tasks, self.task_dim)
            self._start_embedding(table)
        weight, bias = table.new_empty(self.p, self.task_dim), table.new_empty(self.p)
        self._start_gate(weight, bias)
        return F.linear(table, weight, bias)

    def share_with(self, first: Core) -> None:
        """With embedding: shared, this layer reads the table of the first one."""
        if self.embeds == "shared" and "embedding" in self._parameters and first is not self:
            del self.embedding
            # Not through nn.Module, which would register the first core as a submodule of this one.
            self.__dict__["_first"] = first

    def table(self) -> Tensor:
        """The embeddings of the tasks (T task_dim): this layer's own, or those that all layers share."""
        owner: MoRE = self.__dict__.get("_first", self)
        return self.embedding if owner is self else cast(Tensor, owner(owner.table))

    def scores(self, task: Tensor) -> Tensor:
        """W_g e_t + b_g of the given tasks (b) → (b r), in fp32 or wider; also inside autocast."""
        if self.selector == "frozen_random":
            return self.fixed_choice[task].to(torch.promote_types(self.fixed_choice.dtype, torch.float32))
        if self.embeds == "none":
            return self.logits[task].to(torch.promote_types(self.logits.dtype, torch.float32))
        scores = score_task(self.table()[task], self.gate_weight)
        return scores + self.gate_bias.to(scores.dtype)

    @torch.no_grad()
    def ranks(self) -> Tensor:
        """The rank every task uses in this layer: (T), whole numbers from 1 to r.

        With selector: subset, how many ranks it uses, 0 to r; with soft, which uses all of them, the expected rank.
        """
        device = next(chain(self.parameters(), self.buffers())).device
        scores = self.scores(torch.arange(self.num_tasks, device=device))
        if self.selector == "soft":
            return (scores.softmax(-1) * _numbers(scores)).sum(-1)
        if self.selector == "subset":
            return scores.gt(0).sum(-1)
        return scores.argmax(-1) + 1

    def task_scores(self, task: Tensor | None) -> Tensor:
        """The gates of the given tasks (b) → (b r), with the linear scaling in them."""
        assert task is not None, "the layer resolves the task before it routes"
        scores = self.scores(task)
        by_update = self.linear_scaling == "update"
        if self.selector == "soft":
            # What the update is on average, where rank k is drawn with probability p_k.
            p = scores.softmax(-1)
            g = select_soft_prefix(p * _numbers(p) / self.scaled_tasks if by_update else p)
        else:
            g = select_subset(scores) if self.selector == "subset" else select_prefix(scores)
            if by_update:
                g = g * (g.gt(0).sum(-1, keepdim=True) / self.scaled_tasks)
        return g * (_numbers(g) / self.p).square() if self.linear_scaling == "ranks" else g

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        assert task_scores is not None
        return per_token(task_scores.to(h.dtype), h)  # (b 1… r)

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return h * g

    def auxiliary_loss(self, x: Tensor, task: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """λ · the contrastive loss between this layer's input and the embeddings; None where λ = 0."""
        if not self.has_auxiliary_loss:
            return None
        assert task is not None, "the layer resolves the task before it routes"
        h, task = self._samples(x, task, mask)
        return self.contrastive * contrastive_loss(h, self.table(), task, self.temperature)

    def similarity(self, x: Tensor, mask: Tensor | None) -> Tensor:
        tasks = torch.zeros(x.shape[:1], dtype=torch.long, device=x.device)  # not used for the mean of a sample
        return similarity(self._samples(x, tasks, mask)[0], self.table())

    def _samples(self, x: Tensor, task: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        h, task = pool(x, task, mask, self.pool)
        return (h if self.projection is None else score_task(h, self.projection)), task


def _numbers(like: Tensor) -> Tensor:
    """1, 2, … r, for the last axis of `like`."""
    return torch.arange(1, like.shape[-1] + 1, device=like.device, dtype=like.dtype)


def select_soft_prefix(p: Tensor) -> Tensor:
    """The expected prefix under p (… r), without a hard choice: g_i = Σ_{k ≥ i} p_k."""
    return p.flip(-1).cumsum(-1).flip(-1)


def select_subset(scores: Tensor) -> Tensor:
    """Straight-through choice of any ranks, each by itself: g_i = 1[z_i > 0], with the gradient of sigmoid(z_i)."""
    p = scores.sigmoid()
    return scores.gt(0).to(p.dtype) + (p - p.detach())

# SPDX-License-Identifier: Apache-2.0
"""SMoRA – single-ranked mixture of experts LoRA (Zhao et al., arXiv 2501.15103).

    delta(x) = alpha/k · Σ_{i in top k} g_i (a_i · x) b_i        s = sigmoid(W x) + β,  g_i = k s_i / Σ_{j in top k} s_j

Every rank of one LoRA is an expert, and every token uses top_k of them. The bias β keeps the ranks in use without a
loss: it gets no gradient, and after each training step every rank that was chosen less often than the mean goes up by
bias_rate, and every rank chosen more often goes down.

Ours ↔ theirs: top_k ↔ k (activate_r), router ↔ lora_router, β ↔ lora_biases, bias_rate ↔ bias_update_rate.
We differ: β moves once per step of the optimizer, by the choices of all forward passes since the last one, and not
within the forward pass. So an accumulated batch counts like a whole one, and what gradient checkpointing runs again
uses the β of its first run and counts once. β is kept as a whole number of steps, which half precision cannot round.
All tokens count, padding too, as there. Their router reads the dropped-out input, ours the whole one. Groups of ranks
that share a gate (rank_partition) are left out, and no product is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dyads.errors import ConfigError
from dyads.methods.config import DyadsConfig
from dyads.methods.core import Core
from dyads.methods.registry import register
from dyads.ops import in_backward

__all__ = ["SMoRA", "SMoRAConfig"]


@register("smora", "every rank is an expert: a token uses its top k ranks, kept in balance by a bias")
@dataclass
class SMoRAConfig(DyadsConfig):
    """Config of SMoRA."""

    r: int = field(default=64, metadata={"help": "Ranks, each an expert."})
    lora_alpha: float | None = field(
        default=16, metadata={"help": "The update is scaled by lora_alpha / top_k. None: the scale is 1."}
    )
    top_k: int = field(default=8, metadata={"help": "Ranks that a token uses."})
    bias_rate: float = field(default=1e-5, metadata={"help": "Step of the balance bias. 0: no balancing."})

    PAPER: ClassVar[dict[str, Any]] = {"lora_alpha": 16}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("top_k")
        self.require(self.top_k <= self.r, "top_k", f"must be at most r = {self.r}")
        self.require(
            self.top_k > 1 or self.r == 1,
            "top_k",
            "of 1 makes every gate 1, and the router learns nothing: choose 2 or more",
        )
        number = isinstance(self.bias_rate, (int, float)) and not isinstance(self.bias_rate, bool)
        self.require(number and self.bias_rate >= 0, "bias_rate", "must be a number, 0 or more")

    @property
    def scaling(self) -> float:
        """lora_alpha / top_k, or 1 where lora_alpha is not set."""
        return self.scaling_for(self.top_k)

    def core(self, d: int) -> SMoRA:
        return SMoRA(d, self.r, self.top_k, self.bias_rate)


_STEPS = [0]
"""Steps of this process' optimizers since its first core was made."""


@cache
def _count_steps() -> None:
    """Count the steps of all of PyTorch's optimizers from now on."""

    def stepped(*_: Any) -> None:
        _STEPS[0] += 1

    register_optimizer_step_post_hook(stepped)


class SMoRA(Core):
    """A sigmoid score per rank, of which the largest are kept; gates (… r), zero but for k of them."""

    linear_scores = True
    bias_steps: Tensor
    """β / bias_rate, whole numbers (r)."""
    chosen: Tensor
    """How often every rank was chosen since β last moved (r)."""

    def __init__(self, d: int, r: int, top_k: int, bias_rate: float = 1e-5) -> None:
        super().__init__()
        self.p = self.q = r
        self.top_k, self.bias_rate = top_k, bias_rate
        self.looks_at = frozenset({"x"} if r > 1 else ())
        if r > 1:
            self.router = nn.Parameter(torch.empty(r, d))
            self.register_buffer("bias_steps", torch.zeros(r, dtype=torch.long))
            self.register_buffer("chosen", torch.zeros(r, dtype=torch.long))
        # When β last moved: the router's version and the steps of optimizers. A fused one does not count the version
        # up, and one that is not PyTorch's has no step.
        self._moved = (0, _STEPS[0])
        _count_steps()

    def reset_parameters(self) -> None:
        if self.p > 1:
            nn.init.kaiming_uniform_(self.router, a=5**0.5)
            nn.init.zeros_(self.bias_steps)
            nn.init.zeros_(self.chosen)

    def router_weight(self) -> Tensor | None:
        return self.router if self.p > 1 else None

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        if scores is None:
            return h.new_ones(1)
        counts = self._counts()
        if counts:
            self._move_bias()
        wide = torch.promote_types(scores.dtype, torch.float32)
        s = scores.to(wide).sigmoid() + self.bias_steps * self.bias_rate
        kept = torch.zeros_like(s).scatter(-1, s.topk(self.top_k, dim=-1).indices, 1)
        if counts:
            self.chosen += kept.detach().reshape(-1, self.p).sum(0).long()
        s = s * kept
        return (s * (self.top_k / s.sum(-1, keepdim=True))).to(h.dtype)

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return h * g

    def _counts(self) -> bool:
        """Whether this run of `select` is a forward pass of training, and not its repetition in backward.

        Compiled code may count the repetition too: the signs that move β are those of any multiple.
        """
        if not self.training or self.bias_rate == 0:
            return False
        if "_is_replica" in self.__dict__:
            raise ConfigError(
                "smora cannot train in nn.DataParallel, whose replicas forget what they count after each forward pass:"
                " use DistributedDataParallel, or set bias_rate: 0"
            )
        return torch.compiler.is_compiling() or not in_backward()

    def add_up_processes(self) -> None:
        # Adding up twice is harmless: the signs that move β are those of any multiple.
        if self.p > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.chosen)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph cannot read the version of a weight
    @torch.no_grad()
    def _move_bias(self) -> None:
        """β += bias_rate · sign(mean of chosen − chosen), once after every step of an optimizer.

        The choices of all processes count.
        """
        now = (self.router._version, _STEPS[0])
        if now == self._moved:
            return
        self._moved = now
        self.add_up_processes()
        # The mean may be no whole number; its r-fold is one.
        self.bias_steps += torch.sign(self.chosen.sum() - self.p * self.chosen)
        self.chosen.zero_()

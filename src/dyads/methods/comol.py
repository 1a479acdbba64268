# SPDX-License-Identifier: Apache-2.0
"""CoMoL – core-space mixture of LoRA (Cao et al., Findings of ACL 2026, arXiv 2603.00573).

    delta(x) = alpha/r · B (Σ_i g_i M_i) A x        g = softmax(W h) over the cores, h = A x

All experts share A and B; expert i is a core matrix M_i (r r) between them. The gates weigh whole cores, and the router
reads h, so that num_experts experts cost num_experts · (r² + r) parameters on top of a LoRA. With `score: x` the router
reads the token, the paper's ablation without core-space routing. With one core there is nothing to choose: no router is
made, and the adapter, B M A x, merges exactly (MoSLoRA, arXiv 2406.11909).

Ours ↔ theirs: A ↔ V_Aᵀ (lora_A), B ↔ U_B (lora_B), cores ↔ M_i (the code's lora_Cores hold their transposes), router ↔
W_g (lora_router), num_experts ↔ N, score h ↔ core_router.
We differ: the public code also drops entries of the merged core and of its product with h; ours drops those of A's
input alone. The paper derives A and B as singular vectors, but trains them freely from LoRA's start, and so do we. The
code's optional loss that makes cores orthogonal, off in all its scripts, is left out. The equation is that of the code
and of summaries; the paper's own text was not at hand.

The gates are G itself. `select` may read no parameter, so the cores reach it as the one row of `task_scores`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dyads.methods.config import DyadsConfig
from dyads.methods.core import Core
from dyads.methods.gates import select_softmax
from dyads.methods.registry import register

__all__ = ["CoMoL", "CoMoLConfig"]


@register("comol", "one A and one B, and between them a token's mixture of small core matrices")
@dataclass
class CoMoLConfig(DyadsConfig):
    """Config of CoMoL."""

    r: int = field(default=16, metadata={"help": "Rank of A and B, and size of a core matrix."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout on the input of A, in [0, 1)."})
    num_experts: int = field(default=8, metadata={"help": "Core matrices. 1 is a LoRA with a matrix r×r inside."})
    score: str = field(default="h", metadata={"help": "What the router reads: h (A x), or x (the token)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("num_experts")
        self.require(self.score in ("h", "x"), "score", "must be h (A x) or x (the token)")

    def core(self, d: int) -> CoMoL:
        return CoMoL(d, self.r, self.num_experts, self.score)


class CoMoL(Core):
    """A weighted sum of core matrices for every token; gates (… r·r), the sum row by row."""

    linear_scores = True

    def __init__(self, d: int, r: int, num_experts: int, score: str = "h") -> None:
        super().__init__()
        self.p = self.q = r
        self.cores = nn.Parameter(torch.empty(num_experts, r, r))
        if num_experts > 1:
            self.looks_at, self.router_input = frozenset({score}), score
            self.router = nn.Parameter(torch.empty(num_experts, r if score == "h" else d))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.cores, -(self.p**-0.5), self.p**-0.5)  # Kaiming-uniform, matrix by matrix
        if self.looks_at:
            nn.init.kaiming_uniform_(self.router, a=5**0.5)

    def role(self, name: str) -> str:
        """Cores are part of the update, not of the routing, and do not start at zero: they follow A."""
        return "A" if name == "cores" else super().role(name)

    def router_weight(self) -> Tensor | None:
        return self.router if self.looks_at else None

    def task_scores(self, task: Tensor | None) -> Tensor:
        """The cores, for all samples: (1 n·r·r)."""
        return self.cores.reshape(1, -1)

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        assert task_scores is not None
        cores = task_scores[0].to(h.dtype).view(-1, self.p * self.p)
        return cores[0] if scores is None else select_softmax(scores) @ cores

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return torch.einsum("...jk,...k->...j", g.reshape(*g.shape[:-1], self.p, self.p), h)

    def choices(self, h: Tensor, x: Tensor, task: Tensor | None) -> Tensor:
        scores = self.score(h, x)
        return h.new_ones(1, 1) if scores is None else select_softmax(scores).unsqueeze(-2)

    def gates_of_expert(self, expert: int, like: Tensor) -> Tensor:
        return self.cores[expert].reshape(-1).to(like).expand(like.shape)

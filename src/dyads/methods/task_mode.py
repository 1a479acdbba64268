# SPDX-License-Identifier: Apache-2.0
"""TaskMoDE – MoDE whose routers read the token and the task: MoDE and MoRE in one method.

    delta_t(x) = Σ_k Σ_i R_ik(x, t) Σ_{j in group k} (a_j · x) b_ij        R_·k(x, t) = softmax_i(W_k x + V_k e_t)

MoDE's dyads and routers (arXiv 2408.01505), and MoRE's learned embeddings e_t of the tasks (arXiv 2505.22694), per
layer. Every rank can prefer other experts for another task and still choose token by token. MoRE's contrastive loss can
act on the embeddings too (`contrastive`); it only costs here (LOG.md, 2026-11-28). Neither paper has this method;
`preset: paper` takes MoDE's scale and start, and MoRE's wide embeddings and contrastive loss.

It is MoDE's core with score x+task: num_experts ↔ m, group_size ↔ p, W ↔ router, V ↔ task_router, e_t ↔ embedding. A
softmax does not tell W x + V e_t from a router on the token and the embedding joined. Gates depend on the token, so it
does not merge. With score: task the gates depend on the task alone, and it merges for a task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from dyads.methods.mode import MoDEConfig
from dyads.methods.registry import register

__all__ = ["TaskMoDEConfig"]


@register("task_mode", "MoDE whose routers read the token and the task's embedding")
@dataclass
class TaskMoDEConfig(MoDEConfig):
    """MoDEConfig with another default. Name the tasks, or say how many there are."""

    score: str = field(
        default="x+task", metadata={"help": "What the routers read: x+task, h+task (smaller routers), or task alone."}
    )

    task_dim: int | None = field(
        default=16, metadata={"help": "Dimension of a task's embedding. None: the layer's input dimension."}
    )

    PAPER: ClassVar[dict[str, Any]] = {**MoDEConfig.PAPER, "task_dim": None, "contrastive": 0.1}

    def __post_init__(self) -> None:
        self.require(
            self.score in ("x+task", "h+task", "task"),
            "score",
            "must be x+task, h+task or task: others are method mode",
        )
        super().__post_init__()

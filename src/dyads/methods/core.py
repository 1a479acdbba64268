# SPDX-License-Identifier: Apache-2.0
"""Core of a method: what it computes inside one adapted layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyads.errors import ConfigError
from dyads.ops import require_present

__all__ = ["ROLES", "Core"]

ROLES = ("A", "B", "router", "embedding")
"""Roles of an adapter's parameters, each of which may have its own learning rate."""


class Core(nn.Module):
    """A method inside one adapted layer: its routers, gates and embeddings, and the two functions of the formula.

        delta(x) = scale · B mix(h; g)        g = route(h, x, task)        h = A x

    A core needs `p`, `q`, `looks_at`, `route` (or `select`) and `mix`; autograd then trains every parameter that they
    read. Parameters are cast to the dtype of h where they are used; gates of samples (b …) are spread over tokens by
    `gates.per_token`; every per-task tensor has the tasks as its first axis.

    Faster paths are opt-in: a core whose gates are `select(h, R x, task_scores(task))` writes these three parts instead
    of `route` and declares `linear_scores`; one with the derivative of its gates declares `closed_form`. Both
    declarations are verified when an adapter is created (declarations.py).
    """

    p: int
    """Inner directions: rows of A."""
    q: int
    """Outer directions: columns of B."""
    looks_at: frozenset[str] = frozenset()
    """What the gates depend on, from {"x", "h", "task"}. Merging is exact where it is empty, or is {"task"} and a task
    is named."""
    gate_axes: ClassVar[int] = 1
    """How many trailing axes of the gates belong to one token."""
    linear_scores: bool = False
    """Whether route(h, x, task) = select(h, scores, task_scores(task)) with scores = R x, R h or None."""
    router_input: str = "x"
    """What R = router_weight() multiplies: "x" or "h"."""
    closed_form: bool = False
    """Whether `gradients` is the derivative of mix(h; select(scores + task_scores))."""
    feature_blocks: int = 1
    """Blocks that the layer's features are cut into. With more than one, every inner direction reads one block and
    every outer direction writes one; A (p d/blocks) and B (o/blocks q) are stored without zeros (`block_diagonal`)."""
    has_auxiliary_loss: bool = False
    """Whether `auxiliary_loss` returns a loss."""
    embeddings: ClassVar[frozenset[str]] = frozenset({"embedding", "projection"})
    """Names of the parameters whose role is "embedding"; that of the others is "router"."""
    compares_samples: bool = False
    """Whether task embeddings are trained to resemble their samples, which gives `similarity` a meaning."""

    def forward(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """compute(*args, **kwargs), which reads this core's parameters.

        Hooks around a module's forward bring parameters that are offloaded (accelerate) or sharded (FSDP), so a core is
        read within its own call; its modules are called too. RuntimeError where a parameter or buffer is on the meta
        device even then, and the first argument, a tensor, is not.
        """
        if args:
            require_present(args[0], *self._parameters.values(), *self._buffers.values())
        return compute(*args, **kwargs)

    def route(self, h: Tensor, x: Tensor, task: Tensor | None) -> Tensor:
        """Gates from h (… p), the layer's input x (… d) and the task ids (b). Gates of a token depend on that token
        and its task alone, and must be the same when gradient checkpointing runs the layer again."""
        return self.select(h, self.score(h, x), self.task_scores(task))

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        """Outer coefficients (… q) from the inner ones h (… p) and the gates. Linear in h."""
        raise NotImplementedError

    def router_weight(self) -> Tensor | None:
        """R (s d), or (s p) with router_input "h"; None for a core without a router."""
        return None

    def score(self, h: Tensor, x: Tensor) -> Tensor | None:
        """Scores of the tokens (… s): R x or R h; None without a router."""
        R = self.router_weight()
        seen = h if self.router_input == "h" else x
        return None if R is None else F.linear(seen, R.to(seen.dtype))

    def task_scores(self, task: Tensor | None) -> Tensor | None:
        """What the gates take from the task ids (b): (b …); None for a core that ignores the task.

        With `linear_scores` also the parameters that `select` and `mix` need beside the router, as one row (1 …) for
        all samples.
        """
        return None

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        """Gates from h = A x (… p), the scores of the tokens (… s) and `task_scores`.

        With `linear_scores` it may run again in backward; it and `mix` then read no parameter, as gradients reach their
        arguments only.
        """
        raise NotImplementedError

    def mix_columns(self, z: Tensor) -> Tensor | None:
        """mix(h; select(h, scores, None)) as (q, tokens), from z = [h; scores] as (p + s, tokens); None: not available.

        With `linear_scores`, for tokens without task scores. In decoding, with few tokens, the number of operations is
        what a gate costs; with the tokens as the last axis a softmax over a few experts needs no copy.
        """
        return None

    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of u = mix(h; g) for h (… p) and for the sum of scores and `task_scores` (… s), given du (… q)."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the initial values of routers, gates and embeddings."""

    def share_with(self, first: Core) -> None:
        """Replace what layers of a group share by that of the group's first core, which may be this one.

        Shared parameters stay part of the first core alone, so they are counted, saved and trained once. The groups are
        the config's (`DyadsConfig.sharing_groups`).
        """

    def role(self, name: str) -> str:
        """Role of the parameter of that name, from ROLES."""
        return "embedding" if name in self.embeddings else "router"

    def add_up_processes(self) -> None:
        """Add up what each of several processes counted; called in all of them before the adapter is saved."""

    def set_depth(self, depth: float) -> None:
        """Set the start of what depends on the layer's depth in the model: 0 in the first block, 1 in the last."""

    def auxiliary_loss(self, x: Tensor, task: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """This layer's term of the training loss, weighted already: a scalar, or None.

        x is the layer's input (b t d), or (n d) where the layer sees rows; task (b) holds the ids of the samples, one
        for every row of the first axis of x; mask (b t) is nonzero for real tokens. A mask of another size than x has
        tokens does not apply, and all tokens count.
        """
        return None

    def similarity(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Similarity of the samples of this layer's input to every task: (b T), from -1 to 1. x and mask are those of
        `auxiliary_loss`."""
        raise NotImplementedError

    def stored_width(self, features: int) -> int:
        """Columns of the stored A, or rows of the stored B, for a layer with `features` inputs, or outputs."""
        if features % self.feature_blocks:
            raise ConfigError(
                f"a layer with {features} features cannot be cut into {self.feature_blocks} equal blocks: choose"
                " another number of blocks, or leave the layer out with exclude_modules"
            )
        return features // self.feature_blocks

    def block_diagonal(self, A: Tensor) -> Tensor:
        """A (p d) of the formula from the stored A (p d/blocks): the first p/blocks rows read the first block of the
        features, and so on, with zeros elsewhere. B is stored the same way, transposed. With one block, A itself.
        """
        if self.feature_blocks == 1:
            return A
        blocks = A.view(self.feature_blocks, -1, A.shape[-1]).unbind(0)
        placed: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return placed

    @torch.no_grad()
    def matrix_of(self, A: Tensor, task: Tensor | None) -> Tensor:
        """G (q p) for A (p d) and one task's id (1), in fp32 or wider, with the gates of `route`.

        For gates that look at the task, or (task is None) at nothing.
        """
        assert not self.looks_at & {"x", "h"}, "gates that depend on the input have no matrix"
        wide = torch.promote_types(A.dtype, torch.float32)
        g = self.route(A.new_zeros(1, self.p, dtype=wide), A.new_zeros(1, A.shape[1], dtype=wide), task)
        return self.matrix(g.to(wide)).reshape(self.q, self.p)

    def choices(self, h: Tensor, x: Tensor, task: Tensor | None) -> Tensor:
        """Weights of the experts (… K n): K choices, each among n experts, or among n ranks. The arguments are those
        of `route`; by default the gates, whose last axis is that of the experts."""
        g = self.route(h, x, task)
        return g if self.gate_axes == 2 else g.unsqueeze(-2)

    def gates_of_expert(self, expert: int, like: Tensor) -> Tensor:
        """Gates of the shape of `like` that use one expert alone, with the weight 1 in every choice."""
        alone = torch.zeros_like(like)
        alone[..., expert] = 1
        return alone

    def task_embeddings(self) -> Tensor | None:
        """Learned embeddings of the tasks (T …), also where they are another layer's; None for a core without any."""
        owner: Core = self.__dict__.get("_first", self)
        return owner._parameters.get("embedding")

    def matrix(self, g: Tensor) -> Tensor:
        """G = mix(I; g), shape (… q p): the method written out for these gates, since mix is linear in h."""
        identity = torch.eye(self.p, dtype=g.dtype, device=g.device)
        rows = self.mix(identity, g.unsqueeze(-1 - self.gate_axes))
        return rows.transpose(-1, -2)

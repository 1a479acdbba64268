# SPDX-License-Identifier: Apache-2.0
"""How is a fast path switched off?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["FAST", "PLAIN", "Switch", "runs_plainly", "seen_by_profilers", "unwatched"]


class Switch:
    """True, but within `off()`."""

    def __init__(self) -> None:
        self._on = True

    def __bool__(self) -> bool:
        return self._on

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within this context it is False; contexts may be nested."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before


PLAIN = (Tensor, torch.nn.Parameter)
"""Types whose numbers are where they seem to be; other kinds of tensors may keep theirs elsewhere."""

FAST = Switch()
"""Whether `fused` and `Held` are anything else than `dyadic`: see `plain`."""


def unwatched() -> bool:
    """Whether nobody looks on who may keep what an operation gave, as selective checkpointing does."""
    return torch._C._len_torch_dispatch_stack() == 0


def runs_plainly() -> bool:
    """Whether operations do what they are called for and nothing else: nobody traces, transforms or watches them.

    What is no operation of PyTorch, or one that it has no derivative for, must not take the place of others then.
    """
    return (
        unwatched()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def seen_by_profilers(name: str) -> AbstractContextManager[object]:
    """What is no operation of PyTorch, a profiler does not see by itself."""
    if torch._C._autograd._profiler_enabled():
        return torch.profiler.record_function(f"dyads::{name}")
    return nullcontext()

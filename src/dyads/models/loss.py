# SPDX-License-Identifier: Apache-2.0
"""Loss within a model's call, so that wrappers for several processes see every parameter that it depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dyads.tuner.routing import auxiliary_loss

__all__ = ["loss_in_call"]


def loss_in_call(
    unwrapped: nn.Module, model: nn.Module, inputs: dict[str, Any], loss: Callable[[Any], Tensor]
) -> tuple[Tensor, Tensor]:
    """(`loss` of the output, auxiliary loss) of one call of `model`, which is `unwrapped` or a wrapper of it.

    DistributedDataParallel waits for the gradients of the parameters that the output of its call depends on. Heads and
    auxiliary losses have some of their own, so the call returns the two losses in place of its output.
    """

    def in_place_of_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> tuple[Tensor, Tensor]:
        return loss(output), auxiliary_loss(unwrapped)

    hook = unwrapped.register_forward_hook(in_place_of_output)
    try:
        found: tuple[Tensor, Tensor] = model(**inputs)
    finally:
        hook.remove()
    return found

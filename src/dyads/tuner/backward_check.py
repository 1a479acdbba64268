# SPDX-License-Identifier: Apache-2.0
"""Check of the first backward pass: adapters that got no gradient, and an auxiliary loss that is in no loss.

Both train something else than the config says, without an error: a layer whose output another module does not use, and
a trainer that builds its loss from logits and drops the loss that the model returned. The user is warned once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Variable

__all__ = ["BackwardCheck"]


class BackwardCheck:
    """Observes one forward pass of training and its backward pass; `done` is called after the first that reaches it."""

    def __init__(self, done: Callable[[], None]) -> None:
        self._done = done
        self._layers: dict[str, bool] = {}  # called layers, and whether their gradient came
        self._losses = self._loss_came = self._started = self._ended = False
        self._handles: list[Any] = []

    def called(self, layer: str, B: Tensor) -> None:
        """Note that a layer was called with this B."""
        if B.requires_grad and layer not in self._layers:
            self._layers[layer] = False
            self._handles.append(_hook(B, partial(self._layer_reached, layer)))

    def returned(self, output: Any, loss: Tensor | None) -> None:
        """Note what the model returns, and the auxiliary loss of its layers."""
        found = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
        for value in found:
            if isinstance(value, Tensor) and value.requires_grad:
                _hook(value, self._start)
        if loss is not None and loss.requires_grad:
            self._losses = True
            _hook(loss, self._loss_reached)

    def end(self) -> None:
        """Take the hooks off again."""
        self._ended = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _layer_reached(self, layer: str, gradient: Tensor) -> None:
        self._layers[layer] = True

    def _loss_reached(self, gradient: Tensor) -> None:
        self._loss_came = True

    def _start(self, gradient: Tensor) -> None:
        if not self._started:
            self._started = True
            Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]  # as DDP and FSDP do

    def _finish(self) -> None:
        if self._ended:
            return
        self.end()
        without = [name for name, came in self._layers.items() if not came]
        if len(without) == len(self._layers):
            return  # gradients of something else than the adapter, such as of the inputs
        self._done()
        if without:
            shown = ", ".join(without[:4]) + (f", … ({len(without)} in all)" if len(without) > 4 else "")
            warnings.warn(
                f"adapted layers were called in the first training step and got no gradient, so they do not train:"
                f" {shown}. The loss does not depend on their output; leave them out with exclude_modules",
                stacklevel=2,
            )
        if self._losses and not self._loss_came:
            warnings.warn(
                "the adapter has an auxiliary loss (contrastive, load_balance), and the loss of the first training step"
                " does not contain it: the trainer builds its own from the model's outputs. Train with"
                " dyads.with_tasks(TrainerClass), add dyads.auxiliary_loss(model) to it, or set the weight of the"
                " auxiliary loss to 0",
                stacklevel=2,
            )


def _hook(tensor: Tensor, function: Callable[[Tensor], None]) -> Any:
    return tensor.register_hook(function)  # type: ignore[no-untyped-call]

# SPDX-License-Identifier: Apache-2.0
"""Check of the first backward pass: adapters that got no gradient, and an auxiliary loss that is in no loss.

Both train something else than the config says, without an error: a layer whose output another module does not use, and
a trainer that builds its loss from logits and drops the loss that the model returned. The user is warned once.

`BackwardCheck` notes calls of layers in a forward pass. Compiled code notes none, so `GradientWatch` hooks the
parameters beforehand; an adapter in compiled code without a gradient was not called, or the loss does not depend on it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["BackwardCheck", "GradientWatch"]


class GradientWatch:
    """Observes the first gradients of a model's adapters, and reports those in compiled code that got none."""

    def __init__(self, done: Callable[[], None]) -> None:
        self.called: set[str] = set()
        """Layers that ran uncompiled."""
        self._done = done
        self._layers: dict[str, bool] = {}  # and whether their gradient came
        self._handles: list[Any] = []
        self._watched = WeakTensorKeyDictionary()

    def watch(self, layer: str, B: Tensor) -> None:
        """Observe this B of a layer, where it trains."""
        if B.requires_grad and B not in self._watched:
            self._watched[B] = layer
            self._layers.setdefault(layer, False)
            hook = B.register_post_accumulate_grad_hook(partial(self._reached, layer))  # type: ignore[no-untyped-call]
            self._handles.append(hook)

    def compiled(self) -> bool:
        """Whether a gradient of a layer in compiled code came."""
        return any(came and layer not in self.called for layer, came in self._layers.items())

    def end(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()

    def _reached(self, layer: str, B: Tensor) -> None:
        if B.grad is None:
            return  # what a compiled backward returns for a B that the loss does not depend on
        if not any(self._layers.values()):
            _after_backward(self._finish)
        self._layers[layer] = True

    def _finish(self) -> None:
        if not self.compiled():  # BackwardCheck's, or a part of the model by itself
            self._layers = dict.fromkeys(self._layers, False)
            return
        self._done()
        without = [layer for layer, came in self._layers.items() if not came and layer not in self.called]
        if without:
            warnings.warn(
                "adapted layers got no gradient in the first training step, part of which ran in compiled code:"
                f" {_shown(without)}. If another module reads their weight, or the loss does not depend on their"
                " output, leave them out with exclude_modules",
                stacklevel=2,
            )


class BackwardCheck:
    """Observes one forward pass of training and its backward pass; `done` is called after the first that reaches it."""

    def __init__(self, gradients: GradientWatch, done: Callable[[], None]) -> None:
        self._gradients = gradients
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
            _after_backward(self._finish)

    def _finish(self) -> None:
        if self._ended:
            return
        self.end()
        without = [name for name, came in self._layers.items() if not came]
        if len(without) == len(self._layers) and not self._gradients.compiled():
            return  # gradients of something else than the adapter, such as of the inputs
        self._done()
        if without:
            warnings.warn(
                f"adapted layers were called in the first training step and got no gradient, so they do not train:"
                f" {_shown(without)}. The loss does not depend on their output; leave them out with exclude_modules",
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


def _after_backward(function: Callable[[], None]) -> None:
    Variable._execution_engine.queue_callback(function)  # type: ignore[attr-defined]  # as DDP and FSDP do


def _shown(layers: list[str]) -> str:
    return ", ".join(layers[:4]) + (f", … ({len(layers)} in all)" if len(layers) > 4 else "")


def _hook(tensor: Tensor, function: Callable[[Tensor], None]) -> Any:
    return tensor.register_hook(function)  # type: ignore[no-untyped-call]

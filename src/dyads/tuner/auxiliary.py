# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses of one forward pass: collected from its layers, and added to the loss that the model returns."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dyads.errors import RoutingError
from dyads.methods.core import Core
from dyads.ops import in_backward
from dyads.tuner.batch_tasks import BatchTasks

__all__ = ["TrainingCall", "collect_loss"]

_IGNORED = -100  # the label of positions that are not learned, everywhere in transformers


class TrainingCall:
    """One call of a model in training: the masks of its tokens, and the auxiliary losses of its layers so far."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1:
            kwargs = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        self.losses: list[Tensor] = []
        self.tasks: BatchTasks | None = None
        self._loss: Tensor | None = None
        self._model = model
        self._mask = _as_mask(kwargs.get("attention_mask"))
        self._labels = kwargs.get("labels")
        self._items = kwargs.get("num_items_in_batch")
        self._decoder_mask = self._decoder_tokens = None
        self._two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        if self._two_sided:
            self._decoder_mask = _as_mask(kwargs.get("decoder_attention_mask"))
            given = [self._decoder_mask, kwargs.get("decoder_input_ids"), self._labels]
            self._decoder_tokens = next((t.numel() for t in given if isinstance(t, Tensor)), None)

    def mask(self, x: Tensor, of_decoder: bool) -> Tensor | None:
        """The mask (b t) of a layer's tokens, nonzero for real ones; None where the call gives none.

        In the decoder of an encoder-decoder, cross-attention has layers on the tokens of either side, which are
        distinguished by their number. Where both sides have equally many, all count as the decoder's.
        """
        tokens = x.shape[:-1].numel()
        if of_decoder and tokens == self._decoder_tokens:
            if self._decoder_mask is None and isinstance(self._labels, Tensor) and self._labels.numel() == tokens:
                self._decoder_mask = _as_mask(self._labels != _IGNORED)
            mask = self._decoder_mask
        else:
            mask = self._mask if self._mask is not None and self._mask.numel() == tokens else None
        return None if mask is None else mask.to(x.device, non_blocking=True)  # layers may be on several devices

    def loss(self) -> Tensor | None:
        """Mean over the layers; None where they have no losses."""
        if self._loss is None and self.losses:
            self._loss = torch.stack([loss.to(self.losses[0].device) for loss in self.losses]).mean()
        return self._loss

    def share(self) -> Tensor | float:
        """The share of this call in a batch that is accumulated from several calls: 1, or its share of the labels.

        Where the model's loss is divided by num_items_in_batch, the labels of the whole batch, the Trainer divides it
        no further. All other losses are means over the call, which the Trainer averages.
        """
        if self._items is None or not isinstance(self._labels, Tensor):
            return 1.0
        # Many models accept that number without using it, T5 for one. Those that use it pass it to `loss_function`.
        code = getattr(inspect.unwrap(type(self._model).forward), "__code__", None)
        if code is None or "loss_function" not in code.co_names:
            return 1.0
        # As the Trainer counts them (transformers 5.23): a decoder by itself predicts the next token.
        loss = getattr(self._model, "loss_function", None)
        shifts = getattr(loss, "__name__", "") == "ForCausalLMLoss" and not self._two_sided
        labels = self._labels[..., 1:] if shifts else self._labels
        share: Tensor = labels.ne(_IGNORED).sum() / self._items
        return share

    def added_to(self, output: Any, loss: Tensor) -> Any:
        """The model's output with an auxiliary loss in its loss; None where it has no loss."""
        if isinstance(output, dict):
            if output.get("loss") is None:
                return None
            output["loss"] = self._sum(output["loss"], loss)
            return output
        if isinstance(output, tuple) and self._labels is not None:
            return (self._sum(output[0], loss), *output[1:])
        return None

    def _sum(self, of_model: Tensor, loss: Tensor) -> Tensor:
        return of_model + (loss * self.share()).to(of_model)


def collect_loss(
    call: TrainingCall | None, adapter: str, core: Core, x: Tensor, task: Tensor | None, of_decoder: bool
) -> None:
    """Collect the auxiliary loss of a layer with input x, in training.

    The second run of gradient checkpointing computes it again, as it must, and does not collect it again. Without a
    `call`, a part of the model is called by itself, and nothing is collected.
    """
    again = not torch.compiler.is_compiling() and in_backward()
    if call is None and not again:
        return
    if not torch.is_grad_enabled():
        if call is not None:
            raise RoutingError(
                f"adapter '{adapter}' has an auxiliary loss, and one of its layers runs without gradients inside a"
                " forward pass with gradients, so that its loss would be left out. If that is gradient"
                " checkpointing, choose the kind that is not reentrant (use_reentrant=False)"
            )
        return
    if x.numel() == 0:
        return
    mask = None if call is None else call.mask(x, of_decoder)
    if call is not None and call.tasks is not None and task is not None:
        x, task, mask = call.tasks.samples(adapter, x, task, mask, needed=core.compares_samples)
    loss = core(core.auxiliary_loss, x, task, mask)
    if loss is not None and call is not None and not again:
        call.losses.append(loss)


def _as_mask(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

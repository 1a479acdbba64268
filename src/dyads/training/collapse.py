# SPDX-License-Identifier: Apache-2.0
"""Warning in training when routers collapse: one expert gets nearly all weight, so the others hardly learn.

At ten steps of a training the gates of its batch are read, which changes neither the losses nor the random numbers. A
router is collapsed with more than DOMINANT of the weight on one expert (analysis/routing.py). Gates that look at the
task alone are read for all tasks, others only where batches mix tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dyads.analysis.gates import shares, watch
from dyads.analysis.routing import DOMINANT
from dyads.errors import notice
from dyads.runs.folder import RunFolder
from dyads.tuner.layer import adapted_layers

__all__ = ["CollapseCallback", "collapsed"]

_CHECKS = 10


class CollapseCallback(TrainerCallback):  # type: ignore[misc]
    """Warns once, and logs the collapsed layers with their dominant expert and its weight."""

    def __init__(self, folder: RunFolder, steps: int, *, mixed: bool) -> None:
        self.folder, self.mixed = folder, mixed
        self.every = max(1, steps // _CHECKS)
        self.warned = False
        self.sums: dict[str, Tensor] = {}
        self.watching = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.mixed and not self.warned and (state.global_step + 1) % self.every == 0:
            self.sums = {}
            self.watching.enter_context(watch(model, self._add))

    def _add(self, name: str, weights: Tensor, matrices: Callable[[], Tensor]) -> None:
        if len(weights):
            self.sums[name] = self.sums.get(name, torch.zeros(())) + shares(weights.cpu().double()).sum(0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.watching.close()
        if self.warned or state.global_step % self.every:
            return
        means = {name: total / total.sum(-1, keepdim=True).clamp_min(1e-12) for name, total in self.sums.items()}
        means |= _of_tasks(model)
        if found := collapsed(means):
            self.warned = True
            self._warn(state.global_step, found, len(means))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watching.close()

    def _warn(self, step: int, found: Mapping[str, tuple[int, float]], layers: int) -> None:
        listed = {name: {"expert": expert, "weight": round(weight, 4)} for name, (expert, weight) in found.items()}
        self.folder.append_log({"event": "collapsed", "step": step, "layers": listed})
        name, (expert, weight) = next(iter(found.items()))
        notice(
            f"step {step}: collapsed routers in {len(found)} of {layers} layers, where one expert gets over"
            f" {100 * DOMINANT:.0f} % of the weight ({name}: expert {expert}, {100 * weight:.0f} %) and the others"
            " hardly learn. A lower train.rates.router keeps routers near their start; the option load_balance of mode,"
            " molora and task_mode spreads the weight."
            f" `dyads inspect {self.folder.path} --what routing` shows all layers"
        )


def collapsed(means: Mapping[str, Tensor]) -> dict[str, tuple[int, float]]:
    """(expert, weight) of the most dominant expert of every layer that has one, from its mean weights (K n)."""
    found = {}
    for name, weights in means.items():
        weight, at = weights.flatten().max(0)
        if weights.shape[-1] > 1 and weight > DOMINANT:
            found[name] = (int(at) % weights.shape[-1], float(weight))
    return found


@torch.no_grad()
def _of_tasks(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """By layer, the mean weights (K n) over all tasks where gates look at the task alone."""
    found = {}
    for path, layer in adapted_layers(model, adapter).items():
        weights = layer.choices_of_tasks(adapter)
        if weights is not None:
            found[path] = shares(weights.double().cpu()).mean(0)
    return found

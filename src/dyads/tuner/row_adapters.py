# SPDX-License-Identifier: Apache-2.0
"""Rows with different adapters in one forward pass, for a server of several runs with one base model.

Every layer computes its base once for all rows, and adds each adapter to its own rows:

    y[rows of a] = W x[rows of a] + b + delta_a(x[rows of a])        y of rows without an adapter = W x + b

`take` puts the adapter of another model into a model of this kind: the methods of this library, and PEFT's LoRA, which
is the formula with gates of 1. In evaluation only, and for layers that see the rows of the batch as their first axis.

Private names of PEFT relied on here (checked with PEFT 0.21): the class `lora.layer.Linear`, its `lora_variant`,
`lora_bias` and `scaling`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dyads.methods.core import Core
from dyads.tuner.batch_tasks import BatchTasks
from dyads.tuner.layer import DyadsLinear, LowRankFactor
from dyads.tuner.routing import Routing, RowGroup, RowGroups

__all__ = ["RowAdapters", "changes_base"]

_STARTS = ("gaussian", "eva", "orthogonal")
"""Starts of PEFT's LoRA that leave the weights of the base as they are."""


def changes_base(config: PeftConfig) -> bool:
    """Whether loading an adapter changes its base model: its biases, or its weights, less what A and B start with."""
    start = getattr(config, "init_lora_weights", True)
    return getattr(config, "bias", "none") != "none" or (isinstance(start, str) and start not in _STARTS)


class _LoRA(Core):
    """LoRA as a core: no gates, and no parameters beside A and B."""

    linear_scores = True

    def __init__(self, r: int) -> None:
        super().__init__()
        self.p = self.q = r

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        return h

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return h

    def mix_columns(self, z: Tensor) -> Tensor:
        return z


class RowAdapters:
    """A base model whose rows have adapters by name; it starts without any."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.routing = model, Routing()
        self.device = next(model.parameters()).device

    def take(self, name: str, other: PeftModel) -> bool:
        """Move the adapter of a model with the same base; False, and nothing changes, where it cannot be mixed."""
        config = other.peft_config["default"]
        beside = getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None)
        if beside or changes_base(config):
            return False
        base = other.get_base_model()
        found = {key: m for key, m in base.named_modules() if isinstance(m, BaseTunerLayer)}
        if not all(isinstance(m, DyadsLinear) or _is_lora(m) for m in found.values()):
            return False
        if not _see_rows(other, list(found.values())):
            return False
        for key, layer in found.items():
            parent, _, child = key.rpartition(".")
            mine: Any = self.model.get_submodule(key)
            if not isinstance(mine, DyadsLinear):
                mine = DyadsLinear(mine, self.routing, key)
                setattr(self.model.get_submodule(parent), child, mine.eval())
            _move(layer, mine, name)
        return True

    @contextmanager
    def use(self, adapters: Sequence[str | None], tasks: Sequence[str | int | None]) -> Iterator[None]:
        """Within this context the rows of a forward pass have these adapters, and their gates these tasks."""
        rows: dict[str, list[int]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                rows.setdefault(adapter, []).append(row)
        groups = []
        for adapter, own in rows.items():
            given = [task for row in own if (task := tasks[row]) is not None]
            groups.append(
                RowGroup(
                    adapter,
                    None if len(own) == len(adapters) else torch.tensor(own, device=self.device),
                    BatchTasks(given) if adapter in self.routing.names else None,
                )
            )
        here = self.routing.here
        here.rows = RowGroups(len(adapters), groups)
        try:
            yield
        finally:
            here.rows = None


@torch.inference_mode()
def _see_rows(model: PeftModel, layers: Sequence[nn.Module]) -> bool:
    """Whether all these layers see the rows of a batch; some models put all tokens on one axis before a layer."""
    ids = torch.zeros(2, 3, dtype=torch.long, device=next(model.parameters()).device)
    seen: set[nn.Module] = set()

    def see(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0].shape[:2] == ids.shape:
            seen.add(layer)

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        with model.disable_adapter():  # gates may want a task
            model.get_base_model()(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return seen == set(layers)


def _is_lora(layer: BaseTunerLayer) -> bool:
    """Whether a layer is PEFT's LoRA and nothing else."""
    return (
        type(layer) is LoraLinear
        and isinstance(layer.get_base_layer(), nn.Linear)
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and not layer.merged
    )


def _move(layer: Any, mine: DyadsLinear, name: str) -> None:
    adapter = "default"
    if isinstance(layer, DyadsLinear):
        mine.lora_core[name] = layer.lora_core[adapter]
        mine.method_key[name] = layer.method_key[adapter]
        if adapter in layer.routing.names:
            mine.routing.names[name] = layer.routing.names[adapter]
    else:
        mine.lora_core[name] = _LoRA(layer.r[adapter]).eval()
        mine.method_key[name] = "lora"
    mine.r[name], mine.scaling[name] = layer.r[adapter], layer.scaling[adapter]
    mine.lora_dropout[name] = nn.Identity()
    mine.lora_A[name], mine.lora_B[name] = _factor(layer.lora_A[adapter]), _factor(layer.lora_B[adapter])


def _factor(linear: nn.Linear) -> LowRankFactor:
    """A or B, under whose call the weight is found."""
    if isinstance(linear, LowRankFactor):
        return linear
    factor = LowRankFactor(linear.in_features, linear.out_features)
    factor.weight = linear.weight
    return factor

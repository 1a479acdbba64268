# SPDX-License-Identifier: Apache-2.0
"""Adding a task to a trained adapter, and the similarity of new samples to its known tasks.

What a task-conditioned method keeps per task (embeddings, scores, matrices) has the tasks as its first axis. A new task
is one more row at its end, in every layer; everything else stays as it is, and the outputs of the other tasks stay
bit-identical.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dyads.errors import ConfigError, RoutingError, did_you_mean
from dyads.methods.config import DyadsConfig, TaskConditioned
from dyads.methods.core import Core
from dyads.methods.declarations import check_declarations
from dyads.tuner.auxiliary import TrainingCall
from dyads.tuner.batch_tasks import TaskLike
from dyads.tuner.layer import DyadsLinear

__all__ = ["STARTS", "add_task", "similarity_to_tasks"]

STARTS = ("mean", "fresh")
"""Starts of a new task beside the rows of known ones: their mean, or newly drawn."""


@torch.no_grad()
def add_task(model: nn.Module, name: str, start: str | int = "mean", adapter: str = "default") -> tuple[Tensor, ...]:
    """Add task `name` to the adapter of a PEFT model, and return its tensors with a row per task.

    start: the row of the new task in each layer is the `mean` over the tasks there are, `fresh` (drawn as at the start
    of a training), or that of a known task: its name, or its id, for one that is itself called so. Returned are the
    tensors (T+1 …), parameters and buffers, that have a row for every task; the last is the new one. They are new
    objects: make an optimizer afterwards.

    The adapter's config then names the new task, so that it is saved and loaded as any other. ConfigError for a method
    that looks at no task, a name that is known already, a start that is not, and an adapter that is merged.
    """
    layers = _layers(model, adapter)
    config = _config(model, adapter)
    known = layers[0].routing.names.get(adapter)
    if not isinstance(config, TaskConditioned) or known is None:
        raise ConfigError(
            f"adapter '{adapter}' ({config.key}) does not look at the task, so there is no task to add: it serves any"
            " task as it is"
        )
    if name in known:
        raise ConfigError(f"adapter '{adapter}' knows a task '{name}' already: give the new one another name")
    if isinstance(start, int) and not 0 <= start < len(known):
        raise ConfigError(f"a new task cannot start from task {start}: ids go from 0 to {len(known) - 1}")
    if isinstance(start, str) and start not in (*STARTS, *known):
        raise ConfigError(f"a new task cannot start from '{start}'{did_you_mean(start, (*STARTS, *known))}")
    if any(adapter in layer.merged_adapters for layer in layers):
        raise ConfigError(f"adapter '{adapter}' is merged into the model: call unmerge_adapter() before adding a task")
    if isinstance(start, str) and start not in STARTS:
        start = known.index(start)
    larger = config.with_tasks((*known, name))
    paths = {module: path for path, module in model.named_modules()}
    cores = {paths[layer]: larger.for_layer(layer.key).core(layer.in_features) for layer in layers}
    check_declarations(next(iter(cores.values())), layers[0].in_features, len(known) + 1)
    larger.share(cores)
    grown = [
        tensor
        for layer, core in zip(layers, cores.values(), strict=True)
        for tensor in _replace(layer, adapter, core, start, len(known))
    ]
    model.peft_config[adapter] = larger  # type: ignore[index,operator]  # the one there may be another adapter's too
    routing = layers[0].routing
    routing.names[adapter] = tuple(larger.task_names or ())
    routing.forget_weights()
    return tuple(grown)


def _replace(layer: DyadsLinear, adapter: str, core: Core, start: str | int, count: int) -> list[Tensor]:
    """Put the larger core in the place of the layer's, with its values; gives the tensors that have a row per task."""
    before = layer.core(adapter)
    core.train(before.training)
    if start == "fresh":
        core.reset_parameters()
    grown = []
    values = dict(before.named_parameters()) | dict(before.named_buffers())
    for key, fresh in (dict(core.named_parameters()) | dict(core.named_buffers())).items():
        value = values[key]
        new = value.detach().clone()
        if fresh.shape != value.shape:
            row = fresh[count:].to(value) if start == "fresh" else _row(value, start)
            new = torch.cat([new, row])
        owner, _, leaf = key.rpartition(".")
        module = core.get_submodule(owner)
        if isinstance(value, nn.Parameter):
            new = nn.Parameter(new, requires_grad=value.requires_grad)
        setattr(module, leaf, new)
        if fresh.shape != value.shape:
            grown.append(new)
    layer.lora_core[adapter] = core
    return grown


def _row(value: Tensor, start: str | int) -> Tensor:
    """(1 …): the mean over the tasks, in fp32 or wider, or one task's own."""
    if isinstance(start, int):
        return value[[start]]
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    return wide.mean(0, keepdim=True).to(value.dtype)


@torch.no_grad()
def similarity_to_tasks(
    model: nn.Module, inputs: dict[str, Any], task: TaskLike | None, adapter: str = "default"
) -> Tensor:
    """How much the samples of a batch are like every task: (b T), means over the layers of cos(h_s, e_t).

    The scores that MoRE's contrastive loss compares (methods/contrastive.py), where the samples run through the model
    as `task`. `inputs` is what the model is called with, without labels. ConfigError where the adapter's embeddings
    were not trained with that loss, and so mean nothing beside a sample.
    """
    layers = _layers(model, adapter)
    if not any(layer.core(adapter).compares_samples for layer in layers):
        raise ConfigError(
            f"adapter '{adapter}' ({_config(model, adapter).key}) was not trained with a contrastive loss, so its tasks"
            " cannot be compared with samples"
        )
    call = TrainingCall(_base(model), (), inputs)
    found: list[Tensor] = []

    def compare(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, DyadsLinear)
        core = layer.core(adapter)
        if core.compares_samples:
            found.append(core(core.similarity, args[0], call.mask(args[0], layer.of_decoder)))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(compare).remove)
        was_training = model.training
        model.eval()
        try:
            model(**inputs, **({} if task is None else {"task": task}))
        finally:
            model.train(was_training)
    return torch.stack([score.to(found[0].device) for score in found]).mean(0)


def _base(model: nn.Module) -> nn.Module:
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner


def _layers(model: nn.Module, adapter: str) -> list[DyadsLinear]:
    layers = [m for m in model.modules() if isinstance(m, DyadsLinear) and adapter in m.lora_A]
    if not layers:
        there = sorted({name for m in model.modules() if isinstance(m, DyadsLinear) for name in m.lora_A})
        raise RoutingError(
            f"{type(model).__name__} has no dyads adapter '{adapter}'" + did_you_mean(adapter, there) * bool(there)
        )
    return layers


def _config(model: nn.Module, adapter: str) -> DyadsConfig:
    configs: dict[str, DyadsConfig] = model.peft_config  # type: ignore[assignment]
    return configs[adapter]

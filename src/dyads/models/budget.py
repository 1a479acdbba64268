# SPDX-License-Identifier: Apache-2.0
"""Parameter budgets: the trainable parameters of a method on a model, and the r or num_experts for a given number.

No weights are loaded: the model is built from its config on PyTorch's meta device, the adapter is added as for
training, and the parameters that require gradients are counted, with routers, gates and embeddings.

`paper:mode-gemma-2b` is the model behind the "Add. Params" columns of the MoDE paper. Those of its 27 distinct rows
follow, to the last digit, from q adapted per head (8 × 2048→256), k and v (2048→256) and o (2048→2048) in 18 layers,
over 1,981,884,416 non-embedding parameters, times 4, a factor that the paper does not explain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from peft import get_peft_model
from torch import nn

from dyads.errors import ConfigError, DyadsError
from dyads.methods import build_config
from dyads.models.load import auto_class, kind_of, model_config, without_pooler

__all__ = ["NEAR", "PAPER_GEMMA_2B", "WHERE", "Count", "adapted_skeleton", "alternatives", "count", "solve"]

NEAR = 0.03
"""Relative distance from a budget that counts as equal."""
WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
"""Options that choose modules, whatever the method."""

PAPER_GEMMA_2B = "paper:mode-gemma-2b"
_PAPER_BASE, _PAPER_FACTOR, _PAPER_LAYERS = 1_981_884_416, 4, 18
_LARGEST, _LARGEST_FIRST = 1 << 20, 1 << 10
_MOST_TRIED = 64
"""Values of an option that `alternatives` tries."""


@dataclass(frozen=True)
class Count:
    """The parameters of a method on a model."""

    trainable: int
    base: int
    """Parameters of the base model (in the paper's count without embeddings)."""
    factor: int = 1
    """Factor of percentages; 1 for every real model."""
    per_module: dict[str, int] = field(default_factory=dict)

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of the base model's."""
        return 100 * self.factor * self.trainable / self.base


def count(model: str, method: str, options: dict[str, Any], task_names: Sequence[str] = ()) -> Count:
    """Trainable parameters of a method on a model: a hub id, a folder, a packaged model or the paper's."""
    options = dict(options)
    base, factor = _base_size(model), 1
    if model == PAPER_GEMMA_2B:
        options.setdefault("target_modules", ["q", "k", "v", "o"])
        base, factor = _PAPER_BASE, _PAPER_FACTOR
        if isinstance(options["target_modules"], list):  # q is adapted per head
            options["target_modules"] = [
                n for t in options["target_modules"] for n in ([f"q{i}" for i in range(8)] if t == "q" else [t])
            ]
    adapted, _ = adapted_skeleton(model, method, options, task_names)
    per_module = {
        name.removeprefix("base_model.model."): sum(p.numel() for p in module.parameters() if p.requires_grad)
        for name, module in adapted.named_modules()
        if hasattr(module, "base_layer")
    }
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Count(trainable, base, factor, per_module)


def adapted_skeleton(
    model: str, method: str, options: dict[str, Any], task_names: Sequence[str] = (), **how: Any
) -> tuple[nn.Module, str]:
    """(the model with an adapter on the meta device, its kind); `how` is passed on to the model (dtype, attention)."""
    config = build_config(method, options, tuple(task_names) or None)
    skeleton, kind = _skeleton(model, **how)
    try:
        with torch.device("meta"):
            return get_peft_model(skeleton.requires_grad_(False), config), kind
    except DyadsError:
        raise
    except ValueError as error:  # PEFT finds no such target modules
        raise ConfigError(f"method '{method}' does not fit model '{model}': {error}") from error


def solve(
    model: str,
    method: str,
    options: dict[str, Any],
    *,
    free: Literal["r", "num_experts"],
    parameters: int,
    task_names: Sequence[str] = (),
) -> tuple[int, Count]:
    """The value of `free` whose number of parameters is closest to the budget, and its count.

    By bisection, since counts grow with r and with num_experts. Only values that the method's config accepts are tried:
    multiples of group_size, at least top_k. ConfigError if the smallest needs more than twice the budget.
    """
    if free == "num_experts" and not hasattr(build_config(method, options, tuple(task_names) or None), free):
        raise ConfigError(f"{method} has no num_experts, so only r can meet a budget: leave r out")

    @cache
    def at(n: int) -> Count:
        return count(model, method, {**options, free: n}, task_names)

    value = _nearest(lambda n: at(n).trainable, method, options, free, parameters, task_names)
    return value, at(value)


def _nearest(
    trainable: Callable[[int], int],
    method: str,
    options: dict[str, Any],
    free: Literal["r", "num_experts"],
    parameters: int,
    task_names: Sequence[str],
) -> int:
    """The accepted value of `free` whose `trainable` is closest to the budget."""
    first, step = _accepted(method, options, free, task_names)

    def at(n: int) -> int:
        return trainable(first + (n - 1) * step)

    low = 1
    if at(low) > 2 * parameters:
        raise ConfigError(
            f"no {free} meets a budget of {parameters:,}: {method} with {free}={first} already has"
            f" {at(low):,} parameters. Adapt fewer modules, or raise the budget"
        )
    high = 2
    while at(high) < parameters:
        low, high = high, 2 * high
        if high > _LARGEST:
            raise ConfigError(f"{free} up to {_LARGEST:,} does not reach a budget of {parameters:,}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < parameters else (low, middle)
    best = min((low, high), key=lambda n: abs(at(n) - parameters))
    return first + (best - 1) * step


def alternatives(
    model: str,
    method: str,
    options: dict[str, Any],
    *,
    free: Literal["r", "num_experts"],
    parameters: int,
    task_names: Sequence[str] = (),
) -> list[tuple[dict[str, Any], Count]]:
    """Pairs of r and num_experts (two or more) near a budget, with their counts: at most three.

    The option that `solve` keeps is varied up to twice its value, and the free one solved for each. The pairs within
    `NEAR` of the budget that change that option least come first; without any, there is the closest pair alone. Every
    layer is counted by its shape, so that this takes seconds; the counts of the pairs returned are exact.
    """
    other = "r" if free == "num_experts" else "num_experts"
    kept = getattr(build_config(method, options, tuple(task_names) or None), other, None)
    if kept is None:
        return []
    by_shape = _CountByShape(model, method, options, task_names)
    found = []
    smallest = {"r": 1, "num_experts": 2}  # one expert is LoRA
    for value in range(smallest[other], max(2 * kept, smallest[other]) + 1)[:_MOST_TRIED]:
        tried = {**options, other: value}

        def trainable(n: int, tried: dict[str, Any] = tried) -> int:
            return by_shape({**tried, free: n})

        try:
            n = _nearest(trainable, method, tried, free, parameters, task_names)
            if n >= smallest[free]:
                found.append((abs(trainable(n) - parameters), abs(value - kept), {**tried, free: n}))
        except ConfigError:  # a value that the config refuses, or too large at any value of the free one
            continue
    near = sorted((f for f in found if f[0] <= NEAR * parameters), key=lambda f: (f[1], f[0]))
    chosen = near[:3] or sorted(found, key=lambda f: f[:2])[:1]
    return [(pair, count(model, method, pair, task_names)) for _, _, pair in chosen]


class _CountByShape:
    """Trainable parameters of a method with other options on the same modules, one layer of each shape being built."""

    def __init__(self, model: str, method: str, options: dict[str, Any], task_names: Sequence[str]) -> None:
        self.method, self.task_names = method, task_names
        adapted, _ = adapted_skeleton(model, method, options, task_names)
        self.shapes: Counter[tuple[int, int]] = Counter()
        for module in adapted.modules():
            base = getattr(module, "base_layer", None)
            if base is not None and hasattr(base, "in_features") and hasattr(base, "out_features"):
                self.shapes[base.in_features, base.out_features] += 1
        self.others = 0
        self.others = sum(p.numel() for p in adapted.parameters() if p.requires_grad) - self(options)
        """Parameters outside of linear layers; below 0 where layers share some."""

    def __call__(self, options: dict[str, Any]) -> int:
        mine = {key: value for key, value in options.items() if key not in WHERE}
        config = build_config(self.method, {**mine, "target_modules": ["layer"]}, tuple(self.task_names) or None)
        total = self.others
        for (d, o), times in self.shapes.items():
            with torch.device("meta"):
                alone = get_peft_model(nn.ModuleDict({"layer": nn.Linear(d, o, bias=False)}), copy(config))
            total += times * sum(p.numel() for p in alone.parameters() if p.requires_grad)
        return total


def _accepted(method: str, options: dict[str, Any], free: str, task_names: Sequence[str]) -> tuple[int, int]:
    """The smallest value of `free` that the method's config accepts, and the step to the next.

    If it accepts none, another option is wrong: the config's own error is raised.
    """
    found: list[int] = []
    refusal: ConfigError | None = None
    for n in range(1, _LARGEST_FIRST + 1):
        try:
            build_config(method, {**options, free: n}, tuple(task_names) or None)
        except ConfigError as error:
            refusal = refusal or error
            continue
        found.append(n)
        if len(found) == 2:
            break
    if not found:
        assert refusal is not None
        raise refusal
    return found[0], found[-1] - found[0] or 1


class _PaperLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for head in range(8):
            self.add_module(f"q{head}", nn.Linear(2048, 256, bias=False))
        self.k, self.v = nn.Linear(2048, 256, bias=False), nn.Linear(2048, 256, bias=False)
        self.o = nn.Linear(2048, 2048, bias=False)


def _skeleton(model: str, **how: Any) -> tuple[nn.Module, str]:
    """(the model on the meta device, its kind), built for each call because adapters are added to it in place."""
    with torch.device("meta"):
        if model == PAPER_GEMMA_2B:
            return nn.ModuleList(_PaperLayer() for _ in range(_PAPER_LAYERS)), "paper"
        config = _config(model)
        kind = kind_of(model, config)
        skeleton: nn.Module = auto_class(kind).from_config(config, trust_remote_code=False, **how)
        return (without_pooler(skeleton) if kind == "encoder" else skeleton), kind


@lru_cache(maxsize=4)
def _config(model: str) -> Any:
    return model_config(model)


@lru_cache(maxsize=4)
def _base_size(model: str) -> int:
    return sum(p.numel() for p in _skeleton(model)[0].parameters())

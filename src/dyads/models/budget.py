# SPDX-License-Identifier: Apache-2.0
"""Parameter budgets: the trainable parameters of a method on a model, and the r or num_experts for a given number.

No weights are loaded: the model is built from its config on PyTorch's meta device, the adapter is added as for
training, and the parameters that require gradients are counted, with routers, gates and embeddings.

`paper:mode-gemma-2b` is the model behind the "Add. Params" columns of the MoDE paper. Its 27 distinct percentages
follow, to the last digit, from q adapted per head (8 × 2048→256), k and v (2048→256) and o (2048→2048) in 18 layers,
over 1,981,884,416 non-embedding parameters, times 4, a factor that the paper does not explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from peft import get_peft_model
from torch import nn

from dyads.errors import ConfigError, DyadsError
from dyads.methods import build_config
from dyads.models.load import auto_class, kind_of, model_config, without_pooler

__all__ = ["PAPER_GEMMA_2B", "Count", "count", "solve"]

PAPER_GEMMA_2B = "paper:mode-gemma-2b"
_PAPER_BASE, _PAPER_FACTOR, _PAPER_LAYERS = 1_981_884_416, 4, 18
_LARGEST, _LARGEST_FIRST = 1 << 20, 1 << 10


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
    config = build_config(method, options, tuple(task_names) or None)
    try:
        with torch.device("meta"):
            adapted = get_peft_model(_skeleton(model), config)
    except DyadsError:
        raise
    except ValueError as error:  # PEFT finds no such target modules
        raise ConfigError(f"method '{method}' does not fit model '{model}': {error}") from error
    per_module = {
        name.removeprefix("base_model.model."): sum(p.numel() for p in module.parameters() if p.requires_grad)
        for name, module in adapted.named_modules()
        if hasattr(module, "base_layer")
    }
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Count(trainable, base, factor, per_module)


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
    first, step = _accepted(method, options, free, task_names)

    @cache
    def at(n: int) -> Count:
        return count(model, method, {**options, free: first + (n - 1) * step}, task_names)

    low = 1
    smallest = at(low)
    if smallest.trainable > 2 * parameters:
        raise ConfigError(
            f"no {free} meets a budget of {parameters:,}: {method} with {free}={first} already has"
            f" {smallest.trainable:,} parameters. Adapt fewer modules, or raise the budget"
        )
    high = 2
    while at(high).trainable < parameters:
        low, high = high, 2 * high
        if high > _LARGEST:
            raise ConfigError(f"{free} up to {_LARGEST:,} does not reach a budget of {parameters:,}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle).trainable < parameters else (low, middle)
    best = min((low, high), key=lambda n: abs(at(n).trainable - parameters))
    return first + (best - 1) * step, at(best)


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


def _skeleton(model: str) -> nn.Module:
    """The model on the meta device, built for each call because adapters are added to it in place."""
    with torch.device("meta"):
        if model == PAPER_GEMMA_2B:
            return nn.ModuleList(_PaperLayer() for _ in range(_PAPER_LAYERS))
        config = _config(model)
        kind = kind_of(model, config)
        skeleton: nn.Module = auto_class(kind).from_config(config)
        return without_pooler(skeleton) if kind == "encoder" else skeleton


@lru_cache(maxsize=4)
def _config(model: str) -> Any:
    return model_config(model)


@lru_cache(maxsize=4)
def _base_size(model: str) -> int:
    return sum(p.numel() for p in _skeleton(model).parameters())

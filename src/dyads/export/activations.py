# SPDX-License-Identifier: Apache-2.0
"""Passes of data through an adapted model: moments of its layers' inputs, and LoRAs in the place of its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyads.export.lora import Lora
from dyads.tuner import DyadsLinear

__all__ = [
    "Moments",
    "groups_of",
    "inner",
    "inner_factor",
    "mean_matrices",
    "moments",
    "outer_factor",
    "replaced",
    "watched",
]

_ADAPTER = "default"
_MOST = 2**24
"""The most numbers of G, over tokens, that are formed at once."""

Batch = Mapping[str, Any]
"""Arguments of the model's call; no sequence is padded, so that every token counts."""


@contextmanager
def replaced(layers: Mapping[str, DyadsLinear], lora: Lora) -> Iterator[None]:
    """Within this context the layers that a LoRA names compute it in place of their adapter, as PEFT does."""
    for module, down in lora.downs.items():
        layers[module].__dict__["forward"] = _LoraForward(layers[module], down, lora.ups[module])
    try:
        yield
    finally:
        for module in lora.downs:
            layers[module].__dict__.pop("forward", None)


@dataclass(frozen=True)
class _LoraForward:
    layer: DyadsLinear
    down: Tensor
    up: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer.base_layer(x)
        down, up = (t.to(x.device, torch.float32) for t in (self.down, self.up))
        return out + F.linear(F.linear(x.float(), down), up).to(out.dtype)


@torch.no_grad()
def inner(layer: DyadsLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """(u, gates) of a layer's input within a forward pass, in float32: u (… q) = mix(A x; gates)."""
    core, (A, _) = layer.core(_ADAPTER), layer.factors(_ADAPTER)
    task = layer.routing.ids(_ADAPTER, x) if "task" in core.looks_at else None
    x = x.float()
    h = F.linear(x, A.float())
    g = core.route(h, x, task)
    return core.mix(h, g), g


def outer_factor(layer: DyadsLinear) -> Tensor:
    """B (o q) with the adapter's scale multiplied in."""
    return layer.scaling[_ADAPTER] * layer.factors(_ADAPTER)[1].float()


def inner_factor(layer: DyadsLinear) -> Tensor:
    """A (p d)."""
    return layer.factors(_ADAPTER)[0].float()


@contextmanager
def watched(layers: Mapping[str, DyadsLinear], see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Within this context `see` gets every layer's path and input, before the layer computes."""
    hooks = [layer.register_forward_pre_hook(_Watch(name, see)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _Watch:
    name: str
    see: Callable[[str, Tensor], object]

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.see(self.name, args[0])


def groups_of(model: nn.Module, layers: Mapping[str, DyadsLinear], batch: Batch) -> list[tuple[list[str], int]]:
    """The layers in the order of their first calls, those with the same input together, with their number of calls."""
    calls: list[tuple[str, Tensor]] = []  # holds the inputs, so that no two have the same id
    with watched(layers, lambda name, x: calls.append((name, x))), torch.no_grad():
        model(**batch)
    groups: list[list[str]] = []
    seen: set[str] = set()
    for at, (name, x) in enumerate(calls):
        if name in seen:
            continue
        seen.add(name)
        if at and calls[at - 1][1] is x and calls[at - 1][0] in groups[-1]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return [(group, sum(name in group for name, _ in calls)) for group in groups]


@torch.no_grad()
def mean_matrices(model: nn.Module, layers: Mapping[str, DyadsLinear], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """E[G] (q p) of every layer over all tokens, with the adapter in use; G = mix(I; g)."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        core = layers[name].core(_ADAPTER)
        _, g = inner(layers[name], x)
        rows = g.flatten(0, -1 - core.gate_axes) if g.ndim > core.gate_axes else g.unsqueeze(0)
        count, total = x[..., 0].numel(), torch.zeros(core.q, core.p, dtype=torch.float64, device=x.device)
        for some in torch.split(rows, max(1, _MOST // (core.q * core.p))):
            total += core.matrix(some).reshape(-1, core.q, core.p).double().sum(0)
        # Gates of samples have one row for all tokens of a sample, and all samples of a batch are of one length.
        sums[name] = sums.get(name, 0) + total * (count / len(rows))
        tokens[name] = tokens.get(name, 0) + count

    with watched(layers, see):
        for batch in batches:
            model(**batch)
    return {name: value / tokens[name] for name, value in sums.items()}


@dataclass
class Moments:
    """Sums over tokens for layers with the same input; their memory does not grow with the data."""

    xx: Tensor | None = None
    """Σ x xᵀ (d d)"""
    ux: dict[str, Tensor] = field(default_factory=dict)
    """Σ u xᵀ (q d), by layer"""
    tokens: int = 0


class _ReachedError(Exception):
    """The layers of a group have been called: the rest of the forward pass is not needed."""


@torch.no_grad()
def moments(
    model: nn.Module, layers: Mapping[str, DyadsLinear], group: Sequence[str], calls: int, batches: Sequence[Batch]
) -> Moments:
    """The moments of a group of layers (`groups_of`), each forward pass ending where its last layer is called."""
    found, left = Moments(), calls

    def see(name: str, x: Tensor) -> None:
        nonlocal left
        rows = x.flatten(0, -2).double()
        if name == group[0]:
            found.xx = rows.T @ rows if found.xx is None else found.xx.addmm_(rows.T, rows)
            found.tokens += len(rows)
        u = inner(layers[name], x)[0].flatten(0, -2).double()
        found.ux[name] = u.T @ rows if name not in found.ux else found.ux[name].addmm_(u.T, rows)
        left -= 1
        if left == 0:
            raise _ReachedError

    with watched({name: layers[name] for name in group}, see):
        for batch in batches:
            left = calls
            with suppress(_ReachedError):
                model(**batch)
    return found

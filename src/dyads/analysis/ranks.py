# SPDX-License-Identifier: Apache-2.0
"""Ranks: what every task chose in every layer, and the effective rank of its update.

The effective rank of ΔW_t = B G_t A is exp(H), H being the entropy of its singular values over their sum (Roy and
Vetterli, 2007): k for k equal singular values, and 1 for a single one. Where gates look at the layer's input, G_t is
the mean over the task's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dyads.analysis.gates import ALL_TASKS, INSTANCES, TaskGates, exact_gates, gates_of
from dyads.analysis.inspection import inspect, kinds_of
from dyads.analysis.named_array import NamedArray, Table
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter, SavedLayer

__all__ = ["Ranks", "answer", "effective_rank", "ranks", "ranks_of", "reduced"]

QUESTION = "ranks that tasks chose, and effective ranks of their updates"


@dataclass(frozen=True)
class Ranks:
    """Ranks by task and layer."""

    effective: NamedArray
    """(task layer): effective rank of the update; 0 for an update of zero."""
    chosen: NamedArray | None
    """(task layer): the rank that the task chose; None where tasks choose none."""
    largest: NamedArray
    """(layer): the rank of A and B, which bounds the others."""
    notes: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """Means by task and kind of module."""
        tables = []
        kinds = np.array(kinds_of(self.effective.axes["layer"])[0])
        names = list(dict.fromkeys(kinds.tolist()))
        for title, array in (("Ranks that tasks chose", self.chosen), ("Effective rank of the update", self.effective)):
            if array is None:
                continue
            rows = []
            for task, values in zip(array.axes["task"], array.values, strict=True):
                by_kind = [f"{values[kinds == kind].mean():.1f}" for kind in names]
                rows.append((task, f"{values.mean():.1f}", *by_kind))
            largest = sorted({int(n) for n in self.largest.values})
            of = f"{largest[0]}" if len(largest) == 1 else f"{largest[0]} to {largest[-1]}"
            tables.append(Table(f"{title}, of {of}: mean over layers", ("task", "all", *names), tuple(rows)))
        return tuple(tables)


def answer(run: Path, instances: int = INSTANCES) -> Ranks:
    """The answer of `dyads inspect --what ranks`."""
    return ranks(run, instances)


def ranks(run: str | Path | RunFolder, instances: int = INSTANCES) -> Ranks:
    """The ranks of a run's adapter; where gates look at the layer's input, over `instances` of each task."""
    path = run.path if isinstance(run, RunFolder) else Path(run)
    adapter = SavedAdapter.read(path)
    if adapter.layers[0].core is None:
        return _of_lora(adapter)
    return ranks_of(gates_of(path, instances) if adapter.looks_at & {"x", "h"} else exact_gates(adapter))


def ranks_of(gates: TaskGates) -> Ranks:
    """The ranks in gates that were read."""
    layers = gates.adapter.layers
    names = [layer.module for layer in layers]
    effective = torch.stack([effective_rank(layer, G) for layer, G in zip(layers, gates.matrices, strict=True)], dim=1)
    inspection = inspect(gates.adapter)
    chosen = None
    if inspection.chooses:
        by_layer = [module.ranks for module in inspection.modules]
        chosen = NamedArray.of(np.array(by_layer).T, task=gates.tasks, layer=names)
    largest = [min(layer.core.p, layer.core.q) if layer.core else 0 for layer in layers]
    return Ranks(
        NamedArray.of(effective.numpy(), task=gates.tasks, layer=names),
        chosen,
        NamedArray.of(largest, layer=names),
        tuple(gates.notes),
    )


def _of_lora(adapter: SavedAdapter) -> Ranks:
    layers = [layer for layer in adapter.layers if layer.A is not None]
    names = [layer.module for layer in layers]
    identities = [torch.eye(len(layer.A))[None] for layer in layers if layer.A is not None]
    effective = torch.stack([effective_rank(layer, G) for layer, G in zip(layers, identities, strict=True)], dim=1)
    largest = [G.shape[-1] for G in identities]
    note = "no gates: PEFT's own LoRA is the same update for every task"
    return Ranks(
        NamedArray.of(effective.numpy(), task=[ALL_TASKS], layer=names),
        None,
        NamedArray.of(largest, layer=names),
        (note,),
    )


def reduced(layer: SavedLayer, G: Tensor) -> Tensor:
    """R_B G R_Aᵀ (… p' q'), which has the singular values of B G A (B = Q_B R_B, Aᵀ = Q_A R_A)."""
    assert layer.A is not None
    assert layer.B is not None
    right = torch.linalg.qr(layer.A.double().T, mode="r")[1]
    left = torch.linalg.qr(layer.B.double(), mode="r")[1]
    product: Tensor = left @ G.double() @ right.T
    return product


def effective_rank(layer: SavedLayer, G: Tensor) -> Tensor:
    """Effective rank of B G A for every G (T q p): (T)."""
    values = torch.linalg.svdvals(reduced(layer, G))
    total = values.sum(-1, keepdim=True)
    part = values / total.clamp_min(1e-300)
    spread = -torch.special.xlogy(part, part).sum(-1)
    return torch.where(total[..., 0] > 0, spread.clamp(0, math.log(max(values.shape[-1], 2))).exp(), 0.0)

# SPDX-License-Identifier: Apache-2.0
"""Redundancy: how much the subspaces of experts, of tasks and of single adapters overlap.

An update ΔW reads its row space (the down-projection) and writes its column space (the up-projection). The overlap of
two subspaces with orthonormal bases U and V of k and l vectors is |UᵀV|² / min(k, l), the mean squared cosine of
their principal angles: 1 where one contains the other, 0 where they are orthogonal, and max(k, l) / d on average for
random ones in d dimensions.

    experts    ΔW of one expert alone: B G_e A, where e has the weight 1 in every choice
    tasks      ΔW of a task: B G_t A; only where gates look at the task alone
    adapters   ΔW of several LoRAs, such as one trained for each task
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dyads.analysis.gates import check_equal_sizes, exact_gates
from dyads.analysis.inspection import kinds_of
from dyads.analysis.named_array import NamedArray, Table
from dyads.analysis.ranks import reduced
from dyads.errors import RunError
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter, SavedLayer

__all__ = ["Redundancy", "answer", "overlap", "overlap_of_adapters", "redundancy"]

QUESTION = "overlap of the projections of experts, and of tasks"

SIDES = ("down", "up")
_SMALL = 1e-6
"""Singular values below this part of the largest are zero."""


@dataclass(frozen=True)
class Redundancy:
    """Overlaps of subspaces, of down- and up-projections."""

    experts: NamedArray | None
    """(side layer expert other); nan for an expert whose update is zero. None with one expert."""
    tasks: NamedArray | None
    """(side layer task other); None where gates look at the layer's input, or at nothing."""
    notes: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """Mean overlap of different experts, and of different tasks, by kind of module."""
        rows = []
        for what, array in (("experts", self.experts), ("tasks", self.tasks)):
            if array is None:
                continue
            names = array.axes["layer"]
            kinds = np.array(kinds_of(names)[0])
            different = ~np.eye(array.values.shape[-1], dtype=bool)
            for kind in dict.fromkeys(kinds.tolist()):
                values = [array.at(side=side).values[kinds == kind][:, different] for side in SIDES]
                shown = (f"{np.nanmean(v):.2f}" if np.isfinite(v).any() else "–" for v in values)
                rows.append((f"{what}, {kind}", *shown))
        title = "Overlap of subspaces: 0 orthogonal, 1 one contains the other"
        return (Table(title, ("between", "down-projections", "up-projections"), tuple(rows)),)


def answer(run: Path) -> Redundancy:
    """The answer of `dyads inspect --what redundancy`."""
    return redundancy(run)


def redundancy(run: str | Path | RunFolder, *, tasks: bool = True) -> Redundancy:
    """The overlaps of an adapter's experts and tasks; no model is loaded.

    Without `tasks` only experts are compared: for T tasks in L layers the overlaps are 2 L T² numbers.
    """
    path = run.path if isinstance(run, RunFolder) else Path(run)
    adapter = SavedAdapter.read(path)
    if adapter.layers[0].core is None:
        raise RunError(
            f"the adapter in '{path}' is PEFT's own LoRA, which has neither experts nor tasks to compare;"
            " dyads.analysis.redundancy.overlap_of_adapters compares several of them"
        )
    names = [layer.module for layer in adapter.layers]
    experts = _of_experts(adapter, names)
    of_tasks = None
    notes = []
    if tasks and adapter.looks_at == {"task"} and len(adapter.task_names) > 1:
        gates = exact_gates(adapter)
        found = [overlap(layer, G) for layer, G in zip(adapter.layers, gates.matrices, strict=True)]
        of_tasks = NamedArray.of(
            np.stack(found, axis=1), side=SIDES, layer=names, task=adapter.task_names, other=adapter.task_names
        )
    elif adapter.looks_at & {"x", "h"}:
        notes.append("gates depend on the layer's input: an update belongs to a token, so tasks are not compared")
    if experts is None and of_tasks is None:
        raise RunError(f"the adapter in '{path}' has one expert and one update for all tasks: nothing can overlap")
    return Redundancy(experts, of_tasks, tuple(notes))


def _of_experts(adapter: SavedAdapter, names: Sequence[str]) -> NamedArray | None:
    found = []
    for layer in adapter.layers:
        core, A = layer.core, layer.A
        assert core is not None
        assert A is not None
        task = torch.tensor([0]) if "task" in core.looks_at else None
        h, x = A.new_zeros(1, core.p, dtype=torch.float32), A.new_zeros(1, A.shape[1], dtype=torch.float32)
        with torch.no_grad():
            like, n = core.route(h, x, task), core.choices(h, x, task).shape[-1]
            if n < 2:
                return None
            matrices = [core.matrix(core.gates_of_expert(e, like)).reshape(core.q, core.p) for e in range(n)]
        found.append(overlap(layer, torch.stack(matrices)))
    check_equal_sizes(adapter, [(array.shape[-1],) for array in found])
    experts = range(found[0].shape[-1])
    return NamedArray.of(np.stack(found, axis=1), side=SIDES, layer=names, expert=experts, other=experts)


def overlap(layer: SavedLayer, G: Tensor) -> np.ndarray:
    """Overlaps of the subspaces of B G A for all pairs of G (n q p): (side n n), nan for an update of zero."""
    U, values, Vh = torch.linalg.svd(reduced(layer, G), full_matrices=False)
    kept = (values > _SMALL * values.max().clamp_min(1e-300)).double()  # (n k)
    return np.stack([_overlaps(basis, kept) for basis in (Vh.transpose(1, 2), U)])


def _overlaps(basis: Tensor, kept: Tensor) -> np.ndarray:
    """|UᵀV|² / min(k, l) for all pairs of bases (n d k), of whose columns those that are `kept` (n k) count."""
    basis = basis * kept[:, None]
    squares = torch.einsum("ndk,mdl->nmkl", basis, basis).square().sum((2, 3))
    count = kept.sum(1)
    fewer = torch.minimum(count[:, None], count[None])
    found: np.ndarray = torch.where(fewer > 0, squares / fewer.clamp_min(1), torch.nan).numpy()
    return found


def overlap_of_adapters(adapters: Mapping[str, str | Path | SavedAdapter]) -> NamedArray:
    """Overlaps of the updates of several LoRAs by name: (side layer adapter other).

    The down-projections of LoRAs that started alike may still agree where their up-projections do not.
    """
    read = {name: a if isinstance(a, SavedAdapter) else SavedAdapter.read(a) for name, a in adapters.items()}
    layers = {name: {layer.module: layer for layer in a.layers if layer.A is not None} for name, a in read.items()}
    if len(read) < 2:
        raise RunError(f"an overlap needs two adapters or more, got {len(read)}")
    first = next(iter(layers.values()))
    for name, own in layers.items():
        if own.keys() != first.keys():
            raise RunError(f"adapter '{name}' adapts other layers than the first; compare runs of one model")
        if any(layer.core is not None and layer.core.looks_at for layer in own.values()):
            raise RunError(f"adapter '{name}' has gates, so no single update; compare LoRAs")
    found = []
    for module in first:
        of_module = [own[module] for own in layers.values()]
        downs = [layer.A.T for layer in of_module if layer.A is not None]
        ups = [layer.B for layer in of_module if layer.B is not None]
        found.append(np.stack([_of_spans(downs), _of_spans(ups)]))
    return NamedArray.of(np.stack(found, axis=1), side=SIDES, layer=list(first), adapter=list(read), other=list(read))


def _of_spans(columns: Sequence[Tensor]) -> np.ndarray:
    """Overlaps of the spaces that the columns of several matrices (d k) span."""
    result = np.full((len(columns), len(columns)), np.nan)
    bases = []
    for matrix in columns:
        U, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
        bases.append(U[:, values > _SMALL * values.max().clamp_min(1e-300)])
    for i, one in enumerate(bases):
        for j, other in enumerate(bases):
            fewer = min(one.shape[1], other.shape[1])
            if fewer:
                result[i, j] = float((one.T @ other).square().sum()) / fewer
    return result

# SPDX-License-Identifier: Apache-2.0
"""Similarity of tasks, from their gates, their embeddings and their updates, with a dendrogram of each.

    gates        cosine of the weights of all experts in all layers
    embeddings   cosine of the learned embeddings, mean over layers
    updates      cosine of ΔW_t = B G_t A over all layers: ⟨ΔW_s, ΔW_t⟩ / (|ΔW_s| |ΔW_t|)

Where gates look at the layer's input, G_t is the mean over the task's tokens. An update of zero has the similarity 0
to others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from dyads.analysis.gates import INSTANCES, TaskGates, gates_of
from dyads.analysis.named_array import NamedArray, Table
from dyads.errors import RunError
from dyads.runs.folder import RunFolder

__all__ = ["TaskSimilarity", "answer", "dendrogram", "task_similarity", "task_similarity_of"]

QUESTION = "similarity of the tasks, from gates, embeddings and updates"


@dataclass(frozen=True)
class TaskSimilarity:
    """How alike tasks are to an adapter."""

    similarity: NamedArray
    """(by task other), from -1 to 1; `by` is gates, embeddings or updates, as far as the method has them."""
    merges: NamedArray
    """(by merge part): average linkage of 1 - similarity, a row for every merge with the two groups' numbers, their
    distance and the number of tasks. Groups below the number of tasks are tasks; merge i makes group tasks + i."""
    notes: tuple[str, ...]

    def order(self, by: str) -> list[int]:
        """Tasks in the order of the dendrogram's leaves."""
        merges = self.merges.at(by=by).values
        return [int(i) for i in leaves_list(merges)] if len(merges) else [0]

    @property
    def tables(self) -> tuple[Table, ...]:
        """For every task the other task that is most similar."""
        tables = []
        for by in self.similarity.axes["by"]:
            values, tasks = self.similarity.at(by=by).values, self.similarity.axes["task"]
            rows = []
            for i in self.order(by):
                others = [j for j in range(len(tasks)) if j != i]
                near, far = max(others, key=lambda j: values[i, j]), min(others, key=lambda j: values[i, j])
                cells = (tasks[near], f"{values[i, near]:.2f}", tasks[far], f"{values[i, far]:.2f}")
                rows.append((tasks[i], *cells))
            header = ("task", "most similar", "cosine", "least similar", "cosine")
            tables.append(Table(f"Similarity by {by}, in the order of the dendrogram", header, tuple(rows)))
        return tuple(tables)


def answer(run: Path, instances: int = INSTANCES) -> TaskSimilarity:
    """The answer of `dyads inspect --what tasks`."""
    return task_similarity(run, instances)


def task_similarity(run: str | Path | RunFolder, instances: int = INSTANCES) -> TaskSimilarity:
    """The similarity of a run's tasks; where gates look at the layer's input, over `instances` of each task."""
    return task_similarity_of(gates_of(run, instances))


def task_similarity_of(gates: TaskGates) -> TaskSimilarity:
    """The similarity of tasks in gates that were read."""
    tasks = gates.tasks
    if len(tasks) < 2:
        raise RunError("the adapter has the same gates for all tasks, so there is no similarity of tasks to analyse")
    found = {"gates": _cosines(torch.from_numpy(gates.weights.values).flatten(1))}
    embeddings = [layer.core.task_embeddings() for layer in gates.adapter.layers if layer.core is not None]
    tables = [table.detach().double() for table in embeddings if table is not None and len(table) == len(tasks)]
    if tables:
        found["embeddings"] = torch.stack([_cosines(table) for table in tables]).mean(0)
    found["updates"] = _updates(gates)
    stacked = torch.stack(list(found.values())).numpy()
    places = {"by": list(found), "task": tasks}
    parts = ("left", "right", "distance", "tasks")
    merges = np.stack([dendrogram(values) for values in stacked])
    return TaskSimilarity(
        NamedArray.of(stacked, **places, other=tasks),
        NamedArray.of(merges, by=list(found), merge=range(len(tasks) - 1), part=parts),
        tuple(gates.notes),
    )


def dendrogram(similarity: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Average linkage of 1 - similarity (n n), as scipy's `linkage` gives it: (n - 1, 4)."""
    distance = np.clip(1 - (similarity + similarity.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    merges: npt.NDArray[np.float64] = linkage(squareform(distance, checks=False), "average")
    return merges


def _cosines(rows: Tensor) -> Tensor:
    """Cosines of all pairs of rows."""
    return _normalised(rows @ rows.T)


def _normalised(inner: Tensor) -> Tensor:
    """Inner products of all pairs as cosines; 1 on the diagonal, and 0 beside a row of norm 0."""
    norms = inner.diagonal().clamp_min(0).sqrt()
    cosines = torch.where(inner == 0, inner, inner / (norms[:, None] * norms[None]).clamp_min(1e-300))
    return cosines.clamp(-1, 1).fill_diagonal_(1)


def _updates(gates: TaskGates) -> Tensor:
    """Cosines of the updates s B G A of all layers with their scales s; ⟨B G A, B G' A⟩ = Σ (BᵀB G AAᵀ) ∘ G'."""
    total = torch.zeros(len(gates.tasks), len(gates.tasks), dtype=torch.float64)
    for layer, G in zip(gates.adapter.layers, gates.matrices, strict=True):
        assert layer.A is not None
        assert layer.B is not None
        A, B, G = layer.A.double(), layer.B.double(), G.double()
        scale = gates.adapter.config.for_layer(layer.module).scaling
        total += scale**2 * torch.einsum("tqp,sqp->ts", (B.T @ B) @ G @ (A @ A.T), G)
    return _normalised(total)

# SPDX-License-Identifier: Apache-2.0
"""Routing: which experts carry the weight, by task, layer and rank.

A choice distributes the weight 1 over its experts: MoDE has one choice for every rank, or group of ranks, MoLORA one in
a layer, and MHR one for every split. In MoRE and SMoRA the ranks are the experts of one choice.

Entropies are from 0 (all weight on one expert) to 1 (equal weights). The entropy of single tokens says how decided a
router is, that of the mean weights how evenly it uses its experts. An expert is dead with less than a tenth of an equal
share of the weight, and dominant with more than nine tenths of all of it, as means over tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dyads.analysis.gates import INSTANCES, TaskGates, entropy, gates_of
from dyads.analysis.inspection import kinds_of
from dyads.analysis.named_array import NamedArray, Table
from dyads.errors import RunError
from dyads.runs.folder import RunFolder

__all__ = ["DEAD", "DOMINANT", "Routing", "answer", "routing", "routing_of"]

QUESTION = "weights of experts by task and layer, dead and dominant ones"

DEAD = 0.1
"""Of an equal share of the weight."""
DOMINANT = 0.9
"""Of all weight."""


@dataclass(frozen=True)
class Routing:
    """The weights of the experts, and what is unusual about them."""

    weights: NamedArray
    """(task layer choice expert): mean weight; those of a choice have the sum 1."""
    entropy: NamedArray
    """(task layer choice): mean entropy of the weights of one token."""
    usage_entropy: NamedArray
    """(layer choice): entropy of the mean weights over tasks."""
    dead: NamedArray
    """(layer choice expert): 1 for a dead expert, else 0."""
    dominant: NamedArray
    """(layer choice expert): 1 for a dominant expert, else 0."""
    notes: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """Means by kind of module, and by task."""
        layers = self.weights.axes["layer"]
        kinds = np.array(kinds_of(layers)[0])
        n = len(self.weights.axes["expert"])
        rows = []
        for kind in dict.fromkeys(kinds.tolist()):
            at = np.flatnonzero(kinds == kind)
            dead, dominant = self.dead.values[at], self.dominant.values[at].any(-1)
            rows.append(
                (
                    kind,
                    str(len(at)),
                    f"{self.entropy.values[:, at].mean():.2f}",
                    f"{self.usage_entropy.values[at].mean():.2f}",
                    f"{int(dead.sum())} of {dead.size}",
                    f"{int(dominant.sum())} of {dominant.size}",
                )
            )
        header = ("module", "layers", "entropy of a token", "of the mean", "dead experts", "dominated choices")
        by_task = []
        for i, task in enumerate(self.weights.axes["task"]):
            use = self.weights.values[i].mean((0, 1))
            first = int(use.argmax())
            by_task.append((task, f"{self.entropy.values[i].mean():.2f}", f"{first}", f"{100 * use[first]:.0f} %"))
        title = f"Routing, {n} experts; entropies: 0 one expert, 1 equal weights"
        task_header = ("task", "entropy of a token", "most used expert", "its weight")
        return Table(title, header, tuple(rows)), Table("By task, mean over layers", task_header, tuple(by_task))


def answer(run: Path, instances: int = INSTANCES) -> Routing:
    """The answer of `dyads inspect --what routing`."""
    return routing(run, instances)


def routing(run: str | Path | RunFolder, instances: int = INSTANCES) -> Routing:
    """The routing of a run's adapter; where gates look at the layer's input, over `instances` of each task."""
    return routing_of(gates_of(run, instances))


def routing_of(gates: TaskGates) -> Routing:
    """The routing in gates that were read."""
    weights = gates.weights
    experts = weights.axes["expert"]
    if len(experts) < 2:
        raise RunError("the adapter has one expert, so there is no routing to analyse: its gate is 1")
    usage = weights.mean("task")
    dead, dominant = usage.values < DEAD / len(experts), usage.values > DOMINANT
    axes = {name: weights.axes[name] for name in ("layer", "choice")}
    notes = list(gates.notes)
    if dominant.any():
        layers = [
            name for name, here in zip(axes["layer"], np.any(dominant, axis=(1, 2)).tolist(), strict=True) if here
        ]
        notes.append(
            f"collapsed routers in {len(layers)} of {len(axes['layer'])} layers (one expert has over"
            f" {100 * DOMINANT:.0f} % of the weight), such as {layers[0]}"
        )
    return Routing(
        weights,
        gates.entropy,
        NamedArray.of(entropy(torch.from_numpy(usage.values)).numpy(), **axes),
        NamedArray.of(dead, **axes, expert=experts),
        NamedArray.of(dominant, **axes, expert=experts),
        tuple(notes),
    )

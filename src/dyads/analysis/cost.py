# SPDX-License-Identifier: Apache-2.0
"""Cost: where the parameters, the multiplications, the memory and the time of an adapter go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dyads.analysis.inspection import kinds_of
from dyads.analysis.named_array import NamedArray, Table
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter

__all__ = ["Cost", "answer", "cost"]

QUESTION = "parameters, multiplications, memory and time"

PARTS = ("A", "B", "router", "embedding")
_ADAM = 2
"""Numbers that Adam keeps for every parameter."""


@dataclass(frozen=True)
class Cost:
    """Parameters and multiplications by layer, memory by what it holds, and the times of a run."""

    parameters: NamedArray
    """(part layer): trained parameters; `router` includes gates and per-task transformations."""
    products: NamedArray
    """(part layer): multiplications per token of A x, of R x and of B u, beside those of the frozen layer (base)."""
    memory: NamedArray
    """(kind), in bytes of float32: adapter, gradients, optimizer; and the peak of the training, where it was logged."""
    seconds: NamedArray
    """(phase): training, scoring and one training step; nan for an adapter without a run."""
    notes: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """By kind of module, then memory and time."""
        kinds = np.array(kinds_of(self.parameters.axes["layer"])[0])
        rows = []
        for kind in dict.fromkeys(kinds.tolist()):
            of_kind = self.parameters.values[:, kinds == kind].sum(1)
            products = self.products.values[:, kinds == kind].sum(1)
            share = f"{100 * products[:-1].sum() / products[-1]:.1f} %" if products[-1] else "–"
            rows.append((kind, *(f"{int(n):,}" for n in of_kind), f"{int(of_kind.sum()):,}", share))
        header = ("module", *PARTS, "all", "multiplications / base")
        more = [
            (f"memory, {kind}", f"{value / 2**20:,.1f} MiB" if np.isfinite(value) else "not logged")
            for (kind,), value in self.memory.rows()
        ]
        more += [
            (f"time, {phase}", f"{value:,.3g} s" if np.isfinite(value) else "unknown")
            for (phase,), value in self.seconds.rows()
        ]
        return Table("Trained parameters", header, tuple(rows)), Table("Memory and time", ("", "cost"), tuple(more))


def answer(run: Path) -> Cost:
    """The answer of `dyads inspect --what cost`."""
    return cost(run)


def cost(run: str | Path | RunFolder) -> Cost:
    """The cost of a run's adapter, or of a bare adapter; no model is loaded."""
    path = run.path if isinstance(run, RunFolder) else Path(run)
    adapter = SavedAdapter.read(path)
    names = [layer.module for layer in adapter.layers]
    parameters, products = np.zeros((len(PARTS), len(names))), np.full((4, len(names)), np.nan)
    for j, layer in enumerate(adapter.layers):
        if layer.A is None or layer.B is None:
            parameters[0, j] = layer.parameters
            continue
        p, q, d, o = len(layer.A), layer.B.shape[1], layer.A.shape[1], len(layer.B)
        blocks = layer.core.feature_blocks if layer.core is not None else 1
        parameters[0, j], parameters[1, j] = p * d // blocks, o * q // blocks
        routed = 0
        if layer.core is not None:
            for name, parameter in layer.core.named_parameters():
                parameters[PARTS.index(layer.core.role(name)), j] += parameter.numel()
            router = layer.core.router_weight()
            routed = 0 if router is None else router.numel()
        products[:, j] = p * d // blocks, o * q // blocks, routed, d * o
    trained = 4 * adapter.parameters
    seconds, peak = _measured(RunFolder(path))
    kinds = ("adapter", "gradients", "optimizer", "peak of the training")
    notes = []
    if adapter.others:
        beside = sum(value.numel() for value in adapter.others.values())
        notes.append(f"{beside:,} parameters of whole modules beside the adapter are in the memory alone")
    if np.isnan(peak):
        notes.append("the log has no peak memory; a training logs it at its end")
    return Cost(
        NamedArray.of(parameters, part=PARTS, layer=names),
        NamedArray.of(products, part=("A x", "B u", "R x", "base"), layer=names),
        NamedArray.of([trained, trained, _ADAM * trained, peak], kind=kinds),
        NamedArray.of(seconds, phase=("training", "scoring", "one step")),
        tuple(notes),
    )


def _measured(folder: RunFolder) -> tuple[list[float], float]:
    """(training, scoring and step in seconds, peak memory in bytes), nan where unknown."""
    seconds, peak = [np.nan] * 3, np.nan
    if not folder.is_run:
        return seconds, peak
    trained = next((line for line in reversed(folder.log()) if line.get("event") == "trained"), None)
    if trained is not None and trained.get("seconds"):
        seconds[0] = float(trained["seconds"])
        seconds[2] = seconds[0] / max(int(trained["step"]), 1)
        peak = float(trained.get("peak_memory") or np.nan)
    if folder.is_scored:
        seconds[1] = float(folder.scores()["seconds"]["evaluate"])
    return seconds, peak

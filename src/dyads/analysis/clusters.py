# SPDX-License-Identifier: Apache-2.0
"""Clusters: do the ranks of LoRAs that were trained apart, from the same start, stay alike (MoDE, figures 3 and 6)?

A LoRA of rank r has r down-vectors a_j, the rows of A, and r up-vectors b_j, the columns of B. Where the a_j of several
LoRAs still cluster by their rank j after training, and the b_j do not, one down-projection can be shared and only the
up-vectors need experts; this is the observation that MoDE rests on. The number for it is the silhouette of each vector,

    s = (β - α) / max(α, β),

with α its mean distance to the vectors of the same rank in the other LoRAs, and β the smallest mean distance to those
of another rank; the distance is 1 - cosine. Its mean is 1 where every rank is a tight cluster, about 0 where ranks do
not matter, and below 0 where vectors are nearer to other ranks. Only LoRAs of one seed started alike, so each seed has
its own silhouettes; the interval is Student's t over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student
from sklearn.metrics import silhouette_score
from torch import Tensor

from dyads.analysis.inspection import kinds_of
from dyads.analysis.named_array import NamedArray, Table
from dyads.errors import RunError
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter

__all__ = ["Clusters", "answer", "clusters"]

QUESTION = "of several LoRAs: do their ranks stay alike?"

SIDES = ("down", "up")
COMPONENTS = 3
LEVEL = 0.95


@dataclass(frozen=True)
class Clusters:
    """Silhouettes and principal components of the rank-one vectors of several LoRAs."""

    silhouette: NamedArray
    """(side seed layer), -1 to 1; nan where a vector is zero, as up-vectors are before training."""
    components: NamedArray
    """(side layer adapter rank component): coordinates on the first three principal components of a side in a layer, of
    the unit vectors of all LoRAs."""
    explained: NamedArray
    """(side layer component): the components' shares of the variance, 0 to 1."""
    notes: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """Mean silhouettes with intervals, over all layers and by kind of module."""
        layers = self.silhouette.axes["layer"]
        kinds = np.array(kinds_of(layers)[0])
        parts = {"all layers": np.ones(len(layers), dtype=bool)}
        if len(set(kinds.tolist())) > 1:
            parts |= {kind: kinds == kind for kind in dict.fromkeys(kinds.tolist())}
        rows = []
        for name, chosen in parts.items():
            down, up = self.silhouette.values[:, :, chosen].mean(axis=2)  # (seed)
            rows.append((name, _shown(down), _shown(up), _shown(down - up)))
        title = "Silhouette of ranks: 1 every rank is a cluster, 0 ranks do not matter"
        return (Table(title, ("layers", "down-vectors", "up-vectors", "difference"), tuple(rows)),)


def answer(runs: Sequence[Path]) -> Clusters:
    """The answer of `dyads inspect --what clusters`."""
    return clusters(runs)


def clusters(adapters: Mapping[str, str | Path] | Sequence[str | Path]) -> Clusters:
    """Whether the ranks of LoRAs cluster: runs, or adapters, of one rank on the same layers of one model.

    The seed is that of a run's recipe; folders without a recipe count as one seed. RunError where fewer than two LoRAs
    share a seed, where the rank is 1 (a single cluster has no silhouette), or where layers or ranks differ.
    """
    paths = dict(adapters) if isinstance(adapters, Mapping) else {Path(path).name: path for path in adapters}
    if len(paths) < len(adapters):
        raise RunError("two of the adapters have the same folder name: name them in Python, clusters({name: folder})")
    read = {name: SavedAdapter.read(path) for name, path in paths.items()}
    layers, vectors = _vectors(read)
    by_seed: dict[int, list[int]] = {}
    for place, path in enumerate(paths.values()):
        by_seed.setdefault(_seed(Path(path)), []).append(place)
    for seed, places in by_seed.items():
        if len(places) < 2:
            raise RunError(f"seed {seed} has one LoRA, {list(paths)[places[0]]}; give two or more that started alike")
    silhouettes = [
        [[_silhouette(of_layer[places]) for of_layer in side] for places in by_seed.values()] for side in vectors
    ]
    principal = [[_principal(of_layer) for of_layer in side] for side in vectors]
    rank = range(1, vectors[0][0].shape[1] + 1)
    number = range(1, COMPONENTS + 1)
    notes = ["with one seed there is no interval: it would be over starts"] if len(by_seed) < 2 else []
    return Clusters(
        NamedArray.of(silhouettes, side=SIDES, seed=list(by_seed), layer=layers),
        NamedArray.of(
            [[at for at, _ in side] for side in principal],
            side=SIDES,
            layer=layers,
            adapter=list(read),
            rank=rank,
            component=number,
        ),
        NamedArray.of([[share for _, share in side] for side in principal], side=SIDES, layer=layers, component=number),
        tuple(notes),
    )


def _vectors(read: Mapping[str, SavedAdapter]) -> tuple[list[str], list[list[npt.NDArray[np.float64]]]]:
    """(the layers, for each side and layer the unit vectors of all ranks of all adapters, (adapter rank feature))."""
    matrices: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, adapter in read.items():
        of_layers = {}
        for layer in adapter.layers:
            if layer.A is None or layer.B is None or (layer.core is not None and layer.core.looks_at):
                raise RunError(f"'{name}' is no LoRA of linear layers ({adapter.method}); clusters are those of LoRAs")
            of_layers[layer.module] = (layer.A, layer.B.T)
        matrices[name] = of_layers
    first_name, first = next(iter(matrices.items()), ("", {}))
    for name, of_layers in matrices.items():
        shapes = {module: [tuple(side.shape) for side in sides] for module, sides in of_layers.items()}
        if shapes != {module: [tuple(side.shape) for side in sides] for module, sides in first.items()}:
            raise RunError(f"'{name}' has other layers or another rank than '{first_name}'; compare LoRAs of one form")
    if first and min(side.shape[0] for sides in first.values() for side in sides) < 2:
        raise RunError("the LoRAs have rank 1: a single rank has no clusters; give LoRAs of rank 2 or more")
    stacked = [
        [np.stack([of[module][i].double().numpy() for of in matrices.values()]) for module in first] for i in range(2)
    ]
    return list(first), [[_unit(of_layer) for of_layer in side] for side in stacked]


def _unit(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Vectors of length 1; those of zero stay."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)


def _silhouette(vectors: npt.NDArray[np.float64]) -> float:
    """Mean silhouette of unit vectors (adapter rank feature), clustered by rank; nan with a vector of zero."""
    adapters, ranks, _ = vectors.shape
    if not np.any(vectors, axis=-1).all():
        return float("nan")
    return float(
        silhouette_score(vectors.reshape(adapters * ranks, -1), np.tile(range(ranks), adapters), metric="cosine")
    )


def _principal(vectors: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(coordinates (adapter rank component), shares of the variance (component)); nan beyond the dimensions."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    left, values, _ = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    n = min(COMPONENTS, len(values))
    coordinates, shares = np.full((len(flat), COMPONENTS), np.nan), np.full(COMPONENTS, np.nan)
    coordinates[:, :n] = left[:, :n] * values[:n]
    shares[:n] = values[:n] ** 2 / max(float((values**2).sum()), 1e-300)
    return coordinates.reshape(*vectors.shape[:2], COMPONENTS), shares


def _seed(path: Path) -> int:
    run = RunFolder(path)
    return run.recipe().seed if run.is_run else 0


def _shown(of_seeds: npt.NDArray[np.float64]) -> str:
    """The mean, and with two seeds or more its interval."""
    mean, k = of_seeds.mean(), len(of_seeds)
    if np.isnan(mean):
        return "–"
    if k < 2:
        return f"{mean:.2f}"
    half = student.ppf((1 + LEVEL) / 2, k - 1) * of_seeds.std(ddof=1) / np.sqrt(k)
    return f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f})"

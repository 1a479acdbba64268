# SPDX-License-Identifier: Apache-2.0
"""Arrays with named axes and labels, the results of every analysis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dyads.errors import ConfigError, did_you_mean

__all__ = ["NamedArray", "Table", "arrays_of"]


@dataclass(frozen=True, eq=False)
class NamedArray:
    """Numbers with a name for every axis, and a label for every place along it."""

    values: npt.NDArray[np.float64]
    axes: dict[str, tuple[str, ...]]
    """Labels by axis, in the order of the axes of `values`."""

    def __post_init__(self) -> None:
        sizes = tuple(map(len, self.axes.values()))
        if self.values.shape != sizes:
            raise ConfigError(f"an array of shape {self.values.shape} cannot have axes {self.names} of sizes {sizes}")

    @classmethod
    def of(cls, values: Any, **axes: Sequence[object]) -> NamedArray:
        """An array of anything that numpy reads, with labels made of texts."""
        labels = {name: tuple(map(str, places)) for name, places in axes.items()}
        return cls(np.asarray(values, dtype=np.float64), labels)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(self.axes)

    def at(self, **labels: str) -> NamedArray:
        """The part at a label of some axes, which it no longer has."""
        index: list[Any] = [slice(None)] * len(self.axes)
        for name, label in labels.items():
            axis = self._axis(name)
            index[axis] = self._place(name, label)
        rest = {name: places for name, places in self.axes.items() if name not in labels}
        return NamedArray(np.asarray(self.values[tuple(index)]), rest)

    def mean(self, *names: str) -> NamedArray:
        """The mean over some axes, without the places that are nan; over all axes if none is named."""
        over = names or self.names
        values, weights = self.values, ~np.isnan(self.values)
        axes = tuple(self._axis(name) for name in over)
        count = weights.sum(axis=axes)
        total = np.where(weights, values, 0.0).sum(axis=axes)
        mean = np.divide(total, count, out=np.full(np.shape(total), math.nan), where=count > 0)
        return NamedArray(np.asarray(mean), {k: v for k, v in self.axes.items() if k not in over})

    def item(self) -> float:
        """The number of an array without axes."""
        return float(self.values)

    def rows(self) -> Iterator[tuple[tuple[str, ...], float]]:
        """(labels, number) of every place."""
        for index in np.ndindex(self.values.shape):
            labels = tuple(places[i] for places, i in zip(self.axes.values(), index, strict=True))
            yield labels, float(self.values[index])

    def as_json(self) -> dict[str, Any]:
        """Axes and nested lists; null where there is no number."""
        return {"axes": {name: list(places) for name, places in self.axes.items()}, "values": _plain(self.values)}

    def _axis(self, name: str) -> int:
        if name not in self.axes:
            raise ConfigError(f"there is no axis '{name}'{did_you_mean(name, self.axes)}")
        return self.names.index(name)

    def _place(self, name: str, label: str) -> int:
        if label not in self.axes[name]:
            raise ConfigError(f"axis '{name}' has no '{label}'{did_you_mean(label, self.axes[name])}")
        return self.axes[name].index(label)


def _plain(values: npt.NDArray[np.float64]) -> Any:
    if values.ndim == 0:
        return float(values) if np.isfinite(values) else None
    return [_plain(part) for part in values]


@dataclass(frozen=True)
class Table:
    """A table of an analysis for the terminal: its first column names the rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def arrays_of(result: Any) -> dict[str, NamedArray]:
    """The arrays of a result, by the names of its fields."""
    named = ((f.name, getattr(result, f.name)) for f in dataclasses.fields(result))
    return {name: value for name, value in named if isinstance(value, NamedArray)}

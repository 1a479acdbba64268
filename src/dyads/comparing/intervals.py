# SPDX-License-Identifier: Apache-2.0
"""How sure is a mean of scores?

Intervals are percentile bootstrap intervals, 10,000 resamples, computed here and not by scipy.stats.bootstrap, which
cannot do the three things that matter: resample within each task (the tasks are fixed, so an interval says nothing
about other tasks), draw the *same* instances for every run (so that a difference is paired and what is hard for all
cancels), and draw the seeds too, as a level above the instances (the same seeds for columns that have the same).
With one seed an interval is about the instances alone: it holds for these trained adapters, not for the method.
Few seeds make an interval too narrow; the spread over seeds stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Interval", "Resampled", "interval", "resample"]

Array: TypeAlias = npt.NDArray[np.float64]

_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampled:
    """Resampled means: over all instances and over tasks, (resamples, columns); by task only their quantiles."""

    micro: Array
    macro: Array
    by_task: Array  # (tasks, low and high, columns)


def resample(
    matrices: Sequence[Array],
    values: Sequence[Callable[[Array], Array]],
    seeds: Mapping[str, tuple[int, ...]],
    resamples: int,
    bootstrap_seed: int,
) -> Resampled:
    """Resample every task's scores; `seeds` says which runs, in that order, are a column.

    A matrix holds what every instance gives to a score, (runs, instances, k), and `values` has the function that makes
    a score (…) of its means (… k) for every task; comparing/metric_moments.py has both.
    """
    rng = np.random.default_rng(bootstrap_seed)
    # How often each run is drawn: (resamples, runs, columns). Columns with the same seeds share one draw.
    shares: dict[tuple[int, ...], Array] = {}
    total = sum(map(len, seeds.values()))
    weights = np.zeros((resamples, total, len(seeds)))
    start = 0
    for i, group in enumerate(seeds.values()):
        k = len(group)
        if group not in shares:
            shares[group] = rng.multinomial(k, np.full(k, 1 / k), size=resamples) / k
        weights[:, start : start + k, i] = shares[group]
        start += k
    instances = sum(m.shape[1] for m in matrices)
    micro = np.zeros((resamples, len(seeds)))
    macro = np.zeros((resamples, len(seeds)))
    by_task = []
    for matrix, value in zip(matrices, values, strict=True):
        n = matrix.shape[1]
        means = np.einsum("sr,src->sc", _resampled(matrix, value, resamples, rng), weights)
        by_task.append(_quantiles(means))
        micro += means * (n / instances)
        macro += means / len(matrices)
    return Resampled(micro, macro, np.stack(by_task))


def _resampled(matrix: Array, value: Callable[[Array], Array], resamples: int, rng: np.random.Generator) -> Array:
    """Every run's score on n instances drawn with replacement, the same ones for all runs: (resamples, runs)."""
    runs, n, k = matrix.shape
    flat = matrix.transpose(1, 0, 2).reshape(n, runs * k)
    rows = max(1, 4_000_000 // n)  # bounds the memory of one draw
    parts = []
    for done in range(0, resamples, rows):
        size = min(rows, resamples - done)
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        parts.append(value((counts @ flat / n).reshape(size, runs, k)))
    return np.concatenate(parts)


def _quantiles(draws: Array) -> Array:
    result: Array = np.quantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
    return result


def interval(value: float, draws: Array) -> Interval:
    """A value with the interval that its resamples give."""
    low, high = _quantiles(draws)
    return Interval(float(value), float(low), float(high))

# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals and tests for mean scores over instances and seeds.

With seed s = 1..k, instance i = 1..n_t of task t contributes x_tsi to a score; where two methods are compared x_tsi is
the difference of their contributions. Tasks are fixed and have weights w_t, 1 / T for the mean over tasks (macro) and
n_t / Σ n for that over instances (micro). Seeds and instances are drawn, and seeds share the instances:

    x_tsi = μ_t + a_ts + b_ti + c_tsi          estimand: Σ_t w_t μ_t

with a, the effect of a training, b, that of an instance on all trainings, and c, the rest. The mean over seeds and
instances has the variance

    Var = var_s(Σ_t w_t a_ts) / k + Σ_t w_t² (var b_t + var c_t / k) / n_t

which three mean squares of the crossed design estimate (each with the divisor of an unbiased variance):

    I = Σ_t w_t² var_i(mean_s x_tsi) / n_t          expects the second sum: b and c
    S = var_s(Σ_t w_t mean_i x_tsi)                 expects a, and Σ_t w_t² var c_t / n_t
    R = Σ_t w_t² var(residuals x_tsi) / n_t         expects Σ_t w_t² var c_t / n_t
    V = max(I + (S - R) / k, R / k)

S / k alone leaves b out, and I + S / k counts c twice. The interval is value ± t √V, where t is Student's quantile with
Satterthwaite's degrees of freedom (those of R are so many that it is left out)

    V² / (Σ_t I_t² / (n_t - 1) + (S / k)² / (k - 1)),

but never narrower than Student's interval over the scores of the seeds, with √(S / k) and k - 1. Where few seeds come
out close together by chance, S is too small and Satterthwaite's degrees of freedom too many; far in the tails, where
corrected p-values are, that would give three seeds twice to four times the false verdicts that are allowed.

Where no instance and no seed differs, as for two methods that are always right, V = 0 would say that none ever could. I
is then that of one more instance, in one task, that differs by 100 points:

    I = min_t (100 w_t / (n_t + 1))²                with n_t - 1 degrees of freedom

Two methods with the same seeds are paired: for one seed they read the same examples in the same order. With different
seeds each has an S / k and an R / k of its own, which are added; instances are paired in any case. With one seed V = I:
the interval is about these trained adapters alone and says nothing about another training.

With k' seeds, and f times the instances of every task, these mean squares expect the variance B / f + S' / k', where
B = max(I - R / k, 0) is the part of the instances alone and S' = S - R + R / f, and at least R / (f k'): `half_width`
plans a study by it.

Simulated at a nominal 95 % (tests/comparing/test_coverage.py), three to ten seeds cover 94 to 97 %; and of ten methods
that are all alike, one of nine is called ahead of or behind the tenth in 2 to 6 % of comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

__all__ = ["LEVEL", "Array", "Interval", "Sample", "holm", "holm_levels", "sign_flip_p"]

Array: TypeAlias = npt.NDArray[np.float64]

LEVEL = 0.95
_ZERO = 1e-9  # of scores from 0 to 100: rounding
_MOST = 100.0  # by which an instance can differ
_FLIPS = 1 << 12


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval and the two-sided p-value of its being zero."""

    value: float
    low: float
    """-inf, and `high` inf, where no task has two instances."""
    high: float
    p: float
    over_seeds: bool
    """Whether another training is covered, or these trained adapters alone."""

    def __neg__(self) -> Interval:
        return Interval(0.0 - self.value, 0.0 - self.high, 0.0 - self.low, self.p, self.over_seeds)  # 0 stays 0, not -0


class Sample:
    """Scores of one method, or the difference of two, over seeds and instances.

    `scores` (seeds, tasks) are the scores of the runs, and `instances` what every instance contributes to them,
    (seeds, n_t) for each task. Contributions of a mean are its values; of other metrics their pseudo-values.
    """

    def __init__(self, scores: Array, instances: Sequence[Array], *, seedless: bool = False) -> None:
        self.scores, self.instances = scores, tuple(instances)
        self.seedless = seedless
        """Nothing is trained: the score does not depend on the seed."""
        self._groups: tuple[Array, ...] = (scores,)
        self._residual: tuple[Array, ...] = (np.array([_residual(x) for x in self.instances]),)

    def minus(self, other: Sample, *, paired: bool) -> Sample:
        """The difference to another sample; `paired`: both have the same seeds, or one depends on none."""
        if paired or len(self.scores) == len(other.scores) == 1:
            pairs = zip(self.instances, other.instances, strict=True)
            both = self.seedless and other.seedless
            return Sample(self.scores - other.scores, [a - b for a, b in pairs], seedless=both)
        one, two = ([x.mean(axis=0, keepdims=True) for x in (of.scores, *of.instances)] for of in (self, other))
        scores, *instances = (a - b for a, b in zip(one, two, strict=True))
        result = Sample(scores, instances)
        result._groups = (*self._groups, *other._groups)
        result._residual = (*self._residual, *other._residual)
        return result

    @property
    def seeds(self) -> tuple[int, ...]:
        """The number of seeds, or those of the two methods that are compared where these have different ones."""
        return tuple(dict.fromkeys(len(group) for group in self._groups))

    @property
    def over_seeds(self) -> bool:
        """Whether the spread over seeds is known, or there is none."""
        return self.seedless or all(len(group) > 1 for group in self._groups)

    def interval(self, weights: Array, *, level: float = LEVEL, null: float = 0.0) -> Interval:
        """The interval of the mean over tasks with these weights, which sum to 1; p is that of its being `null`."""
        value = float(weights @ self.scores.mean(axis=0))
        parts = self._parts(weights)
        if parts is None:
            return Interval(value, -np.inf, np.inf, 1.0, self.over_seeds)
        instances, freedom, seeds = parts
        variance = instances + sum((s - r) / k for k, s, r in seeds)
        least = sum(r / k for k, _, r in seeds)
        squares = sum((s / k) ** 2 / (k - 1) for k, s, _ in seeds)
        errors = [
            _error(max(variance, least), freedom + squares),
            _error(sum(s / k for k, s, _ in seeds), squares),
        ]
        width = _width(errors, level)
        distance = abs(value - null)
        p = max(2 * float(student.sf(distance / error, freedom)) if error else 0.0 for error, freedom in errors)
        return Interval(value, value - width, value + width, 1.0 if distance < _ZERO else p, self.over_seeds)

    def half_width(self, weights: Array, *, level: float, seeds: int, instances: float = 1.0) -> float:
        """Expected half-width of the interval with so many seeds, and `instances` times the instances.

        inf where the variances are not known: with one seed, or where no task has two instances.
        """
        parts = self._parts(weights)
        if parts is None or not self.over_seeds:
            return float(np.inf)
        alone, freedom, groups = parts
        alone = max(alone - sum(r / k for k, _, r in groups), 0.0) / instances
        spread = [max(s - r + r / instances, 0.0) for _, s, r in groups]
        of_seeds = sum(spread) / seeds
        squares = sum((s / seeds) ** 2 for s in spread) / max(seeds - 1, 1)
        least = sum(r for _, _, r in groups) / (instances * seeds)
        errors = [_error(max(alone + of_seeds, least), freedom / instances**3 + squares), _error(of_seeds, squares)]
        return _width(errors, level)

    def _parts(self, weights: Array) -> tuple[float, float, list[tuple[int, float, float]]] | None:
        """(I, its square over its degrees of freedom, and (k, S, R) of every group of seeds); None without a spread."""
        used = np.flatnonzero(weights)
        sizes = np.array([self.instances[t].shape[1] for t in used])
        known = sizes > 1
        if not known.any():
            return None
        means = [self.instances[t].mean(axis=0) for t in used]
        spread = np.array([x.var(ddof=1) if len(x) > 1 else 0.0 for x in means])
        # A task of one instance shows no spread: it gets the mean of the others' and no degrees of freedom.
        by_task = weights[used] ** 2 * np.where(known, spread, spread[known].mean()) / sizes
        residuals = (float(weights**2 @ residual) for residual in self._residual)
        groups = zip(self._groups, residuals, strict=True) if self.over_seeds else ()
        of_seeds = [(len(x), float((x @ weights).var(ddof=1)), r) for x, r in groups if len(x) > 1]
        if by_task.sum() + sum(s + r for _, s, r in of_seeds) < _ZERO**2:
            further = np.where(known, np.abs(weights[used]) * _MOST / (sizes + 1), np.inf)
            by_task[further.argmin()] = further.min() ** 2
        return float(by_task.sum()), float((by_task[known] ** 2 / (sizes[known] - 1)).sum()), of_seeds


def _width(errors: Sequence[tuple[float, float]], level: float) -> float:
    """The larger half-width of (standard error, degrees of freedom)."""
    return max(error * float(student.ppf((1 + level) / 2, freedom)) for error, freedom in errors)


def _error(variance: float, squares: float) -> tuple[float, float]:
    """(standard error, Satterthwaite's degrees of freedom); `squares` are those of the parts over their own."""
    if variance < _ZERO**2:
        return 0.0, np.inf
    return float(np.sqrt(variance)), max(1.0, variance**2 / squares) if squares > 0 else np.inf


def _residual(x: Array) -> float:
    """R_t of one task for weight 1: the mean square of what neither seed nor instance explains, over n."""
    k, n = x.shape
    if k < 2 or n < 2:
        return 0.0
    rest = x - x.mean(axis=0) - x.mean(axis=1, keepdims=True) + x.mean()
    return float((rest**2).sum() / ((k - 1) * (n - 1)) / n)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those below α keeps the chance of any false rejection below α."""
    order = np.argsort(ps, kind="stable")
    factors = np.arange(len(ps), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(np.asarray(ps)[order] * factors), 1.0)
    result = np.empty(len(ps))
    result[order] = adjusted
    return [float(p) for p in result]


def holm_levels(ps: Sequence[float]) -> list[float]:
    """The level of the interval with which Holm's procedure tests each p-value.

    The smallest of n is tested at α / n, the next at α / (n - 1), and so on until one is not rejected, at whose α the
    others are tested too. So an interval of this level excludes the tested value exactly if holm's p-value is below α.
    """
    levels = [LEVEL] * len(ps)
    level, rejecting = LEVEL, True
    for rank, i in enumerate(np.argsort(ps, kind="stable")):
        if rejecting:
            level = 1 - (1 - LEVEL) / (len(ps) - rank)
            rejecting = ps[i] < 1 - level
        levels[i] = level
    return levels


def sign_flip_p(differences: Array) -> float:
    """Two-sided p-value of the margin of tasks won, summed over seeds; `differences` of paired scores: (seeds, tasks).

    If two methods are alike, they could change places for any seed, in all tasks at once. (A training that goes well
    does so in several tasks; a sign test over tasks would count these as independent votes.) The margin is compared
    with those of all 2^k such flips, or of a sample of them above 12 seeds, so p is at least 2 / 2^k.
    """
    k = len(differences)
    margins = (differences > _ZERO).sum(axis=1) - (differences < -_ZERO).sum(axis=1)
    if 2**k <= _FLIPS:
        signs = np.array(list(product((1.0, -1.0), repeat=k)))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(_FLIPS, k))
        signs[0] = 1.0
    flipped = np.abs(signs @ margins)
    return float((flipped >= flipped[0]).mean())

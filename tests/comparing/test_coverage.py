# SPDX-License-Identifier: Apache-2.0
"""Simulated coverage of the intervals, and false verdicts among methods that are all alike."""

from __future__ import annotations

import numpy as np
import pytest

from dyads.comparing.intervals import Array, Sample, holm

pytestmark = pytest.mark.slow

TASKS, N = 4, 15
MACRO = np.full(TASKS, 1 / TASKS)
TRUE = np.array([3.0, -1.0, 2.0, 0.0])  # of the tasks; their mean is the estimand


def draw(rng: np.random.Generator, k: int, spread: float, shared: float = 0.5, tasks_alike: float = 0.5) -> Sample:
    """A difference with k seeds. The error of one run's mean over tasks that is due to instances is 1.

    `spread` is the seeds' standard deviation of that mean, `shared` the part of the instances' variance that all seeds
    have in common, and `tasks_alike` the part of the seeds' variance that all tasks have in common.
    """
    seed = rng.normal(size=(k, 1, 1)) * tasks_alike**0.5
    seed = spread * (seed + rng.normal(size=(k, TASKS, 1)) * ((1 - tasks_alike) * TASKS) ** 0.5)
    instance = rng.normal(size=(1, TASKS, N)) * shared**0.5
    rest = rng.normal(size=(k, TASKS, N)) * (1 - shared) ** 0.5
    x = TRUE[:, None] + seed + (instance + rest) * (TASKS * N) ** 0.5
    return Sample(x.mean(axis=2), list(x.transpose(1, 0, 2)))


@pytest.mark.parametrize("k", [3, 5, 10])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("shared", [0.3, 0.8])
def test_95_percent_intervals_cover_92_to_97(k: int, spread: float, shared: float) -> None:
    rng = np.random.default_rng(1)
    times = 4000
    found = [draw(rng, k, spread, shared).interval(MACRO) for _ in range(times)]
    covered = sum(x.low <= TRUE.mean() <= x.high for x in found) / times
    print(f"k={k} spread={spread} shared={shared}: {100 * covered:.1f} %")
    assert 0.92 <= covered <= 0.97


@pytest.mark.parametrize("spread", [0.0, 5.0])
def test_one_seed_covers_the_score_of_these_adapters(spread: float) -> None:
    rng = np.random.default_rng(2)
    covered, times = 0, 4000
    for _ in range(times):
        training = spread * rng.normal()
        x = TRUE[:, None] + training + rng.normal(size=(TASKS, N)) * (TASKS * N) ** 0.5
        found = Sample(x.mean(axis=1)[None], [task[None] for task in x]).interval(MACRO)
        covered += found.low <= TRUE.mean() + training <= found.high
    assert 0.935 <= covered / times <= 0.965


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_of_nine_null_methods_one_gets_a_verdict_in_at_most_7_percent(k: int, spread: float) -> None:
    """The baseline's spread is in all nine differences; any "ahead" or "behind" is false."""
    rng = np.random.default_rng(3)
    times, plain, corrected = 1000, 0, 0

    def method() -> Array:
        seed = spread * rng.normal(size=(k, 1, 1))  # in units of one method's instances' error
        own = rng.normal(size=(1, TASKS, N)) + rng.normal(size=(k, TASKS, N))
        return TRUE[:, None] + seed + own * (TASKS * N / 2) ** 0.5

    for _ in range(times):
        shared = 3 * rng.normal(size=(1, TASKS, N))
        baseline, *methods = (
            Sample(x.mean(axis=2), list(x.transpose(1, 0, 2))) for x in (method() + shared for _ in range(10))
        )
        found = [x.minus(baseline, paired=True).interval(MACRO) for x in methods]
        plain += any(x.p < 0.05 for x in found)
        corrected += any(p < 0.05 for p in holm([x.p for x in found]))
    print(f"k={k} spread={spread}: plain {100 * plain / times:.1f} %, corrected {100 * corrected / times:.1f} %")
    assert corrected / times <= 0.07
    assert plain > 2 * corrected

# SPDX-License-Identifier: Apache-2.0
"""A score that is taken over all answers at once is the same function of means of what each answer gives."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dyads.comparing.intervals import resample
from dyads.comparing.metric_moments import METRICS, moments, score
from dyads.runs.folder import Prediction
from dyads.tasks.metrics import metric as metric_named

LABELS = ["no", "yes", "maybe"]


def answers(metric: str, n: int, seed: int, words: list[str] | None = None) -> list[Prediction]:
    rng = random.Random(seed)

    def some() -> str:
        return f"{rng.uniform(0, 5):.3f}" if metric == "pearson" else rng.choice(words or LABELS)

    def row(i: int) -> Prediction:
        right = some()
        guess = right if rng.random() < 0.4 else rng.choice([some(), "who knows"])
        return Prediction(id=str(i), prediction=guess, references=[right], scores={})

    return [row(i) for i in range(n)]


def whole(metric: str, rows: list[Prediction]) -> float:
    given, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
    return metric_named(metric).measure(given, references, labels=LABELS)[0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_the_function_of_means_is_the_metric(metric: str, n: int) -> None:
    for seed in range(8):
        for words in (None, ["no"], ["no", "yes"]):
            rows = answers(metric, n, seed, words)
            parts = moments(metric, rows, LABELS)
            assert len(parts) == n
            assert score(metric, parts.mean(axis=0)) == pytest.approx(whole(metric, rows), abs=1e-6)


def test_a_metric_of_single_answers_is_its_own_mean() -> None:
    rows = [Prediction(id=str(i), prediction="", references=[""], scores={"rouge_l": 10.0 * i}) for i in range(4)]
    parts = moments("rouge_l", rows, [])
    assert parts.tolist() == [[0.0], [10.0], [20.0], [30.0]]
    assert score("rouge_l", parts.mean(axis=0)) == 15.0


@pytest.mark.parametrize("metric", METRICS)
def test_a_resample_is_the_metric_of_the_instances_drawn(metric: str) -> None:
    runs = [answers(metric, 23, seed) for seed in (1, 2)]
    matrix = np.stack([moments(metric, rows, LABELS) for rows in runs])
    seen: list[np.ndarray] = []

    def spy(means: np.ndarray) -> np.ndarray:
        scores = score(metric, means)
        seen.append(scores)
        return scores

    resample([matrix], [spy], {"a": (0,), "b": (0,)}, 50, 0)
    rng = np.random.default_rng(0)
    rng.multinomial(1, [1.0], size=50)  # the seeds are drawn first
    drawn = rng.integers(23, size=(50, 23))
    expected = [[whole(metric, [rows[i] for i in sample]) for rows in runs] for sample in drawn]
    # Pearson's means are taken about the mean of all instances; a correlation does not depend on that.
    np.testing.assert_allclose(seen[0], expected, atol=1e-6)

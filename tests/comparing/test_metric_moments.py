# SPDX-License-Identifier: Apache-2.0
"""Contributions of instances to scores over all answers: they add up to the metric and give its standard error."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dyads.comparing.metric_moments import METRICS, contributions, instance_score
from dyads.runs.contents import Prediction, ScoreRow
from dyads.tasks.metrics import metric as metric_named

LABELS = ["no", "yes", "maybe"]


def answers(metric: str, n: int, seed: int, words: list[str] | None = None) -> list[Prediction]:
    rng = random.Random(seed)

    def some() -> str:
        return f"{rng.uniform(0, 5):.3f}" if metric.startswith("pearson") else rng.choice(words or LABELS)

    def row(i: int) -> Prediction:
        right = some()
        guess = right if rng.random() < 0.4 else rng.choice([some(), "who knows", "-1", "Yes"])
        return Prediction(id=str(i), prediction=guess, references=[right], scores={})

    return [row(i) for i in range(n)]


def whole(metric: str, rows: list[Prediction]) -> float:
    given, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
    return metric_named(metric).measure(given, references, labels=LABELS)[0]


@pytest.mark.parametrize("metric", METRICS)
def test_pseudo_values_are_those_of_the_metric_without_each_instance(metric: str) -> None:
    for seed, n in enumerate((1, 2, 2, 7, 7, 30)):
        for words in (None, ["no"], ["no", "yes"]):
            rows = answers(metric, n, seed, words)
            score, values = contributions(metric, rows, LABELS)
            assert score == pytest.approx(whole(metric, rows), abs=1e-6)
            left_out = [whole(metric, rows[:i] + rows[i + 1 :]) for i in range(n)] if n > 1 else [0.0]
            assert values == pytest.approx(n * score - (n - 1) * np.array(left_out), abs=1e-5)


def test_contributions_to_a_mean_are_its_values() -> None:
    rows = [Prediction(id=str(i), prediction="", references=[""], scores={"rouge_l": 10.0 * i}) for i in range(4)]
    score, values = contributions("rouge_l", rows, [])
    assert (score, values.tolist()) == (15.0, [0.0, 10.0, 20.0, 30.0])


@pytest.mark.parametrize("metric", ["pearson", "matthews", "f1", "macro_f1"])
def test_their_spread_is_the_standard_error_of_the_score(metric: str) -> None:
    scores, errors = [], []
    for seed in range(400):
        score, values = contributions(metric, answers(metric, 100, seed), LABELS)
        scores.append(score)
        errors.append(values.std(ddof=1) / 10)
    assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.12)


@pytest.mark.parametrize(("answer", "score"), [("2.0", 100.0), ("3", 50.0), ("nan", 0.0), ("1e999", 0.0), ("two", 0.0)])
def test_an_answer_that_is_no_finite_number_is_wrong(answer: str, score: float) -> None:
    row = ScoreRow(metric="pearson")  # type: ignore[typeddict-item]
    prediction = Prediction(id="a", prediction=answer, references=["2.0"], scores={})
    assert instance_score(prediction, row) == score

# SPDX-License-Identifier: Apache-2.0
"""Contributions of single instances to a task's score, also for correlations and F1.

A metric of single answers is the mean of its own values. A correlation or an F1 has no value for one instance, but is a
function of means, score = f(mean over the instances of m_i): m_i holds x, y, x², y² and xy, or indicators of the
expected class, the predicted one and both. Its jackknife pseudo-values

    n · score - (n - 1) · score without instance i

stand in for the values of instances: the variance of their mean estimates that of the score, and for a mean it is the
usual estimate. Unlike the delta method the jackknife needs no derivative of f, and its estimate errs upwards; unlike a
bootstrap it needs one call of f for all n scores, and the pseudo-values of several seeds are paired and averaged like
other values.

Metrics that are no such function (Spearman's ranks, answers that are right in groups) are refused as a headline in
comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from dyads.comparing.intervals import Array
from dyads.runs.contents import Prediction, ScoreRow
from dyads.tasks.metrics import class_ids, to_digits, to_number

__all__ = ["CLASS_METRICS", "METRICS", "contributions", "instance_score"]

Moments = Callable[[Sequence[Prediction], Sequence[str]], Array]


def _of_numbers(predictions: Sequence[Prediction], labels: Sequence[str], read: Callable[[str], float]) -> Array:
    x = np.array([read(p["prediction"]) for p in predictions])
    y = np.array([to_number(p["references"][-1]) for p in predictions])
    x, y = x - x.mean(), y - y.mean()  # changes no correlation, and keeps squares small
    return np.stack([x, y, x * x, y * y, x * y], axis=1)


def _pearson(means: Array) -> Array:
    x, y, xx, yy, xy = np.moveaxis(means, -1, 0)
    return _ratio(xy - x * y, np.sqrt(np.maximum((xx - x * x) * (yy - y * y), 0)))


def _of_labels(predictions: Sequence[Prediction], labels: Sequence[str]) -> Array:
    """Indicators (expected, predicted, both) of each label, and last of an answer that is none."""
    given, references = [p["prediction"] for p in predictions], [p["references"] for p in predictions]
    predicted, expected = class_ids("", given, references, labels)
    return _indicators(expected, predicted, len(labels) + 1)


def _of_texts(predictions: Sequence[Prediction], labels: Sequence[str]) -> Array:
    """The same, where each different text is a class."""
    predicted, expected = (
        [p["prediction"].strip() for p in predictions],
        [p["references"][0].strip() for p in predictions],
    )
    ids = {text: i for i, text in enumerate(dict.fromkeys(expected + predicted))}
    return _indicators([ids[text] for text in expected], [ids[text] for text in predicted], len(ids))


def _indicators(expected: Sequence[int], predicted: Sequence[int], classes: int) -> Array:
    one_hot = np.eye(classes)
    e, p = one_hot[list(expected)], one_hot[list(predicted)]  # NO_LABEL is -1: the last
    return np.concatenate([e, p, e * p], axis=1)


def _matthews(means: Array) -> Array:
    expected, predicted, right = np.split(means, 3, axis=-1)
    spread = (1 - (expected**2).sum(-1)) * (1 - (predicted**2).sum(-1))
    return _ratio(right.sum(-1) - (expected * predicted).sum(-1), np.sqrt(np.maximum(spread, 0)))


def _f1_of_each(means: Array) -> tuple[Array, Array]:
    """(F1, how much a class is expected or predicted), by class."""
    expected, predicted, right = np.split(means, 3, axis=-1)
    there = expected + predicted
    return _ratio(2 * right, there), there


def _f1(means: Array) -> Array:
    result: Array = _f1_of_each(means)[0][..., 1]
    return result


def _macro_f1(means: Array) -> Array:
    each, there = (part[..., :-1] for part in _f1_of_each(means))  # an answer that is no label has no F1
    some = there > 1e-12
    return _ratio((each * some).sum(-1), some.sum(-1))


def _ratio(above: Array, below: Array) -> Array:
    """0 where there is nothing below: up to rounding, as all answers or all references are the same."""
    some = below > 1e-12
    result: Array = np.where(some, above / np.where(some, below, 1.0), 0.0)
    return result


METRICS: dict[str, tuple[Moments, Callable[[Array], Array]]] = {
    "pearson": (lambda predictions, labels: _of_numbers(predictions, labels, to_number), _pearson),
    "pearson_digits": (lambda predictions, labels: _of_numbers(predictions, labels, to_digits), _pearson),
    "matthews": (_of_labels, _matthews),
    "matthews_exact": (_of_texts, _matthews),
    "f1": (_of_labels, _f1),
    "macro_f1": (_of_labels, _macro_f1),
}
"""Metrics over all of a task's answers: the moments of instances (n m), and the score of their means (… m), -1..1."""

CLASS_METRICS = frozenset(name for name, (of, _) in METRICS.items() if of is _of_labels)
"""Those that read the task's labels."""


def contributions(metric: str, predictions: Sequence[Prediction], labels: Sequence[str]) -> tuple[float, Array]:
    """(score, contribution of every instance), both on the scale 0..100."""
    if metric not in METRICS:
        values = np.array([p["scores"][metric] for p in predictions], dtype=np.float64)
        return float(values.mean()), values
    moments_of, score_of = METRICS[metric]
    moments = moments_of(predictions, labels)
    n, total = len(moments), moments.sum(axis=0)
    score = 100.0 * float(score_of(total / n))
    if n == 1:
        return score, np.array([score])
    left_out: Array = 100.0 * score_of((total - moments) / (n - 1))
    return score, n * score - (n - 1) * left_out


def instance_score(prediction: Prediction, headline: ScoreRow) -> float:
    """The instance's own score; for a metric of all instances together 100 where the answer is right, else below.

    Below 100, numbers that are further from the reference have lower values.
    """
    if headline["metric"] in prediction["scores"]:
        return prediction["scores"][headline["metric"]]
    if prediction["prediction"] in prediction["references"]:
        return 100.0
    try:
        distance = abs(float(prediction["prediction"]) - float(prediction["references"][-1]))
    except ValueError:
        return 0.0
    if not math.isfinite(distance):
        return 0.0
    return 100.0 - 100.0 * distance / (1 + distance) if distance else 100.0

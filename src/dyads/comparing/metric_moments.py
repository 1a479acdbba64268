# SPDX-License-Identifier: Apache-2.0
"""What does one instance give to a task's score, so that the score can be resampled?

    score = f(mean over the instances of m_i)

A metric of single answers has its own value as m_i, and f leaves the mean alone. A correlation or an F1 has no value
for one instance, but is a function of means as well: of x, y, x², y² and xy, or of the cells of a confusion table. So
10,000 resamples are one product of counts with m (comparing/intervals.py), whatever the metric. Metrics that are no
such function (Spearman's ranks, answers that are right in groups) are refused as a headline in comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dyads.comparing.intervals import Array
from dyads.runs.folder import Prediction
from dyads.tasks.metrics import class_ids, to_number

__all__ = ["METRICS", "moments", "score"]


def _of_numbers(predictions: Sequence[Prediction], labels: Sequence[str]) -> Array:
    x = np.array([to_number(p["prediction"]) for p in predictions])
    y = np.array([to_number(p["references"][-1]) for p in predictions])
    x, y = x - x.mean(), y - y.mean()  # changes no correlation, and keeps squares small
    return np.stack([x, y, x * x, y * y, x * y], axis=1)


def _pearson(means: Array) -> Array:
    x, y, xx, yy, xy = np.moveaxis(means, -1, 0)
    return _ratio(xy - x * y, np.sqrt(np.maximum((xx - x * x) * (yy - y * y), 0)))


def _of_classes(predictions: Sequence[Prediction], labels: Sequence[str]) -> Array:
    """Cells of a table (expected, predicted), whose last class is an answer that is no label."""
    size = len(labels) + 1
    given, references = [p["prediction"] for p in predictions], [p["references"] for p in predictions]
    predicted, expected = class_ids("", given, references, labels)
    cells = np.zeros((len(predictions), size, size))
    cells[np.arange(len(predictions)), expected, predicted] = 1  # NO_LABEL is -1: the last
    return cells.reshape(len(predictions), -1)


def _table(means: Array) -> Array:
    size = round(means.shape[-1] ** 0.5)
    table: Array = means.reshape(*means.shape[:-1], size, size)
    return table


def _matthews(means: Array) -> Array:
    table = _table(means)
    expected, predicted, right = table.sum(-1), table.sum(-2), np.trace(table, axis1=-2, axis2=-1)
    spread = (1 - (expected**2).sum(-1)) * (1 - (predicted**2).sum(-1))
    return _ratio(right - (expected * predicted).sum(-1), np.sqrt(np.maximum(spread, 0)))


def _f1_of_each(means: Array) -> tuple[Array, Array]:
    """(F1, how much a class is expected or predicted), by class."""
    table = _table(means)
    there = table.sum(-1) + table.sum(-2)
    return _ratio(2 * np.diagonal(table, axis1=-2, axis2=-1), there), there


def _f1(means: Array) -> Array:
    result: Array = _f1_of_each(means)[0][..., 1]
    return result


def _macro_f1(means: Array) -> Array:
    each, there = (part[..., :-1] for part in _f1_of_each(means))  # an answer that is no label has no F1
    return _ratio((each * (there > 0)).sum(-1), (there > 0).sum(-1))


def _ratio(above: Array, below: Array) -> Array:
    """0 where there is nothing below: up to rounding, as all answers or all references are the same."""
    some = below > 1e-12
    result: Array = np.where(some, above / np.where(some, below, 1.0), 0.0)
    return result


METRICS: dict[str, tuple[Callable[[Sequence[Prediction], Sequence[str]], Array], Callable[[Array], Array]]] = {
    "pearson": (_of_numbers, _pearson),
    "matthews": (_of_classes, _matthews),
    "f1": (_of_classes, _f1),
    "macro_f1": (_of_classes, _macro_f1),
}
"""Metrics over all of a task's answers: what an instance gives (n k), and the function of means (… k) -> (…), -1..1."""


def moments(metric: str, predictions: Sequence[Prediction], labels: Sequence[str]) -> Array:
    """What every instance gives (n k): its score, or of a metric over all answers the parts of the means."""
    if metric in METRICS:
        return METRICS[metric][0](predictions, labels)
    return np.array([[p["scores"][metric]] for p in predictions], dtype=np.float64)


def score(metric: str, means: Array) -> Array:
    """The score, 0..100, from means of moments (… k)."""
    if metric in METRICS:
        return 100.0 * METRICS[metric][1](means)
    return means[..., 0]

# SPDX-License-Identifier: Apache-2.0
"""Few-shot subsets: the training examples that `dyads adapt --shots` keeps."""

from __future__ import annotations

import random
from dataclasses import replace

from dyads.errors import TaskError
from dyads.tasks.family import Suite
from dyads.tasks.task import Example, Task

__all__ = ["few_shot"]


def few_shot(suite: Suite, shots: int | None, seed: int) -> Suite:
    """The suite with `shots` training examples of every task, chosen by the seed; all of them where shots is None.

    Labels are taken in turn, in a random order, so that their counts differ by at most one while each has examples
    left. With the same seed a larger number of shots contains a smaller one. TaskError for a task with fewer examples;
    one without any is left as it is.
    """
    return Suite(tuple(replace(task, train=_shots(task, shots, seed)) for task in suite.tasks), suite.notes)


def _shots(task: Task, shots: int | None, seed: int) -> tuple[Example, ...]:
    if shots is None or not task.train:  # without any, it is scored alone
        return task.train
    if len(task.train) < shots:
        raise TaskError(
            f"task '{task.name}' has {len(task.train)} training examples, fewer than {shots} shots; lower `shots`"
        )
    chance = random.Random(f"shots/{seed}/{task.name}")
    order = chance.sample(range(len(task.train)), len(task.train))
    if task.labels:
        by_label: dict[str, list[int]] = {}
        for i in order:
            by_label.setdefault(task.train[i].references[0], []).append(i)
        ranked = [(place, k, i) for k, places in enumerate(by_label.values()) for place, i in enumerate(places)]
        order = [i for _, _, i in sorted(ranked)]
    return tuple(task.train[i] for i in sorted(order[:shots]))

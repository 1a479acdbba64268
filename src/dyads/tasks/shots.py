# SPDX-License-Identifier: Apache-2.0
"""Which examples are the few of a few-shot training?"""

from __future__ import annotations

import random
from dataclasses import replace

from dyads.errors import TaskError
from dyads.tasks.family import Suite
from dyads.tasks.task import Example, Task

__all__ = ["few_shot"]


def few_shot(suite: Suite, shots: int | None, seed: int) -> Suite:
    """The suite with `shots` training examples of every task, chosen by the seed; all of them where shots is None.

    With labels they are chosen label by label in turn, so that no label has two more than another as long as it has
    examples left; which labels come first is chance too. With one seed, more shots keep the fewer. TaskError for a task
    that has not so many.
    """
    return Suite(tuple(replace(task, train=_shots(task, shots, seed)) for task in suite.tasks), suite.notes)


def _shots(task: Task, shots: int | None, seed: int) -> tuple[Example, ...]:
    if shots is None:
        return task.train
    if len(task.train) < shots:
        raise TaskError(f"task '{task.name}' has {len(task.train)} training examples, fewer than {shots} shots")
    chance = random.Random(f"shots/{seed}/{task.name}")
    order = chance.sample(range(len(task.train)), len(task.train))
    if task.labels:
        by_label: dict[str, list[int]] = {}
        for i in order:
            by_label.setdefault(task.train[i].references[0], []).append(i)
        ranked = [(place, k, i) for k, places in enumerate(by_label.values()) for place, i in enumerate(places)]
        order = [i for _, _, i in sorted(ranked)]
    return tuple(task.train[i] for i in sorted(order[:shots]))

# SPDX-License-Identifier: Apache-2.0
"""Collator that keeps the tasks of its rows beside what any other collator makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dyads.errors import RoutingError
from dyads.tuner.batch_tasks import BatchTasks

__all__ = ["COLUMN", "TaskCollator"]

COLUMN = "task"
"""The column of the rows, and the keyword of the model's call."""


class TaskCollator:
    """A collator around another one, which does not see the column `task` of the rows: a name, or an id.

    The batch has as `task` what the model's call takes: a task for every row; each twice (or three times) where the
    inner collator puts all `chosen` before all `rejected` (and all `reference` after them); one for every packed
    sequence (padding-free batches, rows with `seq_lengths`).
    A row that is packed already may have a list: a task for every one of its sequences, or an id for every token.
    Rows without the column give a batch without it.
    """

    def __init__(self, inner: Callable[[list[Any]], Any], names: Sequence[str] | None = None) -> None:
        """With the `names` of the tasks in the order of their ids, the batch has ids in place of names."""
        self.inner, self.names = inner, None if names is None else tuple(names)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        tasks = [row.get(COLUMN) for row in rows]
        rest = [{key: value for key, value in row.items() if key != COLUMN} for row in rows]
        batch = self.inner(rest)
        missing = [place for place, task in enumerate(tasks) if task is None]
        if len(missing) == len(rows):
            return batch
        if missing:
            raise RoutingError(f"row {missing[0]} of a batch has no column `{COLUMN}`, and others do: give one to each")
        if not isinstance(batch, Mapping):  # rows that the trainer collates itself, as GRPO's
            return [{**row, COLUMN: task} for row, task in zip(batch, tasks, strict=True)]
        return {**batch, COLUMN: self.of_batch(tasks, rest, batch)}

    def of_batch(self, tasks: list[Any], rows: list[dict[str, Any]], batch: Mapping[str, Any]) -> Tensor | list[Any]:
        """The tasks of a batch that the inner collator made of the rows."""
        made = next((v.shape for v in batch.values() if isinstance(v, Tensor) and v.ndim > 0), (len(rows),))
        if any(isinstance(task, (list, tuple, Tensor)) for task in tasks):
            if all("seq_lengths" in row for row in rows):
                return self.ids([t for task, row in zip(tasks, rows, strict=True) for t in _of_sequences(task, row)])
            return _of_tokens([self.ids(list(task)) for task in tasks], made)
        if made[0] in (2 * len(rows), 3 * len(rows)) and any("chosen" in key for key in rows[0]):
            return self.ids(tasks * (made[0] // len(rows)))
        if made[0] in (len(rows), 1):  # 1: one row of all sequences, which the model's call checks
            return self.ids(tasks)
        raise RoutingError(
            f"the collator made {made[0]} rows of {len(rows)}, and which of them has which task is unknown: write the"
            " column `task` of the batch in a collator of your own"
        )

    def ids(self, tasks: list[Any]) -> Tensor | list[Any]:
        """The tasks as ids, where their names are known or they are ids already; else as they are."""
        plain: list[Any] = [task.item() if isinstance(task, Tensor) else task for task in tasks]
        if self.names is not None:
            return BatchTasks(plain).ids("default", self.names, torch.device("cpu"))
        return torch.tensor(plain) if all(isinstance(task, int) for task in plain) else plain


def _of_sequences(task: Any, row: dict[str, Any]) -> list[Any]:
    """The tasks of a packed row's sequences."""
    lengths = [int(length) for length in row["seq_lengths"]]
    if not isinstance(task, (list, tuple, Tensor)):
        return [task] * len(lengths)
    if len(task) == len(lengths):
        return list(task)
    if len(task) != sum(lengths):
        raise RoutingError(
            f"a packed row of {len(lengths)} sequences and {sum(lengths)} tokens has {len(task)} tasks: give one for"
            " every sequence, or for every token"
        )
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    return [task[start] for start in starts]


def _of_tokens(tasks: list[Any], made: Sequence[int]) -> Tensor:
    """Ids of the tokens as (b t), padded at the end, or in one row for a batch without padding."""
    if not all(isinstance(task, Tensor) for task in tasks):
        raise RoutingError("the tasks of tokens must be ids, or names with TaskCollator(inner, names)")
    if made[0] == 1 and len(tasks) > 1:
        tasks = [torch.cat(tasks)]
    width = made[1] if len(made) > 1 else 0
    if len(tasks) != made[0] or any(len(task) > width for task in tasks):
        raise RoutingError(f"tasks of {[len(task) for task in tasks]} tokens do not fit a batch of shape {tuple(made)}")
    return torch.stack([torch.cat([task, task.new_zeros(width - len(task))]) for task in tasks])

# SPDX-License-Identifier: Apache-2.0
"""TaskCollator: the tasks of rows beside what any collator makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, default_data_collator

from dyads import TaskCollator
from dyads.errors import RoutingError


def rows(*tasks: Any, width: int = 3) -> list[dict[str, Any]]:
    return [{"input_ids": list(range(width)), "labels": list(range(width)), "task": task} for task in tasks]


def test_names_and_ids_are_kept_and_the_inner_collator_sees_neither() -> None:
    seen: list[dict[str, Any]] = []

    def inner(given: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(given)
        return default_data_collator(given)

    given = rows("rte", "cola")
    assert TaskCollator(inner)(given)["task"] == ["rte", "cola"]
    assert all("task" not in row for row in seen)
    assert given[0]["task"] == "rte"
    assert_close(TaskCollator(inner)(rows(2, 0))["task"], torch.tensor([2, 0]))
    assert_close(TaskCollator(inner, ["rte", "cola"])(given)["task"], torch.tensor([0, 1]))
    with pytest.raises(RoutingError, match="does not know task 'colla' – did you mean 'cola'"):
        TaskCollator(inner, ["rte", "cola"])(rows("colla"))


def test_rows_without_tasks_give_a_batch_without_them() -> None:
    plain = [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]
    assert set(TaskCollator(default_data_collator)(plain)) == {"input_ids"}
    with pytest.raises(RoutingError, match="row 1 of a batch has no column `task`"):
        TaskCollator(default_data_collator)([{"input_ids": [1], "task": "rte"}, {"input_ids": [2]}])


def test_chosen_rows_come_before_rejected_ones() -> None:
    def pairs(given: list[dict[str, Any]]) -> dict[str, Any]:
        return {"input_ids": torch.tensor([r["chosen_ids"] for r in given] + [r["rejected_ids"] for r in given])}

    given = [{"chosen_ids": [1], "rejected_ids": [2], "task": task} for task in ("rte", "cola", "sst2")]
    assert TaskCollator(pairs)(given)["task"] == ["rte", "cola", "sst2", "rte", "cola", "sst2"]


def test_other_numbers_of_rows_are_refused() -> None:
    def doubled(given: list[dict[str, Any]]) -> dict[str, Any]:
        return {"input_ids": torch.zeros(2 * len(given), 3)}

    with pytest.raises(RoutingError, match="the collator made 4 rows of 2"):
        TaskCollator(doubled)(rows("rte", "cola"))


def test_padding_free_batches_have_a_task_for_every_sequence() -> None:
    batch = TaskCollator(DataCollatorWithFlattening())(rows(1, 0))
    assert batch["input_ids"].shape == (1, 6)
    assert_close(batch["task"], torch.tensor([1, 0]))


def flattened(given: list[dict[str, Any]]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([token for row in given for token in row["input_ids"]])[None]}


@pytest.mark.parametrize("task", [[4, 2], [4, 4, 2]])
def test_packed_rows_have_a_task_for_every_sequence_or_token(task: list[int]) -> None:
    packed = [{"input_ids": [7, 8, 9], "seq_lengths": [2, 1], "task": task}] * 2
    assert_close(TaskCollator(flattened)(packed)["task"], torch.tensor([4, 2, 4, 2]))
    with pytest.raises(RoutingError, match="a packed row of 2 sequences and 3 tokens has 4 tasks"):
        TaskCollator(flattened)([{**packed[0], "task": [1, 2, 3, 4]}])


def test_tasks_of_tokens_are_padded_as_their_rows_are() -> None:
    def right(given: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [torch.tensor(row["input_ids"]) for row in given]
        return {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)}

    given = [{"input_ids": [7, 8, 9], "task": [1, 1, 2]}, {"input_ids": [7], "task": [2]}]
    assert_close(TaskCollator(right)(given)["task"], torch.tensor([[1, 1, 2], [2, 0, 0]]))
    assert_close(TaskCollator(flattened)(given)["task"], torch.tensor([[1, 1, 2, 2]]))
    with pytest.raises(RoutingError, match="the tasks of tokens must be ids"):
        TaskCollator(right)([{"input_ids": [7], "task": ["rte"]}])
    with pytest.raises(RoutingError, match=r"tasks of \[4\] tokens do not fit a batch of shape \(1, 3\)"):
        TaskCollator(right)([{"input_ids": [7, 8, 9], "task": [1, 1, 2, 2]}])


def test_rows_that_a_trainer_collates_itself_keep_their_tasks() -> None:
    given = [{"prompt": "a", "task": "rte"}, {"prompt": "b", "task": "cola"}]
    assert TaskCollator(lambda batch: batch)(given) == given

# SPDX-License-Identifier: Apache-2.0
"""Similarity of tasks in hand-made adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dyads.analysis.gates import gates_of
from dyads.analysis.tasks import task_similarity
from dyads.errors import RunError
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedLayer
from made_adapters import choose_experts, orthonormal, save_adapter
from tiny import TASKS, Variant

MOELORA = Variant("moelora", (("r", 6), ("num_experts", 3), ("task_dim", 5)))


def test_tasks_with_equal_gates_have_similarity_1_and_with_other_experts_0(tmp_path: Path) -> None:
    found = task_similarity(save_adapter(tmp_path, MOELORA, choose_experts(0, 2, 0)))
    assert found.similarity.names == ("by", "task", "other")
    assert found.similarity.axes["by"] == ("gates", "embeddings", "updates")
    alike = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    for by in found.similarity.axes["by"]:
        assert np.allclose(found.similarity.at(by=by).values, alike, atol=1e-6), by
    merges = found.merges.at(by="updates").values
    assert set(merges[0, :2]) == {0, 2}
    assert np.allclose(merges[:, 2], [0, 1])
    assert found.order("gates").index(1) in (0, 2)
    assert [row[:3] for row in found.tables[0].rows if row[0] == TASKS[0]] == [(TASKS[0], TASKS[2], "1.00")]


def test_updates_are_compared_as_the_weights_they_add(tmp_path: Path) -> None:
    change = partial(save_adapter, variant=Variant("mtl_lora"), change=lambda core, A, B: core.transform.normal_())
    gates = gates_of(change(tmp_path, alpha_pattern={"v_proj": 64}))

    def scale(layer: SavedLayer) -> float:
        return 64 if "v_proj" in layer.module else gates.adapter.config.lora_alpha

    updates = torch.stack(
        [
            torch.cat(
                [
                    scale(layer) * (layer.B @ G[t] @ layer.A).flatten().double()  # type: ignore[operator]
                    for layer, G in zip(gates.adapter.layers, gates.matrices, strict=True)
                ]
            )
            for t in range(3)
        ]
    )
    wanted = torch.nn.functional.cosine_similarity(updates[:, None], updates[None], dim=-1)
    found = task_similarity(tmp_path).similarity.at(by="updates").values
    assert np.allclose(found, wanted.detach(), atol=1e-5)
    assert np.abs(found - np.eye(3)).max() > 0.01


def test_an_update_of_zero_is_like_no_other(tmp_path: Path) -> None:
    save_adapter(tmp_path, MOELORA, lambda core, A, B: B.zero_())
    assert np.allclose(task_similarity(tmp_path).similarity.at(by="updates").values, np.eye(3))


def test_token_gates_are_compared_by_their_means(trained: Callable[..., RunFolder]) -> None:
    found = task_similarity(trained("mode"), instances=1)
    assert found.similarity.axes["by"] == ("gates", "updates")
    assert (found.similarity.values <= 1).all()
    assert found.similarity.at(by="gates").values.min() > 0.5


def test_one_update_for_all_tasks_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, Variant("mode", (("num_experts", 1),)), orthonormal)
    with pytest.raises(RunError, match="same gates for all tasks"):
        task_similarity(tmp_path)

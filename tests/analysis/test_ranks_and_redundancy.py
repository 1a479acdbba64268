# SPDX-License-Identifier: Apache-2.0
"""Ranks, effective ranks, and overlaps of subspaces in hand-made adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from dyads.analysis.ranks import ranks
from dyads.analysis.redundancy import overlap_of_adapters, redundancy
from dyads.errors import RunError
from dyads.runs.folder import RunFolder
from made_adapters import choose_experts, orthonormal, save_adapter
from tiny import TASKS, Variant, tiny_model

MORE = Variant("more", (("r", 5), ("embedding", "none"), ("linear_scaling", "none")))
MOELORA = Variant("moelora", (("r", 6), ("num_experts", 3), ("task_dim", 5)))


def choose_ranks(*chosen: int) -> Callable[..., None]:
    def change(core: Any, A: Tensor, B: Tensor) -> None:
        orthonormal(core, A, B)
        core.logits.zero_()
        for task, rank in enumerate(chosen):
            core.logits[task, rank - 1] = 10

    return change


def test_the_effective_rank_of_equal_singular_values_is_the_chosen_rank(tmp_path: Path) -> None:
    found = ranks(save_adapter(tmp_path, MORE, choose_ranks(1, 3, 5)))
    assert found.chosen is not None
    assert found.chosen.names == found.effective.names == ("task", "layer")
    assert found.chosen.mean("layer").values.tolist() == [1, 3, 5]
    assert np.allclose(found.effective.mean("layer").values, [1, 3, 5])
    assert set(found.largest.values) == {5}
    assert found.tables[0].rows[1][:2] == (TASKS[1], "3.0")


def test_the_effective_rank_is_that_of_the_weights_added(tmp_path: Path) -> None:
    save_adapter(tmp_path, Variant("mode", (("num_experts", 1),)), lambda core, A, B: (A.normal_(), B.normal_()))
    found = ranks(tmp_path)
    from dyads.runs.saved import SavedAdapter

    layer = SavedAdapter.read(tmp_path).layers[0]
    values = torch.linalg.svdvals((layer.B @ layer.A).double())  # type: ignore[operator]
    p = values[values > 1e-9] / values.sum()
    assert found.effective.values[0, 0] == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-5)
    assert found.chosen is None


def test_an_update_of_zero_has_effective_rank_0(tmp_path: Path) -> None:
    assert not ranks(save_adapter(tmp_path, MORE, lambda core, A, B: B.zero_())).effective.values.any()


def test_pefts_lora_has_one_effective_rank(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    found = ranks(tmp_path)
    assert found.effective.axes["task"] == ("all tasks",)
    assert ((found.effective.values > 1) & (found.effective.values <= 3)).all()


def test_token_gates_have_the_effective_rank_of_their_mean(trained: Callable[..., RunFolder]) -> None:
    found = ranks(trained("mode"), instances=1)
    assert ((found.effective.values > 0) & (found.effective.values <= 4)).all()
    assert "means over" in found.notes[0]


def test_experts_with_one_down_projection_overlap_there_alone(tmp_path: Path) -> None:
    def same_down(core: Any, A: Tensor, B: Tensor) -> None:
        orthonormal(core, A, B)
        A[2:4] = A[:2].flip(0) * 3  # expert 1 reads what expert 0 reads; expert 2 nothing of it

    found = redundancy(save_adapter(tmp_path, Variant("molora", (("r", 2),)), same_down))
    assert found.experts is not None
    assert found.experts.names == ("side", "layer", "expert", "other")
    down, up = (found.experts.at(side=side).mean("layer").values for side in ("down", "up"))
    assert np.allclose(down, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert np.allclose(up, np.eye(3))
    assert found.tasks is None
    assert "tasks are not compared" in found.notes[0]


def test_experts_that_share_a_overlap_in_it_wholly(tmp_path: Path) -> None:
    found = redundancy(save_adapter(tmp_path, Variant("mode"), orthonormal)).experts
    assert found is not None
    assert np.allclose(found.at(side="down").values, 1)
    assert np.allclose(found.at(side="up").values, np.eye(3))


def test_tasks_with_other_experts_do_not_overlap_and_nested_ranks_do(tmp_path: Path) -> None:
    apart = redundancy(save_adapter(tmp_path / "a", MOELORA, choose_experts(0, 1, 0))).tasks
    assert apart is not None
    assert np.allclose(apart.mean("layer", "side").values, [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    nested = redundancy(save_adapter(tmp_path / "b", MORE, choose_ranks(1, 3, 5))).tasks
    assert nested is not None
    assert np.allclose(nested.values, 1)


def test_an_expert_without_an_update_has_no_overlap(tmp_path: Path) -> None:
    def silent(core: Any, A: Tensor, B: Tensor) -> None:
        orthonormal(core, A, B)
        B[:, :2] = 0

    found = redundancy(save_adapter(tmp_path, Variant("molora", (("r", 2),)), silent)).experts
    assert found is not None
    assert np.isnan(found.values[:, :, 0]).all()
    assert np.isfinite(found.values[:, :, 1:, 1:]).all()


def test_loras_are_compared_by_their_projections(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ("one", "two"):
        config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model("llama"), config)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_A" in key:
                    weight.copy_(torch.eye(3, 32))
                elif "lora_B" in key:
                    weight.copy_(torch.eye(32, 6)[:, :3] if name == "one" else torch.eye(32, 6)[:, 3:])
        model.save_pretrained(tmp_path / name)
    found = overlap_of_adapters({"one": tmp_path / "one", "two": tmp_path / "two"})
    assert found.names == ("side", "layer", "adapter", "other")
    assert np.allclose(found.at(side="down").values, 1)
    assert np.allclose(found.at(side="up").values, np.eye(2))
    with pytest.raises(RunError, match="needs two adapters or more, got 1"):
        overlap_of_adapters({"one": tmp_path / "one"})
    save_adapter(tmp_path / "mode", Variant("mode"), orthonormal, target_modules=["q_proj"])
    with pytest.raises(RunError, match="adapter 'mode' has gates"):
        overlap_of_adapters({"one": tmp_path / "one", "mode": tmp_path / "mode"})


def test_refusals(tmp_path: Path) -> None:
    save_adapter(tmp_path / "one", Variant("mode", (("num_experts", 1),)), orthonormal)
    with pytest.raises(RunError, match="nothing can overlap"):
        redundancy(tmp_path / "one")
    get_peft_model(tiny_model("llama"), LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(RunError, match="neither experts nor tasks to compare"):
        redundancy(tmp_path / "lora")
    save_adapter(tmp_path / "more", Variant("more"), orthonormal, rank_pattern={"v_proj": 2})
    for question in (redundancy, ranks):
        with pytest.raises(RunError, match="gates of unequal sizes"):
            question(tmp_path / "more")

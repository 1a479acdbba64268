# SPDX-License-Identifier: Apache-2.0
"""The warning about collapsed routers in training, and that looking at gates changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder
from dyads.training import collapse
from dyads.training.collapse import CollapseCallback, collapsed
from dyads.training.train import train
from made_adapters import choose_experts
from tiny import TARGETS, Variant, adapted_layers, batch, tiny_model

Tiny = Callable[..., Recipe]


def test_one_expert_with_nearly_all_weight_is_a_collapse() -> None:
    found = collapsed(
        {
            "even": torch.full((2, 4), 0.25),
            "one": torch.tensor([[0.5, 0.5, 0.0], [0.02, 0.03, 0.95]]),
            "single expert": torch.ones(2, 1),
        }
    )
    assert found == {"one": (2, pytest.approx(0.95))}


def steps_of(callback: CollapseCallback, model: Any, variant: Variant, steps: int) -> None:
    model.train()
    for step in range(steps):
        callback.on_step_begin(None, SimpleNamespace(global_step=step), None, model=model)
        given = {"task": ["rte", "cola", "sst2"]} if "task" in variant.looks_at else {}
        model(**batch("llama"), labels=batch("llama")["input_ids"], **given)
        callback.on_step_end(None, SimpleNamespace(global_step=step + 1), None, model=model)


@pytest.mark.parametrize(("experts", "warns"), [((1, 1, 1), True), ((0, 1, 2), False)])
def test_task_gates_collapse_where_all_tasks_use_one_expert(
    experts: tuple[int, ...], warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    variant = Variant("moelora", (("r", 6), ("num_experts", 3), ("task_dim", 5)))
    model = get_peft_model(tiny_model("llama"), variant.config(target_modules=TARGETS["llama"]))
    with torch.no_grad():
        for layer in adapted_layers(model):
            choose_experts(*experts)(
                layer.core("default"), layer.lora_A["default"].weight, layer.lora_B["default"].weight
            )
    folder = RunFolder(tmp_path)
    with caplog.at_level(logging.WARNING, "dyads"):
        steps_of(CollapseCallback(folder, 20, mixed=False), model, variant, 4)
    events = [line for line in folder.log() if line.get("event") == "collapsed"]
    if not warns:
        assert events == []
        assert caplog.text == ""
        return
    assert [(line["step"], len(line["layers"])) for line in events] == [(2, 6)]  # every second step, and once
    assert {str(layer) for layer in events[0]["layers"].values()} == {"{'expert': 1, 'weight': 1.0}"}
    assert "step 2: collapsed routers in 6 of 6 layers" in caplog.text
    assert "--what routing" in caplog.text


def test_token_gates_are_read_in_the_batches_of_the_training(tmp_path: Path) -> None:
    variant = Variant("mode")
    model = get_peft_model(tiny_model("llama"), variant.config(target_modules=TARGETS["llama"]))
    callback = CollapseCallback(RunFolder(tmp_path), 10, mixed=True)
    steps_of(callback, model, variant, 1)
    assert len(callback.sums) == 6
    for weights in callback.sums.values():
        assert weights.shape == (4, 3)
        assert weights.sum(-1).tolist() == pytest.approx([21.0] * 4)  # 3 rows of 7 tokens
    hooks = [layer._forward_pre_hooks for layer in adapted_layers(model)]
    assert not any(hooks)


def test_padding_does_not_count(tmp_path: Path) -> None:
    variant = Variant("mode")
    model = get_peft_model(tiny_model("llama"), variant.config(target_modules=TARGETS["llama"])).train()
    callback = CollapseCallback(RunFolder(tmp_path), 1, mixed=True)
    callback.on_step_begin(None, SimpleNamespace(global_step=0), None, model=model)
    inputs = batch("llama")
    inputs["attention_mask"][0, 3:] = 0
    model(**inputs, labels=inputs["input_ids"])
    callback.on_step_end(None, SimpleNamespace(global_step=1), None, model=model)
    assert {round(float(w.sum(-1)[0])) for w in callback.sums.values()} == {17}


@pytest.mark.parametrize("method", ["mode", "smora"])
def test_reading_the_gates_changes_no_training(
    method: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {} if method == "mode" else {"name": "smora", "r": 4, "top_k": 2, "bias_rate": 0.01}
    recipe = tiny("mode" if method == "mode" else "lora", options=options)
    seen = train(recipe, tmp_path / "seen", evaluate=False)
    monkeypatch.setattr(CollapseCallback, "on_step_begin", lambda *args, **kwargs: None)
    unseen = train(recipe, tmp_path / "unseen", evaluate=False)
    one, other = (load_file(folder.adapter / "adapter_model.safetensors") for folder in (seen, unseen))
    assert_close(one, other, rtol=0, atol=0)


def test_a_training_logs_its_collapse_and_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(collapse, "DOMINANT", 0.3)  # at the start three experts have a third each
    folder = train(tiny("mode"), tmp_path / "a", evaluate=False)
    events = [line for line in folder.log() if line.get("event") == "collapsed"]
    assert [line["step"] for line in events] == [1]
    assert "collapsed routers in" in caplog.text
    assert folder.has_adapter
    folder = train(tiny("mode", seed=1, mixture={"batches": "one_task"}), tmp_path / "b", evaluate=False)
    assert not [line for line in folder.log() if line.get("event") == "collapsed"]  # one task's tokens prove nothing

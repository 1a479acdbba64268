# SPDX-License-Identifier: Apache-2.0
"""Adding a task to a trained adapter, which leaves the outputs of its other tasks bit-identical."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

import dyads
from dyads import MoDEConfig, MoREConfig, TaskMoDEConfig, add_task
from dyads.errors import ConfigError, RoutingError
from dyads.methods.more import MoRE
from dyads.tuner import similarity_to_tasks
from tiny import TARGETS, TASKS, VARIANTS, Variant, batch, tiny_model

LOOKING = [v for v in VARIANTS if "task" in v.looks_at and "score=h+task" not in v.id]
looking = pytest.mark.parametrize("variant", LOOKING, ids=lambda v: v.id)


def adapted(variant: Variant, kind: str = "llama") -> PeftModel:
    config = variant.config(target_modules=TARGETS[kind], init_weights=False)
    model = get_peft_model(tiny_model(kind), config).eval()
    for core in (m for m in model.modules() if isinstance(m, dyads.methods.Core)):
        for parameter in core.parameters():
            nn.init.normal_(parameter)  # tasks that differ
    return model


def logits(model: nn.Module, *tasks: str, kind: str = "llama") -> Tensor:
    with torch.no_grad():
        return model(**batch(kind), task=list(tasks)).logits


@looking
def test_a_new_task_leaves_the_others_bit_identical_and_what_was_frozen_frozen(variant: Variant) -> None:
    for start in ("mean", "fresh", "cola"):
        model = adapted(variant)
        before, flags = logits(model, *TASKS), {name: p.requires_grad for name, p in model.named_parameters()}
        add_task(model, "wic", start)
        assert torch.equal(logits(model, *TASKS), before)
        assert torch.isfinite(logits(model, "wic", "rte", "wic")).all()
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize(("score", "count"), [("x+task", 1), ("h+task", 15), ("task", 2)])
def test_also_while_weights_are_frozen(score: str, count: int) -> None:
    names = [f"t{i}" for i in range(count)]
    config = TaskMoDEConfig(r=3, num_experts=5, score=score, tasks=names, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(tiny_model("llama"), config).eval()
    routing = next(m.routing for m in model.modules() if hasattr(m, "routing"))

    def frozen(task: str) -> Tensor:
        with routing.unchanged_weights():
            return logits(model, task, task, task)

    before = [frozen(name) for name in names]
    add_task(model, "wic", names[-1])
    assert all(torch.equal(frozen(name), value) for name, value in zip(names, before, strict=True))
    assert torch.equal(frozen("wic"), before[-1])


def test_tasks_may_be_called_as_the_starts_are() -> None:
    model = adapted(Variant("more"))
    add_task(model, "fresh", "cola")
    add_task(model, "mean", "rte")
    add_task(model, "wic", 4)
    assert torch.equal(logits(model, "wic", "fresh", "wic"), logits(model, "rte", "cola", "rte"))
    with pytest.raises(ConfigError, match="cannot start from task 6: ids go from 0 to 5"):
        add_task(model, "boolq", 6)


@looking
def test_every_tensor_that_is_returned_has_the_mean_or_a_fresh_row_as_its_last(variant: Variant) -> None:
    grown = add_task(adapted(variant), "wic")
    assert grown
    for tensor in grown:
        assert len(tensor) == len(TASKS) + 1
        assert_close(tensor[-1], tensor[:-1].mean(0))
    # A fresh row is drawn, or the constant that a method starts from; never a task's trained row.
    for tensor in add_task(adapted(variant), "wic", "fresh"):
        one_of_few = "frozen_random" in variant.id  # one of r choices
        assert one_of_few or not any(torch.equal(tensor[-1], row) for row in tensor[:-1])


@looking
def test_the_new_task_is_saved_and_loaded_and_merged_as_any_other(variant: Variant, tmp_path: Path) -> None:
    model = adapted(variant)
    add_task(model, "wic", "rte")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    tasks = ("wic", "cola", "rte")
    assert torch.equal(logits(again, *tasks), logits(model, *tasks))
    if variant.looks_at == {"task"}:
        expected = logits(model, "wic", "wic", "wic")
        model.base_model.merge_adapter(task="wic")
        assert_close(logits(model, "wic", "wic", "wic"), expected, rtol=1e-3, atol=1e-3)


@looking
def test_tasks_can_be_added_one_after_the_other(variant: Variant) -> None:
    model = adapted(variant)
    before = logits(model, *TASKS)
    add_task(model, "wic", "cola")
    assert torch.equal(logits(model, "wic", "wic", "wic"), logits(model, "cola", "cola", "cola"))
    add_task(model, "boolq", "wic")
    assert torch.equal(logits(model, *TASKS), before)
    assert torch.equal(logits(model, "boolq", "cola", "wic"), logits(model, "wic", "cola", "boolq"))
    assert model.peft_config["default"].tasks == [*TASKS, "wic", "boolq"]


def test_an_adapter_of_the_same_config_keeps_its_tasks(tmp_path: Path) -> None:
    config = MoREConfig(tasks=list(TASKS), target_modules=TARGETS["llama"])
    model = get_peft_model(tiny_model("llama"), config)
    model.add_adapter("other", config)
    add_task(model, "wic")
    assert config.tasks == list(TASKS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "other")
    assert again.peft_config["default"].tasks == list(TASKS)
    assert PeftModel.from_pretrained(tiny_model("llama"), tmp_path).peft_config["default"].tasks == [*TASKS, "wic"]


def test_a_shared_table_stays_shared() -> None:
    config = MoREConfig(tasks=list(TASKS), embedding="shared", task_dim=5, target_modules=TARGETS["llama"])
    model = get_peft_model(tiny_model("llama"), config)
    (table,) = add_task(model, "wic")
    with torch.no_grad():
        table[-1] += 1
    tables = {id(m.table()) for m in model.modules() if isinstance(m, dyads.methods.more.MoRE)}
    assert tables == {id(table)}


def test_the_update_scaling_keeps_its_number_of_tasks() -> None:
    config = MoREConfig(tasks=list(TASKS), linear_scaling="update", target_modules=TARGETS["llama"])
    model = get_peft_model(tiny_model("llama"), config)
    add_task(model, "wic")
    add_task(model, "boolq")
    assert model.peft_config["default"].scaled_tasks == len(TASKS)
    assert model.peft_config["default"].num_tasks == len(TASKS) + 2


def test_decoding_in_progress_sees_the_new_row() -> None:
    model = adapted(Variant("more"))
    routing = next(m.routing for m in model.modules() if hasattr(m, "routing"))
    with torch.no_grad(), routing.unchanged_weights():
        logits(model, *TASKS)
        add_task(model, "wic", "rte")
        assert torch.equal(logits(model, "wic", "wic", "wic"), logits(model, "rte", "rte", "rte"))


def test_a_sample_is_most_like_the_task_whose_embedding_points_its_way() -> None:
    config = MoREConfig.paper(tasks=list(TASKS), target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(tiny_model("llama"), config).eval()
    inputs = batch("llama", rows=2)
    seen: list[Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, dyads.tuner.DyadsLinear)]
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean(1)[0])) for layer in layers]
    logits(model, "rte", "rte", "rte")
    for hook in hooks:
        hook.remove()
    inputs = batch("llama")
    with torch.no_grad():
        for layer, x in zip(layers, seen, strict=True):
            layer.core("default").table()[1] = 3 * x
    scores = similarity_to_tasks(model, inputs, "rte")
    assert scores.shape == (3, len(TASKS))
    assert scores[0].argmax() == 1
    assert_close(scores[0, 1], torch.tensor(1.0))
    assert scores.abs().max() <= 1 + 1e-6


def test_padding_does_not_count_in_the_similarity() -> None:
    config = TaskMoDEConfig(tasks=list(TASKS), target_modules=TARGETS["bert"], contrastive=0.1)
    model = get_peft_model(tiny_model("bert"), config)
    short = batch("bert", rows=2, width=4)
    padded = {k: torch.cat([v, torch.zeros(2, 3, dtype=v.dtype)], 1) for k, v in short.items()}
    assert_close(similarity_to_tasks(model, padded, "rte"), similarity_to_tasks(model, short, "rte"))


def test_refusals() -> None:
    plain = get_peft_model(tiny_model("llama"), MoDEConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"'default' \(mode\) does not look at the task, so there is no task to add"):
        add_task(plain, "wic")
    more = adapted(Variant("more"))
    with pytest.raises(ConfigError, match="knows a task 'cola' already: give the new one another name"):
        add_task(more, "cola")
    with pytest.raises(ConfigError, match="cannot start from 'meen' – did you mean 'mean'"):
        add_task(more, "wic", "meen")
    with pytest.raises(RoutingError, match="has no dyads adapter 'other' – known: default"):
        add_task(more, "wic", adapter="other")
    with pytest.raises(ConfigError, match="was not trained with a contrastive loss"):
        similarity_to_tasks(more, batch("llama"), "rte")
    more.base_model.merge_adapter(task="rte")
    with pytest.raises(ConfigError, match="is merged into the model: call unmerge_adapter"):
        add_task(more, "wic")


def test_a_method_whose_declarations_do_not_hold_gets_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny_model("llama"), MoREConfig(r=2, tasks=["a"], target_modules=["q_proj"]))
    monkeypatch.setattr(MoRE, "looks_at", frozenset())
    with pytest.raises(ConfigError, match=r"MoRE declares looks_at = \[\], but its gates change with task"):
        add_task(model, "b")
    assert model.base_model.routing.names == {"default": ("a",)}

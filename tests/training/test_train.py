# SPDX-License-Identifier: Apache-2.0
"""A run trains what its recipe says, repeats exactly, goes on where it stopped, and stops where it breaks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainingArguments

from dyads.data.batches import Collator, TaskDataset, pad_id_of
from dyads.errors import ConfigError, DyadsError, RunError, TaskError
from dyads.recipe.spec import EvaluateSpec, Recipe
from dyads.runs.accept import accept
from dyads.runs.folder import RunFolder
from dyads.tasks import load_suite
from dyads.training import trainer as trainer_module
from dyads.training.train import Training, train, training_arguments
from dyads.training.trainer import label_loss
from dyads.tuner.batch_tasks import BatchTasks

Tiny = Callable[..., Recipe]
METHODS = ("lora", "mode", "more")


def adapter_of(folder: RunFolder) -> dict[str, Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")


def bytes_in(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_everything_that_it_is_made_of(method: str, tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(method, train={"validation_limit": 2})
    folder = train(recipe, tmp_path / "run")
    assert RunFolder.open(folder.path).recipe() == recipe
    assert folder.environment()["seed"] == 0
    for task in load_suite(recipe.tasks).tasks:
        kept = folder.templates()[task.name]
        assert kept == task.template.model_copy(update={"max_new_tokens": task.max_new_tokens})
    log = folder.log()
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3]
    assert all(line["grad_norm"] > 0 for line in log if "loss" in line)
    (trained,) = [line for line in log if line.get("event") == "trained"]
    assert trained["step"] == 3
    assert [line["validation_loss"] > 0 for line in log if line.get("event") == "validated"] == [True]

    weights = adapter_of(folder)
    saved = sum(w.numel() for w in weights.values())
    assert trained["parameters"] == saved
    ups = [w for name, w in weights.items() if name.endswith("lora_B.weight")]
    assert ups
    assert all(w.abs().max() > 0 for w in ups), "training moves every B away from zero"

    scores = folder.scores()
    assert (scores["method"], scores["split"], scores["seed"]) == (recipe.method.name, "test", 0)
    assert (scores["parameters"], scores["steps"]) == (saved, 3)
    assert [row["task"] for row in scores["scores"] if row["headline"]] == list(recipe.tasks.names)
    for row in scores["scores"]:
        predictions = folder.predictions(row["task"])
        values = [p["scores"][row["metric"]] for p in predictions]
        assert (row["n"], row["version"], len(values)) == (4, 1, 4)
        assert row["value"] == pytest.approx(sum(values) / 4)


def test_an_encoder_decoder_trains_and_answers(tiny: Tiny, t5: Path, tmp_path: Path) -> None:
    folder = train(tiny("mode", t5), tmp_path / "run")
    assert folder.is_scored
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"


def test_training_learns(tiny: Tiny, tmp_path: Path) -> None:
    one = {"family": "starter", "names": ["has_animal"], "train_per_task": 8, "test_per_task": 2}
    folder = train(tiny("mode", tasks=one, train={"steps": 30, "batch_size": 8}), tmp_path / "a", evaluate=False)
    losses = [line["loss"] for line in folder.log() if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert not folder.is_scored


def test_parts_of_the_adapter_learn_at_their_own_rates(tiny: Tiny, tmp_path: Path) -> None:
    """Three steps of AdamW move every weight by at most three times its rate; A and B are not held back."""
    fresh = Training(tiny("mode"), load_suite(tiny("mode").tasks)).model.state_dict()
    recipe = tiny("mode", train={"rates": {"router": 1e-4}})
    weights = adapter_of(train(recipe, tmp_path / "run", evaluate=False))
    rate = recipe.train.learning_rate
    for name, after in weights.items():
        stored = next(key for key in fresh if key.replace(".default", "") == name)
        moved = (after - fresh[stored]).abs().max().item()
        if "router" in name:
            assert 0 < moved <= 3 * 1e-4 * rate * 1.01, name
        else:
            assert moved > 0.1 * rate, name


@pytest.mark.parametrize("method", ["zero-shot", "majority"])
def test_methods_that_train_nothing_are_only_scored(method: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = train(tiny(method), tmp_path / "run")
    scores = folder.scores()
    assert (scores["parameters"], scores["steps"], scores["seconds"]["train"]) == (0, 0, 0.0)
    assert not folder.adapter.exists()
    if method == "majority":
        assert len({p["prediction"] for p in folder.predictions("has_animal")}) == 1


# --- the loss ---------------------------------------------------------------------------------------------------------


def _gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _of_labels_only(training: Training, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    total, count, _ = label_loss(training.model, training.model, inputs, batch["labels"], training.encoder_decoder)
    assert count == (batch["labels"] != -100).sum()
    return total / count, _gradients(training.model, total / count)


def _batch(training: Training) -> dict[str, Tensor]:
    collator = Collator(pad_id_of(training.tokenizer), encoder_decoder=training.encoder_decoder)
    return dict(collator([training.dataset[task, i] for task in range(3) for i in range(2)]))  # type: ignore[arg-type]


def test_padding_of_targets_does_not_count_in_the_auxiliary_loss(tiny: Tiny, t5: Path) -> None:
    recipe = tiny("more", t5)
    training = Training(recipe, load_suite(recipe.tasks))
    model = training.model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = _batch(training)
    found = []
    for padding in (0, 5):
        labels = torch.nn.functional.pad(batch["labels"], (0, padding), value=-100)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        loss, _, auxiliary = label_loss(model, model, inputs, labels, encoder_decoder=True)
        found.append((loss.detach(), auxiliary.detach()))
    assert found[0][1] > 0
    assert_close(found[1], found[0])


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer is part:UserWarning")
@pytest.mark.parametrize("kind", ["linear head", "saved head", "tied and adapted head", "t5"])
def test_the_loss_of_label_positions_is_the_models_own(
    kind: str, tiny: Tiny, t5: Path, other_llama: Callable[..., Path]
) -> None:
    options: dict[str, Any] = {"init_weights": False}
    if "adapted" in kind:
        options["target_modules"] = ["q_proj", "lm_head"]
    if "saved" in kind:
        options["modules_to_save"] = ["lm_head"]
    model = t5 if kind == "t5" else other_llama(tie_word_embeddings="tied" in kind)
    recipe = tiny("mode", model, options=options)
    training = Training(recipe, load_suite(recipe.tasks))
    batch = _batch(training)
    loss, gradients = _of_labels_only(training, batch)
    own = training.model(**{k: v for k, v in batch.items() if k != "task"}).loss
    assert_close(loss, own)
    assert_close(gradients, _gradients(training.model, own), rtol=1e-4, atol=1e-6)
    assert any("router" in name for name in gradients)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_only_label_positions_go_through_the_head(kind: str, tiny: Tiny, t5: Path) -> None:
    recipe = tiny("mode", t5 if kind == "t5" else None)
    training = Training(recipe, load_suite(recipe.tasks))
    seen: list[tuple[int, ...]] = []
    head = training.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    batch = _batch(training)
    _of_labels_only(training, batch)
    assert seen == [(int((batch["labels"] != -100).sum()), 32)]
    assert not head._forward_pre_hooks, "nothing stays behind on the head"


def test_what_a_method_adds_to_the_loss_is_in_it_once_and_told_apart(tiny: Tiny, tmp_path: Path) -> None:
    first, apart = {}, {}
    for weight, parts in ((0.0, 1), (0.1, 1), (0.2, 1), (0.2, 4)):
        recipe = tiny("more", options={"contrastive": weight}, train={"steps": 1, "gradient_accumulation": parts})
        folder = train(recipe, tmp_path / f"{weight}-{parts}", evaluate=False)
        (line,) = [line for line in folder.log() if "loss" in line]
        first[weight, parts], apart[weight, parts] = line["loss"], line.get("auxiliary_loss")
    added = first[0.1, 1] - first[0.0, 1]
    assert added > 0.01
    assert first[0.2, 1] - first[0.0, 1] == pytest.approx(2 * added, rel=1e-3)
    assert first[0.2, 4] == pytest.approx(first[0.2, 1], rel=1e-4), "parts of a batch add their share"
    assert apart.pop((0.0, 1)) is None
    assert all(first[key] - value == pytest.approx(first[0.0, 1], rel=1e-4) for key, value in apart.items())


def test_every_line_of_the_log_tells_its_own_part_of_the_added_loss(tiny: Tiny, tmp_path: Path) -> None:
    each, pairs = (
        train(tiny("more", train={"steps": 4, "logging_steps": n}), tmp_path / str(n), evaluate=False) for n in (1, 2)
    )
    first, second = ([line["auxiliary_loss"] for line in f.log() if "loss" in line] for f in (each, pairs))
    assert second == pytest.approx([(first[0] + first[1]) / 2, (first[2] + first[3]) / 2])


# --- equivalences -----------------------------------------------------------------------------------------------------


def test_accumulating_parts_equals_the_whole_batch(tiny: Tiny, tmp_path: Path) -> None:
    whole = train(tiny("more", train={"gradient_accumulation": 1}), tmp_path / "a", evaluate=False)
    parts = train(tiny("more", train={"gradient_accumulation": 8}), tmp_path / "b", evaluate=False)
    # Adam makes whole steps of the smallest gradients, and those are rounded differently.
    assert_close(adapter_of(parts), adapter_of(whole), rtol=1e-3, atol=1e-5)
    first, second = ([line["loss"] for line in f.log() if "loss" in line] for f in (whole, parts))
    assert second == pytest.approx(first, rel=1e-4), "the logged loss is per label, too"


def test_a_seed_decides_everything(tiny: Tiny, tmp_path: Path) -> None:
    dropout = {"lora_dropout": 0.1}
    one, again, other = (
        train(tiny("more", seed=seed, options=dropout), tmp_path / name, evaluate=False)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert bytes_in(one.adapter) == bytes_in(again.adapter)
    assert all(not torch.equal(w, adapter_of(other)[k]) for k, w in adapter_of(one).items())


class _Spy:
    """Records the batches that a model is trained on, their tasks, and the tasks that reach the gates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[list[int]]] = []
        self.tasks: list[list[int]] = []
        self.routed: list[Any] = []
        loss, state = trainer_module.label_loss, BatchTasks.__init__

        def spy_loss(unwrapped: Any, model: Any, inputs: dict[str, Any], labels: Tensor, kind: bool) -> Any:
            self.batches.append(inputs["input_ids"].tolist())
            self.tasks.append(inputs["task"].tolist() if "task" in inputs else [])
            return loss(unwrapped, model, inputs, labels, kind)

        def spy_state(this: BatchTasks, task: Any) -> None:
            self.routed.append(task.tolist() if isinstance(task, Tensor) else task)
            state(this, task)

        monkeypatch.setattr(trainer_module, "label_loss", spy_loss)
        monkeypatch.setattr(BatchTasks, "__init__", spy_state)


def test_every_method_of_a_seed_sees_the_same_batches(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = _Spy(monkeypatch)
    seen = []
    for method in METHODS:
        train(tiny(method, train={"steps": 2}), tmp_path / method, evaluate=False)
        seen.append(spy.batches[:])
        spy.batches.clear()
    assert len(seen[0]) == 2
    assert all(batches == seen[0] for batches in seen)


def test_gates_that_look_at_the_task_are_told_each_samples_task(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any
) -> None:
    spy = _Spy(monkeypatch)
    train(tiny("more", train={"gradient_accumulation": 2}), tmp_path / "a", evaluate=False)
    assert spy.routed == spy.tasks
    assert [len(tasks) for tasks in spy.tasks] == [4] * 6
    sign = {"first": 0, "many": 1, "animal": 2}
    for rows, tasks in zip(spy.batches, spy.tasks, strict=True):
        questions = [words.decode(row) for row in rows]
        assert [next(i for word, i in sign.items() if f"{word} " in q or f"{word}?" in q) for q in questions] == tasks
    assert {task for tasks in spy.tasks for task in tasks} == {0, 1, 2}


# --- resuming ---------------------------------------------------------------------------------------------------------


class _PowerCutError(Exception):
    pass


def _cut_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The loss raises at that call, as if the process ended there."""
    calls = 0
    loss = trainer_module.label_loss

    def cut(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise _PowerCutError
        return loss(*args)

    monkeypatch.setattr(trainer_module, "label_loss", cut)


@pytest.mark.parametrize(("method", "accumulation"), [("mode", 1), ("more", 2)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    method: str, accumulation: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(
        method,
        options={"lora_dropout": 0.1},
        train={"steps": 5, "save_steps": 2, "gradient_accumulation": accumulation},
    )
    through = train(recipe, tmp_path / "through", evaluate=False)
    with monkeypatch.context() as patch:
        _cut_at(patch, 4 * accumulation)
        with pytest.raises(_PowerCutError):
            train(recipe, tmp_path / "cut", evaluate=False)
    assert not (tmp_path / "cut" / "adapter").exists()
    # A checkpoint that was interrupted while it was written, without trainer_state.json, is not used.
    half = tmp_path / "cut" / "checkpoints" / "checkpoint-3"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")

    resumed = train(recipe, tmp_path / "cut", resume=True, evaluate=False)
    assert_close(adapter_of(resumed), adapter_of(through), rtol=0, atol=0)
    steps = [line["step"] for line in resumed.log() if "loss" in line]
    assert steps == [1, 2, 3, 3, 4, 5]
    then, now = ({line["step"]: line["loss"] for line in f.log() if "loss" in line} for f in (through, resumed))
    assert then == now


def test_seconds_are_counted_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("mode", train={"steps": 5, "save_steps": 2})
    with monkeypatch.context() as patch:
        _cut_at(patch, 4)
        with pytest.raises(_PowerCutError):
            train(recipe, tmp_path / "a", evaluate=False)
    log = tmp_path / "a" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:  # as if every step had taken 1000 seconds
        line["seconds"] = 1000.0 * line["step"]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = train(recipe, tmp_path / "a", resume=True, evaluate=False)
    (trained,) = [line for line in folder.log() if line.get("event") == "trained"]
    assert 2000 < trained["seconds"] < 2100


def test_a_run_that_lost_only_its_end_keeps_what_it_learned(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("mode", train={"steps": 4, "save_steps": 2})
    folder = train(recipe, tmp_path / "a", evaluate=False)
    before = adapter_of(folder)
    shutil.rmtree(folder.adapter)
    assert_close(adapter_of(train(recipe, folder.path, resume=True, evaluate=False)), before, rtol=0, atol=0)
    assert [line["step"] for line in folder.log() if "loss" in line] == [1, 2, 3, 4], "the latest checkpoint is used"


def test_a_run_does_not_go_on_with_other_examples(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"task": f"t{i % 2}", "input": f"fox {i}", "output": "lake"} for i in range(40)]
    file = tmp_path / "rows.jsonl"

    def written(rows: list[dict[str, str]]) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    recipe = tiny("lora", tasks={"family": "files", "path": str(file)}, train={"steps": 5, "save_steps": 2})
    written(rows)
    with monkeypatch.context() as patch:
        _cut_at(patch, 4)
        with pytest.raises(_PowerCutError):
            train(recipe, tmp_path / "a", evaluate=False)
    written([row | {"output": "lamp"} if row["task"] == "t1" else row for row in rows])
    with pytest.raises(
        RunError, match=r"cannot resume '.*a': the training examples of t1 have changed since it started"
    ):
        train(recipe, tmp_path / "a", resume=True, evaluate=False)
    written(rows)
    assert train(recipe, tmp_path / "a", resume=True, evaluate=False).has_adapter


def test_resuming_without_a_checkpoint_starts_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("mode")
    with monkeypatch.context() as patch:
        _cut_at(patch, 2)
        with pytest.raises(_PowerCutError):
            train(recipe, tmp_path / "a", evaluate=False)
    folder = train(recipe, tmp_path / "a", resume=True, evaluate=False)
    assert len(folder.environment()["resumed"]) == 1
    assert [line["step"] for line in folder.log() if line.get("event") == "trained"] == [3]


def test_a_folder_without_a_run_is_not_resumed(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("majority")
    train(recipe, tmp_path / "majority-seed0", resume="auto")
    with pytest.raises(
        RunError,
        match=r"nothing to resume: there is no folder '.*sed0' – did you mean '[^']*'\? To start .*--resume out",
    ):
        train(recipe, tmp_path / "majority-sed0", resume=True)
    (tmp_path / "notes").mkdir()
    with pytest.raises(RunError, match=r"nothing to resume: '.*notes' is no run: it has no config\.yaml"):
        train(recipe, tmp_path / "notes", resume=True)
    assert [p.name for p in tmp_path.iterdir()] in (["majority-seed0", "notes"], ["notes", "majority-seed0"])
    assert not any((tmp_path / "notes").iterdir())
    before = bytes_in(tmp_path)
    train(recipe, tmp_path / "majority-seed0", resume="auto")
    assert bytes_in(tmp_path) == before


def test_resuming_a_finished_run_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("lora")
    folder = train(recipe, tmp_path / "a")
    before = bytes_in(folder.path)
    train(recipe, folder.path, resume=True)
    assert bytes_in(folder.path) == before


def test_another_recipe_is_refused_and_nothing_is_lost(tiny: Tiny, tmp_path: Path) -> None:
    folder = train(tiny("lora"), tmp_path / "a")
    before = bytes_in(folder.path)
    with pytest.raises(RunError, match="already holds a run"):
        train(tiny("lora"), folder.path)
    with pytest.raises(RunError, match=r"another recipe\n  train\.steps: 3 there, 4 here"):
        train(tiny("lora", train={"steps": 4}), folder.path, resume=True)
    assert bytes_in(folder.path) == before


# --- what breaks ------------------------------------------------------------------------------------------------------


def _finite(checkpoint: Path) -> bool:
    return all(bool(w.isfinite().all()) for w in load_file(checkpoint / "adapter_model.safetensors").values())


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("inf")


@pytest.mark.parametrize(("what", "accumulation"), [("loss", 2), ("gradient", 1)])
def test_what_is_not_finite_stops_the_training_and_keeps_the_last_checkpoint(
    what: str, accumulation: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    loss = trainer_module.label_loss

    def broken(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        total, *others = loss(*args)
        if calls <= 3 * accumulation:
            return total, *others
        return (total * float("nan") if what == "loss" else _InfiniteGradient.apply(total)), *others

    monkeypatch.setattr(trainer_module, "label_loss", broken)
    recipe = tiny(
        "mode",
        train={"steps": 6, "save_steps": 2, "gradient_accumulation": accumulation},
        mixture={"kind": "round_robin", "batches": "one_task"},
    )
    with pytest.raises(RunError) as caught:
        train(recipe, tmp_path / "a")
    # Round robin over three tasks: the fourth batch holds the first task again.
    message = str(caught.value)
    assert f"the {what} is not finite at step 4, on a batch of first_word; training stops" in message
    assert "the last checkpoint is kept" in message
    assert "checkpoint-2" in message
    assert _finite(tmp_path / "a" / "checkpoints" / "checkpoint-2")
    assert not (tmp_path / "a" / "adapter").exists()


def test_a_learning_rate_that_explodes_is_stopped(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("mode", model_={"dtype": "float16"}, train={"steps": 8, "learning_rate": 1e4, "save_steps": 1})
    with pytest.raises(RunError, match=r"is not finite at step \d, on a batch of .*the last checkpoint is kept"):
        train(recipe, tmp_path / "a")
    kept = list((tmp_path / "a" / "checkpoints").iterdir())
    assert kept
    assert all(map(_finite, kept))


def test_a_validation_loss_that_is_not_finite_costs_no_adapter(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = trainer_module.label_loss

    def broken(unwrapped: Any, model: Any, *args: Any) -> Any:
        total, *others = loss(unwrapped, model, *args)
        return (total if model.training else total * float("nan")), *others

    monkeypatch.setattr(trainer_module, "label_loss", broken)
    folder = train(tiny("mode", train={"validation_limit": 2}), tmp_path / "a")
    assert folder.is_scored
    assert [line["validation_loss"] for line in folder.log() if line.get("event") == "validated"] == [None]


def test_a_validation_that_fails_costs_no_adapter(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> None:
        raise MemoryError("the batch does not fit")

    recipe = tiny("lora", train={"validation_limit": 2})
    with monkeypatch.context() as patch:
        patch.setattr(Training, "validation_losses", too_large)
        with pytest.raises(MemoryError, match="the batch does not fit"):
            train(recipe, tmp_path / "a")
    kept = adapter_of(RunFolder(tmp_path / "a"))
    folder = train(recipe, tmp_path / "a", resume=True)
    assert folder.is_scored
    assert_close(adapter_of(folder), kept, rtol=0, atol=0)


def test_the_validation_loss_is_computed_in_parts_of_a_batch(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    loss = trainer_module.label_loss

    def counted(unwrapped: Any, model: Any, inputs: Any, *args: Any) -> Any:
        if not model.training:
            sizes.append(len(inputs["input_ids"]))
        return loss(unwrapped, model, inputs, *args)

    monkeypatch.setattr(trainer_module, "label_loss", counted)
    logged = []
    for parts in (1, 4):
        spec = {"steps": 1, "learning_rate": 1e-9, "validation_limit": 3, "gradient_accumulation": parts}
        folder = train(tiny("lora", train=spec), tmp_path / str(parts), evaluate=False)
        logged += [line["validation_loss"] for line in folder.log() if line.get("event") == "validated"]
    assert sizes == [3] * 3 + [2, 1] * 3
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)


def _curve(folder: RunFolder) -> dict[int, float]:
    return {line["step"]: line["validation_loss"] for line in folder.log() if line.get("event") == "validated"}


@pytest.mark.parametrize("method", ["mode", "more"])
def test_validation_during_training_changes_no_weight_and_resumes(
    method: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"steps": 5, "save_steps": 3, "validation_limit": 2}
    options = {"lora_dropout": 0.1}
    plain = train(tiny(method, options=options, train=spec), tmp_path / "plain", evaluate=False)
    recipe = tiny(method, options=options, train={**spec, "validation_steps": 2})
    through = train(recipe, tmp_path / "through", evaluate=False)
    assert_close(adapter_of(through), adapter_of(plain), rtol=0, atol=0)
    assert list(_curve(through)) == [2, 4, 5]
    assert len(set(_curve(through).values())) == 3
    assert _curve(plain) == {5: _curve(through)[5]}, "the last loss is that of the whole training"

    with monkeypatch.context() as patch:
        _cut_at(patch, 5 + 2 * 3)  # in step 5, after two validations of three tasks
        with pytest.raises(_PowerCutError):
            train(recipe, tmp_path / "cut", evaluate=False)
    resumed = train(recipe, tmp_path / "cut", resume=True, evaluate=False)
    assert [line["step"] for line in resumed.log() if line.get("event") == "validated"] == [2, 4, 4, 5]
    assert _curve(resumed) == _curve(through)
    assert_close(adapter_of(resumed), adapter_of(through), rtol=0, atol=0)


def test_validation_reads_a_sample_and_not_the_first_instances(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    get = TaskDataset.__getitem__
    monkeypatch.setattr(TaskDataset, "__getitem__", lambda self, place: (read.append(place), get(self, place))[1])
    training = Training(recipe := tiny("lora", train={"validation_limit": 2}), load_suite(recipe.tasks))
    training.validation_losses(training.trainer(RunFolder(tmp_path / "run")), 2)
    counts = [len(task.validation) for task in training.tasks]
    assert read == [(number, i) for number, n in enumerate(counts) for i in EvaluateSpec(limit=2).pick(n)]
    assert read != [(number, i) for number in range(len(counts)) for i in range(2)]


def test_a_validation_at_the_last_step_is_not_repeated_and_its_time_is_not_training(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Training.validation_losses
    clock = 0.0
    real = time.perf_counter

    def slow(*args: Any) -> dict[str, float]:
        nonlocal clock
        clock += 1000.0
        return losses(*args)

    monkeypatch.setattr(Training, "validation_losses", slow)
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: real() + clock)
    spec = {"steps": 4, "validation_limit": 2, "validation_steps": 2}
    folder = train(tiny("lora", train=spec), tmp_path / "a", evaluate=False)
    assert [line["step"] for line in folder.log() if line.get("event") == "validated"] == [2, 4]
    (trained,) = [line for line in folder.log() if line.get("event") == "trained"]
    assert trained["seconds"] < 1000


def test_without_a_checkpoint_the_stop_says_so(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    infinite = (torch.tensor(float("inf")), torch.tensor(1), torch.tensor(0.0))
    monkeypatch.setattr(trainer_module, "label_loss", lambda *args: infinite)
    with pytest.raises(RunError, match=r"is not finite at step 1, .*no checkpoint was saved before it"):
        train(tiny("mode"), tmp_path / "a")


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"options": {"target_modules": ["nowhere"]}}, ConfigError, "method 'mode' does not fit model '"),
        ({"options": {"num_expert": 2}}, ConfigError, "unknown option 'num_expert' of method 'mode'"),
        ({"train": {"trainer": {"fsdp": "nonsense"}}}, ConfigError, "transformers refuses the training arguments"),
        ({"train": {"trainer": {"bogus": 1}}}, ConfigError, "transformers refuses the training arguments"),
        (
            {"train": {"validation_limit": 2}, "tasks": {"family": "starter", "validation_per_task": 0}},
            TaskError,
            "train.validation_limit is 2, but there are no validation instances of first_word, last_word",
        ),
    ],
)
def test_what_can_be_refused_is_refused_before_the_folder_is_touched(
    sections: dict[str, Any], error: type[DyadsError], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        train(tiny("mode", **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tasks_without_training_examples_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"task": "t", "input": "a", "output": "b", "split": "test"}]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError):
        train(tiny("lora", tasks={"family": "files", "path": str(tmp_path / "tasks.jsonl")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"num_tasks": 2}, {"tasks": ["has_animal", "count_words", "first_word"]}])
def test_tasks_that_are_not_the_suites_are_refused(options: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the suite has 3 .*leave 'tasks' and 'num_tasks' out"):
        train(tiny("more", options=options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- options ----------------------------------------------------------------------------------------------------------


def test_adafactor_keeps_its_fixed_rate(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("mode", train={"optimizer": "adafactor", "lr_scheduler": "constant"})
    folder = train(recipe, tmp_path / "a", evaluate=False)
    assert [line["learning_rate"] for line in folder.log() if "loss" in line] == [0.01] * 3


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.5]),
    ],
)
def test_every_schedule_warms_up(scheduler: str, rates: list[float], tiny: Tiny, tmp_path: Path) -> None:
    spec = {"steps": 4, "warmup": 2, "lr_scheduler": scheduler, "learning_rate": 0.01}
    folder = train(tiny("lora", train=spec), tmp_path / "a", evaluate=False)
    logged = [line["learning_rate"] for line in folder.log() if "loss" in line]
    assert logged == pytest.approx([0.01 * rate for rate in rates])


@pytest.mark.parametrize("method", ["mode", "more"])
def test_checkpointing_trains_the_same_adapter(method: str, tiny: Tiny, tmp_path: Path) -> None:
    kept, recomputed = (
        train(tiny(method, train={"gradient_checkpointing": on}), tmp_path / str(on), evaluate=False)
        for on in (False, True)
    )
    # Adam makes whole steps of the smallest gradients, and those are rounded differently.
    assert_close(adapter_of(recomputed), adapter_of(kept), rtol=1e-3, atol=1e-4)


def test_the_adapter_is_float32_over_a_half_precision_model(tiny: Tiny, tmp_path: Path) -> None:
    folder = train(tiny("more", model_={"dtype": "bfloat16"}), tmp_path / "a")
    assert {w.dtype for w in adapter_of(folder).values()} == {torch.float32}
    assert folder.is_scored


def test_fields_of_the_trainer_are_passed_on_and_win(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("lora", train={"trainer": {"adam_beta1": 0.5, "save_total_limit": 1, "run_name": "mine"}})
    arguments = training_arguments(recipe, RunFolder(tmp_path / "a"))
    assert (arguments.adam_beta1, arguments.save_total_limit, arguments.run_name) == (0.5, 1, "mine")


def test_a_process_that_sees_two_gpus_is_refused_before_the_folder_is_touched(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(
        ConfigError, match=r"sees 2 GPUs: start one process for each .*torchrun.*CUDA_VISIBLE_DEVICES=0"
    ):
        train(tiny("lora"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_tensorboard_gets_the_log(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder = train(tiny("lora", train={"report_to": "tensorboard"}), tmp_path / "a", evaluate=False)
    assert [path.parent for path in tmp_path.rglob("events.out.tfevents*")] == [folder.tensorboard]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    train(tiny("lora", train={"report_to": "tensorboard"}), tmp_path / "b", evaluate=False)
    assert list((tmp_path / "elsewhere").iterdir())


def test_a_destination_of_the_log_that_is_not_installed_is_refused_before_anything_is_loaded(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, p=package: None if name == p else "found")
        recipe = tiny("lora", tmp_path / "no model", train={"report_to": ["tensorboard", package]})
        with pytest.raises(
            ConfigError, match=f"report_to is {package}, which is not installed: .*pip install {package}"
        ):
            train(recipe, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_is_an_adapter_that_peft_loads(tiny: Tiny, llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    train(tiny("mode", train={"save_steps": 3}), tmp_path / "a", evaluate=False)
    base = AutoModelForCausalLM.from_pretrained(llama)
    PeftModel.from_pretrained(base, tmp_path / "a" / "checkpoints" / "checkpoint-3")


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"],
)
def test_files_of_a_checkpoint_that_were_accepted_but_hold_anything_else_are_refused_by_name(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    recipe = tiny("mode", train={"save_steps": 2})
    folder = train(recipe, tmp_path / "a", evaluate=False)
    shutil.rmtree(folder.adapter)
    last, *later = sorted(folder.checkpoints.iterdir())
    for path in later:
        shutil.rmtree(path)
    torch.save({"a": torch.zeros(1)}, last / "other")
    (last / name).write_bytes((last / "other").read_bytes())
    (last / "other").unlink()
    accept(folder.path)
    with pytest.raises(RunError, match=rf"'{last}' cannot be loaded: .*; remove it, and --resume goes on"):
        train(recipe, folder.path, resume=True, evaluate=False)


@pytest.mark.parametrize("state", ["", "[]", '{"global_step": 1}', '{"global_step": 2, "log_history": 3}', "[" * 9999])
def test_a_checkpoint_whose_state_is_not_of_its_step_is_not_used(
    state: str, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny("mode", train={"save_steps": 1, "steps": 2})
    folder = train(recipe, tmp_path / "a", evaluate=False)
    before = adapter_of(folder)
    shutil.rmtree(folder.adapter)
    (folder.checkpoints / "checkpoint-2" / "trainer_state.json").write_text(state)
    accept(folder.path)
    again = train(recipe, folder.path, resume=True, evaluate=False)
    assert "checkpoint-2' is not used: it is damaged: trainer_state.json" in caplog.text
    assert_close(adapter_of(again), before, rtol=0, atol=0)

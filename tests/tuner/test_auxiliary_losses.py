# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses of the layers: added to the model's loss once, by every kind of training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import dyads
from dyads import MoDEConfig, MoREConfig
from dyads.errors import RoutingError
from dyads.tuner import DyadsLinear
from tiny import KINDS, TARGETS, TASKS, Variant, batch, task_of, tiny_model
from tiny import adapted_layers as layers

LOSSES = [
    Variant("more", (("contrastive", 0.1),)),
    Variant("more", (("contrastive", 0.2), ("task_dim", 5), ("contrastive_pool", "last"))),
    Variant("more", (("contrastive", 0.1), ("embedding", "shared"), ("task_dim", 32), ("selector", "frozen_random"))),
    Variant("mode", (("load_balance", 0.1),)),
    Variant("hmora", (("divergence", 0.1),)),
]
MORE = LOSSES[0]
PLACED = [*((MORE, kind) for kind in KINDS), *zip(LOSSES[1:], ("t5", "bert", "llama", "gpt2"), strict=True)]
placed = pytest.mark.parametrize(("lossy", "kind"), PLACED, ids=lambda v: getattr(v, "id", v))


@pytest.fixture(params=LOSSES, ids=lambda v: v.id)
def lossy(request: pytest.FixtureRequest) -> Variant:
    return request.param


def adapted(variant: Variant, kind: str = "llama", **options: Any) -> PeftModel:
    options = {"target_modules": TARGETS[kind], "init_weights": False, **options}
    torch.manual_seed(1)
    base = tiny_model(kind, options.pop("dtype", torch.float32), options.pop("blocks", 2))
    return get_peft_model(base, variant.config(**options)).train()


def padded(kind: str, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A batch with labels, and padding at the end of every row but the first."""
    inputs = batch(kind, rows=rows, seed=seed)
    for row in range(1, rows):
        inputs["attention_mask"][row, 7 - row :] = 0
    if kind == "bert":
        inputs["labels"] = torch.arange(rows) % 2
    elif kind == "t5":
        inputs["labels"] = inputs.pop("decoder_input_ids")
        inputs["labels"][1:, 4:] = -100
    else:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert left
    for name, gradient in left.items():
        assert_close(gradient, right[name], msg=lambda m, n=name: f"{n}: {m}")


def without_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    rest = {k: v for k, v in inputs.items() if k != "labels"}
    if "input_ids" in rest and rest["input_ids"].shape == inputs["labels"].shape:
        return rest
    return rest if inputs["labels"].ndim == 1 else {**rest, "decoder_input_ids": inputs["labels"].clamp(min=0)}


# --- what is added ----------------------------------------------------------------------------------------------------


@placed
def test_loss_is_the_models_own_and_the_mean_over_the_layers(lossy: Variant, kind: str) -> None:
    model, inputs, tasks = adapted(lossy, kind), padded(kind), torch.tensor([2, 0, 1])
    mask = inputs["attention_mask"]
    of_decoder = inputs["labels"] != -100
    expected = []

    def by_hand(layer: DyadsLinear, args: tuple[Tensor]) -> None:
        real = next((m for m in (mask, of_decoder) if m.shape == args[0].shape[:2]), None)
        assert (real is None) == (args[0].ndim == 2)  # BERT's pooler sees a row for every sample
        expected.append(layer.core("default").auxiliary_loss(args[0], tasks, real))

    for layer in layers(model):
        layer.register_forward_pre_hook(by_hand)
    task = {"task": tasks} if lossy.config().task_names else {}
    with_it = model(**inputs, **task).loss
    assert len(expected) == len(layers(model)) > 0
    assert dyads.auxiliary_loss(model) == 0  # it is in the loss already
    plain = model.eval()(**inputs, **task).loss
    assert_close(with_it, plain + torch.stack(expected).mean())
    assert with_it > plain


def test_padding_does_not_count(lossy: Variant) -> None:
    model, inputs = adapted(lossy, target_modules=["q_proj"], layers_to_transform=[0]), batch("llama")
    task = task_of(lossy.config(), *TASKS)
    longer = {k: torch.cat([v, torch.zeros(3, 4, dtype=v.dtype)], 1) for k, v in inputs.items()}
    losses = []
    for given in (inputs, longer):
        model(**given, **task)
        losses.append(dyads.auxiliary_loss(model))
    assert_close(losses[0], losses[1])
    model(inputs["input_ids"], inputs["attention_mask"], **task)
    assert_close(dyads.auxiliary_loss(model), losses[0])


def test_decoder_of_as_many_tokens_as_the_encoder_has_its_own_mask() -> None:
    model = adapted(MORE, "t5", target_modules=["q"])
    inputs = batch("t5")
    inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    inputs["attention_mask"][:, 3:] = 0

    def loss(**decoder: Tensor) -> Tensor:
        model(**inputs, **decoder, task=list(TASKS))
        found = dyads.auxiliary_loss(model)
        assert found > 0
        return found

    everything = torch.ones(3, 7, dtype=torch.long)
    assert torch.equal(loss(), loss(decoder_attention_mask=everything))
    assert not torch.equal(loss(), loss(decoder_attention_mask=inputs["attention_mask"]))


def test_evaluation_adds_nothing_and_other_adapters_are_as_they_were(lossy: Variant) -> None:
    inputs = padded("llama")
    model, without = adapted(lossy), adapted(lossy, **{lossy.options[0][0]: 0.0})
    without.load_state_dict(model.state_dict(), strict=False)
    task = task_of(lossy.config(), *TASKS)
    expected = without(**inputs, **task).loss
    assert dyads.auxiliary_loss(without) == 0
    assert model(**inputs, **task).loss > expected
    assert torch.equal(model.eval()(**inputs, **task).loss, expected)
    with torch.no_grad():
        assert torch.equal(model.train()(**inputs, **task).loss, expected)
    assert dyads.auxiliary_loss(model) == 0
    assert dyads.auxiliary_loss(tiny_model("llama")) == 0


def test_a_loss_of_ones_own_takes_it_once(lossy: Variant) -> None:
    model, inputs = adapted(lossy), padded("llama")
    task = task_of(lossy.config(), *TASKS)
    whole = model(**inputs, **task).loss
    labels = inputs.pop("labels")
    logits = model(**inputs, **task).logits
    own = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    extra = dyads.auxiliary_loss(model)
    assert extra > 0
    assert_close(own + extra, whole)
    assert dyads.auxiliary_loss(model) == 0
    model(**inputs, **task)
    model.eval()(**inputs, **task)
    assert dyads.auxiliary_loss(model) == 0  # the next forward pass drops what was not taken
    model.train()(**inputs, **task)
    with pytest.raises(ValueError, match="input_ids"):
        model(task=TASKS[0])
    assert dyads.auxiliary_loss(model) == 0


def test_a_tuple_as_output_has_it_too() -> None:
    model, inputs = adapted(MORE), padded("llama")
    expected = model(**inputs, task=list(TASKS)).loss
    assert_close(model(**inputs, task=list(TASKS), return_dict=False)[0], expected)
    inputs.pop("labels")
    model(**inputs, task=list(TASKS), return_dict=False)
    assert dyads.auxiliary_loss(model) > 0


def test_a_model_that_calls_itself_gives_one_loss_for_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 4)

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            return self.lin(x) + (self(x, again=False, task="cola") if again else 0)

    model = get_peft_model(Twice(), MORE.config(target_modules=["lin"]))
    x, found = torch.randn(3, 6), []
    for task, again in (("rte", False), ("cola", False), ("rte", True)):
        model(x, task=task, again=again)
        found.append(dyads.auxiliary_loss(model))
    assert_close(found[2], (found[0] + found[1]) / 2)


def test_a_pass_that_was_interrupted_takes_no_later_losses() -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    model, inputs = adapted(MORE), without_labels(padded("llama"))
    model(**inputs, task=list(TASKS))
    expected = dyads.auxiliary_loss(model)
    hook = layers(model)[-1].register_forward_pre_hook(stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(**inputs, task=list(TASKS))
    hook.remove()
    for _ in range(2):
        model(**inputs, task=list(TASKS))
        assert_close(dyads.auxiliary_loss(model), expected)


@placed
def test_every_trainable_parameter_gets_a_gradient(lossy: Variant, kind: str) -> None:
    model = adapted(lossy, kind)
    model(**padded(kind), **task_of(lossy.config(), "rte", "rte", "cola")).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_copies_and_pickles_leave_an_untaken_loss_behind(lossy: Variant) -> None:
    model, inputs = adapted(lossy), batch("llama")
    task = task_of(lossy.config(), *TASKS)
    model(**inputs, **task)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert dyads.auxiliary_loss(twin) == 0
        twin(**inputs, **task)
        assert dyads.auxiliary_loss(twin) > 0
    assert dyads.auxiliary_loss(model) > 0


def test_inputs_without_rows_add_nothing() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), MORE.config(target_modules=["0"]))
    model(torch.zeros(0, 6), task="rte")
    assert dyads.auxiliary_loss(model) == 0


# --- gradient checkpointing -------------------------------------------------------------------------------------------


@placed
def test_checkpointing_gives_the_same_loss_and_gradients_also_with_two_forwards_first(
    lossy: Variant, kind: str
) -> None:
    model = adapted(lossy, kind, dtype=torch.float64)
    first, second = padded(kind), padded(kind, rows=2, seed=2)

    def both() -> Tensor:
        one = model(**first, **task_of(lossy.config(), "rte", "cola", "sst2")).loss
        two = model(**without_labels(second), **task_of(lossy.config(), "sst2", "rte")).logits
        extra = dyads.auxiliary_loss(model)
        assert extra > 0
        return one + two.pow(2).sum() + extra

    plain = both()
    plain.backward()
    expected = gradients(model)
    model.base_model.model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = both()
    assert_close(again, plain)
    again.backward()
    assert_same(gradients(model), expected)
    assert dyads.auxiliary_loss(model) == 0  # what ran again was not taken again


def test_reentrant_checkpointing_is_refused_where_it_would_lose_the_loss(lossy: Variant) -> None:
    model, inputs = adapted(lossy), batch("llama")
    task = task_of(lossy.config(), *TASKS)
    model.base_model.model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RoutingError, match=r"'default' has an auxiliary loss.*without gradients.*use_reentrant=False"):
        model(**inputs, **task)
    model.eval()(**inputs, **task)  # in evaluation there is none to lose


# --- trainers ---------------------------------------------------------------------------------------------------------


class _Data(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """The same eight rows in the same order for ever."""

    def __init__(self, kind: str) -> None:
        inputs = padded(kind, rows=4)
        self.inputs = {k: torch.cat([v, v.flip(0)]) for k, v in inputs.items()}
        self.inputs["task"] = torch.arange(8) % 3

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from ({k: v[i] for k, v in self.inputs.items()} for i in range(8))


def trainer(model: PeftModel, kind: str, folder: Path, **options: Any) -> Trainer:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, **options}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False,
        learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=_Data(kind))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_a_plain_trainer_equals_a_loop_by_hand_with_accumulated_batches(
    kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    by_hand, trained = (adapted(MORE, kind, dtype=torch.float64) for _ in range(2))
    start = {n: p.detach().clone() for n, p in trained.named_parameters() if p.requires_grad}
    if checkpointing:
        trained.base_model.model.enable_input_require_grads()
        trained.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = trainer(trained, kind, tmp_path)
    counts_labels = runs.model_accepts_loss_kwargs
    stream = iter(torch.utils.data.DataLoader(_Data(kind), batch_size=2))
    optimizer = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        parts = [next(stream) for _ in range(2)]
        shifted = [p["labels"][:, 1:] if kind == "llama" else p["labels"] for p in parts]
        counts = [int((s != -100).sum()) for s in shifted]
        for part, count in zip(parts, counts, strict=True):
            # Llama's loss counts its labels. T5's is a mean, which the Trainer takes for one that counts labels.
            by_labels = count / sum(counts) if kind == "llama" else 1.0
            share = by_labels if counts_labels else 0.5
            own = by_hand.eval()(**part).loss
            by_hand.train()(**part_without_loss(part, kind))
            extra = dyads.auxiliary_loss(by_hand)
            assert extra > 0
            (share * (own + extra)).backward()
        optimizer.step()
        optimizer.zero_grad()
    runs.train()
    for name, parameter in by_hand.named_parameters():
        if name in start:
            assert_close(trained.get_parameter(name), parameter, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.equal(trained.get_parameter(n), p) for n, p in start.items())


def part_without_loss(part: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    rest = {k: v for k, v in part.items() if k != "labels"}
    if kind == "t5":  # what the model makes of the labels
        shifted = torch.cat([torch.zeros(len(part["labels"]), 1, dtype=torch.long), part["labels"][:, :-1]], 1)
        rest["decoder_input_ids"] = shifted.masked_fill(shifted == -100, 0)
        rest["decoder_attention_mask"] = (part["labels"] != -100).long()
    return rest


def test_parts_of_equal_size_add_up_to_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        model = adapted(MORE)
        runs = trainer(model, "llama", tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts)
        data = runs.train_dataset.inputs  # type: ignore[union-attr]
        data["labels"] = data["input_ids"].clone()  # equally many labels in every row
        runs.train()
        found.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


# --- a table that all layers share ------------------------------------------------------------------------------------


def shared(**options: Any) -> PeftModel:
    options = {"embedding": "shared", "task_dim": 5, "tasks": list(TASKS), "r": 4, **options}
    config = MoREConfig(target_modules=TARGETS["llama"], init_weights=False, **options)
    return get_peft_model(tiny_model("llama"), config)


def tables(model: nn.Module) -> list[str]:
    return [n for n, _ in model.named_parameters() if "embedding" in n and "lora_core" in n]


def test_a_shared_table_is_one_parameter_counted_saved_and_trained_once(tmp_path: Path) -> None:
    model, inputs = shared().train(), padded("llama")
    assert len(tables(model)) == 1
    per_layer = shared(embedding="layer")
    saved = (len(layers(model)) - 1) * 3 * 5
    assert per_layer.get_nb_trainable_parameters()[0] - model.get_nb_trainable_parameters()[0] == saved
    model(**inputs, task=list(TASKS)).loss.backward()
    table = model.get_parameter(tables(model)[0])
    whole = table.grad.clone()
    parts = torch.zeros_like(whole)
    for number in range(len(layers(model))):  # the gradient is the sum over the layers
        twin = copy.deepcopy(model)
        twin.zero_grad()
        own = twin.get_parameter(tables(twin)[0])
        for other, layer in enumerate(layers(twin)):
            seen = own if other == number else own.detach()
            layer.core("default").__dict__["table"] = partial(torch.Tensor.view_as, seen, seen)
        twin(**inputs, task=list(TASKS)).loss.backward()
        parts += own.grad
    assert_close(parts, whole)
    model.eval().save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert len([k for k in keys if "embedding" in k]) == 1
    with torch.no_grad():
        expected = model(**batch("llama"), task=list(TASKS)).logits
        for low in (False, True):
            loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path), low_cpu_mem_usage=low)
            assert len(tables(loaded)) == 1
            assert torch.equal(loaded(**batch("llama"), task=list(TASKS)).logits, expected)


def test_shared_tables_of_two_adapters_are_two_and_one_goes_without_the_other() -> None:
    model = shared().eval()
    with torch.no_grad():
        expected = model(**batch("llama"), task=list(TASKS)).logits
        model.add_adapter("other", model.peft_config["default"])
        assert len(tables(model)) == 2
        model.delete_adapter("other")
        assert len(tables(model)) == 1
        assert torch.equal(model(**batch("llama"), task=list(TASKS)).logits, expected)
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        model.delete_adapter("default")
        assert len(tables(model)) == 1
        model(**batch("llama"), task=list(TASKS))


# --- what the tasks chose ---------------------------------------------------------------------------------------------


def test_gates_of_tasks_are_readable_by_layer_and_explain_the_merged_weights() -> None:
    model = adapted(MORE).eval()
    gates = model.base_model.gates_of_tasks()
    assert len(gates) == len(layers(model))
    for name, by_task in gates.items():
        layer = model.base_model.model.get_submodule(name)
        assert by_task.shape == (3, 4)
        assert torch.equal(by_task.gt(0).sum(-1), layer.core("default").ranks())
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with model.base_model.routing.using("cola"):
            assert_close(layer.get_delta_weight("default"), layer.scaling["default"] * B @ by_task[1].diag() @ A)
    for other in (MoDEConfig(r=2), MoDEConfig(r=2, num_experts=1)):
        plain = get_peft_model(tiny_model("llama"), other)
        assert plain.base_model.gates_of_tasks() == {}


@pytest.mark.parametrize("key", ["moelora", "mtl_lora", "poly"])
def test_gates_of_tasks_serve_every_method_that_looks_at_the_task_alone(key: str) -> None:
    gates = adapted(Variant(key)).base_model.gates_of_tasks()
    assert gates
    assert all(len(g) == len(TASKS) for g in gates.values())


# --- compile ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lossy", [LOSSES[1], LOSSES[3]], ids=lambda v: v.id)
def test_training_with_the_loss_is_traced_as_one_graph(lossy: Variant) -> None:
    torch._dynamo.reset()
    model, inputs = adapted(lossy, blocks=1), padded("llama")
    task = {"task": torch.tensor([2, 0, 1])} if lossy.config().task_names else {}
    expected = model(**inputs, **task).loss
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    loss = compiled(**inputs, **task).loss
    assert_close(loss, expected)
    loss.backward()

# SPDX-License-Identifier: Apache-2.0
"""Routing: every sample gets the gates of its own task, in training, checkpointing, generation and compilation."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from dyads import MoDEConfig, MoREConfig, add_task, use_task
from dyads.errors import MergeError, RoutingError
from dyads.ops import plain
from dyads.tuner import layer as of_layer
from tiny import TARGETS, TASKS, UNLIKE, Variant, adapted_layers, batch, task_of, tiny_model


def adapted(
    variant: Variant,
    kind: str = "llama",
    task_type: str | None = None,
    dtype: torch.dtype = torch.float32,
    blocks: int = 2,
) -> PeftModel:
    config = variant.config(target_modules=TARGETS[kind], init_weights=False, task_type=task_type)
    model = get_peft_model(tiny_model(kind, dtype, blocks), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_core" in name and name.endswith(("embedding", "logits")):
                parameter.normal_(std=3)  # tasks far apart, so that their gates differ
    return model


def more(kind: str = "llama", task_type: str | None = None) -> PeftModel:
    return adapted(Variant("more"), kind, task_type)


# --- one batch, many tasks --------------------------------------------------------------------------------------------


def test_output_of_a_sample_depends_on_nothing_but_itself(placed: tuple[Variant, str]) -> None:
    variant, kind = placed
    model, inputs, tasks = adapted(variant, kind), batch(kind), ["sst2", "rte", "cola"]
    with torch.no_grad():
        together = model(**inputs, **task_of(variant.config(), *tasks)).logits
        for i in range(3):
            alone = model(**{k: v[i : i + 1] for k, v in inputs.items()}, **task_of(variant.config(), tasks[i])).logits
            assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        order = [2, 0, 1]
        permuted = model(
            **{k: v[order] for k, v in inputs.items()}, **task_of(variant.config(), *[tasks[i] for i in order])
        ).logits
        assert_close(permuted, together[order], atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(unlike: Variant) -> None:
    model, inputs = adapted(unlike), batch("llama")
    ids, mask, off = inputs["input_ids"], inputs["attention_mask"], torch.zeros(3, 4, dtype=torch.long)
    task = task_of(unlike.config(), *TASKS)
    with torch.no_grad():
        plain = model(**inputs, **task).logits
        for place, order in ((slice(4, None), 1), (slice(7), -1)):
            padded, padded_mask = torch.cat([off, ids][::order], 1), torch.cat([off, mask][::order], 1)
            positions = (padded_mask.cumsum(1) - 1).clamp(min=0)
            out = model(input_ids=padded, attention_mask=padded_mask, position_ids=positions, **task).logits
            assert_close(out[:, place], plain, atol=1e-5, rtol=1e-5)


def test_tasks_really_differ() -> None:
    model, inputs = more(), batch("llama")
    with torch.no_grad():
        outs = [model(**inputs, task=name).logits for name in TASKS]
    assert not torch.equal(outs[0], outs[1])
    ranks = [layer.core("default").ranks().tolist() for layer in adapted_layers(model)]
    assert any(len(set(r)) > 1 for r in ranks)


def test_names_ids_tensors_and_one_for_all_mean_the_same() -> None:
    model, inputs = more(), batch("llama")
    with torch.no_grad():
        expected = model(**inputs, task=["sst2", "rte", "cola"]).logits
        for task in (
            [2, 0, 1],
            ["sst2", 0, "cola"],
            torch.tensor([2, 0, 1]),
            torch.tensor([2, 0, 1], dtype=torch.int32),
        ):
            assert torch.equal(model(**inputs, task=task).logits, expected)
        for task in ("cola", 1, torch.tensor(1), ["cola"] * 3):
            assert torch.equal(model(**inputs, task=task).logits, model(**inputs, task=[1, 1, 1]).logits)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            None,
            r"adapter 'default' needs a task: pass task=… to the model's call or to generate.*known: rte, cola, sst2",
        ),
        (["rte", "col", "rte"], "adapter 'default' does not know task 'col' – did you mean 'cola'"),
        ([0, 3, 1], r"does not know task 3: its ids go from 0 to 2 \(0 rte, 1 cola, 2 sst2\)"),
        (torch.tensor([0, -1, 1]), "does not know task -1: its ids go from 0 to 2"),
        (["rte", "cola"], "task has 2 entries for a batch of 3: give one for every row .*or a single name or id"),
        (["rte"], "task has 1 entries for a batch of 3"),
        (torch.tensor([1]), "task has 1 entries for a batch of 3"),
        ([], "task is empty"),
        (torch.tensor([0.0, 1.0, 2.0]), "task must be whole numbers of shape"),
        (torch.zeros(3, 1, dtype=torch.long), r"task has shape \(3, 1\) for a batch of shape \(3, 7\)"),
        (torch.zeros(3, 1, 1, dtype=torch.long), "task must be whole numbers of shape"),
        ([None, "rte", "rte"], "a task is a name or an id, got None"),
        ([True, False, True], "a task is a name or an id, got True"),
    ],
)
def test_missing_and_unknown_tasks_are_refused(task: Any, message: str) -> None:
    model = more()
    with pytest.raises(RoutingError, match=message):
        model(**batch("llama"), **({} if task is None else {"task": task}))


def test_a_task_does_not_outlive_its_forward_pass() -> None:
    model, inputs = more(), batch("llama")
    model(**inputs, task="rte")
    with pytest.raises(RoutingError, match="needs a task"):
        model(**inputs)
    with pytest.raises(RoutingError, match="does not know task"):
        model(**inputs, task="unknown")
    with pytest.raises(RoutingError, match="needs a task"):
        model(**inputs)


def test_methods_that_look_at_no_task_take_one_and_ignore_it() -> None:
    model, inputs = adapted(Variant("mode")), batch("llama")
    with torch.no_grad():
        assert torch.equal(model(**inputs, task=["any", "thing", 7]).logits, model(**inputs).logits)
        assert torch.equal(
            model.generate(**inputs, task="any", max_new_tokens=3, do_sample=False),
            model.generate(**inputs, max_new_tokens=3, do_sample=False),
        )


def test_use_task_serves_code_that_cannot_pass_a_task() -> None:
    model, inputs = more(), batch("llama")
    with torch.no_grad():
        expected = model(**inputs, task=["rte", "cola", "sst2"]).logits
        with use_task(model, ["rte", "cola", "sst2"]):
            assert torch.equal(model(**inputs).logits, expected)
            assert torch.equal(model(**inputs, task="rte").logits, model(**inputs, task=[0, 0, 0]).logits)
            assert torch.equal(model(**inputs).logits, expected)
            model.base_model.model.model(**inputs)  # a part of the model, called by itself
        with pytest.raises(RoutingError, match="needs a task"):
            model(**inputs)
    with pytest.raises(RoutingError, match="LlamaForCausalLM has no dyads adapter, so there is no task to use"):
        use_task(tiny_model("llama"), "rte").__enter__()


def test_use_task_gives_one_task_for_every_row_and_guesses_no_repetition() -> None:
    model, inputs = more(), batch("llama", rows=6)
    with use_task(model, list(TASKS)), torch.no_grad():
        with pytest.raises(RoutingError, match="task has 3 entries for a batch of 6"):
            model(**inputs)  # as a preference trainer concatenates: chosen, then rejected
        with pytest.raises(RoutingError, match="task has 3 entries for a batch of 6"):
            model.generate(**inputs, max_new_tokens=2)
        three = batch("llama")
        beams = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
        within = model.generate(**three, **beams)
    assert torch.equal(within, model.generate(**three, **beams, task=list(TASKS)))
    with use_task(model, list(TASKS) * 2), torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs, task=list(TASKS) * 2).logits)


@pytest.mark.parametrize("key", ["more", "poly", "mtl_lora", "task_mode"])
def test_an_adapter_that_knows_one_task_needs_none(key: str) -> None:
    model, inputs = adapted(Variant(key, (("tasks", ["only"]),))), batch("llama")
    with torch.no_grad():
        expected = model(**inputs, task="only").logits
        assert torch.equal(model(**inputs).logits, expected)
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(generated, model.generate(**inputs, max_new_tokens=3, do_sample=False, task="only"))
        with pytest.raises(RoutingError, match="does not know task 'other'"):
            model(**inputs, task="other")
        if key != "task_mode":
            assert_close(model.merge_and_unload()(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
            return
    add_task(model, "second")
    with pytest.raises(RoutingError, match="needs a task"):
        model(**inputs)


@pytest.mark.parametrize("task", [list(TASKS), torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1, 2])])
def test_tasks_that_were_used_in_inference_mode_train_later(task: Any) -> None:
    model, inputs = more(), batch("llama")
    with torch.inference_mode():
        if isinstance(task, Tensor):
            task = task.clone()
        with use_task(model, task):
            model(**inputs)
            with torch.inference_mode(False), torch.enable_grad():
                model(**inputs).logits.sum().backward()
    assert gradients(model)


def test_tasks_follow_an_adapter_that_changes_within_use_task() -> None:
    model, inputs = more(), batch("llama")
    with use_task(model, ["rte", "cola", "sst2"]):
        model(**inputs)
        model.delete_adapter("default")
        model.add_adapter("default", MoREConfig(r=2, tasks=["sst2", "cola"], target_modules=["q_proj"]))
        model.set_adapter("default")
        with pytest.raises(RoutingError, match="does not know task 'rte'"):
            model(**inputs)


def test_numbered_tasks_need_no_names() -> None:
    model = get_peft_model(tiny_model("llama"), MoREConfig(r=2, num_tasks=3, target_modules=["q_proj"]))
    model(**batch("llama"), task=[0, 2, 1])
    with pytest.raises(RoutingError, match="does not know task 3"):
        model(**batch("llama"), task=3)


def test_two_task_conditioned_adapters_each_resolve_names_by_their_own_list() -> None:
    model = get_peft_model(
        tiny_model("llama"), MoREConfig(r=2, tasks=["a", "b"], target_modules=["q_proj"], init_weights=False)
    ).eval()
    model.add_adapter("two", MoREConfig(r=2, tasks=["b", "c", "a"], target_modules=["q_proj"], init_weights=False))
    model(**batch("llama"), task="a")
    with pytest.raises(RoutingError, match="adapter 'default' does not know task 'c'"):
        model(**batch("llama"), task="c")
    model.set_adapter("two")
    model(**batch("llama"), task="c")
    model.set_adapter("default")
    model.delete_adapter("two")
    assert set(model.base_model.routing.names) == {"default"}


def test_an_error_in_the_forward_pass_leaves_no_task_behind(mlp: Callable[[], nn.Module]) -> None:
    config = MoREConfig(r=2, tasks=list(TASKS), target_modules=["lin0"])
    model = get_peft_model(mlp(), config)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(3, 9), task="rte")
    with pytest.raises(MergeError, match="without a task"):
        model.merge_adapter()
    with pytest.raises(RoutingError, match="for a batch of 3"):
        model(torch.randn(3, 6), task=["rte", "cola"])
    with pytest.raises(RoutingError, match="needs a task"):
        model(torch.randn(3, 6))


def test_a_model_that_calls_itself_keeps_its_task() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 4)

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            inner = self(x, again=False, task="cola") if again else 0
            return self.lin(x) + inner

    config = MoREConfig(r=2, tasks=list(TASKS), target_modules=["lin"], init_weights=False)
    model = get_peft_model(Twice(), config)
    x = torch.randn(3, 6)
    expected = model(x, again=False, task="rte") + model(x, again=False, task="cola")
    assert_close(model(x, task="rte"), expected)


def test_rows_that_are_no_samples_are_refused_rather_than_guessed() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x.transpose(0, 1)).transpose(0, 1)

    config = MoREConfig(r=2, tasks=list(TASKS), target_modules=["lin"], init_weights=False)
    model = get_peft_model(SequenceFirst(), config)
    with pytest.raises(RoutingError, match=r"sees an input of shape \(4, 2, 6\) in a batch of 2.*exclude_modules"):
        model(torch.randn(2, 4, 6), task=["rte", "cola"])
    assert model(torch.randn(2, 4, 6), task="rte").shape == (2, 4, 4)


def test_tokens_flattened_into_rows_keep_their_samples_tasks() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x.reshape(-1, 6)).view(*x.shape[:2], 4)

    config = Variant("mtl_lora").config(target_modules=["lin"], init_weights=False)
    model, x = get_peft_model(Flat(), config), torch.randn(2, 5, 6)
    nn.init.normal_(adapted_layers(model)[0].core("default").transform)
    together = model(x, task=["rte", "cola"])
    assert_close(together[:1], model(x[:1], task="rte"))
    assert_close(together[1:], model(x[1:], task="cola"))


# --- gradient checkpointing -------------------------------------------------------------------------------------------


def gradients(model: PeftModel) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert left
    for name, gradient in left.items():
        assert_close(gradient, right[name], msg=lambda m, n=name: f"{n}: {m}")


def test_checkpointing_gives_the_same_gradients_also_with_two_forwards_before_one_backward(
    placed: tuple[Variant, str],
) -> None:
    variant, kind = placed
    model, config = adapted(variant, kind, dtype=torch.float64).train(), variant.config()
    one, two = batch(kind, seed=1), batch(kind, rows=2, seed=2)

    def both() -> Tensor:
        first = model(**one, **task_of(config, "rte", "cola", "sst2")).logits
        second = model(**two, **task_of(config, "sst2", "rte")).logits
        return first.pow(2).sum() + second.pow(2).sum()

    both().backward()
    plain = gradients(model)
    model.base_model.model.enable_input_require_grads()
    for use_reentrant in (True, False):
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        both().backward()
        assert_same(gradients(model), plain)
    model.gradient_checkpointing_disable()
    both().backward()
    assert_same(gradients(model), plain)


def test_checkpointing_that_was_on_before_the_adapter_works_too() -> None:
    base = tiny_model("llama")
    base.gradient_checkpointing_enable({"use_reentrant": False})
    config = Variant("more").config(target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(base, config).train()
    model(**batch("llama"), task=list(TASKS)).logits.sum().backward()
    with_it = gradients(model)
    base.gradient_checkpointing_disable()
    model(**batch("llama"), task=list(TASKS)).logits.sum().backward()
    assert_same(with_it, gradients(model))


def test_checkpointing_by_hand_outside_the_models_call_is_refused_rather_than_wrong(
    mlp: Callable[[], nn.Module],
) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    config = Variant("more").config(target_modules=["lin0"], init_weights=False)
    model = get_peft_model(Checkpointed(), config)
    out = model(torch.randn(3, 6, requires_grad=True), task=list(TASKS)).sum()
    with pytest.raises(RoutingError, match="use_task"):
        out.backward()
    model.zero_grad()
    out = model(torch.randn(3, 6, requires_grad=True), task=list(TASKS)).sum()
    with use_task(model, list(TASKS)):
        out.backward()


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_generation_equals_that_of_every_sample_alone(unlike: Variant, task_type: str | None) -> None:
    model, inputs, tasks = adapted(unlike, task_type=task_type), batch("llama"), ["sst2", "rte", "cola"]
    for layer in adapted_layers(model):
        layer.lora_B["default"].weight.data *= 20  # tokens that depend on the gates
    for how in ({}, {"num_beams": 4, "num_return_sequences": 2}):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **how}
        together = model.generate(**inputs, **options, **task_of(unlike.config(), *tasks))
        rows = how.get("num_return_sequences", 1)
        for i in range(3):
            alone = {k: v[i : i + 1] for k, v in inputs.items()}
            expected = model.generate(**alone, **options, **task_of(unlike.config(), tasks[i]))
            assert torch.equal(expected, together[i * rows : (i + 1) * rows])


@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
def test_encoder_decoder_generates_with_tasks_in_beams(task_type: str | None) -> None:
    model, inputs = more("t5", task_type), batch("t5")
    inputs.pop("decoder_input_ids")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    together = model.generate(**inputs, **options, task=["sst2", "rte", "cola"])
    for i, name in enumerate(["sst2", "rte", "cola"]):
        alone = model.generate(**{k: v[i : i + 1] for k, v in inputs.items()}, **options, task=name)
        assert torch.equal(alone[0], together[i])


def test_several_samples_per_prompt_keep_their_tasks() -> None:
    model, inputs = more(), batch("llama")
    out = model.generate(
        **inputs, max_new_tokens=2, do_sample=True, num_return_sequences=3, task=["rte", "cola", "sst2"]
    )
    assert out.shape == (9, 9)


def test_beams_may_be_named_by_a_config_and_other_rows_in_generate_are_refused() -> None:
    def guided(model: Any, input_ids: Tensor, **rest: Any) -> Tensor:
        logits: Tensor = model(torch.cat([input_ids, input_ids])).logits  # as Dia: conditioned, then unconditioned
        return logits

    model, inputs = more(), batch("llama")
    beams = GenerationConfig(max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0)
    together = model.generate(inputs["input_ids"], beams, task=list(TASKS))
    assert torch.equal(together, model.generate(inputs["input_ids"], generation_config=beams, task=list(TASKS)))
    model.base_model.model.generation_config.num_beams = 2
    assert torch.equal(together, model.generate(inputs["input_ids"], max_new_tokens=3, task=list(TASKS)))
    with pytest.raises(RoutingError, match="task has 3 entries for a batch of 6"):
        model.generate(**inputs, custom_generate=guided, num_beams=1, max_new_tokens=3, task=list(TASKS))


def test_a_decoder_without_an_encoder_is_none() -> None:
    opt = get_peft_model(tiny_model("opt"), MoDEConfig(target_modules=["q_proj"]))
    t5 = get_peft_model(tiny_model("t5"), MoDEConfig(target_modules=["q"]))
    assert {layer.of_decoder for layer in adapted_layers(opt)} == {False}
    assert {layer.of_decoder for layer in adapted_layers(t5)} == {False, True}


def test_generate_refuses_missing_unknown_and_miscounted_tasks() -> None:
    model, inputs = more(), batch("llama")
    for task, message in ((None, "needs a task"), ("x", "does not know task 'x'"), (["rte"] * 2, "for a batch of 3")):
        with pytest.raises(RoutingError, match=message):
            model.generate(**inputs, max_new_tokens=2, **({} if task is None else {"task": task}))
    assert model.generate(**inputs, max_new_tokens=2, task="rte").shape == (3, 9)


def test_merged_for_a_task_generates_as_the_unmerged_model() -> None:
    model, inputs = more(), batch("llama")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options, task="cola")
    assert torch.equal(model.merge_and_unload(task="cola").generate(**inputs, **options), expected)


def test_an_adapter_merged_for_one_task_refuses_another() -> None:
    model, inputs = more(), batch("llama")
    with torch.no_grad():
        expected = model(**inputs, task="cola").logits
        model.merge_adapter(task="cola")
        for task in ({}, {"task": "cola"}, {"task": torch.tensor([1, 1, 1])}):
            assert_close(model(**inputs, **task).logits, expected, atol=1e-5, rtol=1e-5)
        for task in ("rte", ["cola", "rte", "cola"]):
            with pytest.raises(RoutingError, match=r"is merged into the model for task 'cola'.*unmerge_adapter"):
                model(**inputs, task=task)
        model.unmerge_adapter()
        assert not torch.equal(model(**inputs, task="rte").logits, expected)


# --- compile ----------------------------------------------------------------------------------------------------------


# Tasks and nested modules; gates of tokens and buffers.
@pytest.mark.parametrize("key", ["more", pytest.param("smora", marks=pytest.mark.slow)])
def test_a_whole_model_is_traced_as_one_graph(key: str) -> None:
    torch._dynamo.reset()
    model, inputs = adapted(Variant(key), blocks=1), batch("llama")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    task = {"task": torch.tensor([2, 0, 1])} if key == "more" else {}
    with torch.no_grad():
        assert_close(compiled(**inputs, **task).logits, model(**inputs, **task).logits)


@pytest.mark.slow
def test_compiles_as_one_graph(placed: tuple[Variant, str]) -> None:
    variant, kind = placed
    torch._dynamo.reset()
    model, inputs = adapted(variant, kind), batch(kind)
    compiled = torch.compile(model, fullgraph=True)
    task = {"task": torch.tensor([2, 0, 1])} if variant.config().task_names else {}
    with torch.no_grad():
        assert_close(compiled(**inputs, **task).logits, model(**inputs, **task).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "variant", [UNLIKE[0], *(pytest.param(v, marks=pytest.mark.slow) for v in UNLIKE[1:])], ids=lambda v: v.id
)
def test_one_adapted_module_compiles_as_one_graph(variant: Variant, mlp: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    config = variant.config(target_modules=["lin0", "lin1"], init_weights=False)
    model = get_peft_model(mlp().double(), config).double()
    # aot_eager traces forward and backward whole, and leaves out what takes long: generating code.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    task = {"task": torch.tensor([2, 0, 1])} if config.task_names else {}
    x = torch.randn(3, 6).double()
    assert_close(compiled(x, **task), model(x, **task))
    compiled(x, **task).pow(2).sum().backward()
    traced = gradients(model)
    model(x, **task).pow(2).sum().backward()
    assert_same(traced, gradients(model))


# --- the cache for decoding -------------------------------------------------------------------------------------------


def test_generate_joins_weights_once_and_sees_every_change_before_it(unlike: Variant) -> None:
    model = get_peft_model(tiny_model("llama"), unlike.config(target_modules=["q_proj"], init_weights=False)).eval()
    layer = adapted_layers(model)[0]
    inputs = {**batch("llama"), **task_of(unlike.config(), "rte", "cola", "sst2")}
    seen: list[dict[Any, Any] | None] = []
    layer.register_forward_hook(lambda *_: seen.append(layer.routing.cache))

    def logits() -> Tensor:
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(out.logits)

    first = logits()
    assert len(seen) == 3
    assert all(kept is seen[0] for kept in seen)
    assert len(seen[0] or ()) == 2  # one adapter in each of two layers
    assert layer.routing.cache is None
    for module in (layer.lora_A["default"], layer.lora_B["default"]):
        module.weight.data.mul_(-3)  # past autograd, which would not count it as a change
    second = logits()
    assert not torch.equal(first, second)
    with plain():
        assert_close(logits(), second)


def test_cached_operators_serve_inference_only(unlike: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted(unlike), {**batch("llama"), **task_of(unlike.config(), *TASKS)}
    routing, made = model.base_model.routing, []
    inner = of_layer.CachedOperator
    monkeypatch.setattr(of_layer, "CachedOperator", lambda *args: made.append(args) or inner(*args))
    with torch.no_grad():
        expected = model(**inputs).logits
    with routing.unchanged_weights():
        model(**inputs).logits.sum().backward()  # with gradients
        with torch.no_grad():
            model.train()(**inputs)
            model.eval()
            with torch.autocast("cpu", torch.bfloat16):
                model(**inputs)
            assert made == []
            with routing.unchanged_weights():
                assert_close(model(**inputs).logits, expected)
            assert_close(model(**inputs).logits, expected)
            assert len(made) == len(adapted_layers(model))
    with torch.no_grad():
        model(**inputs)
    assert len(made) == len(adapted_layers(model))


def test_adapters_that_come_and_go_while_weights_are_frozen_are_not_answered_from_the_cache(
    unlike: Variant, tmp_path: Path
) -> None:
    model, inputs = adapted(unlike), {**batch("llama"), **task_of(unlike.config(), *TASKS)}
    torch.manual_seed(7)
    saved = adapted(unlike)
    saved.save_pretrained(tmp_path)
    with torch.no_grad(), model.base_model.routing.unchanged_weights():
        first = model(**inputs).logits
        model.add_adapter("other", unlike.config(target_modules=TARGETS["llama"], init_weights=False))
        assert torch.equal(model(**inputs).logits, first)
        model.set_adapter("other")
        second = model(**inputs).logits
        assert not torch.equal(second, first)
        model.set_adapter("default")
        model.delete_adapter("other")
        assert torch.equal(model(**inputs).logits, first)
        model.load_adapter(str(tmp_path), "other")  # another one of that name
        model.set_adapter("other")
        third = model(**inputs).logits
        assert_close(third, saved(**inputs).logits)
        torch.manual_seed(8)
        for layer in adapted_layers(model):
            layer.update_layer("other", unlike.config(init_weights=False))  # in its place
        assert not torch.equal(model(**inputs).logits, third)
        with plain():
            expected = model(**inputs).logits
        assert_close(model(**inputs).logits, expected)


def test_the_cache_is_gone_with_the_context_and_waits_for_no_collector() -> None:
    config = MoDEConfig(r=2, num_experts=3, target_modules=["q_proj", "k_proj"])
    model = get_peft_model(tiny_model("llama"), config).eval()
    routing = model.base_model.routing
    gc.disable()
    try:
        with torch.no_grad(), routing.unchanged_weights():
            model(**batch("llama"))
            assert routing.cache is not None
            operators = [operator for layer in routing.cache.values() for operator in layer.values()]
            weights = [weakref.ref(made[0]) for operator in operators for made in operator._weights.values()]
            assert len(weights) == 4
            del operators
        assert [ref for ref in weights if ref() is not None] == []
    finally:
        gc.enable()

# SPDX-License-Identifier: Apache-2.0
"""Do the methods live in PEFT as its own LoRA does? What PEFT's test matrix asks of a LoRA, for every method."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from dyads.errors import ConfigError, MergeError
from dyads.ops import plain
from dyads.tuner import DyadsLayer
from tiny import MLP, TARGETS, TASKS, Variant, batch, task_of, tiny_model

KINDS = ["llama", "gpt2", "t5", "bert"]
Q = ["q_proj", "v_proj"]


def adapted(variant: Variant, kind: str = "llama", **options: Any) -> PeftModel:
    options = {"target_modules": TARGETS[kind], "init_weights": False, **options}
    return get_peft_model(tiny_model(kind, options.pop("dtype", torch.float32)), variant.config(**options)).eval()


def logits(model: nn.Module, variant: Variant | None = None, kind: str = "llama", **inputs: Any) -> Tensor:
    task = task_of(variant.config(), *[TASKS[i % 3] for i in range(3)]) if variant else {}
    with torch.no_grad():
        return model(**batch(kind), **{**task, **inputs}).logits


def layers(model: nn.Module) -> list[DyadsLayer]:
    return [m for m in model.modules() if isinstance(m, DyadsLayer)]


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapter_changes_nothing_exactly(variant: Variant, kind: str) -> None:
    before = logits(tiny_model(kind).eval(), kind=kind)
    assert torch.equal(logits(adapted(variant, kind, init_weights=True), variant, kind), before)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_adapter_gives_equal_logits(variant: Variant, kind: str, tmp_path: Path) -> None:
    model = adapted(variant, kind)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "import dyads" in (tmp_path / "README.md").read_text()
    loaded = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path))
    assert type(loaded.peft_config["default"]) is type(variant.config())
    before = logits(tiny_model(kind).eval(), kind=kind)
    expected = logits(model, variant, kind)
    assert not torch.equal(expected, before)
    assert torch.equal(logits(loaded, variant, kind), expected)


def test_checkpoint_names_no_adapter_and_loads_under_any_name(variant: Variant, tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_model("llama"), variant.config(init_weights=False, target_modules=Q), adapter_name="gate"
    ).eval()
    model.save_pretrained(tmp_path)
    folder = tmp_path / "gate"
    for key in load_file(folder / "adapter_model.safetensors"):
        assert ".gate.gate" not in key
        # "gate" may only stand for MoRE's gate, never for the adapter
        assert key.count("gate") == (key.split("dyads_core.")[-1].count("gate") if "dyads_core" in key else 0)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(folder), adapter_name="weight")
    assert torch.equal(logits(loaded, variant), logits(model, variant))
    assert "import dyads" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("other", ["router", "gate", "embedding", "weight", "dyads_core", "q_proj", "a-b"])
def test_a_second_adapter_of_whatever_name_takes_nothing_from_the_first(
    variant: Variant, other: str, tmp_path: Path
) -> None:
    model = adapted(variant)
    expected = logits(model, variant)
    model.add_adapter(other, variant.config(target_modules=TARGETS["llama"], init_weights=False))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert torch.equal(logits(loaded, variant), expected)
    model.set_adapter(other)
    second = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / other), adapter_name="again")
    assert torch.equal(logits(second, variant), logits(model, variant))


def test_low_memory_load_gives_equal_logits(variant: Variant, tmp_path: Path) -> None:
    model = adapted(variant)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path), low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded, variant), logits(model, variant))


def test_state_dict_round_trip_and_injection_without_a_peft_model(variant: Variant) -> None:
    model = adapted(variant)
    state = get_peft_model_state_dict(model)
    plain = inject_adapter_in_model(variant.config(target_modules=TARGETS["llama"]), tiny_model("llama")).eval()
    result = set_peft_model_state_dict(plain, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(plain, variant), logits(model, variant))


def test_several_adapters_switch_stack_and_are_deleted(variant: Variant) -> None:
    model = adapted(variant)
    first = logits(model, variant)
    model.add_adapter("other", variant.config(target_modules=TARGETS["llama"], init_weights=False))
    assert torch.equal(logits(model, variant), first)
    model.set_adapter("other")
    other = logits(model, variant)
    assert not torch.equal(other, first)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, variant)
    assert not torch.equal(both, first)
    assert not torch.equal(both, other)
    model.set_adapter("default")
    assert torch.equal(logits(model, variant), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model, variant), first)
    assert "other" not in model.peft_config
    for layer in layers(model):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "other" not in getattr(layer, attribute)


def test_deleting_the_active_adapter_activates_another(variant: Variant) -> None:
    model = adapted(variant)
    model.add_adapter("other", variant.config(target_modules=TARGETS["llama"], init_weights=False))
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="Adapter other was active"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    logits(model, variant)


def test_two_adapters_load_one_after_the_other(variant: Variant, tmp_path: Path) -> None:
    expected = []
    for name in ("one", "two"):
        torch.manual_seed(len(expected) + 1)
        model = adapted(variant)
        expected.append(logits(model, variant))
        model.save_pretrained(tmp_path / name)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "one"), adapter_name="one")
    loaded.load_adapter(str(tmp_path / "two"), adapter_name="two")
    for name, wanted in zip(("one", "two"), expected, strict=True):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, variant), wanted)


def test_disabled_adapter_gives_the_base_model_and_comes_back(variant: Variant) -> None:
    model = adapted(variant)
    on, base = logits(model, variant), logits(tiny_model("llama").eval())
    with model.disable_adapter():
        assert torch.equal(logits(model, variant), base)
        assert torch.equal(logits(model), base)  # nor is a task needed
    assert torch.equal(logits(model, variant), on)


def test_only_the_active_adapter_trains(variant: Variant) -> None:
    model = get_peft_model(tiny_model("llama"), variant.config(target_modules=Q))
    model.add_adapter("other", variant.config(target_modules=Q))

    def trained() -> set[str]:
        return {n for n, p in model.named_parameters() if p.requires_grad}

    default = trained()
    assert default
    assert all(".default" in n and "dyads_" in n for n in default)
    model.set_adapter("other")
    assert trained() == {n.replace(".default", ".other") for n in default}
    model.set_requires_grad("default")
    assert default <= trained()
    model.set_adapter("default", inference_mode=True)
    assert trained() == set()


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_gets_a_gradient_in_every_step(variant: Variant, kind: str) -> None:
    # What DistributedDataParallel needs; also on the first step, with B = 0, and with one task only in the batch.
    model = get_peft_model(tiny_model(kind), variant.config(target_modules=TARGETS[kind]))
    for tasks in (["rte"] * 3, ["sst2", "rte", "cola"]):
        model.zero_grad()
        model(**batch(kind), **task_of(variant.config(), *tasks)).logits.float().pow(2).sum().backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_base_model_never_changes_in_training(variant: Variant) -> None:
    model = get_peft_model(tiny_model("llama"), variant.config(target_modules=Q, init_weights=False))
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch("llama"), **task_of(variant.config(), *TASKS)).logits.pow(2).sum().backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("dyads_" in n for n in changed)


# --- merging ----------------------------------------------------------------------------------------------------------


def merge_arguments(variant: Variant) -> dict[str, Any]:
    return {"task": "cola"} if "task" in variant.looks_at else {}


@pytest.mark.parametrize("kind", KINDS)
def test_merge_equals_the_unmerged_model_or_is_refused_with_the_reason(variant: Variant, kind: str) -> None:
    model = adapted(variant, kind)
    task = task_of(variant.config(), "cola")
    expected = logits(model, kind=kind, **task)
    if "x" in variant.looks_at:
        with pytest.raises(MergeError, match=r"cannot merge adapter 'default' .*gates look at the layer's input"):
            model.merge_and_unload()
        assert torch.equal(logits(model, kind=kind, **task), expected)  # the refusal left nothing half-merged
        return
    merged = model.merge_and_unload(**merge_arguments(variant))
    assert type(merged) is type(tiny_model(kind))
    assert not layers(merged)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in tiny_model(kind).named_parameters()}
    assert_close(logits(merged, kind=kind), expected, atol=1e-5, rtol=1e-5)
    assert not merged._forward_pre_hooks  # nothing of ours stays on the model
    assert "generate" not in merged.__dict__


def test_merge_and_unmerge_in_place(variant: Variant) -> None:
    if "x" in variant.looks_at:
        pytest.skip("merging is refused, see above")
    model = adapted(variant)
    expected, base = logits(model, **task_of(variant.config(), "cola")), logits(tiny_model("llama").eval())
    model.merge_adapter(**merge_arguments(variant))
    assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(**merge_arguments(variant))
    assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert_close(logits(model, **task_of(variant.config(), "cola")), expected, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert_close(logits(model), base, atol=1e-5, rtol=1e-5)


def test_safe_merge_refuses_broken_weights_and_keeps_the_base(variant: Variant) -> None:
    if "x" in variant.looks_at:
        pytest.skip("merging is refused, see above")
    model = adapted(variant, target_modules=Q)
    base = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    with torch.no_grad():
        layers(model)[0].dyads_B["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True, **merge_arguments(variant))
    name = next(iter(base))
    assert torch.equal(dict(model.named_parameters())[name], base[name])


def test_task_conditioned_merge_needs_exactly_one_known_task() -> None:
    variant = Variant("more")
    model = adapted(variant)
    with pytest.raises(MergeError, match="without a task, as every task has its own update: name one, for instance"):
        model.merge_and_unload()
    with pytest.raises(MergeError, match="without a task"):
        model.merge_and_unload(task=["rte", "cola"])
    with pytest.raises(ValueError, match="does not know task 'col' – did you mean 'cola'"):
        model.merge_and_unload(task="col")
    assert len(layers(model)) == 6


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_is_fp32_over_a_half_precision_base_and_outputs_keep_the_bases_dtype(
    variant: Variant, dtype: torch.dtype
) -> None:
    model = adapted(variant, dtype=dtype)
    assert {p.dtype for n, p in model.named_parameters() if "dyads_" in n} == {torch.float32}
    out = logits(model, variant)
    assert out.dtype == dtype
    exact = adapted(variant)
    set_peft_model_state_dict(exact, get_peft_model_state_dict(model))
    # Two layers of a random tiny model in half precision: what is left is rounding.
    assert (out.float() - logits(exact, variant)).abs().max() < 0.05 * logits(exact, variant).abs().max()


def test_adapter_keeps_the_bases_dtype_on_request(variant: Variant) -> None:
    config = variant.config(target_modules=Q)
    model = get_peft_model(tiny_model("llama", torch.bfloat16), config, autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if "dyads_" in n} == {torch.bfloat16}
    logits(model, variant)


def test_autocast_trains_and_stays_close(variant: Variant) -> None:
    model = adapted(variant).train()
    expected = logits(model, variant)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch("llama"), **task_of(variant.config(), *TASKS)).logits
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()
    out.float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_autocast_chooses_the_same_ranks() -> None:
    core = Variant("more").config(r=64, tasks=[str(i) for i in range(200)]).core(48)
    core.reset_parameters()
    task = torch.arange(200)
    h = torch.randn(200, 64)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = core.route(h, h, task).gt(0).sum(-1)
    assert torch.equal(under_autocast, core.ranks())
    assert torch.equal(core.route(h.bfloat16(), h, task).gt(0).sum(-1), core.ranks())


def test_quantised_weights_are_not_merged_into() -> None:
    model = adapted(Variant("mode", (("num_experts", 1),)), target_modules=Q)
    layer = layers(model)[0]
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(MergeError, match=r"cannot merge .* into weights of type torch.int8: .* quantised layer"):
        model.merge_adapter()


# --- where the adapter goes -------------------------------------------------------------------------------------------


def names(model: nn.Module) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, DyadsLayer)}


def test_target_modules_take_names_expressions_all_linear_layers_and_exclusions(variant: Variant) -> None:
    def where(**options: Any) -> set[str]:
        return names(get_peft_model(tiny_model("llama"), variant.config(**options)))

    attention = {f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in "qkvo"}
    assert where(target_modules=["q_proj"]) == {n for n in attention if "q_proj" in n}
    assert where(target_modules=r".*\.0\..*(q|k)_proj") == {n for n in attention if ".0." in n and n[-6] in "qk"}
    assert len(where(target_modules="all-linear")) == 14
    assert where(target_modules=["q_proj", "k_proj"], layers_to_transform=[1]) == {
        n for n in attention if ".1." in n and n[-6] in "qk"
    }
    assert where(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]) == {n for n in attention if "q_" in n}
    assert where() == {n for n in attention if n[-6] in "qv"}  # PEFT's defaults for a LoRA on this architecture


def test_unsupported_modules_are_refused_with_the_way_out(variant: Variant) -> None:
    with pytest.raises(ConfigError, match=r"Embedding is not supported: dyads adapts nn.Linear and .* exclude_modules"):
        get_peft_model(tiny_model("llama"), variant.config(target_modules=["embed_tokens"]))


def test_modules_to_save_train_and_are_saved_whole(variant: Variant, tmp_path: Path) -> None:
    config = variant.config(target_modules=["query"], modules_to_save=["classifier"], init_weights=False)
    model = get_peft_model(tiny_model("bert"), config).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    expected = logits(model, variant, "bert")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path))
    assert torch.equal(logits(loaded, variant, "bert"), expected)
    assert [n for n in load_file(tmp_path / "adapter_model.safetensors") if "classifier" in n]


def test_plain_module_with_inputs_of_any_rank(variant: Variant, mlp: Callable[[], nn.Module]) -> None:
    config = variant.config(target_modules=["lin0", "lin1"], modules_to_save=["head"], init_weights=False)
    model = get_peft_model(mlp(), config)
    x = torch.randn(3, 4, 6)
    whole = model(x, **task_of(config, *TASKS))
    assert_close(model(x[:, 1], **task_of(config, *TASKS)), whole[:, 1])
    assert_close(model(x[1, 1], **task_of(config, TASKS[1])), whole[1, 1])
    assert_close(model(x.unsqueeze(2), **task_of(config, *TASKS)), whole.unsqueeze(2))


def test_modules_that_read_weights_past_the_adapter_are_handled_or_refused(variant: Variant) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    with pytest.raises(ConfigError, match="MultiheadAttention reads the weight of its out_proj itself"):
        get_peft_model(Encoder(), variant.config(target_modules=["out_proj"]))
    config = variant.config(target_modules=["linear1"], init_weights=False)
    model = get_peft_model(Encoder(), config).eval()
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        on = model(x, **task_of(config, *TASKS))
        with model.disable_adapter():
            assert not torch.equal(model(x), on)


@pytest.mark.parametrize("rows", [(0, 6), (2, 0, 6)])
def test_inputs_without_rows_pass_through(
    variant: Variant, rows: tuple[int, ...], mlp: Callable[[], nn.Module]
) -> None:
    config = variant.config(target_modules=["lin0"])
    assert get_peft_model(mlp(), config)(torch.zeros(rows), **task_of(config, "rte")).shape == (*rows[:-1], 2)


def test_config_survives_json(variant: Variant, tmp_path: Path) -> None:
    config = variant.config(target_modules=Q, lora_alpha=3, lora_dropout=0.1)
    config.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    again = type(config).from_pretrained(str(tmp_path))
    assert stored["peft_type"] == f"DYADS_{variant.key.upper()}"
    assert {k: v for k, v in again.to_dict().items() if k != "inference_mode"} == {
        k: v for k, v in config.to_dict().items() if k != "inference_mode"
    }


def test_deep_copy_and_pickle_stand_on_their_own(variant: Variant) -> None:
    model = adapted(variant)
    expected = logits(model, variant)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, variant), expected)
        assert twin.base_model.routing is not model.base_model.routing
        assert all(layer.routing is twin.base_model.routing for layer in layers(twin))
        with torch.no_grad():
            layers(twin)[0].dyads_A["default"].zero_()
        assert torch.equal(logits(model, variant), expected)


def test_unload_gives_the_untouched_base_back(variant: Variant) -> None:
    model = adapted(variant)
    base: PreTrainedModel = model.unload()
    assert torch.equal(logits(base), logits(tiny_model("llama").eval()))
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert "generate" not in base.__dict__
    again = get_peft_model(base, variant.config(target_modules=Q))
    logits(again, variant)


def test_dropout_acts_on_the_adapters_input_in_training_only() -> None:
    variant = Variant("mode")
    model = adapted(variant, lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_adapter_names_are_refused(variant: Variant) -> None:
    model = adapted(variant)
    with pytest.raises(ConfigError, match="adapter_names is not supported by dyads: one adapter serves many tasks"):
        logits(model, variant, adapter_names=["default"] * 3)


@pytest.mark.parametrize("watcher", ["hook", "global hook", "forward", "forward of the class"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_what_others_hold_of_the_base_layer_stays_as_it_was(
    variant: Variant, watcher: str, with_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(variant)
    layer = next(m for m in model.modules() if isinstance(m, DyadsLayer))
    base, held = layer.base_layer, []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if module is base:
            held.append((output, nn.functional.linear(args[0], base.weight)))

    undo: Any = None
    if watcher == "hook":
        base.register_forward_hook(keep)
    elif watcher == "global hook":
        undo = nn.modules.module.register_module_forward_hook(keep)
    elif watcher == "forward of the class":
        of_class = nn.Linear.forward

        def watched(module: nn.Linear, x: Tensor) -> Tensor:
            output = of_class(module, x)
            keep(module, (x,), output)
            return output

        monkeypatch.setattr(nn.Linear, "forward", watched)
    else:
        plain = base.forward
        base.forward = lambda x: held.append((plain(x), plain(x))) or held[-1][0]
    try:
        with torch.set_grad_enabled(with_gradients):
            model(**batch("llama"), **task_of(variant.config(), "rte", "cola", "sst2"))
    finally:
        if undo is not None:
            undo.remove()
    (kept, expected), *_ = held
    assert torch.equal(kept, expected)


def test_a_base_layer_whose_weights_are_no_parameters_is_called(variant: Variant) -> None:
    # As replicas of nn.DataParallel and layers sharded by FSDP have them: tensors that are attributes.
    config = variant.config(target_modules=["lin0", "lin1"])
    model, x, task = get_peft_model(MLP(), config), torch.randn(3, 6), task_of(config, "rte", "cola", "sst2")
    expected = model(x, **task)
    for base in [m.base_layer for m in model.modules() if isinstance(m, DyadsLayer)]:
        weights = dict(base._parameters)
        base._parameters.clear()
        for name, weight in weights.items():
            setattr(base, name, None if weight is None else weight.detach())
    assert_close(model(x, **task), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_base_layer_that_trains_gets_its_gradients(variant: Variant, bias: bool) -> None:
    torch.manual_seed(0)
    config = variant.config(target_modules=["lin0", "lin1"])
    model = get_peft_model(MLP(), config)
    bases = [m.base_layer for m in model.modules() if isinstance(m, DyadsLayer)]
    x, task = torch.randn(3, 6), task_of(config, "rte", "cola", "sst2")
    trained = [base.bias for base in bases if base.bias is not None] if bias else [base.weight for base in bases]
    frozen = torch.autograd.grad(model(x.requires_grad_(), **task).square().sum(), x)
    for parameter in trained:
        parameter.requires_grad_()
    ours = torch.autograd.grad(model(x, **task).square().sum(), [x, *trained])
    with plain():
        theirs = torch.autograd.grad(model(x, **task).square().sum(), [x, *trained])
    assert_close(ours, theirs)
    assert_close(ours[0], frozen[0])
    assert all(g.abs().sum() > 0 for g in ours)


def test_shapes_can_be_asked_for_without_memory(variant: Variant) -> None:
    model = get_peft_model(MLP(), variant.config(target_modules=["lin0", "lin1"])).to("meta")
    assert model(torch.empty(3, 6, device="meta"), **task_of(variant.config(), "rte")).shape == (3, 2)

# SPDX-License-Identifier: Apache-2.0
"""Adapters in PEFT: every behaviour that PEFT tests of its LoRA, for every method."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.optimizers import create_loraplus_optimizer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from dyads.errors import ConfigError, DyadsError, MergeError
from dyads.methods import methods
from dyads.ops import plain
from dyads.runs.saved import SavedAdapter
from dyads.tuner import DyadsLinear
from tiny import MLP, TARGETS, TASKS, UNLIKE, Variant, batch, task_of, tiny_model
from tiny import adapted_layers as layers

Q = ["q_proj", "v_proj"]


def adapted(variant: Variant, kind: str = "llama", **options: Any) -> PeftModel:
    options = {"target_modules": TARGETS[kind], "init_weights": False, **options}
    return get_peft_model(tiny_model(kind, options.pop("dtype", torch.float32)), variant.config(**options)).eval()


def logits(model: nn.Module, variant: Variant | None = None, kind: str = "llama", **inputs: Any) -> Tensor:
    task = task_of(variant.config(), *[TASKS[i % 3] for i in range(3)]) if variant else {}
    with torch.no_grad():
        return model(**batch(kind), **{**task, **inputs}).logits


def test_fresh_adapter_changes_nothing_exactly_and_trains_whole(placed: tuple[Variant, str]) -> None:
    variant, kind = placed
    before = logits(tiny_model(kind).eval(), kind=kind)
    model = adapted(variant, kind, init_weights=True)
    assert torch.equal(logits(model, variant, kind), before)
    # Every parameter gets a gradient in every step, as DistributedDataParallel needs: also in the first, with B = 0,
    # and with one task only in the batch.
    for tasks in (["rte"] * 3, ["sst2", "rte", "cola"]):
        model.zero_grad()
        model(**batch(kind), **task_of(variant.config(), *tasks)).logits.float().pow(2).sum().backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_saved_and_loaded_adapter_gives_equal_logits(placed: tuple[Variant, str], tmp_path: Path) -> None:
    variant, kind = placed
    model = adapted(variant, kind)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "import dyads" in (tmp_path / "README.md").read_text()
    expected = logits(model, variant, kind)
    assert not torch.equal(expected, logits(tiny_model(kind).eval(), kind=kind))
    for low_memory in (False, True) if variant in UNLIKE else (False,):
        loaded = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path), low_cpu_mem_usage=low_memory)
        assert type(loaded.peft_config["default"]) is type(variant.config())
        assert not any(p.is_meta for p in loaded.parameters())
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
        # With low_memory the file's own memory is used, whose alignment may change the order of a product's sums.
        tolerance = 1e-5 if low_memory else 0.0
        assert_close(logits(loaded, variant, kind), expected, atol=tolerance, rtol=tolerance)


def test_checkpoint_names_no_adapter_and_loads_under_any_name(unlike: Variant, tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_model("llama"), unlike.config(init_weights=False, target_modules=Q), adapter_name="gate"
    ).eval()
    model.save_pretrained(tmp_path)
    folder = tmp_path / "gate"
    for key in load_file(folder / "adapter_model.safetensors"):
        assert ".gate.gate" not in key
        # "gate" may only stand for MoRE's gate, never for the adapter
        assert key.count("gate") == (key.split("lora_core.")[-1].count("gate") if "lora_core" in key else 0)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(folder), adapter_name="weight")
    assert torch.equal(logits(loaded, unlike), logits(model, unlike))
    assert "import dyads" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("variant", "other"),
    list(zip(cycle(UNLIKE), ("router", "gate", "weight", "lora_core", "lora_A", "embedding", "q_proj", "a-b"))),
    ids=lambda v: getattr(v, "id", v),
)
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


def test_state_dict_round_trip_and_injection_without_a_peft_model(unlike: Variant) -> None:
    model = adapted(unlike)
    state = get_peft_model_state_dict(model)
    plain = inject_adapter_in_model(unlike.config(target_modules=TARGETS["llama"]), tiny_model("llama")).eval()
    result = set_peft_model_state_dict(plain, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(plain, unlike), logits(model, unlike))


def test_several_adapters_switch_stack_and_are_deleted(unlike: Variant) -> None:
    model = adapted(unlike)
    first = logits(model, unlike)
    model.add_adapter("other", unlike.config(target_modules=TARGETS["llama"], init_weights=False))
    assert torch.equal(logits(model, unlike), first)
    model.set_adapter("other")
    other = logits(model, unlike)
    assert not torch.equal(other, first)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, unlike)
    assert not torch.equal(both, first)
    assert not torch.equal(both, other)
    model.set_adapter("default")
    assert torch.equal(logits(model, unlike), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model, unlike), first)
    assert "other" not in model.peft_config
    for layer in layers(model):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "other" not in getattr(layer, attribute)


def test_adapters_may_be_in_different_layers(unlike: Variant) -> None:
    model = adapted(unlike, target_modules=["q_proj"])
    first = logits(model, unlike)
    model.add_adapter("other", unlike.config(target_modules=["q_proj", "k_proj"], init_weights=False))
    assert [sorted(layer.lora_A) for layer in layers(model)] == [["default", "other"], ["other"]] * 2
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    assert torch.equal(logits(model, unlike), first)
    model.set_adapter("other")
    second = logits(model, unlike)
    assert not torch.equal(second, first)
    model.delete_adapter("default")
    assert torch.equal(logits(model, unlike), second)


def test_deleting_the_active_adapter_activates_another() -> None:
    model = adapted(Variant("mode"))
    model.add_adapter("other", Variant("mode").config(target_modules=TARGETS["llama"], init_weights=False))
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="Adapter other was active"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    logits(model)


def test_two_adapters_load_one_after_the_other(unlike: Variant, tmp_path: Path) -> None:
    expected = []
    for name in ("one", "two"):
        torch.manual_seed(len(expected) + 1)
        model = adapted(unlike)
        expected.append(logits(model, unlike))
        model.save_pretrained(tmp_path / name)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "one"), adapter_name="one")
    loaded.load_adapter(str(tmp_path / "two"), adapter_name="two")
    for name, wanted in zip(("one", "two"), expected, strict=True):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, unlike), wanted)


def test_disabled_adapter_gives_the_base_model_and_comes_back(unlike: Variant) -> None:
    model = adapted(unlike)
    on, base = logits(model, unlike), logits(tiny_model("llama").eval())
    with model.disable_adapter():
        assert torch.equal(logits(model, unlike), base)
        assert torch.equal(logits(model), base)  # nor is a task needed
    assert torch.equal(logits(model, unlike), on)


def test_only_the_active_adapter_trains(unlike: Variant) -> None:
    model = get_peft_model(tiny_model("llama"), unlike.config(target_modules=Q))
    model.add_adapter("other", unlike.config(target_modules=Q))

    def trained() -> set[str]:
        return {n for n, p in model.named_parameters() if p.requires_grad}

    default = trained()
    assert default
    assert all(".default." in n and "lora_" in n for n in default)
    model.set_adapter("other")
    assert trained() == {n.replace(".default.", ".other.") for n in default}
    model.set_requires_grad("default")
    assert default <= trained()
    model.set_adapter("default", inference_mode=True)
    assert trained() == set()


def test_base_model_never_changes_in_training(unlike: Variant) -> None:
    model = get_peft_model(tiny_model("llama"), unlike.config(target_modules=Q, init_weights=False))
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch("llama"), **task_of(unlike.config(), *TASKS)).logits.pow(2).sum().backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in n for n in changed)


# --- merging ----------------------------------------------------------------------------------------------------------


def merge_arguments(unlike: Variant) -> dict[str, Any]:
    return {"task": "cola"} if "task" in unlike.looks_at else {}


def test_merge_equals_the_unmerged_model_or_is_refused_with_the_reason(placed: tuple[Variant, str]) -> None:
    variant, kind = placed
    model = adapted(variant, kind)
    task = task_of(variant.config(), "cola")
    expected = logits(model, kind=kind, **task)
    if variant.looks_at & {"x", "h"}:
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


MERGED = [Variant("mode", (("num_experts", 1),)), Variant("more"), Variant("mtl_lora"), UNLIKE[-1]]
merged_variants = pytest.mark.parametrize("variant", MERGED, ids=lambda v: v.id)


@merged_variants
def test_merge_and_unmerge_in_place(variant: Variant) -> None:
    model = adapted(variant)
    expected, base = logits(model, **task_of(variant.config(), "cola")), logits(tiny_model("llama").eval())
    model.merge_adapter(**merge_arguments(variant))
    assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(**merge_arguments(variant))
    assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert_close(logits(model, **task_of(variant.config(), "cola")), expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layers(model)[0].unmerge()
    with model.disable_adapter():
        assert_close(logits(model), base, atol=1e-5, rtol=1e-5)
    model.merge_adapter(**merge_arguments(variant))
    with model.disable_adapter():  # unmerges
        assert_close(logits(model), base, atol=1e-5, rtol=1e-5)


@merged_variants
def test_safe_merge_refuses_broken_weights_and_keeps_the_base(variant: Variant) -> None:
    model = adapted(variant, target_modules=Q)
    base = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    with torch.no_grad():
        layers(model)[0].lora_B["default"].weight[0, 0] = float("nan")
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


def test_adapter_is_fp32_over_a_half_precision_base_and_outputs_keep_the_bases_dtype(unlike: Variant) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = adapted(unlike, dtype=dtype)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
        out = logits(model, unlike)
        assert out.dtype == dtype
        exact = adapted(unlike)
        set_peft_model_state_dict(exact, get_peft_model_state_dict(model))
        # Two layers of a random tiny model in half precision: what is left is rounding.
        assert (out.float() - logits(exact, unlike)).abs().max() < 0.05 * logits(exact, unlike).abs().max()


def test_adapter_keeps_the_bases_dtype_on_request(unlike: Variant) -> None:
    config = unlike.config(target_modules=Q)
    model = get_peft_model(tiny_model("llama", torch.bfloat16), config, autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    logits(model, unlike)


def test_autocast_trains_and_stays_close(unlike: Variant) -> None:
    model = adapted(unlike).train()
    expected = logits(model, unlike)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch("llama"), **task_of(unlike.config(), *TASKS)).logits
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


# --- where the adapter goes -------------------------------------------------------------------------------------------


def names(model: nn.Module) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, DyadsLinear)}


def test_target_modules_take_names_expressions_all_linear_layers_and_exclusions() -> None:
    variant = Variant("mode")

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


def test_unsupported_modules_are_refused_with_the_way_out() -> None:
    variant = Variant("mode")
    with pytest.raises(ConfigError, match=r"Embedding is not supported: dyads adapts nn.Linear, .* exclude_modules"):
        get_peft_model(tiny_model("llama"), variant.config(target_modules=["embed_tokens"]))


def test_modules_to_save_train_and_are_saved_whole(unlike: Variant, tmp_path: Path) -> None:
    config = unlike.config(target_modules=["query"], modules_to_save=["classifier"], init_weights=False)
    model = get_peft_model(tiny_model("bert"), config).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    expected = logits(model, unlike, "bert")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path))
    assert torch.equal(logits(loaded, unlike, "bert"), expected)
    assert [n for n in load_file(tmp_path / "adapter_model.safetensors") if "classifier" in n]


def test_plain_module_with_inputs_of_any_rank(unlike: Variant, mlp: Callable[[], nn.Module]) -> None:
    config = unlike.config(target_modules=["lin0", "lin1"], modules_to_save=["head"], init_weights=False)
    model = get_peft_model(mlp(), config)
    x = torch.randn(3, 4, 6)
    whole = model(x, **task_of(config, *TASKS))
    assert_close(model(x[:, 1], **task_of(config, *TASKS)), whole[:, 1])
    assert_close(model(x[1, 1], **task_of(config, TASKS[1])), whole[1, 1])
    assert_close(model(x.unsqueeze(2), **task_of(config, *TASKS)), whole.unsqueeze(2))


def test_modules_that_read_weights_past_the_adapter_are_handled_or_refused() -> None:
    variant = Variant("mode")

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


def test_inputs_without_rows_pass_through(unlike: Variant, mlp: Callable[[], nn.Module]) -> None:
    config = unlike.config(target_modules=["lin0"])
    model = get_peft_model(mlp(), config).eval()
    for rows in ((0, 6), (2, 0, 6)):
        y = model(torch.zeros(rows), **task_of(config, "rte"))
        assert y.shape == (*rows[:-1], 2)
        y.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        with torch.no_grad(), model.base_model.routing.unchanged_weights():
            assert model(torch.zeros(rows), **task_of(config, "rte")).shape == (*rows[:-1], 2)


@pytest.mark.parametrize("variant", [Variant(m.key) for m in methods()], ids=lambda v: v.id)
def test_config_survives_json(variant: Variant, tmp_path: Path) -> None:
    config = variant.config(target_modules=Q, lora_alpha=3, lora_dropout=0.1)
    config.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    again = type(config).from_pretrained(str(tmp_path))
    assert stored["peft_type"] == f"DYADS_{variant.key.upper()}"
    assert {k: v for k, v in again.to_dict().items() if k != "inference_mode"} == {
        k: v for k, v in config.to_dict().items() if k != "inference_mode"
    }


def test_saving_does_not_touch_the_readme_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    for _ in range(2):
        adapted(Variant("mode")).save_pretrained(tmp_path / "adapter")
    Variant("mode").config().save_pretrained(str(tmp_path / "config"))
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert (tmp_path / "adapter" / "README.md").read_text().count("import dyads") == 1


def test_deep_copy_and_pickle_stand_on_their_own(unlike: Variant) -> None:
    model = adapted(unlike)
    expected = logits(model, unlike)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, unlike), expected)
        assert twin.base_model.routing is not model.base_model.routing
        assert all(layer.routing is twin.base_model.routing for layer in layers(twin))
        with torch.no_grad():
            layers(twin)[0].lora_A["default"].weight.zero_()
        assert torch.equal(logits(model, unlike), expected)


def test_unload_gives_the_untouched_base_back(unlike: Variant) -> None:
    model = adapted(unlike)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    base: PreTrainedModel = model.unload()
    assert torch.equal(logits(base), logits(tiny_model("llama").eval()))
    functions = [m.__dict__.get("_gradient_checkpointing_func") for m in base.modules()]
    assert not any(type(f).__module__.startswith("dyads") for f in functions)
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert "generate" not in base.__dict__
    again = get_peft_model(base, unlike.config(target_modules=Q))
    logits(again, unlike)


def test_dropout_acts_on_the_adapters_input_in_training_only() -> None:
    variant = Variant("mode")
    model = adapted(variant, lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_adapter_names_are_refused() -> None:
    variant = Variant("mode")
    model = adapted(variant)
    with pytest.raises(ConfigError, match="adapter_names is not supported by dyads: one adapter serves many tasks"):
        logits(model, variant, adapter_names=["default"] * 3)


@pytest.mark.parametrize("watcher", ["hook", "global hook", "forward", "forward of the class"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_what_others_hold_of_the_base_layer_stays_as_it_was(
    watcher: str, with_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant("mode")
    model = adapted(variant)
    layer = next(m for m in model.modules() if isinstance(m, DyadsLinear))
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


def test_a_base_layer_whose_weights_are_no_parameters_is_called() -> None:
    variant = Variant("mode")
    # As replicas of nn.DataParallel and layers sharded by FSDP have them: tensors that are attributes.
    config = variant.config(target_modules=["lin0", "lin1"])
    model, x, task = get_peft_model(MLP(), config), torch.randn(3, 6), task_of(config, "rte", "cola", "sst2")
    expected = model(x, **task)
    for base in [m.base_layer for m in model.modules() if isinstance(m, DyadsLinear)]:
        weights = dict(base._parameters)
        base._parameters.clear()
        for name, weight in weights.items():
            setattr(base, name, None if weight is None else weight.detach())
    assert_close(model(x, **task), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_base_layer_that_trains_gets_its_gradients(unlike: Variant, bias: bool) -> None:
    torch.manual_seed(0)
    config = unlike.config(target_modules=["lin0", "lin1"])
    model = get_peft_model(MLP(), config)
    bases = [m.base_layer for m in model.modules() if isinstance(m, DyadsLinear)]
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


def test_shapes_can_be_asked_for_without_memory(unlike: Variant) -> None:
    model = get_peft_model(MLP(), unlike.config(target_modules=["lin0", "lin1"])).to("meta")
    assert model(torch.empty(3, 6, device="meta"), **task_of(unlike.config(), "rte")).shape == (3, 2)


# --- names that others know from LoRA ---------------------------------------------------------------------------------


def test_parameters_have_the_names_of_lora_and_the_type_has_a_value(unlike: Variant) -> None:
    model = adapted(unlike)
    names = {n.split("q_proj.")[1] for n, p in model.named_parameters() if "q_proj" in n and p.requires_grad}
    assert {"lora_A.default.weight", "lora_B.default.weight"} < names
    assert all(n.startswith("lora_core.default.") for n in names - {"lora_A.default.weight", "lora_B.default.weight"})
    layer = layers(model)[0]
    core, blocks = layer.core("default"), layer.core("default").feature_blocks
    assert layer.lora_A["default"].weight.shape == (core.p, layer.in_features // blocks)
    assert layer.lora_B["default"].weight.shape == (layer.out_features // blocks, core.q)
    A, B = layer.factors("default")
    assert (A.shape, B.shape) == ((core.p, layer.in_features), (layer.out_features, core.q))

    key = f"DYADS_{unlike.key.upper()}"
    assert model.peft_config["default"].peft_type.value == key
    assert model.peft_type == key
    status = model.get_model_status()
    assert (status.adapter_model_type, status.peft_types) == ("DyadsModel", {"default": key})
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lora_plus_gives_b_a_learning_rate_of_its_own(unlike: Variant) -> None:
    model = get_peft_model(tiny_model("llama"), unlike.config(target_modules=Q))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (0.16 if "lora_B" in name or parameter.ndim == 1 else 0.01)


def test_files_of_a_pre_release_are_refused(unlike: Variant, tmp_path: Path) -> None:
    adapted(unlike).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {
        re.sub(r"lora_(A|B)\.weight", r"dyads_\1", key).replace("lora_core", "dyads_core"): value
        for key, value in load_file(file).items()
    }
    save_file(old, file)
    for load in (
        lambda: PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)),
        partial(SavedAdapter.read, tmp_path),
    ):
        with pytest.raises(DyadsError, match=r"saved by a pre-release of dyads.*dyads_.*'\): train it again"):
            load()


def test_a_second_adapter_adapts_all_linear_layers_too() -> None:
    model = get_peft_model(tiny_model("llama"), Variant("mode").config(target_modules="all-linear"))
    model.add_adapter("other", Variant("mode").config(r=2, target_modules="all-linear"))
    assert [set(layer.lora_A) for layer in layers(model)] == [{"default", "other"}] * 14


# --- production shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", [*(Variant(m.key) for m in methods()), Variant("mode", (("score", "h"),))], ids=lambda v: v.id
)
def test_fresh_adapter_changes_nothing_exactly_at_production_shapes(variant: Variant) -> None:
    config = variant.config(target_modules=["0"])
    task = task_of(config, *[TASKS[i % 3] for i in range(8)])
    fp32, bf16 = torch.float32, torch.bfloat16
    for dtype, adapter_dtype in ((fp32, fp32), (bf16, fp32), (bf16, bf16)):
        base = nn.Sequential(nn.Linear(576, 576)).to(dtype)
        inputs = [torch.randn(8, tokens // 8, 576).to(dtype) for tokens in (512, 4096)]
        with torch.no_grad():
            expected = [base(x) for x in inputs]
        model = get_peft_model(base, config, autocast_adapter_dtype=adapter_dtype != dtype).eval()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {adapter_dtype}
        for x, y in zip(inputs, expected, strict=True):
            assert torch.equal(model(x, **task), y)
            with torch.no_grad(), model.base_model.routing.unchanged_weights():
                assert torch.equal(model(x, **task), y)

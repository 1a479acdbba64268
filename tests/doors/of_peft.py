# SPDX-License-Identifier: Apache-2.0
"""Doors of PEFT."""

from __future__ import annotations

import warnings

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from peft.utils.other import prepare_model_for_kbit_training
from torch import nn
from torch.testing import assert_close

from doors import Case, Cell, absent, door, refused, refuses
from dyads import use_task
from dyads.errors import ConfigError, MergeError
from tiny import TARGETS, adapted_layers, tiny_model

INPUT = "no single weight update equals an adapter whose gates look at the layer's input"
MANY = "an adapter whose tasks have their own updates equals one for a named task only: see the next line"


@door("PEFT", "`get_peft_model`, training")
def created(case: Case) -> None:
    model = case.model(init_weights=True)
    assert torch.equal(case.logits(model), case.bare(tiny_model("llama").eval()))
    model.train()(**case.inputs, **case.task, labels=case.inputs["input_ids"]).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@door("PEFT", "`save_pretrained`, `PeftModel.from_pretrained`, also with `low_cpu_mem_usage`")
def saved(case: Case) -> None:
    model = case.model()
    model.save_pretrained(case.folder)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(tiny_model("llama"), str(case.folder), low_cpu_mem_usage=low)
        assert_close(case.logits(loaded), case.logits(model), atol=1e-5, rtol=1e-5)


@door("PEFT", "`AutoPeftModelForCausalLM.from_pretrained`")
def auto(case: Case) -> None:
    tiny_model("llama").save_pretrained(case.folder / "base")
    model = case.model(task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = str(case.folder / "base")
    model.save_pretrained(case.folder / "adapter")
    assert_close(case.logits(AutoPeftModelForCausalLM.from_pretrained(case.folder / "adapter")), case.logits(model))


@door("PEFT", "`inject_adapter_in_model`, `get_` and `set_peft_model_state_dict`")
def injected(case: Case) -> None:
    model = case.model()
    plain = inject_adapter_in_model(case.config(), tiny_model("llama")).eval()
    assert not set_peft_model_state_dict(plain, get_peft_model_state_dict(model)).unexpected_keys
    assert torch.equal(case.logits(plain), case.logits(model))


@door("PEFT", "`add_adapter`, `set_adapter`, `delete_adapter`, `disable_adapter`")
def switched(case: Case) -> None:
    model = case.model()
    first = case.logits(model)
    model.add_adapter("other", case.config())
    model.set_adapter("other")
    assert not torch.equal(case.logits(model), first)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(case.logits(model), first)
    with model.disable_adapter():
        assert torch.equal(case.logits(model), case.bare(tiny_model("llama").eval()))


@door("PEFT", "`merge_adapter`, `unmerge_adapter`, `merge_and_unload`")
def merged(case: Case) -> Cell | None:
    model = case.model()
    if not case.merges:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with refuses(MergeError, "its gates look at the layer's input"):
                merge()
        return refused(INPUT)
    if case.merge_task:
        with refuses(MergeError, "without a task, as every task has its own update"):
            model.merge_and_unload()
        return refused(MANY)
    expected = case.logits(model)
    model.merge_adapter()
    assert_close(case.logits(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert_close(case.bare(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)
    return None


@door("PEFT", "… for one task: `merge_and_unload(task=…)`")
def merged_for_a_task(case: Case) -> Cell | None:
    if not case.merges or not case.merge_task:
        return absent("its gates do not look at a task alone")
    model = case.model()
    expected = case.logits(model, **case.one_task)
    model.merge_adapter(task="cola")
    assert_close(case.logits(model, **case.one_task), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload(task="cola")
    assert_close(case.bare(merged), expected, atol=1e-5, rtol=1e-5)
    return None


@door("PEFT", "`add_weighted_adapter` with `cat`, for one task where tasks differ")
def weighted(case: Case) -> Cell | None:
    model = case.model()
    model.add_adapter("other", case.config(r=2) if case.variant.key != "moelora" else case.config())
    if not case.merges:
        with refuses(MergeError, "its gates look at the layer's input"):
            model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
        return refused(INPUT)
    expected, base = [], case.bare(tiny_model("llama").eval())
    for name in ("default", "other"):
        model.set_adapter(name)
        expected.append({layer.key: layer for layer in adapted_layers(model)})
    deltas = {}
    with use_task(model, "cola") if case.merge_task else torch.no_grad():
        for layer in adapted_layers(model):
            deltas[layer.key] = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", combination_type="cat", **case.merge_task)
    model.set_adapter("sum")
    for layer in adapted_layers(model):
        assert_close(layer.get_delta_weight("sum"), deltas[layer.key])
    assert not torch.equal(case.bare(model), base)
    with refuses(ConfigError, "combination_type 'svd'.*cat"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "again", combination_type="svd", **case.merge_task)
    return None


@door("PEFT", "`convert_to_lora`, `save_as_lora`, within `use_task` where tasks differ")
def converted(case: Case) -> Cell | None:
    model = case.model()
    if not case.merges:
        with refuses(TypeError, "do not support LoRA conversion"):
            convert_to_lora(model, rank=16)
        return refused(INPUT)
    rank = max(layer.core("default").p for layer in adapted_layers(model))
    with use_task(model, "cola") if case.merge_task else torch.no_grad():
        save_as_lora(case.folder, model, rank=rank)
    lora = PeftModel.from_pretrained(tiny_model("llama"), str(case.folder))
    assert_close(case.bare(lora), case.logits(model, **case.one_task or case.task), atol=1e-4, rtol=1e-4)
    return None


@door("PEFT", "`rank_pattern`, `alpha_pattern`, `use_rslora`, `init_lora_weights`")
def words(case: Case) -> None:
    model = case.model(rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 3}, lora_alpha=8, use_rslora=True)
    found = {layer.key.split(".")[-1]: layer.r["default"] for layer in adapted_layers(model)}
    assert found == {"q_proj": 8, "v_proj": 4, "down_proj": 4}
    fresh = case.model(init_weights=True, init_lora_weights="gaussian")
    assert not any(layer.lora_B["default"].weight.any() for layer in adapted_layers(fresh))


@door("PEFT", "`modules_to_save`, `trainable_token_indices`")
def beside(case: Case) -> None:
    model = case.model(modules_to_save=["lm_head"], trainable_token_indices=[3, 4])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(1.0)
    model.save_pretrained(case.folder)
    assert_close(case.logits(PeftModel.from_pretrained(tiny_model("llama"), str(case.folder))), case.logits(model))


@door("PEFT", "`bias`, `use_dora`, `lora_bias`, `layer_replication`, `target_parameters`")
def refused_words(case: Case) -> Cell:
    for options in ({"bias": "all"}, {"use_dora": True}, {"lora_bias": True}, {"layer_replication": [(0, 2)]}):
        with refuses(ConfigError, f"{case.variant.key}: {next(iter(options))} "):
            case.config(**options)
    with refuses(ConfigError, "dyads adapts linear layers only"):
        case.config(target_parameters=["experts.down_proj"])
    return refused("they change the base model, or a LoRA that is one product B A; each error says which")


@door("PEFT", "`create_loraplus_optimizer`")
def lora_plus(case: Case) -> None:
    model = case.model()
    groups = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert all(rates[id(p)] == 0.16 for n, p in model.named_parameters() if "lora_B" in n)
    assert all(rates[id(p)] == 0.01 for n, p in model.named_parameters() if "lora_A" in n)


@door("PEFT", "`get_model_status`, `get_layer_status`")
def status(case: Case) -> None:
    model = case.model()
    found = model.get_model_status()
    assert found.peft_types == {"default": f"DYADS_{case.variant.key.upper()}"}
    assert found.num_adapter_layers == len(model.get_layer_status()) == len(adapted_layers(model))


@door("PEFT", "`disable_input_dtype_casting`, `prepare_model_for_kbit_training`")
def helpers(case: Case) -> None:
    model = case.model(prepare_model_for_kbit_training(tiny_model("llama"), use_gradient_checkpointing=False))
    with disable_input_dtype_casting(model):
        case.logits(model)


@door("PEFT", "`rescale_adapter_scale`")
def rescaled(case: Case) -> Cell:
    with refuses(ValueError, "scal"), rescale_adapter_scale(case.model(), 0.5):
        pass
    return refused("PEFT rescales its own LoRA layers only")


@door("PEFT", "`get_peft_model(mixed=True)`")
def mixed(case: Case) -> Cell:
    with refuses(ValueError, "not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_model("llama"), case.config(), mixed=True)
    return refused("PEFT lists the types that it mixes")


@door("PEFT", "`hotswap_adapter`")
def hotswapped(case: Case) -> Cell:
    model = case.model()
    model.save_pretrained(case.folder)
    with refuses(ValueError, "Hotswapping only supports LORA"):
        hotswap_adapter(model, str(case.folder), "default")
    return refused("PEFT swaps its own LoRA only; `load_adapter` under another name, and `set_adapter`, do the same")


@door("PEFT", "`adapter_names=` for the rows of a batch")
def adapter_names(case: Case) -> Cell:
    with refuses(ConfigError, r"pass task=… instead"):
        case.model()(**case.inputs, **case.task, adapter_names=["default"] * 3)
    return refused("one adapter serves many tasks: rows choose a task, not an adapter")


@door("PEFT", "layers that are no `nn.Linear`: GPT-2's Conv1D, layers with `in_features`")
def other_layers(case: Case) -> None:
    gpt2 = get_peft_model(tiny_model("gpt2"), case.config(target_modules=TARGETS["gpt2"])).eval()
    case.logits(gpt2)

    class Packed(nn.Module):
        in_features = out_features = 6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    model = get_peft_model(nn.Sequential(Packed()), case.config(target_modules=["0"]))
    x = torch.ones(3, 6)
    assert not torch.equal(model(x, **case.task), 2 * x)
    with warnings.catch_warnings(), refuses(ConfigError, "Embedding is not supported"):
        case.model(target_modules=["embed_tokens"])

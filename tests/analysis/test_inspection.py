# SPDX-License-Identifier: Apache-2.0
"""Inspection of saved adapters, without a base model: sizes, modules, and the ranks that tasks chose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dyads.analysis.inspection import Inspection, inspect
from dyads.errors import RunError
from dyads.methods.more import MoRE
from dyads.runs.saved import SavedAdapter
from tiny import TARGETS, TASKS, Variant, tiny_model


def saved(folder: Path, variant: Variant, kind: str = "llama", **extra: Any) -> PeftModel:
    config = variant.config(**{"target_modules": TARGETS[kind], "init_weights": False, **extra})
    model = get_peft_model(tiny_model(kind), config)
    for module in model.modules():
        if isinstance(module, MoRE) and "embedding" in module._parameters:
            with torch.no_grad():
                module.embedding.mul_(300)  # so that tasks choose different ranks
    model.save_pretrained(folder)
    return model


def read(folder: Path) -> Inspection:
    return inspect(SavedAdapter.read(folder))


def test_every_method_shows_its_modules_and_what_it_trained(variant: Variant, tmp_path: Path) -> None:
    model = saved(tmp_path, variant, "gpt2")
    shown = read(tmp_path)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_core")
    }
    assert {m.name for m in shown.modules} == set(layers)
    assert [(m.in_features, m.out_features) for m in shown.modules] == [
        (layers[m.name].in_features, layers[m.name].out_features) for m in shown.modules
    ]
    assert shown.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shown.method == variant.key
    assert frozenset(shown.looks_at) == variant.looks_at
    assert shown.kinds == ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")


@pytest.mark.parametrize(
    "options",
    [(), (("embedding", "shared"), ("task_dim", 5)), (("selector", "subset"),), (("selector", "frozen_random"),)],
)
def test_the_ranks_are_those_that_the_model_uses(options: Any, tmp_path: Path) -> None:
    model = saved(tmp_path, Variant("more", (("r", 7), *options)))
    shown = read(tmp_path)
    cores = {name: module for name, module in model.named_modules() if isinstance(module, MoRE)}
    ranks = {m.name: list(m.ranks) for m in shown.modules}
    assert ranks == {
        n.removeprefix("base_model.model.").split(".lora_core")[0]: m.ranks().tolist() for n, m in cores.items()
    }
    assert {m.rank for m in shown.modules} == {7}
    for i in range(3):
        assert shown.used(i) == pytest.approx(sum(r[i] for r in ranks.values()) / (7 * len(ranks)))
    assert len(shown.agreement) == 3
    for pair in shown.agreement:
        i, j = (TASKS.index(task) for task in pair.tasks)
        if not options:
            assert pair.same == pytest.approx(sum(r[i] == r[j] for r in ranks.values()) / len(ranks))
        assert pair.apart == pytest.approx(sum(abs(r[i] - r[j]) for r in ranks.values()) / len(ranks))


def test_soft_gates_show_the_expected_rank_and_say_so(tmp_path: Path) -> None:
    saved(tmp_path, Variant("more", (("r", 7), ("selector", "soft"))))
    shown = read(tmp_path)
    assert all(1 < rank < 7 for module in shown.modules for rank in module.ranks)
    assert "soft gates give no rank weight 0: the ranks shown are expected ranks" in shown.notes


@pytest.mark.parametrize(
    ("variant", "note"),
    [
        (
            Variant("mode"),
            "the gates look at the layer's input: the experts and ranks in use differ from token to token",
        ),
        (Variant("task_mode"), "the gates look at the task and the layer's input: the experts"),
        (Variant("mtl_lora"), "every task weights all directions by its own gates and chooses no ranks"),
        (Variant("mode", (("num_experts", 1),)), "the gates look at nothing: `dyads export` writes the adapter"),
        (Variant("more"), "the gates look at the task alone: `dyads export --task NAME` writes a task"),
    ],
    ids=lambda v: v.id if isinstance(v, Variant) else "",
)
def test_a_note_says_what_can_be_read_and_what_cannot(variant: Variant, note: str, tmp_path: Path) -> None:
    saved(tmp_path, variant)
    shown = read(tmp_path)
    assert any(n.startswith(note) for n in shown.notes), shown.notes
    assert shown.chooses == (variant.key == "more")


def test_tasks_that_keep_some_experts_only_choose_too(tmp_path: Path) -> None:
    variant = Variant("molora", (("score", "task"), ("select", "top_k"), ("top_k", 2), ("tasks", list(TASKS))))
    saved(tmp_path, variant)
    assert all(module.ranks == (8, 8, 8) and module.rank == 12 for module in read(tmp_path).modules)


def test_the_config_is_shown_where_it_differs_from_the_methods_defaults(tmp_path: Path) -> None:
    saved(tmp_path, Variant("more", (("task_dim", 5),)), target_modules=["v_proj", "q_proj"])
    config = read(tmp_path).config
    assert {"r": 4, "task_dim": 5, "target_modules": ["q_proj", "v_proj"]}.items() <= config.items()
    assert not config.keys() & {"lora_dropout", "tasks", "peft_type", "inference_mode"}


def test_kinds_tell_an_encoders_modules_from_a_decoders(tmp_path: Path) -> None:
    saved(tmp_path, Variant("more"), "t5")
    shown = read(tmp_path)
    assert set(shown.kinds) == {
        f"{part}.{where}.{name}"
        for part, where in (("encoder", "SelfAttention"), ("decoder", "SelfAttention"))
        for name in "qv"
    } | {"EncDecAttention.q", "EncDecAttention.v"} | {
        f"{p}.DenseReluDense.{n}" for p in ("encoder", "decoder") for n in ("wi", "wo")
    }


def test_pefts_lora_is_shown_without_gates(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    shown = read(tmp_path)
    assert (shown.method, len(shown.modules), shown.looks_at, shown.chooses) == ("lora", 2, (), False)
    assert (shown.modules[0].in_features, shown.modules[0].out_features) == (32, 32)
    assert shown.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_whole_modules_beside_the_adapter_are_counted_and_named(tmp_path: Path) -> None:
    model = saved(tmp_path, Variant("more"), "bert", modules_to_save=["classifier"])
    shown = read(tmp_path)
    assert shown.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "66 of the parameters belong to whole modules saved beside the adapter" in shown.notes


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_folders_without_an_adapter_are_refused_with_what_they_hold(tmp_path: Path) -> None:
    saved(tmp_path / "runs" / "a", Variant("more"))
    for path, message in [
        (tmp_path / "none", "there is no folder '.*none'; give the folder of a run or of an adapter"),
        (tmp_path / "runs", r"holds neither a run \(config.yaml\) nor an adapter .*; in it there are: a$"),
    ]:
        with pytest.raises(RunError, match=message):
            SavedAdapter.read(path)
    (tmp_path / "runs" / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"has no adapter_model\.safetensors; adapters are read from safetensors only"):
        SavedAdapter.read(tmp_path / "runs" / "a")


def test_files_that_are_broken_or_from_two_adapters_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, Variant("more"))
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    kept, state = config.read_text(), load_file(weights)
    for change, message in [
        ({"r": 5}, r"do not fit its adapter_config\.json \(r is 5, and lora_A has at most 4 rows\)"),
        ({"r": 0}, "is truncated or no adapter: .*more: r must be a whole number"),
        ({"peft_type": "DYADS_NEW"}, "is of PEFT's type DYADS_NEW, which this version of dyads cannot read"),
    ]:
        config.write_text(json.dumps({**json.loads(kept), **change}))
        with pytest.raises(RunError, match=message):
            SavedAdapter.read(tmp_path)
    config.write_text(kept)
    save_file({key: value for key, value in state.items() if "layers.1.mlp.down_proj.lora_B" not in key}, weights)
    with pytest.raises(RunError, match=r"'model.layers.1.mlp.down_proj' .*\(it has lora_A, lora_core\)"):
        SavedAdapter.read(tmp_path)
    weights.write_bytes(b"half")
    with pytest.raises(RunError, match="is truncated or no adapter"):
        SavedAdapter.read(tmp_path)


def test_an_adapter_of_another_method_of_pefts_is_refused(tmp_path: Path, mlp: Callable[[], Any]) -> None:
    get_peft_model(mlp(), IA3Config(target_modules=["lin0"], feedforward_modules=[])).save_pretrained(tmp_path)
    with pytest.raises(
        RunError, match="is of PEFT's type IA3, which this version of dyads cannot read: it reads its own"
    ):
        SavedAdapter.read(tmp_path)

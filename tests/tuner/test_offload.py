# SPDX-License-Identifier: Apache-2.0
"""Parameters that are not there between forward passes: offloaded by accelerate, sharded by FSDP, or never loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from dyads.ops import plain
from dyads.tuner import DyadsLinear
from tiny import TARGETS, TASKS, VARIANTS, Variant, batch, task_of, tiny_model

PLACES = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
DISK = [
    PLACES | {"model.layers.0": "cpu", "model.layers.1": "disk"},
    PLACES | {"model.layers.0": "disk", "model.layers.1": "cpu"},
]
SHARED = Variant("more", (("embedding", "shared"), ("task_dim", 5), ("linear_scaling", "update")))
GROUPED = Variant("hmora", (("router_groups", (("q_proj", "v_proj"),)),))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


def adapted(variant: Variant) -> PeftModel:
    return get_peft_model(
        tiny_model("llama"), variant.config(target_modules=TARGETS["llama"], init_weights=False)
    ).eval()


def answers(model: nn.Module, variant: Variant) -> list[Tensor]:
    inputs = {**batch("llama"), **task_of(variant.config(), *TASKS)}
    with torch.no_grad():
        logits = model(**inputs).logits
    return [logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)]


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize(
    ("variant", "places"), list(zip(VARIANTS, cycle(DISK), strict=False)), ids=lambda v: getattr(v, "id", "")
)
def test_a_base_that_is_partly_on_disk_gives_the_same_logits(
    variant: Variant, places: dict[str, str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # PEFT 0.21 writes some files of an absolute path below the working directory
    model = adapted(variant)
    model.save_pretrained(tmp_path / "adapter")
    on_disk = AutoModelForCausalLM.from_pretrained(base, device_map=places, offload_folder=tmp_path / "base")
    offloaded = PeftModel.from_pretrained(
        on_disk,
        tmp_path / "adapter",
        device_map={f"base_model.model.{name}": place for name, place in places.items()},
        offload_folder=tmp_path / "all",
    )
    missing = [name for name, p in offloaded.named_parameters() if p.is_meta]
    assert any("lora_A" in name for name in missing)
    for ours, theirs in zip(answers(offloaded, variant), answers(model, variant), strict=True):
        assert torch.equal(ours, theirs)
    assert missing == [name for name, p in offloaded.named_parameters() if p.is_meta]


@pytest.mark.parametrize(
    "variant", [Variant("mode"), Variant("more"), SHARED, GROUPED, Variant("smora")], ids=lambda v: v.id
)
def test_a_model_whose_weights_come_for_every_call_gives_the_same_logits_and_merges(variant: Variant) -> None:
    model = adapted(variant)
    expected = answers(model, variant)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in offloaded.parameters())
    for ours, theirs in zip(answers(offloaded, variant), expected, strict=True):
        assert torch.equal(ours, theirs)
    if variant is SHARED:
        assert len(offloaded.base_model.gates_of_tasks()) == 6
    if not variant.looks_at & {"x", "h"}:
        merged = [m.merge_and_unload(task="cola") for m in (model, offloaded)]
        inputs = batch("llama")
        assert_close(merged[1](**inputs).logits, merged[0](**inputs).logits)


@pytest.mark.parametrize("which", ["lora_A", "lora_B", "router", "embedding"])
@pytest.mark.parametrize("path", ["training", "inference", "plain", "decoding"])
def test_a_weight_without_values_is_refused(which: str, path: str, mlp: Callable[[], nn.Module]) -> None:
    variant = Variant("task_mode")
    model = get_peft_model(mlp(), variant.config(target_modules=["lin0"])).train(path == "training")
    layer = next(m for m in model.modules() if isinstance(m, DyadsLinear))
    owner = getattr(layer, which)["default"] if which.startswith("lora") else layer.core("default")
    name = "weight" if which.startswith("lora") else which
    setattr(owner, name, nn.Parameter(getattr(owner, name).to("meta")))
    within = {"plain": plain, "decoding": model.base_model.routing.unchanged_weights}.get(path, nullcontext)
    with torch.set_grad_enabled(path == "training"), within(), pytest.raises(RuntimeError, match="on the meta device"):
        model(torch.randn(3, 6), task=list(TASKS))


def test_pefts_fsdp_policy_wraps_both_factors_and_they_are_read_by_calls(unlike: Variant) -> None:
    model = adapted(unlike)
    wraps = fsdp_auto_wrap_policy(model)
    wrapped = {name for name, module in model.named_modules() if wraps(module, recurse=False, nonwrapped_numel=0)}
    factors = {n for n, m in model.named_modules() if n.endswith(("lora_A.default", "lora_B.default"))}
    assert factors <= wrapped
    called: list[str] = []
    for name in factors:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    for module in model.modules():
        if isinstance(module, DyadsLinear):
            module.core("default").register_forward_hook(lambda *_: called.append("core"))
    model(**batch("llama"), **task_of(unlike.config(), *TASKS))
    assert set(called) == factors | {"core"}
    assert len(called) == 3 * len(factors) // 2


def test_files_with_the_gate_of_more_as_a_module_load(tmp_path: Path) -> None:
    variant = Variant("more")
    model = adapted(variant)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {key.replace("lora_core.gate_", "lora_core.gate."): value for key, value in load_file(file).items()}
    assert any(".gate.weight" in key for key in old)
    save_file(old, file, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    for ours, theirs in zip(answers(loaded, variant), answers(model, variant), strict=True):
        assert torch.equal(ours, theirs)

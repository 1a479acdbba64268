# SPDX-License-Identifier: Apache-2.0
"""A GGUF adapter has llama.cpp's names, shapes and order of rows, and only for models whose tensors are known."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

from dyads.cli import main
from dyads.errors import RunError
from dyads.export import export, export_all
from dyads.export.approximate import approximate
from dyads.export.gguf_adapter import ARCHITECTURES, GGUF_ADAPTER, gguf_layout, interleave
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import Manifest
from dyads.runs.saved import SavedAdapter, SavedLayer
from tiny import TARGETS, Variant, tiny_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

MORE = Variant("more", (("r", 6), ("lora_alpha", 9)))
AUTO: dict[str, Any] = {
    "llama": (AutoModelForCausalLM, "CAUSAL_LM"),
    "gpt2": (AutoModelForCausalLM, "CAUSAL_LM"),
    "t5": (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "bert": (AutoModelForSequenceClassification, "SEQ_CLS"),
}


def saved(folder: Path, kind: str = "llama", variant: Variant = MORE, **extra: Any) -> SavedAdapter:
    """An adapter with random weights on a tiny model in a folder."""
    tiny_model(kind).save_pretrained(folder / "base")
    auto, task_type = AUTO[kind]
    options = {"target_modules": TARGETS[kind], "task_type": task_type, "init_weights": False, **extra}
    model = get_peft_model(auto.from_pretrained(folder / "base"), variant.config(**options))
    model.save_pretrained(folder / "adapter")
    return SavedAdapter.read(folder / "adapter")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a folder's GGUF adapter, by gguf's own reader."""
    reader = gguf.GGUFReader(folder / GGUF_ADAPTER)
    settings = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return settings, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def lora_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder's LoRA by the module's path with `lora_A` or `lora_B`."""
    weights = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.").removesuffix(".weight"): value for key, value in weights.items()}


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows i and i + d/2 of every head side by side."""
    size = len(rows) // heads
    return rows[[h * size + i + half for h in range(heads) for i in range(size // 2) for half in (0, size // 2)]]


@pytest.mark.parametrize("trim", [False, True])
def test_a_llamas_adapter_has_its_names_with_rows_of_q_and_k_interleaved(trim: bool, tmp_path: Path) -> None:
    adapter = saved(tmp_path, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    written = export(adapter, tmp_path / "out", task="cola", trim=trim, gguf=gguf_layout(adapter, None))
    settings, tensors = read(written.path)
    assert settings == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": written.rank,
        "adapter.lora.task_name": "cola",
    }
    ours = lora_weights(written.path)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    assert sorted(tensors) == sorted(
        f"blk.{i}.{n}.weight.lora_{x}" for i in (0, 1) for n in names.values() for x in "ab"
    )
    for i in (0, 1):
        for module, name in names.items():
            down, up = (tensors[f"blk.{i}.{name}.weight.lora_{x}"] for x in "ab")
            assert len(down) == up.shape[1] == written.rank, "alpha is one number for all layers"
            A, B = (ours[f"model.layers.{i}.{module}.lora_{x}"] for x in "AB")
            heads = {"attn_q": 4, "attn_k": 2}.get(name)
            assert_close(up @ down, B @ A if heads is None else neighbours(B @ A, heads), rtol=0, atol=1e-6)
            if not trim:
                assert torch.equal(down, A)
    assert Manifest.of(written.path).damage(exact=True) is None  # type: ignore[union-attr]


def test_interleaved_rows_rotated_in_neighbouring_pairs_attend_as_transformers_does() -> None:
    heads, size, hidden = 3, 8, 5
    q, k = torch.randn(2, heads * size, hidden, dtype=torch.float64)
    x = torch.randn(4, hidden, dtype=torch.float64)
    angle = torch.arange(4.0, dtype=torch.float64)[:, None] * 10 ** -torch.linspace(0, 2, size // 2).double()

    def rotated(w: Tensor) -> Tensor:
        """llama.cpp's rotation, of the pairs (2i, 2i + 1)."""
        y = (x @ interleave(w, heads).T).view(4, heads, size // 2, 2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.stack([y[..., 0] * cos - y[..., 1] * sin, y[..., 0] * sin + y[..., 1] * cos], -1).flatten(2)

    both = [(x @ w.T).view(1, 4, heads, size).transpose(1, 2) for w in (q, k)]
    twice = torch.cat([angle, angle], -1)[None]
    Q, K = apply_rotary_pos_emb(*both, twice.cos(), twice.sin())
    assert_close(torch.einsum("thd,shd->hts", rotated(q), rotated(k)), (Q @ K.mT)[0])


def test_gpt2_keeps_its_rows_although_its_weights_are_stored_as_in_by_out(tmp_path: Path) -> None:
    adapter = saved(tmp_path, "gpt2")
    written = export(adapter, tmp_path / "out", task="rte", gguf=gguf_layout(adapter, None))
    settings, tensors = read(written.path)
    assert settings["general.architecture"] == "gpt2"
    ours = lora_weights(written.path)
    for module, name in {
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }.items():
        for x in "ab":
            there = tensors[f"blk.1.{name}.weight.lora_{x}"]
            assert torch.equal(there, ours[f"transformer.h.1.{module}.lora_{x.upper()}"])


def test_every_task_has_a_gguf_adapter_of_one_rank_and_a_command_serves_them(tmp_path: Path) -> None:
    adapter = saved(tmp_path, tasks=["rte", "a, b"])
    loras = export_all(adapter, tmp_path / "all", gguf=gguf_layout(adapter, None))
    found = [read(lora.path) for lora in loras]
    assert [settings["adapter.lora.task_name"] for settings, _ in found] == ["rte", "a, b"]
    assert len({settings["adapter.lora.alpha"] for settings, _ in found}) == 1
    commands = [
        [shlex.split(line) for line in card.split("```sh\n")[1].split("```")[0].splitlines()]
        for card in ((folder / "README.md").read_text() for folder in (tmp_path / "all", loras[0].path))
    ]
    start = ["llama-server", "-m", "path/to/base.gguf"]
    several = ["--lora-init-without-apply", "--lora", "rte/adapter.gguf", "--lora", '"a, b/adapter.gguf"']
    assert commands[0][-1] == [*start, *several]
    assert commands[1][-1] == [*start, "--lora", "adapter.gguf"]


def test_an_approximate_lora_has_a_gguf_adapter_too(trained: Callable[..., RunFolder], tmp_path: Path) -> None:
    run, data = trained("mode"), tmp_path / "data.jsonl"
    row = '{"task": "has_animal", "input": "fox stone lamp %d", "output": "yes"}\n'
    data.write_text("".join(row % i for i in range(12)))
    (written,), _, _ = approximate(run, data, tmp_path / "out", rank=3, gguf=True, verifies=False)
    settings, tensors = read(tmp_path / "out")
    assert settings["adapter.lora.alpha"] == written.rank == 3  # type: ignore[union-attr]
    ours = lora_weights(tmp_path / "out")
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_b"], ours["model.layers.1.mlp.down_proj.lora_B"])
    q = neighbours(ours["model.layers.0.self_attn.q_proj.lora_B"], 4)
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_b"], q)


SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def of_architecture(folder: Path, model_type: str, **options: Any) -> tuple[SavedAdapter, list[str]]:
    """An adapter of every linear layer of a tiny model, without weights, and the layers' names."""
    config = AutoConfig.for_model(
        model_type, **{**SIZES, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}, **options
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config.save_pretrained(folder)
    linear = [
        SavedLayer(name, *(module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]), 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
    ]
    lora = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(folder))
    return SavedAdapter(folder, lora, "more", tuple(linear), {}), [layer.module for layer in linear]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_linear_layer_of_a_known_architecture_has_a_tensor_of_its_own(model_type: str, tmp_path: Path) -> None:
    adapter, modules = of_architecture(tmp_path, model_type)
    layout = gguf_layout(adapter, None)
    assert list(layout.names) == modules
    assert len(set(layout.names.values())) == len(modules)
    assert all(re.fullmatch(r"blk\.[01]\.(attn|ffn)_\w+\.weight", name) for name in layout.names.values())
    permuted = {name.rpartition(".")[2] for name in layout.heads}
    assert permuted == ({"q_proj", "k_proj"} if ARCHITECTURES[model_type][1] else set())


def test_architectures_whose_weights_llama_cpp_stores_in_another_form_are_refused(tmp_path: Path) -> None:
    for model_type in ("gpt_neox", "bloom", "falcon", "mixtral", "opt"):
        adapter, _ = of_architecture(tmp_path / model_type, model_type)
        with pytest.raises(
            RunError, match=rf"architecture '{model_type}' .*; it knows cohere, .*Leave --gguf out, or wr"
        ):
            gguf_layout(adapter, None)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {}, r"--gguf is for decoders that generate text, and '.*/base' is an encoder; leave --gguf out"),
        ("t5", {}, r"'.*/base' is an encoder-decoder; leave"),
        ("llama", {"task_type": "SEQ_CLS"}, r"'.*/base' is used for SEQ_CLS; leave --gguf out"),
        ("llama", {"modules_to_save": ["lm_head"]}, r"has other weights too \(lm_head.weight\); leave --gguf out"),
    ],
)
def test_heads_encoders_and_other_weights_are_refused(
    kind: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=message):
        gguf_layout(saved(tmp_path, kind, **options), None)


def test_modules_that_are_no_tensors_of_the_base_model_are_refused(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "base", tie_word_embeddings=True)
    config.save_pretrained(tmp_path / "base")

    def with_layer(module: str, outputs: int) -> SavedAdapter:
        layer = dataclasses.replace(adapter.layers[0], module=module, out_features=outputs)
        return dataclasses.replace(adapter, layers=(layer,))

    for module in ("lm_head", "model.layers.2.self_attn.q_proj", "model.layers.0.self_attn.qqq"):
        with pytest.raises(
            RunError, match=f"LoRA of '{module}': llama.cpp has no such tensor of its own in .* 'llama'"
        ):
            gguf_layout(with_layer(module, 32), None)
    q = "model.layers.0.self_attn.q_proj"
    assert gguf_layout(with_layer(q, 32), None).heads == {q: 4}
    with pytest.raises(RunError, match=r"q_proj' has 48 outputs, and the base model's config 4 heads of 8"):
        gguf_layout(with_layer(q, 48), None)
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path / "base")
    assert gguf_layout(with_layer("lm_head", 61), None).names == {"lm_head": "output.weight"}


def test_pefts_own_lora_is_left_to_llama_cpps_script(tmp_path: Path) -> None:
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"is PEFT's own LoRA: leave --gguf out, .* convert_lora_to_gguf\.py"):
        gguf_layout(SavedAdapter.read(tmp_path), None)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(RunError, match="--gguf needs the package gguf, which is not installed: run `pip install gguf`"):
        gguf_layout(saved(tmp_path), None)


def test_a_package_too_old_for_the_architecture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf.MODEL_ARCH_NAMES", {})
    with pytest.raises(RunError, match=r"does not know llama\.cpp's architecture 'llama': run `pip install -U gguf`"):
        gguf_layout(saved(tmp_path), None)


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_the_command_writes_it_beside_the_files_of_peft(trained: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = trained("more")
    result = command(run.path, "--task", "has_animal", "--gguf", "--no-verify", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0].endswith(" in 6 modules, and adapter.gguf")
    assert read(tmp_path / "out")[0]["adapter.lora.task_name"] == "has_animal"
    base = AutoModelForCausalLM.from_pretrained(run.recipe().model.name)
    assert isinstance(PeftModel.from_pretrained(base, tmp_path / "out"), PeftModel), "PEFT ignores the file"
    merged = command(run.path, "--task", "has_animal", "--gguf", "--merge", "--out", tmp_path / "merged")
    assert (merged.exit_code, "--gguf is for LoRAs, and --merge writes none" in merged.output) == (2, True)

# SPDX-License-Identifier: Apache-2.0
"""A merged checkpoint answers as the adapter does, loads by transformers alone, and keeps the base model's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from dyads.errors import MergeError, RoutingError, RunError
from dyads.export import merged as merged_module
from dyads.export.merged import merge, merge_all
from dyads.export.verify import base_of, float_model, model_logits, prompts_for, prompts_of, verify
from dyads.recipe.spec import QuantizationSpec
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import Manifest
from dyads.runs.saved import SavedAdapter
from dyads.tuner import use_task
from tiny import TARGETS, Variant, adapted_layers, batch

MORE = Variant("more", (("r", 6), ("lora_alpha", 9)))


@pytest.fixture
def saved(tmp_path: Path, llama: Path) -> Callable[..., tuple[PeftModel, SavedAdapter]]:
    """Makes an adapter with random weights on a tiny Llama in a folder, and reads it back."""

    def make(config: Any, dtype: torch.dtype = torch.float32, tied: bool = False) -> tuple[PeftModel, SavedAdapter]:
        base = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
        if tied:
            base.config.tie_word_embeddings = True
            base.lm_head.weight = base.model.embed_tokens.weight
        base.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=2, pad_token_id=0)
        base.save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = get_peft_model(base, config).eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(value, std=0.1)
        model.save_pretrained(tmp_path / "adapter")
        return model, SavedAdapter.read(tmp_path / "adapter")

    return make


def config(variant: Variant = MORE, **options: Any) -> Any:
    given = {"target_modules": TARGETS["llama"], "task_type": "CAUSAL_LM", "init_weights": False}
    return variant.config(**(given | options))


def test_a_checkpoint_per_task_answers_as_the_adapter_does(saved: Callable[..., Any], tmp_path: Path) -> None:
    model, adapter = saved(config())
    written = merge_all(adapter, None, tmp_path / "out")
    assert [(one.task, one.dtype) for one in written] == [(task, "float32") for task in adapter.task_names]
    with torch.no_grad():
        for one in written:
            merged = AutoModelForCausalLM.from_pretrained(one.path).eval()
            assert (
                merged.num_parameters()
                == one.parameters
                == model.get_base_model().num_parameters() - (adapter.parameters)
            )
            assert_close(
                merged(**batch("llama")).logits,
                model(**batch("llama"), task=one.task).logits,
                atol=1e-5,  # fp32: W + ΔW is rounded once
                rtol=1e-5,
            )


def test_a_checkpoint_keeps_tokenizer_generation_config_and_dtype(saved: Callable[..., Any], tmp_path: Path) -> None:
    _, adapter = saved(config(), torch.bfloat16)
    one = merge(adapter, None, tmp_path / "out", task="cola")
    assert one.dtype == "bfloat16"
    assert sorted(p.name for p in one.path.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert {value.dtype for value in load_file(one.path / "model.safetensors").values()} == {torch.bfloat16}
    assert GenerationConfig.from_pretrained(one.path).temperature == 0.7
    first, second = (AutoTokenizer.from_pretrained(p) for p in (tmp_path / "base", one.path))
    assert first("the fox")["input_ids"] == second("the fox")["input_ids"]
    assert Manifest.of(one.path).damage(exact=True) is None  # type: ignore[union-attr]
    card = (one.path / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| base model | `base`, a folder that is not on the hub |" in card
    assert "| task | cola |" in card
    assert "import dyads" not in card


def test_pefts_own_lora_merges_too(saved: Callable[..., Any], tmp_path: Path) -> None:
    model, adapter = saved(LoraConfig(r=3, target_modules=TARGETS["llama"], task_type="CAUSAL_LM"))
    one = merge(adapter, None, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(one.path).eval()
    with torch.no_grad():
        assert_close(merged(**batch("llama")).logits, model(**batch("llama")).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(RoutingError, match=r"cannot merge .* \(lora\) for a task: its gates do not look at it"):
        merge(adapter, None, tmp_path / "task", task="rte")
    with pytest.raises(RoutingError, match="leave --task and --all-tasks out"):
        merge_all(adapter, None, tmp_path / "tasks")


def test_a_base_model_that_cannot_be_loaded_is_no_error_of_writing(saved: Callable[..., Any], tmp_path: Path) -> None:
    _, adapter = saved(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    (tmp_path / "base" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(RunError, match=r"cannot merge the adapter in .*: .*header"):
        merge(adapter, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_is_rounded_once(saved: Callable[..., Any], tmp_path: Path) -> None:
    model, adapter = saved(config(), torch.bfloat16)
    written = load_file(merge(adapter, None, tmp_path / "out", task="rte").path / "model.safetensors")
    layers = adapted_layers(model)
    assert len(layers) > 1
    with use_task(model, "rte"):
        for layer in layers:
            wanted = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
            assert torch.equal(written[f"{layer.key}.weight"], wanted.bfloat16())


@pytest.mark.parametrize("of", [config(target_modules=["lm_head"]), LoraConfig(target_modules=["lm_head"])])
@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers):UserWarning")
def test_a_head_that_is_tied_to_the_embeddings_is_refused(of: Any, saved: Callable[..., Any], tmp_path: Path) -> None:
    _, adapter = saved(of, tied=True)
    with pytest.raises(MergeError, match=r"'lm_head': its weight is shared \(tied\) with another module"):
        merge(adapter, None, tmp_path / "out", task="rte" if adapter.task_names else None)
    assert not (tmp_path / "out").exists()


def test_a_sum_that_is_not_finite_is_refused(saved: Callable[..., Any], tmp_path: Path) -> None:
    model, adapter = saved(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = layer.lora_B["default"].weight[0, 0] = 1e20
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RunError, match=r"the merged weight of 'model\.layers\.1\.self_attn\.q_proj' is not finite"):
        merge(SavedAdapter.read(adapter.path), None, tmp_path / "out")


def test_a_lora_on_parameters_of_experts_merges_too() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=61, **sizes, num_key_value_heads=2, num_local_experts=2))
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = {"target_modules": ["q_proj"], "target_parameters": experts, "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(r=2, **options)).eval()
    with torch.no_grad():
        expected = model(**batch("llama")).logits
        assert_close(merged_module._merged(model)(**batch("llama")).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "more"])
def test_an_encoder_is_merged_with_its_heads_beside_it(
    method: str, trained: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = trained(method, "bert")
    adapter = SavedAdapter.read(run.path)
    task = "mnli" if adapter.task_names else None
    one = merge(adapter, run, tmp_path / "out", task=task)
    assert {"task_heads.json", "task_heads.safetensors"} <= {p.name for p in one.path.iterdir()}
    ids = torch.tensor([[1, 5, 7, 2]])
    base = base_of(adapter, run)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(one.path).eval()(input_ids=ids).last_hidden_state[0]
    assert_close(hidden, model_logits(float_model(adapter, run, base), [ids], task)[0], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_merged_is_refused_before_anything_is_written(saved: Callable[..., Any], tmp_path: Path) -> None:
    _, adapter = saved(config(Variant("mode")))
    with pytest.raises(MergeError, match=r"\(mode\): its gates look at the layer's input"):
        merge(adapter, None, tmp_path / "out")
    _, adapter = saved(config())
    with pytest.raises(RoutingError, match="without a task: every task has its own update"):
        merge(adapter, None, tmp_path / "out")
    with pytest.raises(RunError, match="is not empty; choose another --out"):
        merge(adapter, None, tmp_path / "base", task="rte")
    assert not (tmp_path / "out").exists()


# --- verification -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("reload_in_fork")
def test_a_folder_of_another_task_does_not_pass_for_the_adapter(saved: Callable[..., Any], tmp_path: Path) -> None:
    _, adapter = saved(config(Variant("moelora")))
    merge(adapter, None, tmp_path / "rte", task="rte")
    with pytest.raises(
        RunError, match=r"the export of task 'cola' is not the adapter: .* and 1e-03 is allowed; nothing"
    ):
        verify({"cola": tmp_path / "rte"}, adapter, None, merged=True)


@pytest.mark.slow
def test_the_process_that_reloads_cannot_import_dyads(saved: Callable[..., Any]) -> None:
    _, adapter = saved(config(Variant("mode")))
    with pytest.raises(RunError, match=r"PEFT cannot load it without dyads: KeyError: 'DYADS_MODE'"):
        verify({None: adapter.path}, adapter, None)


def test_prompts_are_those_that_the_run_has_predictions_for(trained: Callable[..., RunFolder]) -> None:
    run = trained("more")
    own = {row["prompt"] for row in run.predictions("has_animal")}
    assert set(prompts_of(run, "has_animal")) <= own
    every = prompts_of(run, None)
    assert len(set(every)) == 4
    assert not set(every) <= own
    assert len(prompts_of(None, None)) == 4
    for tasks, each in ((16, 4), (17, 3), (40, 1), (700, 1)):
        assert {len(texts) for texts in prompts_for(None, [str(i) for i in range(tasks)]).values()} == {each}


def test_a_run_on_a_quantised_base_is_compared_in_float32(
    trained: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("more")
    recipe, adapter = run.recipe(), SavedAdapter.read(run.path)
    spec = recipe.model.model_copy(
        update={"dtype": "bfloat16", "quantization": QuantizationSpec(quant_method="quanto", weights="int8")}
    )
    monkeypatch.setattr(RunFolder, "recipe", lambda self: recipe.model_copy(update={"model": spec}))
    model = float_model(adapter, run, base_of(adapter, run))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

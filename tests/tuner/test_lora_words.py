# SPDX-License-Identifier: Apache-2.0
"""Fields of PEFT's LoraConfig: each works as for LoRA, or is refused by name with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from dyads import MoDEConfig, MoREConfig, add_task
from dyads.errors import ConfigError
from dyads.export import export
from dyads.runs.saved import SavedAdapter
from tiny import TARGETS, TASKS, Variant, adapted_layers, batch, task_of, tiny_model

RANKS = {"q_proj": 2, r"model\.layers\.1\.mlp\.down_proj": 8}


def model_of(variant: Variant, **options: Any) -> PeftModel:
    options = {"target_modules": TARGETS["llama"], "init_weights": False, **options}
    return get_peft_model(tiny_model("llama"), variant.config(**options)).eval()


def logits(model: Any, variant: Variant) -> Tensor:
    with torch.no_grad():
        return model(**batch("llama"), **task_of(variant.config(), *TASKS)).logits


def test_ranks_and_alphas_of_single_layers_are_those_of_lora(unlike: Variant, tmp_path: Path) -> None:
    patterns = {"rank_pattern": RANKS, "alpha_pattern": {"v_proj": 3}, "lora_alpha": 8}
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=TARGETS["llama"], **patterns))
    model = model_of(unlike, **patterns)
    for layer in adapted_layers(model):
        theirs = lora.base_model.model.get_submodule(layer.key)
        assert (
            layer.r["default"]
            == theirs.r["default"]
            == {"down_proj": 8, "q_proj": 2}.get(
                layer.key.split(".")[-1] if "layers.1" in layer.key or "q_proj" in layer.key else "", 4
            )
        )
        if unlike.key != "smora":  # whose scale is by top_k
            assert layer.scaling["default"] == theirs.scaling["default"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert torch.equal(logits(loaded, unlike), logits(model, unlike))
    saved = SavedAdapter.read(tmp_path)
    assert {layer.module: layer.core.p for layer in saved.layers} == {
        layer.key: layer.core("default").p for layer in adapted_layers(model)
    }
    if unlike.key == "more":
        add_task(model, "fourth")
        with torch.no_grad():
            model(**batch("llama"), task=["fourth", "rte", "cola"])


def test_an_exported_lora_has_the_scale_of_each_layer(tmp_path: Path) -> None:
    model = model_of(Variant("more"), rank_pattern=RANKS, alpha_pattern={"v_proj": 3}, lora_alpha=8)
    model.save_pretrained(tmp_path / "adapter")
    export(SavedAdapter.read(tmp_path / "adapter"), tmp_path / "lora", task="cola")
    lora = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "lora"))
    with torch.no_grad():
        assert_close(lora(**batch("llama")).logits, model(**batch("llama"), task="cola").logits, atol=1e-5, rtol=1e-5)


def test_a_pattern_that_a_method_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"group_size must divide r = 3"):
        model_of(Variant("mode", (("group_size", 2),)), rank_pattern={"q_proj": 3})
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match any targeted module"):
        model_of(Variant("mode"), rank_pattern={"k_proj": 3})


@pytest.mark.parametrize("key", ["mode", "poly", "smora"])
def test_rslora_scales_by_the_root_of_the_rank(key: str) -> None:
    config = Variant(key).config(lora_alpha=6, use_rslora=True)
    assert config.scaling == 6 / (config.top_k if key == "smora" else config.r) ** 0.5
    assert config.for_layer("q_proj").scaling == config.scaling
    with pytest.raises(ConfigError, match=r"use_rslora scales by lora_alpha / √r, and lora_alpha is None"):
        Variant(key).config(lora_alpha=None, use_rslora=True)


def test_init_lora_weights_is_pefts_name_for_the_start() -> None:
    fresh = model_of(Variant("mode"), init_weights=True, init_lora_weights=True)
    assert all(not layer.lora_B["default"].weight.any() for layer in adapted_layers(fresh))
    random = model_of(Variant("mode"), init_weights=True, init_lora_weights=False)
    assert all(layer.lora_B["default"].weight.all() for layer in adapted_layers(random))
    config = MoDEConfig(r=16, init_lora_weights="gaussian", target_modules=["q_proj"])
    gaussian = get_peft_model(tiny_model("llama"), config)
    deviation = torch.stack([layer.lora_A["default"].weight for layer in adapted_layers(gaussian)]).std()
    assert_close(deviation, torch.tensor(1 / 16), atol=0.004, rtol=0)
    assert all(not layer.lora_B["default"].weight.any() for layer in adapted_layers(gaussian))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be true, false or gaussian: other starts factorise"),
        ({"init_lora_weights": "olora"}, "init_lora_weights must be"),
        ({"bias": "all"}, "bias trains biases of the base model, .*modules_to_save.*got 'all'"),
        ({"bias": "lora_only"}, "bias trains biases of the base model"),
        ({"use_dora": True}, "use_dora rescales each row of the base weight"),
        ({"lora_bias": True}, "lora_bias would give B a bias that no gate weighs"),
        ({"layer_replication": [(0, 2)]}, "layer_replication changes the base model"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters names packed parameters"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map names of layers"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    ],
)
def test_words_that_do_not_apply_are_refused_with_the_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"mode: {message}"):
        MoDEConfig(**options)


def test_a_config_written_for_lora_is_accepted() -> None:
    usual = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM"}
    more = {"use_dora": False, "target_parameters": None, "layer_replication": None, "init_lora_weights": True}
    config = MoDEConfig(**usual, **more, target_modules=["q_proj"])
    assert config.scaling == LoraConfig(**usual).lora_alpha / LoraConfig(**usual).r


def test_single_tokens_train_and_are_saved_beside_the_adapter(unlike: Variant, tmp_path: Path) -> None:
    model = model_of(unlike, trainable_token_indices=[3, 5]).train()
    inputs = {**batch("llama"), **task_of(unlike.config(), *TASKS)}
    inputs["input_ids"][:, 0], inputs["input_ids"][:, 1] = 3, 5
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    deltas = [p for n, p in model.named_parameters() if "trainable_tokens" in n and p.requires_grad]
    assert [tuple(p.shape) for p in deltas] == [(2, 32)]
    assert deltas[0].grad.abs().min(-1).values.gt(0).any()
    with torch.no_grad():
        deltas[0].add_(1.0)
    expected = logits(model.eval(), unlike)
    model.save_pretrained(tmp_path)
    assert any("token_adapter" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert_close(logits(loaded, unlike), expected)


def test_tied_embeddings_stay_tied_on_request(tmp_path: Path) -> None:
    def tied() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=61, pad_token_id=0, **sizes, tie_word_embeddings=True))

    config = MoDEConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True, init_weights=False
    )
    model = get_peft_model(tied(), config).eval()
    embedded = model.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head is embedded or head.data_ptr() == embedded.data_ptr()
    with torch.no_grad():
        embedded.add_(torch.randn_like(embedded))
        expected = model(**batch("llama")).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tied(), str(tmp_path))
    with torch.no_grad():
        assert_close(loaded(**batch("llama")).logits, expected)


def test_input_dtype_casting_may_be_switched_off_and_changes_nothing(unlike: Variant) -> None:
    model = model_of(unlike)
    expected = logits(model, unlike)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model, unlike), expected)


def test_ranks_of_layers_that_share_a_table() -> None:
    config = MoREConfig(
        r=4, tasks=list(TASKS), embedding="shared", task_dim=5, rank_pattern=RANKS, target_modules=TARGETS["llama"]
    )
    model = get_peft_model(tiny_model("llama"), config)
    model(**batch("llama"), task=list(TASKS), labels=batch("llama")["input_ids"]).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []

# SPDX-License-Identifier: Apache-2.0
"""Loading of base models: frozen, with greedy decoding; one that cannot be loaded is refused with the reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dyads.errors import ConfigError, RunError
from dyads.models.load import load_model, load_tokenizer, model_config
from dyads.recipe.spec import ModelSpec


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_model_is_frozen_and_has_the_dtype_of_the_recipe(dtype: str, llama: Path) -> None:
    model = load_model(ModelSpec(name=str(llama), dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_the_kind_of_model_is_read_off_its_config(llama: Path, t5: Path) -> None:
    assert type(load_model(ModelSpec(name=str(t5)))).__name__ == "T5ForConditionalGeneration"
    assert type(load_model(ModelSpec(name=str(llama)))).__name__ == "LlamaForCausalLM"
    with pytest.raises(RunError, match="could not be loaded: Unrecognized configuration class"):
        load_model(ModelSpec(name=str(llama), kind="seq2seq"))


def test_the_implementation_of_attention_is_passed_on_and_grouped_only_where_it_is_right(llama: Path, t5: Path) -> None:
    grouped = load_model(ModelSpec(name=str(llama), attention="grouped"))
    eager = load_model(ModelSpec(name=str(llama), attention="eager"))
    ids = torch.randint(3, 20, (2, 5))
    assert (grouped.config._attn_implementation, eager.config._attn_implementation) == ("grouped", "eager")
    torch.testing.assert_close(grouped(input_ids=ids).logits, eager(input_ids=ids).logits)
    with pytest.raises(
        ConfigError, match=r"'grouped' is not known to be right for model .* \(t5\): leave it out, or use"
    ):
        load_model(ModelSpec(name=str(t5), attention="grouped"))


def test_generation_settings_of_a_checkpoint_do_not_leak_into_scoring(
    other_llama: Callable[..., Path],
) -> None:
    path = other_llama()
    settings = {"do_sample": True, "temperature": 0.3, "repetition_penalty": 1.5, "num_beams": 4, "min_length": 9}
    settings |= {"forced_bos_token_id": 5, "forced_eos_token_id": 2}  # BART's
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps({**settings, **ids}))
    generation = load_model(ModelSpec(name=str(path))).generation_config
    assert not any(getattr(generation, key) for key in settings)
    assert {key: getattr(generation, key) for key in ids} == ids


def test_a_tokenizer_without_padding_pads_with_its_end(words: Any, tmp_path: Path, llama: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("pad_token")
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder/here"])
def test_a_model_that_cannot_be_loaded_is_named_with_what_can(name: str) -> None:
    with pytest.raises(RunError, match=f"model '{name}' could not be loaded: .*one of: packaged:smollm2-135m"):
        load_model(ModelSpec(name=name))
    with pytest.raises(RunError, match=f"model '{name}' could not be loaded"):
        load_tokenizer(name)


@pytest.mark.parametrize("name", ["./no-such-model", "../no/model", "/no/model", "~/no-model", "C:\\no\\model"])
def test_a_folder_that_is_not_there_is_no_wrong_hub_id(name: str) -> None:
    with pytest.raises(
        RunError, match=rf"model '{re.escape(name)}' could not be loaded: there is no such folder – give"
    ):
        load_model(ModelSpec(name=name))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_truncated_model_is_refused(file: str, other_llama: Callable[..., Path]) -> None:
    path = other_llama()
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=re.escape(f"model '{path}' could not be loaded: ")):
        load_model(ModelSpec(name=str(path)))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=re.escape(f"model '{tmp_path}' could not be loaded: ")):
        load_model(ModelSpec(name=str(tmp_path)))


def test_python_files_of_a_model_are_not_run(llama: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(llama, folder)
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    (folder / "hostile.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    automatic = {"AutoConfig": "hostile.C", "AutoModelForCausalLM": "hostile.M"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of", "auto_map": automatic}))
    with pytest.raises(RunError, match="could not be loaded"):
        load_model(ModelSpec(name=str(folder)))
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": automatic}))
    assert load_model(ModelSpec(name=str(folder))).config.model_type == "llama", "transformers' own code is used"
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_implementation": "somebody/a-kernel"}, "names an attention kernel, code that would be downloaded"),
        ({"num_hidden_layers": 10**9}, "more than 10,000 layers"),
        ({"num_hidden_layers": [1]}, ""),
        ({"model_type": "\x1b[31m" + "a b " * 999}, ""),
    ],
)
def test_configs_that_would_load_code_or_never_end_are_refused(
    changes: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(RunError, match=f"could not be loaded: .*{message}") as refused:
        model_config(str(tmp_path))
    assert len(str(refused.value)) < 800

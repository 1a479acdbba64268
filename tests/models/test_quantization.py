# SPDX-License-Identifier: Apache-2.0
"""Quantised base models in recipes: refusals before anything is loaded, and runs that train, score and export."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from dyads.errors import ConfigError
from dyads.export import export
from dyads.models import quantization
from dyads.models.load import load_model
from dyads.recipe.load import parse_recipe
from dyads.recipe.spec import Recipe
from dyads.runs.adapter import load_adapter
from dyads.runs.saved import SavedAdapter
from dyads.scoring.evaluate import evaluate
from dyads.training.train import train
from dyads.tuner import use_task

Tiny = Callable[..., Recipe]
INT8 = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
OPTIONS = {"Int8WeightOnlyConfig": {"set_inductor_config": False}}
QUANTO = {"quant_method": "quanto", "weights": "int8"}


def form(given: dict[str, Any], *more: Any, name: str | None = None) -> Any:
    """A parameter; quanto is in the environment of all tests, the other packages in that of `quantised` tests."""
    marks = [] if given.get("quant_method") == "quanto" else [pytest.mark.quantised]
    return pytest.param(given, *more, id=name, marks=marks)


@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize(
    "form",
    [
        form({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}, name="4 bit"),
        form({"quant_method": "bitsandbytes", "load_in_8bit": True}, name="8 bit"),
        form(INT8, name="torchao"),
        form({**INT8, "quant_type": OPTIONS}, name="torchao with options"),
        form(QUANTO, name="quanto"),
    ],
)
def test_a_run_over_a_quantised_model_trains_scores_and_exports(
    form: dict[str, Any], tiny: Tiny, other_llama: Callable[..., Path], tmp_path: Path
) -> None:
    base_model = other_llama(hidden_size=64, intermediate_size=128)  # blocks of 4 bit have 64 inputs
    recipe = tiny("more", base_model, model_={"quantization": form}, train={"learning_rate": 0.05})
    folder = train(recipe, tmp_path / "run")
    assert parse_recipe((folder.path / "config.yaml").read_text(), "config.yaml") == recipe
    scores, answers = folder.scores()["scores"], folder.predictions("first_word")
    assert evaluate(folder)["scores"] == scores
    assert folder.predictions("first_word") == answers

    model = load_adapter(load_model(recipe.model), folder)
    whole = load_model(recipe.model.model_copy(update={"quantization": None}))
    weights = [m.get_base_layer().weight for m in model.modules() if hasattr(m, "lora_core")]
    assert weights
    assert all(type(w) is not torch.nn.Parameter or not w.dtype.is_floating_point for w in weights)
    ids = torch.randint(4, whole.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), use_task(model, "first_word"):
        ours = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        assert not torch.equal(base, whole(ids).logits), "the weights are rounded"
        assert torch.corrcoef(torch.stack([base.flatten(), whole(ids).logits.flatten()]))[0, 1] > 0.9
        assert (ours - base).abs().max() > 0.1, "the adapter has learned"
    exported = export(SavedAdapter.read(folder.path), tmp_path / "lora", task="first_word")
    plain = PeftModel.from_pretrained(load_model(recipe.model), str(exported.path)).eval()
    with torch.no_grad():
        assert_close(plain(ids).logits, ours, rtol=1e-3, atol=1e-3)


RECIPE = "name: a\nmodel: {{name: tiny, quantization: {}}}\nmethod: {{name: lora, r: 4}}\ntasks: {{family: starter}}\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{quant_method: gptq}", "must be 'bitsandbytes', 'torchao' or 'quanto', got 'gptq'"),
        ("{}", "'model.quantization.quant_method' is missing"),
        ("{load_in_4bit: true, load_in_8bit: true}", "either load_in_4bit: true or load_in_8bit: true"),
        ("{load_in_4bit: false}", "either load_in_4bit: true or load_in_8bit: true"),
        ("{quant_method: torchao, load_in_4bit: true, quant_type: Int8WeightOnlyConfig}", "no other quant_method has"),
        ("{quant_method: torchao}", "torchao needs a quant_type"),
        ("{quant_method: quanto, quant_type: int8}", "no other quant_method has one"),
        ("{load_in_4bit: 1}", "'model.quantization.load_in_4bit' must be true or false, got 1"),
    ],
)
def test_contradictions_are_refused_with_their_line(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"a.yaml:2: .*{re.escape(message)}"):
        parse_recipe(RECIPE.format(given), "a.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        form(
            {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"},
            "unknown key 'model.quantization.bnb_4bit_quant_typ' – did",
        ),
        form({**QUANTO, "weights": "int7"}, "transformers refuses model.quantization: Only support weights"),
        form({**INT8, "quant_type": "Int8WeightOnly"}, "quant_type must be a config of torchao.quantization"),
        form({**INT8, "quant_type": {"Int8WeightOnlyConfig": {"size": 3}}}, "torchao refuses the options of"),
        form({**INT8, "quant_type": {"Int8WeightOnlyConfig": {"group_size": 3}}}, "torchao refuses the options of"),
    ],
)
def test_options_that_the_package_does_not_know_are_refused_before_the_folder_is_touched(
    given: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(tiny("lora", model_={"quantization": given}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_refused_before_anything_is_loaded(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quantization._PACKAGES, "quanto", ("optimum-quanto", lambda: False))
    recipe = tiny("lora", tmp_path / "no model", model_={"quantization": {"quant_method": "quanto"}})
    with pytest.raises(
        ConfigError, match=r"quant_method is quanto, which needs a package.*pip install -U optimum-quanto"
    ):
        train(recipe, tmp_path / "run")
    with pytest.raises(ConfigError, match="pip install -U optimum-quanto"):
        load_model(tiny("lora", model_={"quantization": {"quant_method": "quanto"}}).model)
    assert not (tmp_path / "run").exists()

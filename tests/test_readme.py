# SPDX-License-Identifier: Apache-2.0
"""Does what the README shows really run?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

from dyads.recipe.spec import load_recipe, parse_recipe
from dyads.runs.folder import RunFolder
from dyads.training.adapt import adapt_recipe
from tiny import tiny_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return next(iter(re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)))


def test_python_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenizer(texts: list[str], **options: Any) -> BatchEncoding:
        ids = torch.tensor([[3 + len(word) for word in text.split()] for text in texts])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: tiny_model("llama"))
    names: dict[str, Any] = {}
    exec(block("python"), names)
    assert type(names["merged"]).__name__ == "LlamaForCausalLM"


def test_recipe_in_the_readme_is_one() -> None:
    recipe = parse_recipe(block("yaml"), "README.md")
    assert recipe.method.options == {"r": 4, "num_experts": 16}
    assert recipe.tasks.family == "files"


RECIPES = [path for path in sorted(ROOT.glob("recipes/*/*.yaml")) if path.parent.name != "glue-transfer"]
NEW_TASKS = sorted(ROOT.glob("recipes/glue-transfer/*.yaml"))


@pytest.mark.parametrize("path", NEW_TASKS, ids=lambda p: p.name)
def test_every_new_task_that_is_shipped_can_be_adapted_to(path: Path, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", load_recipe(ROOT / "recipes/glue-minilm/more.yaml"))
    recipe = adapt_recipe(run.path, path, {"shots": 4})
    assert (recipe.tasks.family in ("scitail", "superglue"), recipe.train.steps, recipe.method.name) == (
        True,
        60,
        "more",
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_recipe_that_is_shipped_can_be_read(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.tasks.family
    assert yaml.safe_load(recipe.resolved_yaml())["name"] == recipe.name


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./-]+?)(?:#[\w-]+)?\)", README))
def test_links_in_the_readme_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()

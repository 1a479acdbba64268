# SPDX-License-Identifier: Apache-2.0
"""Dry run of the papers' studies: every cell is a recipe, and every method is counted on its model's shapes.

The models are made from their published shapes on the meta device, so no weights are needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from transformers import GemmaConfig, LlamaConfig, T5Config

from dyads.models.budget import count
from dyads.studies.grid import load_study

STUDIES = Path(__file__).parents[2] / "recipes" / "studies"
TASKS = tuple(f"task {i}" for i in range(8))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with the configs of the papers' models, by the names that the studies give."""
    gemma = GemmaConfig(
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    )
    t5 = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    llama = LlamaConfig()  # the defaults are the shape of LLaMA2-7B
    folders = {}
    for name, config in (
        ("google/gemma-2b", gemma),
        ("google-t5/t5-base", t5),
        ("meta-llama/Llama-2-7b-hf", llama),
    ):
        folders[name] = str(tmp_path_factory.mktemp("shapes"))
        config.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def sizes(shapes: dict[str, str]) -> Callable[[str], dict[str, int]]:
    """Trained parameters by label, of a study of the papers' scale."""

    counted: dict[str, int] = {}

    def of(name: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for cell in load_study(STUDIES / f"study-{name}.yaml").cells().values():
            recipe = cell.recipe
            if recipe.method.trains and cell.label not in found:
                model, method = shapes[recipe.model.name], recipe.method
                key = json.dumps([model, method.name, method.options])  # the studies have methods in common
                if key not in counted:
                    counted[key] = count(model, method.name, method.options, TASKS).trainable
                found[cell.label] = counted[key]
        return found

    return cache(of)


@pytest.mark.parametrize(
    "name", sorted(path.stem.removeprefix("study-") for path in STUDIES.glob("study-*-paper.yaml"))
)
def test_every_method_of_a_study_fits_its_model(name: str, sizes: Callable[[str], dict[str, int]]) -> None:
    found = sizes(name)
    assert found
    assert all(parameters > 100_000 for parameters in found.values())


def test_the_sizes_are_those_of_the_papers(sizes: Callable[[str], dict[str, int]]) -> None:
    inputs, outputs = 4 * 2048, 2048 + 256 + 256 + 2048
    found = sizes("mode-sizes-paper")
    assert found["LoRA 64"] == 18 * 64 * (inputs + outputs)
    assert found["MoDE 16x4"] == 18 * (4 * inputs + 64 * outputs + 64 * inputs)
    assert found["MoLORA-SD 16x4"] == 18 * (4 * inputs + 64 * outputs + 16 * inputs)
    assert sizes("more-glue-paper")["LoRA 8"] == 3_244_032
    assert sizes("more-glue-paper")["MoRE 8"] == 6_489_600

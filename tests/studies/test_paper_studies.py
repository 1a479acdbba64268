# SPDX-License-Identifier: Apache-2.0
"""Dry run of the papers' studies: every cell is a recipe, and every method is counted on its model's shapes.

The models are made from their published shapes on the meta device, so no weights are needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import GemmaConfig, LlamaConfig, T5Config

from dyads.models.budget import count
from dyads.studies.grid import load_study

STUDIES = Path(__file__).parents[2] / "recipes" / "studies"
TASKS = tuple(f"task {i}" for i in range(8))

GEMMA_2B = {"hidden_size": 2048, "intermediate_size": 16384, "head_dim": 256}
SHAPES: dict[str, tuple[Any, dict[str, int], int]] = {
    "google/gemma-2b": (GemmaConfig, {"num_attention_heads": 8, "num_key_value_heads": 1, **GEMMA_2B}, 18),
    "google-t5/t5-base": (T5Config, {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12}, 12),
    "meta-llama/Llama-2-7b-hf": (LlamaConfig, {}, 32),  # the defaults are its shape
}
"""The papers' models: config, sizes and blocks."""


@pytest.fixture(scope="session")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, int]]:
    """Trained parameters of a study by label: of some labels on its model, else of all, on two blocks of it."""

    @cache
    def shape(name: str, blocks: int | None) -> str:
        kind, options, whole = SHAPES[name]
        folder = tmp_path_factory.mktemp("shapes")
        config = kind(**options)
        config.num_hidden_layers = blocks or whole
        if kind is T5Config:
            config.num_decoder_layers = config.num_layers
        config.save_pretrained(folder)
        return str(folder)

    counted: dict[str, int] = {}

    def of(study: str, *labels: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for cell in load_study(STUDIES / f"study-{study}.yaml").cells().values():
            recipe = cell.recipe
            if recipe.method.trains and cell.label not in found and (not labels or cell.label in labels):
                model, method = shape(recipe.model.name, None if labels else 2), recipe.method
                key = json.dumps([model, method.name, method.options])  # the studies have methods in common
                if key not in counted:
                    counted[key] = count(model, method.name, method.options, TASKS).trainable
                found[cell.label] = counted[key]
        return found

    return of


@pytest.mark.parametrize(
    "name", sorted(path.stem.removeprefix("study-") for path in STUDIES.glob("study-*-paper.yaml"))
)
def test_every_method_of_a_study_fits_its_model(name: str, sizes: Callable[..., dict[str, int]]) -> None:
    found = sizes(name)
    assert found
    assert all(parameters > 10_000 for parameters in found.values())


def test_the_sizes_are_those_of_the_papers(sizes: Callable[..., dict[str, int]]) -> None:
    inputs, outputs = 4 * 2048, 2048 + 256 + 256 + 2048
    found = sizes("mode-sizes-paper", "LoRA 64", "MoDE 16x4", "MoLORA-SD 16x4")
    assert found["LoRA 64"] == 18 * 64 * (inputs + outputs)
    assert found["MoDE 16x4"] == 18 * (4 * inputs + 64 * outputs + 64 * inputs)
    assert found["MoLORA-SD 16x4"] == 18 * (4 * inputs + 64 * outputs + 16 * inputs)
    assert sizes("more-glue-paper", "LoRA 8", "MoRE 8") == {"LoRA 8": 3_244_032, "MoRE 8": 6_489_600}

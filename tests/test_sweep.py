# SPDX-License-Identifier: Apache-2.0
"""Tests of the learning-rate sweep: where its walk ends, and what its studies name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from dyads.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "recipes" / "sweep.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        ("1e-3", ["3e-4", "1e-3", "3e-3"]),
        ("3e-3", ["1e-3", "3e-3", "1e-2"]),
        ("3e-2", ["1e-3", "3e-3", "1e-2", "3e-2", "1e-1"]),
        ("1e-1", ["1e-3", "3e-3", "1e-2", "3e-2", "1e-1"]),
        ("1e-5", ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3"]),
    ],
)
def test_the_walk_ends_beside_a_worse_rate(
    sweep: ModuleType, best: str, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    centre = sweep.RATES.index(best)
    monkeypatch.setattr(sweep, "loss", lambda recipe, rate, out, settings: abs(sweep.RATES.index(rate) - centre))
    losses, found = sweep.walk(Path("a.yaml"), ["1e-3", "3e-3"], Path("out"), [])
    assert found == best
    assert list(losses) == tried


@pytest.mark.parametrize("study", ["glue-minilm", "sni15"])
def test_a_study_names_existing_recipes_rates_and_settings(sweep: ModuleType, study: str) -> None:
    contents = json.loads((ROOT / "recipes" / study / "sweep.json").read_text())
    assert set(contents["rates"]) < set(sweep.RATES)
    for method in contents["methods"]:
        load_recipe(ROOT / "recipes" / study / f"{method}.yaml", contents["set"])

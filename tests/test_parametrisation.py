# SPDX-License-Identifier: Apache-2.0
"""The toy regression of recipes/parametrisation: one training per method, and the table's arithmetic."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "parametrisation" / "toy.py"


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_regression", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_shared_rate_s_regret_is_measured_kept_and_read_again(toy: ModuleType, tmp_path: Path) -> None:
    small = toy.Toy(d=16, layers=2, steps=12, train_samples=64, valid_samples=64)
    rules = (toy.Rule(rank=0.0), toy.Rule(rank=1.0))
    stage = toy.Stage(rules, methods=("lora", "task_mode"), sizes=(0,), toy=small)
    rates = (-20, -4)

    def found() -> list[object]:
        results = toy.Results(tmp_path / "results.jsonl", small)
        cells = {v.name: [rule.cell(v, k, 16) for rule in rules for k in rates] for v in stage.variants}
        results.compute(stage.variants, cells, 1)
        return toy.rows(results, stage, 1, rates)

    first = found()
    written = (tmp_path / "results.jsonl").read_text()
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"toy": "cut off')
    again = found()
    assert (tmp_path / "results.jsonl").read_text() == written  # nothing was trained again
    for one, other in zip(first, again, strict=True):
        assert one.rule == other.rule
        assert one.shared == pytest.approx(other.shared, abs=1e-4)
    assert len(written.splitlines()) == 8  # every variant at two scales and two rates
    for row in first:
        assert row.rate == -4  # at the lowest rate nothing is learned
        assert all(row.regret[name] == 0 < row.half[name] for name in row.best)
        assert min(row.shortfall.values()) >= 0
    assert min(first[0].shared.values()) < 1 + toy.NOISE


def test_rules_that_lead_to_the_same_rates_share_their_trainings(toy: ModuleType) -> None:
    four, eight = (next(v for v in toy.LADDERS["lora"] if v.r == r) for r in (4, 8))
    assert toy.Rule(rank=1.0).cell(eight, -5, 64) == toy.Rule(rank=0.0).cell(eight, -5, 64)
    assert toy.Rule(rank=1.0, b=-1.0).cell(four, -5, 64) == toy.Rule(rank=0.0).cell(four, -5, 64)
    router_of_h = next(v for v in toy.LADDERS["mode_h"] if v.r == 4)
    assert toy.Rule(fan_in=1.0).cell(router_of_h, -5, 64).router == -5 + 4  # its 4 inputs in the place of 64

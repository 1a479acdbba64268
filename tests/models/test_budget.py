# SPDX-License-Identifier: Apache-2.0
"""Parameter counts: equal to the papers' and to those of a real training; budgets met as closely as possible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import T5Config

from dyads.errors import ConfigError, RunError
from dyads.methods import build_config, method_names
from dyads.models import budget
from dyads.models.budget import NEAR, PAPER_GEMMA_2B, alternatives, count, solve
from dyads.models.load import load_model
from dyads.recipe.spec import ModelSpec
from tiny import SMALL


def mode(m: int, r: int, p: int = 1) -> tuple[str, dict[str, Any]]:
    return "mode", {"num_experts": m, "r": r, "group_size": p}


def molora(m: int, r: int, shared_down: bool = False) -> tuple[str, dict[str, Any]]:
    return "molora", {"num_experts": m, "r": r, "shared_down": shared_down}


# "Add. Params" in percent, as printed. Written m×r×p: experts × rank × ranks per router.
PRINTED = [
    # table 2
    (("lora", {"r": 64}), "6.31"),
    (molora(16, 4), "7.62"),
    (molora(16, 4, shared_down=True), "2.71"),
    (mode(16, 4), "6.64"),
    (mode(8, 4), "3.48"),
    (mode(6, 4), "2.69"),
    (mode(4, 4), "1.90"),
    (mode(4, 6), "2.86"),
    (mode(4, 8), "3.81"),
    (mode(4, 16), "7.62"),
    # table 4
    (mode(4, 16, 16), "2.71"),
    (mode(4, 16, 8), "3.04"),
    (mode(4, 16, 4), "3.69"),
    (mode(4, 16, 2), "5.00"),
    (mode(16, 4, 4), "2.71"),
    (mode(16, 4, 2), "4.02"),
    # table 5
    (mode(42, 4, 4), "6.58"),
    (mode(27, 4, 2), "6.55"),
    (mode(27, 8, 8), "6.48"),
    (mode(20, 8, 4), "6.61"),
    (mode(12, 8, 2), "6.19"),
    (mode(7, 8, 1), "6.18"),
    (mode(15, 16, 16), "6.55"),
    (mode(12, 16, 8), "6.49"),
    (mode(8, 16, 4), "6.07"),
    (mode(5, 16, 2), "5.92"),
    (mode(3, 16, 1), "6.04"),
]


def _percentages() -> list[str]:
    return [f"{count(PAPER_GEMMA_2B, *configuration).percent:.2f}" for configuration, _ in PRINTED]


def test_the_percentages_of_modes_paper_to_two_decimals(monkeypatch: pytest.MonkeyPatch) -> None:
    # All layers are alike, so one of them makes the same share of its 18th of the model, in an 18th of the time.
    whole = count(PAPER_GEMMA_2B, *mode(16, 4))
    monkeypatch.setattr(budget, "_PAPER_LAYERS", 1)
    monkeypatch.setattr(budget, "_PAPER_BASE", budget._PAPER_BASE / 18)
    assert count(PAPER_GEMMA_2B, *mode(16, 4)).percent == pytest.approx(whole.percent, rel=1e-12)
    assert len(PRINTED) == 27
    assert _percentages() == [printed for _, printed in PRINTED]


@pytest.mark.slow
def test_the_percentages_of_modes_paper_with_all_its_layers() -> None:
    assert _percentages() == [printed for _, printed in PRINTED]


def test_lora_in_the_paper_is_lora_in_the_family() -> None:
    in_family, peft = count(PAPER_GEMMA_2B, *mode(1, 64)), count(PAPER_GEMMA_2B, "lora", {"r": 64})
    assert in_family == peft
    assert peft.trainable == 64 * 18 * (22528 + 4608)


@pytest.fixture(scope="module")
def t5_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shapes of T5-base, without weights."""
    path = tmp_path_factory.mktemp("t5-base")
    T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12).save_pretrained(path)
    return str(path)


T5_TARGETS = ["q", "k", "v", "o", "wi", "wo"]


def test_the_size_of_more_on_t5_base(t5_base: str) -> None:
    tasks = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
    more = count(t5_base, "more", {"preset": "paper", "r": 8, "target_modules": T5_TARGETS}, tasks)
    lora = count(t5_base, "lora", {"r": 8, "target_modules": T5_TARGETS})
    assert more.trainable == 6_489_600
    assert lora.trainable == 3_244_032
    assert len(more.per_module) == len(lora.per_module) == 12 * 6 + 12 * 10
    # The rest: an embedding (8 × d) and a gate (8 × d, and 8 biases) in every module.
    inputs = 168 * 768 + 24 * 3072
    assert more.trainable - lora.trainable == 8 * inputs + 8 * inputs + 192 * 8
    assert sum(more.per_module.values()) == more.trainable


@pytest.mark.parametrize("name", method_names())
def test_the_count_is_that_of_a_real_training(name: str, llama: Path) -> None:
    options = {"r": 4, **SMALL.get(name, {}), "target_modules": "all-linear"}
    if name == "mode":
        options["modules_to_save"] = ["lm_head"]  # trained in full, outside the adapted layers
    base = load_model(ModelSpec(name=str(llama)))
    size = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, build_config(name, options, ("a", "b")))
    counted = count(str(llama), name, options, ("a", "b"))
    assert counted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.base == size
    assert counted.percent == pytest.approx(100 * counted.trainable / size)
    assert sum(counted.per_module.values()) == counted.trainable - (92 * 32 if "modules_to_save" in options else 0)


@pytest.mark.parametrize(
    ("name", "options", "free"),
    [
        ("lora", {}, "r"),
        ("mode", {"num_experts": 4}, "r"),
        ("mode", {"r": 4}, "num_experts"),
        ("molora", {"r": 2, "shared_down": True}, "num_experts"),
    ],
)
def test_a_budget_is_met_as_closely_as_it_can_be(name: str, options: dict[str, Any], free: Any, llama: Path) -> None:
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    value, found = solve(str(llama), name, options, free=free, parameters=9_000)
    sizes = {n: count(str(llama), name, {**options, free: n}).trainable for n in range(max(1, value - 1), value + 2)}
    assert found.trainable == sizes[value]
    assert min(sizes, key=lambda n: abs(sizes[n] - 9_000)) == value
    exact, _ = solve(str(llama), name, options, free=free, parameters=found.trainable)
    assert exact == value


def test_ranks_come_in_whole_groups(llama: Path) -> None:
    options = {"num_experts": 4, "group_size": 3, "target_modules": ["q_proj"]}
    value, found = solve(str(llama), "mode", options, free="r", parameters=5_000)
    assert value % 3 == 0
    assert found.trainable == count(str(llama), "mode", {**options, "r": value}).trainable
    nearest = min((3 * n for n in range(1, 20)), key=lambda r: abs(_size(llama, options, r) - 5_000))
    assert value == nearest


def _size(llama: Path, options: dict[str, Any], r: int) -> int:
    return count(str(llama), "mode", {**options, "r": r}).trainable


@pytest.mark.parametrize(
    ("name", "options", "free", "first", "step"),
    [
        ("smora", {"top_k": 8}, "r", 8, 1),
        ("moelora", {"num_experts": 4}, "r", 4, 4),
        ("mode", {"r": 4, "select": "top_k", "top_k": 3}, "num_experts", 3, 1),
    ],
)
def test_only_values_that_a_method_takes_are_tried(
    name: str, options: dict[str, Any], free: Any, first: int, step: int, llama: Path
) -> None:
    options = {**options, "target_modules": ["q_proj"]}
    found, size = solve(str(llama), name, options, free=free, parameters=3_000, task_names=["a", "b"])
    assert found >= first
    assert (found - first) % step == 0
    assert count(str(llama), name, {**options, free: found}, ["a", "b"]).trainable == size.trainable


@pytest.mark.parametrize("size", [0, "x"])
def test_a_group_size_that_is_no_step_is_blamed_itself(size: object, llama: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^mode: group_size must be a whole number, 1 or more, got {size!r}$"):
        solve(str(llama), "mode", {"group_size": size}, free="r", parameters=5_000)


def test_a_budget_below_the_smallest_adapter_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"no r meets a budget of 10: lora with r=1 already has [\d,]+ parameters"):
        solve(str(llama), "lora", {"target_modules": ["q_proj"]}, free="r", parameters=10)


def test_a_budget_beyond_every_adapter_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_LARGEST", 64)
    with pytest.raises(ConfigError, match="r up to 64 does not reach a budget of 1,000,000,000"):
        solve(str(llama), "lora", {"target_modules": ["q_proj"]}, free="r", parameters=10**9)


def test_what_a_method_or_model_does_not_have_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="lora has no num_experts, so only r can meet a budget: leave r out"):
        solve(str(llama), "lora", {}, free="num_experts", parameters=1000)
    with pytest.raises(ConfigError, match=r"method 'mode' does not fit model '.*': Target modules .*nowhere"):
        count(str(llama), "mode", {"target_modules": ["nowhere"]})
    with pytest.raises(ConfigError, match="unknown method 'moed'"):
        count(str(llama), "moed", {})
    with pytest.raises(RunError, match="model 'nobody/nothing' could not be loaded"):
        count("nobody/nothing", "mode", {})


def test_counting_loads_no_weights(other_llama: Callable[..., Path]) -> None:
    path = other_llama()
    (path / "model.safetensors").unlink()
    assert count(str(path), "lora", {"r": 2, "target_modules": ["q_proj"]}).trainable == 2 * 2 * (32 + 32)


# --- other pairs of r and num_experts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "free"),
    [
        ("mode", {"r": 16}, "num_experts"),
        ("mode", {"r": 8, "group_size": 4}, "num_experts"),
        ("molora", {"num_experts": 3, "modules_to_save": ["lm_head"]}, "r"),
        ("task_mode", {"r": 8, "num_tasks": 3, "task_dim": 4}, "num_experts"),
    ],
)
def test_other_pairs_meet_the_budget_and_are_counted_exactly(
    method: str, options: dict[str, Any], free: Any, llama: Path
) -> None:
    saved = {"modules_to_save"} & options.keys()
    budget_of = count(
        str(llama),
        method,
        {**options, "r": 4, "num_experts": 5, **({"group_size": 4} if "group_size" in options else {})},
    )
    parameters = budget_of.trainable + 7
    pairs = alternatives(str(llama), method, options, free=free, parameters=parameters)
    assert 1 <= len(pairs) <= 3
    for pair, there in pairs:
        assert there == count(str(llama), method, pair)
        assert abs(there.trainable - parameters) <= NEAR * parameters
        assert pair["num_experts"] >= 2, "one expert is LoRA"
        assert {key: pair[key] for key in options.keys() - {"r", "num_experts"}} == {
            key: options[key] for key in options.keys() - {"r", "num_experts"}
        }
    kept = "r" if free == "num_experts" else "num_experts"
    distances = [abs(pair[kept] - options[kept]) for pair, _ in pairs]
    assert distances == sorted(distances), "those that change the given option least come first"
    assert not saved or all(there.trainable > 3000 for _, there in pairs)


def test_without_a_pair_in_reach_the_closest_alone_is_returned(llama: Path) -> None:
    least = count(str(llama), "mode", {"r": 1, "num_experts": 2}).trainable
    pairs = alternatives(str(llama), "mode", {"r": 2}, free="num_experts", parameters=round(0.8 * least))
    assert [pair for pair, _ in pairs] == [{"r": 1, "num_experts": 2}]


def test_a_method_with_one_size_has_no_other_pairs(llama: Path) -> None:
    assert alternatives(str(llama), "lora", {}, free="r", parameters=900) == []
    assert alternatives(str(llama), "more", {"num_tasks": 2}, free="r", parameters=900) == []

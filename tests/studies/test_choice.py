# SPDX-License-Identifier: Apache-2.0
"""Choice of a learning rate: where the walk ends, and what its trials are."""

from __future__ import annotations

import math

import pytest

from dyads.errors import ConfigError
from dyads.studies.choice import check_choice, next_values, trial
from dyads.studies.grid import load_study
from made_studies import Write

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


@pytest.mark.parametrize(
    ("lowest", "tried"),
    [
        (1e-3, [3e-4, 1e-3, 3e-3]),
        (3e-3, [1e-3, 3e-3, 1e-2]),
        (3e-2, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
        (1e-1, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
        (1e-5, [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]),
    ],
)
def test_the_walk_ends_beside_a_worse_rate(lowest: float, tried: list[float]) -> None:
    losses: dict[float, float] = {}
    while values := next_values(RATES, (1e-3, 3e-3), losses):
        assert len(values) == (2 if not losses else 1)
        losses |= {value: abs(math.log(value / lowest)) for value in values}
    assert sorted(losses) == tried
    assert min(losses, key=lambda value: losses[value]) == lowest


def test_a_diverged_rate_is_worse_and_without_a_start_all_are_tried() -> None:
    assert next_values(RATES, (1e-3, 3e-3), {1e-3: 1.0, 3e-3: math.inf}) == [3e-4]
    assert next_values(RATES, (1e-3, 3e-3), {1e-3: 1.0, 3e-3: math.inf, 3e-4: 1.0}) == []
    both = {1e-3: math.inf, 3e-3: math.inf}
    assert next_values(RATES, (1e-3, 3e-3), both) == [3e-4]
    assert next_values(RATES, (1e-3, 3e-3), both | {3e-4: math.inf}) == [1e-4], "down until one does not diverge"
    assert next_values(RATES, (1e-3, 3e-3), both | {3e-4: 1.0}) == [1e-4]
    assert next_values(RATES, (1e-3, 3e-3), both | {3e-4: 1.0, 1e-4: 2.0}) == []
    assert next_values(RATES, (1e-3, 3e-3), dict.fromkeys(RATES, math.inf)) == []
    assert next_values(RATES, None, {1e-3: 1.0}) == [rate for rate in RATES if rate != 1e-3]


def test_a_trial_is_the_cell_with_a_value_and_its_own_settings(write: Write) -> None:
    choose = {"values": [1e-3, 1e-2], "trial": {"train.steps": 4, "train": {"save_steps": None}}}
    study = load_study(write(choose=choose), ["train.batch_size=2"])
    cell = trial(study, study.combinations[1], 1e-2)
    assert (cell.name, cell.label) == ("MoDE-2x2-seed0-learning_rate0.01", "MoDE 2x2, learning_rate 0.01")
    train = cell.recipe.train
    assert (train.learning_rate, train.steps, train.save_steps, train.batch_size) == (1e-2, 4, None, 2)
    assert train.validation_steps == 4, "the loss is logged before the adapter is saved"
    (chosen, *_) = study.cells({study.group_of(study.combinations[0]): 1e-2}).values()
    assert (chosen.recipe.train.learning_rate, chosen.recipe.train.steps) == (1e-2, 6)


def test_a_mistake_in_the_settings_of_trials_is_named_with_its_line(write: Write) -> None:
    study = load_study(write(choose={"values": [1e-3, 1e-2], "trial": {"train.stepz": 4}}))
    with pytest.raises(ConfigError, match=r"study\.yaml:\d+: unknown key 'train\.stepz' – did you mean 'steps'"):
        trial(study, study.combinations[0], 1e-2)


def test_a_choice_that_an_axis_makes_or_without_validation_is_refused(write: Write) -> None:
    choose = {"values": [1e-3, 1e-2]}
    vary = {"method": {"fast": {"method": {"name": "mode"}, "train.learning_rate": 1.0}}}
    study = load_study(write(choose=choose, vary=vary, claims=None))
    with pytest.raises(
        ConfigError, match=r"'choose' chooses train\.learning_rate, but 'fast' sets it: drop one of them"
    ):
        check_choice(study, study.cells())
    study = load_study(write(choose=choose), ["train.learning_rate=0.5"])
    with pytest.raises(ConfigError, match=r"'choose' chooses train\.learning_rate, but '--set' sets it"):
        check_choice(study, study.cells())
    adjust = [{"where": {"seed": 1}, "recipe": {"train": {"learning_rate": 0.5}}}]
    study = load_study(write(choose=choose, adjust=adjust))
    with pytest.raises(ConfigError, match=r"'choose' chooses train\.learning_rate, but 'adjust\.0' sets it"):
        check_choice(study, study.cells())
    study = load_study(write(choose=choose), ["train.validation_limit=null", "train.validation_steps=null"])
    with pytest.raises(ConfigError, match="'choose' needs validation losses, but 'LoRA-4-seed0' has none: set train"):
        check_choice(study, study.cells())

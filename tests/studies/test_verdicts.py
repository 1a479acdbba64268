# SPDX-License-Identifier: Apache-2.0
"""Verdicts on made-up runs whose answer is known."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dyads.errors import ConfigError
from dyads.studies.grid import load_study
from dyads.studies.outcome import Outcome, outcome_of, to_json, to_page
from dyads.studies.progress import StudyFolder
from dyads.studies.verdicts import Judgement, claims_of
from made_runs import write_run
from made_studies import LORA, MODE, Write

TASKS = ("t1", "t2")
CLAIM = {"ahead": "x", "of": "base"}


def study_of(
    write: Write, folder: Path, gains: dict[str, Sequence[float]], claims: list[dict[str, Any]], noise: float = 1.0
) -> Outcome:
    """Methods that score `gains`, one a seed, above the method "base", on instances with some noise of their own."""
    seeds = list(range(max(map(len, gains.values()))))
    vary = {"method": {"base": LORA, **dict.fromkeys(gains, MODE)}, "seed": seeds}
    study = load_study(write(vary=vary, claims=claims))
    cells = study.cells()
    rng = np.random.default_rng(0)
    for cell in cells.values():
        mine = [0.0] * len(seeds) if cell.label == "base" else gains[cell.label]
        if cell.recipe.seed < len(mine):
            values = {t: 50 + mine[cell.recipe.seed] + rng.normal(0, noise, 30) for t in TASKS}
            write_run(folder / cell.name, cell.label, values, method=cell.recipe.method.name, seed=cell.recipe.seed)
    return outcome_of(study, cells, StudyFolder(folder))


def verdicts(outcome: Outcome) -> list[str]:
    return [found.verdict for found in outcome.judgements]


def test_what_lies_clear_of_the_margin_is_decided_and_what_straddles_it_is_not(write: Write, tmp_path: Path) -> None:
    gains = {
        "better": (3.0, 3.2, 2.8, 3.1, 2.9),
        "level": (0.1, -0.1, 0.0, 0.2, -0.2),
        "wild": (12.0, -3.0, 5.0, 9.0, -2.0),
    }
    claims = [
        {"ahead": ["better", "level", "wild"], "of": "base", "by": 1},
        {"equal": ["better", "level", "wild"], "to": "base", "within": 1},
    ]
    outcome = study_of(write, tmp_path, gains, claims)
    assert verdicts(outcome) == [
        "supported",
        "not supported",
        "undecided",
        "not supported",
        "supported",
        "undecided",
    ]
    assert [found.claim.text for found in outcome.judgements[::3]] == [
        "better ahead of base by 1 on macro",
        "better equals base within 1 on macro",
    ]
    better = outcome.judgements[0]
    assert better.value == pytest.approx(3.0, abs=0.3)
    assert better.low is not None
    assert 1 < better.low < 3
    assert better.needs == ""
    wild = outcome.judgements[2]
    assert wild.low is not None
    assert wild.high is not None
    assert wild.low < 1 < wild.high
    assert "more seeds" in wild.needs


def test_the_interval_and_p_are_those_of_the_scores_with_holms_correction(write: Write, tmp_path: Path) -> None:
    gains = {"a": (2.0, 4.0, 3.0), "b": (1.0, 9.0, 2.0)}  # without noise the seeds are all there is
    claims = [{"ahead": ["a", "b"], "of": "base"}, {"ahead": "a", "of": "base", "by": 1, "on": "micro"}]
    outcome = study_of(write, tmp_path, gains, claims, noise=0.0)
    a, b, micro = outcome.judgements
    p = {name: stats.ttest_1samp(gains[name], 0.0).pvalue for name in gains}
    assert p["a"] * 2 > 0.05, "the smallest p is not rejected, so both are tested at 2.5 %"
    for found, name in ((a, "a"), (b, "b")):
        low, high = stats.ttest_1samp(gains[name], 0.0).confidence_interval(0.975)
        assert (found.low, found.high) == pytest.approx((low, high))
        assert (found.verdict, found.level) == ("undecided", 0.975)
    assert (a.corrected_p, b.corrected_p) == pytest.approx((2 * p["a"], max(2 * p["a"], p["b"])))
    assert micro.p == micro.corrected_p == pytest.approx(stats.ttest_1samp(gains["a"], 1.0).pvalue), "alone on micro"


def test_clear_of_holds_the_estimate_to_the_margin_and_the_interval_to_another_bound(
    write: Write, tmp_path: Path
) -> None:
    gains = {"x": (1.0, 1.6, 1.2, 1.4, 1.1)}
    strict = {"ahead": "x", "of": "base", "by": 1}
    for claim, verdict in ((strict, "undecided"), ({**strict, "clear_of": 0}, "supported")):
        outcome = study_of(write, tmp_path / verdict, gains, [claim], noise=0.0)
        assert verdicts(outcome) == [verdict]
    assert outcome.judgements[0].claim.text == "x ahead of base by 1, interval above 0, on macro"
    below = {"x": (0.4, 0.6, 0.5, 0.4, 0.6)}
    outcome = study_of(write, tmp_path / "below", below, [{**strict, "clear_of": 0}], noise=0.0)
    assert verdicts(outcome) == ["not supported"]


def test_a_claim_on_a_task_reads_that_task_alone(write: Write, tmp_path: Path) -> None:
    outcome = study_of(write, tmp_path, {"x": (3.0, 3.1, 2.9)}, [{"ahead": "x", "of": "base", "on": "t2"}])
    (found,) = outcome.judgements
    (comparison,) = outcome.comparisons.values()
    x, base = (next(c for c in comparison.columns if c.label == label) for label in ("x", "base"))
    assert found.value == pytest.approx(x.scores[1].value - base.scores[1].value)


def test_one_seed_decides_nothing_and_missing_runs_leave_a_claim_open(write: Write, tmp_path: Path) -> None:
    outcome = study_of(write, tmp_path / "one", {"x": (30.0,)}, [{"ahead": "x", "of": "base"}])
    (found,) = outcome.judgements
    assert (found.verdict, found.over_seeds, found.corrected_p) == ("undecided", False, None)
    assert found.needs == "more seeds, five or more: one seed says nothing about another training"

    outcome = study_of(
        write, tmp_path / "two", {"x": (30.0,), "y": (30.0, 30.1)}, [{"ahead": ["x", "y"], "of": "base"}]
    )
    x, y = outcome.judgements
    assert (x.verdict, x.needs, x.value) == ("open", "1 of 2 runs of x have no scores", None)
    assert (y.verdict, y.level) == ("supported", 0.975), "an open claim counts in the correction"
    assert outcome.left == 1
    assert "1 runs have no scores yet" in to_page(outcome)


def needs(write: Write, folder: Path, gains: Sequence[float], noise: float = 0.0) -> Judgement:
    (found,) = study_of(write, folder, {"x": gains}, [{"ahead": "x", "of": "base"}], noise).judgements
    assert found.verdict == "undecided"
    return found


def test_what_it_would_take_is_seeds_instances_or_another_difference(write: Write, tmp_path: Path) -> None:
    gains = (1.0, 3.0, -1.0, 2.0)
    found = needs(write, tmp_path / "a", gains)
    spread = np.std(gains, ddof=1)
    enough = next(k for k in range(4, 99) if stats.t.ppf(0.975, k - 1) * spread / math.sqrt(k) < np.mean(gains))
    assert found.needs == f"{enough - 4} more seeds ({enough} in all)"
    assert needs(write, tmp_path / "b", (0.6, 2.6, 0.6, 2.6)).needs == "1 more seed (5 in all)"
    assert needs(write, tmp_path / "c", (0.1, -0.1, 0.1, -0.1)).needs.endswith("too near for 100 seeds")


def test_what_it_would_take_counts_from_the_method_with_more_seeds(write: Write, tmp_path: Path) -> None:
    study = load_study(
        write(
            vary={"method": {"base": LORA, "x": MODE}, "seed": [0, 1, 2, 3, 4]},
            only=[{"method": "base"}, {"method": "x", "seed": [0, 1, 2]}],
            claims=[CLAIM],
        )
    )
    cells, rng = study.cells(), np.random.default_rng(0)
    for cell in cells.values():
        gain = (2.0, 0.0, 4.0, 1.0, 3.0)[cell.recipe.seed] + 2.0 * (cell.label == "x")
        values = {t: 50 + gain + rng.normal(0, 1, 30) for t in TASKS}
        write_run(tmp_path / cell.name, cell.label, values, method=cell.recipe.method.name, seed=cell.recipe.seed)
    (found,) = outcome_of(study, cells, StudyFolder(tmp_path)).judgements
    assert found.verdict == "undecided"
    assert re.fullmatch(r"\d+ seeds of each", found.needs)
    assert int(found.needs.split()[0]) >= 5


def test_an_untrained_method_is_not_compared_with_itself(write: Write, tmp_path: Path) -> None:
    """Its run is the same for all learning rates, and would make the family of claims larger."""
    vary = {
        "method": {"majority": {"method": {"name": "majority"}}, "LoRA": LORA},
        "train.learning_rate": [0.01, 0.001],
        "seed": [0, 1],
    }
    claims = [{"ahead": "0.01", "of": "0.001"}, {"equal": "0.01", "to": "0.001", "within": 1}]
    study = load_study(write(vary=vary, claims=claims))
    found = claims_of(study, study.cells())
    assert [claim.row for claim in found] == ["LoRA, learning_rate 0.01"] * 2
    alone = {"vary": {**vary, "method": {"majority": {"method": {"name": "majority"}}}}, "claims": claims[:1]}
    study = load_study(write(**alone))
    with pytest.raises(ConfigError, match=r"'claims\.0' is about no two cells of the study"):
        claims_of(study, study.cells())


def test_where_instances_make_the_interval_more_of_them_are_named(write: Write, tmp_path: Path) -> None:
    study = load_study(write(vary={"method": {"base": LORA, "x": MODE}, "seed": [0, 1, 2]}, claims=[CLAIM]))
    cells, swing, gain, n = study.cells(), 20.0, 3.0, 40
    for cell in cells.values():  # the same for all seeds: a gain that swings from instance to instance
        shift = np.array([gain + swing, gain - swing] * (n // 2)) if cell.label == "x" else np.zeros(n)
        values = dict.fromkeys(TASKS, 50 + shift)
        write_run(tmp_path / cell.name, cell.label, values, method=cell.recipe.method.name, seed=cell.recipe.seed)
    (found,) = outcome_of(study, cells, StudyFolder(tmp_path)).judgements
    half_width = stats.t.ppf(0.975, 2 * (n - 1)) * swing * math.sqrt(n / (n - 1)) / math.sqrt(2 * n)
    assert (found.low, found.high) == pytest.approx((gain - half_width, gain + half_width))
    assert 2 < (half_width / gain) ** 2 < 3
    assert found.needs == "3 times the instances; seeds alone do not decide it"


@pytest.mark.parametrize(
    ("sections", "baseline"),
    [
        ({"claims": [{**CLAIM, "where": {"train.steps": 4}}]}, "base, steps 4"),
        ({"claims": [CLAIM]}, None),
        ({"claims": [], "baseline": "x"}, "x, steps 2"),
        ({"claims": [{**CLAIM, "where": {"train.steps": 4}}], "baseline": "base"}, "base, steps 4"),
    ],
)
def test_differences_refer_to_what_the_claims_or_the_study_name(
    sections: dict[str, Any], baseline: str | None, write: Write, tmp_path: Path
) -> None:
    vary = {"method": {"base": LORA, "x": MODE}, "train.steps": [2, 4], "seed": [0]}
    study = load_study(write(vary=vary, **sections))
    cells = study.cells()
    for cell in cells.values():
        write_run(tmp_path / cell.name, cell.label, {t: [1.0, 2.0] for t in TASKS}, method=cell.recipe.method.name)
    (comparison,) = outcome_of(study, cells, StudyFolder(tmp_path)).comparisons.values()
    assert comparison.baseline == baseline


def test_the_files_hold_verdicts_scores_and_marks_and_no_times(write: Write, tmp_path: Path) -> None:
    outcome = study_of(write, tmp_path, {"x": (3.0, 3.1, 2.9)}, [{"ahead": "x", "of": "base"}])
    content = json.loads(to_json(outcome))
    (claim,) = content["claims"]
    assert (claim["claim"], claim["verdict"], claim["where"]) == ("x ahead of base on macro", "supported", {})
    (table,) = content["tables"]
    assert [column["label"] for column in table["columns"]] == ["base", "x"]
    assert "seconds" not in to_json(outcome)
    page = to_page(outcome)
    assert "| x ahead of base on macro | supported | +3" in page
    assert "Holm's correction over the study's claims (1 on macro)" in page

# SPDX-License-Identifier: Apache-2.0
"""Comparisons count right, pair right, and refuse what cannot be compared."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.text import Text
from scipy.stats import bootstrap

from dyads.comparing.compare import compare
from dyads.comparing.tables import to_csv, to_json, to_markdown, to_terminal
from dyads.errors import RunError
from dyads.runs.folder import RunFolder

Run = Callable[..., Path]


def test_micro_counts_instances_and_macro_counts_tasks(run: Run) -> None:
    found = compare([run("a", {"small": [100, 0], "large": [10] * 8})]).columns[0]
    assert found.micro.value == pytest.approx((100 + 0 + 80) / 10)
    assert found.macro.value == pytest.approx((50 + 10) / 2)
    assert [score.value for score in found.scores] == [50, 10]


def test_scores_are_means_over_seeds_with_their_spread(run: Run) -> None:
    folders = [run("a", {"t": [10, 20]}, seed=0), run("a", {"t": [30, 40]}, seed=1)]
    (found,) = compare(folders).columns
    assert found.micro.value == 25
    assert found.micro_by_seed == (15, 35)
    assert found.seeds == (0, 1)
    assert "15.0 to 35.0" in to_markdown(compare(folders))


def test_an_interval_over_instances_agrees_with_scipy(run: Run) -> None:
    values = np.random.default_rng(3).gamma(2.0, 15.0, size=40)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    ours = compare([run("a", {"t": list(values)})]).columns[0].micro
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.3)


def test_a_paired_difference_agrees_with_scipy_and_is_narrower_than_an_unpaired_one(run: Run) -> None:
    rng = np.random.default_rng(4)
    hard = rng.uniform(0, 80, size=60)
    a, b = hard + rng.normal(0, 3, size=60), hard + 2 + rng.normal(0, 3, size=60)
    theirs = bootstrap((b - a,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    found = compare([run("a", {"t": list(a)}), run("b", {"t": list(b)})])
    ours = found.pair("b", "a").micro
    assert ours.value == pytest.approx((b - a).mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.1)
    alone = found.columns[0].micro
    assert ours.high - ours.low < (alone.high - alone.low) / 3
    back = found.pair("a", "b").micro
    assert (back.low, back.high) == pytest.approx((-ours.high, -ours.low))


def test_tasks_keep_their_size_in_every_resample(run: Run) -> None:
    found = compare([run("a", {"zero": [0] * 5, "full": [100] * 15})]).columns[0]
    assert (found.micro.low, found.micro.high) == pytest.approx((75, 75))


def test_the_seeds_of_equal_seed_sets_are_drawn_together(run: Run) -> None:
    """Runs without spread over instances, but with one over seeds that both columns share."""
    folders = [run(n, {"t": [50 + 10 * s + d] * 4}, seed=s) for n, d in (("a", 0), ("b", 3)) for s in range(3)]
    found = compare(folders)
    assert (found.columns[0].micro.low, found.columns[0].micro.high) == (50, 70)
    gap = found.pair("b", "a").micro
    assert (gap.low, gap.high) == pytest.approx((3, 3))


def test_the_same_comparison_gives_the_same_numbers(run: Run) -> None:
    values = list(np.random.default_rng(0).uniform(0, 100, size=30))
    folders = [run("a", {"t": values}), run("b", {"t": values[::-1]})]
    assert compare(folders) == compare(folders)
    assert compare(folders).columns[0].micro != compare(folders, bootstrap_seed=1).columns[0].micro


def test_instances_are_matched_by_their_id_and_not_by_their_place(run: Run) -> None:
    folders = [run("a", {"t": [0, 50, 100]}), run("b", {"t": [0, 50, 100]})]
    path = folders[1] / "predictions" / "t.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    gap = compare(folders).pair("a", "b").micro
    assert (gap.low, gap.high) == (0, 0)


def test_win_rates_count_ties_half_and_are_tested_without_them(run: Run) -> None:
    a = run("a", {"t1": [3], "t2": [3], "t3": [3], "t4": [5], "t5": [1]})
    b = run("b", {"t1": [1], "t2": [1], "t3": [1], "t4": [5], "t5": [2]})
    found = compare([a, b])
    pair, back = found.pair("a", "b"), found.pair("b", "a")
    assert (pair.wins, pair.ties, pair.losses) == (3, 1, 1)
    assert pair.win_rate == 3.5 / 5
    assert back.win_rate == 1.5 / 5
    assert pair.p_value == back.p_value == pytest.approx(2 * (4 + 1) / 2**4)  # P(≥ 3 of 4), both sides


def test_columns_that_never_differ_are_no_evidence(run: Run) -> None:
    pair = compare([run("a", {"t": [3]}), run("b", {"t": [3]})]).pair("a", "b")
    assert (pair.win_rate, pair.p_value) == (0.5, 1.0)


def test_references_come_first_and_have_no_parameters_shown(run: Run) -> None:
    folders = [
        run("mode", {"t": [30, 40]}),
        run("bare", {"t": [3, 4]}, method="zero-shot", parameters=0),
        run("common", {"t": [5, 6]}, method="majority", parameters=0, model={"name": "another"}),
    ]
    found = compare(folders)
    assert [c.label for c in found.columns] == ["bare", "common", "mode"]
    assert [c.reference for c in found.columns] == [True, True, False]
    assert found.model == "tiny"
    assert "| bare | 3.5 |" in to_markdown(found)
    assert not any("no zero-shot" in note for note in found.notes)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"split": "validation"}, "they differ in evaluate.split (test and validation)"),
        ({"model": {"name": "other"}}, "they differ in model.name (tiny and other)"),
        ({"changed": {"t": {"version": 2}}}, "task 't' differs in version: 1 and 2"),
        ({"changed": {"t": {"fingerprint": "x"}}}, "task 't' differs in fingerprint: print-t and x"),
        ({"metrics": {"t": "exact_match"}}, "task 't' differs in metric: rouge_l and exact_match"),
        ({"values": {"t": [1]}}, "task 't' differs in the number of scored instances (evaluate.limit): 2 and 1"),
        ({"values": {"t": [1, 2], "u": [1]}}, "they differ in tasks, '"),
        ({"values": {"u": [1, 2]}}, "b-seed0' lacks t. Give both the same tasks"),
    ],
)
def test_runs_that_differ_in_what_was_asked_are_refused(run: Run, facts: dict[str, Any], message: str) -> None:
    other = {"values": {"t": [1, 2]}, **facts}
    with pytest.raises(RunError, match=r"^cannot compare '.*a-seed0' with '.*b-seed0': .*" + re.escape(message[-40:])):
        compare([run("a", {"t": [1, 2]}), run("b", **other)])


def test_other_instances_of_a_task_are_refused(run: Run) -> None:
    folders = [run("a", {"t": [1, 2]}), run("b", {"t": [1, 2]})]
    path = folders[1] / "predictions" / "t.jsonl"
    path.write_text(path.read_text().replace("t-1", "t-7"))
    with pytest.raises(RunError, match=r"task 't' was scored on other instances \('t-1' only in the first\)"):
        compare(folders)


def test_predictions_that_are_not_those_that_were_scored_are_refused(run: Run) -> None:
    folder = run("a", {"t": [1, 2]})
    path = folder / "predictions" / "t.jsonl"
    path.write_text(path.read_text().replace("2.0", "9.0"))
    with pytest.raises(RunError, match=r"\(2 instances, rouge_l 5.00\) are not those .* \(2 instances, 1.50\)"):
        compare([folder])


def test_one_name_means_one_recipe(run: Run, tmp_path: Path) -> None:
    first = run("a", {"t": [1]}, seed=0)
    second = run("a", {"t": [1]}, seed=1, train={"learning_rate": 2e-3})
    with pytest.raises(RunError, match=r"both named 'a' but differ in train.learning_rate \(0.001 and 0.002\)"):
        compare([first, second])
    with pytest.raises(RunError, match=r"are the same run: both are 'a' with seed 0"):
        compare([first, first])
    assert compare([first, run("a", {"t": [1]}, seed=3, evaluate={"limit": 1})]).columns[0].seeds == (0, 3)
    third = run("a", {"t": [1]}, seed=2, parameters=7)
    with pytest.raises(RunError, match="1,000 and 7 parameters"):
        compare([first, third])


def test_nothing_an_unknown_baseline_and_an_unscored_run_are_refused(run: Run) -> None:
    with pytest.raises(RunError, match="nothing to compare"):
        compare([])
    folder = run("mode-8x4", {"t": [1]})
    with pytest.raises(RunError, match=r"no run is named 'mode-8x' – did you mean 'mode-8x4'\?"):
        compare([folder], baseline="mode-8x")
    (folder / "scores.json").unlink()
    with pytest.raises(RunError, match=r"has no scores\.json"):
        compare([folder])


def test_other_differences_are_notes(run: Run) -> None:
    folders = [
        run("a", {"t": [1], "u": [2]}, metrics={"u": "exact_match"}, seed=1, parameters=1000),
        run("b", {"t": [1], "u": [2]}, metrics={"u": "exact_match"}, parameters=2000, train={"learning_rate": 2e-3}),
        run("c", {"t": [1], "u": [2]}, metrics={"u": "exact_match"}, mixture={"kind": "uniform"}),
    ]
    assert set(compare(folders).notes) == {
        "micro and macro average over different metrics: rouge_l (1 task), exact_match (1 task)",
        "seeds differ: 1 (a), 0 (b, c)",
        "intervals of columns with one seed are about the instances alone, not about another training",
        "trainable parameters differ by more than 5 %: 1,000 (a, c), 2,000 (b)",
        "train.learning_rate differs: 0.001 (a, c), 0.002 (b)",
        "mixture.kind differs: proportional (a, b), uniform (c)",
        "too few log lines to say whether the loss had flattened: a, b, c",
        "no zero-shot and no majority run here: add one to see how much of a score was learned",
    }


def test_a_loss_that_still_falls_is_told_and_one_that_is_flat_is_not(run: Run) -> None:
    falling = [(step, 10 - step / 20) for step in range(1, 101)]
    flat = [(step, 5.0 + step % 2 / 10) for step in range(1, 101)]
    found = compare([run("a", {"t": [1]}, losses=falling), run("b", {"t": [1]}, losses=flat)])
    (curve,) = found.columns[0].curves
    assert (curve.before, curve.last) == pytest.approx((10 - 85.5 / 20, 10 - 95.5 / 20))
    told = [note for note in found.notes if "still fell" in note]
    assert told == ["a: training loss still fell in the last tenth of the steps, 5.725 → 5.225"]


def test_the_loss_of_the_tasks_is_compared_not_what_a_method_adds(run: Run) -> None:
    folder = run("a", {"t": [1]}, losses=[])
    for step in range(1, 101):
        RunFolder.open(folder).append_log({"step": step, "loss": 5.0 + 100 / step, "auxiliary_loss": 100 / step})
    found = compare([folder, run("b", {"t": [1]})])
    (curve,) = found.columns[0].curves
    assert (curve.before, curve.last) == pytest.approx((5, 5))
    assert not [note for note in found.notes if "still fell" in note]


NO_FORM = "bare: an untrained model rarely answers in the expected form, so a low score says little about what it knows"


@pytest.mark.parametrize(
    ("bare", "common", "told"),
    [
        ({"t": [0, 0], "u": [50, 50]}, None, True),  # no answer of a task had the form
        ({"t": [20, 20], "u": [20, 20]}, {"t": [30, 30], "u": [30, 30]}, True),  # below always the same answer
        ({"t": [40, 40], "u": [20, 30]}, {"t": [30, 30], "u": [30, 30]}, False),
        ({"t": [1, 0], "u": [20, 30]}, None, False),
    ],
)
def test_a_bare_model_that_misses_the_form_is_noted(
    run: Run, bare: dict[str, list[float]], common: dict[str, list[float]] | None, told: bool
) -> None:
    folders = [run("bare", bare, method="zero-shot"), run("mode", {"t": [0, 0], "u": [0, 0]})]
    folders += [run("common", common, method="majority")] if common else []
    assert [note for note in compare(folders).notes if "untrained" in note] == [NO_FORM] * told


def test_a_folder_of_runs_stands_for_the_scored_ones_in_it(run: Run, tmp_path: Path) -> None:
    run("a", {"t": [1]})
    (run("b", {"t": [1]}) / "scores.json").unlink()
    found = compare([tmp_path], resamples=10)
    assert [column.runs for column in found.columns] == [(str(tmp_path / "a-seed0"),)]
    assert found.notes[0] == f"left out of {tmp_path}, as they have no scores: b-seed0"


def test_a_folder_without_a_scored_run_is_refused_with_where_to_look(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no run and holds none; `dyads train` makes such folders"):
        compare([tmp_path])
    folder = run("b", {"t": [1]})
    (folder / "scores.json").unlink()
    with pytest.raises(RunError, match=r"^no run in '.*' has scores \(b-seed0\); `dyads evaluate .*b-seed0` scores"):
        compare([tmp_path])
    deep = tmp_path / "deep"
    deep.mkdir()
    folder.rename(deep / "b")
    with pytest.raises(RunError, match=rf"holds no run itself; name the folders that do: {re.escape(str(deep))}$"):
        compare([tmp_path])


def columns(run: Run, count: int, tasks: int = 3) -> list[Path]:
    values = {f"task{i}00_{'long_' * i}name": [float(i), 50.0, 100.0] for i in range(tasks)}
    return [run(f"method-{i}-of-many", {t: [x - i for x in v] for t, v in values.items()}) for i in range(count)]


@pytest.mark.parametrize("count", [1, 3, 14, 30])
def test_nothing_is_cut_in_a_terminal_of_80_columns(run: Run, count: int) -> None:
    text = Text.from_ansi(to_terminal(compare(columns(run, count, tasks=8), resamples=50), width=80)).plain
    assert max(map(len, text.splitlines())) <= 80
    for i in range(count):
        assert f"method-{i}-of-many" in text
    names = [line.split()[0] for line in text.splitlines() if line.startswith("task") and "…" in line]
    assert all("_name" in name for name in names)
    if count < 14:
        assert "…" in text  # only names of tasks are shortened
    numbers = re.findall(r"^task000_name .*$", text, flags=re.M)
    assert sum(len(line.split()) - 2 for line in numbers) == count


def test_markdown_has_names_in_full_and_the_best_in_bold(run: Run) -> None:
    text = to_markdown(compare(columns(run, 2)))
    assert "| task200_long_long_name | rouge_l | v1 | 3 | **50.7** | 49.7 |" in text
    assert "| method-1-of-many − method-0-of-many | -1.0 | -1.0 to -1.0 |" in text


def test_csv_has_a_line_for_every_value(run: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(compare(columns(run, 2))))))
    assert len(rows) == 2 * (3 + 2)
    assert [row["level"] for row in rows[:5]] == ["task", "task", "task", "micro", "macro"]
    assert (rows[0]["task"], rows[0]["label"], float(rows[0]["value"])) == ("task000_name", "method-0-of-many", 50.0)


def test_json_holds_everything(run: Run) -> None:
    content = json.loads(to_json(compare(columns(run, 2), baseline="method-0-of-many")))
    assert content["columns"][1]["scores"]["task000_name"]["value"] == 49.0
    assert content["pairs"][0]["win_rate"] == 1.0
    assert content["baseline"] == "method-0-of-many"


def test_with_a_baseline_only_its_differences_are_shown(run: Run) -> None:
    text = to_markdown(compare(columns(run, 3), baseline="method-1-of-many"))
    shown = re.findall(r"^\| (\S+) − (\S+) \|", text, flags=re.M)
    assert shown == [("method-0-of-many", "method-1-of-many"), ("method-2-of-many", "method-1-of-many")]

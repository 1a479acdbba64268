# SPDX-License-Identifier: Apache-2.0
"""Comparisons of run folders: means, paired differences, verdicts, refusals, notes and tables."""

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
from scipy import stats

from dyads.comparing.comparison import compare
from dyads.comparing.tables import to_csv, to_json, to_markdown, to_terminal
from dyads.errors import RunError
from dyads.runs.accept import accept
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


def test_a_paired_difference_agrees_with_scipy_and_is_narrower_than_an_unpaired_one(run: Run) -> None:
    rng = np.random.default_rng(4)
    hard = rng.uniform(0, 80, size=60)
    a, b = hard + rng.normal(0, 3, size=60), hard + 2 + rng.normal(0, 3, size=60)
    theirs = stats.ttest_rel(b, a)
    found = compare([run("a", {"t": list(a)}), run("b", {"t": list(b)})])
    ours = found.pair("b", "a").micro
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert (ours.value, ours.p) == pytest.approx(((b - a).mean(), theirs.pvalue))
    alone = found.columns[0].micro
    assert ours.high - ours.low < (alone.high - alone.low) / 3
    assert found.pair("a", "b").micro == -ours


def test_columns_with_the_same_seeds_are_paired(run: Run) -> None:
    """Runs without spread over instances, but with one over seeds that both columns share."""
    folders = [run(n, {"t": [50 + 10 * s + d] * 4}, seed=s) for n, d in (("a", 0), ("b", 3)) for s in range(3)]
    found = compare(folders)
    low, high = stats.ttest_1samp([50, 60, 70], 0).confidence_interval(0.95)
    assert (found.columns[0].micro.low, found.columns[0].micro.high) == pytest.approx((low, high))
    gap = found.pair("b", "a").micro
    # Nothing differs in any seed: the error is that of a fifth instance that differs by 100.
    assert (gap.value, gap.high - 3, gap.over_seeds) == pytest.approx((3, stats.t.ppf(0.975, 3) * 20, True))


def test_columns_with_other_seeds_and_references_are_compared_too(run: Run) -> None:
    folders = [run("a", {"t": [50 + 10 * s] * 4}, seed=s) for s in range(3)]
    folders += [run("b", {"t": [50 + 10 * s] * 4}, seed=s) for s in (3, 4)]
    folders += [run("bare", {"t": [30, 30, 30, 30]}, method="zero-shot")]
    found = compare(folders)
    low, high = stats.ttest_ind([80, 90], [50, 60, 70], equal_var=False).confidence_interval(0.95)
    gap = found.pair("b", "a")
    assert (gap.macro.low, gap.macro.high) == pytest.approx((low, high))
    assert gap.p_value is None
    low, high = stats.ttest_1samp([20, 30, 40], 0).confidence_interval(0.95)
    over = found.pair("a", "bare").macro
    assert (over.low, over.high, over.over_seeds) == pytest.approx((low, high, True))


def test_a_correlation_has_an_interval_too(run: Run, tmp_path: Path) -> None:
    folder = run("a", {"t": [50.0] * 40}, metrics={"t": "pearson"})
    x, y = np.random.default_rng(0).normal(size=(2, 40)) + np.linspace(0, 6, 40)
    path = folder / "predictions" / "t.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, "prediction": f"{p}", "references": [f"{r}"]} for row, p, r in zip(rows, x, y, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    correlation = 100 * stats.pearsonr(x, y).statistic
    scores = json.loads((folder / "scores.json").read_text())
    scores["scores"][0]["value"] = correlation
    (folder / "scores.json").write_text(json.dumps(scores))
    accept(folder)
    (found,) = compare([folder]).columns[0].scores
    fisher = stats.pearsonr(x, y).confidence_interval(0.95)
    assert found.value == pytest.approx(correlation)
    assert (found.low, found.high) == pytest.approx((100 * fisher.low, 100 * fisher.high), abs=6)


def test_verdicts_are_corrected_for_the_family_that_is_shown(run: Run) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(50, 1, size=30)
    shift = {"a": 0.0, "b": 0.0, "c": 0.0, "d": 2.0, "e": -0.18}
    folders = [run(n, {"t": list(base + s + (n > "a") * rng.normal(0, 0.6, size=30))}) for n, s in shift.items()]
    found = compare(folders, baseline="a")
    assert [(p.row, p.column) for p in found.differences] == [("b", "a"), ("c", "a"), ("d", "a"), ("e", "a")]
    plain = {p.row: p.macro.p for p in found.differences}
    assert [p.macro_verdict for p in found.differences] == ["undecided", "undecided", "ahead", "undecided"]
    assert 0.05 / 3 < plain["e"] < 0.05, "the plain interval would say behind"
    assert found.pair("e", "a").macro_holm == pytest.approx(3 * plain["e"])
    assert found.pair("a", "e").macro_holm is None
    alone = compare([folders[0], folders[4]], baseline="a").pair("e", "a")
    assert (alone.macro_verdict, alone.micro_verdict) == ("behind", "behind")
    assert len(compare(folders).differences) == 10
    text = to_markdown(found)
    assert re.search(r"^\| d − a \| \+2\.\d .*\| < 0.001 \| \(ahead\) \|", text, flags=re.M), "one seed: in brackets"
    assert "Holm's correction over 4 differences" in text


def test_instances_are_matched_by_their_id_and_not_by_their_place(run: Run) -> None:
    folders = [run("a", {"t": [0, 50, 100]}), run("b", {"t": [0, 50, 100]})]
    path = folders[1] / "predictions" / "t.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    accept(folders[1])
    mixed = compare([run("c", {"t": [0, 50, 100]}), run("d", {"t": [100, 50, 0]})]).pair("c", "d").micro
    gap = compare(folders).pair("a", "b").micro
    assert gap.high == -gap.low == pytest.approx(stats.t.ppf(0.975, 2) * 25), "no instance differs"
    assert mixed.high == pytest.approx(stats.t.ppf(0.975, 2) * 100 / 3**0.5)


def test_win_rates_count_ties_half_and_one_seed_is_no_evidence(run: Run) -> None:
    a = run("a", {"t1": [3], "t2": [3], "t3": [3], "t4": [5], "t5": [1]})
    b = run("b", {"t1": [1], "t2": [1], "t3": [1], "t4": [5], "t5": [2]})
    found = compare([a, b])
    pair, back = found.pair("a", "b"), found.pair("b", "a")
    assert (pair.wins, pair.ties, pair.losses) == (3, 1, 1)
    assert (pair.win_rate, back.win_rate) == (3.5 / 5, 1.5 / 5)
    assert pair.p_value == back.p_value == 1.0
    assert "fewer than six common seeds" in to_markdown(found)


def test_win_rates_have_stars_from_six_common_seeds(run: Run) -> None:
    tasks = {"t": 0.0, "u": 1.0, "v": 2.0}
    folders = [
        run(name, {t: [x + better, x + s] for t, x in tasks.items()}, seed=s)
        for name, better in (("a", 0.0), ("b", 9.0))
        for s in range(6)
    ]
    found = compare(folders)
    assert found.pair("b", "a").p_value == 2 / 2**6
    text = to_markdown(found)
    assert r"| b | 100\* | · |" in text
    assert r"\* p < 0.05" in text
    bare = run("bare", {t: [x - 1, x - 1] for t, x in tasks.items()}, method="majority")
    text = to_markdown(compare([*folders[6:], bare]))
    assert r"| b | 100\* | · |" in text
    assert r"\* p < 0.05" in text, "the reference is the same for every seed"
    assert "not tested" not in text


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
        ({"split": "validation"}, "b-seed0 --split test`."),
        ({"values": {"t": [1]}}, "a-seed0 --limit 1`."),
        ({"values": {"t": [1, 2, 3]}}, "b-seed0 --limit 2`."),
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
    accept(folders[1])
    with pytest.raises(RunError, match=r"task 't' was scored on other instances \('t-1' only in the first\)"):
        compare(folders)


def test_predictions_that_are_not_those_that_were_scored_are_refused(run: Run) -> None:
    folder = run("a", {"t": [1, 2]})
    path = folder / "predictions" / "t.jsonl"
    path.write_text(path.read_text().replace("2.0", "9.0"))
    with pytest.raises(
        RunError, match=r"is damaged: the SHA-256 of predictions/t\.jsonl is not that of manifest\.json"
    ):
        compare([folder])
    accept(folder)
    with pytest.raises(RunError, match=r"\(2 instances, rouge_l 5.00\) are not those .* \(2 instances, 1.50\)"):
        compare([folder])


@pytest.mark.parametrize(
    ("metric", "row", "message"),
    [
        (
            "rouge_l",
            {"higher_is_better": False},
            "headline metric rouge_l, where lower is better; it cannot be averaged",
        ),
        ("rouge_l", {"metric": "spearman"}, "instance 't-0' of task 't' has no spearman of its own"),
        ("f1", {}, "scores.json has no labels of task 't', which f1 needs"),
        ("rouge_l", {"headline": False}, "has no headline score of any task"),
    ],
)
def test_scores_that_cannot_be_averaged_or_resolved_by_instance_are_refused(
    run: Run, metric: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=re.escape(message)):
        compare([run("a", {"t": [1, 2]}, metrics={"t": metric}, changed={"t": row})])


def test_two_headline_scores_of_a_task_are_refused(run: Run) -> None:
    folder = run("a", {"t": [1, 2]})
    scores = json.loads((folder / "scores.json").read_text())
    scores["scores"] *= 2
    (folder / "scores.json").write_text(json.dumps(scores))
    accept(folder)
    with pytest.raises(RunError, match=r"has two headline scores for task 't'; run `dyads evaluate .*` again"):
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


ONE_SEED = (
    "one seed: intervals are about the instances alone, not about another training; "
    "verdicts that rest on them stand in brackets"
)


def test_other_differences_are_notes(run: Run) -> None:
    folders = [
        run("a", {"t": [1], "u": [2]}, metrics={"u": "exact_match"}, seed=1, parameters=1000),
        run("b", {"t": [1], "u": [2]}, metrics={"u": "exact_match"}, parameters=2000, train={"learning_rate": 2e-3}),
        run("c", {"t": [1], "u": [2]}, metrics={"u": "exact_match"}, mixture={"kind": "uniform"}),
    ]
    window = run(
        "d", {"t": [1], "u": [2]}, metrics={"u": "exact_match"}, train={"bucket_window": 32, "save_steps": None}
    )
    assert [n for n in compare([folders[1], window]).notes if "train." in n] == [
        "train.learning_rate differs: 0.002 (b), 0.001 (d)",
        "train.bucket_window differs: 8 (b), 32 (d)",
    ]
    assert set(compare(folders).notes) == {
        "micro and macro average over different metrics: rouge_l (1 task), exact_match (1 task)",
        "seeds differ: 1 (a), 0 (b, c)",
        ONE_SEED,
        "trainable parameters differ by more than 5 %: 1,000 (a, c), 2,000 (b)",
        "train.learning_rate differs: 0.001 (a, c), 0.002 (b)",
        "mixture.kind differs: proportional (a, b), uniform (c)",
        "too few log lines to say whether the loss had flattened: a, b, c",
        "no zero-shot and no majority run here: add one to see how much of a score was learned",
    }


def test_one_seed_and_few_seeds_are_noted_by_column(run: Run) -> None:
    folders = [run("a", {"t": [1, 2]}, seed=s) for s in range(3)] + [run("b", {"t": [1, 2]})]
    folders += [run("c", {"t": [1, 2]}, seed=s) for s in range(5)]
    notes = compare(folders).notes
    assert [n.partition(":")[0] for n in notes if "seed" in n.partition(":")[0]] == [
        "seeds differ",
        "one seed (b)",
        "fewer than five seeds (a)",
    ]


def test_a_loss_that_still_falls_is_told_and_one_that_is_flat_is_not(run: Run) -> None:
    falling = [(step, 10 - step / 20) for step in range(1, 101)]
    flat = [(step, 5.0 + step % 2 / 10) for step in range(1, 101)]
    found = compare([run("a", {"t": [1]}, losses=falling), run("b", {"t": [1]}, losses=flat)])
    (curve,) = found.columns[0].curves
    assert (curve.before, curve.last) == pytest.approx((10 - 85.5 / 20, 10 - 95.5 / 20))
    told = [note for note in found.notes if "still fell" in note]
    assert told == ["a: training loss still fell in the last tenth of the steps, 5.725 → 5.225"]
    assert re.findall(r"5\.\d{3}(?: falling)?(?= \|)", to_markdown(found)) == ["5.225 falling", "5.050"]


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


def test_adaptations_to_other_tasks_are_left_out_of_a_folder(run: Run, tmp_path: Path) -> None:
    run("a", {"t": [1, 0]})
    run("b", {"t": [1, 1]}, method="lora", adapt={"run": "elsewhere"})
    assert len(compare([tmp_path]).columns) == 2, "the same tasks"
    new = run("c", {"u": [1, 1]}, method="lora", adapt={"run": "elsewhere"})
    found = compare([tmp_path])
    assert [column.label for column in found.columns] == ["a", "b"]
    assert f"left out of {tmp_path}, as `dyads adapt` taught them other tasks: c-seed0" in found.notes
    with pytest.raises(RunError, match="they differ in tasks"):
        compare([tmp_path, new])


def test_a_folder_of_runs_stands_for_the_scored_ones_in_it(run: Run, tmp_path: Path) -> None:
    run("a", {"t": [1]})
    (run("b", {"t": [1]}) / "scores.json").unlink()
    (tmp_path / "logs").mkdir()  # as a study has beside its runs
    found = compare([tmp_path])
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
    return [
        run(
            f"method-{i}-of-many",
            {t: [x - i * step for x, step in zip(v, (0.9, 1.0, 1.1), strict=True)] for t, v in values.items()},
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [1, 3, 30])
def test_nothing_is_cut_in_a_terminal_of_80_columns(run: Run, count: int) -> None:
    text = Text.from_ansi(to_terminal(compare(columns(run, count, tasks=8)), width=80)).plain
    assert max(map(len, text.splitlines())) <= 80
    for i in range(count):
        assert f"method-{i}-of-many" in text
    names = [line.split()[0] for line in text.splitlines() if line.startswith("task") and "…" in line]
    assert all("_name" in name for name in names)
    if count < 14:
        assert "…" in text  # only names of tasks are shortened
    numbers = re.findall(r"^task000_name .*$", text, flags=re.M)
    assert sum(len(line.split()) - 2 for line in numbers) == count


def test_a_terminal_shows_metrics_where_they_differ_and_times_in_fit_units(run: Run) -> None:
    folder = run("a", {"t": [1, 2], "u": [3, 4]}, metrics={"u": "exact_match"})
    scores = json.loads((folder / "scores.json").read_text())
    scores["seconds"] = {"train": 7200.0, "evaluate": 180.0}
    (folder / "scores.json").write_text(json.dumps(scores))
    accept(folder)
    text = Text.from_ansi(to_terminal(compare([folder]))).plain
    assert re.search(
        r"^Scores by task\ntask +metric +n +a\nt +rouge_l +2 +1\.5\nu +exact_match +2 +3\.5$", text, flags=re.M
    )
    assert re.search(r"^a +1,000 +1 +100 +2\.0 h +3 min +–$", text, flags=re.M)


def test_markdown_has_names_in_full_and_the_best_in_bold(run: Run) -> None:
    text = to_markdown(compare(columns(run, 2)))
    assert "| task200_long_long_name | rouge_l | v1 | 3 | **50.7** | 49.7 |" in text
    assert "| method-1-of-many − method-0-of-many | -1.0 | -1.1 to -0.9 | < 0.001 | (behind) | -1.0 |" in text
    assert "Row minus column, paired 95 % intervals over instances alone." in text


def test_csv_has_a_line_for_every_value(run: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(compare(columns(run, 2))))))
    assert len(rows) == 2 * (3 + 2) + 2
    assert [row["level"] for row in rows[:5]] == ["task", "task", "task", "micro", "macro"]
    assert (rows[0]["task"], rows[0]["label"], float(rows[0]["value"])) == ("task000_name", "method-0-of-many", 50.0)
    shown = [(row["level"], row["label"], row["minus"], row["value"], row["verdict"]) for row in rows[-2:]]
    assert shown == [(x, "method-1-of-many", "method-0-of-many", "-1", "behind") for x in ("micro", "macro")]
    assert {row["minus"] for row in rows[:-2]} == {""}


def test_json_holds_everything(run: Run) -> None:
    content = json.loads(to_json(compare(columns(run, 2), baseline="method-0-of-many")))
    assert content["columns"][1]["scores"]["task000_name"]["value"] == 49.0
    assert content["pairs"][0]["win_rate"] == 1.0
    assert content["baseline"] == "method-0-of-many"
    assert [(pair["macro_verdict"], pair["macro_holm"]) for pair in content["pairs"]] == [
        ("undecided", None),
        ("behind", pytest.approx(0.0, abs=1e-6)),
    ]


def test_an_interval_of_one_instance_is_left_open(run: Run) -> None:
    found = compare([run("a", {"t": [10]}), run("b", {"t": [20]})])
    assert "| b − a | +10.0 | – | 1.000 | undecided |" in to_markdown(found)
    assert json.loads(to_json(found))["columns"][0]["micro"]["low"] is None
    row = next(csv.DictReader(io.StringIO(to_csv(found))))
    assert (row["value"], row["low"], row["high"]) == ("10", "", "")
    assert "–" in to_terminal(found)


def test_with_a_baseline_only_its_differences_are_shown(run: Run) -> None:
    text = to_markdown(compare(columns(run, 3), baseline="method-1-of-many"))
    shown = re.findall(r"^\| (\S+) − (\S+) \|", text, flags=re.M)
    assert shown == [("method-0-of-many", "method-1-of-many"), ("method-2-of-many", "method-1-of-many")]

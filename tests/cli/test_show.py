# SPDX-License-Identifier: Apache-2.0
"""`dyads show` prints scored instances with prompt, answer, reference and score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dyads.cli import main
from dyads.runs.folder import RunFolder
from made_runs import write_run


def show(run: RunFolder | Path, *arguments: str) -> Result:
    path = run.path if isinstance(run, RunFolder) else run
    return CliRunner().invoke(main, ["show", str(path), *arguments], env={"COLUMNS": "80"})


def test_instances_of_a_real_run_have_their_prompts(trained: Callable[..., RunFolder]) -> None:
    run = trained("lora")
    prediction = run.predictions("first_word")[0]
    output = show(run, "--task", "first_word", "--n", "1").output
    words, question, _ = prediction["prompt"].split("\n")
    assert f"  prompt     {words}\n             {question}\n             Answer:\n" in output
    assert f"  reference  {prediction['references'][0]}\n" in output
    assert output.endswith("1 of 4 shown; --n 4 shows all\n")
    listed = show(run).output
    assert all(f"\n{row['task']} " in listed for row in run.scores()["scores"])
    assert "--task TASK --wrong prints" in listed


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with one task of seven instances; instance i has the score that its id ends with."""
    values = [100, 20, 0, 100, 60, 0, 100]
    folder = write_run(tmp_path / "run", "a", {"t": values})
    rows: list[Any] = [
        {**row, "id": f"{i}-{value}", "prompt": f"question {i}\n"}
        for i, (row, value) in enumerate(zip(folder.predictions("t"), values, strict=True))
    ]
    folder.write_results({"t": rows}, folder.scores())
    return folder


def ids(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [json.loads(line)["id"] for line in result.output.splitlines()]


def test_wrong_ones_come_alone_and_the_worst_first(run: RunFolder) -> None:
    assert ids(show(run, "--json")) == ["0-100", "1-20", "2-0", "3-100", "4-60", "5-0", "6-100"]
    assert ids(show(run, "--wrong", "--json")) == ["2-0", "5-0", "1-20", "4-60"]
    assert ids(show(run, "--wrong", "--json", "--n", "3")) == ["2-0", "5-0", "1-20"]
    text = show(run, "--task", "t", "--wrong").output
    assert text.startswith("t: rouge_l 54.3, 4 of 7 below full score\n\n2-0  rouge_l 0.0\n  prompt     question 2\n")
    assert "shows all" not in text
    assert show(run).output.endswith("5 of 7 shown; --n 7 shows all\n")


def test_a_metric_without_values_of_instances_tells_right_from_wrong(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "a", {"t": [0.0] * 4}, metrics={"t": "pearson"})
    answers = ["1.5", "1.0", "3.0", "no number"]
    rows: list[Any] = [
        {"id": answer, "prompt": "q", "prediction": answer, "references": ["1", "1.0"], "scores": {}}
        for answer in answers
    ]
    folder.write_results({"t": rows}, folder.scores())
    assert ids(show(folder, "--wrong", "--json")) == ["no number", "3.0", "1.5"]


def test_texts_keep_their_lines_and_lose_their_control_characters(run: RunFolder) -> None:
    long = "def f():\n    return 1\n" + "x" * 5000 + "\nthe end"
    row: Any = {
        "id": "0",
        "prompt": long,
        "prediction": "\x1b[31m  two\n  lines",
        "references": [f"reference {i}" for i in range(8)],
        "scores": {"rouge_l": 0.0},
    }
    run.write_results({"t": [row]}, run.scores())
    output = show(run).output
    assert "  prompt     def f():\n                 return 1\n" in output
    assert "  answer     \\u001b[31m  two\n               lines\n" in output
    assert "characters left out; --whole prints them" in output
    assert "             the end\n" in output
    assert "  or         reference 1\n" in output
    assert "… and 3 more\n" in output
    assert max(map(len, output.splitlines())) <= 80
    assert "x" * 60 in show(run, "--whole").output
    assert "".join(show(run, "--whole").output.split()).count("x") >= 5000


def test_runs_scored_earlier_have_no_prompts_and_the_others_say_what_is_missing(tmp_path: Path, run: RunFolder) -> None:
    earlier = write_run(tmp_path / "earlier", "a", {"t": [0.0], "u": [100.0]})
    assert "(not kept by this evaluation; `dyads evaluate`" in " ".join(show(earlier, "--task", "t").output.split())
    assert show(earlier, "--task", "u", "--wrong").output.endswith("no instance is below full score\n")
    assert "has no scores of a task 'T' – did you mean 't'?" in show(run, "--task", "T").output
    (run.path / "scores.json").unlink()
    assert "has no scores.json: it was not evaluated" in show(run).output

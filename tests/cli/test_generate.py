# SPDX-License-Identifier: Apache-2.0
"""`dyads generate` renders rows as the training did, and warns of raw prompts that lack their task's form."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dyads.cli import main
from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder
from dyads.tasks import load_suite
from dyads.training.train import train

Trained = Callable[..., RunFolder]


def generate(run: RunFolder, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["generate", str(run.path), *map(str, arguments)])


def rows_of(run: RunFolder) -> list[dict[str, Any]]:
    """The test instances of the run as rows, with the predictions of its evaluation."""
    rows = []
    for task in load_suite(run.recipe().tasks).tasks:
        for example, scored in zip(task.test, run.predictions(task.name), strict=True):
            words = example.prompt.split("\n")[0].removeprefix("Words: ")
            rows.append(
                {"task": task.name, "input": words, "output": example.references[0], "was": scored["prediction"]}
            )
    return rows


def test_answers_are_as_long_as_those_of_the_evaluation(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = train(tiny("zero-shot", evaluate={"max_new_tokens": None}), tmp_path / "run")
    row = next(row for row in rows_of(run) if len(row["was"].split()) > 5)
    arguments = ("--task", row["task"], "--input", row["input"])
    assert generate(run, *arguments).stdout == row["was"] + "\n"
    assert generate(run, *arguments, "--max-new-tokens", "4").stdout.split() == row["was"].split()[:4]
    kept = json.loads((run.path / "templates.json").read_text())
    assert kept[row["task"]].pop("max_new_tokens") == load_suite(run.recipe().tasks).tasks[0].max_new_tokens


@pytest.mark.parametrize("method", ["lora", "more"])
def test_rows_are_answered_as_the_evaluation_answered_them(method: str, trained: Trained, tmp_path: Path) -> None:
    run = trained(method)
    rows, file, out = rows_of(run), tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = generate(run, "--file", file, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Warning" not in result.output
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [a["prediction"] for a in answers] == [row["was"] for row in rows]
    assert len({a["prediction"] for a in answers}) > 1

    sheet = tmp_path / "rows.csv"
    with sheet.open("w", encoding="utf-8", newline="") as cells:
        csv.writer(cells).writerows([["task", "input"], *([row["task"], row["input"]] for row in rows)])
    generate(run, "--file", sheet, "--out", out)
    again = [json.loads(line)["prediction"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert again == [row["was"] for row in rows]

    row = rows[0]
    result = generate(run, "--task", row["task"], "--input", row["input"])
    assert (result.stdout, result.stderr) == (row["was"] + "\n", "")


def test_a_column_of_the_task_may_be_called_prompt(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [{"task": "first", "prompt": f"fox lake {i}", "response": "fox"} for i in range(10)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"input": "prompt", "output": "response"}
    tasks = {"family": "files", "path": str(file), "columns": columns, "instructions": "Which word comes first?"}
    run = train(tiny("lora", tasks=tasks), tmp_path / "run")
    (task,) = load_suite(run.recipe().tasks).tasks
    asked = tmp_path / "asked.jsonl"
    texts = [example.prompt.split("\n")[-2] for example in task.test]
    asked.write_text("".join(json.dumps({"prompt": text, "response": ""}) + "\n" for text in texts), encoding="utf-8")
    result = generate(run, "--file", asked)
    assert "Warning" not in result.stderr
    answers = [json.loads(line)["prediction"] for line in result.stdout.splitlines()]
    assert answers == [scored["prediction"] for scored in run.predictions(task.name)]
    assert "Warning" in generate(run, "--prompt", "fox lake").stderr, "a prompt of the command line is one as a whole"


def test_conversations_are_answered_in_the_forms_that_training_reads(
    tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    turns = [[{"from": "human", "value": f"fox lake {i}"}, {"from": "gpt", "value": "fox"}] for i in range(10)]
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"conversations": one}) + "\n" for one in turns), encoding="utf-8")
    run = train(tiny("lora", tasks={"family": "chat", "path": str(file)}), tmp_path / "run", evaluate=False)
    asked = [turns[3][:1]]
    one, cell = tmp_path / "one.jsonl", tmp_path / "cell.csv"
    one.write_text(json.dumps({"conversations": asked[0]}) + "\n", encoding="utf-8")
    with cell.open("w", encoding="utf-8", newline="") as sheet:
        csv.writer(sheet).writerows([["messages"], [json.dumps([{"role": "user", "content": "fox lake 3"}])]])
    answers = {
        json.loads(result.stdout)["prediction"]
        for result in (generate(run, "--file", one), generate(run, "--file", cell))
    }
    assert answers == {generate(run, "--task", "talk", "--input", "fox lake 3").stdout.strip()}


def test_a_raw_prompt_without_the_tasks_form_is_said_and_read_as_it_is(trained: Trained, tmp_path: Path) -> None:
    run = trained("lora")
    whole = "Words: fox lake\nWhich word comes first?\nAnswer:"
    for prompt in (whole, whole + " ", whole + "\n"):
        assert generate(run, "--task", "first_word", "--prompt", prompt).stderr == ""
    warned = generate(run, "--task", "first_word", "--prompt", "fox lake")
    assert warned.exit_code == 0
    assert warned.stdout.strip()
    assert warned.stderr == (
        "Warning: --prompt 'fox lake': not in the form of task 'first_word', in which the\n"
        "adapter was trained; read as it is.\n"
        "The form is:\n  | Words: {input}\n  | Which word comes first?\n  | Answer: \n"
        "--task NAME --input TEXT puts a text into it.\n"
    )
    assert "task 'count_words'" in generate(run, "--task", "count_words", "--prompt", whole).stderr, (
        "another task's form"
    )
    assert generate(run, "--prompt", whole).stderr == "", "the form of one of the tasks"
    assert "not in the form of any task of the run" in generate(run, "--prompt", "fox").stderr

    file = tmp_path / "rows.jsonl"
    rows = [{"task": "first_word", "prompt": text} for text in ("fox", whole, "lake")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "rows.jsonl, line 1 and 1 more: not in the form" in " ".join(generate(run, "--file", file).stderr.split())


def test_a_raw_prompt_of_a_chat_run_is_said_to_lack_its_form(trained: Trained, tmp_path: Path) -> None:
    """A text is never in the form of a chat template, whose special tokens are text in it."""
    run = trained("lora")
    run.write_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    templates = json.loads((run.path / "templates.json").read_text())
    whole = "Words: fox lake\nWhich word comes first?\nAnswer:"
    assert generate(run, "--task", "first_word", "--prompt", whole).stderr == "", "a task that no chat template renders"
    templates["first_word"]["chat"] = True
    (run.path / "templates.json").write_text(json.dumps(templates))
    run.accept()
    said = generate(run, "--task", "first_word", "--prompt", whole).stderr
    assert "not in the form of task 'first_word'" in " ".join(said.split())
    assert "The form is, as a user's message of the chat template:\n  | Words: {input}\n" in said
    assert generate(run, "--prompt", whole).stderr != ""
    assert generate(run, "--task", "first_word", "--input", "fox lake").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "fox"], "--input 'fox': no task, so no form to put it into; add --task NAME – known: first_word"),
        (["--task", "first_wrd", "--input", "fox"], "does not know task 'first_wrd' – did you mean 'first_word'?"),
        (
            ["--task", "first_word", "--column", "inptu=fox"],
            "--column 'inptu=fox': unknown column 'inptu' of task 'first_word' – did you mean 'input'?",
        ),
        (["--task", "first_word", "--column", "wrod=fox", "--input", "a"], "unknown column 'wrod'"),
        (["--task", "first_word", "--column", "input=fox", "--input", "a"], "have the columns input: give each by"),
        (["--task", "first_word", "--column", "input"], "--column input: write it as NAME=TEXT"),
        (["--task", "first_word", "--column", "input=a", "--column", "input=b"], "--column input is given twice"),
        (["--file", '{"task": "first_word", "inptu": "a"}'], "line 1: unknown column 'inptu' of task 'first_word'"),
        (["--file", '{"task": "first_word", "id": 3}'], "line 1: column 'input' is missing; it has no columns"),
        (["--file", '{"task": "first_word", "input": ["a"]}'], "line 1: 'input' must be text, got ['a']"),
        (["--file", '{"input": "a"}'], 'no task, so no form to put it into; add "task": "NAME" to the line, or --task'),
    ],
)
def test_rows_that_the_form_cannot_take_are_refused_before_a_model_is_loaded(
    arguments: list[str], message: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("lora")
    if arguments[0] == "--file":
        (tmp_path / "rows.jsonl").write_text(arguments[1] + "\n", encoding="utf-8")
        arguments = ["--file", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr("dyads.scoring.evaluate.generate", None)
    result = generate(run, *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_other_columns_of_a_row_pass_through(trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"task": "first_word", "input": "fox lake", "note": "mine", "output": ["fox"], "split": "test", "id": 7}
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    result = generate(trained("lora"), "--file", file)
    answer = json.loads(result.stdout)
    assert {key: answer[key] for key in row} == row
    assert set(answer) - set(row) == {"prediction"}


def test_the_only_task_of_a_run_needs_no_name(trained: Trained, tmp_path: Path) -> None:
    run = trained("lora")
    facts = json.loads((run.path / "env.json").read_text())
    (run.path / "env.json").write_text(json.dumps({**facts, "tasks": ["first_word"]}))
    named = generate(run, "--task", "first_word", "--input", "fox lake")
    assert generate(run, "--input", "fox lake").output == named.output != ""


def test_an_encoder_reads_the_columns_of_its_task(trained: Trained) -> None:
    run = trained("mode", "bert")
    result = generate(run, "--task", "mnli", "--column", "premise=fox", "--column", "hypothesis=fox yes")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() in ("entailment", "neutral", "contradiction")
    assert result.stdout == generate_pair(run)
    refused = generate(run, "--task", "mnli", "--input", "fox")
    assert "--input 'fox': the prompts of task 'mnli' have the columns hypothesis, premise: give each" in refused.output


def generate_pair(run: RunFolder) -> str:
    (run.path / "pair.jsonl").write_text(json.dumps({"task": "mnli", "prompt": ["fox", "fox yes"]}) + "\n")
    return str(json.loads(generate(run, "--file", run.path / "pair.jsonl").stdout)["prediction"]) + "\n"


def test_bytes_of_the_command_line_that_are_not_utf_8_are_refused_before_a_model_is_loaded(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyads.scoring.evaluate.Answerer", None)
    result = generate(trained("lora"), "--task", "first_word", "--input", "a\udcff")
    assert result.exit_code == 2
    assert "prompt 1 is not Unicode text, but has half of a surrogate pair: give it as UTF-8" in result.output

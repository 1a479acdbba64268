# SPDX-License-Identifier: Apache-2.0
"""The command line finds its verbs, passes arguments to the rooms behind them, and prints a refusal as one message."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import dyads.cli
from dyads import __version__
from dyads.cli import main
from dyads.console import Reporter, TextReporter
from dyads.errors import ConfigError, RunError
from dyads.recipe.load import parse_recipe
from dyads.recipe.spec import Recipe
from dyads.runs.contents import Prediction, Scores
from dyads.runs.folder import RunFolder
from dyads.tasks import families
from dyads.tasks.files import FilesSpec
from dyads.tasks.starter import StarterSpec

VERBS = tuple(sorted(path.stem for path in Path(dyads.cli.__file__).parent.glob("[!_]*.py")))
RECIPE = "name: a\nseed: 3\nmodel: {name: tiny}\nmethod: {name: zero-shot}\ntasks: {family: starter}\n"


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dyads.cli", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def scored(path: Path, name: str = "a", value: float = 50.0) -> RunFolder:
    folder = RunFolder.create(path, parse_recipe(RECIPE.replace("name: a", f"name: {name}", 1), "x"))
    row = {"task": "t", "version": 1, "fingerprint": "f", "category": "", "metric": "rouge_l", "value": value, "n": 1}
    scores: dict[str, Any] = {
        "schema": 1,
        "run": name,
        "method": "zero-shot",
        "split": "test",
        "seed": 3,
        "parameters": 0,
        "steps": 0,
        "seconds": {"train": 0.0, "evaluate": 1.0},
        "scores": [{**row, "higher_is_better": True, "headline": True}],
        "micro": {"headline": value},
        "macro": {"headline": value},
    }
    answers: list[Prediction] = [{"id": "0", "prediction": "p", "references": ["r"], "scores": {"rouge_l": value}}]
    folder.write_results({"t": answers}, Scores(**scores))  # type: ignore[typeddict-item]
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces a module by one with these functions, so that no verb imports torch."""

    def put(name: str, **functions: Any) -> None:
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return put


# --- the command itself -----------------------------------------------------------------------------------------------


def test_help_lists_every_verb_with_an_uncut_description() -> None:
    listed = invoke("--help").output.split("Commands:")[1]
    assert all(f"\n  {verb}  " in listed for verb in VERBS)
    assert "..." not in listed


@pytest.mark.parametrize("module", ["dyads", "dyads.cli"])
def test_the_package_runs_as_a_program(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"dyads, version {__version__}\n")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom dyads.cli import main\n"
        f"for verb in ([], *([v] for v in {VERBS})):\n main([*verb, '--help'], standalone_mode=False)\n"
        "print({'torch', 'transformers', 'peft', 'pydantic', 'numpy', 'scipy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_an_example_and_fits_80_columns(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    assert f"  dyads {verb}" in result.output.split("Example")[1]
    assert max(map(len, [*result.output.splitlines(), *invoke("--help").output.splitlines()])) <= 80


def test_a_file_beside_the_others_is_a_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "@click.command(short_help='Greet.')\ndef command() -> None:\n    click.echo('hello')\n"
    (tmp_path / "only_in_this_test.py").write_text(f"import click\n\n\n{command}")
    monkeypatch.setattr(dyads.cli, "__path__", [*dyads.cli.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "dyads.cli.only_in_this_test", raising=False)
    assert "\n  only_in_this_test  Greet.\n" in invoke("--help").output
    assert invoke("only_in_this_test").output == "hello\n"
    sys.modules.pop("dyads.cli.only_in_this_test")


def test_version_is_the_packages() -> None:
    assert invoke("--version").output == f"dyads, version {__version__}\n"


def test_an_unknown_verb_and_an_unknown_option_get_near_names() -> None:
    result = invoke("trian")
    assert result.exit_code == 2
    assert "there is no verb 'trian' – did you mean 'train'" in result.output
    result = invoke("train", "--sett", "a=b")
    assert result.exit_code == 2
    assert "No such option '--sett'" in result.output


def test_a_refusal_is_one_message_without_a_traceback(tmp_path: Path) -> None:
    recipe = str(tmp_path / "none.yaml")
    done = process("train", recipe)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: there is no recipe at '{recipe}'")
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match="there is no recipe at"):
        main(["--debug", "train", recipe], standalone_mode=False)


def test_every_verb_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(dyads.cli, "keep_memory", lambda: calls.append("kept"))
    invoke("train", "none.yaml")
    assert calls == ["kept"]
    invoke("--help")
    assert calls == ["kept"]


def test_an_interruption_ends_with_130(recipe: Path, fake: Callable[..., None]) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    fake("dyads.training.train", train=train)
    result = invoke("train", recipe)
    assert result.exit_code == 130
    assert "interrupted" in result.output


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_passes_on_the_recipe_with_its_overrides(
    recipe: Path, tmp_path: Path, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def train(loaded: Recipe, out: Path, **how: Any) -> RunFolder:
        assert type(how.pop("reporter")) is TextReporter
        seen.append((loaded, out, how))
        return scored(tmp_path / "made")

    fake("dyads.training.train", train=train)
    monkeypatch.chdir(tmp_path)
    result = invoke("train", recipe, "--set", "train.steps=7", "--set", "seed=5")
    assert result.exit_code == 0, result.output
    loaded, out, how = seen[0]
    assert (loaded.train.steps, loaded.seed) == (7, 5)
    assert (out, how) == (Path("runs/a-seed5"), {"resume": False, "evaluate": True})
    assert "micro 50.0, macro 50.0" in result.output

    def train_only(_: Recipe, out: Path, *, reporter: Reporter, **how: Any) -> RunFolder:
        seen.append((out, how))
        return RunFolder(out)

    fake("dyads.training.train", train=train_only)
    result = invoke("train", recipe, "--out", "there", "--resume", "--no-evaluate")
    assert seen[1] == (Path("there"), {"resume": True, "evaluate": False})
    assert "there: not scored\nnext: dyads evaluate there\n" in result.output
    invoke("train", recipe, "--out", "there", "--auto-resume", "--no-evaluate")
    assert seen[2] == (Path("there"), {"resume": "auto", "evaluate": False})


def test_train_refuses_a_wrong_recipe_before_anything_starts(recipe: Path, fake: Callable[..., None]) -> None:
    fake("dyads.training.train", train=None)
    result = invoke("train", recipe, "--set", "train.stepz=7")
    assert result.exit_code == 2
    assert result.output == "Error: --set train.stepz=7: unknown key 'train.stepz' – did you mean 'steps'?\n"
    assert "there is no recipe at" in invoke("train", "nothing.yaml").output


def test_train_lists_the_keys_of_a_recipe() -> None:
    result = invoke("train", "--keys")
    assert result.exit_code == 0
    assert "train.learning_rate = 0.001\n    Peak learning rate" in result.output
    assert result.output.startswith("extends\n    Another recipe")
    # the help is wrapped at 80 columns
    assert f"tasks.family One of: {', '.join(families())} The tasks that are learned" in " ".join(result.output.split())
    assert "tasks.family: starter\n    Twelve small text tasks" in result.output
    assert "model.dtype = bfloat16\n    One of: float32, bfloat16, float16\n" in result.output
    assert "evaluate.split = test\n    One of: test, validation, train\n" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


# --- evaluate, compare ------------------------------------------------------------------------------------------------


@pytest.fixture
def scoring(tmp_path: Path, fake: Callable[..., None]) -> tuple[Path, list[dict[str, Any]]]:
    """A run, and the arguments of the function that scores it, which reports a stand-in where there is a policy."""
    folder = scored(tmp_path / "a")
    seen: list[dict[str, Any]] = []

    def evaluate(run: RunFolder, *, on_stand_in: Callable[[str], object], reporter: Reporter, **how: Any) -> Scores:
        seen.append({"run": run.path, **{key: value for key, value in how.items() if value is not None}})
        if how["unseen"]:
            on_stand_in("t is unseen: answered as u (similarity 0.50)")
        return folder.scores()

    fake("dyads.scoring.evaluate", evaluate=evaluate)
    return folder.path, seen


def test_evaluate_passes_on_split_and_limit_and_prints_the_scores(scoring: tuple[Path, list[dict[str, Any]]]) -> None:
    run, seen = scoring
    result = invoke("evaluate", run, "--split", "validation", "--limit", "5")
    assert seen == [{"run": run, "split": "validation", "limit": 5}]
    assert result.output.splitlines() == ["t  rouge_l        50.0  n=1", "micro 50.0, macro 50.0, test split"]


def test_evaluate_takes_other_tasks_from_a_recipe_a_file_or_a_run(
    scoring: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run, seen = scoring
    sheet, out = tmp_path / "new.csv", tmp_path / "out"
    (tmp_path / "part.yaml").write_text("tasks: {family: starter, names: [initials]}\n")
    for tasks in (tmp_path / "part.yaml", sheet, run):
        result = invoke("evaluate", run, "--tasks", tasks, "--unseen", "nearest", "--out", out)
        assert result.output.startswith("t is unseen: answered as u (similarity 0.50)\nt  rouge_l ")
    suites = [StarterSpec(names=("initials",)), FilesSpec(path=(sheet,)), StarterSpec()]
    assert seen == [{"run": run, "unseen": "nearest", "into": out, "suite": suite} for suite in suites]


def test_evaluate_refuses_tasks_that_it_cannot_find_or_has_no_place_for(
    scoring: tuple[Path, list[dict[str, Any]]], recipe: Path, tmp_path: Path
) -> None:
    run, seen = scoring
    (tmp_path / "bare.yaml").write_text("name: a\n")
    for options, message in [
        (["--tasks", str(recipe)], "--tasks needs --out, a new folder: the run keeps the scores of its own tasks"),
        (["--tasks", str(tmp_path / "no.yaml"), "--out", "x"], f"there is no recipe at '{tmp_path / 'no.yaml'}'"),
        (["--tasks", str(tmp_path / "bare.yaml"), "--out", "x"], "'tasks' is missing"),
        (["--tasks", str(tmp_path), "--out", "x"], f"'{tmp_path}' is no run: it has no config.yaml"),
        (["--unseen", "mean"], "another policy for unseen tasks than the run's own (error, by inputs) needs --out"),
        (["--unseen", "nearst"], "'nearst' is not one of 'error', 'nearest', 'mean'"),
    ]:
        result = invoke("evaluate", run, *options)
        assert result.exit_code == 2
        assert message in result.output
    assert not seen


def test_compare_writes_every_format(tmp_path: Path) -> None:
    runs = [scored(tmp_path / "a").path, scored(tmp_path / "b", "b", 60.0).path]
    assert "2 runs of tiny · test split · 1 task, 1 instance\n" in invoke("compare", *runs).output
    assert invoke("compare", *runs, "--format", "markdown").output.startswith("2 runs of tiny")
    for name in ("x.md", "x.csv", "x.json"):
        result = invoke("compare", *runs, "--out", tmp_path / name, "--baseline", "a")
        assert (result.exit_code, result.output) == (0, f"written to {tmp_path / name}\n")
    assert "| b − a | +10.0 |" in (tmp_path / "x.md").read_text()
    assert (tmp_path / "x.csv").read_text().startswith("level,")
    assert json.loads((tmp_path / "x.json").read_text())["baseline"] == "a"
    assert "there is no folder" in invoke("compare", *runs, "--out", tmp_path / "none" / "x.md").output


def test_compare_prints_no_colours_into_a_pipe(tmp_path: Path) -> None:
    result = invoke("compare", scored(tmp_path / "a").path)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_compare_takes_a_folder_of_runs_and_says_what_it_left_out(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    scored(runs / "a")
    scored(runs / "b", "b", 60.0)
    RunFolder.create(runs / "c", parse_recipe(RECIPE, "x"))
    (runs / "notes").mkdir()
    scored(runs / "more" / "d", "d", 70.0)
    scored(tmp_path / "elsewhere", "d", 70.0)
    result = invoke("compare", runs, tmp_path / "elsewhere", "--format", "markdown")
    assert result.output.startswith("3 runs of tiny")
    assert f"- left out of {runs}, as they have no scores: c, more\n" in result.output


# --- generate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo(tmp_path: Path, fake: Callable[..., None]) -> tuple[Path, list[Any]]:
    """A run whose model answers in capitals, and the arguments of `generate`."""
    seen: list[Any] = []

    def generate(
        _: RunFolder, prompts: list[str], tasks: list[str | None], *, on_stand_in: Any, reporter: Reporter, **how: Any
    ) -> list[str]:
        seen.append((prompts, tasks, how))
        if how["unseen"] != "error":
            on_stand_in("a task is unseen")
        return [prompt.upper() for prompt in prompts]

    fake("dyads.scoring.evaluate", generate=generate)
    return scored(tmp_path / "a").path, seen


def test_generate_answers_a_prompt_with_its_task(echo: tuple[Path, list[Any]]) -> None:
    run, seen = echo
    result = invoke("generate", run, "--prompt", "hello", "--task", "rte", "--max-new-tokens", "5")
    assert result.output == "HELLO\n"
    how = {"max_new_tokens": 5, "batch_size": 16, "unseen": "error", "description": None}
    assert seen == [(["hello"], ["rte"], how)]


def test_generate_reports_stand_ins_on_stderr(echo: tuple[Path, list[Any]]) -> None:
    run, seen = echo
    options = ("--prompt", "hello", "--task", "new", "--description", "Greet.")
    result = invoke("generate", run, *options, "--unseen", "nearest")
    assert (result.stdout, result.stderr) == ("HELLO\n", "a task is unseen\n")
    assert (seen[0][2]["unseen"], seen[0][2]["description"]) == ("nearest", "Greet.")
    assert "--description is for --unseen nearest" in invoke("generate", run, *options).output


def test_generate_answers_a_file_line_by_line(echo: tuple[Path, list[Any]], tmp_path: Path) -> None:
    run, seen = echo
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt": "ä", "task": "own", "id": 7}\n\n{"prompt": "b"}\n')
    assert invoke("generate", run, "--file", file, "--task", "other", "--out", out).exit_code == 0
    assert seen[0][:2] == (["ä", "b"], ["own", "other"])
    file.write_text('{"prompt": "a", "task": 0}\n{"prompt": "b", "task": null}\n')
    assert invoke("generate", run, "--file", file, "--task", "other").exit_code == 0
    assert seen[1][:2] == (["a", "b"], [0, "other"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0] == {"prompt": "ä", "task": "own", "id": 7, "prediction": "Ä"}
    assert invoke("generate", run, "--file", file).output.count("prediction") == 2


def test_generate_refuses_lines_it_cannot_read_and_no_or_two_sources(
    echo: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    run, _ = echo
    file = tmp_path / "in.jsonl"
    example = '{"task": "…", "input": "…"}'
    for text, message in [
        (
            '{"prompt": "a"}\n{"prompt": \n',
            f", line 2, column 12: not valid JSON: Expecting value; write one line {example} per question",
        ),
        (
            '[{"prompt": "a"}]\n',
            f', line 1: expected a JSON object, got [{{"prompt": "a"}}]; write one line {example} per question',
        ),
        (
            '{"task": "a"}\n',
            f', line 1: there is no input (there is only task); write {example}, or a "prompt"',
        ),
        ("{}\n", f', line 1: there is no input (the object is empty); write {example}, or a "prompt"'),
        (
            '{"input": "a", "task": "t"}\n',
            f""", line 1: '{run}' keeps no forms of tasks: give the whole text as --prompt, or as "prompt" in a file""",
        ),
        ('{"prompt": 3}\n', ', line 1: "prompt" must be text, got 3; put it in quotes'),
        (
            '{"prompt": "a"}\n\n{"prompt": " "}\n',
            ', line 3: "prompt" is empty; write the text for the model, or remove the line',
        ),
        ('{"prompt": "a", "task": 1.5}\n', ', line 1: "task" must be a name or an id, got 1.5'),
        ('{"prompt": "a", "task": true}\n', ', line 1: "task" must be a name or an id, got true'),
    ]:
        file.write_text(text)
        result = invoke("generate", run, "--file", file)
        assert (result.exit_code, result.output) == (2, f"Error: {file}{message}\n")
    for content in (b"", b"\n \n"):
        file.write_bytes(content)
        assert invoke("generate", run, "--file", file).output == (
            f"Error: '{file}' is empty; write one line {example} per question\n"
        )
    file.write_bytes(b"\xff")
    assert "in.jsonl: not UTF-8 text (byte 0); save it as UTF-8" in invoke("generate", run, "--file", file).output
    missing = invoke("generate", run, "--file", tmp_path / "none.jsonl").output
    assert missing == f"Error: no file '{tmp_path / 'none.jsonl'}'; write one line {example} per question\n"
    either = "give either --input (or --column), or --file, or --prompt"
    for two in (
        [],
        ["--file", file, "--prompt", "a"],
        ["--input", "a", "--prompt", "a"],
        ["--file", file, "--column", "a=b"],
    ):
        assert either in invoke("generate", run, *two).output


@pytest.fixture
def per_task(tmp_path: Path, fake: Callable[..., None]) -> Path:
    """A run of a method whose gates look at the task."""
    fake("dyads.scoring.evaluate", generate=None)
    recipe = parse_recipe(RECIPE.replace("{name: zero-shot}", "{name: more, r: 4}"), "x")
    folder = RunFolder.create(tmp_path / "more", recipe)
    folder.write_environment(tasks=["initials", "last_word"])
    return folder.path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", """no task, and the gates of 'more' look at the task; add "task": "NAME" to the line, or --task NAME"""),
        (', "task": "initial"', "the run does not know task 'initial' – did you mean 'initials'?"),
        (', "task": 2', "the run does not know task '2' – known: initials, last_word"),
    ],
)
def test_a_missing_or_unknown_task_is_refused_with_its_line_before_a_model_is_loaded(
    per_task: Path, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(f'{{"prompt": "a", "task": 1}}\n\n{{"prompt": "b"{line}}}\n')
    result = invoke("generate", per_task, "--file", file)
    assert result.exit_code == 2
    assert f"in.jsonl, line 3: {message}" in result.output


def test_a_prompt_without_a_task_is_refused(per_task: Path) -> None:
    output = invoke("generate", per_task, "--prompt", "a\nb").output
    assert output.startswith(
        r"Error: --prompt 'a\nb': no task, and the gates of 'more' look at the task; add --task NAME"
    )
    assert "does not know task 'x'" in invoke("generate", per_task, "--prompt", "a", "--task", "x").output


def test_a_policy_lets_unknown_names_pass_but_neither_ids_nor_prompts_without_a_task(
    per_task: Path, tmp_path: Path, fake: Callable[..., None]
) -> None:
    fake("dyads.scoring.evaluate", generate=lambda folder, prompts, tasks, **how: prompts)
    policy, file = ("--unseen", "mean"), tmp_path / "in.jsonl"
    assert invoke("generate", per_task, "--prompt", "a", "--task", "new", *policy).output == "a\n"
    for task, message in (
        ("2", "the run does not know task '2'"),
        ("null", "no task, and the gates of 'more' look at"),
    ):
        file.write_text(f'{{"prompt": "a", "task": {task}}}\n')
        assert f"in.jsonl, line 1: {message}" in invoke("generate", per_task, "--file", file, *policy).output


# --- methods, tasks, budget -------------------------------------------------------------------------------------------


def test_methods_lists_every_method_with_its_own_options() -> None:
    result = invoke("methods")
    assert result.exit_code == 0, result.output
    heads = [line.split()[0] for line in result.output.splitlines() if line and line[0] not in " O"]
    assert heads[0] == "lora"
    assert {"mode", "molora", "more"} < set(heads)
    assert heads[-2:] == ["zero-shot", "majority"]
    assert "num_experts = " in result.output
    shared = invoke("methods", "mode")
    assert "lora_dropout = 0.0" in shared.output
    assert shared.output.count("init_std = ") == 1
    assert "init_std = null\n" in shared.output
    assert "Rows of the shared A" in shared.output
    assert max(map(len, (result.output + shared.output).splitlines())) <= 80
    assert "unknown method 'moed' – did you mean" in invoke("methods", "moed").output


def test_the_columns_of_tasks_are_as_wide_as_their_longest_metric(tmp_path: Path) -> None:
    rows = [
        {"task": m, "input": f"{i}", "output": "a", "metric": m}
        for m in ("accuracy", "sni_exact_match")
        for i in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = invoke("tasks", "--family", "files", "--path", str(tmp_path)).output.splitlines()
    assert len({lines[0].index("version"), *(line.index("2 (") for line in lines[1:3])}) == 1


def test_tasks_lists_a_family_or_a_recipe_and_shows_a_prompt(recipe: Path) -> None:
    listed = invoke("tasks", "--family", "starter", "--option", "names=[initials, last_word]")
    assert listed.exit_code == 0, listed.output
    lines = listed.output.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["0", "initials"], ["1", "last_word"]]
    assert invoke("tasks", "--recipe", recipe).output.count("\n") > len(lines)
    assert "Answer: " in invoke("tasks", "--recipe", recipe, "--show", "initials").output
    assert (
        "no task 'initial' – did you mean 'initials'"
        in invoke("tasks", "--family", "starter", "--show", "initial").output
    )
    assert "give either --family or --recipe" in invoke("tasks").output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--family", "strter"], "--family strter: unknown task family 'strter' – did you mean 'starter'?"),
        (
            ["--family", "sni"],
            "--family sni: 'tasks.path' is missing (The folder that holds `tasks/` and `splits/`): add --path",
        ),
        (
            ["--family", "starter", "--option", "seed=x"],
            "--option seed=x: 'tasks.seed' must be a whole number, got 'x'",
        ),
        (
            ["--family", "starter", "--option", "sead=1"],
            "--option sead=1: unknown key 'sead' for tasks of family 'starter' – did you mean 'seed'?",
        ),
        (
            ["--family", "starter", "--option", "names=[initial]"],
            "--option names=[initial]: 'tasks.names': unknown starter task 'initial' – did you mean 'initials'?",
        ),
        (
            ["--family", "starter", "--option", "seed=x", "--option", "test_per_task=0"],
            (
                "--family starter: 2 mistakes\n  --option seed=x: 'tasks.seed' must be a whole number, got 'x'\n"
                "  --option test_per_task=0: 'tasks.test_per_task' must be at least 1, got 0"
            ),
        ),
        (
            ["--family", "starter", "--option", "family=sni"],
            "--family starter and --option family=sni are both given: remove one",
        ),
        (
            ["--family", "sni", "--path", "a", "--option", "path=b"],
            "--path a and --option path=b are both given: remove one",
        ),
        (["--recipe", "RECIPE", "--option", "seed=x"], "--option seed=x: 'tasks.seed' must be a whole number, got 'x'"),
    ],
)
def test_tasks_says_what_is_wrong_in_its_own_words(recipe: Path, options: list[str], message: str) -> None:
    result = invoke("tasks", *(recipe if option == "RECIPE" else option for option in options))
    assert (result.exit_code, result.output) == (2, f"Error: {message}\n")


@dataclass
class Count:
    trainable: int
    base: int = 100_000

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.base


@pytest.fixture
def budgets(fake: Callable[..., None]) -> list[Any]:
    """A budget in which every rank costs 100 parameters, and the arguments of its functions."""
    seen: list[Any] = []

    def count(*arguments: Any) -> Count:
        seen.append(arguments)
        return Count(100 * arguments[2]["r"])

    def solve(*arguments: Any, free: str, parameters: int, task_names: Any) -> tuple[int, Count]:
        seen.append((*arguments, free, parameters))
        return parameters // 100, Count(parameters // 100 * 100)

    def alternatives(*arguments: Any, free: str, parameters: int, task_names: Any) -> list[Any]:
        seen.append(("alternatives", *arguments, free, parameters))
        return [
            ({"r": 6, "num_experts": 9}, Count(parameters - 1)),
            ({"r": 1, "num_experts": 1}, Count(9 * parameters)),
        ]

    functions = {"count": count, "solve": solve, "alternatives": alternatives}
    fake("dyads.models", budget=SimpleNamespace(**functions, NEAR=0.03, WHERE=("target_modules", "modules_to_save")))
    return seen


def test_budget_counts(budgets: list[Any]) -> None:
    result = invoke("budget", "--model", "m", "--method", "lora", "--option", "r=34")
    assert result.output == "lora (r=34) on m\n  3,400 parameters, 3.40 % of the model's 100,000\n"


def test_budget_meets_a_number_or_another_method(budgets: list[Any]) -> None:
    result = invoke("budget", "--model", "m", "--method", "mode", "--option", "r=4", "--parameters", "2e3")
    assert budgets[-1] == ("m", "mode", {"r": 4}, "num_experts", 2000)
    assert result.output == (
        "mode (r=4, num_experts=20) on m\n"
        "  2,000 parameters, 2.00 % of the model's 100,000\n"
        "  +0.0 % of the budget 2,000\n"
    )
    options = ["--option", "target_modules=[q_proj, v_proj]"]
    invoke("budget", "--model", "m", "--method", "mode", *options, "--like", "lora:r=5,modules_to_save=[a,b]")
    modules = ["q_proj", "v_proj"]
    assert budgets[-2][:3] == ("m", "lora", {"target_modules": modules, "r": 5, "modules_to_save": ["a", "b"]})
    assert budgets[-1] == ("m", "mode", {"target_modules": modules}, "r", 500)


def test_budget_says_that_it_misses_and_proposes_another_pair(budgets: list[Any]) -> None:
    result = invoke("budget", "--model", "m", "--method", "mode", "--option", "r=4", "--parameters", "190")
    assert budgets[-1] == ("alternatives", "m", "mode", {"r": 4}, "num_experts", 190)
    assert result.output == (
        "mode (r=4, num_experts=1) on m\n"
        "  100 parameters, 0.10 % of the model's 100,000\n"
        "  -47.4 % of the budget 190\n"
        "  No other num_experts comes closer.\n"
        "  Closer with another pair:\n"
        "    --option r=6 --option num_experts=9             189  -0.5 %\n"
    )


def test_budget_fits_80_columns_however_many_options_there_are(budgets: list[Any]) -> None:
    options = [f"--option=target_modules={[f'layer{i}_proj' for i in range(9)]}", "--option=r=3"]
    result = invoke("budget", "--model", "packaged:smollm2-135m", "--method", "mode", *options, "--parameters", "1e12")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parameters", "0.5"], "--parameters must be a whole number from 1, got 0.5"),
        (["--parameters", "inf"], "--parameters must be a whole number from 1, got inf"),
        (["--parameters", "nan"], "--parameters must be a whole number from 1, got nan"),
        (
            ["--parameters", "9e3", "--option", "r=4", "--option", "num_experts=16"],
            "r and num_experts are both given, so neither can be chosen to meet the budget: remove one",
        ),
        (["--parameters", "5", "--like", "lora:r=1"], "give either --parameters or --like"),
        (["--solve", "r"], "--solve r needs a budget"),
        (["--solve", "r", "--parameters", "5", "--option", "r=4"], "--solve r chooses r: remove --option r=4"),
        (["--option", "r"], "--option r: write it as key=value"),
    ],
)
def test_budget_refuses_contradictions(budgets: list[Any], options: list[str], message: str) -> None:
    result = invoke("budget", "--model", "m", "--method", "mode", *options)
    assert result.exit_code == 2
    assert message in result.output


def test_errors_of_other_rooms_are_printed_unchanged(recipe: Path, fake: Callable[..., None]) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise RunError("loss became nan at step 3")

    fake("dyads.training.train", train=train)
    result = invoke("train", recipe)
    assert (result.exit_code, result.output) == (2, "Error: loss became nan at step 3\n")


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_one_line(
    recipe: Path, tmp_path: Path, reason: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(reason, os.strerror(reason), str(path))

    monkeypatch.setattr(Path, "mkdir", fails)
    result = invoke("train", recipe, "--out", tmp_path / "a")
    assert (result.exit_code, result.output) == (2, f"Error: {os.strerror(reason)}: '{tmp_path / 'a'}'\n")
    assert not (tmp_path / "a").exists()


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    rows = [{"task": "a\x1b[2J\u202eb", "input": f"{i}\x1b[31m", "output": "x"} for i in range(12)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options in ((), ("--show", "a\x1b[2J\u202eb")):
        output = invoke("tasks", "--family", "files", "--path", tmp_path / "tasks.jsonl", *options).output
        assert "\x1b[2J" not in output
        assert "\x1b[31m" not in output
        assert "\u202e" not in output
    assert "a\\u001b[2J\\u202eb" in invoke("tasks", "--family", "files", "--path", tmp_path / "tasks.jsonl").output

# SPDX-License-Identifier: Apache-2.0
"""Screens of processes: a training in a terminal, in a log, interrupted, and in a terminal without UTF-8."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dyads.cli
import forked
from dyads.cli import main
from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder

DYADS = [sys.executable, "-m", "dyads.cli"]


@pytest.fixture
def recipe(tiny: Callable[..., Recipe], tmp_path: Path) -> Path:
    """A recipe of a few moments, with a long name and many options."""
    path = tmp_path / "recipe.yaml"
    made = tiny("mode", train={"steps": 12, "save_steps": 5, "logging_steps": 4})
    path.write_text(made.resolved_yaml(), encoding="utf-8")
    return path


def in_terminal(arguments: list[str], cwd: Path, columns: int = 80) -> tuple[int, str]:
    """The exit code of a command in a terminal of this width, and everything that it drew."""
    with forked.threads():
        child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        forked.child(lambda: main(arguments), cwd, {**environment, "TERM": "xterm"})
    drawn, ends = b"", time.monotonic() + 600
    while time.monotonic() < ends:
        if select.select([terminal], [], [], 1)[0]:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # the process has closed its side
                break
            if not part:
                break
            drawn += part
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), drawn.decode("utf-8")


def lines_of(drawn: str) -> list[str]:
    """The lines as they were drawn, each version of a rewritten line by itself, without colours."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn))


def test_a_list_of_tasks_with_long_names_fits_80_columns(tmp_path: Path) -> None:
    name = "a_task_with_a_long_name_" + "x" * 30
    rows = [{"task": name, "input": f"q {n}", "output": "yes"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = ["tasks", "--family", "files", "--path", "rows.jsonl"]
    code, drawn = in_terminal(arguments, tmp_path)
    lines = lines_of(drawn)
    assert code == 0, drawn
    assert max(map(len, lines)) <= 80
    assert lines[2:4] == [f"   0  {name}", *(line for line in lines if line.startswith("         10 "))]
    code, drawn = in_terminal(arguments, tmp_path, 200)
    assert f"   0  {name}       10" in drawn


def test_a_training_in_a_terminal_fits_80_columns(recipe: Path, tmp_path: Path) -> None:
    code, drawn = in_terminal(["train", "recipe.yaml", "--out", "run"], tmp_path)
    lines = lines_of(drawn)
    assert code == 0, drawn
    ours = [line for line in lines if not line.startswith("[transformers]")]
    assert max(map(len, ours)) <= 80
    assert ours[0] == "reading recipe.yaml, its tasks and its model …"
    starts = [line.split()[0] for line in ours if line.startswith("  ") and not line.startswith("    ")]
    assert starts[:7] == ["model", "method", "trains", "tasks", "steps", "log", "expect"]
    trained = [line for line in ours if line.startswith("training")]
    assert re.search(r"^training \S+ +12/12 loss \d\.\d+ · [\d,]+ tokens/s · took 0:\d\d$", trained[-1])
    assert re.search(r"^answering \S+ 12/12 [\d,]+ instances/s · took", next(x for x in reversed(ours) if "took" in x))
    assert [line for line in ours if line][-2:] == [
        next(x for x in ours if x.startswith("run: micro")),
        "next: dyads compare run OTHER…",
    ]
    assert "{'loss'" not in drawn


def test_batches_with_much_padding_name_the_option_that_lessens_it(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"task": "t", "input": "fox " * (1 if i % 12 else 150), "output": "fox"} for i in range(120)]
    split = [{**row, "split": "test" if i > 110 else "train"} for i, row in enumerate(rows)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split), encoding="utf-8")
    train = {"steps": 1, "batch_size": 8, "bucket_window": 2}
    made = tiny("mode", tasks={"family": "files", "path": "rows.jsonl"}, train=train)
    Path("recipe.yaml").write_text(made.resolved_yaml(), encoding="utf-8")
    shown = {
        window: CliRunner().invoke(
            main,
            ["train", "recipe.yaml", "--set", f"train.bucket_window={window}", "--no-evaluate", "--out", str(window)],
        )
        for window in (2, 32)
    }
    assert [result.exit_code for result in shown.values()] == [0, 0]
    assert re.search(
        r"^  · \d\d % of the batches is padding; --set train\.bucket_window=8 lessens it$", shown[2].stderr, re.M
    )
    assert "padding" not in shown[32].stderr


def test_an_interrupted_training_names_the_command_that_continues_it(recipe: Path, tmp_path: Path) -> None:
    command = ["train", "recipe.yaml", "--set", "train.steps=4000", "--out", "my run"]
    process = forked.Fork(lambda: main(command), tmp_path)
    checkpoints, ends = tmp_path / "my run" / "checkpoints", time.monotonic() + 300
    while not any(checkpoints.glob("*/manifest.json")) and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, ""), err
    *_, state, remedy, again = err.splitlines()
    assert re.fullmatch(r"interrupted in the training; last checkpoint: step \d+ of 4,000", state)
    assert remedy == "To continue:"
    assert again == "  dyads train recipe.yaml --set train.steps=4000 --out 'my run' --resume"
    assert "Traceback" not in err
    assert "\x1b" not in err

    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("dyads.training.train.train", lambda recipe, out, **how: seen.append(how) or RunFolder(out))
        result = CliRunner().invoke(main, shlex.split(again)[1:], catch_exceptions=False)
    assert result.exit_code == 0
    assert seen[0]["resume"] is True


def test_json_has_one_object_per_line(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["train", "recipe.yaml", "--out", "run", "--json", "--no-evaluate"])
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [e["event"] for e in events] == ["start", "expect", "training", "training", "training", "trained"]
    logged = next(line for line in RunFolder(tmp_path / "run").log() if "parameters" in line)
    assert events[0]["parameters"] == logged["parameters"]
    assert [e["done"] for e in events if e["event"] == "training"] == [4, 8, 12]
    assert events[-1] == {"event": "trained", "run": "run"}
    quiet = CliRunner().invoke(main, ["train", "recipe.yaml", "--out", "other", "--quiet", "--no-evaluate"])
    assert (quiet.exit_code, quiet.output) == (0, "")
    both = CliRunner().invoke(main, ["train", "recipe.yaml", "--quiet", "--json"])
    assert "give either --quiet or --json" in both.output


def test_a_terminal_without_utf_8_shows_what_it_can(tmp_path: Path) -> None:
    rows = ({"task": "naïve", "input": f"中{i}", "output": "a → b"} for i in range(3))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [*DYADS, "tasks", "--family", "files", "--path", "rows.jsonl", "--show", "naïve"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "train, rows.jsonl:" in done.stdout.decode("cp1252")
    assert re.search(r"\\u4e2d\d\na -> b", done.stdout.decode("cp1252"))


VERBS = """
import json, sys, warnings
# A file opened without an encoding has that of the system, which is cp1252 on many Windows machines.
warnings.filterwarnings("error", category=EncodingWarning, module="dyads")
from dyads.cli import main
for arguments in json.loads(sys.argv[1]):
    print("verb", *arguments[:1])
    main(arguments, standalone_mode=False)
"""


@pytest.mark.parametrize("encoding", ["cp1252", pytest.param("cp437", marks=pytest.mark.slow)])
def test_every_verb_prints_what_a_terminal_without_utf_8_can_show(encoding: str, run: Any, tmp_path: Path) -> None:
    paths = [
        run(name, {"naïve 中": [20.0, 100.0], "ß → ●": [i, 50.0]}) for i, name in enumerate(("first ─", "zweiter"))
    ]
    verbs = [module.stem for module in Path(dyads.cli.__file__).parent.glob("[a-z]*.py")]
    given = [[verb, "--help"] for verb in verbs]
    given += [["methods"], ["methods", "mode"], ["models"], ["train", "--keys"], ["tasks", "--family", "starter"]]
    given += [["compare", *map(str, paths)], ["show", str(paths[0])], ["show", str(paths[0]), "--task", "naïve 中"]]
    given += [["compare", *map(str, paths), "--out", str(tmp_path / f"table.{end}")] for end in ("md", "csv", "json")]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "COLUMNS": "80"}
    command = [sys.executable, "-X", "warn_default_encoding", "-c", VERBS, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode(encoding, "replace")
    shown = done.stdout.decode(encoding)
    assert shown.count("\nverb ") + shown.startswith("verb ") == len(given)
    assert "naïve" in shown
    assert "\\u4e2d" in shown
    assert "中" in (tmp_path / "table.md").read_text(encoding="utf-8")

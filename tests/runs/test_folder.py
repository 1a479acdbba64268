# SPDX-License-Identifier: Apache-2.0
"""Run folders: files are written whole and read back equal; damaged ones are refused with the reason."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import forked
from dyads.errors import RunError
from dyads.recipe.spec import Recipe
from dyads.runs.accept import accept
from dyads.runs.contents import Prediction
from dyads.runs.folder import RunFolder, environment
from dyads.tasks import load

Make = Callable[..., Recipe]
Run = Callable[..., Path]
RESULTS = ["config.yaml", "manifest.json", "predictions", "scores.json", "v.jsonl"]


def test_a_run_starts_with_its_resolved_recipe(tmp_path: Path, recipe: Make) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "a", recipe("a", train={"steps": 7}))
    assert RunFolder.open(folder.path).recipe() == recipe("a", train={"steps": 7})
    assert "weight_decay: 0.0" in (folder.path / "config.yaml").read_text()


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_resumed(tmp_path: Path, recipe: Make) -> None:
    RunFolder.create(tmp_path / "a", recipe("a"))
    with pytest.raises(RunError, match=r"a' already holds a run \(method mode\); continue it with --resume"):
        RunFolder.create(tmp_path / "a", recipe("a"))
    assert RunFolder.create(tmp_path / "a", recipe("a"), resume=True).recipe() == recipe("a")
    assert RunFolder.create(tmp_path / "new", recipe("b"), resume=True).recipe() == recipe("b")


def test_resuming_with_another_recipe_names_what_differs(tmp_path: Path, recipe: Make) -> None:
    RunFolder.create(tmp_path / "a", recipe("a", train={"steps": 5}))
    with pytest.raises(RunError, match=r"it was started with another recipe\n  train\.steps: 5 there, 6 here$"):
        RunFolder.create(tmp_path / "a", recipe("a", train={"steps": 6}), resume=True)


def test_a_run_is_not_started_among_other_files(tmp_path: Path, recipe: Make) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        RunFolder.create(tmp_path, recipe("a"))
    with pytest.raises(RunError, match=r"notes\.txt' is a file; choose a folder for --out"):
        RunFolder.create(tmp_path / "notes.txt", recipe("a"))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_templates_are_read_back_and_those_of_an_adapted_run_come_first(tmp_path: Path, recipe: Make) -> None:
    old, new = (RunFolder.create(tmp_path / name, recipe("a")) for name in ("old", "new"))
    assert old.templates() == {}
    first, last = load({"family": "starter", "names": ["first_word", "last_word"], "train_per_task": 1})
    old.write_templates([last])
    new.write_templates([first], old)
    kept = [task.template.model_copy(update={"max_new_tokens": task.max_new_tokens}) for task in (last, first)]
    assert list(new.templates().items()) == [("last_word", kept[0]), ("first_word", kept[1])]
    assert new.templates()["first_word"].prompt({"input": "fox lake"}) == first.prompt_of({"input": "fox lake"})


@pytest.mark.parametrize("content", ['{"a": {"texts": []}}', '{"a": {"texts": ["{"]}}', '{"a": {"form": "x"}}'])
def test_damaged_templates_are_refused(tmp_path: Path, recipe: Make, content: str) -> None:
    folder = RunFolder.create(tmp_path / "a", recipe("a"))
    (folder.path / "templates.json").write_text(content)
    with pytest.raises(RunError, match=r"(?s)templates\.json holds no templates: .*; restore the file, or delete it"):
        folder.templates()


def test_a_folder_that_is_no_run_says_why(tmp_path: Path, recipe: Make) -> None:
    RunFolder.create(tmp_path / "runs" / "mode-seed0", recipe("a"))
    with pytest.raises(RunError, match=r"there is no folder '.*mode-seed1' – did you mean 'mode-seed0'\?"):
        RunFolder.open(tmp_path / "runs" / "mode-seed1")
    with pytest.raises(RunError, match=r"is no run: it has no config\.yaml \(it contains runs: mode-seed0\)"):
        RunFolder.open(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"it has no config\.yaml; `dyads train` writes run folders"):
        RunFolder.open(tmp_path / "empty")


def test_the_environment_holds_what_a_result_may_depend_on(tmp_path: Path, recipe: Make) -> None:
    facts = environment()
    assert facts["command"] == sys.argv
    assert {"torch", "transformers", "peft", "dyads"} <= facts["versions"].keys()
    folder = RunFolder.create(tmp_path / "a", recipe("a"))
    assert folder.task_names() == ()
    folder.write_environment(seed=3, tasks=["rte", "cola"])
    folder.write_environment(seed=4)
    kept = folder.environment()
    assert (kept["seed"], [again["seed"] for again in kept["resumed"]]) == (3, [4])
    assert folder.task_names() == ("rte", "cola")


def test_the_log_survives_a_line_that_was_cut_off(tmp_path: Path, recipe: Make) -> None:
    folder = RunFolder.create(tmp_path / "a", recipe("a"))
    assert folder.log() == []
    folder.append_log({"step": 1, "loss": 2.0})
    with (folder.path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    folder.append_log({"step": 3, "loss": float("nan"), "by_task": {"rte": float("inf")}})
    assert folder.log() == [{"step": 1, "loss": 2.0}, {"step": 3, "loss": None, "by_task": {"rte": None}}]


def test_predictions_keep_any_text_and_any_task_name(run: Run) -> None:
    folder = RunFolder(run("a", {"t": [1, 2]}))
    row = Prediction(id="1", prediction="zwei\u2028Zeilen\n…", references=["ü"], scores={"rouge_l": 50.0})
    folder.write_results({"qa/hard: ü": [row]}, folder.scores())
    assert folder.predictions("qa/hard: ü") == [row]
    assert [p.name for p in (folder.path / "predictions").iterdir()] == ["qa%2Fhard%3A %C3%BC.jsonl"]


def test_broken_predictions_are_named_with_their_line(run: Run) -> None:
    folder = RunFolder(run("a", {"t": [1, 2]}))
    with (folder.path / "predictions" / "t.jsonl").open("a") as file:
        file.write('{"id": "t-2", "prediction": "x", "scores": {"rouge_l": "high"}}\n')
    with pytest.raises(RunError, match=r"is damaged: predictions/t\.jsonl has \d+ bytes, not \d+; run `dyads evaluate"):
        folder.predictions("t")
    accept(folder.path)
    with pytest.raises(RunError, match=r"t\.jsonl, line 3 lacks references; run `dyads evaluate"):
        folder.predictions("t")
    with pytest.raises(RunError, match="has no predictions for task 'u'; run `dyads evaluate"):
        folder.predictions("u")


def test_scores_are_read_as_they_were_written(run: Run) -> None:
    folder = RunFolder(run("a", {"t": [1, 2]}))
    assert folder.is_scored
    assert folder.scores()["scores"][0]["value"] == 1.5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:40], "scores.json, line 4, column 12: not valid JSON"),
        (lambda text: "[]", "holds no object but list"),
        (lambda text: text.replace('"schema": 1', '"schema": 9'), "has schema 9, this version of dyads reads schema 1"),
        (lambda text: text.replace('"micro"', '"mikro"'), "lacks micro"),
        (lambda text: text.replace('"version"', '"versoin"'), "scores.json lacks scores.0.version"),
        (lambda text: text.replace('"n": 2', f'"n": {10**400}'), "'scores.0.n': input should be less than"),
        (lambda text: text.replace('"n": 2', '"n": "2"'), "'scores.0.n': input should be a valid integer, got 2"),
        (
            lambda text: text.replace('"value": 1.5', '"value": 1e999'),
            "1e999 is larger than any number that a float holds",
        ),
        (lambda text: text.replace('"value": 1.5', '"value": NaN'), "not valid JSON: NaN is no number of JSON"),
        (lambda text: text.replace('"steps": 100', f'"steps": {"9" * 5000}'), "a number of thousands of digits"),
        (lambda text: "[" * 100_000, "more than 100 levels of lists and objects"),
    ],
)
def test_scores_that_cannot_be_trusted_are_refused(run: Run, damage: Callable[[str], str], message: str) -> None:
    path = run("a", {"t": [1, 2]}) / "scores.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(RunError, match=r"is damaged: .*scores\.json.*run `dyads evaluate"):
        RunFolder(path.parent).scores()
    accept(path.parent)
    with pytest.raises(RunError, match=re.escape(message) + ".*run `dyads evaluate"):
        RunFolder(path.parent).scores()


def test_scores_that_are_not_numbers_are_not_written_and_nothing_is_lost(run: Run) -> None:
    folder = RunFolder(run("a", {"t": [1, 2]}))
    before = (folder.path / "scores.json").read_text()
    scores = folder.scores()
    scores["micro"]["headline"] = float("nan")
    with pytest.raises(RunError, match="not a finite number"):
        folder.write_results({"u": []}, scores)
    assert (folder.path / "scores.json").read_text() == before
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "predictions",
        "scores.json",
    ]


def test_results_replace_earlier_ones_whole(run: Run) -> None:
    folder = RunFolder(run("a", {"t": [1, 2], "u": [3]}))
    rows, scores = folder.predictions("u"), folder.scores()
    folder.write_results({"v": rows}, {**scores, "seed": 7})
    assert sorted(p.name for p in folder.path.rglob("*")) == RESULTS
    assert (folder.predictions("v"), folder.scores()["seed"]) == (rows, 7)


class Denied:
    """An audit hook, with which the n-th call that changes files, and those after it, fail while `work` runs."""

    def __init__(self) -> None:
        self.left: float = math.inf
        self.once = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            self.left -= 1
            if self.left == 0 or (self.left < 0 and not self.once):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(arguments[0]))

    def at(self, call: int, once: bool, work: Callable[[], object]) -> bool:
        """Run `work`, and return whether it has a call of this number; with `once` that call alone fails."""
        self.left, self.once = call, once
        with suppress(PermissionError):
            work()
        reached, self.left = self.left <= 0, math.inf
        return reached


def results_of(folder: RunFolder) -> tuple[int, list[str]]:
    """The seed in the scores and the tasks with predictions, of results that are whole."""
    assert folder.is_scored
    assert folder.damage() is None
    tasks = []
    for task in "tvw":
        with suppress(RunError):
            folder.predictions(task)
            tasks.append(task)
    return folder.scores()["seed"], tasks


def test_results_that_are_moved_while_they_are_read_are_read_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, find = RunFolder(run("run", {"cola": [1.0]})), RunFolder._find
    moved: list[Path] = []

    def finds(self: RunFolder, name: str, manifest: Any) -> Path | None:
        if not moved:
            moved.append(self.path / ".results.unfinished" / name)
            return moved[0]
        return find(self, name, manifest)

    monkeypatch.setattr(RunFolder, "_find", finds)
    for read in (folder.scores, lambda: folder.predictions("cola")):
        moved.clear()
        assert read()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="an audit hook cannot be removed, and gets a fork of its own")
def test_results_stay_readable_whichever_call_is_denied_while_they_are_replaced(run: Run, tmp_path: Path) -> None:
    made = RunFolder(run("a", {"t": [1, 2]}))
    rows, scores = made.predictions("t"), made.scores()
    old, new, newer = (0, ["t"]), (7, ["v"]), (8, ["w"])

    def copy(folder: RunFolder, name: str) -> RunFolder:
        return RunFolder(shutil.copytree(folder.path, tmp_path / name))

    def write(folder: RunFolder, content: tuple[int, list[str]]) -> Callable[[], None]:
        seed, tasks = content
        return lambda: folder.write_results(dict.fromkeys(tasks, rows), {**scores, "seed": seed})

    def denied_at(denied: Denied, call: int, once: bool) -> bool:
        folder = copy(made, f"{call}-{once}")
        reached = denied.at(call, once, write(folder, new))
        kept = results_of(folder)
        assert kept in ((old, new) if reached else (new,))
        for again in itertools.count(1) if reached and kept == new else ():  # from results on the way to their place
            other = copy(folder, f"{call}-{once}-{again}")
            if not denied.at(again, False, write(other, newer)):
                assert results_of(other) == newer
                assert sorted(p.name for p in other.path.rglob("*")) == [*RESULTS[:-1], "w.jsonl"]
                break
            assert results_of(other) in (kept, newer), f"{again} calls later"
        folder.clear_ended()
        assert results_of(folder) == kept
        assert len(list(folder.path.rglob("*"))) == len(RESULTS)
        return reached

    def work() -> None:
        os.fsync = lambda _: None  # type: ignore[assignment]  # slow, and of use after a power failure only
        denied = Denied()
        calls = [next(c for c in itertools.count(1) if not denied_at(denied, c, once)) for once in (True, False)]
        assert min(calls) > 15

    done = forked.run(work)
    assert done.returncode == 0, done.stderr


def test_a_damaged_config_is_refused_with_its_line(run: Run) -> None:
    path = run("a", {"t": [1, 2]})
    with (path / "config.yaml").open("a") as file:
        file.write("surprise: 1\n")
    with pytest.raises(RunError, match=r"is damaged: config\.yaml has .* accept it as it is with `python -m dyads"):
        RunFolder.open(path).recipe()
    accept(path)
    with pytest.raises(ValueError, match=r"config\.yaml:\d+: unknown key 'surprise'"):
        RunFolder.open(path).recipe()


def test_files_have_the_permissions_of_any_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    written = run("a", {"t": [1, 2]}) / "scores.json"
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert json.loads(written.read_text())["schema"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"event": "trained", "step": 3, "seconds": 1.0}, "lacks parameters"),
        (
            {"event": "trained", "step": 3, "seconds": None, "parameters": 1},
            "'seconds': input should be a valid number",
        ),
        ({"event": "validated", "step": 3}, "lacks validation_loss"),
        ({"event": "adapted", "similarity": {"a": 1}}, "'similarity.a': input should be a valid dictionary"),
        ({"step": 10**400}, "'step': input should be less than"),
        ({"loss": 10**400}, "'loss': input should be a"),
        ({"event": ["trained"]}, "'event': input should be a valid string"),
    ],
)
def test_lines_of_the_log_with_other_types_are_named(line: object, message: str, tmp_path: Path, recipe: Make) -> None:
    folder = RunFolder.create(tmp_path / "a", recipe("a"))
    (folder.path / "log.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(RunError, match=rf"log\.jsonl, line 2:? ?{re.escape(message)}.*; delete the line"):
        folder.log()


def test_nothing_is_written_through_a_symbolic_link(run: Run, tmp_path: Path) -> None:
    folder, target = RunFolder(run("a", {"t": [1, 2]})), tmp_path / "of somebody else"
    target.write_text("kept")
    for name in (".lock", "log.jsonl", ".env.json.unfinished", ".manifest.json.unfinished"):
        (folder.path / name).symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"), folder.locked():
        pass
    for write in (lambda: folder.append_log({"step": 1}), lambda: folder.write_environment(seed=0)):
        with pytest.raises(OSError, match="symbolic link"):
            write()
    assert target.read_text() == "kept"

    (folder.path / ".manifest.json.unfinished").unlink()
    elsewhere = shutil.copytree(folder.path / "predictions", tmp_path / "elsewhere" / "predictions")
    (folder.path / ".results.unfinished").symlink_to(elsewhere.parent)
    folder.write_results({"v": folder.predictions("t")}, folder.scores())
    assert [p.name for p in elsewhere.iterdir()] == ["t.jsonl"]


def test_a_recipe_that_could_not_be_read_again_is_refused_before_anything_is_written(
    tmp_path: Path, recipe: Make
) -> None:
    long = recipe(
        "a", tasks={"family": "files", "path": ["a.jsonl"], "instructions": {f"t{i}": "a b " * 999 for i in range(40)}}
    )
    with pytest.raises(ValueError, match=r"the recipe of '.*': more than 131,072 characters"):
        RunFolder.create(tmp_path / "a", long)
    assert not (tmp_path / "a").exists()


def test_scores_without_the_mean_of_headlines_are_refused(run: Run) -> None:
    folder = RunFolder(run("a", {"t": [1, 2]}))
    rows, scores = folder.predictions("t"), folder.scores()
    folder.write_results({"t": rows}, {**scores, "macro": {}})
    with pytest.raises(RunError, match=r"scores\.json lacks macro\.headline; run `dyads evaluate"):
        folder.scores()

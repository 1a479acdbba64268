# SPDX-License-Identifier: Apache-2.0
"""Studies from start to end, with tiny trainings in this process."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dyads.cli import main
from dyads.errors import ConfigError
from dyads.recipe.load import load_recipe
from dyads.recipe.yaml_source import to_yaml
from dyads.runs.folder import RunFolder
from dyads.studies import jobs
from dyads.studies.grid import load_study
from dyads.studies.jobs import Job
from dyads.studies.progress import StudyFolder, seconds_left, state_of
from dyads.studies.run import Runner
from dyads.training import trainer as trainer_module
from made_runs import write_run
from made_studies import LORA, MODE, TARGETS, InProcess, Write, content_of

MORE = {"method": {"name": "more", "r": 2, "target_modules": TARGETS}}
CELLS = ["LoRA-4-seed0", "MoDE-2x2-seed0", "LoRA-4-seed1", "MoDE-2x2-seed1"]


def study(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["study", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that ran to its end."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.yaml").write_text(to_yaml(content_of(llama)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(jobs.ENGINES, "local", InProcess)
        study(folder / "study.yaml", "--out", folder / "out")
    return folder / "out"


def test_a_study_ends_in_tables_curves_and_verdicts(
    write: Write, llama: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vary = {"method": {"majority": None, "LoRA 4": LORA, "MoRE 2": MORE}, "seed": [0, 1]}
    path = write(llama, vary=vary, claims=[{"ahead": "MoRE 2", "of": "LoRA 4"}])
    shown = study(path).output
    assert in_process == ["majority", "LoRA-4-seed0", "MoRE-2-seed0", "LoRA-4-seed1", "MoRE-2-seed1"]
    out = tmp_path / "runs" / "studies" / "tiny"
    assert all(RunFolder.open(out / name).is_scored for name in in_process)
    assert "MoRE 2 ahead of LoRA 4 on macro" in shown
    assert "MoRE 2 †" in shown
    assert "LoRA 4 †" not in shown
    assert "validation loss at step" in shown
    page = (out / "verdict.md").read_text()
    assert "| validation loss at step | 3 | 6 |" in page
    assert "| MoRE 2 † − LoRA 4 |" in page
    assert "† the gates are given the task of each instance" in page
    content = json.loads((out / "verdict.json").read_text())
    more = content["tables"][0]["curves"]["MoRE 2"]
    assert [[step for step, _ in run["losses"]] for run in more] == [[3, 6], [3, 6]]
    assert [c["given_task"] for c in content["tables"][0]["columns"]] == [False, False, True]

    status = json.loads(study(path, "--status", "--json").output)
    assert (status["done"], status["left"], status["runs"]["majority"]["state"]) == (5, 0, "done")
    before = (out / "verdict.json").read_bytes()
    assert study(path, "--quiet").output == ""
    assert len(in_process) == 5, "a complete run is not started again"
    assert (out / "verdict.json").read_bytes() == before


def test_an_interrupted_study_ends_in_the_same_verdicts(
    write: Write, llama: Path, finished: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(llama)
    loss, calls = trainer_module.label_loss, 0

    def cut(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:  # while the second run trains
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "label_loss", cut)
        result = study(path, "--out", tmp_path / "cut", "--only", "*", code=130)
    again = f"dyads study {path} --out {tmp_path / 'cut'} --only '*'"
    assert f"interrupted, 1 of 4 runs done\nTo continue:\n  {again}\n" in result.output
    assert not (tmp_path / "cut" / "verdict.json").exists()
    steps = RunFolder(tmp_path / "cut" / CELLS[1]).log()
    assert steps
    assert not RunFolder(tmp_path / "cut" / CELLS[1]).has_adapter
    status = study(path, "--out", tmp_path / "cut", "--status").output
    assert "interrupted" in status
    assert "1 done, 1 interrupted, 2 left" in status
    assert "time left: " in status
    of_some = study(path, "--out", tmp_path / "cut", "--status", "--only", "LoRA*").output
    assert "1 done, 1 left" in of_some
    assert "MoDE" not in of_some

    study(path, "--out", tmp_path / "cut", "--workers", "2")
    for name in ("verdict.json",):
        assert (tmp_path / "cut" / name).read_bytes() == (finished / name).read_bytes()


def test_only_runs_some_cells_and_claims_about_others_are_open(
    write: Write, llama: Path, tmp_path: Path, in_process: list[str]
) -> None:
    path, out = write(llama), tmp_path / "out"
    study(path, "--out", out, "--only", "*seed1")
    assert in_process == [CELLS[2], CELLS[3]]
    content = json.loads((out / "verdict.json").read_text())
    assert (content["left"], content["claims"][0]["verdict"]) == (2, "open")
    result = study(path, "--out", out, "--only", "MoRE*", code=2)
    assert "--only MoRE*: no cell has such a name" in result.output
    status = study(path, "--out", out, "--status", "--only", CELLS[0], "--only", "*seed1").output
    assert "2 done, 1 left" in status


def test_a_failed_run_is_named_with_its_last_line_and_the_others_run(
    write: Write, llama: Path, tmp_path: Path, in_process: list[str]
) -> None:
    broken = {"method": {"name": "mode", "r": 2, "target_modules": ["no_such_layer"]}}
    path = write(llama, vary={"method": {"broken": broken, "LoRA 4": LORA}, "seed": [0]}, claims=None)
    result = study(path, "--out", tmp_path / "out", code=1)
    assert in_process == ["broken-seed0", "LoRA-4-seed0"]
    assert "broken-seed0 failed: Error: method 'mode' does not fit model" in result.output
    assert "LoRA-4-seed0: macro " in result.output
    status = study(path, "--out", tmp_path / "out", "--status").output
    assert "1 done, 1 failed" in status
    assert "broken-seed0 failed: Error: method 'mode' does not fit model" in " ".join(status.split())


def test_a_changed_study_keeps_equal_runs_and_refuses_others(
    write: Write, llama: Path, finished: Path, tmp_path: Path, in_process: list[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    more = {"method": {"LoRA 4": LORA, "MoDE 2x2": MODE, "MoRE 2": MORE}, "seed": [0, 1]}
    study(write(llama, vary=more), "--out", out)
    assert in_process == ["MoRE-2-seed0", "MoRE-2-seed1"]
    changed = {**more["method"], "MoDE 2x2": {**MODE, "train.learning_rate": 0.5}}
    path = write(llama, vary={**more, "method": changed})
    result = study(path, "--out", out, code=2)
    assert "MoDE-2x2-seed0: train.learning_rate is 0.01 there, 0.5 here" in result.output
    assert "LoRA-4-seed0" not in result.output
    assert "another recipe in MoDE-2x2-seed1: train.learning_rate" in study(path, "--out", out, "--status").output
    only = study(path, "--out", out, "--only", "LoRA*").output
    left_out = "left out: 2 runs of another recipe than the study's; claims about them are open"
    assert left_out in " ".join(only.split())
    content = json.loads((out / "verdict.json").read_text())
    assert (content["left"], content["changed"]) == (0, 2)
    assert [claim["verdict"] for claim in content["claims"]] == ["open"]
    assert [column["label"] for column in content["tables"][0]["columns"]] == ["LoRA 4", "MoRE 2"]
    shutil.rmtree(out / "MoDE-2x2-seed0")
    shutil.rmtree(out / "MoDE-2x2-seed1")
    study(path, "--out", out)
    assert in_process[2:] == ["MoDE-2x2-seed0", "MoDE-2x2-seed1"]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"like": "LoRA 4", "within": 3},
            "MoDE 2x2: 1,936 parameters, +28.7 % from 1,504; no r fits: the nearest is ",
        ),
        ({"parameters": 1504, "within": 30}, None),
        (
            {"parameters": 3000, "within": 10},
            "LoRA 4: 1,504 parameters, -49.9 % from 3,000; the nearest is r: 8 has 3,008",
        ),
        ({"like": "LoRA", "within": 3}, "'budget.like' names 'LoRA', which no axis has – did you mean 'LoRA 4'?"),
        ({"like": "majority"}, "'budget.like' names 'majority', which trains nothing"),
    ],
)
def test_cells_outside_the_budget_are_refused_with_the_nearest_that_fits(
    budget: dict[str, Any], message: str | None, write: Write, llama: Path, tmp_path: Path, in_process: list[str]
) -> None:
    vary = {"method": {"majority": None, "LoRA 4": LORA, "MoDE 2x2": MODE}, "seed": [0]}
    path = write(llama, vary=vary, budget=budget, claims=None)
    if message is None:
        counts = Runner(load_study(path), StudyFolder(tmp_path / "out")).check()
        assert counts == {"LoRA-4-seed0": 1504, "MoDE-2x2-seed0": 1936}
        return
    result = study(path, "--out", tmp_path / "out", code=2)
    assert message in " ".join(result.output.split())
    assert not in_process
    assert not (tmp_path / "out").exists()


def test_the_budget_of_a_cell_is_that_of_the_same_size(write: Write, llama: Path, tmp_path: Path) -> None:
    sizes = {"small": {"method.r": 4}, "large": {"method.r": 8}}
    vary = {"method": {"LoRA": LORA, "MoDE": MODE}, "size": sizes, "seed": [0]}
    adjust = [{"where": {"method": "MoDE", "size": "small"}, "recipe": {"method.r": 2}}]
    path = write(llama, vary=vary, adjust=adjust, tables="size", budget={"like": "LoRA", "within": 30}, claims=None)
    with pytest.raises(ConfigError) as refused:
        Runner(load_study(path), StudyFolder(tmp_path / "out")).check()
    (line,) = str(refused.value).splitlines()[1:]
    assert line.startswith(
        "  MoDE, large: 7,744 parameters, +157.4 % from 3,008; the nearest is r: 3 has 2,904 (-3.5 %)"
    )


def test_a_cell_without_a_partner_for_its_budget_is_refused(write: Write, llama: Path, tmp_path: Path) -> None:
    vary = {"method": {"LoRA": LORA, "MoDE": MODE}, "size": {"small": None, "large": {"method.r": 64}}, "seed": [0]}
    without = [{"method": "LoRA", "size": "large"}]
    path = write(llama, vary=vary, without=without, budget={"like": "LoRA", "within": 100}, claims=None)
    with pytest.raises(
        ConfigError, match=r"'budget\.like' names 'LoRA', which has no cell to hold 'MoDE-large-seed0' to"
    ):
        Runner(load_study(path), StudyFolder(tmp_path / "out")).check()


def test_a_claim_on_an_unknown_task_and_a_wrong_option_are_refused_before_anything_runs(
    write: Write, llama: Path, tmp_path: Path, in_process: list[str]
) -> None:
    path = write(llama, claims=[{"ahead": "MoDE 2x2", "of": "LoRA 4", "on": "has_animals"}])
    result = study(path, "--out", tmp_path / "out", code=2)
    assert "a claim is 'on: has_animals', neither macro, micro nor a task – did you mean 'has_animal'?" in result.output
    path = write(llama, vary={"method": {"x": {"method": {"name": "mode", "rr": 3}}}}, claims=None)
    result = study(path, "--out", tmp_path / "out", code=2)
    assert "(cell x): " in result.output
    assert "'rr'" in result.output
    assert not in_process


def test_an_adjustment_of_what_is_scored_is_refused_before_anything_runs(
    write: Write, llama: Path, tmp_path: Path, in_process: list[str]
) -> None:
    adjust = [{"where": {"method": "MoDE 2x2"}, "recipe": {"evaluate": {"limit": 2}}}]
    result = study(write(llama, adjust=adjust), "--out", tmp_path / "out", code=2)
    said = " ".join(result.output.split())
    assert "'LoRA-4-seed0' and 'MoDE-2x2-seed0' are in one table, but by 'adjust' they differ in" in said
    assert "evaluate.limit (None and 2): set it on an axis" in said
    assert not in_process


def test_each_method_gets_its_best_rate_before_its_seeds_run(
    write: Write, llama: Path, tmp_path: Path, in_process: list[str]
) -> None:
    choose = {"values": [1e-6, 1e-3, 1e-2], "start": [1e-3, 1e-2], "trial": {"train": {"steps": 2, "save_steps": None}}}
    path, out = write(llama, choose=choose), tmp_path / "out"
    before = study(path, "--out", out, "--status").output
    assert "waits for choose" in before
    shown = study(path, "--out", out).output
    trials = [name for name in in_process if "learning_rate" in name]
    assert set(trials) == {f"{m}-seed0-learning_rate{v}" for m in ("LoRA-4", "MoDE-2x2") for v in ("0.001", "0.01")}
    for name in CELLS:
        assert RunFolder(out / name).recipe().train.learning_rate == 0.01
    content = json.loads((out / "verdict.json").read_text())
    assert [c["value"] for c in content["chosen"]] == [0.01, 0.01]
    assert [v for v, _ in content["chosen"][0]["losses"]] == [1e-3, 1e-2]
    assert "validation loss at train.learning_rate" in shown
    started = len(in_process)
    study(path, "--out", out)
    assert len(in_process) == started


def test_scores_from_before_a_choice_do_not_count_until_it_is_made(
    write: Write, llama: Path, tmp_path: Path, in_process: list[str]
) -> None:
    out, own = tmp_path / "out", {"vary": {"method": {"LoRA 4": LORA}, "seed": [0]}, "claims": None}
    study(write(llama, **own), "--out", out)
    trained = RunFolder(out / CELLS[0]).recipe().train.learning_rate
    choose = {"values": [trained, 0.001], "trial": {"train": {"steps": 2, "save_steps": None}}}
    path = write(llama, **own, choose=choose)
    status = json.loads(study(path, "--out", out, "--status", "--json").output)
    assert (status["done"], status["left"]) == (0, 1)
    refused = study(path, "--out", out, "--set", "train.warmup=0.5", code=2)
    assert "LoRA-4-seed0: train.warmup is 0.0 there, 0.5 here" in " ".join(refused.output.split())
    assert in_process == CELLS[:1]
    study(path, "--out", out)
    assert in_process[1:] == [f"LoRA-4-seed0-learning_rate{rate}" for rate in (trained, 0.001)], "not the cell again"
    content = json.loads((out / "verdict.json").read_text())
    assert (content["left"], content["changed"], content["chosen"][0]["value"]) == (0, 0, trained)


def test_a_diverged_rate_is_worse_than_any_and_a_failed_trial_stops_its_method_alone(
    write: Write, llama: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = InProcess.submit

    def diverging(engine: InProcess, job: Job) -> Any:
        recipe = RunFolder(Path(job.command[6])).path
        if "learning_rate0.01" in recipe.name and "LoRA" in recipe.name:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            RunFolder.create(recipe, load_recipe(job.command[4], check=False))
            job.log.write_text("Error: the loss is not finite at step 1\nexit code 2\n")
        elif "learning_rate" in recipe.name and "MoDE" in recipe.name:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.write_text("Error: out of memory\nexit code 2\n")
        else:
            return submit(engine, job)
        in_process.append(job.name)
        future = submit.__globals__["Future"]()
        future.set_result(2)
        return future

    monkeypatch.setattr(InProcess, "submit", diverging)
    alone = study(write(llama, choose={"values": [0.01, 0.011]}), "--out", tmp_path / "all", "--only", "LoRA*", code=1)
    assert "LoRA-4-seed1 failed: every value of 'choose' diverged: give it lower ones" in " ".join(alone.output.split())
    choose = {"values": [1e-3, 1e-2], "trial": {"train": {"steps": 2}}}
    result = study(write(llama, choose=choose), "--out", tmp_path / "out", code=1)
    assert "choose/LoRA-4-seed0-learning_rate0.01: diverged" in result.output
    assert "choose/MoDE-2x2-seed0-learning_rate0.001 failed: Error: out of memory" in result.output
    assert RunFolder(tmp_path / "out" / "LoRA-4-seed1").recipe().train.learning_rate == 1e-3
    assert not (tmp_path / "out" / "MoDE-2x2-seed0").exists()
    runner = Runner(load_study(write(llama, choose=choose)), StudyFolder(tmp_path / "out"))
    (group,) = (group for group in runner.trials if group[0].name == "LoRA 4")
    assert runner.losses(group)[1e-2] == math.inf
    shutil.rmtree(tmp_path / "out" / "choose" / "LoRA-4-seed0-learning_rate0.01")
    assert list(runner.losses(group)) == [1e-3], "a deleted trial runs again, whatever its log says"


# --- progress ---------------------------------------------------------------------------------------------------------


def test_the_time_left_is_that_of_the_cells_that_are_done(write: Write, tmp_path: Path) -> None:
    study_ = load_study(write())
    cells = list(dict.fromkeys(c.name for c in study_.cells().values()))
    by_name = {cell.name: cell for cell in study_.cells().values()}
    folder = StudyFolder(tmp_path)
    assert (
        seconds_left(list(by_name.values()), {n: state_of(c, folder) for n, c in by_name.items()}, 1, by_name) is None
    )
    assert cells == CELLS
    # write_run: 61 seconds of training and 5 of scoring
    write_run(tmp_path / CELLS[0], "LoRA 4", {"t": [1.0, 2.0]}, method="lora")
    states = {name: state_of(cell, folder) for name, cell in by_name.items()}
    assert (states[CELLS[0]].state, states[CELLS[0]].score) == ("done", 1.5)
    assert seconds_left(list(by_name.values()), states, 1, by_name) == pytest.approx(3 * 66)
    assert seconds_left(list(by_name.values()), states, 2, by_name) == pytest.approx(3 * 33)
    # of some cells, at the pace of those that are done
    assert seconds_left(list(by_name.values()), states, 1, CELLS[2:]) == pytest.approx(2 * 66)
    RunFolder.create(tmp_path / CELLS[1], by_name[CELLS[1]].recipe).append_log({"step": 3, "loss": 1.0, "seconds": 6.0})
    states = {name: state_of(cell, folder) for name, cell in by_name.items()}
    assert (states[CELLS[1]].state, states[CELLS[1]].step) == ("interrupted", 3)
    # MoDE takes 2 seconds a step: 3 and 6 steps are left; LoRA has 61 seconds
    assert seconds_left(list(by_name.values()), states, 1, by_name) == pytest.approx(3 * 2 + 6 * 2 + 61 + 3 * 5)

# SPDX-License-Identifier: Apache-2.0
"""Studies in real processes: killed, beside each other, and with Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dyads.runs.folder import RunFolder
from made_studies import Write

pytestmark = pytest.mark.slow


def started(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dyads.cli", "study", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True
    )


def finished(*arguments: str | Path, cwd: Path) -> str:
    process = started(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, (out, err)
    return out


def wait_for(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if holds():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("it did not happen within 10 minutes")


def steps_of(folder: Path) -> int:
    return len([line for line in RunFolder(folder).log() if "loss" in line])


@pytest.mark.parametrize("whole_group", [True, False], ids=["with its runs", "alone"])
def test_a_killed_study_ends_in_the_verdicts_of_one_that_was_not(
    whole_group: bool, write: Write, llama: Path, tmp_path: Path
) -> None:
    path = write(llama, claims=[{"ahead": "MoDE 2x2", "of": "LoRA 4"}])
    long = ["--set", "train.steps=40"]
    finished(path, "--out", tmp_path / "through", "--workers", "2", *long, cwd=tmp_path)

    cut = tmp_path / "cut"
    process = started(path, "--out", cut, *long, cwd=tmp_path)
    wait_for(lambda: steps_of(cut / "MoDE-2x2-seed0") > 5, process)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (cut / "verdict.json").exists()
    assert RunFolder(cut / "LoRA-4-seed0").is_scored
    kept = (cut / "LoRA-4-seed0" / "log.jsonl").read_bytes()
    status = finished(path, "--out", cut, "--status", *long, cwd=tmp_path)
    assert "interrupted" in status if whole_group else "running" in status or "done" in status

    finished(path, "--out", cut, *long, cwd=tmp_path)
    for name in ("verdict.json",):
        assert (cut / name).read_bytes() == (tmp_path / "through" / name).read_bytes()
    assert (cut / "LoRA-4-seed0" / "log.jsonl").read_bytes() == kept, "a complete run is kept"
    lines = [line["step"] for line in RunFolder(cut / "MoDE-2x2-seed0").log() if "loss" in line]
    assert len(lines) <= 40 + 2 + 1, "only the steps after the last checkpoint are trained again"


def test_an_interrupted_study_stops_its_runs_and_names_the_command_that_goes_on(
    write: Write, llama: Path, tmp_path: Path
) -> None:
    path, out = write(llama), tmp_path / "out"
    process = started(path, "--out", out, "--workers", "2", "--set", "train.steps=5000", cwd=tmp_path)
    wait_for(lambda: steps_of(out / "LoRA-4-seed0") > 0, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    again = f"dyads study {path} --out {out} --workers 2 --set train.steps=5000"
    assert f"interrupted, 0 of 4 runs done\nTo continue:\n  {again}\n" in err
    before = steps_of(out / "LoRA-4-seed0")
    time.sleep(2)
    assert steps_of(out / "LoRA-4-seed0") == before, "the run's process has ended"


def test_two_local_workers_of_ray_end_like_one_process(write: Write, llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'dyads[study]'")
    path = write(llama)
    finished(path, "--out", tmp_path / "local", cwd=tmp_path)
    finished(path, "--out", tmp_path / "ray", "--workers", "2", "--engine", "ray", cwd=tmp_path)
    assert (tmp_path / "ray" / "verdict.json").read_bytes() == (tmp_path / "local" / "verdict.json").read_bytes()

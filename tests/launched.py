# SPDX-License-Identifier: Apache-2.0
"""Trainings in several processes: forks that torch.distributed connects, or commands started by torchrun.

A job is a recipe (YAML), the run's folder, and optionally `resume`, `evaluate` and `cut`, the call of the loss at which
every process fails, as if the power went. Each process runs all jobs, and leaves a file with the files that it changed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked

PROCESSES = 2


def launch(jobs: Sequence[dict[str, Any]], folder: Path) -> dict[int, list[str]]:
    """Run jobs in two processes; returns what each of them changed, as paths below `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        forked.Fork(
            lambda rank=rank: _run_all(jobs, folder, rank),  # type: ignore[misc]
            env={**environment(), **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(PROCESSES)
    ]
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err[-6000:]
    return {rank: json.loads((folder / f"changed.{rank}").read_text()) for rank in range(PROCESSES)}


def torchrun(command: Sequence[str], processes: int = PROCESSES) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": environment(), "timeout": 300}
    return subprocess.run([*start, *command], check=False, **options)


def environment() -> dict[str, str]:
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class _PowerCutError(Exception):
    pass


def _run(job: dict[str, Any]) -> None:
    from dyads.recipe.load import parse_recipe
    from dyads.training import trainer
    from dyads.training.train import train

    recipe = parse_recipe(job["recipe"], "job")
    loss, calls = trainer.label_loss, 0

    def cut(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == job["cut"]:
            raise _PowerCutError
        return loss(*arguments)

    trainer.label_loss = cut if "cut" in job else loss
    try:
        train(recipe, job["out"], resume=job.get("resume", False), evaluate=job.get("evaluate", False))
    except _PowerCutError:
        assert "cut" in job
    finally:
        trainer.label_loss = loss


def _run_all(jobs: Sequence[dict[str, Any]], folder: Path, rank: int) -> None:
    root, changed = f"{folder}{os.sep}", set()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        names: tuple[Any, ...] = ()
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            names = arguments[:1]
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "shutil.rmtree"):
            names = arguments[:2]
        changed.update(str(name).removeprefix(root) for name in names if str(name).startswith(root))

    sys.addaudithook(watch)
    for job in jobs:
        _run(job)
    (folder / f"changed.{rank}").write_text(json.dumps(sorted(name for name in changed if name)))

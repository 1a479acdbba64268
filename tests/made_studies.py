# SPDX-License-Identifier: Apache-2.0
"""A study over the tiny Llama, and an engine that runs its jobs in this process, without importing torch anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from dyads.cli import main
from dyads.errors import DyadsError
from dyads.recipe.yaml_source import to_yaml
from dyads.studies import jobs
from made_runs import STARTER

TARGETS = ["q_proj", "v_proj", "down_proj"]
TRAIN = {
    "steps": 6,
    "batch_size": 8,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_steps": 2,
    "validation_limit": 2,
    "validation_steps": 3,
    "threads": 1,
    "trainer": {"disable_tqdm": True},
}
LORA = {"method": {"name": "lora", "r": 4, "target_modules": TARGETS}}
MODE = {"method": {"name": "mode", "r": 2, "num_experts": 2, "target_modules": TARGETS}}


def content_of(model: str | Path) -> dict[str, Any]:
    """Two methods and two seeds, as a study file says it."""
    return deepcopy(
        {
            "name": "tiny",
            "recipe": {
                "model": {"name": str(model), "dtype": "float32"},
                "method": {"name": "majority"},
                "tasks": {**STARTER, "names": list(STARTER["names"])},
                "train": TRAIN,
                "evaluate": {"batch_size": 4, "max_new_tokens": 4},
            },
            "vary": {"method": {"LoRA 4": LORA, "MoDE 2x2": MODE}, "seed": [0, 1]},
            "claims": [{"ahead": "MoDE 2x2", "of": "LoRA 4"}],
        }
    )


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a study with other top-level sections, of a model without weights unless one is given; gives its path."""

    def put(model: str | Path = "tiny", **sections: Any) -> Path:
        path = tmp_path / "study.yaml"
        content = {**content_of(model), **sections}
        path.write_text(to_yaml({k: v for k, v in content.items() if v is not None}))
        return path

    return put


class InProcess:
    """Runs a job's command at once, in this process."""

    submitted: list[str] = []  # noqa: RUF012 – one list for a test, whichever engine it makes

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def submit(self, job: jobs.Job) -> Future[int]:
        self.submitted.append(job.name)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        future: Future[int] = Future()
        with job.log.open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                code = main(list(job.command[3:]), standalone_mode=False)
                if code == 130:
                    raise KeyboardInterrupt
                future.set_result(code or 0)
            except DyadsError as error:
                print(f"Error: {error}\nexit code 2")
                future.set_result(2)
            except Exception as error:  # what click prints for a refusal
                print(f"Error: {error}\nexit code 2")
                future.set_result(2)
        return future

    def close(self) -> None:
        pass


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs run in this process; gives the names of those that were started."""
    monkeypatch.setitem(jobs.ENGINES, "local", InProcess)
    monkeypatch.setattr(InProcess, "submitted", [])
    return InProcess.submitted

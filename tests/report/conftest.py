# SPDX-License-Identifier: Apache-2.0
"""Runs for a page: real ones of tiny models, and written ones of any size; and a headless Chromium."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dyads.runs.contents import Prediction
from dyads.runs.folder import RunFolder
from made_runs import write_run

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>bold</b>{{ 7*7 }}\u202e"
"""A text that would change a page which takes it for markup, script or template."""


@pytest.fixture
def fifteen(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes runs of many tasks and methods, with prompts as long as real ones."""

    def write(tasks: int = 3, methods: int = 2, n: int = 6, prompt: int = 60, seeds: int = 1) -> list[Path]:
        chance = random.Random(0)
        letters = "etaoinshrdlucmfwyp"
        words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(3000)]
        definitions = [" ".join(chance.choices(words, k=prompt // 2)) for _ in range(tasks)]
        prompts = {
            (t, i): f"{definitions[t]}\n{' '.join(chance.choices(words, k=prompt // 2))}"
            for t in range(tasks)
            for i in range(n)
        }
        paths = []
        for m in range(methods):
            for seed in range(seeds):
                method = "majority" if m == 0 and methods > 2 else "mode"
                values = {f"task {t}": [float(chance.randint(0, 10) * 10) for _ in range(n)] for t in range(tasks)}
                path = tmp_path / "runs" / f"method {m} {seed}"
                losses = [(step, 3.0 / step + m / 10) for step in range(10, 110, 10)]
                folder = write_run(path, f"method {m}", values, method=method, seed=seed, losses=losses)
                scores = folder.scores()
                predictions = {}
                for t, (task, own) in enumerate(values.items()):
                    predictions[task] = [
                        Prediction(
                            id=f"{task}-{i}",
                            prompt=prompts[t, i],
                            prediction=" ".join(chance.choices(words, k=6)),
                            references=["the stone"],
                            scores={"rouge_l": value},
                        )
                        for i, value in enumerate(own)
                    ]
                folder.write_results(predictions, scores)
                paths.append(path)
        return paths

    return write


@pytest.fixture
def hostile(tmp_path: Path) -> list[Path]:
    """Two runs, every text of which is hostile as far as a run folder admits it."""
    paths = []
    for name, answer in (("a & b", "right"), ("it's b", "wrong")):
        folder = write_run(tmp_path / f"h{len(paths)}", name, {"x & y": [100.0, 0.0]}, metrics={"x & y": "rouge_l"})
        predictions = [
            Prediction(
                id=f"{HOSTILE}{i}",
                prompt=HOSTILE,
                prediction=HOSTILE + answer,
                references=[HOSTILE],
                scores={"rouge_l": s},
            )
            for i, s in enumerate((100.0, 0.0))
        ]
        folder.write_results({"x & y": predictions}, folder.scores())
        folder.append_log({"step": 1, "loss": 1.0})
        folder.append_log({"event": "validated", "step": 1, "validation_loss": 1.0, "tasks": {HOSTILE: 1.0}})
        paths.append(folder.path)
    return paths


@pytest.fixture
def learned(trained: Callable[..., RunFolder]) -> list[Path]:
    """Trained runs of a tiny model: gates of tokens, gates of tasks, and LoRA."""
    return [trained(method).path for method in ("mode", "more", "lora")]

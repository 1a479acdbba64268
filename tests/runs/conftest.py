# SPDX-License-Identifier: Apache-2.0
"""Run folders made without a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dyads.runs.config import Recipe
from dyads.runs.folder import Prediction, RunFolder, ScoreRow, Scores


def recipe_of(name: str, *, method: str = "mode", seed: int = 0, **sections: Any) -> Recipe:
    options = {"r": 4} if method not in ("zero-shot", "majority") else {}
    return Recipe.model_validate(
        {
            "name": name,
            "seed": seed,
            "model": {"name": "tiny"},
            "method": {"name": method, **options},
            "tasks": {"family": "starter"},
            **sections,
        }
    )


def write_run(
    path: Path,
    name: str,
    values: Mapping[str, Sequence[float]],
    *,
    method: str = "mode",
    seed: int = 0,
    metrics: Mapping[str, str] | None = None,
    changed: Mapping[str, Mapping[str, Any]] | None = None,
    parameters: int = 1000,
    split: str = "test",
    losses: Sequence[tuple[int, float]] = (),
    **sections: Any,
) -> RunFolder:
    """A folder as an evaluation leaves it; `values` are headline scores, `changed` overrides score rows."""
    recipe = recipe_of(name, method=method, seed=seed, **sections)
    folder = RunFolder.create(path, recipe)
    rows: list[ScoreRow] = []
    for task, scores in values.items():
        metric = (metrics or {}).get(task, "rouge_l")
        row = ScoreRow(
            task=task,
            version=1,
            fingerprint=f"print-{task}",
            category="",
            metric=metric,
            value=sum(scores) / len(scores),
            n=len(scores),
            higher_is_better=True,
            headline=True,
        )
        rows.append(ScoreRow(**{**row, **(changed or {}).get(task, {})}))  # type: ignore[typeddict-item]
        folder.write_predictions(
            task,
            [
                Prediction(id=f"{task}-{i}", prediction="a", references=["b"], scores={metric: float(s)})
                for i, s in enumerate(scores)
            ],
        )
    for step, loss in losses:
        folder.append_log({"step": step, "loss": loss})
    everything = [s for scores in values.values() for s in scores]
    folder.write_scores(
        Scores(
            schema=1,
            run=name,
            method=method,
            split=split,
            seed=seed,
            parameters=parameters,
            seconds={"train": 61.0, "evaluate": 5.0},
            steps=100,
            scores=rows,
            micro={"headline": sum(everything) / len(everything)},
            macro={"headline": sum(r["value"] for r in rows) / len(rows)},
        )
    )
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a synthetic run into a folder of the test and gives its path."""

    def write(name: str, values: Mapping[str, Sequence[float]], *, seed: int = 0, **facts: Any) -> Path:
        path = tmp_path / f"{name}-seed{seed}"
        return write_run(path, name, values, seed=seed, **facts).path

    return write


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """A small valid recipe, with sections replaced."""
    return recipe_of

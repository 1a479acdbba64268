# SPDX-License-Identifier: Apache-2.0
"""Instances of a comparison for the page: prompts and references once, and the answers of every run."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

from dyads.comparing.comparison import Comparison
from dyads.comparing.metric_moments import instance_score
from dyads.errors import visible
from dyads.runs.contents import Prediction
from dyads.runs.folder import RunFolder

__all__ = ["MOST", "first", "instances_of", "kept", "pack"]

MOST = 2_000_000
"""Characters of packed data on a page."""


def instances_of(comparison: Comparison) -> dict[str, Any]:
    """Tasks with their instances, runs, and by run and task the answers with their scores."""
    runs = [
        (i, seed, RunFolder(path))
        for i, c in enumerate(comparison.columns)
        for seed, path in zip(c.seeds, c.runs, strict=True)
    ]
    tasks: list[dict[str, Any]] = []
    answers: list[list[dict[str, Any]]] = [[] for _ in runs]
    for row in comparison.tasks:
        by_run = [{p["id"]: p for p in folder.predictions(row.task)} for _, _, folder in runs]
        scored = [
            next(s for s in folder.scores()["scores"] if s["headline"] and s["task"] == row.task)
            for _, _, folder in runs
        ]
        ids = list(by_run[0])
        prompted = next((found for found in by_run if "prompt" in found[ids[0]]), by_run[0])
        tasks.append(
            {
                "name": visible(row.task),
                "metric": row.metric,
                "n": row.n,
                "instances": [_instance(prompted[i]) for i in ids],
            }
        )
        for j, (found, score) in enumerate(zip(by_run, scored, strict=True)):
            texts = [visible(found[i]["prediction"], keep="\n\t") for i in ids]
            values = [round(instance_score(found[i], score), 1) for i in ids]
            answers[j].append({"texts": texts, "scores": values})
    seeds = sorted({seed for _, seed, _ in runs})
    return {
        "seeds": list(map(str, seeds)),
        "runs": [{"method": i, "seed": str(seed)} for i, seed, _ in runs],
        "tasks": tasks,
        "answers": answers,
    }


def _instance(prediction: Prediction) -> dict[str, Any]:
    return {
        "id": visible(prediction["id"]),
        "prompt": visible(prediction["prompt"], keep="\n\t") if "prompt" in prediction else None,
        "references": [visible(text, keep="\n\t") for text in prediction["references"]],
    }


def pack(data: dict[str, Any]) -> str:
    """JSON, compressed by gzip, in base64; the same data give the same text."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), 9, mtime=0)).decode()


def first(data: dict[str, Any], count: int) -> dict[str, Any]:
    """The data with the first `count` instances of each task."""
    return {
        **data,
        "tasks": [{**task, "instances": task["instances"][:count]} for task in data["tasks"]],
        "answers": [
            [{key: values[:count] for key, values in of_task.items()} for of_task in of_run]
            for of_run in data["answers"]
        ],
    }


def kept(data: dict[str, Any], most: int = MOST) -> tuple[str, int | None]:
    """(packed data of at most `most` characters, how many instances of each task are in them; None: all)."""
    packed, left = pack(data), None
    count = max((len(task["instances"]) for task in data["tasks"]), default=0)
    while len(packed) > most and count > 1:
        left = count = count // 2
        packed = pack(first(data, count))
    return packed, left

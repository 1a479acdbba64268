# SPDX-License-Identifier: Apache-2.0
"""Serving: tokens per second of many clients at once, beside one request after the other, and beside a plain LoRA.

One server has two runs with one base model, MoDE 4x2 and a LoRA with as many parameters. Clients in the same process
send the tasks' inputs and read streams; every answer has exactly `new_tokens` tokens, since the tokens that would end
one are switched off. A round measures every side once.

`python -m benchmarks.serving JOB` writes one line of JSON for every side that it reads.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rounds import Worker, WorkerError, rotated
from benchmarks.scoring import train_once

LABELS = {"dyads": "MoDE 4x2", "lora": "LoRA 9", "sequential": "MoDE 4x2, one request after the other"}
METRICS = ("per_second", "first_token_p95")
METHODS = {"dyads": {"name": "mode", "num_experts": 4, "r": 2}, "lora": {"name": "lora", "r": 9}}


def job(*, quick: bool, out: Path) -> dict[str, Any]:
    """What the worker process needs to know."""
    return {
        "model": "packaged:smollm2-135m",
        "dtype": "bfloat16",
        "steps": 1 if quick else 40,
        "tasks": 2 if quick else 8,
        "clients": 4 if quick else 32,
        "new_tokens": 4 if quick else 64,
        "threads": 1 if quick else 2,
        "out": str(out),
    }


def measure(job: dict[str, Any], rounds: int, logs: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """{facts, rounds, errors} of all sides, which take turns in one process."""
    results: list[dict[str, Any]] = [{metric: {} for metric in METRICS} for _ in range(rounds)]
    worker = Worker("benchmarks.serving", job, job["threads"], logs / "serving.log", keep_memory=False)
    try:
        facts = worker.read()["facts"]
        for number, result in enumerate(results):
            for side in rotated(list(LABELS), number):
                for metric, value in worker.request(side).items():
                    result[metric][side] = value
            say(f"serving, round {number + 1} of {rounds}")
    except WorkerError as failed:
        say(f"serving failed: {failed}")
        return {"facts": {}, "rounds": [], "errors": {"dyads": str(failed)}}
    finally:
        worker.close()
    return {"facts": dict.fromkeys(LABELS, facts), "rounds": results, "errors": {}}


def trained_runs(job: dict[str, Any]) -> dict[str, Path]:
    """Folders of the served runs, trained once for a few steps."""
    found = {}
    for side, method in METHODS.items():
        found[side] = Path(job["out"]) / "models" / f"served-{side}-{job['steps']}"
        train_once(found[side], f"{LABELS[side]}, served by the benchmark", method, job)
    return found


class Clients:
    """A server of both runs, and the requests of its clients: one each, over all tasks in turns."""

    def __init__(self, job: dict[str, Any]) -> None:
        from dyads.runs.folder import RunFolder
        from dyads.serving.limits import Limits
        from dyads.serving.server import Options, Server
        from dyads.tasks import load_suite

        runs = {side: RunFolder.open(path) for side, path in trained_runs(job).items()}
        tasks = load_suite(runs["dyads"].recipe().tasks).tasks[: job["tasks"]]
        self.job = job
        self.inputs: list[tuple[str, str]] = []
        for client in range(job["clients"]):
            task = tasks[client % len(tasks)]
            assert task.template is not None
            # The whole prompt of an instance, read as it is: the same tokens as its input in the task's form.
            self.inputs.append((task.name, task.test[client // len(tasks)].prompt))
        self.server = Server(runs, Options(port=0, slots=job["clients"], limits=Limits()))
        for model in self.server.models.models.values():
            model.tokenizer.eos = -1  # no answer ends before its limit
            if model.tokenizer.chat is not None:
                model.tokenizer.chat.end = -1
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def measured(self, side: str) -> dict[str, float]:
        """The metrics of a side."""
        return asyncio.run(self._one_by_one() if side == "sequential" else self._at_once(side))

    async def _at_once(self, run: str) -> dict[str, float]:
        import httpx

        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.server.address, timeout=600, limits=limits) as http:
            begin = time.perf_counter()
            waits = await asyncio.gather(*(self._ask(http, run, *asked) for asked in self.inputs))
            seconds = time.perf_counter() - begin
        p95 = statistics.quantiles(waits, n=20, method="inclusive")[-1]
        return {"per_second": len(waits) * self.job["new_tokens"] / seconds, "first_token_p95": p95}

    async def _one_by_one(self) -> dict[str, float]:
        import httpx

        asked = self.inputs[: self.job["tasks"]]
        async with httpx.AsyncClient(base_url=self.server.address, timeout=600) as http:
            begin = time.perf_counter()
            for task, text in asked:
                await self._ask(http, "dyads", task, text)
            seconds = time.perf_counter() - begin
        return {"per_second": len(asked) * self.job["new_tokens"] / seconds}

    async def _ask(self, http: Any, run: str, task: str, prompt: str) -> float:
        """Seconds to the first token of an answer, which is read to its end."""
        body = {
            "model": f"{run}/{task}",
            "prompt": prompt,
            "max_tokens": self.job["new_tokens"],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begin, first, last = time.perf_counter(), 0.0, ""
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                first = first or time.perf_counter() - begin
                last = line if '"usage"' in line else last
        assert json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"] == self.job["new_tokens"]
        return first


def main() -> None:
    """Train the runs if there are none, start the server, warm up, then measure a side for every line."""
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    clients = Clients(job)
    torch.set_num_threads(job["threads"])
    for side in METHODS:
        clients.measured(side)
    facts = {key: job[key] for key in ("clients", "tasks", "new_tokens", "dtype")}
    print(json.dumps({"facts": facts}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(clients.measured(line.strip())), file=answers, flush=True)
    clients.server.should_exit = True
    clients.thread.join()


if __name__ == "__main__":
    main()

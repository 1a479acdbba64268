# SPDX-License-Identifier: Apache-2.0
"""Rounds: contenders measured side by side, each in its own process, taking turns.

A process may be a few percent faster or slower than another of the same kind for as long as it lives, so all are
started anew after every few rounds. In a round every metric is measured once for every contender of a group, one after
the other, in an order that rotates; only one process works at a time. Ratios are taken within a round, so that both
sides see the machine in about the same state.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender, Setting

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("step", "forward", "decode")


class WorkerError(Exception):
    """A contender's process ended before it answered."""


KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Settings with which glibc keeps freed memory, for every contender alike. Without them a step of SmolLM2 returns a
gigabyte to the system and takes it again, a quarter of a million page faults that are measured too (LOG.md)."""


def child_environment(threads: int, keep_memory: bool = True) -> dict[str, str]:
    """Environment of a worker: fixed threads, no network, this checkout first on the path, freed memory kept or not."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {
        **os.environ,
        **fixed,
        **(KEEP_MEMORY if keep_memory else {}),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
    }


class Worker:
    """A process that answers with lines of JSON."""

    def __init__(self, module: str, job: dict[str, Any], threads: int, log: Path, keep_memory: bool = True) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=child_environment(threads, keep_memory),
            )

    def read(self) -> dict[str, Any]:
        """The next line; WorkerError with the last line of the log where there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            ended = self.process.wait()
            if ended < 0:
                why = ", as it does where memory runs out" if -ended == signal.SIGKILL else ""
                raise WorkerError(f"the system ended it (signal {-ended}){why}")
            said = [text.strip() for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise WorkerError(said[-1][:300] if said else f"ended with {ended}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def request(self, line: str) -> dict[str, Any]:
        """The answer to a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # read() raises with the reason
        return self.read()

    def close(self) -> None:
        """End the process."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure_group(
    setting_name: str,
    setting: Setting,
    contenders: dict[str, Contender],
    *,
    rounds: int,
    out: Path,
    logs: Path,
    attention: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """{facts, rounds, errors} of contenders measured together. One that fails is left out, with its reason."""
    workers: dict[str, Worker] = {}
    facts: dict[str, Any] = {}
    errors: dict[str, str] = {}
    results: list[dict[str, dict[str, float]]] = []

    def drop(name: str, failed: WorkerError) -> None:
        errors[name] = str(failed)
        say(f"{name} failed: {failed}")
        workers.pop(name).close()

    for first in range(0, rounds, setting.lives):
        try:
            for name, contender in contenders.items():
                if name in errors:
                    continue
                job = {"setting": setting_name, "contender": asdict(contender), "out": str(out), "attention": attention}
                workers[name] = Worker("benchmarks.measure", job, setting.threads, logs / f"{name}.log")
                try:  # one after the other, so that none warms up while another loads
                    facts.setdefault(name, workers[name].read()["facts"])
                    say(f"{name} is ready ({facts[name]['parameters']:,} trainable parameters)")
                except WorkerError as failed:
                    drop(name, failed)
            for number in range(first, min(first + setting.lives, rounds)):
                results.append(_round(number, setting, contenders, workers, drop))
                say(f"round {number + 1} of {rounds}")
        finally:
            for worker in workers.values():
                worker.close()
            workers.clear()
    return {"facts": facts, "rounds": results, "errors": errors}


def _round(
    number: int,
    setting: Setting,
    contenders: dict[str, Contender],
    workers: dict[str, Worker],
    drop: Callable[[str, WorkerError], None],
) -> dict[str, dict[str, float]]:
    """{metric: {contender: value}}. A contender that fails is dropped."""
    answers: dict[str, dict[str, float]] = {}
    for metric in METRICS:
        for name in rotated(list(workers), number):
            if name not in workers or metric not in metrics_of(name, setting, contenders):
                continue
            try:
                answers.setdefault(metric, {})[name] = workers[name].request(metric)["value"]
            except WorkerError as failed:
                drop(name, failed)
    return answers


def metrics_of(name: str, setting: Setting, contenders: dict[str, Contender]) -> tuple[str, ...]:
    """Metrics of a contender in its group; of the reference only those that another contender has."""
    if name != setting.reference or len(contenders) == 1:
        return contenders[name].metrics
    compared = {metric for other in contenders if other != name for metric in contenders[other].metrics}
    return tuple(metric for metric in contenders[name].metrics if metric in compared)


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names in order, beginning with another one in every round."""
    by = by % len(names) if names else 0
    return [*names[by:], *names[:by]]

# SPDX-License-Identifier: Apache-2.0
"""Jobs of a study: one process per run, started by local threads or by Ray.

A job's output goes to a log file, which stays locked for as long as any process writes to it, also after the study that
started the process was killed. Whether a run is in progress is thus read off the lock, and a second study waits for the
processes of the first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from dyads.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: without locks, so two studies in one folder do not know of each other
    fcntl = None  # type: ignore[assignment]

__all__ = ["ENGINES", "Engine", "Job", "is_running", "last_line", "run_job"]

_STOPPED = -1
_PATIENCE = 300.0
"""Seconds that a stopped job has to end its step and to save a checkpoint before it is killed."""
_INTERRUPTED = (
    *(130, -signal.SIGINT),
    *(code for n in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)) for code in (-n, 128 + n)),
)
"""Exit codes of a process that Ctrl-C, a shutdown or a closed terminal ended: it did not fail."""


@dataclass(frozen=True)
class Job:
    """A command with its log file."""

    name: str
    command: tuple[str, ...]
    log: Path
    folder: Path
    """The working directory."""
    threads: int | None = None
    """OMP_NUM_THREADS where the environment sets none, so that jobs side by side share the cores."""


def run_job(job: Job, stopped: Callable[[], bool] = lambda: False) -> int:
    """Run a job to its end and return its exit code; its process ends with this function, whatever ends that."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        while not _lock(log):
            if stopped():
                return _STOPPED
            time.sleep(0.2)
        log.truncate(0)
        threads = {} if job.threads is None else {"OMP_NUM_THREADS": str(job.threads)}
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=job.folder,
            env={**threads, **os.environ},
        )
        try:
            while (code := process.poll()) is None:
                if stopped():
                    return _STOPPED
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
        finally:
            _end(process)
        if code in _INTERRUPTED:
            return code
        if code < 0:
            log.write(f"killed by signal {-code}{' (out of memory?)' if code == -9 else ''}\n".encode())
        if code:
            log.write(f"{_EXIT}{code}\n".encode())
        return code


_EXIT = "exit code "
_TAIL = 2**16
"""Bytes at the end of a log that are read for its last line."""


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _lock(log: IO[bytes]) -> bool:
    """Lock an open file for this process and its children; False if another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_running(log: Path) -> bool:
    """Whether a process writes to this log, of this study or of another one."""
    if fcntl is None or not log.is_file():
        return False
    with log.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def last_line(log: Path) -> tuple[str, bool]:
    """(the last line of a job's output, whether the job failed)."""
    text = ""
    if log.is_file():
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            text = file.read(_TAIL).decode("utf-8", "replace")
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    failed = bool(lines) and lines[-1].startswith(_EXIT)
    if failed and len(lines) > 1:
        del lines[-1]
    return (lines[-1] if lines else ""), failed


# --- engines ----------------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """What starts jobs."""

    def submit(self, job: Job) -> Future[int]:
        """Start a job, now or when a worker is free."""

    def close(self) -> None:
        """Stop all jobs and wait for their processes to end."""


class LocalEngine:
    """Jobs on this machine, a thread waiting for each."""

    def __init__(self, workers: int) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(workers)

    def submit(self, job: Job) -> Future[int]:
        return self._pool.submit(run_job, job, self._stop.is_set)

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


class RayEngine:
    """Jobs as tasks of Ray: on the cluster that RAY_ADDRESS names, else on this machine.

    The machines of a cluster need this environment, and the study's folder at the same path.
    """

    def __init__(self, workers: int) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError("--engine ray needs Ray: pip install 'dyads[study]'") from None
        self._ray: Any = ray
        self._started = not ray.is_initialized()
        if self._started:
            here: dict[str, Any] = (
                {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            )
            ray.init(log_to_driver=False, configure_logging=False, **here)
        self._task: Any = ray.remote(num_cpus=1, max_retries=0)(run_job)
        self._references: list[Any] = []

    def submit(self, job: Job) -> Future[int]:
        reference = self._task.remote(job)
        self._references.append(reference)
        future: Future[int] = reference.future()
        return future

    def close(self) -> None:
        for reference in self._references:
            self._ray.cancel(reference)  # raises KeyboardInterrupt in run_job, which ends its process
        if self._references:
            self._ray.wait(self._references, num_returns=len(self._references), timeout=_PATIENCE + 5)
        if self._started:
            self._ray.shutdown()


ENGINES: dict[str, Callable[[int], Engine]] = {"local": LocalEngine, "ray": RayEngine}
"""By the name that `dyads study --engine` takes, each made for a number of workers."""

# SPDX-License-Identifier: Apache-2.0
"""Processes that start at once: forks of the test process, which has imported torch, transformers and PEFT already.

For tests of what a command does in a process of its own. Those of how a process starts (imports, encodings, launchers)
start a new interpreter.
"""

from __future__ import annotations

import io
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


class Fork:
    """A fork that runs a function and ends; its output goes to a file. `returncode` is None while it runs."""

    def __init__(self, work: Callable[[], object], cwd: Path | None = None, env: Mapping[str, str] | None = None):
        self.returncode: int | None = None
        with tempfile.NamedTemporaryFile(prefix="fork-", suffix=".out", delete=False) as file:
            self.out = Path(file.name)
        self.err = self.out.with_suffix(".err")
        with threads():
            self.pid = os.fork()
        if self.pid == 0:
            for stream, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
            child(work, cwd, env)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end, then give what was written to stdout and stderr; a fork that lasts longer is killed."""
        ends = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > ends:
                self.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        written = tuple(path.read_text(encoding="utf-8") for path in (self.out, self.err))
        for path in (self.out, self.err):
            path.unlink()
        return written


def run(
    work: Callable[[], object], cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a function in a fork, as `subprocess.run` runs a command."""
    process = Fork(work, cwd, env)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess([], process.returncode, out, err)


def script(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Run `[python, FILE, *arguments]` in a fork; in the place of `subprocess.run`."""

    def work() -> None:
        sys.argv = list(command[1:])
        sys.path.insert(0, str(Path(command[1]).parent))
        runpy.run_path(command[1], run_name="__main__")

    return run(work)


@contextmanager
def threads() -> Iterator[None]:
    """Without the warning of a fork beside other threads: those of xdist and of libraries are idle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def child(work: Callable[[], object], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
    """What a new child process does: reset streams, signals and libraries as in a new interpreter, work and end."""
    code: Any = 1
    try:
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(os.fdopen(n, mode, closefd=False), encoding="utf-8", line_buffering=True)
            for n, mode in enumerate(("rb", "wb", "wb"))
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        warnings.resetwarnings()
        logging.root.handlers.clear()
        for logger in list(logging.root.manager.loggerDict.values()):
            for handler in getattr(logger, "handlers", ()):
                if type(handler) is logging.StreamHandler:
                    handler.setStream(sys.stderr)
        torch.set_num_threads(1)  # the threads of a pool are not in a fork
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        if cwd is not None:
            os.chdir(cwd)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

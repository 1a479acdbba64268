# SPDX-License-Identifier: Apache-2.0
"""SIGTERM during a run: a training step ends, its checkpoint is saved, and the process says how to go on.

Batch systems send SIGTERM before they kill a job. Outside the training loop, and at a second SIGTERM, the process ends
at once; what it was writing has no manifest yet (runs/manifest.py).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dyads.errors import RunError

__all__ = ["Sigterm", "TerminatedError", "on_sigterm"]


class TerminatedError(RunError):
    """The process got SIGTERM."""

    exit_code = 128 + signal.SIGTERM


class Sigterm:
    """Whether SIGTERM came; `waits` while a training step may end first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waits = self.came = False

    def handle(self, signum: int, frame: Any) -> None:
        if self.waits and not self.came:
            self.came = True
            return
        raise TerminatedError(
            f"'{self.path}' was stopped by SIGTERM; the same command goes on, a training with --resume"
        )


@contextmanager
def on_sigterm(path: Path) -> Iterator[Sigterm]:
    """Handle SIGTERM in the block; a handler that is installed already stays, and other threads get none."""
    sigterm = Sigterm(path)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield sigterm
        return
    signal.signal(signal.SIGTERM, sigterm.handle)
    try:
        yield sigterm
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

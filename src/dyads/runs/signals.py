# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGHUP in a command: a training step ends, its checkpoint is saved, and the error says how to go on.

Batch systems send SIGTERM before they kill a job, and a terminal that closes sends SIGHUP. Outside the training loop,
and at a second signal, the command ends at once; what it was writing has no manifest yet (runs/manifest.py).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dyads.errors import RunError

__all__ = ["Sigterm", "TerminatedError", "ends_by_signal", "on_sigterm"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class TerminatedError(RunError):
    """The process got SIGTERM or SIGHUP."""

    def __init__(self, message: str, signum: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class _Stopped(BaseException):
    """Raised by the handlers. No Exception, so that a library's `except Exception` does not swallow it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class Sigterm:
    """Whether a signal came; `waits` while a training step may end first."""

    def __init__(self) -> None:
        self.waits = False
        self.came: int | None = None
        """Its number."""

    def handle(self, signum: int, frame: Any) -> None:
        if self.waits and self.came is None:
            self.came = signum
            return
        raise _Stopped(signum)


@contextmanager
def on_sigterm(path: Path) -> Iterator[Sigterm]:
    """Handle the signals while a run is written: TerminatedError at once, or after a step where `waits` is set.

    A handler that a program installed stays, and threads other than the main one get none.
    """
    sigterm = Sigterm()
    with _handled(sigterm.handle, f"'{path}' was ", "; the same command goes on, a training with --resume"):
        yield sigterm


@contextmanager
def ends_by_signal() -> Iterator[None]:
    """Let the signals end the block with a TerminatedError, so that what it was writing is removed."""
    with _handled(_end, "", "; the same command starts again"):
        yield


def _end(signum: int, frame: Any) -> None:
    raise _Stopped(signum)


@contextmanager
def _handled(handler: Callable[[int, Any], None], subject: str, way_out: str) -> Iterator[None]:
    """Install a handler in the place of the default one, or of that of `ends_by_signal`."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: earlier for number, earlier in before.items() if earlier in (signal.SIG_DFL, _end)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    except _Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        raise TerminatedError(f"{subject}stopped by {name}{way_out}", stopped.signum) from None
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)

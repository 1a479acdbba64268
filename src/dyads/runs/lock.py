# SPDX-License-Identifier: Apache-2.0
"""Lock of a folder: one process at a time writes a run or an export.

The operating system holds the lock (`filelock`), and releases it when the process ends, however it ends. The file
`.lock` names the process that holds it, and is removed with it; that of a killed process is taken over.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from dyads.errors import DyadsError, RunError, shortened
from dyads.reading import read_json

__all__ = ["LOCK", "LockedError", "locked"]

LOCK = ".lock"


class LockedError(RunError):
    """Another process writes into the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created; LockedError names the process that holds it already.

    The same process may take the lock again inside. A new folder in which nothing else was written is removed.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"'{folder}' is a file; choose a folder")
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise LockedError(f"'{folder}' is in use by {_holder(folder / LOCK)}: wait for it, or end it") from None
    try:
        if lock.lock_counter == 1:
            _write_holder(folder / LOCK)
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):
                (folder / LOCK).unlink(
                    missing_ok=True
                )  # before the release: a waiting process finds it gone, and retries
                if new and not any(folder.iterdir()):
                    folder.rmdir()
        lock.release()


def _write_holder(path: Path) -> None:
    facts = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join(sys.argv),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    with suppress(OSError):  # Windows lets nobody write a locked file
        path.write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _holder(path: Path) -> str:
    """The process that holds a lock, in words."""
    try:
        facts = read_json(path, error=RunError)
        return shortened(
            f"process {facts['pid']} on {facts['host']} since {facts['since']} ({shortened(facts['command'], 80)})"
        )
    except (OSError, DyadsError, KeyError, TypeError):
        return "another process"

# SPDX-License-Identifier: Apache-2.0
"""Servers of runs on loopback, in a thread of the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dyads.runs.folder import RunFolder

if TYPE_CHECKING:
    from dyads.serving.server import Server


@contextmanager
def served(runs: Mapping[str, RunFolder], **options: Any) -> Iterator[Server]:
    """A server of the runs on a free port."""
    from dyads.serving.server import Options, Server

    server = Server(runs, Options(port=0, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join()


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Return when it is true; the seconds are more than any test needs."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)

# SPDX-License-Identifier: Apache-2.0
"""Server: the engine and uvicorn together, from loading the runs to a shutdown that ends every stream."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from dyads.errors import ConfigError
from dyads.runs.folder import RunFolder
from dyads.serving.app import application
from dyads.serving.engine import Engine
from dyads.serving.errors import log
from dyads.serving.limits import Limits
from dyads.serving.metrics import Metrics
from dyads.serving.served_models import ServedModels

__all__ = ["Options", "Server"]

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass
class Options:
    """How runs are served."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    slots: int = 32
    """Requests that are answered at once, by one base model."""
    waiting: int = 256
    """Requests that wait at most."""
    prompt_tokens: int | None = None
    """Of one prompt; None: as many as the run's model reads."""
    prefix_bytes: int = 256 << 20
    """For keys and values of shared prefixes; 0: none are kept."""
    grace_seconds: float = 30.0
    """Until a stopping server ends the answers that still run."""
    log_text: bool = False
    """Whether prompts and answers are logged."""
    limits: Limits = field(default_factory=Limits)


class Server(uvicorn.Server):
    """A server of runs, by their names."""

    def __init__(self, runs: Mapping[str, RunFolder], options: Options) -> None:
        self.options = options
        self.socket = _bound(options.host, options.port)  # before the models are loaded, which takes longer
        host, port = self.socket.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        try:
            self.models = ServedModels(runs, slots=options.slots)
        except BaseException:
            self.socket.close()
            raise
        if options.prompt_tokens is not None:
            self.models.limit_prompts(options.prompt_tokens)
        self.engine = Engine(
            self.models.batches,
            most_waiting=options.waiting,
            prefix_bytes=options.prefix_bytes,
            metrics=Metrics(),
        )
        if options.limits.hosts is None and options.host in (*_LOOPBACK, "::1"):
            options.limits.hosts = _LOOPBACK
        self.app = application(self.models, self.engine, options.limits, log_text=options.log_text)
        super().__init__(
            uvicorn.Config(
                self.app,
                log_config=None,
                access_log=False,
                log_level="warning",
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=5,
                h11_max_incomplete_event_size=1 << 16,
            )
        )

    def run(self, sockets: Any = None) -> None:
        """Serve until `should_exit`, which a signal sets in the main thread."""
        self.engine.start()
        try:
            super().run([self.socket])
        finally:
            self.engine.stop()
            self.socket.close()

    async def shutdown(self, sockets: Any = None) -> None:
        """Take no more requests, let the answers end, end those that run too long with an error, then close."""
        engine = self.engine
        engine.close()
        end = time.monotonic() + self.options.grace_seconds
        while not engine.is_idle and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.stop)
        await asyncio.sleep(0)  # the last pieces reach their streams
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A first signal stops the server, a second one ends its answers at once; then the command goes on."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(signum: int, frame: Any) -> None:
            if self.should_exit:
                self.force_exit = True
            else:
                log.warning("stopping: %d answers run, a second signal ends them", self.engine.running)
            self.should_exit = True

        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port or --host"
        ) from error

# SPDX-License-Identifier: Apache-2.0
"""Server: the engine and uvicorn together, from loading the runs to a shutdown that ends every stream."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import uvicorn

from dyads.errors import ConfigError
from dyads.runs.folder import RunFolder
from dyads.serving.app import application
from dyads.serving.connection import Connection
from dyads.serving.door import host_name
from dyads.serving.engine import Engine
from dyads.serving.errors import ServingError, log
from dyads.serving.limits import Limits
from dyads.serving.metrics import Metrics
from dyads.serving.served_models import ServedModels

__all__ = ["Options", "Server"]

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_ANY = ("0.0.0.0", "::")


@dataclass
class Options:
    """How runs are served."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    slots: int = 32
    """Requests that are answered at once, by one base model."""
    cache_tokens: int = 65_536
    """Rows times columns of the keys and values of the answers that one base model has in progress."""
    prefill_tokens: int = 4096
    """Tokens of prompts in one forward pass; a longer prompt is read in parts."""
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
    allowed_hosts: Sequence[str] = ()
    """Names in the header Host that are answered, beside those of this machine; "*": all."""
    trusted_proxies: Sequence[str] = ()
    """Addresses and networks whose X-Forwarded-For gives the address of a client."""
    limits: Limits = field(default_factory=Limits)


class Server(uvicorn.Server):
    """A server of runs, by their names."""

    def __init__(self, runs: Mapping[str, RunFolder], options: Options) -> None:
        self.options = options
        self.socket = _bound(options.host, options.port)  # before the models are loaded, which takes longer
        host, port = self.socket.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        try:
            self.models = ServedModels(
                runs,
                slots=options.slots,
                cache_tokens=options.cache_tokens,
                prefill_tokens=options.prefill_tokens,
            )
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
            failed=self._engine_failed,
        )
        if options.limits.hosts is None:
            options.limits.hosts = _hosts(options)
        self.app = application(self.models, self.engine, options.limits, log_text=options.log_text)
        super().__init__(
            uvicorn.Config(
                self.app,
                log_config=None,
                access_log=False,
                log_level="warning",
                lifespan="off",
                server_header=False,
                http=partial(Connection, limits=options.limits),  # type: ignore[arg-type]
                ws="none",
                proxy_headers=bool(options.trusted_proxies),
                forwarded_allow_ips=list(options.trusted_proxies),
                timeout_graceful_shutdown=5,
                h11_max_incomplete_event_size=1 << 16,
            )
        )

    def run(self, sockets: Any = None) -> None:
        """Serve until `should_exit`, which a signal sets in the main thread; ServingError where the engine failed."""
        try:
            self.engine.start()
            super().run([self.socket])
        finally:
            self.engine.stop()
            self.socket.close()
        if self.engine.failure:
            raise ServingError(f"the server has stopped, since its engine failed: {self.engine.failure}", status=500)

    def _engine_failed(self) -> None:
        self.should_exit = True

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


def _hosts(options: Options) -> frozenset[str] | None:
    """The names in the header Host that are answered; None: all.

    A page of a browser reaches a server that listens on an address under any name, if the page's owner lets the name
    have this address.
    """
    allowed = {host_name(name) for name in options.allowed_hosts}
    if "*" in allowed:
        return None
    own = f"[{options.host}]" if ":" in options.host else options.host
    names = socket.gethostname() if options.host in _ANY else own
    return _LOOPBACK | {names.lower()} | allowed


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port or --host"
        ) from error

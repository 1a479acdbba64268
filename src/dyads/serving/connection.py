# SPDX-License-Identifier: Apache-2.0
"""Connection: uvicorn's HTTP/1.1 protocol with limits on its number, on slow headers and on clients that do not read.

uvicorn has a timeout for idle connections after a response, and none for one that sends nothing, sends a header byte by
byte, or leaves a response unread. Relied on here (checked with uvicorn 0.54): `H11Protocol` and its attributes `cycle`,
`connections`, `loop` and `transport`.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from dyads.serving.errors import ServingError
from dyads.serving.limits import Limits

__all__ = ["Connection"]


class Connection(H11Protocol):
    """One connection, which is closed when it exceeds a limit."""

    def __init__(self, *given: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*given, **named)
        self._limits = limits
        self._header: asyncio.TimerHandle | None = None
        """Runs while a request's header is awaited."""
        self._reader: asyncio.TimerHandle | None = None
        """Runs while written bytes are not read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` is called for the first byte that is not read
        if len(self.connections) > self._limits.connections:
            transport.write(_full())
            transport.close()
        self._await_header()

    def data_received(self, data: bytes) -> None:
        if not self._answers and self._header is None:
            self._await_header()
        super().data_received(data)
        if self._answers:
            self._stop_waiting()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader = self.loop.call_later(self._limits.reading_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._reader is not None:
            self._reader.cancel()
        super().connection_lost(exc)

    @property
    def _answers(self) -> bool:
        """Whether a request has come whose response is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_header(self) -> None:
        self._header = self.loop.call_later(self._limits.header_seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._header is not None:
            self._header.cancel()
            self._header = None


def _full() -> bytes:
    """The response of a connection beyond the limit."""
    error = ServingError.unavailable("the server has as many connections as it takes: try again later", "connections")
    body = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": len(body), "Connection": "close", **error.headers}
    lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body

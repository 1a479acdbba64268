# SPDX-License-Identifier: Apache-2.0
"""Middleware before all paths: host, API key, requests per minute and size of the body; and errors after them."""

from __future__ import annotations

import asyncio
import re
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dyads.errors import shortened, visible
from dyads.serving.errors import ServingError
from dyads.serving.limits import Limits
from dyads.serving.metrics import Metrics
from dyads.serving.responses import error_response

__all__ = ["Door", "host_name"]

_PORT = re.compile(r"(?<=[^:]):\d*$")


class Door:
    """Refuses a request before its body is parsed; the whole body is read first, within its limits."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, await self._read(scope, receive), sending)
        except ServingError as error:
            status = error.status
            await error_response(error)(scope, receive, send)
        except ConnectionError:
            return  # the client is gone
        except Exception as error:
            failure = ServingError.internal(error)
            if status:  # its response has begun, so that uvicorn closes the connection
                return
            status = failure.status
            await error_response(failure)(scope, receive, send)
        finally:
            if status >= 400:
                self.metrics.refused.labels(status).inc()

    def _check(self, scope: Scope) -> None:
        limits, headers = self.limits, Headers(scope=scope)
        given = headers.get("host")  # None: no browser, but HTTP/1.0, as of a load balancer's health check
        host = host_name(given or "")
        if given is not None and limits.hosts is not None and host not in limits.hosts and not _is_address(host):
            name = shortened(visible(host), 100)
            raise ServingError(
                f"this server does not answer to the Host '{name}': start it with --allowed-host {name}",
                code="wrong_host",
            )
        path: str = scope["path"]
        if path.startswith("/v1/") or path == "/metrics":
            address = (scope.get("client") or ("",))[0]
            key = self._key(scope, address) if limits.keys.are_needed else None
            limits.rate.check(address if key is None else key)

    def _key(self, scope: Scope, address: str) -> int | None:
        """The number of a request's API key; ServingError for a wrong one, and after too many of an address."""
        limits = self.limits
        limits.wrong_keys.check(address, cost=0)
        try:
            return limits.keys.check(dict(scope["headers"]).get(b"authorization", b""))
        except ServingError:
            limits.wrong_keys.check(address)
            raise

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that gives the body, which has come already."""
        if scope["method"] in ("GET", "HEAD"):
            return receive
        most = self.limits.body_bytes
        too_large = ServingError(f"the body has more than {most:,} bytes", status=413, code="request_too_large")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise too_large
        body = bytearray()

        async def read() -> None:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionResetError
                body.extend(message.get("body", b""))
                if len(body) > most:
                    raise too_large
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise ServingError("the body did not come in time", status=408) from None
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return replay


def host_name(host: str) -> str:
    """A host in lower case, without a port."""
    return _PORT.sub("", host).lower()


def _is_address(host: str) -> bool:
    """Whether a host is an address, which is no name that another one could have pointed at this server."""
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True

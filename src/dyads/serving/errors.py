# SPDX-License-Identifier: Apache-2.0
"""Errors of requests, in the form of OpenAI's: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

from dyads.errors import DyadsError

__all__ = ["ServingError", "log", "place_of"]

log = logging.getLogger("dyads.serving")


class ServingError(DyadsError):
    """A request that is refused or cannot be answered, with the status of its response."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None, retry: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry = retry
        """Seconds after which a client may try again; 0: never."""

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        found = {"Retry-After": str(self.retry)} if self.retry else {}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @classmethod
    def unavailable(cls, message: str, code: str = "stopping") -> ServingError:
        """The server takes no requests now."""
        return cls(message, status=503, code=code, retry=1)

    @classmethod
    def internal(cls, error: BaseException) -> ServingError:
        """An error that is not the client's; the log gets its type and place, and not its message, which may have text
        of the request in it."""
        log.error("a request failed: %s", place_of(error))
        return cls("the server failed to answer; its log has the reason", status=500, code="internal_error")


def place_of(error: BaseException) -> str:
    """Type and place of an error, without its message."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"

# SPDX-License-Identifier: Apache-2.0
"""Limits of a server: sizes of requests, API keys, and requests per minute."""

from __future__ import annotations

import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dyads.errors import ConfigError
from dyads.reading import read_text
from dyads.serving.errors import ServingError

__all__ = ["Keys", "Limits", "RateLimit"]

_MOST_CLIENTS = 10_000
_LARGEST_FILE = 2**20


class Keys:
    """API keys, compared in constant time; without any, every request passes."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._keys = [key.encode() for key in keys]

    @classmethod
    def of_file(cls, path: Path) -> Keys:
        """The keys of a file, one a line; empty lines and those with # are left out."""
        try:
            lines = read_text(path, error=ConfigError, most=_LARGEST_FILE).splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read the API keys in '{path}': {error.strerror}") from error
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise ConfigError(f"'{path}' has no API key: write one a line, or leave --api-keys out")
        return cls(keys)

    @property
    def are_needed(self) -> bool:
        """Whether requests need a key."""
        return bool(self._keys)

    def check(self, authorization: bytes) -> int | None:
        """The number of the key in the header `Authorization`; None where no key is needed, else ServingError."""
        if not self._keys:
            return None
        scheme, _, given = authorization.partition(b" ")
        found = None
        for number, key in enumerate(self._keys):  # all of them, so that the time does not tell which one is near
            if hmac.compare_digest(key, given.strip()):
                found = number
        if found is None or scheme.lower() != b"bearer":
            raise ServingError(
                "the API key is missing or not one of this server's: send it as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )
        return found


class RateLimit:
    """A token bucket for every client: `per_minute` requests, of which as many may come at once as `burst`."""

    def __init__(
        self,
        per_minute: float | None,
        burst: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        what: str = "requests",
    ) -> None:
        self._what = what
        self._rate = None if per_minute is None else per_minute / 60
        self._burst = max(1, burst if burst is not None else math.ceil(per_minute or 1))
        self._clock = clock
        self._buckets: OrderedDict[object, tuple[float, float]] = OrderedDict()

    def check(self, client: object, cost: int = 1) -> None:
        """Count a request, or with `cost` 0 none; ServingError where the client's bucket is empty."""
        if self._rate is None:
            return
        now = self._clock()
        left, at = self._buckets.pop(client, (float(self._burst), now))
        left = min(self._burst, left + (now - at) * self._rate)
        passes = left >= 1
        self._buckets[client] = (left - cost * passes, now)
        if len(self._buckets) > _MOST_CLIENTS:
            self._buckets.popitem(last=False)
        if not passes:
            wait = math.ceil((1 - left) / self._rate)
            raise ServingError(
                f"more than {self._rate * 60:g} {self._what} a minute: try again in {wait} s",
                status=429,
                code="rate_limit_exceeded",
                retry=wait,
            )


@dataclass
class Limits:
    """The limits of one server."""

    answer_tokens: int = 1024
    """Of one answer."""
    body_bytes: int = 1 << 20
    """Of one request."""
    body_seconds: float = 30.0
    """Until the body of a request has come."""
    reading_seconds: float = 60.0
    """Until a client has read an answer, or a part of a stream."""
    keys: Keys = field(default_factory=Keys)
    header_seconds: float = 10.0
    """Until the header of a request has come, and until a connection sends a first one."""
    connections: int = 512
    """Open at once."""
    rate: RateLimit = field(default_factory=lambda: RateLimit(None))
    wrong_keys: RateLimit = field(default_factory=lambda: RateLimit(20, what="requests with a wrong API key"))
    """Of requests with a wrong key, by address; beyond it all requests of the address are refused for a while, or a
    right key could still be found by trying."""
    hosts: frozenset[str] | None = None
    """Names in the header Host that are answered, in lower case and without a port; None: all."""

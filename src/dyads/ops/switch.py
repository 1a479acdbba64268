# SPDX-License-Identifier: Apache-2.0
"""How is a fast path switched off?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["FAST", "Switch"]


class Switch:
    """True, but within `off()`."""

    def __init__(self) -> None:
        self._on = True

    def __bool__(self) -> bool:
        return self._on

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within this context it is False; contexts may be nested."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before


FAST = Switch()
"""Whether `fused` and `Held` are anything else than `dyadic`: see `plain`."""

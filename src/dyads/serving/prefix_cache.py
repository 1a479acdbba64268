# SPDX-License-Identifier: Apache-2.0
"""Prefix cache: the keys and values of the tokens with which the prompts of a task begin, within a number of bytes.

The prefix of a task is found in its requests: it is what two successive prompts have in common, and it shrinks to what
a later prompt has in common with it. Where the bytes do not suffice, the prefix used longest ago is dropped first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from dyads.scoring.decode import Prefix, shared_prefix

__all__ = ["PrefixCache"]


@dataclass
class _Entry:
    prompt: list[int]
    """The last prompt."""
    prefix: Prefix | None = None


class PrefixCache:
    """Prefixes by key, such as the name of a task; all calls are made in one thread."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def prefix(self, key: Hashable, prompt: list[int]) -> Prefix | None:
        """The prefix with which a prompt begins; None where it shares none with earlier prompts of the key."""
        if not self.most_bytes:
            return None
        entry = self._entries.setdefault(key, _Entry(prompt))
        self._entries.move_to_end(key)
        before, entry.prompt = entry.prompt, prompt
        if entry.prefix is not None:
            ids = entry.prefix.ids
            if len(prompt) > len(ids) and prompt[: len(ids)] == ids:
                return entry.prefix
            before = [*ids, -1]
        if before is not prompt and (shared := shared_prefix([before, prompt])):
            entry.prefix = Prefix(shared)
            return entry.prefix
        return None

    def trim(self) -> None:
        """Drop prefixes beyond the number of bytes; called after a prefill."""
        sizes = {key: _bytes(entry.prefix) for key, entry in self._entries.items()}
        total = sum(sizes.values())
        for key, size in sizes.items():
            if total <= self.most_bytes:
                break
            if size:
                total -= size
                del self._entries[key]

    @property
    def bytes(self) -> int:
        """The bytes of all keys and values."""
        return sum(_bytes(entry.prefix) for entry in list(self._entries.values()))


def _bytes(prefix: Prefix | None) -> int:
    if prefix is None or prefix.cache is None:
        return 0
    return sum(t.nbytes for layer in prefix.cache.layers for t in (layer.keys, layer.values))

# SPDX-License-Identifier: Apache-2.0
"""How is a task divided into splits, so that no prompt stands on two sides?

Every choice orders things by a hash of (salt, text) instead of drawing random numbers: the same seed gives the same
splits for any order of the file, any version of numpy, and whatever other tasks are loaded beside this one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from dyads.errors import TaskError
from dyads.tasks.task import Example

__all__ = ["divide", "take"]


def _rank(salt: str, text: str) -> bytes:
    return hashlib.sha256(f"{salt}\x00{text}".encode("utf-8", "surrogatepass")).digest()


def divide(examples: Sequence[Example], sizes: Sequence[int], *, salt: str, task: str) -> list[tuple[Example, ...]]:
    """[the rest, a part of about sizes[0] examples, a part of about sizes[1], …], each in the order given.

    All examples with an identical prompt go to the same part. A part takes prompts in the salt's order while they fit,
    so it is at most its size, except that no part stays empty. The first part is chosen first: what later parts ask for
    does not change it.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.prompt, []).append(i)
    if len(groups) <= len(sizes):
        raise TaskError(
            f"task '{task}' cannot be divided into {len(sizes) + 1} splits: it has {len(examples)} usable instances "
            f"with {len(groups)} different prompts, and instances with the same prompt stay on one side; add some"
        )
    left = sorted(groups, key=lambda prompt: _rank(salt, prompt))
    part_of = [0] * len(examples)
    for part, size in enumerate(sizes, start=1):
        room, skipped = size, []
        for prompt in left:
            if len(groups[prompt]) <= room:
                room -= len(groups[prompt])
                for i in groups[prompt]:
                    part_of[i] = part
            else:
                skipped.append(prompt)
        if len(skipped) == len(left):  # not one prompt fits: every one has many instances
            smallest = min(left, key=lambda prompt: len(groups[prompt]))
            skipped.remove(smallest)
            for i in groups[smallest]:
                part_of[i] = part
        left = skipped
    parts = [tuple(e for e, p in zip(examples, part_of, strict=True) if p == part) for part in range(len(sizes) + 1)]
    if not all(parts):
        raise TaskError(
            f"task '{task}' cannot be divided into splits of {', '.join(map(str, sizes))} and a rest: it has only "
            f"{len(examples)} usable instances with {len(groups)} different prompts; add instances"
        )
    return parts


def take(examples: Sequence[Example], limit: int | None, *, salt: str) -> tuple[Example, ...]:
    """At most `limit` of the examples, chosen by the salt, in the order given. A larger limit only adds."""
    if limit is None or len(examples) <= limit:
        return tuple(examples)
    kept = {e.id for e in sorted(examples, key=lambda e: _rank(salt, e.id))[:limit]}
    return tuple(e for e in examples if e.id in kept)

# SPDX-License-Identifier: Apache-2.0
"""Splits of a task that share no prompt, chosen by a seed.

Examples are ordered by a hash of (salt, text), not by random numbers: the same seed gives the same splits for any order
of the file, any version of numpy, and any other tasks in the suite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from dyads.errors import TaskError
from dyads.tasks.task import Example

__all__ = ["divide", "halve", "take"]


def _rank(salt: str, text: str) -> bytes:
    return hashlib.sha256(f"{salt}\x00{text}".encode("utf-8", "surrogatepass")).digest()


def divide(examples: Sequence[Example], sizes: Sequence[int], *, salt: str, task: str) -> list[tuple[Example, ...]]:
    """[the rest, a part of about sizes[0] examples, a part of about sizes[1], …], each in the given order.

    All examples with the same prompt, or of one group, go to the same part. A part takes prompts (or groups) in the
    order of their hashes while they fit, so it has at most its size, or one prompt where none fits. Parts are filled in
    turn: a part does not depend on the sizes of later ones.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.group or example.prompt, []).append(i)
    if len(groups) <= len(sizes):
        raise TaskError(
            f"task '{task}' cannot be divided into {len(sizes) + 1} splits: it has {len(examples)} usable instances "
            f"with {len(groups)} different prompts, and a prompt is only in one split; add instances"
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
        if len(skipped) == len(left):  # every prompt has more instances than the part has room
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
    """At most `limit` of the examples, chosen by the salt, in the given order. A larger limit only adds examples.

    A group is taken whole or not at all; the first one is taken whatever its size.
    """
    if limit is None or len(examples) <= limit:
        return tuple(examples)
    together: dict[str, list[str]] = {}
    for example in examples:
        together.setdefault(example.group or example.id, []).append(example.id)
    kept: set[str] = set()
    for unit in sorted(together, key=lambda unit: _rank(salt, unit)):
        if kept and len(kept) + len(together[unit]) > limit:
            break
        kept.update(together[unit])
    return tuple(e for e in examples if e.id in kept)


def halve(examples: Sequence[Example], *, seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The halves that `torch.randperm(n)` gives with this seed, in the given order. For odd n the second is longer.

    MoRE's protocol for GLUE uses this permutation. It is computed here without torch: Fisher-Yates over the raw 32-bit
    outputs of a Mersenne twister.
    """
    import numpy

    order = list(range(len(examples)))
    for i, bits in enumerate(numpy.frombuffer(numpy.random.RandomState(seed).bytes(4 * len(order)), "<u4").tolist()):
        j = i + bits % (len(order) - i)
        order[i], order[j] = order[j], order[i]
    first = set(order[: len(order) // 2])
    return (
        tuple(e for i, e in enumerate(examples) if i in first),
        tuple(e for i, e in enumerate(examples) if i not in first),
    )

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

__all__ = ["divide", "halve", "take"]


def _rank(salt: str, text: str) -> bytes:
    return hashlib.sha256(f"{salt}\x00{text}".encode("utf-8", "surrogatepass")).digest()


def divide(examples: Sequence[Example], sizes: Sequence[int], *, salt: str, task: str) -> list[tuple[Example, ...]]:
    """[the rest, a part of about sizes[0] examples, a part of about sizes[1], …], each in the order given.

    All examples with an identical prompt, or of one group, go to the same part. A part takes prompts (or groups) in the
    salt's order while they fit, so it is at most its size, except that no part stays empty. The first part is chosen
    first: what later parts ask for does not change it.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.group or example.prompt, []).append(i)
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
    """At most `limit` of the examples, chosen by the salt, in the order given. A larger limit only adds.

    Examples of one group are taken together or not at all; the first group is, however large.
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
    """The first and second half of `torch.randperm(n)` under this seed, each in the order given; the second is longer.

    A published protocol asks for this permutation. It is drawn as torch draws it (Fisher-Yates over the raw 32 bits of
    a Mersenne twister), without torch.
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

# SPDX-License-Identifier: Apache-2.0
"""Mixture: how often each task is drawn, and the schedule of batches.

    proportional   p_i ∝ n_i
    temperature    p_i ∝ n_i^(1/T)            T = 1 is proportional, large T tends to uniform
    uniform        p_i ∝ 1
    balanced       p_i ∝ exp(n_i / Σ n)       MoRE's sampling weights, between uniform and e : 1
    round_robin    the tasks in turn, without randomness

A task without examples gets 0. The schedule is computed before training from sizes, lengths and a seed only, so that
all methods trained with one seed see the same examples in the same order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dyads.errors import ConfigError, TaskError, did_you_mean

__all__ = ["KINDS", "WINDOW", "Kind", "MixtureSpec", "draw_probabilities", "padding_share", "schedule"]

Kind = Literal["proportional", "temperature", "uniform", "balanced", "round_robin"]
KINDS: tuple[Kind, ...] = ("proportional", "temperature", "uniform", "balanced", "round_robin")
WINDOW = 8
"""Number of batches whose examples are sorted by length together."""

Batch = list[tuple[int, int]]


class MixtureSpec(BaseModel):
    """The section `mixture` of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Kind = "proportional"
    """How often each task is drawn."""
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """T of kind temperature."""
    batches: Literal["mixed", "one_task"] = "mixed"
    """Batches with examples of several tasks, or of one."""

    @model_validator(mode="after")
    def _temperature_has_its_kind(self) -> MixtureSpec:
        if self.kind == "temperature" and self.temperature is None:
            raise ValueError("kind: temperature needs a value, such as temperature: 2")
        if self.kind != "temperature" and self.temperature is not None:
            raise ValueError(f"temperature: {self.temperature} needs kind: temperature, got kind: {self.kind}")
        return self


def draw_probabilities(sizes: Sequence[int], kind: Kind, temperature: float | None = None) -> list[float]:
    """Probability of drawing each task, from its number of examples; formulas above. The result sums to 1.

    For round_robin these are the shares of the tasks. Only kind temperature uses `temperature`.
    """
    n = np.asarray(sizes, dtype=np.float64)
    if n.ndim != 1 or n.size == 0 or n.min() < 0 or n.sum() == 0:
        raise TaskError(
            f"nothing to draw from: the tasks have {list(sizes)} training examples; at least one task needs some"
        )
    if kind == "proportional":
        weights = n
    elif kind == "temperature":
        if temperature is None or not 0 < temperature < float("inf"):
            raise ConfigError(f"mixture: kind temperature needs a temperature above 0, got {temperature}")
        weights = (n / n.max()) ** (1.0 / temperature)
    elif kind in ("uniform", "round_robin"):
        weights = np.ones_like(n)
    elif kind == "balanced":
        weights = np.exp(n / n.sum())
    else:
        raise ConfigError(f"mixture: unknown kind '{kind}'{did_you_mean(str(kind), KINDS)}")
    weights = np.where(n > 0, weights, 0.0)
    return [float(p) for p in weights / weights.sum()]


def schedule(
    lengths: Sequence[Sequence[int]], *, spec: MixtureSpec, steps: int, batch_size: int, seed: int, window: int = WINDOW
) -> list[Batch]:
    """The batch of every step, a list of (task, index), given `lengths[task][index]` in tokens or any other unit.

    - The examples of a task are drawn in shuffled passes: all of them once before any of them again.
    - The examples of `window` batches are sorted by length and cut into batches again, which are shuffled. This saves
      padding and leaves the set of examples of a window unchanged. With `one_task`, only batches of the same task
      exchange examples, and the order of tasks is kept. `window=1` disables it. An example stays in the batch that drew
      it where the window reads it twice, or all examples of its task: copies have the same length and would share a
      batch, and the batches of a task with few examples would be the same in every pass.
    - A longer schedule starts with the shorter one (same window): whole windows are drawn and the last one is cut off,
      so a schedule that ends within a window leaves out some of the examples that it drew.
    """
    if steps < 0 or batch_size < 1 or window < 1:
        raise ConfigError(
            f"a schedule needs steps ≥ 0, batch_size ≥ 1, window ≥ 1; got {steps}, {batch_size}, {window}"
        )
    sizes = [len(task) for task in lengths]
    per_draw = 1 if spec.batches == "mixed" else batch_size
    tasks = _tasks(sizes, spec, seed)
    passes = [_passes(seed, task, size) for task, size in enumerate(sizes)]
    batches: list[Batch] = []
    for number in range(-(-steps // window)):
        drawn: list[Batch] = []
        while len(drawn) < window:
            slots = [task for task in islice(tasks, batch_size // per_draw) for _ in range(per_draw)]
            drawn.append([(task, next(passes[task])) for task in slots])
        batches += _bucket(drawn, lengths, spec, _generator(seed, "window", number)) if window > 1 else drawn
    return batches[:steps]


def padding_share(batches: Sequence[Batch], lengths: Sequence[Sequence[int]], size: int) -> float:
    """Share of padding in the tensors of a schedule, whose batches are computed in parts of `size` examples."""
    parts = [[lengths[task][i] for task, i in b[at : at + size]] for b in batches for at in range(0, len(b), size)]
    return 1 - sum(map(sum, parts)) / sum(len(part) * max(part) for part in parts)


def _bucket(
    drawn: list[Batch], lengths: Sequence[Sequence[int]], spec: MixtureSpec, random: np.random.Generator
) -> list[Batch]:
    groups: dict[int, list[int]] = {}  # positions of batches that may exchange examples
    for position, batch in enumerate(drawn):
        groups.setdefault(batch[0][0] if spec.batches == "one_task" else -1, []).append(position)
    bucketed = list(drawn)
    for positions in groups.values():
        times = Counter(example for p in positions for example in drawn[p])
        of_task = Counter(task for task, _ in times.elements())
        stay = {(t, i) for (t, i), n in times.items() if n > 1 or of_task[t] >= len(lengths[t])}
        moving = (example for p in positions for example in drawn[p] if example not in stay)
        pool = iter(sorted(moving, key=lambda example: lengths[example[0]][example[1]]))
        for position in random.permutation(positions).tolist():
            kept = [example for example in drawn[position] if example in stay]
            bucketed[position] = kept + list(islice(pool, len(drawn[position]) - len(kept)))
    return bucketed


def _tasks(sizes: Sequence[int], spec: MixtureSpec, seed: int) -> Iterator[int]:
    """The endless stream of drawn tasks."""
    chances = draw_probabilities(sizes, spec.kind, spec.temperature)
    if spec.kind == "round_robin":
        yield from cycle(task for task, chance in enumerate(chances) if chance)
    random = _generator(seed, "tasks")
    block = 1024  # a fixed size: the stream must not depend on how much of it is used
    while True:
        yield from random.choice(len(sizes), size=block, p=chances).tolist()


def _passes(seed: int, task: int, size: int) -> Iterator[int]:
    """The endless stream of indices of a task: a new permutation for every pass."""
    number = 0
    while True:
        order: NDArray[np.int64] = _generator(seed, "pass", task, number).permutation(size)
        yield from order.tolist()
        number += 1


def _generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """An independent random generator for every purpose, so that no choice affects another."""
    text = "/".join(map(str, ("mixture", seed, *purpose)))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))

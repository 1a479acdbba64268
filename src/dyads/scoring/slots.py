# SPDX-License-Identifier: Apache-2.0
"""Key-value cache for a batch whose rows come and go: one buffer per layer, so that no step copies keys and values.

Every row has a slot in the buffer. A step writes one column, and a finished row frees its slot:

    slot 0   ··············░░░░░░░░░░░│···      ░ a token's keys and values, · unused (masked)
    slot 1   ░░░░░░░░░░░░░░░░░░░░░░░░░│···      │ `end`, where the next column goes
    slot 2   ·····░░░░░░░░░░░░░░░░░░░░│···

Slots in use come first, so that attention reads a view of the buffer. When the buffer is full, all rows move left by
the columns that no row uses. Slots times columns may be bounded: a wider buffer then has fewer slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["Slots", "cache_argument", "longest_row"]

SPARE = 16
"""The fewest columns that a new buffer has free for later steps; its width is a multiple of twice as many."""


def _width(longest: int) -> int:
    """Columns of a new buffer whose longest row has so many tokens."""
    return -(-(longest + SPARE) // (2 * SPARE)) * 2 * SPARE


def longest_row(tokens: int) -> int:
    """The most tokens that one row may have where slots times columns are at most `tokens`."""
    return tokens // (2 * SPARE) * 2 * SPARE - SPARE


def cache_argument(model: type) -> str:
    """The name of the argument of a transformers model's forward pass that takes the cache; before 5.24 the second."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # type: ignore[attr-defined]


@dataclass
class _View:
    """The part of the buffers that a forward pass reads and writes."""

    slots: int
    """Slots in a buffer."""
    width: int = 0
    """Columns in a buffer."""
    rows: slice = field(default_factory=lambda: slice(0))
    columns: slice = field(default_factory=lambda: slice(0))
    at: int = 0
    """The first column that the pass writes."""
    new: bool = False
    """Whether its rows are new, so that their slots are cleared first."""
    prefixes: Sequence[Cache | None] = ()
    """Keys and values of the prefix of every new row, which it shares with others; None for a row without one."""
    starts: Sequence[int] = ()
    """The first column of every new row."""


class _Layer(DynamicLayer):  # type: ignore[misc]
    """The buffers of one layer."""

    def __init__(self, view: _View, index: int) -> None:
        super().__init__()
        self.view, self.index = view, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        self.is_initialized = True

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros: attention multiplies masked values by 0, and uninitialised memory may hold NaN (0 · NaN = NaN).
        return like.new_zeros(self.view.slots, like.shape[1], self.view.width, like.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._put("keys", key_states), self._put("values", value_states)

    def _put(self, name: str, new: Tensor) -> Tensor:
        view = self.view
        slots: Tensor = getattr(self, name)[view.rows]
        if view.new:
            slots.zero_()  # a NaN of the finished row would reach the new one through its mask, as 0 · NaN
        slots[:, :, view.at : view.at + new.shape[2]] = new
        if view.new:  # prefixes are written last, over the padding of shorter rows, so that no row has a gap
            for slot, start, prefix in zip(slots, view.starts, view.prefixes, strict=True):
                if prefix is not None:
                    shared = getattr(prefix.layers[self.index], name)[0]
                    slot[:, start : start + shared.shape[1]] = shared
        return slots[:, :, view.columns]

    def get_seq_length(self) -> int:
        return self.view.at - int(self.view.columns.start)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.view.columns.stop - self.view.columns.start), 0

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        for buffer in (self.keys, self.values):
            buffer[target] = buffer[source]

    def move(self, rows: int, source: slice, target: slice) -> None:
        """Move columns, and give the buffer the view's slots and width."""
        if self.is_initialized:
            for name in ("keys", "values"):
                old = getattr(self, name)
                live = old[:rows, :, source].clone()
                fits = (old.shape[0], old.shape[2]) == (self.view.slots, self.view.width)
                new = old if fits else self._empty(old)
                new[:rows, :, target] = live
                setattr(self, name, new)


class Slots(Cache):  # type: ignore[misc]
    """A transformers Cache over slots. Before every forward pass call `reading` or `stepping`, which give its mask.

    With `tokens`, slots times columns of a buffer are at most as many, if rows are added where `has_room` holds.
    """

    def __init__(self, layers: int, slots: int, device: torch.device, tokens: int | None = None) -> None:
        self.slots, self.tokens = slots, tokens
        self.view = _View(slots)
        super().__init__(layers=[_Layer(self.view, i) for i in range(layers)])
        self.mask = torch.zeros(slots, 0, dtype=torch.long, device=device)
        self.end = 0

    def has_room(self, rows: int, longest: int) -> bool:
        """Whether so many rows can end in the buffers, where the longest has so many tokens at its end."""
        return self.tokens is None or rows * _width(longest) <= self.tokens

    def reading(
        self, kept: Sequence[int], lengths: Sequence[int], width: int, prefixes: Sequence[Cache | None]
    ) -> Tensor:
        """Attention mask for a pass over the last `width` tokens of new prompts, one for each of the prefixes.

        `kept` has the cached tokens of the rows before them, `lengths` those of the prompts, with their prefixes.
        """
        n, longest, view = len(kept), max(lengths), self.view
        rows = n + len(lengths)
        wide = not kept and self.end > 2 * longest  # short rows would follow in a wide buffer
        if longest > self.end or wide or rows > view.slots:
            self._lay_out(kept, longest, rows)
        view.rows, view.columns = slice(n, rows), slice(self.end - longest, self.end)
        view.new, view.at, view.prefixes = True, self.end - width, prefixes
        view.starts = [self.end - length for length in lengths]
        self.mask[view.rows] = 0
        for slot, start in enumerate(view.starts, start=n):
            self.mask[slot, start : self.end] = 1
        return self.mask[view.rows, view.columns]

    def stepping(self, kept: Sequence[int]) -> Tensor:
        """Attention mask for a pass over one token of every row."""
        n, view = len(kept), self.view
        if self.end == view.width:
            self._lay_out(kept, 0, n)
        self.mask[:n, self.end] = 1
        view.rows, view.columns, view.at = slice(n), slice(0, view.width), self.end
        view.new, view.prefixes = False, ()
        self.end += 1
        return self.mask[:n]

    def keep(self, slots: Sequence[int]) -> list[int]:
        """Free all other slots, and move these (in rising order) to the front; returns the old slot of every row."""
        order = list(range(len(slots)))
        holes = sorted(set(order) - set(slots))
        moved = [slot for slot in slots if slot >= len(slots)]
        if holes:
            self.mask[holes] = self.mask[moved]
            for layer in self.layers:
                layer.copy(moved, holes)
        for hole, slot in zip(holes, moved, strict=True):
            order[hole] = slot
        return order

    def _lay_out(self, kept: Sequence[int], least: int, rows: int) -> None:
        """Move rows as far left as the longest allows, with room for `least` tokens and at least SPARE steps, and for
        `rows` rows."""
        n, live = len(kept), max(kept, default=0)
        end = max(live, least)
        source, target = slice(self.end - live, self.end), slice(end - live, end)
        self.view.width = _width(end)
        if self.tokens is not None:
            self.view.slots = max(rows, min(self.slots, self.tokens // self.view.width))
        old, self.mask = self.mask, self.mask.new_zeros(self.view.slots, self.view.width)
        self.mask[:n, target] = old[:n, source]
        for layer in self.layers:
            layer.move(n, source, target)
        self.end = end

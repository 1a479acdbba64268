# SPDX-License-Identifier: Apache-2.0
"""Packed sequences: several in one row, as `position_ids` that restart at 0, or `cu_seq_lens_q`, say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyads.errors import RoutingError

__all__ = ["Packing", "can_be_read"]


def can_be_read(tensor: Tensor) -> bool:
    """Whether reading a value does not synchronise with an accelerator or break a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


class Packing:
    """The sequence of every token of a batch, row after row, and its place in that sequence."""

    def __init__(self, sequence: Tensor, place: Tensor, count: int, longest: int | None) -> None:
        """For the first `count` sequences. Single tokens after them are padding and count as the last one's."""
        n = len(sequence)
        padding = sequence[-1:] - (count - 1)  # tokens; it stays on the device
        before = sequence.index_select(0, (n - 1 - padding).clamp(0, n - 1))
        fits = (padding >= 0) & (before == count - 1)
        if not can_be_read(sequence):
            torch._assert_async(fits.all(), f"task has {count} entries for another number of packed sequences")
        elif not bool(fits.all()):
            raise RoutingError(
                f"task has {count} entries, and the batch holds {int(sequence[-1]) + 1} packed sequences: give one for"
                " each, or a single name or id for all"
            )
        self.sequence, self.count = sequence.clamp(max=count - 1), count
        self._place, self._is_padding, self._longest = place, sequence >= count, longest

    @classmethod
    def of_call(cls, kwargs: dict[str, Any], rows: int, tokens: int, count: int) -> Packing | None:
        """The packing that a model is called with; None where its arguments do not say one."""
        ends, places = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
        longest = kwargs.get("max_length_q")
        longest = longest if isinstance(longest, int) else None
        if isinstance(ends, Tensor) and rows == 1:
            everywhere = torch.arange(tokens, device=ends.device)
            sequence = torch.searchsorted(ends[1:].to(torch.long), everywhere, right=True)
            return cls(sequence, everywhere - ends.to(torch.long)[sequence], count, longest)
        if isinstance(places, Tensor) and places.shape == (rows, tokens):
            place = places.flatten()
            return cls(place.eq(0).cumsum(0) - 1, place, count, longest)
        return None

    def unpacked(self, x: Tensor) -> Tensor:
        """The tokens (n …) as sequences (count longest …), with zeros after their ends."""
        if self._longest is None:
            self._longest = int(self._place.max()) + 1  # once a batch, where it is called without max_length_q
        longest = self._longest
        target = torch.where(self._is_padding, self.count * longest, self.sequence * longest + self._place)
        rows = x.new_zeros(self.count * longest + 1, *x.shape[1:])
        return rows.index_copy(0, target.to(x.device), x)[:-1].reshape(self.count, longest, *x.shape[1:])

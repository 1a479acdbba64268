# SPDX-License-Identifier: Apache-2.0
"""Which products make up the operator, in which dtype, and which way round do their operands lie?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dyads.ops.dyadic import Frozen
from dyads.ops.packed import Packs
from dyads.ops.switch import unwatched

__all__ = [
    "autocast_dtype",
    "cheap_dtype",
    "down",
    "is_small",
    "join",
    "split",
    "up",
]

# Decoding is made of products with few rows. On a CPU, half precision costs about 40 µs before it starts; in that time
# fp32 does about this many multiplications (LOG.md, 2026-11-22).
_SMALL_PRODUCT = 2**21
_HALF = (torch.bfloat16, torch.float16)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to products with x; None where it leaves them alone."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def is_small(x: Tensor, rows: int) -> bool:
    """Whether x times so many rows is a product of few operations."""
    return x.numel() * rows <= _SMALL_PRODUCT


def cheap_dtype(x: Tensor, rows: int) -> torch.dtype:
    """The dtype of products without gradients: that of x, but fp32 for a few rows in half precision on a CPU."""
    return torch.float32 if x.device.type == "cpu" and x.dtype in _HALF and is_small(x, rows) else x.dtype


def join(rows: Iterable[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Matrices one below the other, such as [A; W] (p + s d); those that are None are left out."""
    found = [one for one in rows if one is not None]
    joined = found[0] if len(found) == 1 else torch.cat(found)
    return joined if joined.dtype == dtype else joined.to(dtype)


def down(x: Tensor, joined: Tensor) -> Tensor:
    """[A; W] x (… p + s), a view of a matrix that has the tokens innermost where they are many."""
    if is_small(x, joined.shape[0]):
        return F.linear(x, joined)
    tokens: Tensor = (joined @ x.reshape(-1, x.shape[-1]).t()).t()
    return tokens.view(*x.shape[:-1], joined.shape[0])


def split(z: Tensor, p: int) -> tuple[Tensor, Tensor | None]:
    """h and the scores, from z = [A; W] x (… p + s)."""
    if z.shape[-1] == p:
        return z, None
    h, scores = z.split_with_sizes((p, z.shape[-1] - p), -1)
    return h, scores


def up(
    u: Tensor, B: Tensor, scale: float, x: Tensor, onto: Tensor | None, base: Frozen | None, packed: Packs | None = None
) -> Tensor:
    """scale · u B (… o), which is added to `onto` or base(x) where one is given; `packed` is of the base's weight."""
    rows, in_place = u.reshape(-1, B.shape[0]), False
    if base is not None:
        onto, in_place = F.linear(x, *base) if packed is None else packed.linear(x, *base), unwatched()
    if onto is None:
        return ((rows if scale == 1.0 else rows * scale) @ B).to(x.dtype).view(*x.shape[:-1], B.shape[1])
    if onto.dtype == B.dtype:
        # One product both projects up and adds: the sum needs no memory of its own.
        if in_place:
            onto.view(-1, B.shape[1]).addmm_(rows, B, alpha=scale)
            return onto
        return torch.addmm(onto.reshape(-1, B.shape[1]), rows, B, alpha=scale).view(onto.shape)
    delta = torch.mm(rows, B).view(onto.shape)
    return onto.add_(delta, alpha=scale) if in_place else torch.add(onto, delta, alpha=scale).to(onto.dtype)

# SPDX-License-Identifier: Apache-2.0
"""Which products make up the operator, in which dtype, and which way round do their operands lie?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dyads.ops.dyadic import Frozen
from dyads.ops.switch import unwatched
from dyads.ops.tiles import Right, tiles_for, times

__all__ = [
    "autocast_dtype",
    "cheap_dtype",
    "down",
    "is_small",
    "join",
    "linears",
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


def linears(x: Tensor, rows: Tensor, maps: Iterable[Frozen]) -> Iterator[Tensor]:
    """x Wᵀ + bias (… o) of several maps, for the rows (n d) of x: each when it is asked for, so that it is
    still near the processor for what comes next; or all at once, where that is faster."""
    if tiles_for(rows) is None:
        for one in maps:
            yield F.linear(x, *one)
        return
    rights = [Right(W.t(), None if bias is None else bias.expand(len(rows), -1).clone()) for W, bias in maps]
    for y in times(rows, *rights):
        yield y.view(*x.shape[:-1], y.shape[1])


def up(u: Tensor, B: Tensor, scale: float, x: Tensor, onto: Tensor | None, *, ours: bool) -> Tensor:
    """scale · u B (… o), added to `onto` where that is given; what is `ours` is written over, if nobody looks on."""
    rows, right, in_place = u.reshape(-1, B.shape[0]), Right(B, scale=scale), ours and unwatched()
    if onto is None:
        return times(rows, right)[0].to(x.dtype).view(*x.shape[:-1], B.shape[1])
    if onto.dtype == B.dtype:
        # One product both projects up and adds: the sum needs no memory of its own.
        if in_place:
            times(rows, right._replace(onto=onto.view(-1, B.shape[1])))
            return onto
        return torch.addmm(onto.reshape(-1, B.shape[1]), rows, B, alpha=scale).view(onto.shape)
    delta = torch.mm(rows, B).view(onto.shape)
    return onto.add_(delta, alpha=scale) if in_place else torch.add(onto, delta, alpha=scale).to(onto.dtype)

# SPDX-License-Identifier: Apache-2.0
"""Sampling of a row's next token by temperature and nucleus, with a random generator of the row's own.

    p = softmax(logits / temperature)      kept: the fewest tokens, most likely first, whose p add up to top_p
    token = the first, in the order of the vocabulary, at which the sum of the kept p exceeds u · their total

u in [0, 1) is the one number that a token takes from the generator. In the order of the vocabulary, rounding of the
logits moves the borders between tokens by as little as the rounding; in the order of p it could swap whole tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Sampler", "Sampling", "TokenLogprobs", "logprobs_of"]

_FEW = 256
"""Most likely tokens in which the nucleus is looked up before the whole vocabulary is sorted."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row draws its tokens."""

    seed: int
    temperature: float = 1.0
    """Above 0."""
    top_p: float = 1.0
    """Above 0, at most 1."""


class TokenLogprobs(NamedTuple):
    """The log-probability of a token in its place, at temperature 1, and the most likely tokens with theirs."""

    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """Draws the tokens of one row."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> int:
        """The next token, from the logits (vocabulary)."""
        u = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        if logits.device.type == "mps":  # Apple's GPUs have no double precision
            logits = logits.cpu()
        below = logits.double() - logits.max().double()  # before the division, which may overflow
        p = (below / self.sampling.temperature).exp()
        if self.sampling.top_p < 1:
            p = torch.where(p >= _least_kept(p, self.sampling.top_p), p, 0.0)
        sums = p.cumsum(-1)
        token = int(torch.searchsorted(sums, sums[-1] * u, right=True))
        return min(token, len(logits) - 1)  # past the end where logits are not finite


def _least_kept(p: Tensor, top_p: float) -> Tensor:
    """The smallest of the unnormalised probabilities p that the nucleus keeps."""
    most = p.sum() * top_p
    for count in (min(_FEW, len(p)), len(p)):
        sorted_p = p.topk(count).values
        kept = int((sorted_p.cumsum(-1) < most).sum())
        if kept < count:
            return sorted_p[kept]
    return sorted_p[-1]


def logprobs_of(logits: Tensor, token: int, top: int) -> TokenLogprobs:
    """The log-probability of the token, and the `top` most likely tokens, from the logits (vocabulary)."""
    all_ = logits.float().log_softmax(-1)
    values, ids = all_.topk(min(top, len(all_)))
    return TokenLogprobs(float(all_[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))

# SPDX-License-Identifier: Apache-2.0
"""Draws of a sampled row: their frequencies, the nucleus, and the generator."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dyads.scoring.sampling import Sampler, Sampling, logprobs_of

LOGITS = torch.tensor([0.5, -1.0, 2.0, 1.0, -torch.inf, 0.0])


def counts(sampling: Sampling, n: int = 4000) -> Counter[int]:
    sampler = Sampler(sampling)
    return Counter(sampler.draw(LOGITS) for _ in range(n))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_are_those_of_the_softmax(temperature: float) -> None:
    found, p = counts(Sampling(3, temperature)), (LOGITS / temperature).softmax(-1)
    for token in range(6):
        assert found[token] / 4000 == pytest.approx(float(p[token]), abs=0.03)  # 4 standard errors
    assert 4 not in found


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, {2}), (0.55, {2}), (0.6, {2, 3}), (0.999, {0, 1, 2, 3, 5})])
def test_the_nucleus_is_the_smallest_set_with_that_mass(top_p: float, kept: set[int]) -> None:
    assert set(counts(Sampling(0, top_p=top_p))) == kept


def test_a_nucleus_beyond_the_most_likely_few_is_that_of_the_whole_vocabulary() -> None:
    logits = torch.linspace(0, 1, 5000)
    sampler, p = Sampler(Sampling(1, top_p=0.5)), logits.softmax(-1)
    kept = p.sort(descending=True).values.cumsum(0).lt(0.5).sum() + 1
    drawn = [sampler.draw(logits) for _ in range(500)]
    assert min(drawn) >= 5000 - kept
    assert min(drawn) < 5000 - kept + 100


def test_a_seed_repeats_its_draws_and_small_rounding_does_not_change_them() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 1e-6
    one, two, other = Sampler(Sampling(7, 1.2)), Sampler(Sampling(7, 1.2)), Sampler(Sampling(8, 1.2))
    drawn = [one.draw(logits) for _ in range(300)]
    assert [two.draw(logits + noise) for _ in range(300)] == drawn
    assert [other.draw(logits) for _ in range(300)] != drawn


def test_logits_that_are_not_finite_give_a_token_of_the_vocabulary() -> None:
    assert 0 <= Sampler(Sampling(0)).draw(torch.full((9,), torch.nan)) < 9
    assert 0 <= Sampler(Sampling(0, top_p=0.5)).draw(torch.full((9,), torch.nan)) < 9


def test_log_probabilities_sum_to_one() -> None:
    found = logprobs_of(LOGITS, 3, 6)
    assert sum(torch.tensor([value for _, value in found.top]).exp()) == pytest.approx(1)
    assert found.top[1] == (3, found.logprob)
    assert logprobs_of(LOGITS, 2, 0).top == []
    assert logprobs_of(LOGITS, 3, 20) == logprobs_of(LOGITS, 3, len(LOGITS))


def test_the_smallest_temperatures_draw_the_most_likely_token() -> None:
    for temperature in (1e-310, 5e-324):
        assert Sampler(Sampling(0, temperature)).draw(LOGITS) == int(LOGITS.argmax())

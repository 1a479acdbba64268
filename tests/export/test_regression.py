# SPDX-License-Identifier: Apache-2.0
"""Reduced-rank regression: exact where an update is linear, and nowhere worse than a numerical optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dyads.export.regression import mean_gates, mean_update, reduced_rank


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("tokens", [3, 200])  # fewer than features, and many
def test_an_update_with_constant_gates_is_recovered_exactly_from_any_data(tokens: int) -> None:
    x, A, B, G = drawn((tokens, 11), (4, 11), (7, 6), (6, 4))
    u = x @ A.T @ G.T
    up, down = reduced_rank(B, x.T @ x, u.T @ x, G @ A, rank=4)
    assert (up.shape, down.shape) == ((7, 4), (4, 11))
    assert_close(up @ down, B @ G @ A, atol=1e-9, rtol=1e-9)


def test_with_full_rank_it_is_ridge_regression() -> None:
    x, u, B = drawn((50, 5), (50, 3), (7, 3))
    ridge, energy = 0.3, x.square().sum(0)
    penalty = ridge * energy + 1e-6 * energy.mean()
    wanted = (B @ u.T @ x) @ torch.linalg.inv(x.T @ x + penalty.diag())
    up, down = reduced_rank(B, x.T @ x, u.T @ x, torch.zeros(3, 5), rank=9, ridge=ridge)
    assert_close(up @ down, wanted)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_closed_form_is_the_optimum_that_a_numerical_search_finds(rank: int) -> None:
    x, u, B, prior = drawn((30, 4), (30, 6), (5, 6), (6, 4))
    x[:, 0] *= 5  # a feature with more energy than the others: the metric matters
    xx, energy = x.T @ x, x.square().sum(0)
    penalty = 0.1 * energy + 1e-6 * energy.mean()

    def objective(W: Tensor) -> Tensor:
        return (x @ W.T - u @ B.T).square().sum() + ((W - B @ prior).square() * penalty).sum()

    up, down = reduced_rank(B, xx, u.T @ x, prior, rank, ridge=0.1)
    found = float(objective(up @ down))
    searched = []
    for seed in range(6):
        U, V = (t.requires_grad_() for t in drawn((5, rank), (rank, 4), seed=seed + 1))
        search = torch.optim.LBFGS([U, V], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def loss(search: torch.optim.Optimizer = search, U: Tensor = U, V: Tensor = V) -> Tensor:
            search.zero_grad()
            value = objective(U @ V)
            value.backward()
            return value

        search.step(loss)
        searched.append(float(objective(U @ V).detach()))
    assert found == pytest.approx(min(searched), rel=1e-8)
    # A plain SVD of the ridge solution ignores the metric, and is worse.
    D_up, D_down = reduced_rank(B, xx, u.T @ x, prior, 9, ridge=0.1)
    P, values, Q = torch.linalg.svd(D_up @ D_down)
    assert found < 0.999 * float(objective(P[:, :rank] * values[:rank] @ Q[:rank]))


def test_more_outer_directions_than_outputs_and_features_that_are_zero() -> None:
    x, A, B, G = drawn((40, 6), (3, 6), (2, 8), (8, 3))
    x[:, 2] = 0
    u = x @ A.T @ G.T
    up, down = reduced_rank(B, x.T @ x, u.T @ x, G @ A, rank=5)
    assert (up.shape, down.shape) == ((2, 2), (2, 6))
    assert_close(up @ down, B @ G @ A, atol=1e-9, rtol=1e-9)


def test_the_rivals_equal_the_mean_update_at_its_rank_and_the_svd_is_the_better_below() -> None:
    A, B, G = drawn((4, 9), (7, 8), (8, 4))
    wanted = B @ G @ A
    for make in (mean_gates, mean_update):
        up, down = make(B, G, A, 4)
        assert_close(up @ down, wanted)
    U, values, V = torch.linalg.svd(wanted)
    up, down = mean_update(B, G, A, 2)
    assert_close(up @ down, U[:, :2] * values[:2] @ V[:2])
    kept_up, kept_down = mean_gates(B, G, A, 2)
    assert kept_up.shape == (7, 2)
    assert (wanted - up @ down).norm() < (wanted - kept_up @ kept_down).norm()
    terms = {float(u.norm() * a.norm()): (u, a) for u, a in zip((B @ G).T, A, strict=True)}
    largest = sum(torch.outer(*terms[size]) for size in sorted(terms)[-2:])
    assert_close(kept_up @ kept_down, largest)

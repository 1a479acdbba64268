# SPDX-License-Identifier: Apache-2.0
"""Contrastive loss: the paper's sum, over the real tokens of every sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dyads.methods.contrastive import POOLS, contrastive_loss, pool


def data(b: int = 5, T: int = 3, d: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, d).double(), torch.randn(T, d).double(), torch.arange(b) % T


def test_loss_is_the_papers_sum_written_out_for_batches_of_mixed_tasks() -> None:
    h, E, task = data()
    total = 0.0
    for sample, t in zip(h, task.tolist(), strict=True):
        cosines = [float(sample @ e / (sample.norm() * e.norm())) for e in E]
        total -= math.log(math.exp(cosines[t] / 0.05) / sum(math.exp(c / 0.05) for c in cosines))
    assert math.isclose(float(contrastive_loss(h, E, task, 0.05)), total / len(h), rel_tol=1e-9)


def test_gradients_agree_with_finite_differences() -> None:
    h, E, task = data()
    assert torch.autograd.gradcheck(
        lambda h, E: contrastive_loss(h, E, task, 0.5), (h.requires_grad_(), E.requires_grad_())
    )


def test_loss_depends_on_directions_only_and_not_on_the_order_of_samples() -> None:
    h, E, task = data()
    expected = contrastive_loss(h, E, task, 0.05)
    assert_close(contrastive_loss(7 * h, 0.01 * E, task, 0.05), expected)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_close(contrastive_loss(h[order], E, task[order], 0.05), expected)


def test_edges_are_finite() -> None:
    h, E, _ = data()
    one = torch.zeros(5, dtype=torch.long)
    assert float(contrastive_loss(h, E[:1], one, 0.05)) == 0  # one task: nothing to tell apart
    nothing = contrastive_loss(torch.zeros(5, 7, requires_grad=True), E, one, 0.05)
    assert_close(nothing, torch.tensor(math.log(3)))
    nothing.backward()


def test_half_precision_and_autocast_compare_in_fp32() -> None:
    h, E, task = data()
    h, E = h.bfloat16(), E.float()
    expected = contrastive_loss(h.float(), E, task, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(h, E, task, 0.05), expected)


@pytest.mark.parametrize("how", POOLS)
def test_padding_on_either_side_and_flattened_rows_change_nothing(how: str) -> None:
    x, task, pad = torch.randn(3, 4, 6), torch.tensor([2, 0, 1]), torch.full((3, 2, 6), 99.0)
    ones, zeros = torch.ones(3, 4, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long)
    expected, same = pool(x, task, None, how)
    assert torch.equal(same, task)
    assert_close(expected, {"mean": x.mean(1), "first": x[:, 0], "last": x[:, -1]}[how])
    for parts, mask in (([x, pad], [ones, zeros]), ([pad, x], [zeros, ones])):
        padded, real = torch.cat(parts, 1), torch.cat(mask, 1)
        assert_close(pool(padded, task, real, how)[0], expected)
        assert_close(pool(padded, task, real.bool(), how)[0], expected)
        rows, tasks = pool(padded.reshape(-1, 6), task.repeat_interleave(6), real, how)
        assert_close(rows, expected)
        assert torch.equal(tasks, task)
    assert_close(pool(x, task, ones[:, :3], how)[0], expected)  # a mask of other tokens does not apply


@pytest.mark.parametrize("how", POOLS)
def test_rows_are_samples_and_further_axes_are_tokens(how: str) -> None:
    x, task = torch.randn(3, 6), torch.tensor([2, 0, 1])
    for rows, tasks, mask in ((x, task, None), (x, task, torch.ones(3, 4)), (x[0], task[:1], None)):
        h, same = pool(rows, tasks, mask, how)
        assert torch.equal(h, rows.view(-1, 6))
        assert torch.equal(same, tasks)
    deep = torch.randn(3, 2, 5, 6)
    assert_close(pool(deep, task, None, how)[0], pool(deep.flatten(1, 2), task, None, how)[0])


@pytest.mark.parametrize("how", POOLS)
def test_a_sample_of_padding_alone_is_finite(how: str) -> None:
    h, _ = pool(torch.randn(2, 3, 6), torch.tensor([0, 1]), torch.tensor([[0, 0, 0], [1, 1, 0]]), how)
    assert h.isfinite().all()

# SPDX-License-Identifier: Apache-2.0
"""The cache for decoding: weights are formed once per dtype, a task's scores once, in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dyads.methods.mode import MoDE
from dyads.ops import CachedOperator, dyadic, fused, plain
from dyads.ops import cached as of_cached
from tiny import Variant, tiny_layer

BY_TASK = [Variant("task_mode"), Variant("more"), Variant("poly"), Variant("mtl_lora")]


@pytest.mark.parametrize("variant", BY_TASK, ids=lambda v: v.id)
def test_scores_of_a_task_are_computed_once_and_alone(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    core, x, A, B, _ = tiny_layer(variant, 4, 2, 6, 5, torch.float32)
    batches = [torch.tensor(ids) for ids in ([1, 1, 1, 1], [2, 1, 2, 1], [0, 1, 2, 0], [2, 2, 2, 2])]
    inner, given = core.task_scores, []

    def task_scores(task: Tensor) -> Tensor | None:
        given.append(task.tolist())
        return inner(task)

    with torch.no_grad():
        expected = [dyadic(x, A, B, core, task) for task in batches]
        monkeypatch.setattr(core, "task_scores", task_scores)
        cached = CachedOperator(A, B, core, 1.0)
        for task, y in zip(batches, expected, strict=True):
            rows = cached.task_scores(task)
            assert rows is not None
            assert torch.equal(rows, torch.cat([inner(task[i : i + 1]) for i in range(4)]))
            assert_close(cached(x, task), y)
    assert sorted(given) == [[0], [1], [2]]


def test_weights_are_formed_once_per_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    core, x, A, B, _ = tiny_layer(Variant("mode"), 2, 3, 6, 5, torch.float32)
    cached, joins, join = CachedOperator(A, B, core, 0.5), [], of_cached.join
    monkeypatch.setattr(of_cached, "join", lambda A, R, core, dtype: joins.append(dtype) or join(A, R, core, dtype))
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for _ in range(3):
                y = cached(x.to(dtype))
                assert y.dtype == dtype
    assert joins == [torch.float32, torch.float64]  # few rows of bf16 are computed in fp32
    monkeypatch.setattr(of_cached, "_SMALL_PRODUCT", 0)
    with torch.no_grad():
        assert_close(cached(x.bfloat16()), fused(x.bfloat16(), A, B, core, scale=0.5))
    assert joins[2:] == [torch.bfloat16]


def test_plain_and_undeclared_cores_are_computed_by_dyadic() -> None:
    with torch.no_grad():
        for variant in (Variant("mode"), Variant("mode", (("score", "cosine"),))):
            core, x, A, B, task = tiny_layer(variant, 2, 3, 6, 5, torch.float32)
            cached, out = CachedOperator(A, B, core, 0.5), torch.randn(2, 3, 5)
            with plain():
                assert torch.equal(cached(x, task, out=out), dyadic(x, A, B, core, task, scale=0.5, out=out))
        assert torch.equal(cached(x, task, out=out), dyadic(x, A, B, core, task, scale=0.5, out=out))


def test_the_given_output_is_left_as_it_was() -> None:
    core, x, A, B, _ = tiny_layer(Variant("mode"), 2, 3, 6, 5, torch.float32)
    for out in (torch.randn(2, 3, 5), torch.randn(2, 3, 5).bfloat16()):
        before = out.clone()
        with torch.no_grad():
            y = CachedOperator(A, B, core, 0.5)(x, out=out)
        assert torch.equal(out, before)
        assert y.dtype == out.dtype


@pytest.mark.parametrize("variant", BY_TASK, ids=lambda v: v.id)
def test_an_empty_batch_gives_an_empty_result(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 2, 3, 6, 5, torch.float32)
    with torch.no_grad():
        assert CachedOperator(A, B, core, 1.0)(x[:0], task[:0]).shape == (0, 3, 5)


@pytest.mark.parametrize("variant", [Variant("mode"), *BY_TASK], ids=lambda v: v.id)
def test_ids_on_an_accelerator_are_not_read(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 2, 3, 6, 5, torch.float32)
    core, x, A, B, task = core.to("meta"), *(t.to("meta") for t in (x, A, B, task))
    with torch.no_grad():
        assert CachedOperator(A, B, core, 1.0)(x, task).shape == (2, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [(), (("group_size", 2),), (("score", "h"),)], ids=str)
def test_columns_of_tokens_have_the_bits_of_select_and_mix(options: Any, dtype: torch.dtype) -> None:
    core = Variant("mode", options).config().core(6).to(dtype).eval()
    core.reset_parameters()
    groups, experts = core.gate_shape
    for tokens in (2, 7, 32, 65):
        z = torch.randn(core.p + groups * experts, tokens).to(dtype)
        h, scores = z.t()[:, : core.p], z.t()[:, core.p :]
        columns = core.mix_columns(z)
        assert columns is not None
        assert torch.equal(columns.t(), core.mix(h, core.select(h, scores, None)))
    others = ("select", "sigmoid"), ("temperature", 2.0), ("score", "x+task"), ("num_experts", 1)
    for one in others:
        other = Variant("mode", (one,)).config().core(6)
        assert other.mix_columns(torch.zeros(9, 2)) is None


def test_a_subclass_with_another_mix_is_not_passed_over() -> None:
    class Doubled(MoDE):
        def mix(self, h: Tensor, g: Tensor) -> Tensor:
            return 2 * super().mix(h, g)

    class Sharp(MoDE):
        def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
            assert scores is not None
            return super().select(h, 3 * scores, task_scores)

    x, A, B = torch.randn(5, 1, 6), torch.randn(4, 6), torch.randn(5, 12)
    for kind in (MoDE, Doubled, Sharp):
        core = kind(6, 4, 3, 1, router_std=1.0).eval()
        core.reset_parameters()
        with torch.no_grad():
            assert_close(CachedOperator(A, B, core, 0.5)(x), dyadic(x, A, B, core, scale=0.5))

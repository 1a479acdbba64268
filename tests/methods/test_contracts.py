# SPDX-License-Identifier: Apache-2.0
"""Contract of every method's core: the operator against its oracle, gradients, caching, and what gates depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dyads.methods import Core
from dyads.methods.declarations import check_declarations
from dyads.ops import CachedOperator, dyadic, dyadic_sum, fused
from dyads.ops import cached as of_cached
from tiny import TASKS, Variant, tiny_layer

SCALE = 0.7


def is_straight_through(variant: Variant) -> bool:
    """Whether the gates have, on purpose, another gradient than their values."""
    return ("select", "straight_through") in variant.options or variant.key == "more"


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Equal within a part of the largest entry, or of 1: what rounding adds up to grows with the size of the sums."""
    assert ours.dtype == theirs.dtype
    size = theirs.abs().max().clamp(min=1)
    assert_close(ours / size, theirs / size, atol=tolerance, rtol=0)


def test_operators_equal_the_double_sum_in_outputs_and_gradients(any_variant: Variant) -> None:
    for shape in ((2, 7, 14, 5), (1, 1, 2, 1)):
        core, x, A, B, task = tiny_layer(any_variant, *shape)
        leaves = [x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), *core.parameters()]
        slow = dyadic_sum(x, A, B, core.matrix(core.route(x @ A.T, x, task)), scale=SCALE)
        weight = torch.randn_like(slow)
        of_slow = torch.autograd.grad((slow * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
        for operator in (dyadic, fused):
            fast = operator(x, A, B, core, task, scale=SCALE)
            assert_close(fast, slow)
            assert_close(torch.autograd.grad((fast * weight).sum(), leaves), of_slow)


# (dtype of x, dtype of A, B and the core, what the update is added to, bias, scale)
FORMS = [
    (torch.float64, torch.float64, "nothing", False, 1.0),
    (torch.float32, torch.float32, "out", False, 0.3),
    (torch.float32, torch.float32, "frozen", True, 1.0),
    (torch.bfloat16, torch.float32, "frozen", True, 0.3),
    (torch.bfloat16, torch.bfloat16, "out", False, 0.3),
    (torch.float16, torch.float32, "frozen", False, 1.0),
    (torch.float32, torch.float32, "half-precision out", False, 0.3),
]
# bf16 keeps 8 bits and fp16 11: gates and coefficients are rounded several times on the way.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def test_fused_equals_dyadic_in_every_form_and_dtype(any_variant: Variant) -> None:
    for number, (dtype, adapter_dtype, added_to, bias, scale) in enumerate(FORMS):
        shape = (5, 7, 14, 11) if number % 2 else (4, 16, 32, 24)
        core, x, A, B, task = tiny_layer(any_variant, *shape, dtype=adapter_dtype)
        x, out = x.to(dtype), torch.randn(*shape[:2], shape[3]).to(dtype if added_to == "out" else torch.bfloat16)
        weight, offset = torch.randn(shape[3], shape[2]).to(dtype), torch.randn(shape[3]).to(dtype) if bias else None
        leaves = [x, A, B, *([out] if "out" in added_to else []), *core.parameters()]

        def run(
            operator: Any,
            added_to: str = added_to,
            scale: float = scale,
            given: tuple[Any, ...] = (x, A, B, core, task),
            out: Tensor = out,
            frozen: Any = (weight, offset),
            leaves: list[Tensor] = leaves,
        ) -> list[Tensor]:
            to = {"frozen": {"frozen": frozen}, "nothing": {}}.get(added_to, {"out": out})
            with torch.no_grad():
                z = operator(*given, scale=scale, **to)
            for leaf in leaves:
                leaf.requires_grad_()
            y = operator(*given, scale=scale, **to)
            grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
            for leaf in leaves:
                leaf.requires_grad_(False)
            return [y.detach(), z, *grads]

        before = [t.clone() for t in (x, out, weight)]
        half = torch.bfloat16 in (dtype, adapter_dtype) or added_to == "half-precision out"
        for ours, theirs in zip(run(fused), run(dyadic), strict=True):
            assert_near(ours, theirs, TOLERANCE[torch.bfloat16 if half else dtype])
        assert_close([x, out, weight], before, atol=0, rtol=0)


def gradients_of(operator: Any, variant: Variant, *shape: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The operator as a function of what it may differentiate by finite differences, and its values."""
    core, x, A, B, task = tiny_layer(variant, *shape)
    out, names = torch.randn(*shape[:2], shape[3]).double(), [n for n, _ in core.named_parameters()]
    values = [B, out] if is_straight_through(variant) else [B, out, x, A, *(core.get_parameter(n) for n in names)]
    names = names if len(values) > 2 else []
    frozen = (torch.randn(shape[3], shape[2]).double(), None)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = core

        def forward(self, B: Tensor, out: Tensor, x: Tensor, A: Tensor) -> Tensor:
            y = operator(x, A, B, core, task, scale=SCALE, out=out)
            return torch.stack([y, operator(x, A, B, core, task, scale=SCALE, frozen=frozen)])

    layer = Layer()

    def run(B: Tensor, out: Tensor, x: Tensor = x, A: Tensor = A, *rest: Tensor) -> Tensor:
        of_core = {f"core.{n}": t for n, t in zip(names, rest, strict=True)}
        return torch.func.functional_call(layer, of_core, (B, out, x, A))

    return run, [v.detach().clone().requires_grad_() for v in values]


def test_gradients_of_fused_agree_with_finite_differences(any_variant: Variant) -> None:
    run, values = gradients_of(fused, any_variant, 2, 2, 2, 3)
    assert torch.autograd.gradcheck(run, tuple(values), fast_mode=True)  # along random directions


def test_gradients_of_gradients_are_those_of_dyadic(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 3, 4, 6, 5)
    out, frozen = torch.randn(3, 4, 5).double(), (torch.randn(5, 6).double(), None)
    leaves = [t.requires_grad_() for t in (x, A, B, out, *core.parameters())]
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in leaves]

    def run(operator: Any) -> list[Tensor]:
        y = operator(x, A, B, core, task, scale=SCALE, out=out) + operator(x.tanh(), A, B, core, task, frozen=frozen)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        penalty = sum(((f * d).sum() for f, d in zip(first, draws, strict=True)), y.new_zeros(()))
        second = torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)
        return [*(f.detach() for f in first), *second]

    assert_close(run(fused), run(dyadic))


def test_cached_operator_equals_dyadic_and_rows_do_not_depend_on_each_other(
    any_variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_cached, "_SMALL_PRODUCT", 3000)  # between a few rows and many, below
    core, x, A, B, task = tiny_layer(any_variant, 3, 5, 6, 5, dtype=torch.float32)
    with torch.no_grad():
        cached = CachedOperator(A, B, core, scale=0.5)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for copies in (1, 40):
                rows, tasks = x.repeat(copies, 1, 1).to(dtype), task.repeat(copies)
                out = torch.randn(*rows.shape[:-1], 5).to(dtype)
                frozen = (torch.randn(5, 6).to(dtype), torch.randn(5).to(dtype))
                for to in ({}, {"out": out}, {"frozen": frozen}):
                    expected = dyadic(rows, A, B, core, tasks, scale=0.5, **to)
                    tolerance = TOLERANCE[torch.bfloat16 if dtype == torch.bfloat16 else torch.float32]
                    assert_near(cached(rows, tasks, **to), expected, tolerance)
        for i in range(3):  # a sample alone, with its own task, and with those of others
            fresh = CachedOperator(A, B, core, scale=0.5)
            alone = fresh.task_scores(task[i : i + 1])
            if alone is not None:
                assert torch.equal(cached.task_scores(task)[i], alone[0])
            assert_close(fresh(x[i : i + 1], task[i : i + 1])[0], cached(x, task)[i])


def test_declarations_hold_mix_is_linear_and_gates_depend_on_what_looks_at_names(any_variant: Variant) -> None:
    core, x, A, _, task = tiny_layer(any_variant, 3, 2, 4, 5)
    check_declarations(core.float(), 4, len(TASKS))
    core = core.double()

    g = core.route(x @ A.T, x, task)
    u, v = torch.randn(3, 2, core.p).double(), torch.randn(3, 2, core.p).double()
    assert_close(core.mix(2 * u - 3 * v, g), 2 * core.mix(u, g) - 3 * core.mix(v, g))

    other_x, other_task = torch.randn_like(x), (task + 1) % len(TASKS)
    changes = {
        "x": not torch.equal(core.route(x @ A.T, other_x, task), g),
        "h": not torch.equal(core.route(other_x @ A.T, x, task), g),
    }
    for name in ("embedding", "fixed_choice"):  # tasks far apart choose other ranks
        torch.nn.init.normal_(getattr(core, name, torch.zeros(1)), std=30)
    g = core.route(x @ A.T, x, task)
    changes["task"] = not torch.equal(core.route(x @ A.T, x, other_task), g)
    one_rank = core.p == 1 and any_variant.key == "more"  # leaves nothing to choose
    assert {name for name, changed in changes.items() if changed} == (set() if one_rank else core.looks_at)


def test_inputs_of_any_rank_give_the_same_rows(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 3, 5, 4, 2)
    order = torch.tensor([2, 0, 1])
    for operator in (dyadic, fused):
        rows = operator(x, A, B, core, task)
        assert_close(operator(x[1, 2], A, B, core, task[1:2]), rows[1, 2])
        assert_close(operator(x[:, 2], A, B, core, task), rows[:, 2])
        assert_close(operator(x.unsqueeze(1), A, B, core, task), rows.unsqueeze(1))
        assert_close(operator(x[order], A, B, core, task[order]), rows[order])


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_forward_has_no_loop_over_experts_or_samples_and_reads_no_value(variant: Variant) -> None:
    def operations(operator: Any, factor: int) -> list[str]:
        config = variant.config()
        larger = {"r": config.r * factor}
        if getattr(config, "num_experts", 1) != 1:
            larger["num_experts"] = config.num_experts * factor
        core: Core = Variant(variant.key, (*variant.options, *larger.items())).config().core(6)
        core.reset_parameters()
        x, A, B = torch.randn(3 * factor, 2, 6), torch.randn(core.p, 6), torch.randn(5, core.q)
        with _Operations() as seen:
            operator(x, A, B, core, torch.arange(3 * factor) % len(TASKS))
        assert not any("_local_scalar_dense" in name for name in seen.names)
        return seen.names

    for operator in (dyadic, fused):
        assert operations(operator, 1) == operations(operator, 4)


def test_kept_for_backward_are_the_input_and_a_few_numbers_per_token(unlike: Variant) -> None:
    core, x, A, B, task = tiny_layer(unlike, 2, 140, 64, 64)
    A.requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (x, A, B, *core.parameters())}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(x, A, B, core, task, out=torch.zeros(2, 140, 64).double())
    R = core.router_weight()
    per_token = core.p + (0 if R is None else len(R))
    assert not [t for t in kept if t.untyped_storage().data_ptr() not in own and t.numel() > 2 * 140 * per_token]

# SPDX-License-Identifier: Apache-2.0
"""The operator under in-place changes, autocast, transformations, large inputs."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dyads.ops import dyadic, dyadic_sum, fused, plain
from tiny import Variant, tiny_layer

# Closed form and autograd, with a router on x, on h, on neither; with and without scores of the task.
CORES = [
    Variant("mode", (("group_size", 2),)),
    Variant("task_mode", (("score", "h+task"),)),
    Variant("molora", (("select", "top_k"), ("top_k", 2))),
    Variant("more"),
    Variant("poly"),
]
of_cores = pytest.mark.parametrize("variant", CORES, ids=lambda v: v.id)


def is_fused(y: Tensor) -> bool:
    return "_Fused" in type(y.grad_fn).__name__


@of_cores
def test_a_frozen_layer_and_its_output_are_what_the_update_is_added_to(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 2, 3, 6, 4)
    weight, bias = torch.randn(4, 6).double(), torch.randn(4).double()
    leaves = [t.requires_grad_() for t in (x, A, B)]
    out = nn.functional.linear(x, weight, bias)
    expected = out + dyadic(x, A, B, core, task, scale=0.7)
    for operator, to in product((dyadic, fused), ({"frozen": (weight, bias)}, {"out": out})):
        y = operator(x, A, B, core, task, scale=0.7, **to)
        assert_close(y, expected)
        ours, theirs = (torch.autograd.grad(z.square().sum(), leaves, retain_graph=True) for z in (y, expected))
        assert_close(ours, theirs)


@of_cores
def test_dropped_out_inputs_reach_the_factor_a_and_not_the_router(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 2, 3, 6, 4)
    inner = nn.functional.dropout(x, 0.5)
    h = inner @ A.T
    by_hand = 0.7 * core.mix(h, core.route(h, x, task)) @ B.T
    for operator in (dyadic, fused):
        assert_close(operator(x, A, B, core, task, scale=0.7, inner=inner), by_hand)


@of_cores
def test_every_choice_of_what_gets_a_gradient_gives_those_of_dyadic(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 2, 3, 6, 4)
    out, weight = torch.randn(2, 3, 4).double(), torch.randn(4, 6).double()
    everything = {"x": x, "A": A, "B": B, "out": out, **dict(core.named_parameters())}
    for parameter in core.parameters():
        parameter.requires_grad_(False)
    names = list(everything)
    for wanted in (*([n] for n in names), *(names[:i] + names[i + 1 :] for i in range(len(names)))):
        leaves = [everything[n].requires_grad_() for n in wanted]
        for to in ({"out": out}, {"frozen": (weight, None)}):
            if to.get("out") is None and wanted == ["out"]:
                continue
            ys = [operator(x, A, B, core, task, scale=0.7, **to) for operator in (fused, dyadic)]
            assert is_fused(ys[0])
            grads = [torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in ys]
            assert_close(*grads)
        for leaf in leaves:
            leaf.requires_grad_(False)


@of_cores
def test_results_may_be_changed_in_place_and_follow_autocast(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 2, 3, 8, 4, torch.float32)
    leaves = [t.requires_grad_() for t in (x, A, B, *core.parameters())]
    weight, bias = torch.randn(4, 8), torch.randn(4)
    for autocast, added_to in product((False, True), ("frozen", "out", "nothing")):
        results = []
        for operator in (dyadic, fused):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = nn.functional.linear(x, weight, bias)
                to = {"frozen": {"frozen": (weight, bias)}, "out": {"out": out}, "nothing": {}}[added_to]
                y = operator(x, A, B, core, task, **to).mul_(2)
            results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
        for theirs, ours in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            tolerance = 0.05 if autocast else 1e-5  # bf16 keeps 8 bits
            assert_close(ours.float(), theirs.float(), atol=tolerance * float(theirs.abs().max()), rtol=0)


@of_cores
def test_backward_inside_an_autocast_that_forward_did_not_see_is_the_same(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 2, 3, 8, 4, torch.float32)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    y = fused(x, A, B, core, task, frozen=(torch.randn(4, 8), None))
    outside = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), leaves)
    assert_close(inside, outside, atol=0, rtol=0)


def test_float64_does_not_follow_autocast() -> None:
    core, x, A, B, task = tiny_layer(CORES[0], 2, 3, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x, A, B, core, task).dtype == torch.float64


@of_cores
def test_backward_uses_the_frozen_weight_that_forward_saw(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 2, 3, 8, 4)
    weight = nn.Parameter(torch.randn(4, 8).double(), requires_grad=False)
    y = fused(x.requires_grad_(), A, B, core, task, frozen=(weight, None))
    (before,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    weight.data = weight.data + 1  # as merging does
    assert_close(torch.autograd.grad(y.sum(), x)[0], before, atol=0, rtol=0)


@pytest.mark.parametrize("changed", ["x", "A", "B", "router"])
def test_a_change_in_place_between_forward_and_backward_is_refused(changed: str) -> None:
    core, x, A, B, task = tiny_layer(Variant("mode"), 2, 300, 8, 4)  # enough tokens for kept copies of the weights
    leaves = {"A": A, "B": B, "router": core.router}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = fused(x, A, B, core, task)
    with torch.no_grad():
        {**leaves, "x": x}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@of_cores
def test_selective_checkpointing_finds_kept_products_unchanged(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 2, 3, 6, 4)
    weight = torch.randn(4, 6).double()
    leaves = [t.requires_grad_() for t in (x, A, B, *core.parameters())]

    def run(x: Tensor) -> Tensor:
        return fused(x, A, B, core, task, frozen=(weight, None)).square()  # whose backward needs the second run's y

    def keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        product = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

    kept = partial(create_selective_checkpoint_contexts, keep_products)
    ours = torch.autograd.grad(checkpoint(run, x, use_reentrant=False, context_fn=kept).sum(), leaves)
    assert_close(ours, torch.autograd.grad(run(x).sum(), leaves))


@of_cores
def test_gradients_of_gradients_of_a_layer_that_is_called_twice(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 3, 4, 6, 6)
    leaves = [t.requires_grad_() for t in (x, A, B, *core.parameters())]

    def run(operator: Any) -> list[Tensor]:
        y = operator(operator(x, A, B, core, task, scale=0.1), A, B, core, task, scale=0.1)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(f.square().sum() for f in first), leaves)
        return [*(f.detach() for f in first), *second]

    assert_close(run(fused), run(dyadic))


@of_cores
def test_functional_transforms_and_forward_mode_are_those_of_dyadic(variant: Variant) -> None:
    core, x, A, B, task = tiny_layer(variant, 3, 4, 6, 5)
    tangents = (torch.randn_like(x), torch.randn_like(A))

    def of(operator: Any, x: Tensor, A: Tensor) -> Tensor:
        result: Tensor = operator(x, A, B, core, task, scale=0.7, frozen=(torch.ones(5, 6).double(), None))
        return result

    ours, theirs = (
        [
            *torch.func.jvp(partial(of, operator), (x, A), tangents),
            *torch.func.grad(lambda x, A, f=operator: of(f, x, A).square().sum(), argnums=(0, 1))(x, A),
            torch.func.vmap(partial(of, operator), in_dims=(None, 0))(x, torch.stack([A, 2 * A])),
        ]
        for operator in (fused, dyadic)
    )
    assert_close(ours, theirs)
    with forward_ad.dual_level():
        y = of(fused, forward_ad.make_dual(x, tangents[0]), forward_ad.make_dual(A, tangents[1]))
        assert_close(forward_ad.unpack_dual(y).tangent, theirs[1])


def test_plain_switches_fused_off_within_its_context() -> None:
    core, x, A, B, task = tiny_layer(CORES[0], 2, 3, 6, 4)
    A.requires_grad_()
    assert is_fused(fused(x, A, B, core, task))
    with plain():
        with plain():
            assert not is_fused(fused(x, A, B, core, task))
        assert not is_fused(fused(x, A, B, core, task))
    assert is_fused(fused(x, A, B, core, task))


def test_inputs_and_gradients_of_any_layout_give_the_same() -> None:
    core, x, A, B, task = tiny_layer(CORES[1], 4, 6, 8, 4)
    leaves = [t.requires_grad_() for t in (x, A, B, *core.parameters())]
    dy = torch.randn(4, 6, 4).double()

    def run(x_as: Any, dy_as: Any) -> tuple[Tensor, ...]:
        y = fused(x_as(x), A, B, core, task, frozen=(torch.ones(4, 8).double(), None))
        return y.detach(), *torch.autograd.grad(y, leaves, dy_as(dy))

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    def every_second(t: Tensor) -> Tensor:
        return torch.stack([t, -t], -1)[..., 0]

    expected = run(lambda t: t, lambda t: t)
    for x_as, dy_as in ((transposed, every_second), (every_second, transposed)):
        assert_close(run(x_as, dy_as), expected)


# --- production shapes ------------------------------------------------------------------------------------------------

SIZES = {"r": 4, "num_experts": 4}
LARGE = [
    Variant("mode", tuple(SIZES.items())),
    Variant("molora", tuple(SIZES.items())),
    Variant("task_mode", (*SIZES.items(), ("score", "h+task"))),
    Variant("more", (("r", 8),)),
]


@pytest.mark.parametrize("variant", LARGE, ids=lambda v: v.id)
def test_oracle_at_production_shapes(variant: Variant) -> None:
    """512 tokens of 576 features against the double sum in float64, outputs and gradients."""
    core, x, A, B, task = tiny_layer(variant, 4, 128, 576, 576)
    x, A, B = x.float().double(), A / 24, B / 4  # h and y of unit size
    for parameter in core.parameters():
        if parameter.shape[-1] == 576:
            parameter.data /= 24  # and scores
    wide = core.double()
    leaves = [t.requires_grad_() for t in (x, A, B)]
    with torch.no_grad():
        g = wide.route(x @ A.T, x, task)
        slow = dyadic_sum(x, A, B, wide.matrix(g))
    y = dyadic(x, A, B, wide, task)
    assert_close(y, slow)
    dy = torch.randn_like(y)
    exact = [y.detach(), *torch.autograd.grad(y, [*leaves, *wide.parameters()], dy)]

    # fp32 sums 576 products of 24 bits; bf16 rounds x, h, the gates and y to 8 bits each.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        near = [t.detach().to(d).requires_grad_() for t, d in ((x, dtype), (A, torch.float32), (B, torch.float32))]
        core = core.float()
        y = fused(*near, core, task)
        assert is_fused(y)
        found = [y.detach(), *torch.autograd.grad(y, [*near, *core.parameters()], dy.to(dtype))]
        for ours, theirs in zip(found, exact, strict=True):
            assert_close(ours.double(), theirs, atol=tolerance * float(theirs.abs().max()), rtol=0)

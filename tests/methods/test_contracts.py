# SPDX-License-Identifier: Apache-2.0
"""What every method must fulfil by itself, before any model is near."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dyads.methods import Core, MoDEConfig
from dyads.methods.mode import MoDE
from dyads.ops import Adapted, Held, Together, dyadic, dyadic_sum, fused, fused_all, plain
from tiny import TASKS, Variant

# Ones and primes on purpose: an axis that is confused with another must show.
SHAPES = [(1, 1, 3, 2), (2, 7, 12, 5), (3, 2, 1, 1), (5, 1, 8, 8)]


OPERATORS = pytest.mark.parametrize("operator", [dyadic, fused])


def tiny(variant: Variant, b: int, t: int, d: int, o: int) -> tuple[Core, Tensor, Tensor, Tensor, Tensor]:
    core = variant.config().core(d).double().eval()
    core.reset_parameters()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x, A, B = torch.randn(b, t, d).double(), torch.randn(core.p, d).double(), torch.randn(core.q, o).double()
    return core, x, A, B, torch.arange(b) % len(TASKS)


@OPERATORS
@pytest.mark.parametrize(("b", "t", "d", "o"), SHAPES)
def test_operator_equals_the_double_sum_in_outputs_and_gradients(
    variant: Variant, b: int, t: int, d: int, o: int, operator: Any
) -> None:
    core, x, A, B, task = tiny(variant, b, t, d, o)
    leaves = [x.requires_grad_(), A.requires_grad_(), B.requires_grad_()]
    fast = operator(x, A, B, core, task, scale=0.7)
    g = core.route(x @ A.T, x, task)
    slow = dyadic_sum(x, A, B, core.matrix(g), scale=0.7)
    assert fast.shape == (b, t, o)
    assert_close(fast, slow)
    weight = torch.randn_like(fast)
    of_fast = torch.autograd.grad((fast * weight).sum(), [*leaves, *core.parameters()], retain_graph=True)
    of_slow = torch.autograd.grad((slow * weight).sum(), [*leaves, *core.parameters()], allow_unused=True)
    for ours, theirs in zip(of_fast, of_slow, strict=True):
        assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@OPERATORS
def test_adding_onto_a_result_equals_adding_afterwards(variant: Variant, operator: Any) -> None:
    core, x, A, B, task = tiny(variant, 2, 3, 4, 5)
    onto = torch.randn(2, 3, 5).double()
    assert_close(operator(x, A, B, core, task, scale=3, onto=onto), onto + operator(x, A, B, core, task, scale=3))


class _Layer(torch.nn.Module):
    """The operator of a core, with everything that can get a gradient as a parameter."""

    def __init__(self, operator: Any, core: Core, A: Tensor, B: Tensor, onto: Tensor, task: Tensor) -> None:
        super().__init__()
        self.operator, self.core, self.task = operator, core, task
        self.A, self.B, self.onto = torch.nn.Parameter(A), torch.nn.Parameter(B), torch.nn.Parameter(onto)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.operator(x, self.A, self.B, self.core, self.task, scale=0.7, onto=self.onto)
        return result


@OPERATORS
def test_gradients_agree_with_finite_differences(variant: Variant, operator: Any) -> None:
    core, x, A, B, task = tiny(variant, 2, 2, 3, 2)
    layer = _Layer(operator, core, A, B, torch.randn(2, 2, 2).double(), task)
    # A straight-through choice has, on purpose, another gradient than its value: what it looks at stays out.
    through = {"select": "straight_through"}.items() <= dict(variant.options).items() or variant.key == "more"
    names = [n for n, _ in layer.named_parameters() if not through or not n.startswith(("core", "A"))]
    x.requires_grad_(not through)
    values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (5, 7, 13, 11), (8, 16, 32, 24)])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, False), (0.3, False), (0.3, True)])
@pytest.mark.parametrize("on", ["onto", "base"])
def test_fused_equals_plain_in_every_dtype(
    method_variant: Variant, shape: tuple[int, int, int, int], dtype: torch.dtype, scale: float, bias: bool, on: str
) -> None:
    core, x, A, B, task = tiny(method_variant, *shape)
    x, A, B, onto = x.to(dtype), A.float(), B.float(), torch.randn(*shape[:2], shape[3]).to(dtype)
    base = (torch.randn(shape[3], shape[2]).to(dtype), torch.randn(shape[3]).to(dtype) if bias else None)
    core = core.float()

    def run(operator: Any) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in ((x, A, B, onto) if on == "onto" else (x, A, B))]
        core.zero_grad()
        beneath = {"onto": leaves[3]} if on == "onto" else {"base": base}
        y = operator(*leaves[:3], core, task, scale=scale, **beneath)
        y.backward(torch.ones_like(y))
        with torch.no_grad():
            z = operator(x, A, B, core, task, scale=scale, **beneath)
        grads = [t.grad for t in (*leaves, *core.parameters())]
        assert all(g is not None for g in grads)
        return [y.detach(), z, *grads]  # type: ignore[list-item]

    before = [t.clone() for t in (onto, *base) if t is not None]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}[dtype]
    for ours, theirs in zip(run(fused), run(dyadic), strict=True):
        assert ours.dtype == theirs.dtype
        scale_of = theirs.abs().max().clamp(min=1)
        assert_close(ours / scale_of, theirs / scale_of, atol=tolerance, rtol=0)
    assert_close([t for t in (onto, *base) if t is not None], before, atol=0, rtol=0)


@OPERATORS
def test_a_base_layer_is_what_the_sum_is_added_to(variant: Variant, operator: Any) -> None:
    core, x, A, B, task = tiny(variant, 2, 3, 5, 4)
    weight, bias = torch.randn(4, 5).double(), torch.randn(4).double()
    leaves = [t.requires_grad_() for t in (x, A, B)]
    results = []
    for beneath in ({"base": (weight, bias)}, {"onto": torch.nn.functional.linear(x, weight, bias)}):
        y = operator(*leaves, core, task, scale=0.7, **beneath)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert_close(*results)


@pytest.mark.parametrize("beneath", ["base", "onto", "nothing"])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_the_operator_gives_may_be_changed_in_place(variant: Variant, beneath: str, autocast: bool) -> None:
    core, x, A, B, task = tiny(variant, 2, 3, 8, 4)
    core, leaves = core.float(), [t.float().requires_grad_() for t in (x, A, B)]
    weight, bias = torch.randn(4, 8), torch.randn(4)
    results = []
    for operator in (dyadic, fused):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            onto = torch.nn.functional.linear(leaves[0], weight, bias)
            more = {"base": {"base": (weight, bias)}, "onto": {"onto": onto}, "nothing": {}}[beneath]
            y = operator(*leaves, core, task, **more).mul_(2)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        tolerance = 0.05 if autocast else 1e-5
        assert_close(ours.float(), theirs.float(), atol=tolerance * float(theirs.abs().max()), rtol=0)


def test_backward_may_run_inside_an_autocast_that_forward_did_not_see(variant: Variant) -> None:
    core, x, A, B, task = tiny(variant, 2, 3, 8, 4)
    core, leaves = core.float(), [t.float().requires_grad_() for t in (x, A, B)]
    y = fused(*leaves, core, task, base=(torch.randn(4, 8), None))
    if "Fused" not in type(y.grad_fn).__name__:
        pytest.skip("the gradients are PyTorch's own, which follow autocast")
    outside = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), leaves)
    assert_close(inside, outside, atol=0, rtol=0)


def test_backward_is_that_of_the_weights_that_forward_saw(variant: Variant) -> None:
    core, x, A, B, task = tiny(variant, 2, 3, 8, 4)
    weight = torch.nn.Parameter(torch.randn(4, 8).double(), requires_grad=False)
    y = fused(x.requires_grad_(), A, B, core, task, base=(weight, None))
    (before,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    weight.data = weight.data + 1  # as merging does
    assert_close(torch.autograd.grad(y.sum(), x)[0], before, atol=0, rtol=0)


def test_an_override_does_not_inherit_the_gradients_of_another_gate() -> None:
    class Sharp(MoDE):
        def select(self, h: Tensor, scores: Tensor | None, of_task: Tensor | None) -> Tensor:
            assert scores is not None
            return super().select(h, 2 * scores, of_task)

    class Doubled(MoDE):
        def mix(self, h: Tensor, g: Tensor) -> Tensor:
            return 2 * super().mix(h, g)

    for kind in (Sharp, Doubled):
        core = kind(5, 4, 3, 1).double()
        torch.nn.init.normal_(core.router)
        x, A, B = torch.randn(6, 5).double(), torch.randn(4, 5).double(), torch.randn(12, 3).double()
        leaves = [t.requires_grad_() for t in (x, A, B, core.router)]
        ours, theirs = (torch.autograd.grad(f(x, A, B, core).square().sum(), leaves) for f in (fused, dyadic))
        assert_close(ours, theirs)


def test_selective_checkpointing_finds_what_it_kept_unchanged(variant: Variant) -> None:
    core, x, A, B, task = tiny(variant, 2, 3, 5, 4)
    W = torch.randn(4, 5).double()
    leaves = [t.requires_grad_() for t in (x, A, B)]

    def run(x: Tensor) -> Tensor:
        return fused(x, A, B, core, task, base=(W, None))

    def keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        product = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

    kept = partial(create_selective_checkpoint_contexts, keep_products)
    ours = torch.autograd.grad(checkpoint(run, x, use_reentrant=False, context_fn=kept).square().sum(), leaves)
    assert_close(ours, torch.autograd.grad(run(x).square().sum(), leaves))


def test_fused_follows_autocast_as_plain_does(variant: Variant) -> None:
    core, x, A, B, task = tiny(variant, 3, 5, 8, 6)
    core, leaves = core.float(), [t.float().requires_grad_() for t in (x, A, B)]
    results = []
    for operator in (dyadic, fused):
        with torch.autocast("cpu", torch.bfloat16):
            y = operator(*leaves, core, task)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours.float(), theirs.float(), atol=0.05 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("few", [True, False])
def test_operators_held_for_many_calls_give_what_fused_gives(
    variant: Variant, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not few:
        monkeypatch.setattr(sys.modules["dyads.ops.products"], "_SMALL_PRODUCT", -1)
    core, x, A, B, task = tiny(variant, 2, 3, 4, 5)
    with torch.no_grad():
        held = Held(A, B, core, scale=0.5)
        for rows in (x, x.bfloat16(), x.expand(40, *x.shape).reshape(-1, *x.shape[1:])):
            tasks = task if task is None else task.repeat(len(rows) // len(x))
            onto = torch.randn(*rows.shape[:-1], 5, dtype=rows.dtype)
            expected = fused(rows, A, B, core, tasks, scale=0.5, onto=onto)
            assert_close(held(rows, tasks, onto=onto), expected)
            with plain():
                assert_close(held(rows, tasks, onto=onto), dyadic(rows, A, B, core, tasks, scale=0.5, onto=onto))
            base = (torch.randn(5, 4, dtype=rows.dtype), torch.randn(5, dtype=rows.dtype))
            assert_close(held(rows, tasks, base=base), fused(rows, A, B, core, tasks, scale=0.5, base=base))


def test_layers_with_one_input_give_together_what_each_gives_alone(variant: Variant) -> None:
    first, x, A, B, task = tiny(variant, 2, 3, 12, 5)
    second, _, other_A, _, _ = tiny(variant, 2, 3, 12, 5)
    other_B = torch.randn(first.q, 7).double()  # k and v are narrower than q
    layers = [(first, A, B), (second, other_A, other_B)]
    task = task if "task" in first.looks_at else None
    with torch.no_grad():
        expected = [fused(x, a, b, core, task, scale=0.5) for core, a, b in layers]
        together = Together()
        held = [Held(a, b, core, 0.5) for core, a, b in layers]
        for rows in (x, x.clone(), x.clone()):  # the first pass finds out that both see it
            for operator, alone in zip(held, expected, strict=True):
                assert_close(operator(rows, task, together=together), alone)
        # One of them is passed over, or sees something else: nothing of another input is used.
        other = torch.randn_like(x)
        held[0](x, task, together=together)
        assert_close(held[1](other, task, together=together), fused(other, other_A, other_B, second, task, scale=0.5))
        assert_close(held[1](x, task, together=together), expected[1])


@pytest.mark.parametrize("change", ["in place", "another temperature", "another width"])
def test_layers_that_do_not_see_the_same_or_are_not_alike_stay_apart(change: str) -> None:
    x, B = torch.randn(2, 3, 12), torch.randn(6, 5)
    options: dict[str, Any] = {"r": 2, "num_experts": 3}
    cores = [MoDEConfig(**options).core(12) for _ in range(2)]
    if change == "another temperature":
        cores[1] = MoDEConfig(**options, temperature=0.1).core(12)
    if change == "another width":
        cores[1] = MoDEConfig(r=2, num_experts=1).core(12)
    for core in cores:
        core.reset_parameters()
    with torch.no_grad():
        together = Together()
        held = [Held(torch.randn(2, 12), B[: core.q], core, 1.0) for core in cores]
        for _ in range(3):
            rows = x.clone()
            held[0](rows, together=together)
            if change == "in place":
                rows.relu_()
            assert_close(held[1](rows, together=together), fused(rows, held[1].A, held[1].B, cores[1]))


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layers_computed_at_once_give_what_each_gives_alone(
    variant: Variant, dtype: torch.dtype, used: tuple[int, ...]
) -> None:
    """Outputs of three sizes, of which some are used."""
    layers: list[Any] = []
    for o, bias in ((5, True), (3, False), (7, False)):
        core, x, A, B, task = tiny(variant, 2, 3, 12, o)
        if not core.splits:
            pytest.skip("such gates are left to the plain operator")
        wide = torch.promote_types(dtype, torch.float32)
        base = (torch.randn(o, 12).to(dtype), torch.randn(o).to(dtype) if bias else None)
        leaves = [t.to(wide).requires_grad_() for t in (A, B)]
        layers.append(Adapted(*leaves, core.to(wide), task if "task" in core.looks_at else None, 0.7, base))
    x = x.to(dtype).requires_grad_()
    trained = [x, *(leaf for one in layers for leaf in (one.A, one.B, *one.gating.parameters()))]

    def run(at_once: bool) -> list[Tensor | None]:
        if at_once:
            ys = fused_all(x, layers)
        else:
            ys = tuple(fused(x, a, b, core, task, scale=s, base=base) for a, b, core, task, s, base in layers)
        loss = sum(ys[i].float().square().sum() for i in used)
        return [*(y.detach() for y in ys), *torch.autograd.grad(loss, trained, allow_unused=True)]  # type: ignore[arg-type]

    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for ours, theirs in zip(run(True), run(False), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.dtype == theirs.dtype
            assert_close(ours, theirs, atol=tolerance * max(1.0, float(theirs.abs().max())), rtol=0)


def test_fused_can_be_switched_off(variant: Variant) -> None:
    core, x, A, B, task = tiny(variant, 2, 3, 4, 5)
    A.requires_grad_()
    if not core.splits:
        assert "Fused" not in type(fused(x, A, B, core, task).grad_fn).__name__
        return
    assert "Fused" in type(fused(x, A, B, core, task).grad_fn).__name__
    with plain():
        y = fused(x, A, B, core, task)
        assert "Fused" not in type(y.grad_fn).__name__
        (first,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
        torch.autograd.grad(first.sum(), A)  # gradients of gradients


def test_fused_keeps_for_backward_the_input_and_a_few_numbers_per_token(variant: Variant) -> None:
    core, x, A, B, task = tiny(variant, 2, 140, 64, 64)
    if not core.splits:
        pytest.skip("scores that are not linear in x go through the plain operator")
    A.requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (x, A, B, *core.parameters())}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(x, A, B, core, task, onto=torch.zeros(2, 140, 64).double())
    rows = core.router_rows()
    per_token = core.p + (0 if rows is None else len(rows))
    wide = [t for t in kept if t.untyped_storage().data_ptr() not in own and t.numel() > 2 * 140 * per_token]
    assert not wide


def test_mix_is_linear_in_the_inner_coefficients(variant: Variant) -> None:
    core, x, A, _, task = tiny(variant, 2, 3, 4, 5)
    g = core.route(x @ A.T, x, task)
    u, v = torch.randn(2, 3, core.p).double(), torch.randn(2, 3, core.p).double()
    assert_close(core.mix(2 * u - 3 * v, g), 2 * core.mix(u, g) - 3 * core.mix(v, g))


def test_gates_depend_on_what_looks_at_names_and_on_nothing_else(variant: Variant) -> None:
    core, x, A, _, task = tiny(variant, 3, 2, 4, 5)
    g = core.route(x @ A.T, x, task)
    other_x, other_task = torch.randn_like(x), (task + 1) % len(TASKS)
    changes_with_x = not torch.equal(core.route(x @ A.T, other_x, task), g)
    changes_with_h = not torch.equal(core.route(other_x @ A.T, x, task), g)
    for name in ("embedding", "fixed_choice"):  # tasks far apart choose other ranks
        torch.nn.init.normal_(getattr(core, name, torch.zeros(1)), std=30)
    g = core.route(x @ A.T, x, task)
    changes_with_task = not torch.equal(core.route(x @ A.T, x, other_task), g)
    seen = {n for n, c in (("x", changes_with_x), ("h", changes_with_h), ("task", changes_with_task)) if c}
    if core.p == 1 and variant.key == "more":
        assert seen == set()  # one rank leaves nothing to choose
    else:
        assert seen == core.looks_at


@OPERATORS
def test_inputs_of_any_rank_give_the_same_rows(variant: Variant, operator: Any) -> None:
    core, x, A, B, task = tiny(variant, 3, 5, 4, 2)
    whole = operator(x, A, B, core, task)
    assert_close(operator(x[1, 2], A, B, core, task[1:2]), whole[1, 2])
    assert_close(operator(x[:, 2], A, B, core, task), whole[:, 2])
    assert_close(operator(x.unsqueeze(1), A, B, core, task), whole.unsqueeze(1))


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@OPERATORS
def test_forward_path_has_no_loop_over_experts_or_samples_and_never_synchronises(
    variant: Variant, operator: Any
) -> None:
    def operations(factor: int) -> list[str]:
        config = variant.config()
        larger = {"r": config.r * factor}
        if getattr(config, "num_experts", 1) != 1:
            larger["num_experts"] = config.num_experts * factor
        core = Variant(variant.key, (*variant.options, *larger.items())).config().core(6)
        core.reset_parameters()
        x, A, B = torch.randn(3 * factor, 2, 6), torch.randn(core.p, 6), torch.randn(core.q, 5)
        task = torch.arange(3 * factor) % len(TASKS)
        with _Operations() as seen:
            operator(x, A, B, core, task)
        assert not any("_local_scalar_dense" in name for name in seen.names), "a value was read from the device"
        return seen.names

    assert operations(1) == operations(4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_to_fp32_and_keeps_its_dtype(variant: Variant, dtype: torch.dtype) -> None:
    core, x, A, B, task = tiny(variant, 2, 3, 8, 5)
    core, A, B = core.float(), A.float(), B.float()
    x = x.to(dtype)
    half = dyadic(x, A, B, core, task)
    assert half.dtype == dtype
    full = dyadic(x.float(), A, B, core, task)
    # Relative to the size of the outputs: bf16 keeps 8 bits.
    assert (half.float() - full).abs().max() <= 3e-2 * full.abs().max()

# SPDX-License-Identifier: Apache-2.0
"""What every method must fulfil by itself, before any model is near."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dyads.methods import Core
from dyads.ops import dyadic, dyadic_sum
from tiny import TASKS, Variant

# Ones and primes on purpose: an axis that is confused with another must show.
SHAPES = [(1, 1, 3, 2), (2, 7, 12, 5), (3, 2, 1, 1), (5, 1, 8, 8)]


def tiny(variant: Variant, b: int, t: int, d: int, o: int) -> tuple[Core, Tensor, Tensor, Tensor, Tensor]:
    core = variant.config().core(d).double()
    core.reset_parameters()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x, A, B = torch.randn(b, t, d).double(), torch.randn(core.p, d).double(), torch.randn(core.q, o).double()
    return core, x, A, B, torch.arange(b) % len(TASKS)


@pytest.mark.parametrize(("b", "t", "d", "o"), SHAPES)
def test_operator_equals_the_double_sum_in_outputs_and_gradients(
    variant: Variant, b: int, t: int, d: int, o: int
) -> None:
    core, x, A, B, task = tiny(variant, b, t, d, o)
    leaves = [x.requires_grad_(), A.requires_grad_(), B.requires_grad_()]
    fast = dyadic(x, A, B, core, task, scale=0.7)
    g = core.route(x @ A.T, x, task)
    slow = dyadic_sum(x, A, B, core.matrix(g), scale=0.7)
    assert fast.shape == (b, t, o)
    assert_close(fast, slow)
    weight = torch.randn_like(fast)
    of_fast = torch.autograd.grad((fast * weight).sum(), [*leaves, *core.parameters()], retain_graph=True)
    of_slow = torch.autograd.grad((slow * weight).sum(), [*leaves, *core.parameters()], allow_unused=True)
    for ours, theirs in zip(of_fast, of_slow, strict=True):
        assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_adding_onto_a_result_equals_adding_afterwards(variant: Variant) -> None:
    core, x, A, B, task = tiny(variant, 2, 3, 4, 5)
    onto = torch.randn(2, 3, 5).double()
    assert_close(dyadic(x, A, B, core, task, onto=onto), onto + dyadic(x, A, B, core, task))


def test_gradients_agree_with_finite_differences(variant: Variant) -> None:
    core, x, A, B, task = tiny(variant, 2, 2, 3, 2)
    if "task" in core.looks_at:
        # A straight-through choice has, on purpose, another gradient than its value; with the gate held it has not.
        g = core.route(x @ A.T, x, task).detach()
        gates = {"route": lambda h, x, task: g, "mix": core.mix}
        core = type("Held", (), {k: staticmethod(v) for k, v in gates.items()})()  # type: ignore[assignment]
        inputs = (x, A, B)
        assert torch.autograd.gradcheck(
            lambda x, A, B: dyadic(x, A, B, core, task), tuple(i.requires_grad_() for i in inputs)
        )
        return
    names = [name for name, _ in core.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in core.parameters()]

    def run(x: Tensor, A: Tensor, B: Tensor, *values: Tensor) -> Tensor:
        held = dict(zip(names, values, strict=True))

        class Bound:
            def route(self, h: Tensor, x: Tensor, task: Tensor | None) -> Tensor:
                return torch.func.functional_call(_Route(core), {f"core.{k}": v for k, v in held.items()}, (h, x, task))

            def mix(self, h: Tensor, g: Tensor) -> Tensor:
                return core.mix(h, g)

        return dyadic(x, A, B, Bound(), task)

    leaves = [t.detach().requires_grad_() for t in (x, A, B)]
    assert torch.autograd.gradcheck(run, (*leaves, *parameters))


class _Route(torch.nn.Module):
    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core

    def forward(self, *args: Any) -> Tensor:
        return self.core.route(*args)


def test_mix_is_linear_in_the_inner_coefficients(variant: Variant) -> None:
    core, x, A, _, task = tiny(variant, 2, 3, 4, 5)
    g = core.route(x @ A.T, x, task)
    u, v = torch.randn(2, 3, core.p).double(), torch.randn(2, 3, core.p).double()
    assert_close(core.mix(2 * u - 3 * v, g), 2 * core.mix(u, g) - 3 * core.mix(v, g))


def test_gates_depend_on_what_looks_at_names_and_on_nothing_else(variant: Variant) -> None:
    core, x, A, _, task = tiny(variant, 3, 2, 4, 5)
    g = core.route(x @ A.T, x, task)
    other_x, other_task = torch.randn_like(x), (task + 1) % len(TASKS)
    torch.nn.init.normal_(getattr(core, "embedding", torch.zeros(1)), std=30)  # tasks far apart choose other ranks
    g = core.route(x @ A.T, x, task)
    changes_with_x = not torch.equal(core.route(x @ A.T, other_x, task), g)
    changes_with_h = not torch.equal(core.route(other_x @ A.T, x, task), g)
    changes_with_task = not torch.equal(core.route(x @ A.T, x, other_task), g)
    seen = {n for n, c in (("x", changes_with_x), ("h", changes_with_h), ("task", changes_with_task)) if c}
    if core.p == 1 and variant.key == "more":
        assert seen == set()  # one rank leaves nothing to choose
    else:
        assert seen == core.looks_at


def test_inputs_of_any_rank_give_the_same_rows(variant: Variant) -> None:
    core, x, A, B, task = tiny(variant, 3, 5, 4, 2)
    whole = dyadic(x, A, B, core, task)
    assert_close(dyadic(x[1, 2], A, B, core, task[1:2]), whole[1, 2])
    assert_close(dyadic(x[:, 2], A, B, core, task), whole[:, 2])
    assert_close(dyadic(x.unsqueeze(1), A, B, core, task), whole.unsqueeze(1))


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_forward_path_has_no_loop_over_experts_or_samples_and_never_synchronises(variant: Variant) -> None:
    def operations(factor: int) -> list[str]:
        larger = {"r": 4 * factor}
        if "num_experts" in variant.config().__dataclass_fields__ and dict(variant.options).get("num_experts") != 1:
            larger["num_experts"] = 3 * factor
        core = Variant(variant.key, (*variant.options, *larger.items())).config().core(6)
        core.reset_parameters()
        x, A, B = torch.randn(3 * factor, 2, 6), torch.randn(core.p, 6), torch.randn(core.q, 5)
        task = torch.arange(3 * factor) % len(TASKS)
        with _Operations() as seen:
            dyadic(x, A, B, core, task)
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

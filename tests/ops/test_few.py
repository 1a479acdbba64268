# SPDX-License-Identifier: Apache-2.0
"""Do two compiled calls of a layer give what the operator gives, for few rows of any number and size?"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close

from dyads.methods import Core, MoDEConfig, MoLoRAConfig
from dyads.ops import Choice, Held, Kernel, Together, dyadic, kernel, without_kernel
from ops.test_kernel import compiled

CONFIGS = {
    "mode": MoDEConfig(r=4, num_experts=16),
    "mode of two": MoDEConfig(r=1, num_experts=2),
    "mode in groups": MoDEConfig(r=6, num_experts=5, group_size=3, temperature=0.5),
    "molora": MoLoRAConfig(r=3, num_experts=7, temperature=2.0),
}


@pytest.fixture(autouse=True)
def _needs_the_kernel() -> None:
    compiled(torch.zeros(2, 2), Choice(1, 1, 1))


def made(name: str, d: int) -> Core:
    core = CONFIGS[name].core(d)
    core.reset_parameters()
    return core


def layer(name: str, d: int, o: int, scale: float = 0.5) -> Held:
    core = made(name, d)
    return Held(torch.randn(core.p, d), torch.randn(core.q, o), core, scale)


def watched(held: Held, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called of the kernel from now on."""
    seen: list[str] = []
    for name in ("coefficients", "add"):
        function = getattr(Kernel, name)

        def call(self: Kernel, *args: Any, name: str = name, function: Any = function) -> Any:
            seen.append(name)
            return function(self, *args)

        monkeypatch.setattr(Kernel, name, call)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "o"), [(1, 1), (17, 31), (96, 64), (33, 100)])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 17, 33])
@torch.no_grad()
def test_few_rows_give_what_the_operator_gives(
    name: str, dtype: torch.dtype, d: int, o: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, x, base = layer(name, d, o), torch.randn(rows, d).to(dtype), (torch.randn(o, d).to(dtype), None)
    seen = watched(held, monkeypatch)
    y = held(x, base=base)
    assert seen == ["coefficients", "add"]
    exact = dyadic(x.double(), held.A.double(), held.B.double(), held.core.double(), scale=held.scale)
    expected = exact + x.double() @ base[0].double().t()
    assert y.dtype == dtype
    if dtype == torch.float32:
        assert_close(y, expected.float(), rtol=1e-4, atol=1e-4)
    else:  # the base layer's output is rounded once, the sum a second time
        largest = float(expected.abs().max())
        assert_close(y.double(), expected, rtol=2**-7, atol=2**-7 * largest)


@pytest.mark.parametrize("shape", [(5, 96), (5, 1, 96), (2, 3, 96), (96,), (0, 96)])
@torch.no_grad()
def test_samples_and_tokens_are_rows(shape: tuple[int, ...]) -> None:
    held, x, base = layer("mode", 96, 50), torch.randn(shape), (torch.randn(50, 96), torch.randn(50))
    y = held(x, base=base)
    assert y.shape == (*shape[:-1], 50)
    with without_kernel():
        assert_close(y, held(x, base=base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_a_row_has_the_same_bits_whatever_the_others_and_the_threads_are(threads: int) -> None:
    held, x = layer("mode", 576, 1536), torch.randn(21, 576)
    found = kernel(x, held._choice)
    assert found is not None

    def delta(rows: Tensor) -> Tensor:
        y = torch.zeros(len(rows), 1536)
        found.add(held.coefficients(rows, found), found.panels(held.B), y)
        return y

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        every = delta(x)
        torch.set_num_threads(threads)
        for first, last in ((0, 21), (0, 1), (3, 12), (20, 21)):
            assert torch.equal(delta(x[first:last].clone()), every[first:last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_layers_with_one_input_take_one_call_down(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer(name, 48, o) for o in (64, 20, 33)]
    bases = [(torch.randn(o, 48), None) for o in (64, 20, 33)]
    x, together = torch.randn(5, 48), Together()
    expected = [held(x, base=base) for held, base in zip(layers, bases, strict=True)]
    seen = watched(layers[0], monkeypatch)
    for times in range(3):
        rows = x.clone()
        for held, base, alone in zip(layers, bases, expected, strict=True):
            assert_close(held(rows, base=base, together=together), alone, rtol=1e-5, atol=1e-5)
        assert seen.count("coefficients") == (3 if times == 0 else 1), "the first pass learns who sees the same"
        assert seen.count("add") == 3
        seen.clear()


@torch.no_grad()
def test_a_pass_of_many_rows_tells_who_sees_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, base, together = [layer("mode", 48, 20) for _ in range(2)], (torch.randn(20, 48), None), Together()
    seen = watched(layers[0], monkeypatch)
    prompt, token = torch.randn(2000, 48), torch.randn(4, 48)
    for held in layers:
        held(prompt, base=base, together=together)
    assert seen == []
    for held in layers:
        held(token, base=base, together=together)
    assert seen == ["coefficients", "add", "add"]


@torch.no_grad()
def test_what_was_computed_compiled_is_not_given_to_a_layer_that_is_not() -> None:
    """Such as one whose base layer is watched and so computes by itself."""
    first, second = layer("mode", 48, 20), layer("mode", 48, 20)
    base, together = (torch.randn(20, 48), None), Together()
    for _ in range(3):
        x = torch.randn(4, 48)
        first(x, base=base, together=together)
        second(x, base=base, together=together)
    x = torch.randn(4, 48)
    first(x, base=base, together=together)
    onto = torch.randn(4, 20)
    y = second(x, onto=onto, together=together)
    delta = dyadic(x, second.A, second.B, second.core, scale=second.scale)
    assert_close(y, onto + delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["strided", "no base", "double", "off", "task"])
@torch.no_grad()
def test_where_it_cannot_serve_pytorch_does(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, x, base = layer("mode", 48, 20), torch.randn(4, 48), (torch.randn(20, 48), None)
    expected = held(x, base=base)
    seen = watched(held, monkeypatch)
    if what == "strided":
        y = held(torch.randn(48, 4).t().copy_(x), base=base)
    elif what == "no base":
        y = held(x, onto=x @ base[0].t())
    elif what == "double":
        y = held(x.double(), base=(base[0].double(), None)).float()
    elif what == "task":
        y = held(x, torch.zeros(4, dtype=torch.long), base=base)
    else:
        with without_kernel():
            y = held(x, base=base)
    assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert seen == []


def test_what_does_not_fit_is_refused_and_not_read_past_its_end() -> None:
    found, choice = compiled(torch.zeros(2, 2), Choice(1, 2, 1)), Choice(1, 2, 1)
    x, down = torch.randn(3, 8), found.panels(torch.randn(8, 3))
    u = found.coefficients(x, down, choice)
    assert u.shape == (1, 8, 2)
    assert torch.equal(u[0, 3:], torch.zeros(5, 2))
    for wrong in (torch.randn(8, 3).t(), torch.randn(3, 9)):
        with pytest.raises(ValueError, match=r"takes a contiguous x and panels \(1, \d, 32\) in fp32"):
            found.coefficients(wrong, down, choice)
    with pytest.raises(ValueError, match="panels"):
        found.coefficients(x, down, choice, layers=12)
    with pytest.raises(ValueError, match="panels"):
        found.coefficients(x, down.double(), choice)
    up = found.panels(torch.randn(2, 20))
    for y, panels, rows in (
        (torch.zeros(3, 33), up, u[0]),
        (torch.zeros(9, 20), up, u[0]),
        (torch.zeros(20, 3).t(), up, u[0]),
        (torch.zeros(3, 20), up.double(), u[0]),
        (torch.zeros(3, 20), up, u[0].double()),
        (torch.zeros(3, 20), up, torch.zeros(8, 3)),
    ):
        with pytest.raises(ValueError, match="the kernel adds"):
            found.add(rows, panels, y)
    with pytest.raises(ValueError, match=r"on the CPU, got .* on meta"):
        found.coefficients(x, down.to("meta"), choice)
    with pytest.raises(ValueError, match=r"all on the CPU, got .* on meta"):
        found.add(u[0], up.to("meta"), torch.zeros(3, 20))


@torch.no_grad()
def test_no_rows_are_no_error_in_a_thread_that_computed_nothing_before() -> None:
    held, base = layer("mode", 96, 50), (torch.randn(50, 96), None)
    found: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            found.append(held(torch.randn(0, 96), base=base))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert [y.shape for y in found] == [(0, 50)]


@torch.no_grad()
def test_one_that_goes_another_way_leaves_the_others_together(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, together = [layer("mode", 48, 20) for _ in range(3)], Together()
    base, onto = (torch.randn(20, 48), None), torch.randn(5, 20)
    seen = watched(layers[0], monkeypatch)
    for _ in range(3):
        x = torch.randn(5, 48)
        seen.clear()
        layers[0](x, base=base, together=together)
        layers[1](x, onto=onto, together=together)
        layers[2](x, base=base, together=together)
    assert seen == ["coefficients", "add", "add"]


def test_forward_derivatives_go_through_the_operator() -> None:
    held, x, tangent = layer("mode", 48, 20), torch.randn(5, 48), torch.randn(5, 48)
    base = (torch.randn(20, 48), None)
    with torch.no_grad(), forward_ad.dual_level():
        y = held(forward_ad.make_dual(x, tangent), base=base)
        found = forward_ad.unpack_dual(y).tangent
    _, expected = torch.func.jvp(
        lambda x: dyadic(x, held.A, held.B, held.core, scale=held.scale, base=base), (x,), (tangent,)
    )
    assert_close(found, expected, rtol=1e-4, atol=1e-4)

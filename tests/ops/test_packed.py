# SPDX-License-Identifier: Apache-2.0
"""Does preparing a frozen weight once change anything but the time that its products take?"""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dyads.methods import MoDEConfig
from dyads.ops import fused, unpacked
from dyads.ops.packed import Packs, packs

of_packed: Any = import_module("dyads.ops.packed")

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch has no MKL")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two would each take a part of the rows, and the parts may be too small to give the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every packed product."""
    seen: list[int] = []
    plain = torch.ops.mkl._mkl_linear

    def watched(x: Tensor, *args: Any) -> Tensor:
        seen.append(args[-1])
        result: Tensor = plain(x, *args)
        return result

    monkeypatch.setattr(torch.ops.mkl, "_mkl_linear", watched)
    return seen


def frozen(o: int = 33, d: int = 48, bias: bool = True) -> tuple[nn.Parameter, Tensor | None]:
    weight = nn.Parameter(torch.randn(o, d), requires_grad=False)
    return weight, torch.randn(o) if bias else None


def of(x: Tensor, weight: Tensor) -> Packs:
    found = packs(x, weight)
    assert found is not None
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("o", "d"), [(1, 1), (7, 13), (64, 48), (257, 31), (192, 576)])
@pytest.mark.parametrize("rows", [16, 17, 64, 127, 512, 1024])
def test_every_product_has_the_bits_of_the_plain_one(rows: int, o: int, d: int, bias: bool) -> None:
    (weight, b), x, dy = frozen(o, d, bias), torch.randn(rows, d), torch.randn(rows, o)
    for _ in range(5):
        found = of(x, weight)
        assert torch.equal(found.linear(x, weight, b), F.linear(x, weight, b))
        assert torch.equal(found.back(dy, weight.detach()), dy @ weight)


def test_a_product_is_packed_when_as_many_rows_have_come_three_times(calls: list[int]) -> None:
    weight, bias = frozen()
    for rows in (32, 32, 16, 32, 32, 32):
        of(torch.randn(rows, 48), weight).linear(torch.randn(rows, 48), weight, bias)
    assert calls == [32], "the third in a row is compared with the plain one"
    for rows in (2, 4):  # samples and tokens: rows all the same
        of(torch.randn(rows, 32 // rows, 48), weight).linear(torch.randn(rows, 32 // rows, 48), weight, bias)
    assert calls == [32] * 3
    for rows in (64, 32, 64, 64):
        of(torch.randn(rows, 48), weight).linear(torch.randn(rows, 48), weight, bias)
    assert calls == [32] * 4, "others that come now and then change nothing"
    for _ in range(2):
        of(torch.randn(64, 48), weight).linear(torch.randn(64, 48), weight, bias)
    assert calls == [32] * 4 + [64] * 2, "but three in a row do"


@pytest.mark.parametrize("how", ["in place", "anew", "through data"])
def test_a_weight_that_changes_is_packed_again(how: str, calls: list[int]) -> None:
    (weight, bias), x, dy = frozen(), torch.randn(32, 48), torch.randn(32, 33)

    def agree() -> None:
        for _ in range(4):
            assert torch.equal(of(x, weight).linear(x, weight, bias), F.linear(x, weight, bias))
            assert torch.equal(of(x, weight).back(dy, weight.detach()), dy @ weight)

    agree()
    assert len(calls) == 4
    before = of(x, weight)
    with torch.no_grad():
        if how == "in place":
            weight += 1.0
        elif how == "anew":
            weight.data = weight + 1.0
        else:
            weight.set_(weight + 1.0)  # type: ignore[call-overload]
    assert not before.are_of(weight)
    assert torch.equal(before.back(dy, weight.detach()), dy @ weight), "a graph may still hold what was packed"
    agree()
    assert len(calls) == 8


def test_where_the_bits_differ_the_plain_product_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight, bias), x = frozen(), torch.randn(32, 48)
    right, asked = torch.ops.mkl._mkl_linear, []

    def wrong(*args: Any) -> Tensor:
        asked.append(args)
        result: Tensor = right(*args) * (1 + 1e-6)
        return result

    monkeypatch.setattr(torch.ops.mkl, "_mkl_linear", wrong)
    for _ in range(9):
        assert torch.equal(of(x, weight).linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(asked) == 1, "compared once"
    assert of(x, weight).taken == 0


def test_what_is_packed_takes_no_more_room_than_there_is(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    gc.collect()
    (first, bias), (second, _) = frozen(), frozen()
    monkeypatch.setattr(of_packed, "_ROOM", of_packed._taken() + first.nbytes + second.nbytes - 1)
    x = torch.randn(32, 48)
    for weight in (first, second):
        for _ in range(4):
            assert torch.equal(of(x, weight).linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(calls) == 2, "of the first weight only"
    assert of(x, first).taken == first.nbytes
    assert of(x, second).taken == 0
    taken = of_packed._taken()
    del first, weight
    gc.collect()
    assert of_packed._taken() == taken - second.nbytes, "it goes with its weight"


@pytest.mark.parametrize(
    "what",
    [
        "few rows",
        "many rows",
        "half precision",
        "double",
        "strided",
        "watched",
        "subclass",
        "inference",
        "off",
        "unwanted",
    ],
)
def test_where_there_is_nothing_to_gain_nothing_is_packed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = frozen()[0], torch.randn(32, 48)
    assert packs(x, weight) is not None
    if what == "few rows":
        assert packs(x[:15], weight) is None
    elif what == "many rows":
        assert packs(torch.randn(5, 205, 48), weight) is None
    elif what == "half precision":
        assert packs(x.bfloat16(), weight.bfloat16()) is None
    elif what == "double":
        assert packs(x.double(), weight.double()) is None
    elif what == "strided":
        assert packs(x, torch.randn(48, 33).t()) is None
    elif what == "watched":
        with TorchDispatchMode():
            assert packs(x, weight) is None
    elif what == "subclass":
        assert packs(x.as_subclass(type("Other", (Tensor,), {})), weight) is None
    elif what == "inference":
        with torch.inference_mode():
            assert packs(x, torch.randn(33, 48)) is None
    elif what == "off":
        with unpacked():
            assert packs(x, weight) is None
    else:
        monkeypatch.setenv("DYADS_PACK", "0")
        of_packed._can_pack.cache_clear()
        assert packs(x, weight) is None
        monkeypatch.undo()
        of_packed._can_pack.cache_clear()


def test_training_takes_the_same_steps_bit_for_bit(calls: list[int]) -> None:
    """Also when one of them is packed and the other is not, as after a run that was interrupted."""

    def train() -> list[Tensor]:
        torch.manual_seed(0)
        core = MoDEConfig(r=4, num_experts=3).core(48)
        core.reset_parameters()
        (weight, bias), A, B = frozen(), torch.randn(4, 48), torch.randn(12, 33)
        trained = [A.requires_grad_(), B.requires_grad_(), *core.parameters()]
        optimizer, losses = torch.optim.SGD(trained, 0.01), []
        for _ in range(6):
            x = torch.randn(4, 16, 48, requires_grad=True)
            y = fused(x, A, B, core, base=(weight, bias))
            y.square().mean().backward()
            losses += [y.detach().clone(), x.grad]
            optimizer.step()
            optimizer.zero_grad()
        return [*losses, A.detach(), B.detach()]

    with unpacked():
        plain = train()
    assert not calls
    packed = train()
    assert len(calls) == 8, "forward and backward, from the third step on"
    assert all(torch.equal(one, other) for one, other in zip(plain, packed, strict=True))


def test_a_model_can_be_copied_and_saved_after_its_weights_were_packed(calls: list[int]) -> None:
    layer, x = nn.Linear(48, 33).requires_grad_(False), torch.randn(32, 48)
    for _ in range(3):
        of(x, layer.weight).linear(x, layer.weight, layer.bias)
    assert len(calls) == 1
    again = copy.deepcopy(layer)
    assert torch.equal(of(x, again.weight).linear(x, again.weight, again.bias), layer(x))
    assert len(calls) == 1, "a copy has weights of its own"
    file = io.BytesIO()
    torch.save(layer, file)
    assert file.tell() < 3 * layer.weight.nbytes

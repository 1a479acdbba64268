# SPDX-License-Identifier: Apache-2.0
"""Does preparing a frozen weight once change anything but the time that its products take?"""

from __future__ import annotations

import copy
import gc
import io
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dyads import use_task
from dyads.methods import MoDEConfig, MoREConfig
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
def test_every_product_has_the_bits_of_the_plain_one(rows: int, o: int, d: int, bias: bool, calls: list[int]) -> None:
    (weight, b), x, dy = frozen(o, d, bias), torch.randn(rows, d), torch.randn(rows, o)
    for _ in range(4):
        found = of(x, weight)
        assert torch.equal(found.linear(x, weight, b), F.linear(x, weight, b))
        assert torch.equal(found.back(dy, weight.detach()), dy @ weight)
    assert calls, "and it is not the plain one in both cases"


def test_a_product_is_packed_when_as_many_rows_come_twice_in_a_row(calls: list[int]) -> None:
    weight, bias = frozen()

    def multiply(*shape: int) -> None:
        x = torch.randn(*shape, 48)
        of(x, weight).linear(x, weight, bias)

    for rows in (32, 16, 32):
        multiply(rows)
    assert calls == []
    multiply(32)
    assert calls == [32] * 2, "the first is compared with the plain one"
    multiply(2, 16)  # samples and tokens: rows all the same
    multiply(4, 8)
    assert calls == [32] * 4
    for rows in (64, 32, 64):
        multiply(rows)
    assert calls == [32] * 5, "others that come now and then change nothing"
    multiply(64)
    multiply(64)
    multiply(32)
    assert calls == [32] * 5 + [64] * 3, "but two in a row do"


def change_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight += 1.0


def change_anew(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1.0


def change_twice(weight: nn.Parameter) -> None:
    """As merging and unmerging does: the memory that the weight had at first may be given out again."""
    weight.data = weight.data + 1.0
    weight.data = weight.data + 1.0


def change_type(weight: nn.Parameter) -> None:
    """As `model.to(torch.bfloat16).to(torch.float32)` does."""
    weight.data = weight.data.bfloat16()
    weight.data = weight.data.float()


@pytest.mark.parametrize("change", [change_in_place, change_anew, change_twice, change_type])
@pytest.mark.parametrize(("o", "d"), [(33, 48), (192, 576)])
def test_a_weight_that_changes_is_packed_again(
    change: Callable[[nn.Parameter], None], o: int, d: int, calls: list[int]
) -> None:
    (weight, bias), x, dy = frozen(o, d), torch.randn(32, d), torch.randn(32, o)

    def agree() -> None:
        for _ in range(4):
            assert torch.equal(of(x, weight).linear(x, weight, bias), F.linear(x, weight, bias))
            assert torch.equal(of(x, weight).back(dy, weight.detach()), dy @ weight)

    agree()
    assert len(calls) == 8
    before = of(x, weight)
    change(weight)
    assert not before.are_of(weight)
    assert torch.equal(before.back(dy, weight.detach()), dy @ weight), "a graph may still hold what was packed"
    agree()
    assert len(calls) == 16


@pytest.mark.parametrize(("o", "d"), [(960, 960), (2048, 1024), (48, 33)])
def test_inputs_that_are_zero_tell_nothing_of_the_order_of_a_sum(o: int, d: int) -> None:
    weight, _ = frozen(o, d)
    for of_zeros in (True, True, True, False):
        x, dy = (torch.zeros(32, n) if of_zeros else torch.randn(32, n) for n in (d, o))
        assert torch.equal(of(x, weight).linear(x, weight), F.linear(x, weight))
        assert torch.equal(of(x, weight).back(dy, weight.detach()), dy @ weight)


@pytest.mark.parametrize(("o", "d"), [(576, 192), (1536, 576)])
def test_an_input_that_lies_otherwise_is_multiplied_as_it_would_be(o: int, d: int, calls: list[int]) -> None:
    weight, bias = frozen(o, d)
    for _ in range(3):
        of(x := torch.randn(16, 2, d), weight).linear(x, weight, bias)
    packed = len(calls)
    assert packed
    x = torch.randn(16, 2, d).transpose(0, 1)
    assert torch.equal(of(x, weight).linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(calls) == packed


def test_threads_do_not_disturb_each_other() -> None:
    shared, failed = frozen()[0], []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for step in range(150):
                weight = shared if seed % 2 else frozen()[0]
                x = torch.randn(16 + 16 * (step // 3 % 2), 48, generator=generator)
                for _ in range(2):
                    assert torch.equal(of(x, weight).linear(x, weight), F.linear(x, weight))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert failed == []


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
    assert len(calls) == 4, "of the first weight only"
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
    elif what == "inexact":
        torch.set_float32_matmul_precision("medium")
        try:
            assert packs(x, weight) is None
        finally:
            torch.set_float32_matmul_precision("highest")
    elif what == "traced":
        asked = []
        torch.jit.trace(lambda x: asked.append(packs(x, weight)) or x + 1, x, check_trace=False)
        assert asked == [None]
    elif what == "forward AD":
        with forward_ad.dual_level():
            assert packs(x, weight) is None
    elif what == "vmap":
        asked = []
        torch.func.vmap(lambda x: asked.append(packs(torch.randn(32, 48), weight)) or x)(x)
        assert asked == [None]
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
    assert len(calls) == 12, "forward and backward, from the second step on, and one to compare with"
    assert all(torch.equal(one, other) for one, other in zip(plain, packed, strict=True))


def test_a_model_can_be_copied_and_saved_after_its_weights_were_packed(calls: list[int]) -> None:
    layer, x = nn.Linear(48, 33).requires_grad_(False), torch.randn(32, 48)
    for _ in range(3):
        of(x, layer.weight).linear(x, layer.weight, layer.bias)
    assert len(calls) == 3
    again = copy.deepcopy(layer)
    assert torch.equal(of(x, again.weight).linear(x, again.weight, again.bias), layer(x))
    assert len(calls) == 3, "a copy has weights of its own"
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(of(x, loaded.weight).linear(x, loaded.weight, loaded.bias), layer(x))


def test_what_is_packed_in_inference_mode_serves_training_too(calls: list[int]) -> None:
    (weight, bias), x, dy = frozen(), torch.randn(32, 48), torch.randn(32, 33)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(of(x, weight).linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(calls) == 3
    core = MoDEConfig(r=2, num_experts=3).core(48)
    core.reset_parameters()
    A, B, x = torch.randn(2, 48, requires_grad=True), torch.randn(6, 33), x.requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fused(x, A, B, core, base=(weight, bias)), (x, A), dy)

    packed = gradients()
    assert len(calls) == 4
    with unpacked():
        assert all(torch.equal(one, other) for one, other in zip(packed, gradients(), strict=True))


def test_a_merged_layer_gives_the_memory_back(calls: list[int]) -> None:
    config = MoREConfig(r=4, num_tasks=2, target_modules=["linear"], init_weights=False)
    model = get_peft_model(nn.Sequential(OrderedDict(linear=nn.Linear(48, 33))), config)
    with use_task(model, 0):
        for _ in range(3):
            model(torch.randn(32, 48)).sum().backward()
        assert calls
        taken = of_packed._taken()
        model.merge_adapter()
    assert of_packed._taken() < taken

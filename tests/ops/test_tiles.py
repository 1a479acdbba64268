# SPDX-License-Identifier: Apache-2.0
"""Are products by tiles of bf16 as near to the exact ones as those in fp32, and are they used where they should be?"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from dyads.ops.tiles import Right, Tiles, tiles_for, times
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dyads.methods import MoDEConfig, MoLoRAConfig, MoREConfig
from dyads.ops import Adapted, dyadic, fused, fused_all, untiled

of_tiles: Any = import_module("dyads.ops.tiles")


def has_the_unit() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "amx_bf16" in info.read_text().split()


pytestmark = pytest.mark.skipif(
    not has_the_unit() or os.environ.get("DYADS_TILES") == "0", reason="this processor has no unit for bf16"
)


@pytest.fixture
def ours() -> Tiles:
    found = tiles_for(torch.randn(96, 64))
    assert found is not None, "the processor can, and there is a compiler"
    return found


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """(m, k, n, …) of every call of tiles."""
    seen: list[tuple[int, ...]] = []
    right = Tiles.products

    def watched(self: Tiles, left: Tensor, rights: list[Right]) -> list[Tensor]:
        seen.append((*left.shape, *(one.matrix.shape[1] for one in rights)))
        return right(self, left, rights)

    monkeypatch.setattr(Tiles, "products", watched)
    return seen


def exact(left: Tensor, right: Right) -> Tensor:
    before = 0.0 if right.onto is None else right.onto.double()
    return before + right.scale * (left.double() @ right.matrix.double())


def bound(left: Tensor, right: Right) -> Tensor:
    """What a sum in fp32 may be wrong by: every term and every addition is rounded."""
    size = right.scale * (left.double().abs() @ right.matrix.double().abs())
    size = size if right.onto is None else size + right.onto.double().abs()
    return size * (left.shape[1] + 3) * 2.0**-24 + 1e-37


# Ones, primes, and both sides of a tile, of two, of what is multiplied at once, and of what stays near a core.
SIZES = [
    (1, 1, 1),
    (1, 7, 1),
    (3, 1, 5),
    (2, 31, 16),
    (15, 32, 17),
    (16, 33, 31),
    (31, 63, 32),
    (33, 64, 33),
    (64, 65, 96),
    (97, 383, 13),
    (32, 384, 47),
    (61, 385, 64),
    (511, 40, 3),
    (512, 769, 32),
    (513, 96, 65),
    (1031, 37, 29),
]


@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_a_product_is_as_near_to_the_exact_one_as_one_in_fp32(
    m: int, k: int, n: int, turned: tuple[bool, bool], ours: Tiles
) -> None:
    torch.manual_seed(0)
    left = torch.randn(k, m).t() if turned[0] else torch.randn(m, k)
    matrix = torch.randn(n, k).t() if turned[1] else torch.randn(k, n)
    wide = torch.randn(m, n + 5)
    rights = [Right(matrix), Right(matrix, torch.randn(m, n)), Right(matrix, wide[:, 2 : n + 2], -0.3)]
    wanted = [exact(left, right) for right in rights]
    bounds = [bound(left, right._replace(scale=abs(right.scale))) for right in rights]
    untouched = wide.clone()
    outs = ours.products(left, rights)
    for out, one, room in zip(outs, wanted, bounds, strict=True):
        assert ((out.double() - one).abs() <= room).all()
    assert outs[1] is rights[1].onto, "in place"
    assert torch.equal(wide[:, :2], untouched[:, :2])
    assert torch.equal(wide[:, n + 2 :], untouched[:, n + 2 :])
    if m * n > 1000:
        ours_is, mkl_is = ((one.double() - wanted[0]).square().mean() for one in (outs[0], left @ matrix))
        assert ours_is <= 2 * mkl_is, "and no farther on average"


@pytest.mark.parametrize("kind", ["normal", "positive", "half of them zero"])
@pytest.mark.parametrize("k", [576, 2048, 8192, 32768])
def test_a_long_sum_is_no_farther_from_the_exact_one_than_pytorch_s(k: int, kind: str, ours: Tiles) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    left, matrix = torch.randn(96, k), torch.randn(k, 64)
    if kind == "positive":
        left, matrix = left.abs(), matrix.abs()
    elif kind == "half of them zero":
        left = left.relu()
    wanted = left.double() @ matrix.double()
    error, theirs = (
        (found.double() - wanted).square().mean() for found in (ours.products(left, [Right(matrix)])[0], left @ matrix)
    )
    assert error <= 1.5 * theirs


def test_parts_of_larger_matrices_are_read_where_they_lie(ours: Tiles) -> None:
    whole, other = torch.randn(150, 90), torch.randn(90, 150)
    for left in (whole[7:130, 5:70], other[5:70, 7:130].t()):
        for matrix in (whole[3:68, 1:60], other[1:60, 3:68].t()):
            (out,) = ours.products(left, [Right(matrix)])
            assert ((out.double() - exact(left, Right(matrix))).abs() <= bound(left, Right(matrix))).all()


def test_all_bits_of_a_number_count(ours: Tiles) -> None:
    """x · 1 is x, bit for bit, as its three parts add up to it."""
    x = torch.randn(300, 64) * 10.0 ** torch.randint(-25, 25, (300, 64))
    assert torch.equal(ours.products(x, [Right(torch.eye(64))])[0], x)
    assert torch.equal(ours.products(torch.eye(64), [Right(x.t())])[0], x.t())


def test_numbers_of_all_sizes_side_by_side(ours: Tiles) -> None:
    torch.manual_seed(0)
    left, matrix = (torch.randn(64, 64) * 10.0 ** torch.randint(-15, 15, (64, 64)) for _ in range(2))
    out = ours.products(left, [Right(matrix)])[0]
    assert ((out.double() - exact(left, Right(matrix))).abs() <= bound(left, Right(matrix))).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_where_it_is(bad: float, ours: Tiles) -> None:
    left, matrix = torch.randn(70, 40), torch.randn(40, 50)
    clean = ours.products(left, [Right(matrix)])[0]
    left[33, 7] = bad
    out = ours.products(left, [Right(matrix)])[0]
    assert not out[33].isfinite().any()
    assert torch.equal(out[:33], clean[:33])
    assert torch.equal(out[34:], clean[34:])


def test_what_grows_too_large_is_not_finite(ours: Tiles) -> None:
    left, matrix = torch.full((40, 32), 3e30), torch.full((32, 40), 2e30)
    assert not ours.products(left, [Right(matrix)])[0].isfinite().any()
    largest = torch.diag(torch.full((32,), 3.39e38))
    assert torch.equal(ours.products(largest, [Right(torch.eye(32))])[0], largest)


def test_what_is_next_to_nothing_counts_as_nothing(ours: Tiles) -> None:
    left, matrix = torch.full((40, 32), 1e-39), torch.randn(32, 40)
    assert torch.equal(ours.products(left, [Right(matrix)])[0], torch.zeros(40, 40))


def test_bits_depend_on_nothing_but_a_row_and_a_column(ours: Tiles) -> None:
    """Not on how many others there are, how they lie, which are multiplied with them, or who does it."""
    left, matrix, other = torch.randn(600, 500), torch.randn(500, 90), torch.randn(500, 33)
    torch.set_num_threads(1)
    (whole,) = ours.products(left, [Right(matrix)])
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        theirs, again = ours.products(left, [Right(other), Right(matrix)])
        assert torch.equal(again, whole)
        assert torch.equal(theirs, ours.products(left, [Right(other)])[0])
        assert torch.equal(ours.products(left[100:177], [Right(matrix)])[0], whole[100:177])
        assert torch.equal(ours.products(left, [Right(matrix[:, 40:])])[0], whole[:, 40:])
        assert torch.equal(ours.products(left.t().contiguous().t(), [Right(matrix)])[0], whole)
        assert torch.equal(ours.products(left, [Right(matrix.t().contiguous().t())])[0], whole)


def test_threads_do_not_disturb_each_other(ours: Tiles) -> None:
    torch.set_num_threads(2)
    given = [(torch.randn(200, 300), torch.randn(300, 100)) for _ in range(4)]
    wanted = [ours.products(left, [Right(matrix)])[0] for left, matrix in given]
    wrong = []

    def work(which: int) -> None:
        left, matrix = given[which]
        again = (ours.products(left, [Right(matrix)])[0] for _ in range(50))
        wrong.extend(which for one in again if not torch.equal(one, wanted[which]))

    several = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for one in several:
        one.start()
    for one in several:
        one.join()
    assert wrong == []


def test_threads_share_what_is_worth_it(ours: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    products = ours._products
    monkeypatch.setattr(ours, "_products", lambda *given: (used.append(given[-1]), products(*given)))
    torch.set_num_threads(2)
    for m in (32, 512):
        ours.products(torch.randn(m, 64), [Right(torch.randn(64, 512))])
    torch.set_num_threads(1)
    ours.products(torch.randn(512, 64), [Right(torch.randn(64, 512))])
    assert used == [1, 2, 1]


def test_without_openmp_it_serves_one_thread_only(ours: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "is_parallel", False)
    for count, served in ((1, True), (2, False)):
        torch.set_num_threads(count)
        assert (tiles_for(torch.randn(96, 64)) is not None) == served


def test_others_who_use_the_unit_are_not_disturbed(ours: Tiles) -> None:
    """PyTorch's products in bf16 are computed by it too."""
    half, square = torch.randn(256, 256).bfloat16(), torch.randn(128, 128)
    before, mine = half @ half, ours.products(square, [Right(square)])[0]
    for _ in range(3):
        assert torch.equal(half @ half, before)
        assert torch.equal(ours.products(square, [Right(square)])[0], mine)


@pytest.mark.parametrize(
    ("left", "right", "said"),
    [
        (torch.randn(4, 3), Right(torch.randn(4, 3)), r"4 × 3 cannot multiply one of \(4, 3\)"),
        (torch.randn(4, 3).double(), Right(torch.randn(3, 4)), "in torch.float64"),
        (torch.randn(4, 3), Right(torch.randn(3, 4).bfloat16()), "in torch.bfloat16"),
        (torch.randn(8, 6)[::2, ::2], Right(torch.randn(3, 4)), r"with strides \(12, 2\)"),
        (torch.randn(0, 3), Right(torch.randn(3, 4)), r"got \(0, 3\)"),
        (torch.randn(4, 3), Right(torch.randn(3, 0)), r"got \(3, 0\)"),
        (torch.randn(4, 3), Right(torch.randn(3, 4, device="meta")), "on meta"),
        (torch.randn(4, 3), Right(torch.randn(3, 4), torch.randn(4, 5)), r"4 × 4 .* got \(4, 5\)"),
        (torch.randn(4, 3), Right(torch.randn(3, 4), torch.randn(4, 4).t()), "contiguous rows"),
        (torch.randn(4, 3), Right(torch.randn(3, 4), torch.randn(4, 4).double()), "in torch.float64"),
        (torch.randn(4, 3), Right(torch.randn(3, 4), torch.randn(1, 4).expand(4, 4)), r"strides \(0, 1\)"),
    ],
)
def test_what_would_be_read_or_written_elsewhere_is_refused(left: Tensor, right: Right, said: str, ours: Tiles) -> None:
    with pytest.raises(ValueError, match=said):
        ours.products(left, [right])


def test_small_matrices_and_other_kinds_are_left_to_pytorch(calls: list[tuple[int, ...]]) -> None:
    x, W = torch.randn(512, 256), torch.randn(256, 256)
    times(x, Right(W), Right(W.t()), Right(torch.randn(256, 32)), Right(torch.randn(256, 31)))
    assert calls == [(512, 256, 256, 256, 32)], "one call for all that are wide enough"
    onto = torch.randn(512, 256)
    left_alone: list[tuple[Tensor, Right]] = [
        (x[:95], Right(torch.randn(256, 2048))),  # few rows
        (x[:, :63], Right(torch.randn(63, 2048))),  # a short sum
        (x, Right(W[:, :255])),  # few columns
        (x[:255], Right(W)),  # little work
        (x.double(), Right(W.double())),
        (x.bfloat16(), Right(W.bfloat16())),
        (x, Right(torch.randn(512, 512)[::2, ::2])),
        (torch.randn(1024, 512)[::2, ::2], Right(W)),
        (torch.randn(1, 1).expand(512, 256), Right(W)),
        (x, Right(W, onto.t().contiguous().t(), 0.5)),
        (x, Right(W.as_subclass(type("Other", (Tensor,), {})))),
        (x.as_subclass(type("Other", (Tensor,), {})), Right(W)),
        (torch._neg_view(x), Right(W)),
        (x, Right(torch._neg_view(W))),
        (torch._efficientzerotensor((512, 256)), Right(W)),
        (x, Right(W, torch.zeros(512, 256).as_subclass(type("Other", (Tensor,), {})))),
    ]
    for left, right in left_alone:
        wanted = exact(left, right)
        (out,) = times(left, right)
        assert torch.allclose(out.double(), wanted, atol=0.5 if out.dtype == torch.bfloat16 else 1e-3)
    assert len(calls) == 1


@pytest.mark.parametrize("what", ["off", "watched", "inexact", "forward AD", "vmap", "traced"])
def test_where_somebody_looks_on_or_asks_for_it_pytorch_serves(what: str) -> None:
    x, asked = torch.randn(96, 64), []
    assert tiles_for(x) is not None
    if what == "off":
        with untiled():
            asked.append(tiles_for(x))
    elif what == "watched":
        with TorchDispatchMode():
            asked.append(tiles_for(x))
    elif what == "inexact":
        torch.set_float32_matmul_precision("medium")
        try:
            asked.append(tiles_for(x))
        finally:
            torch.set_float32_matmul_precision("highest")
    elif what == "forward AD":
        with forward_ad.dual_level():
            asked.append(tiles_for(x))
    elif what == "vmap":
        torch.func.vmap(lambda one: asked.append(tiles_for(x)) or one)(x)
    else:
        torch.jit.trace(lambda one: asked.append(tiles_for(x)) or one + 1, x, check_trace=False)
    assert asked == [None]
    assert tiles_for(x) is not None


METHODS = [MoDEConfig(r=8, num_experts=9), MoLoRAConfig(r=13, num_experts=5), MoREConfig(r=70, num_tasks=3)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", METHODS, ids=lambda config: type(config).__name__)
def test_the_operator_agrees_with_the_plain_one(config: Any, bias: bool, calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    core = config.core(257).requires_grad_()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    task = torch.tensor([0, 2, 1]) if isinstance(config, MoREConfig) else None
    x, A, B = torch.randn(3, 89, 257), torch.randn(core.p, 257) / 16, torch.randn(core.q, 290) / 16
    base = torch.randn(290, 257) / 16, torch.randn(290) if bias else None
    dy = torch.randn(3, 89, 290)

    def all_of_it(dtype: torch.dtype, operator: Any) -> list[Tensor]:
        core.to(dtype)
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, A, B)]
        frozen = base[0].to(dtype), None if base[1] is None else base[1].to(dtype)
        y = operator(*leaves, core, task, scale=0.7, base=frozen)
        trained = list(core.parameters())
        return [y, *torch.autograd.grad(y, [*leaves, *trained], dy.to(dtype), allow_unused=True)]

    wanted = all_of_it(torch.float64, dyadic)
    assert not calls
    found = all_of_it(torch.float32, fused)
    assert len(calls) >= 2, "forward and backward"
    with untiled():
        plain = all_of_it(torch.float32, fused)
    for ours, theirs, one in zip(found, plain, wanted, strict=True):
        if one is None:
            assert ours is None
            continue
        size = one.abs().max()
        assert (ours.double() - one).abs().max() <= 2e-5 * size
        assert (ours - theirs).abs().max() <= 2e-5 * size
    seen = len(calls)
    with torch.no_grad():
        y = fused(x, A, B, core, task, scale=0.7, base=base)
    assert len(calls) > seen
    assert (y.double() - wanted[0]).abs().max() <= 3e-6 * wanted[0].abs().max()


def test_layers_that_see_the_same_input_are_multiplied_in_one_call(calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    cores: Any = [MoDEConfig(r=8, num_experts=9).core(256) for _ in range(3)]
    for core in cores:
        core.reset_parameters()
    x = torch.randn(3, 100, 256, requires_grad=True) * 1.0
    layers = [
        Adapted(torch.randn(8, 256), torch.randn(72, o), core, None, 1.0, (torch.randn(o, 256), None))
        for core, o in zip(cores, (800, 320, 900), strict=True)
    ]
    ys = fused_all(x, layers)
    rows = 3 * (8 + 72)
    assert calls == [(300, 256, rows, 800, 320, 900), (300, 72, 800), (300, 72, 900)]
    calls.clear()
    torch.autograd.grad(ys, x, [torch.ones(3, 100, 1).expand_as(y) * 1.0 for y in ys])
    with_gates = [(300, o, 72, 256) for o in (800, 320, 900)]
    assert [call for call in calls if call[0] == 300] == [*with_gates, (300, rows, 256)]
    alone = [fused(x, *layer[:4], scale=layer.scale, base=layer.base) for layer in layers]
    assert all(torch.equal(one, other) for one, other in zip(ys, alone, strict=True)), "the same bits"


def in_a_process_of_its_own(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


ASK = """
import torch
from dyads.ops.tiles import Right, tiles_for, times
x = torch.ones(512, 256)
print(tiles_for(x) is None, times(x, Right(x.t()))[0].unique())
"""


@pytest.mark.parametrize("environment", [{"DYADS_TILES": "0"}, {"CC": "no-such-compiler"}, {"CC": "false"}], ids=str)
def test_without_tiles_pytorch_serves(environment: dict[str, str], tmp_path: Path) -> None:
    told = in_a_process_of_its_own(ASK, **environment, DYADS_CACHE=str(tmp_path))
    assert told == "True tensor([256.])"


def test_a_small_stack_is_enough() -> None:
    told = in_a_process_of_its_own(
        """
import threading, torch
from dyads.ops.tiles import Right, tiles_for, times
torch.set_num_threads(2)
x = torch.ones(512, 256)
found = []
tiles_for(x)
threading.stack_size(64 * 1024)
one = threading.Thread(target=lambda: found.extend(times(x, Right(x.t()))))
one.start()
one.join()
print(tiles_for(x) is None, found[0].unique())
""",
        OMP_STACKSIZE="64k",
    )
    assert told == "False tensor([256.])"


def test_a_library_without_tiles_says_so(tmp_path: Path) -> None:
    """As on a processor that has none."""
    subprocess.run(
        [
            "cc",
            "-march=native",
            "-mno-amx-bf16",
            "-shared",
            "-fPIC",
            str(of_tiles._SOURCE),
            "-o",
            f"{tmp_path}/none.so",
        ],
        check=True,
    )
    assert ctypes.CDLL(f"{tmp_path}/none.so").tiles_ready() == 0

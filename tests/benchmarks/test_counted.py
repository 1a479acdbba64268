# SPDX-License-Identifier: Apache-2.0
"""Tests of the launch and byte counter, on sequences of operations with known sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from benchmarks.counted import (
    BUDGET,
    COUNTED,
    Launch,
    LaunchCounter,
    as_in_training,
    build,
    calls_in,
    count,
    measure,
    resolved,
    size,
    trained,
)


def launches_of(width: int = 64, name: str = "mode-8x4", *, in_fp32: bool = True) -> list[Launch]:
    contender = resolved(COUNTED[name], trained(build(COUNTED[BUDGET], width=width)), width)
    x = torch.empty(2, 3, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    return count(build(contender, width=width, in_fp32=in_fp32), x)


def test_bytes_of_a_handmade_sequence() -> None:
    x, W = torch.empty(5, 4, device="meta"), torch.empty(4, 3, device="meta")
    half, out = torch.empty(3, dtype=torch.bfloat16, device="meta"), torch.empty(5, 3, device="meta")
    with LaunchCounter() as counter:
        y = x @ W
        y.add_(half)
        y += torch.empty(5, 1, device="meta").expand(5, 3)
        out.copy_(y)
        torch.mul(y, y, out=out)
        y.to(torch.float64)
    assert counter.launches == [
        Launch("mm", 4 * (20 + 12), 4 * 15),
        Launch("add_", 4 * 15 + 2 * 3, 4 * 15),
        Launch("add_", 4 * (15 + 5), 4 * 15),  # expanded: one element a row
        Launch("copy_", 4 * 15, 4 * 15),  # overwritten, not read
        Launch("mul", 4 * 2 * 15, 4 * 15),
        Launch("_to_copy", 4 * 15, 8 * 15),
    ]


def test_views_and_allocations_are_no_launches() -> None:
    x = torch.empty(6, 4, device="meta")
    with LaunchCounter() as counter:
        x.t().reshape(2, 2, 6).permute(2, 0, 1)[1:].unsqueeze(0).detach().split(1, 1)
        x.view(24).unflatten(0, (3, 8)).expand(2, 3, 8).narrow(0, 0, 1)
        torch.ops.aten._unsafe_view(x, (24,))
        x.new_empty(3), torch.empty_like(x), torch.empty(2, device="meta")
        x.contiguous(), x.to(torch.float32)
    assert counter.launches == []
    with LaunchCounter() as counter:
        x.t().contiguous(), x.expand(2, 6, 4).reshape(48)
    assert [(one.name, one.moved) for one in counter.launches] == [("clone", 2 * 96), ("clone", 96 + 2 * 96)]


def test_the_size_of_a_tensor_is_that_of_its_distinct_elements() -> None:
    x = torch.empty(3, 1, dtype=torch.bfloat16)
    assert size(x) == size(x.expand(3, 7)) == size(x.expand(9, 3, 1)) == 6
    assert size(x[:2]) == 4
    assert size(x[:0]) == size(torch.empty(0, 3)) == size(x[:0].expand(5, 0, 1)) == 0


def test_counts_do_not_change_from_one_run_to_the_next() -> None:
    first = launches_of()
    assert first == launches_of()
    assert len(first) == len(launches_of(width=128))  # only bytes depend on the size


def test_a_lora_layer_launches_what_its_definition_says() -> None:
    names = Counter(launch.name for launch in launches_of(name="lora", in_fp32=False))
    # base, A and B forward; base backward, and two for each of A and B. Scale and sum forward and backward; the loss.
    assert names == {"mm": 8, "mul": 2, "add": 2, "ones_like": 1}
    names = Counter(launch.name for launch in launches_of(name="lora"))
    assert names == {"mm": 8, "mul": 2, "add": 2, "ones_like": 1, "_to_copy": 5}


def test_operators_are_counted_on_the_path_of_training() -> None:
    with LaunchCounter():
        assert torch._C._len_torch_dispatch_stack() == 1
        with as_in_training():
            assert torch._C._len_torch_dispatch_stack() == 0
        assert torch._C._len_torch_dispatch_stack() == 1
    assert "addmm_" in {launch.name for launch in launches_of()}  # the sum is written over the frozen layer's output


def test_contenders_get_the_parameters_of_the_budget() -> None:
    budget = trained(build(COUNTED[BUDGET], width=64))
    assert budget == 64 * (4 + 32 + 32)
    assert resolved(COUNTED["lora"], budget, 64).options["r"] == 34
    assert resolved(COUNTED["mode-8x4"], budget, 64) == COUNTED["mode-8x4"]
    assert resolved(COUNTED["smora"], budget, 64).options["r"] >= 8  # top_k needs as many ranks


def test_every_contender_is_counted_in_both_dtypes() -> None:
    found = measure(width=32, length=2, compiled=False)
    assert found["errors"] == {}
    assert set(found["facts"]) == {f"{name}{dtype}" for name in COUNTED for dtype in ("", "-bf16")}
    ours, theirs = found["facts"]["mode-8x4"], found["facts"]["lora"]
    assert ours["parameters"] == theirs["parameters"]
    assert sum(ours["operations"].values()) == ours["launches"]


def test_a_contender_that_cannot_run_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(COUNTED["lora"], builder="lorra", options={"r": 2}, solve=None)
    monkeypatch.setattr("benchmarks.counted.COUNTED", {"mode-8x4": COUNTED["mode-8x4"], "broken": broken})
    found = measure(width=32, length=2, compiled=False)
    assert "lorra" in found["errors"]["broken"]
    assert "mode-8x4" in found["facts"]


def test_calls_in_the_code_of_inductor() -> None:
    code = """
cpp_fused_add_0 = async_compile.cpp_pybinding(['const bfloat16*'], '''
    extern "C" void kernel(const bfloat16* in_ptr0)
''')
def call(args):
    buf0 = empty_strided_cpu((4, 4), (4, 1), torch.bfloat16)
    extern_kernels.mm(arg0, arg1, out=buf0)
    cpp_fused_add_0(buf0, buf1)
    buf3 = torch.ops.aten.topk.default(buf0, 2)
    buf4 = buf3[0]
    del buf0
"""
    assert calls_in(code) == 3

# SPDX-License-Identifier: Apache-2.0
"""Are the compiled gates those of PyTorch's operations, at every size, and does the library do without them?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from dyads.methods import Core, MoDEConfig, MoLoRAConfig
from dyads.methods.gates import (
    combine_experts,
    combine_groups,
    select_softmax,
    softmax_expert_gradients,
    softmax_group_gradients,
)
from dyads.methods.mode import MoDE
from dyads.ops import Choice, Kernel, dyadic, fused, kernel, without_kernel

of_kernel: Any = import_module("dyads.ops.kernel")
of_compile: Any = import_module("dyads.ops.compile")

# Ones, primes, and both sides of what the kernel takes at once: 16 numbers, 128 tokens.
TOKENS = [1, 2, 15, 16, 17, 31, 127, 128, 129, 257]
CHOICES = [
    Choice(1, 2, 1),
    Choice(3, 5, 1),
    Choice(4, 16, 1, temperature=0.5),
    Choice(2, 3, 5),
    Choice(1, 7, 11, temperature=3.0),
    Choice(1, 2, 1, own=True),
    Choice(1, 5, 3, own=True),
    Choice(1, 17, 2, own=True, temperature=0.7),
    Choice(1, 682, 1),
]


def compiled(z: Tensor, choice: Choice) -> Kernel:
    """The kernel; where there is a compiler it must be there."""
    found = kernel(z, choice)
    if found is None:
        if os.environ.get("DYADS_KERNEL") == "0" or sys.platform == "win32" or not shutil.which("cc"):
            pytest.skip("no C compiler here")
        try:
            with tempfile.TemporaryDirectory() as folder:
                of_compile._compiled(of_kernel._SOURCES[0], ["cc"], (), folder)
        except subprocess.CalledProcessError as failed:
            pytest.fail(failed.stderr)
        pytest.fail("it compiles and loads, and does not serve")
    return found


def by_torch(z: Tensor, du: Tensor, choice: Choice, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates, u, and the gradients of h and the scores, all (tokens …), as the methods compute them; in fp32."""
    h, scores = z[:, : choice.p].float(), z[:, choice.p :].float() / choice.temperature
    g = select_softmax(scores if choice.own else scores.reshape(len(z), choice.groups, choice.experts))
    g = g.to(z.dtype).float()
    combine = combine_experts if choice.own else combine_groups
    gradients = softmax_expert_gradients if choice.own else softmax_group_gradients
    dh, ds = gradients(h, g, du.float() * scale)
    return g.reshape(len(z), -1), combine(h, g), dh, ds / choice.temperature


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_and_gradients_are_those_of_the_methods(choice: Choice, tokens: int, dtype: torch.dtype) -> None:
    p = choice.p
    z, du = (5 * torch.randn(tokens, p + choice.s)).to(dtype), torch.randn(tokens, choice.q).to(dtype)
    found, before = compiled(z, choice), z.clone()
    g, u, dh, ds = by_torch(z, du, choice, 0.3)
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2e-2}
    ours = found.mix(z, choice)
    assert_close(z[:, :p], before[:, :p], atol=0, rtol=0)
    assert_close(z[:, p:].float(), g, **tolerance)
    assert_close(ours.float(), u, **tolerance)
    u_again, dz = found.gradients(z, du, choice, 0.3)
    assert_close(u_again, ours.t(), atol=0, rtol=0)
    assert_close(dz[:p].t().float(), dh, atol=4 * tolerance["atol"], rtol=tolerance["rtol"])
    assert_close(dz[p:].t().float(), ds, atol=10 * tolerance["atol"], rtol=tolerance["rtol"])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_outside_of_the_matrices(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = Choice(2, 3, 2)

    def fenced(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        memory = torch.full((rows * columns + 64,), 7.0, dtype=dtype)
        return memory, memory[32:-32].view(rows, columns)

    made: list[Tensor] = []

    def empty(like: Tensor, *size: int) -> Tensor:
        memory, inside = fenced(*size)
        made.append(memory)
        return inside

    memory, z = fenced(tokens, choice.p + choice.s)
    z.normal_()
    found, du = compiled(z, choice), torch.randn(tokens, choice.q).to(dtype)
    monkeypatch.setattr(Tensor, "new_empty", empty)
    found.mix(z, choice)
    found.gradients(z, du, choice)
    monkeypatch.undo()
    assert len(made) == 3
    for fence in (memory, *made):
        assert (fence[:32] == 7).all()
        assert (fence[-32:] == 7).all()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_wider_matrices_are_served_and_their_neighbours_left_alone(tokens: int, dtype: torch.dtype) -> None:
    choice = Choice(2, 3, 2)
    p, rows = choice.p, choice.p + choice.s
    wide, wide_dz = torch.randn(tokens, rows + 9).to(dtype), torch.full((rows + 5, tokens), 7.0, dtype=dtype)
    before, part, du = wide.clone(), wide[:, 4 : 4 + rows], torch.randn(tokens, choice.q).to(dtype)
    alone = part.clone()
    found = compiled(alone, choice)
    assert_close(found.mix(part, choice), found.mix(alone, choice), atol=0, rtol=0)
    assert_close(part, alone, atol=0, rtol=0)
    assert_close(wide[:, : 4 + p], before[:, : 4 + p], atol=0, rtol=0)
    assert_close(wide[:, 4 + rows :], before[:, 4 + rows :], atol=0, rtol=0)
    u, dz = found.gradients(part, du, choice, 0.3, wide_dz[2 : 2 + rows])
    wanted_u, wanted_dz = found.gradients(alone, du, choice, 0.3)
    assert_close(u, wanted_u, atol=0, rtol=0)
    assert_close(wide_dz[2 : 2 + rows], wanted_dz, atol=0, rtol=0)
    assert dz.data_ptr() == wide_dz[2].data_ptr()
    assert (wide_dz[:2] == 7).all()
    assert (wide_dz[2 + rows :] == 7).all()


def test_a_token_is_the_same_in_whatever_company_and_on_any_number_of_threads() -> None:
    choice = Choice(2, 5, 3)
    z, du = torch.randn(700, choice.p + choice.s), torch.randn(700, choice.q)
    found, threads = compiled(z, choice), torch.get_num_threads()

    def results(z: Tensor, du: Tensor) -> list[Tensor]:
        u = found.mix(z, choice)
        u_again, dz = found.gradients(z, du, choice)
        return [u, z, u_again.t(), dz.t()]

    every = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            every.append(results(z.clone(), du))
    finally:
        torch.set_num_threads(threads)
    assert_close(every[1], every[0], atol=0, rtol=0)
    assert_close(every[2], every[0], atol=0, rtol=0)
    assert_close(results(z[301:440].clone(), du[301:440]), [t[301:440] for t in every[0]], atol=0, rtol=0)


def test_scores_of_any_size_choose_as_softmax_does() -> None:
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor(
        [[0, 0, 0], [1e38, 0, -1e38], [-3e38, -3e38, -3e38], [-inf, 1, 2], [inf, 1, 2], [nan, 1, 2], [1, 2, nan],
         [-inf, -inf, -inf], [-86.9, 0, -87.1], [-103, 0, -1e-45]]
    )  # fmt: skip
    z, choice = torch.cat((torch.ones(len(scores), 1), scores), 1), Choice(1, 3, 1)
    u = compiled(z, choice).mix(z, choice)
    assert_close(z[:, 1:], scores.softmax(-1), equal_nan=True, atol=1e-37, rtol=1e-6)
    assert_close(u, scores.softmax(-1), equal_nan=True, atol=1e-37, rtol=1e-6)


def test_half_precision_is_rounded_as_pytorch_rounds() -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)  # every bf16 number, as h of one expert with gate 1/2
    h = bits.view(torch.bfloat16)
    z = torch.stack((h, torch.zeros_like(h), torch.zeros_like(h)), 1)
    choice = Choice(1, 2, 1)
    u = compiled(z, choice).mix(z, choice)
    assert_close(u[:, 0], h * torch.tensor(0.5, dtype=torch.bfloat16), equal_nan=True, atol=0, rtol=0)


CONFIGS = [
    MoDEConfig(r=4, num_experts=3),
    MoDEConfig(r=6, num_experts=2, group_size=3, temperature=0.5),
    MoLoRAConfig(r=3, num_experts=5),
    MoLoRAConfig(r=4, num_experts=3, shared_down=True),
]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernel's functions as they are called."""
    seen: list[str] = []

    def watched(name: str) -> Any:
        inner = getattr(Kernel, name)

        def call(self: Kernel, *args: Any) -> Any:
            seen.append(name)
            return inner(self, *args)

        return call

    for name in ("mix", "gradients"):
        monkeypatch.setattr(Kernel, name, watched(name))
    return seen


def layer(core: Core, dtype: torch.dtype, t: int = 67, d: int = 96, o: int = 31) -> list[Tensor]:
    """x with many tokens, A and B in fp32, a frozen weight."""
    return [
        torch.randn(5, t, d).to(dtype),
        torch.randn(core.p, d) * d**-0.5,
        torch.randn(core.q, o),
        torch.randn(o, d).to(dtype),
    ]


def step(core: Core, operator: Any, x: Tensor, A: Tensor, B: Tensor, weight: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, A, B)]
    core.zero_grad()
    y = operator(*leaves, core, scale=0.3, base=(weight, None))
    torch.nn.functional.silu(y.float()).sum().backward()
    return [y.detach(), *(t.grad for t in (*leaves, *core.parameters()))]  # type: ignore[misc]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.key}-{c.r}-{c.num_experts}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_train_alike_with_the_kernel_without_it_and_by_the_double_sum(
    config: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = config.core(96)
    core.reset_parameters()
    torch.nn.init.normal_(core.router, std=0.3)
    tensors = layer(core, dtype)
    compiled(tensors[0].new_zeros(2, 2), core.choice())
    seen = calls(monkeypatch)
    ours = step(core, fused, *tensors)
    assert seen == ["mix", "gradients"]
    with without_kernel():
        others = [step(core, fused, *tensors), step(core, dyadic, *tensors)]
    assert seen == ["mix", "gradients"]
    for theirs in others:
        for one, other in zip(ours, theirs, strict=True):
            size = other.abs().max()
            assert one.dtype == other.dtype
            assert_close(one / size, other / size, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=0)


class _Doubled(MoDE):
    keeps_gates = True

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return 2 * super().mix(h, g)

    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        return super().gradients(h, g, 2 * du)


class _Mixin:
    keeps_gates = True

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return 2 * super().mix(h, g)  # type: ignore[misc]

    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        return super().gradients(h, g, 2 * du)  # type: ignore[misc]


class _Mixed(_Mixin, MoDE):
    pass


class _Shifted(MoDE):
    def _scores(self, like: Tensor, scores: Tensor | None, of_task: Tensor | None) -> Tensor:
        scores = super()._scores(like, scores, of_task)
        return scores + torch.arange(scores.shape[-1], dtype=scores.dtype)


@pytest.mark.parametrize("cls", [_Doubled, _Mixed, _Shifted])
def test_gates_that_a_method_writes_itself_are_not_taken_for_those_it_inherits(
    cls: type[MoDE], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = cls(96, 4, 3, 1)
    core.reset_parameters()
    assert MoDE(96, 4, 3, 1).choice() == Choice(4, 3, 1)
    assert core.choice() is None
    seen, tensors = calls(monkeypatch), layer(core, torch.float32)
    for ours, theirs in zip(step(core, fused, *tensors), step(core, dyadic, *tensors), strict=True):
        assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), atol=1e-5, rtol=0)
    assert not seen


def test_another_temperature_counts_at_once() -> None:
    core: Any = MoDEConfig(r=4, num_experts=3).core(96)
    core.stages = replace(core.stages, temperature=0.25)
    assert core.choice() == Choice(4, 3, 1, temperature=0.25)


def test_what_does_not_fit_is_refused_before_memory_is_touched() -> None:
    choice = Choice(2, 3, 1)
    z, du = torch.randn(5, 8), torch.randn(5, 6)
    found = compiled(z, choice)
    with pytest.raises(ValueError, match=r"matrix of 5 × 8 in torch.float32 whose rows are contiguous, got \(5, 7\)"):
        found.mix(z[:, :7].contiguous(), choice)
    with pytest.raises(ValueError, match=r"got \(5, 8\) with strides \(1, 5\)"):
        found.mix(z.t().contiguous().t(), choice)
    for wrong in (du.double(), du[:4], du.t().contiguous().t()):
        with pytest.raises(ValueError, match="the kernel takes a matrix of 5 × 6"):
            found.gradients(z, wrong, choice)
    for wrong in (torch.empty(8, 4), torch.empty(8, 5).double(), torch.empty(5, 8).t()):
        with pytest.raises(ValueError, match=r"writes a contiguous matrix of 8 × 5 in torch\.float32"):
            found.gradients(z, du, choice, 1.0, wrong)
    with pytest.raises(ValueError, match="the kernel takes a contiguous du"):
        found.gradients(z, torch.randn(5, 7)[:, :6], choice)
    core = MoDEConfig(r=4, num_experts=3).core(8)
    x, A, B = torch.randn(2, 8), torch.randn(3, 8, requires_grad=True), torch.randn(12, 5)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        fused(x, A, B, core)  # three rows where the core has four


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_forward", [True, False])
def test_a_checkpoint_that_is_watched_in_one_pass_only_is_refused(in_forward: bool) -> None:
    core = MoDEConfig(r=4, num_experts=3).core(96)
    core.reset_parameters()
    x, A, B, weight = layer(core, torch.float32)
    x, A = x.flatten(0, 1).repeat(20, 1).requires_grad_(), A.requires_grad_()
    compiled(torch.zeros(2, 2), Choice(1, 1, 1))

    def run(x: Tensor) -> Tensor:
        return fused(x, A, B, core, base=(weight, None))

    with _Watch() if in_forward else nullcontext():
        y = checkpoint(run, x, use_reentrant=False)
    with nullcontext() if in_forward else _Watch(), pytest.raises(CheckpointError):
        y.sum().backward()


_SERVED = """
import torch, warnings
from pathlib import Path
warnings.simplefilter("error")
from dyads.ops import Choice, kernel
z = torch.randn(50, 9)
found = kernel(z, Choice(1, 8, 1))
if found is not None:
    assert found.mix(z.clone(), Choice(1, 8, 1)).isfinite().all()
loaded = Path("/proc/self/maps").read_text().splitlines()
flags = "no" if found is None else ",".join(found.flags)
print(flags or "none", sum("libgomp" in line and "r-xp" in line for line in loaded))
"""


def served(**environment: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", _SERVED], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer, runtimes = done.stdout.split()
    return answer, int(runtimes)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_where_no_compiler_serves_pytorch_does(tmp_path: Path) -> None:
    script = '#!/bin/sh\nfor flag; do case $flag in {refused}) echo no >&2; exit 1;; esac; done\nexec cc "$@"\n'
    for name, refused in (("without-openmp", "-fopenmp"), ("broken", "*")):
        (tmp_path / name).write_text(script.format(refused=refused))
        (tmp_path / name).chmod(0o755)
    compiled(torch.zeros(2, 2), Choice(1, 2, 1))
    flags, runtimes = served()
    assert runtimes == 1  # one OpenMP: PyTorch's
    version = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=True).stdout
    if "Free Software Foundation" in version:
        assert "-fopenmp" in flags
    assert "-fopenmp" not in served(CC=str(tmp_path / "without-openmp"))[0]
    nothing = {"DYADS_KERNEL": "0"}, {"CC": str(tmp_path / "none")}, {"CC": str(tmp_path / "broken")}, {"CC": "cc -D'"}
    for environment in nothing:
        assert served(**environment)[0] == "no"
    assert served(CC=" ")[0] == flags
    assert served(CC="cc -fvisibility=hidden")[0] == flags


def test_the_kernel_serves_plain_cpu_tensors_in_fp32_and_bf16_only() -> None:
    choice = Choice(1, 3, 1)
    compiled(torch.zeros(2, 2), choice)
    assert kernel(torch.zeros(2, 2, dtype=torch.bfloat16), choice) is not None
    assert kernel(torch.zeros(2, 2), Choice(1, 683, 1)) is None  # 2,050 numbers of a token
    assert kernel(torch.zeros(2, 2), None) is None
    assert kernel(torch.nn.Parameter(torch.zeros(2, 2)), choice) is None
    assert kernel(torch.zeros(2, 2, device="meta"), choice) is None
    for dtype in (torch.float64, torch.float16):
        assert kernel(torch.zeros(2, 2, dtype=dtype), choice) is None
    with without_kernel():
        assert kernel(torch.zeros(2, 2), choice) is None

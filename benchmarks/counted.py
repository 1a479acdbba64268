# SPDX-License-Identifier: Apache-2.0
"""Counter of one adapted layer: operations launched and bytes moved, forward and backward, without a GPU.

The layer runs on PyTorch's meta device, which has shapes and dtypes but no numbers. A TorchDispatchMode sees every
operation that reaches the dispatcher, and records what a kernel for it has to read and write. What counts:

- A *launch* is an operation that reads or writes the elements of a tensor. Views and reshapes (every result shares the
  storage of an argument, none is written), allocations (`empty` and its like) and operations without a tensor are none.
- *Bytes read* are the elements of every tensor argument, *bytes written* those of every result and of every argument
  that is changed in place. An axis of stride 0 (`expand`) counts as one element. An argument that is only overwritten
  (`out=`, `copy_`, `fill_`, `zero_`) is not read. Caches are not modelled: what is read twice counts twice.
- The frozen layer's two products (forward, and backward for the gradient of x) count for every contender alike.
- The loss counts as one launch for every contender: it reads the output y and writes the gradient for y.
- The input wants a gradient, as in every layer but the first. One step runs before the counted one.

The layer is a frozen bf16 linear map of 4,096 × 4,096, its input 8 × 1,024 tokens. The adapter is in fp32 (PEFT's
default) or in bf16. Sizes are solved so that contenders train as many parameters as MoDE 8x4.

Operations that work in place only where no TorchDispatchMode is active are counted as in training, where none is: see
`as_in_training`.

Under `torch.compile` the calls in the code that Inductor generates are counted: kernels of its own and those of
libraries (`mm`). It generates that code for a CPU, at a small size, as it needs the target device and a C++ compiler;
for a GPU it may fuse otherwise. The loss is not in that count.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.contenders import TASKS, Contender

WIDTH, BATCH, LENGTH = 4096, 8, 1024
REFERENCE, BUDGET = "lora", "mode-8x4"
COMPILED = ("lora", "mode-8x4", "mode-grouped", "molora", "molora-sd")
"""Contenders that are counted under torch.compile too; it takes seconds for each."""
COMPILED_SIZE = (256, 8, 64)
"""Width, batch and length there: numbers of a size that a CPU computes in no time."""
LARGEST = 64
"""The largest r or num_experts that is tried to meet the budget."""

COUNTED = {
    "lora": Contender("PEFT LoRA, equal parameters", "lora", solve="r"),
    "mode-8x4": Contender("MoDE 8x4", "mode", {"r": 4, "num_experts": 8}),
    "mode-grouped": Contender("MoDE, rank 8 in groups of 4", "mode", {"r": 8, "group_size": 4}, solve="num_experts"),
    "molora": Contender("MoLORA, 4 experts", "molora", {"num_experts": 4}, solve="r"),
    "molora-sd": Contender(
        "MoLORA-SD (HydraLoRA), 4 experts", "molora", {"num_experts": 4, "shared_down": True}, solve="r"
    ),
    "more": Contender("MoRE, a batch of 8 tasks", "more", {"num_tasks": TASKS}, solve="r", tasks="mixed"),
    "moelora": Contender(
        "MOELoRA, 4 experts", "moelora", {"r": 32, "num_experts": 4, "num_tasks": TASKS}, tasks="mixed"
    ),
    "mtl-lora": Contender("MTL-LoRA, 3 up-projections", "mtl_lora", {"num_tasks": TASKS}, solve="r", tasks="mixed"),
    "smora": Contender("SMoRA, 8 ranks a token", "smora", {"top_k": 8}, solve="r"),
    "poly-ours": Contender("Poly, 8 skills", "poly", {"num_experts": 8, "num_tasks": TASKS}, solve="r", tasks="mixed"),
    "task-mode": Contender(
        "TaskMoDE of rank 4", "task_mode", {"r": 4, "num_tasks": TASKS}, solve="num_experts", tasks="mixed"
    ),
    "poly": Contender("PEFT Poly, 8 skills", "peft-poly", {"n_skills": 8}, solve="r", tasks="mixed"),
    "mhr": Contender(
        "PEFT MHR, 8 skills, 8 heads", "peft-poly", {"n_skills": 8, "n_splits": 8}, solve="r", tasks="mixed"
    ),
}
"""X-LoRA is no single layer: its gates come from a pass through the whole model. Arrow trains nothing."""

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_CALL = re.compile(r"^ +(?:\w+ = )?(?:cpp_\w+|extern_kernels\.\w+|torch\.ops\.aten\.[\w.]+)\(", re.MULTILINE)
_OVERWRITES = {"copy_", "fill_", "zero_"}


@dataclass(frozen=True)
class Launch:
    """One operation and the bytes that a kernel for it reads and writes."""

    name: str
    read: int
    written: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


class LaunchCounter(TorchDispatchMode):
    """Records every launch while it is active, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (launch := _launch(func, args, kwargs, result)) is not None:
            self.launches.append(launch)
        return result


def _launch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Launch | None:
    name = func.overloadpacket.__name__
    if name in _ALLOCATIONS:
        return None
    read: list[Tensor] = []
    changed: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            changed += tensors
        if not (argument.is_out or (writes and name in _OVERWRITES)):
            read += tensors
    owned = {_storage(t) for t in [*read, *changed]}
    new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _storage(leaf) not in owned]
    if not changed and not new:
        return None  # a view, or no tensor at all; also what reads a number, which no meta tensor can give
    return Launch(name, sum(map(size, read)), sum(map(size, [*changed, *new])))


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def size(t: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: an axis of stride 0 has one."""
    elements = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        elements *= length if stride else min(length, 1)
    return elements * t.element_size()


@contextmanager
def as_in_training() -> Iterator[None]:
    """Within this context operators take the path of training: the counting mode is not reported to them.

    They ask PyTorch how many dispatch modes are active, and keep out of place what a mode might hold on to.
    """
    with mock.patch.object(torch._C, "_len_torch_dispatch_stack", return_value=0):
        yield


@contextmanager
def unvalidated() -> Iterator[None]:
    """Within this context torch.distributions does not check its arguments, which takes numbers (PEFT's Poly)."""
    checked = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(checked)


# --- layers -----------------------------------------------------------------------------------------------------------


class _OneLinear(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin(x)
        return y


def build(contender: Contender, *, width: int = WIDTH, in_fp32: bool = True, device: str = "meta") -> Any:
    """One frozen bf16 linear layer with the contender's adapter."""
    from peft import LoraConfig, PolyConfig, get_peft_model

    import dyads.tuner  # noqa: F401  # PEFT has to know the methods
    from dyads.methods import build_config

    options = {**contender.options, "target_modules": ["lin"]}
    with torch.device(device):
        if contender.builder == "lora":
            config: Any = LoraConfig(**options, lora_alpha=options["r"])
        elif contender.builder == "peft-poly":
            config = PolyConfig(**options, n_tasks=TASKS)
        else:
            config = build_config(contender.builder, options)
        model = get_peft_model(_OneLinear(width).to(torch.bfloat16), config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT leaves the dtype of meta tensors alone
            parameter.data = parameter.data.to(torch.float32 if in_fp32 else torch.bfloat16)
    return model.train()


def trained(model: Any) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def resolved(contender: Contender, budget: int, width: int = WIDTH) -> Contender:
    """The contender with r or num_experts set to come closest to the budget of trainable parameters."""
    from dyads.errors import ConfigError

    if contender.solve is None:
        return contender
    found: dict[int, Contender] = {}
    for value in range(1, LARGEST + 1):
        candidate = replace(contender, options={**contender.options, contender.solve: value})
        try:
            parameters = trained(build(candidate, width=width))
        except (ConfigError, ValueError):
            continue  # not every value is allowed: top_k needs as many ranks, heads and groups divide them
        found.setdefault(abs(parameters - budget), candidate)
        if parameters > budget:
            break
    return found[min(found)]


# --- counting ---------------------------------------------------------------------------------------------------------


def count(model: Any, x: Tensor, **inputs: Any) -> list[Launch]:
    """The launches of one forward and backward pass, the loss included."""

    def step() -> None:
        y = model.base_model(x, **inputs)
        y.backward(torch.ones_like(y))
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None

    with unvalidated():
        step()
        with as_in_training(), LaunchCounter() as counter:
            step()
    return counter.launches


def compiled_calls(contender: Contender, *, in_fp32: bool) -> int:
    """Kernel calls in Inductor's code for one forward and backward pass of a small layer on a CPU."""
    from torch._inductor.utils import run_and_get_code

    width, batch, length = COMPILED_SIZE
    torch._dynamo.reset()
    model = build(contender, width=width, in_fp32=in_fp32, device="cpu")
    x = torch.randn(batch, length, width, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(model.base_model, fullgraph=True, dynamic=False)

    def step() -> None:
        compiled(x).backward(torch.ones_like(x))

    with warnings.catch_warnings(), torch._inductor.config.patch(force_disable_caches=True):
        warnings.simplefilter("ignore")
        _, codes = run_and_get_code(step)
    return sum(map(calls_in, codes))


def calls_in(code: str) -> int:
    """Kernel calls in a wrapper that Inductor generated: its own kernels for a CPU, and those of libraries."""
    return len(_CALL.findall(code))


def inputs_of(contender: Contender, device: str = "meta") -> dict[str, Tensor]:
    """The tasks of a batch, in the keyword of the contender's library."""
    if contender.tasks == "none":
        return {}
    # PEFT's Poly reads the largest task id, so its ids are numbers, on the CPU.
    theirs = contender.builder == "peft-poly"
    tasks = torch.arange(BATCH, device="cpu" if theirs else device) % TASKS
    return {"task_ids" if theirs else "task": tasks}


def facts_of(
    name: str, contender: Contender, *, width: int, length: int, in_fp32: bool, compiled: bool
) -> dict[str, Any]:
    """Launches, bytes and the names of the operations of a contender with its solved size."""
    model = build(contender, width=width, in_fp32=in_fp32)
    x = torch.empty(BATCH, length, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    launches = count(model, x, **inputs_of(contender))
    facts = {
        "label": contender.label,
        "options": contender.options,
        "parameters": trained(model),
        "launches": len(launches),
        "bytes": sum(launch.moved for launch in launches),
        "operations": dict(Counter(launch.name for launch in launches)),
    }
    if compiled and name in COMPILED:
        facts["compiled"] = compiled_calls(contender, in_fp32=in_fp32)
    return facts


def measure(width: int = WIDTH, length: int = LENGTH, *, compiled: bool = True) -> dict[str, Any]:
    """{facts, rounds, errors}: what `facts_of` says of every contender, with adapters in fp32 and in bf16.

    The facts of adapters in bf16 have the contender's name and `-bf16`.
    """
    facts: dict[str, Any] = {}
    errors: dict[str, str] = {}
    budget = trained(build(COUNTED[BUDGET], width=width))
    for name, contender in COUNTED.items():
        found: dict[str, Any] = {}
        try:
            chosen = resolved(contender, budget, width)
            for row, in_fp32 in ((name, True), (f"{name}-bf16", False)):
                found[row] = facts_of(name, chosen, width=width, length=length, in_fp32=in_fp32, compiled=compiled)
        except Exception as error:  # a rival that needs numbers is left out, with its reason
            errors[name] = f"{type(error).__name__}: {error}"[:300]
        facts.update(found)
    return {"facts": facts, "rounds": [], "errors": errors}

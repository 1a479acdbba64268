# SPDX-License-Identifier: Apache-2.0
"""Cost of a training step: memory, and time on a GPU, counted without weights and without the GPU.

The model with its adapter makes one step on PyTorch's meta device, which has shapes and dtypes but no numbers. A
TorchDispatchMode sees every operation, forward and backward, and records three things:

    peak        the most bytes of activations, gradients and temporary tensors that are alive at one time
    operations  for each, its floating-point operations F and the bytes B that it reads and writes

    memory  = frozen weights + 12 bytes per trained parameter + peak + 0.6 GB
    time    = sum over operations of max(F / (0.6 · peak rate), B / (0.75 · bandwidth), 8 µs)

12 bytes are a trained parameter in fp32 and AdamW's two moments; its gradient is part of the peak. 0.6 GB are the
libraries' own. The factors are usual for products and for elementwise kernels, and 8 µs is what PyTorch needs to launch
an operation. docs/step-cost.md compares the estimates with measured runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from dyads.errors import ConfigError, did_you_mean
from dyads.models.budget import adapted_skeleton
from dyads.tuner.routing import find_routing

__all__ = ["GPUS", "OWN_MEMORY", "Gpu", "StepCost", "gpu_of", "most_examples", "step_cost"]

OWN_MEMORY = 600_000_000
"""Bytes that PyTorch and CUDA's libraries take on a GPU besides tensors."""
_PRODUCTS, _BANDWIDTH, _LAUNCH = 0.6, 0.75, 8e-6
_FUSED = "counted"
"""Name of the attention that is counted in the place of sdpa and flash_attention_2."""
_STATE = 12
"""Bytes of a trained parameter and its two moments."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Dense bf16 operations per second (fp16 where there is no bf16)."""
    bandwidth: float
    """Bytes per second."""


def _gpu(name: str, gigabytes: int, teraflops: float, bandwidth: int) -> Gpu:
    return Gpu(name, gigabytes * 1e9, teraflops * 1e12, bandwidth * 1e9)


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        _gpu("T4", 16, 65, 320),
        _gpu("L4", 24, 121, 300),
        _gpu("RTX3090", 24, 71, 936),
        _gpu("RTX4090", 24, 165, 1008),
        _gpu("L40S", 48, 362, 864),
        _gpu("A100-40", 40, 312, 1555),
        _gpu("A100-80", 80, 312, 2039),
        _gpu("H100", 80, 989, 3350),
        _gpu("H200", 141, 989, 4800),
    )
}


def gpu_of(named: str) -> tuple[Gpu, str]:
    """(the GPU of a name, or of a size in GB, a remark on its speed): a size has the speed of the GPU next in size."""
    if named.lower() in GPUS:
        return GPUS[named.lower()], ""
    try:
        gigabytes = float(named.lower().removesuffix("gb"))
    except ValueError:
        known = (*(gpu.name for gpu in GPUS.values()), "a size in GB")
        raise ConfigError(f"--gpu {named}: no GPU of this name is known{did_you_mean(named, known)}") from None
    if not 1 <= gigabytes <= 1000:
        raise ConfigError(f"--gpu {named}: the size of a GPU is 1 to 1000 GB")
    near = min(GPUS.values(), key=lambda gpu: abs(gpu.memory / 1e9 - gigabytes))
    return replace(near, name=f"{gigabytes:g} GB", memory=gigabytes * 1e9), f" (as fast as {near.name})"


@dataclass(frozen=True)
class StepCost:
    """What one training step takes."""

    weights: int
    """Bytes of the frozen model."""
    parameters: int
    """Trained."""
    peak: int
    """Bytes of activations, gradients and temporary tensors."""
    operations: tuple[tuple[float, int], ...]
    """(floating-point operations, bytes read and written) of each launched operation."""
    examples: int
    tokens: int
    """Input tokens of the step."""

    @property
    def state(self) -> int:
        """Bytes of the trained parameters and of the optimizer's moments."""
        return _STATE * self.parameters

    @property
    def memory(self) -> int:
        """Bytes in all, without what the libraries take."""
        return self.weights + self.state + self.peak

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return sum(flops for flops, _ in self.operations)

    def seconds(self, gpu: Gpu) -> float:
        """The time on a GPU."""
        rate, bandwidth = _PRODUCTS * gpu.flops, _BANDWIDTH * gpu.bandwidth
        return sum(max(flops / rate, moved / bandwidth, _LAUNCH) for flops, moved in self.operations)


def step_cost(
    model: str,
    method: str,
    options: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    attention: str | None = None,
    examples: int = 16,
    tokens: int = 512,
    labels: int = 64,
    checkpointing: bool = False,
    task_names: Sequence[str] = (),
) -> StepCost:
    """The cost of a step on `examples` of `tokens` tokens, of which `labels` have a loss."""
    skeleton, kind = adapted_skeleton(
        model, method, dict(options), task_names, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    adapted: Any = skeleton
    if adapted.config._attn_implementation in ("sdpa", "flash_attention_2"):
        adapted.set_attn_implementation(_FUSED)
    adapted.train()
    if checkpointing:
        adapted.gradient_checkpointing_enable()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    frozen = sum(p.nbytes for p in [*adapted.parameters(), *adapted.buffers()] if not p.requires_grad)
    inputs = _inputs(adapted, kind, examples, tokens, labels, getattr(torch, dtype))
    with _Recorder([*adapted.parameters(), *adapted.buffers()]) as recorder:
        _loss(adapted, inputs).backward()  # type: ignore[no-untyped-call]
    return StepCost(
        frozen, sum(p.numel() for p in trained), recorder.peak, tuple(recorder.operations), examples, examples * tokens
    )


def most_examples(cost: Callable[[int], StepCost], gpu: Gpu) -> int:
    """How many examples fit into the GPU's memory at once, by the growth of memory from 8 to 16."""
    eight, sixteen = cost(8).memory, cost(16).memory
    room = gpu.memory - OWN_MEMORY - eight
    most = 8 + int(room // max((sixteen - eight) / 8, 1))
    if 0 < most < 8 and cost(most).memory + OWN_MEMORY > gpu.memory:
        most -= 1
    return max(most, 0)


def _inputs(adapted: Any, kind: str, b: int, t: int, labels: int, dtype: torch.dtype) -> dict[str, Any]:
    """A batch without padding, and a hook that lets only label positions into the LM head, as in training."""
    with torch.device("meta"):
        inputs: dict[str, Any] = {"input_ids": torch.zeros(b, t, dtype=torch.long)}
        if kind == "causal":
            # A mask of four axes is taken as it is: others are read, and meta tensors have no numbers.
            inputs |= {"attention_mask": torch.zeros(b, 1, t, t, dtype=dtype), "use_cache": False}
        if kind == "seq2seq":
            inputs |= {"decoder_input_ids": torch.zeros(b, labels, dtype=torch.long), "use_cache": False}
        routing = find_routing(adapted)
        if routing is not None and routing.names:
            inputs["task"] = torch.zeros(b, dtype=torch.long, device="cpu")
    if kind == "causal":
        head = adapted.get_output_embeddings()
        head.register_forward_pre_hook(lambda module, args: (args[0][:, -min(labels, t) :], *args[1:]))
    return inputs


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention by one kernel, as on a GPU: on the meta device PyTorch would take the one that keeps all scores."""
    output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False)[0]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_FUSED, _fused_attention)
AttentionMaskInterface.register(_FUSED, eager_mask)


def _loss(adapted: Any, inputs: dict[str, Any]) -> Tensor:
    output = adapted(**inputs)
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is not None:
        return logits.float().log_softmax(-1).sum()  # as large as the cross-entropy, without reading labels
    hidden: Tensor = output.last_hidden_state
    return hidden.float().mean(1).sum()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every launched operation, and the most bytes that are alive at one time besides `given`."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[float, int]] = []
        self.peak = self._total = 0
        self._given = {_storage(t)._cdata for t in given}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = {_storage(t)._cdata: t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in made:
            self._keep(_storage(tensor))
        self.peak = max(self.peak, self._total)
        new = [t for t in made if _storage(t)._cdata not in read]
        if new or func._schema.is_mutable:
            moved = sum(_bytes(t) for t in read.values()) + sum(_bytes(t) for t in (new or made))
            if "empty" not in func.__name__:
                self.operations.append((_flops(func, args, kwargs, result), moved))
        return result

    def _keep(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive and key not in self._given:
            self._alive[key] = storage.nbytes()
            self._total += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._total -= self._alive.pop(key)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _bytes(tensor: Tensor) -> int:
    """Of the distinct elements: an axis of stride 0 has one."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    packet = func.overloadpacket
    counter = flop_registry.get(packet) or flop_registry.get(
        getattr(torch.ops.aten, packet.__name__.rstrip("_"), None)  # addmm_ is counted as addmm
    )
    return float(counter(*args, **kwargs, out_val=result)) if counter else 0.0

# SPDX-License-Identifier: Apache-2.0
"""An adapted layer: the frozen layer's output plus the operator of every active adapter.

Adapts nn.Linear and GPT-2's Conv1D. Private names of PEFT relied on here (checked with PEFT 0.21): the attributes
`adapter_layer_names`, `other_param_names`, `_disable_adapters`, `_active_adapter`, `merged_adapters`, and the method
`_move_adapter_to_device_of_base_layer`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from dyads.errors import ConfigError, MergeError, RoutingError
from dyads.methods.config import DyadsConfig
from dyads.methods.core import Core
from dyads.ops import CachedOperator, Frozen, autocast_dtype, fused, in_backward
from dyads.tuner.auxiliary import collect_loss
from dyads.tuner.base_layer import features, is_plain
from dyads.tuner.routing import Routing, RowGroups
from dyads.tuner.watched_weight import WatchedWeight

__all__ = ["DyadsLinear", "adapted_layers", "buffers_stay"]

_FORWARD = nn.Linear.forward


class LowRankFactor(nn.Linear):
    """A or B of one adapter, under the module name that LoRA uses, by which optimizers and trainers find it.

    A call returns the weight, so that hooks around a module's forward bring it: accelerate's for an offloaded model,
    FSDP's for a sharded one.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw nothing: the values come from the config's start (`DyadsLinear.reset_parameters`) or from a file."""

    def forward(self) -> Tensor:  # type: ignore[override]
        weight = self.weight
        # A view of a flat parameter (FSDP1) is freed after this call, and a copy is not.
        return weight if isinstance(weight, nn.Parameter) else weight.clone()


class DyadsLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen linear map with gated sums of rank-one terms beside it.

    Per adapter: `lora_A.<adapter>.weight` (p d_in), `lora_B.<adapter>.weight` (d_out q), and `lora_core.<adapter>`, the
    method's routers, gates and embeddings. With `Core.feature_blocks`, A and B are stored without their zeros.
    PEFT recognises the adapted layers of a linear map by "Linear" in the name of their class ("all-linear").
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_core")
    other_param_names = ("r", "scaling", "lora_dropout", "method_key")
    cast_input_dtype_enabled = True  # read by peft.helpers.disable_input_dtype_casting; inputs are never cast here

    # Given by BaseTunerLayer, which carries no types.
    active_adapters: Any
    get_base_layer: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module, routing: Routing, key: str = "") -> None:
        """`key` is the layer's path in the model, for messages."""
        super().__init__()
        self.key = key
        self.base_layer = base_layer
        self.routing = routing
        self.in_features, self.out_features, self.fan_in_fan_out = features(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_core = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.method_key: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_task: dict[str, Tensor | None] = {}
        self.of_decoder = False
        """Whether it belongs to a decoder, whose tokens are not those of the encoder."""

    def update_layer(self, adapter_name: str, config: DyadsConfig) -> None:
        """Add an adapter to this layer, or replace the one of that name."""
        self.routing.forget_weights()
        self.routing.checked = False
        core = config.core(self.in_features)
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.scaling
        self.method_key[adapter_name] = config.key
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A[adapter_name] = LowRankFactor(core.stored_width(self.in_features), core.p)
        self.lora_B[adapter_name] = LowRankFactor(core.q, core.stored_width(self.out_features))
        self.lora_core[adapter_name] = core
        if config.task_names is not None:
            self.routing.names[adapter_name] = config.task_names
        self.reset_parameters(adapter_name, config)
        with buffers_stay(core):
            self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, config: DyadsConfig) -> None:
        """A ~ N(0, init_std²) or LoRA's Kaiming-uniform; B = 0, so that a fresh adapter changes nothing, exactly."""
        A, B = cast("tuple[Tensor, Tensor]", (self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight))
        if A.is_meta:
            return  # low_cpu_mem_usage: the values come from a file
        self.core(adapter_name).reset_parameters()
        if config.init_std is not None:
            nn.init.normal_(A, std=config.init_std)
        else:
            nn.init.kaiming_uniform_(A, a=5**0.5)
        if config.init_weights:
            nn.init.zeros_(B)
        else:
            nn.init.normal_(B, std=B.shape[1] ** -0.5)

    def core(self, adapter: str) -> Core:
        return self.lora_core[adapter]  # type: ignore[return-value]

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (p d) and B (o q) of the formula."""
        core, A, B = self.core(adapter), self.lora_A[adapter](), self.lora_B[adapter]()
        if core.feature_blocks == 1:
            return A, B
        return core.block_diagonal(A), core.block_diagonal(B.t()).t()

    def _task(self, adapter: str, core: Core, x: Tensor) -> Tensor | None:
        return self.routing.ids(adapter, x) if "task" in core.looks_at else None

    def _cache(self, x: Tensor) -> dict[str, CachedOperator] | None:
        """This layer's cached operators, inside `Routing.unchanged_weights` and without gradients; None elsewhere."""
        cache = self.routing.cache
        if cache is None or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if autocast_dtype(x) is not None:
            return None  # the products have another dtype then
        if "_is_replica" in self.__dict__:
            return None  # of nn.DataParallel: it lives for one forward pass, and its id may be given to another one
        return cache.setdefault(id(self), {})

    def _frozen(self) -> Frozen | None:
        """Weight and bias of the base layer where the operator may compute it; None where it must be called."""
        base = self.base_layer
        if type(base) is not nn.Linear or _is_watched(base):
            return None
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
            return None  # a tensor subclass (quantised, sharded) has products of its own
        return weight, bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (groups := self.routing.here.rows) is not None:
            return self._forward_by_row(x, groups)
        if self.disable_adapters and self.merged:
            self.unmerge()
        for adapter in self.merged_adapters:
            self.routing.check_merged(adapter)
        idle = self.disable_adapters or self.merged
        adapters = [] if idle else [name for name in self.active_adapters if name in self.scaling]
        flattens = self.routing.flattens(x) if adapters else None
        if flattens is not None:
            rows = self.forward(flattens.flattened(x), *args, **kwargs)
            return rows.view(*x.shape[:-1], rows.shape[-1])
        frozen = self._frozen() if adapters and not args and not kwargs else None
        # Either the operator computes the frozen layer, or it adds to `out`, the frozen layer's output.
        out: Tensor | None = self.base_layer(x, *args, **kwargs) if frozen is None else None
        if adapters and frozen is None and not isinstance(out, Tensor):
            raise ConfigError(
                f"'{self.key}' ({type(self.base_layer).__name__}) returns a {type(out).__name__} and not a tensor, as"
                " some routers of experts do, so an adapter cannot add to it: leave it out with exclude_modules"
            )
        cache = self._cache(x)
        for adapter in adapters:
            if cache is None:
                out = self._add(adapter, x, out, frozen)
            else:
                operator = self._operator(adapter, cache)
                out = operator.core(operator, x, self._task(adapter, operator.core, x), out=out, frozen=frozen)
            frozen = None  # the first adapter adds to the frozen layer, the others to the first one's result
        assert out is not None
        return out

    def _operator(self, adapter: str, cache: dict[str, CachedOperator]) -> CachedOperator:
        if adapter not in cache:
            cache[adapter] = CachedOperator(*self.factors(adapter), self.core(adapter), self.scaling[adapter])
        return cache[adapter]

    def _forward_by_row(self, x: Tensor, given: RowGroups) -> Tensor:
        """The frozen layer's output for all rows, to which each adapter adds on its own rows."""
        if x.shape[0] != given.count:
            raise RoutingError(
                f"layer {self.key} sees an input of shape {tuple(x.shape)} in a batch of {given.count} rows, so which"
                " row has which adapter is unknown"
            )
        groups = [group for group in given.groups if group.adapter in self.scaling]
        # One adapter of all rows adds to the frozen layer's output in place.
        frozen = self._frozen() if len(groups) == 1 and groups[0].rows is None else None
        out: Any = self.base_layer(x) if frozen is None else None
        cache = self._cache(x)
        for group in groups:
            operator, rows, task = self._operator(group.adapter, {} if cache is None else cache), group.rows, None
            if group.tasks is not None and "task" in operator.core.looks_at:
                task = group.tasks.ids(group.adapter, self.routing.names[group.adapter], x.device)
            if rows is None:
                out = operator.core(operator, x, task, out=out, frozen=frozen)
            else:
                out[rows] = operator.core(operator, x[rows], task, out=out[rows])
        result: Tensor = out
        return result

    def _add(self, adapter: str, x: Tensor, out: Tensor | None, frozen: Frozen | None) -> Tensor:
        core, dropout = self.core(adapter), self.lora_dropout[adapter]
        task = self._task(adapter, core, x)
        A, B = self.factors(adapter)
        if self.training and core.has_auxiliary_loss:
            running = self.routing.here.current
            collect_loss(running.training if running else None, adapter, core, x, task, self.of_decoder)
        if not torch.compiler.is_compiling() and not in_backward():  # a graph cannot have hooks on B
            self.routing.note_call(self.key, B)
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        y: Tensor = core(
            partial(fused, core=core),
            x,
            A,
            B,
            task=task,
            scale=self.scaling[adapter],
            out=out,
            frozen=frozen,
            inner=dropout(x) if drops else None,
        )
        return y if out is None else y.to(out.dtype)

    @property
    def weight(self) -> Tensor:
        """The base layer's; while a model with this layer runs, one that no other module can multiply by."""
        base = self.get_base_layer()
        weight: Tensor = base.qweight if hasattr(base, "qweight") else base.weight  # PEFT's, but traceable
        idle = self.disable_adapters or self.merged or not any(name in self.scaling for name in self.active_adapters)
        if idle or torch.compiler.is_compiling() or self.routing.here.current is None:
            return weight
        return WatchedWeight.of(weight, self.key) if type(weight) is nn.Parameter else weight

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; then the gradients of what trains are observed until the first step."""
        super().set_adapter(*args, **kwargs)
        self._watch_gradients()

    def train(self, mode: bool = True) -> DyadsLinear:
        """As nn.Module's; parameters may have been replaced since their gradients were observed (FSDP, deepcopy)."""
        super().train(mode)
        if mode:
            self._watch_gradients()
        return self

    def _watch_gradients(self) -> None:
        if not self.routing.checked:
            for B in self.lora_B.parameters():
                self.routing.gradients.watch(self.key, B)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; other tuners and transformers call it for each layer."""
        super().delete_adapter(adapter_name)
        self.routing.names.pop(adapter_name, None)
        self.routing.forget_weights()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """For PEFT's convert_to_lora: whether the adapter is one weight update, for a task at most."""
        return adapter_name in self.lora_A and not self.core(adapter_name).looks_at & {"x", "h"}

    def check_update(self, adapter: str) -> None:
        """MergeError where the adapter is not one weight update."""
        sees = self.core(adapter).looks_at
        if sees & {"x", "h"}:
            raise MergeError(
                f"cannot merge adapter '{adapter}' ({self.method_key[adapter]}): its gates look at the layer's input,"
                " so no single weight update equals it. Keep it unmerged, or train a method whose gates look at"
                " nothing or at the task."
            )
        if "task" in sees:
            tasks, names = self.routing.tasks(), self.routing.names[adapter]
            if len(names) > 1 and (tasks is None or len(tasks) != 1):
                raise MergeError(
                    f"cannot merge adapter '{adapter}' ({self.method_key[adapter]}) without a task, as every task has"
                    f" its own update: name one, for instance task={names[0]!r}"
                )
            if tasks is not None:
                tasks.ids(adapter, names, torch.device("cpu"))  # an unknown one is refused

    def check_merge(self, adapter: str) -> None:
        """MergeError where the adapter is not one weight update, or the base layer has no weight to add it to."""
        self.check_update(adapter)
        base = self.get_base_layer()
        if not is_plain(base):
            weight = getattr(base, "weight", None)
            kind = f"{type(weight).__name__}, {weight.dtype}" if isinstance(weight, Tensor) else "none"
            raise MergeError(
                f"cannot merge adapter '{adapter}' into a {type(base).__name__} (weight: {kind}): the layer is"
                " quantised, or computes something else than a product with a floating-point weight. Call"
                " merge_and_unload(dequantize=True), which puts a floating-point layer in its place, or load the base"
                " model unquantised"
            )

    @torch.no_grad()
    def product(self, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        """A (p d), G (q p) and B (o q), whose product over the scale is ΔW; MergeError where there is none."""
        self.check_update(adapter)
        core, (A, B) = self.core(adapter), self.factors(adapter)
        return A, core(core.matrix_of, A, self._task(adapter, core, A[:1])), B

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW = scale · B G A in the layout of the base layer's weight, computed in fp32 or wider.

        Exact for adapters whose gates look at nothing, or at the one task that is in use (`use_task`).
        """
        A, G, B = self.product(adapter)
        delta = self.scaling[adapter] * (B.to(G.dtype) @ G @ A.to(G.dtype))
        oriented: Tensor = delta.T if self.fan_in_fan_out else delta
        return oriented

    @torch.no_grad()
    def gates_of_tasks(self, adapter: str) -> Tensor | None:
        """The gates of every task (T …), in the order of their ids; None where gates do not look at the task alone."""
        return self._of_tasks(adapter, self.core(adapter).route)

    @torch.no_grad()
    def choices_of_tasks(self, adapter: str) -> Tensor | None:
        """The weights of the experts for every task (T K n); None where gates do not look at the task alone."""
        return self._of_tasks(adapter, self.core(adapter).choices)

    def _of_tasks(self, adapter: str, compute: Callable[..., Tensor]) -> Tensor | None:
        core = self.core(adapter)
        if core.looks_at != {"task"}:
            return None
        A = self.lora_A[adapter]()
        x = A.new_zeros(len(self.routing.names[adapter]), self.in_features)
        found: Tensor = core(compute, A.new_zeros(len(x), core.p), x, torch.arange(len(x), device=A.device))
        return found

    @torch.no_grad()
    def routes(self, adapter: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """(weights of the experts (… K n), gates) for an input of this layer, as in evaluation; no state changes."""
        core, A = self.core(adapter), self.factors(adapter)[0]
        task, training = self._task(adapter, core, x), core.training
        core.eval()  # a core may count its choices in training
        try:
            h = F.linear(x, A.to(x.dtype))
            return core(core.choices, h, x, task), core(core.route, h, x, task)
        finally:
            core.train(training)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W += ΔW for every adapter named (default: the active ones). safe_merge refuses what is not finite."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        for name in names:
            self.check_merge(name)
        for name in names:
            weight = self.get_base_layer().weight
            merged = (weight.data + self.get_delta_weight(name)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            weight.data = merged
            self.merged_adapters.append(name)
            task = self._task(name, self.core(name), weight.data.new_zeros(1, 1))
            self._merged_task[name] = task
            if task is not None:
                self.routing.merged[name] = int(task)

    def unmerge(self) -> None:
        """W −= ΔW of what was merged."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            task = self._merged_task.pop(name)
            self.routing.merged.pop(name, None)
            if name in self.lora_A:
                weight = self.get_base_layer().weight
                with self.routing.using(task):
                    weight.data = (weight.data - self.get_delta_weight(name)).to(weight.dtype)

    def __repr__(self) -> str:
        return "dyads." + super().__repr__()


@contextmanager
def buffers_stay(core: Core) -> Iterator[None]:
    """Within this context a move to the meta device leaves the core's buffers where they are.

    The adapter of a layer that accelerate offloads to disk goes to the meta device; its parameters are read from the
    disk again when they are needed, and buffers are not.
    """
    before = [(module, dict(module._buffers)) for module in core.modules()]
    yield
    for module, buffers in before:
        for name, buffer in buffers.items():
            moved = module._buffers[name]
            if moved is not None and moved.is_meta:
                module._buffers[name] = buffer


def adapted_layers(model: nn.Module, adapter: str = "default") -> dict[str, DyadsLinear]:
    """The layers of a PeftModel that have the adapter, by their paths in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, DyadsLinear) and adapter in module.lora_A
    }


def _is_watched(module: nn.Linear) -> bool:
    """Whether a hook, or another forward, may read or change the layer's input or output."""
    if "forward" in vars(module) or nn.Linear.forward is not _FORWARD:
        return True
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]

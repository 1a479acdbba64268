# SPDX-License-Identifier: Apache-2.0
"""What happens inside one adapted layer? The base layer's output, plus the operator of every active adapter.

Works on nn.Linear and on GPT-2's Conv1D. Private names of PEFT relied on here (checked with PEFT 0.21): the attributes
`adapter_layer_names`, `other_param_names`, `_disable_adapters`, `_active_adapter`, `merged_adapters`, and the method
`_move_adapter_to_device_of_base_layer`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from dyads.errors import ConfigError, MergeError
from dyads.methods.base import Core, DyadsConfig
from dyads.ops import (
    Adapted,
    Frozen,
    Held,
    Together,
    autocast_dtype,
    can_share,
    fused,
    fused_all,
    serves,
)
from dyads.tuner.routing import Routing

__all__ = ["DyadsLayer"]

_FORWARD = nn.Linear.forward


class DyadsLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen linear map with gated sums of rank-one terms beside it.

    Per adapter: `dyads_A` (p d_in), `dyads_B` (q d_out), and `dyads_core`, the method's routers, gates and embeddings.
    A core with several heads stores A and B without their zeros (`Core.whole`).
    """

    adapter_layer_names = ("dyads_A", "dyads_B", "dyads_core")
    other_param_names = ("r", "scaling", "dyads_dropout", "method_key")

    # Given by BaseTunerLayer, which carries no types.
    active_adapters: Any
    get_base_layer: Any
    set_adapter: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.routing = routing
        self.in_features, self.out_features, self.fan_in_fan_out = features(base_layer)
        self.dyads_A = nn.ParameterDict()
        self.dyads_B = nn.ParameterDict()
        self.dyads_core = nn.ModuleDict()
        self.dyads_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.method_key: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_delta_task: dict[str, Tensor | None] = {}
        self.of_decoder = False
        """Whether it belongs to a decoder, whose tokens are not those of the encoder."""

    def update_layer(self, adapter_name: str, config: DyadsConfig) -> None:
        """Add an adapter to this layer, or make the one of that name anew."""
        self.routing.forget_weights()
        core = config.core(self.in_features)
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.scaling
        self.method_key[adapter_name] = config.key
        self.dyads_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.dyads_A[adapter_name] = nn.Parameter(torch.empty(core.p, core.stored(self.in_features)))
        self.dyads_B[adapter_name] = nn.Parameter(torch.empty(core.q, core.stored(self.out_features)))
        self.dyads_core[adapter_name] = core
        if config.task_names is not None:
            self.routing.names[adapter_name] = config.task_names
        self.reset_parameters(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, config: DyadsConfig) -> None:
        """A ~ N(0, init_std²) or LoRA's Kaiming-uniform; B = 0, so that a fresh adapter changes nothing, exactly."""
        A, B = self.dyads_A[adapter_name], self.dyads_B[adapter_name]
        if A.is_meta:
            return  # low_cpu_mem_usage: the values come from a file
        self.dyads_core[adapter_name].reset_parameters()  # type: ignore[operator]
        if config.init_std is not None:
            nn.init.normal_(A, std=config.init_std)
        else:
            nn.init.kaiming_uniform_(A, a=5**0.5)
        if config.init_weights:
            nn.init.zeros_(B)
        else:
            nn.init.normal_(B, std=B.shape[0] ** -0.5)

    def core(self, adapter: str) -> Core:
        return self.dyads_core[adapter]  # type: ignore[return-value]

    def _task(self, adapter: str, core: Core, x: Tensor) -> Tensor | None:
        return self.routing.ids(adapter, x) if "task" in core.looks_at else None

    def _held(self, x: Tensor) -> dict[str, Held] | None:
        """The operators made so far, while weights are known to stay as they are; None where they may change."""
        if self.routing.held is None or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if autocast_dtype(x) is not None:
            return None  # the products have another dtype then
        return self.routing.held.setdefault(id(self), {})

    def _hold(self, adapter: str) -> Held:
        core = self.core(adapter)
        A, B = core.whole(self.dyads_A[adapter]), core.whole(self.dyads_B[adapter])
        self.routing.together.setdefault(adapter, Together())
        return Held(A, B, core, self.scaling[adapter])

    def _frozen(self) -> Frozen | None:
        """Weight and bias of the base layer where the operator may take its place; None where it must be called."""
        base = self.base_layer
        if type(base) is not nn.Linear or _is_watched(base):
            return None
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
            return None  # another kind of tensor (a quantised one, a sharded one) has products of its own
        return weight, bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        for adapter in self.merged_adapters:
            self.routing.check_merged(adapter)
        idle = self.disable_adapters or self.merged
        adapters = [] if idle else [name for name in self.active_adapters if name in self.scaling]
        frozen = self._frozen() if adapters and not args and not kwargs else None
        result: Tensor | None = self.base_layer(x, *args, **kwargs) if frozen is None else None
        held = self._held(x)
        for adapter in adapters:
            if held is not None:
                operator = held.get(adapter)
                if operator is None:
                    operator = held[adapter] = self._hold(adapter)
                task, together = self._task(adapter, operator.core, x), self.routing.together[adapter]
                result = operator(x, task, onto=result, base=frozen, together=together)
            else:
                core = self.core(adapter)
                task = self._task(adapter, core, x)
                if core.has_auxiliary_loss and self.training:
                    self.routing.collect(adapter, core, x, task, self.of_decoder)
                shared = self._shared(adapter, x) if frozen is not None else None
                result = self._sum(adapter, x, task, result, frozen) if shared is None else shared
            frozen = None  # the first adapter adds to the base layer, the others to what it gave
        assert result is not None
        return result

    def _adapted(self, adapter: str, x: Tensor) -> Adapted | None:
        """This layer, where it or one before it can compute it from x beside others; None where it must be called."""
        if self.disable_adapters or self.merged or adapter not in self.scaling or self.active_adapters[:1] != [adapter]:
            return None
        if self._forward_pre_hooks or "forward" in vars(self):
            return None  # who looks on before it is called may change what it is made of
        A, core, frozen = self.dyads_A[adapter], self.core(adapter), self._frozen()
        if frozen is None or core.heads > 1 or not core.splits or _drops(self.dyads_dropout[adapter]):
            return None
        # Replicas and sharded or offloaded parameters are of another kind or elsewhere, but for their own turn.
        if any(type(one) is not nn.Parameter or one.device != x.device for one in (A, frozen[0])):
            return None
        if A.shape[-1] != x.shape[-1] or frozen[0].shape[-1] != x.shape[-1]:
            return None
        return Adapted(A, self.dyads_B[adapter], core, self._task(adapter, core, x), self.scaling[adapter], frozen)

    def _shared(self, adapter: str, x: Tensor) -> Tensor | None:
        """What a layer that saw x before computed for this one too, or this one for all that will; None for by itself.

        Who sees the same x is learned in every forward pass of the model with gradients, and used while training.
        """
        routing = self.routing
        if not torch.is_grad_enabled() or not routing.is_under_way or not serves(self.core(adapter)):
            return None
        siblings = routing.siblings(adapter)
        shared = siblings.at(x, routing.state)
        if shared is not None:
            if shared.found and can_share(x) and self.training:
                found = shared.take(self)
                if found is not None:
                    return found
            if shared.first is not None:
                siblings.add(shared.first, self)
            return None
        shared = siblings.begin(self, x, routing.state)
        if not shared.others or not self.training or not can_share(x):
            return None
        mine = self._adapted(adapter, x)
        if mine is None:
            return None
        layers = [(one, adapted) for one in shared.others if (adapted := one._adapted(adapter, x)) is not None]
        if not layers:
            return None
        result, *theirs = fused_all(x, [mine, *(adapted for _, adapted in layers)])
        shared.keep([one for one, _ in layers], theirs)
        return result

    def _sum(self, adapter: str, x: Tensor, task: Tensor | None, onto: Tensor | None, base: Frozen | None) -> Tensor:
        core, dropout = self.core(adapter), self.dyads_dropout[adapter]
        y = fused(
            x,
            core.whole(self.dyads_A[adapter]),
            core.whole(self.dyads_B[adapter]),
            core,
            task,
            scale=self.scaling[adapter],
            onto=onto,
            base=base,
            inner=dropout(x) if _drops(dropout) else None,
        )
        return y if onto is None else y.to(onto.dtype)

    def check_merge(self, adapter: str) -> None:
        """MergeError where no weight update equals the adapter."""
        if not self.get_base_layer().weight.dtype.is_floating_point:
            raise MergeError(
                f"cannot merge adapter '{adapter}' into weights of type {self.get_base_layer().weight.dtype}: they are"
                " codes of a quantised layer. Load the base model unquantised to merge."
            )
        sees = self.core(adapter).looks_at
        if sees & {"x", "h"}:
            raise MergeError(
                f"cannot merge adapter '{adapter}' ({self.method_key[adapter]}): its gates look at the layer's input,"
                " so no single weight update equals it. Keep it unmerged, or train a method whose gates look at"
                " nothing or at the task."
            )
        if "task" in sees:
            state = self.routing.state
            if state is None or len(state) != 1:
                names = self.routing.names[adapter]
                raise MergeError(
                    f"cannot merge adapter '{adapter}' ({self.method_key[adapter]}) without a task, as every task has"
                    f" its own update: name one, for instance task={names[0]!r}"
                )
            state.ids(adapter, self.routing.names[adapter], self.dyads_A[adapter].device)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW = scale · Bᵀ G A in the layout of the base layer's weight, computed in fp32 or wider.

        Exact for adapters whose gates look at nothing, or at the one task that is in use (`use_task`).
        """
        self.check_merge(adapter)
        core = self.core(adapter)
        A, B = core.whole(self.dyads_A[adapter]), core.whole(self.dyads_B[adapter])
        wide = torch.promote_types(A.dtype, torch.float32)
        probe = torch.zeros(1, self.in_features, dtype=wide, device=A.device)
        g = core.route(probe @ A.to(wide).T, probe, self._task(adapter, core, probe))
        G = core.matrix(g.to(wide)).reshape(core.q, core.p)
        delta = self.scaling[adapter] * (B.to(wide).T @ G @ A.to(wide))
        oriented: Tensor = delta.T if self.fan_in_fan_out else delta
        return oriented

    @torch.no_grad()
    def gates_of_tasks(self, adapter: str) -> Tensor | None:
        """The gates of every task (T …), in the order of their ids; None where gates do not look at the task alone."""
        core, A = self.core(adapter), self.dyads_A[adapter]
        if core.looks_at != {"task"}:
            return None
        probe = A.new_zeros(len(self.routing.names[adapter]), self.in_features)
        return core.route(A.new_zeros(len(probe), core.p), probe, torch.arange(len(probe), device=A.device))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W += ΔW for every adapter named (default: the active ones). safe_merge refuses what is not finite."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.dyads_A]
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
            self._merged_delta_task[name] = task
            if task is not None:
                self.routing.merged[name] = int(task)

    def unmerge(self) -> None:
        """W −= ΔW of what was merged."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            task = self._merged_delta_task.pop(name)
            self.routing.merged.pop(name, None)
            if name in self.dyads_A:
                weight = self.get_base_layer().weight
                with self.routing.using(task):
                    weight.data = (weight.data - self.get_delta_weight(name)).to(weight.dtype)

    def __repr__(self) -> str:
        return "dyads." + super().__repr__()


def _drops(dropout: nn.Module) -> bool:
    return dropout.training and not isinstance(dropout, nn.Identity)


def _is_watched(module: nn.Linear) -> bool:
    """Whether someone sees what goes in or comes out, and so may keep or change it: a hook, or another forward."""
    if "forward" in vars(module) or nn.Linear.forward is not _FORWARD:
        return True
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def features(base_layer: nn.Module) -> tuple[int, int, bool]:
    """(in, out, whether the weight is stored in × out) of a layer that can be adapted."""
    if isinstance(base_layer, NonDynamicallyQuantizableLinear):
        raise ConfigError(
            "nn.MultiheadAttention reads the weight of its out_proj itself, so an adapter there would do nothing: leave"
            " it out with exclude_modules"
        )
    if isinstance(base_layer, nn.Linear):
        return base_layer.in_features, base_layer.out_features, False
    if isinstance(base_layer, Conv1D):
        d_in, d_out = base_layer.weight.shape
        return d_in, d_out, True
    if isinstance(base_layer, BaseTunerLayer):
        return features(base_layer.get_base_layer())
    raise ConfigError(
        f"Target module {type(base_layer).__name__} is not supported: dyads adapts nn.Linear and transformers' Conv1D."
        " Leave it out with exclude_modules, or name other target_modules."
    )

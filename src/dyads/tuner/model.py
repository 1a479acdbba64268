# SPDX-License-Identifier: Apache-2.0
"""PEFT tuner of every method: puts adapted layers into a model, merges them and takes them out.

Private names of PEFT relied on here (checked with PEFT 0.21): `_create_and_replace`, `_replace_module`,
`_unload_and_optionally_merge`, `_get_adapter_state_dict`, `_remap_adapter_state_dict_for_load`,
`_remove_adapter_name_from_key`, `_enable_peft_forward_hooks`, `_check_target_module_compatiblity`, and the function
that this one calls for LoRA.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import PeftType
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, _check_lora_target_modules_mamba
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from dyads.errors import ConfigError, MergeError, did_you_mean
from dyads.methods.config import DyadsConfig
from dyads.methods.declarations import check_declarations
from dyads.tuner.base_layer import dequantized, is_plain
from dyads.tuner.batch_tasks import TaskLike
from dyads.tuner.layer import DyadsLinear, LowRankFactor, buffers_stay
from dyads.tuner.model_calls import attach, detach
from dyads.tuner.packed_experts import check_packed
from dyads.tuner.routing import Routing, find_routing
from dyads.tuner.weighted_sum import factors_of_sum, sum_config

__all__ = ["DyadsModel", "current_names", "refuse_tied"]

_OLD_NAMES = re.compile(r"\.dyads_(A|B|core)(\.|$)")
_GATE = re.compile(r"(\.lora_core\.)gate\.(weight|bias)$")
"""MoRE's gate was a module at first."""


class DyadsModel(BaseTuner):  # type: ignore[misc]
    """The tuner behind `get_peft_model(model, MoDEConfig(…))`. Users meet it as `peft_model.base_model`."""

    prefix = "lora_"
    tuner_layer_cls = DyadsLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie
    _replace_module = LoraModel._replace_module  # BaseTuner's cannot give an embedding with trained tokens back

    # Given by BaseTuner, which carries no types; routing is set before the first injection.
    active_adapters: Any
    peft_config: Any
    routing: Routing

    def _pre_injection_hook(self, model: nn.Module, config: DyadsConfig, adapter_name: str) -> None:
        found = find_routing(model)
        if found is None:
            found = Routing()
            attach(found, model)
        # In __dict__, since BaseTuner.__getattr__ looks a missing attribute up in the wrapped model.
        self.__dict__["routing"] = found

    def _prepare_adapter_config(self, peft_config: DyadsConfig, model_config: dict[str, Any]) -> DyadsConfig:
        prepared: DyadsConfig = super()._prepare_adapter_config(peft_config, model_config)
        check_packed(prepared, self.model)
        return prepared

    @staticmethod
    def _check_target_module_compatiblity(peft_config: DyadsConfig, model: nn.Module, target_name: str) -> None:
        try:  # what PEFT refuses for LoRA, since another module reads the weight
            _check_lora_target_modules_mamba(SimpleNamespace(peft_type=PeftType.LORA), model, target_name)
        except ValueError as error:
            raise ConfigError(f"{peft_config.key}, as LoRA: {error}") from error

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; then one core is verified, and all get what they share with others and their layer's depth."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, DyadsLinear) and adapter_name in m.lora_A}
        for layer in list(layers.values())[:1]:
            tasks = len(self.routing.names.get(adapter_name, ()))
            check_declarations(layer.core(adapter_name), layer.in_features, tasks)
        self._warn_of_shared(layers)
        cores = {name: layer.core(adapter_name) for name, layer in layers.items()}
        self.peft_config[adapter_name].share(cores)
        for core, depth in zip(cores.values(), _depths(self.model, cores), strict=True):
            core.set_depth(depth)

    def _warn_of_shared(self, layers: dict[str, DyadsLinear]) -> None:
        """Warn of weights that modules without an adapter hold, too; PEFT warns of tied embeddings."""
        of_adapted = {f"'{name}.base_layer'" for name, m in self.model.named_modules() if isinstance(m, DyadsLinear)}
        holders = _holders(self.model)
        for name, layer in layers.items():
            of_weight = holders.get(layer.get_base_layer()._parameters.get("weight"), {})
            others = [path for path, holder in of_weight.items() if not isinstance(holder, nn.Embedding)]
            bare = [path for path in others if path not in of_adapted]
            if bare:
                warnings.warn(
                    f"the weight of '{name}' is also that of {', '.join(bare[:3])}, where it has no adapter: a call of"
                    " that module does not have the adapter's effect. Leave it out with exclude_modules, or give each"
                    " module a weight of its own",
                    stacklevel=2,
                )

    def _create_and_replace(
        self,
        peft_config: DyadsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        peft_config = peft_config.for_layer(current_key)
        if isinstance(target, DyadsLinear):
            target.update_layer(adapter_name, peft_config)
            return
        layer = DyadsLinear(target, self.routing, current_key)
        # OPT's layers are in a "decoder" too, and have no other side.
        two_sided = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        layer.of_decoder = bool(two_sided) and "decoder" in current_key.split(".")
        layer.__dict__["_active_adapter"] = adapter_name
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an adapter that is added later trains when it is made active
        if isinstance(parent, nn.TransformerEncoderLayer):
            # In evaluation its fast path reads the weights directly and skips the adapter, unless a module has a hook.
            layer.register_forward_pre_hook(_disable_fast_path)
        with buffers_stay(layer.core(adapter_name)):
            if any(True for _ in target.parameters()):
                self._replace_module(parent, target_name, layer, target)
            else:
                setattr(parent, target_name, layer)  # PEFT reads the device off a parameter

    def _layers(self) -> Iterator[DyadsLinear]:
        for module in self.model.modules():
            if isinstance(module, DyadsLinear):
                yield module

    def gates_of_tasks(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """By layer, the gates that every task has there (T …), in the order of the tasks' ids.

        Empty for an adapter whose gates do not depend on the task alone. A row holds the method's gates: for MoRE the
        scaled prefix of ones, for MOELoRA the weights of the experts.
        """
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, DyadsLinear) and adapter_name in module.lora_A:
                gates = module.gates_of_tasks(adapter_name)
                if gates is not None:
                    found[name] = gates
        return found

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        # Before the first layer is touched: a refusal must not leave half a model merged.
        merging = {}
        for layer in self._layers():
            for name in adapter_names or layer.active_adapters:
                if name in layer.lora_A:
                    layer.check_merge(name)
                    merging[layer.key] = layer
        refuse_tied(self.model, merging)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, task: TaskLike | None = None
    ) -> None:
        """As PEFT's. An adapter whose gates look at the task is merged for the one task named."""
        with self._task_to_merge(task):
            self._check_merge(adapter_names)
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        task: TaskLike | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """As PEFT's. An adapter whose gates look at the task is merged for the one task named.

        With `dequantize`, adapted layers whose weight is quantised become floating-point layers of the model's dtype
        first; other layers stay as they are.
        """
        with self._task_to_merge(task):
            if dequantize:
                self._dequantize(adapter_names)
            merged: nn.Module = super().merge_and_unload(
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        return merged

    def _dequantize(self, adapter_names: list[str] | None) -> None:
        found = []
        for layer in self._layers():
            merging = [name for name in adapter_names or layer.active_adapters if name in layer.lora_A]
            for name in merging:
                layer.check_update(name)
            if merging and layer.base_layer is layer.get_base_layer() and not is_plain(layer.base_layer):
                found.append((layer, dequantized(layer.base_layer, layer.key, getattr(self.model, "dtype", None))))
        for layer, linear in found:  # at the end: a refusal must not leave half a model changed
            layer.base_layer = linear

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        task: TaskLike | None = None,
        **options: Any,
    ) -> None:
        """Add an adapter that is the weighted sum of others: exactly, as PEFT's combination_type "cat".

        Adapters whose gates look at the task are summed for the one task named. The sum is a MoDEConfig with one
        expert, that is a LoRA, which is not active yet.
        """
        if combination_type != "cat" or options:
            what = next(iter(options), None) or f"combination_type '{combination_type}'"
            raise ConfigError(f"{what} approximates the sum of adapters: use combination_type='cat', which is exact")
        if adapter_name in self.peft_config:
            raise ConfigError(f"there is an adapter '{adapter_name}' already: choose another name for the sum")
        for name in adapters:
            if name not in self.peft_config:
                raise ConfigError(f"there is no adapter '{name}'{did_you_mean(name, self.peft_config)}")
            for key, what in (("modules_to_save", "whole modules"), ("trainable_token_indices", "tokens")):
                if getattr(self.peft_config[name], key):
                    raise ConfigError(f"adapter '{name}' trains {what} ({key}), which have no sum")
        if len(adapters) != len(weights) or not adapters:
            raise ConfigError(f"there are {len(adapters)} adapters and {len(weights)} weights: give one for each")
        layers = {layer.key: layer for layer in self._layers()}
        with self._task_to_merge(task):
            factors = factors_of_sum(list(layers.values()), adapters, weights)
        self.peft_config[adapter_name] = sum_config(factors)
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for key, (A, B) in factors.items():
                for factor, value in ((layers[key].lora_A, A), (layers[key].lora_B, B)):
                    cast(LowRankFactor, factor[adapter_name]).weight.copy_(value)

    @contextmanager
    def _task_to_merge(self, task: TaskLike | None) -> Iterator[None]:
        if task is None:
            yield
        else:
            with self.routing.using(task):
                yield

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge(kwargs.get("adapter_names"))
        model: nn.Module = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        detach(self.routing, model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names is not supported by dyads: one adapter serves many tasks, so pass task=… instead, or"
                " choose an adapter for the whole batch with set_adapter"
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: DyadsConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT drops from state_dict every key that has another adapter's name between dots, and so loses this adapter's
        # `embedding` where another adapter is called 'embedding'. The layers know their own keys without names.
        own: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, DyadsLinear):
                for part in module.adapter_layer_names:
                    prefix = f"{name}.{part}.{adapter_name}.".replace("_fsdp_wrapped_module.", "")
                    parts = getattr(module, part)
                    if adapter_name in parts:
                        own |= {prefix + key: value for key, value in parts[adapter_name].state_dict().items()}
        return {key: state_dict.get(key, value) for key, value in own.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DyadsConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=current_names(state_dict)
        )
        return remapped

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT looks for the adapter's name in the last two places; a core may nest deeper: lora_core.NAME.module.weight
        pattern = rf"(\.{cls.prefix}[A-Za-z]+)\.{re.escape(adapter_name)}(?=\.|$)"
        if re.search(pattern, key):
            return re.sub(pattern, r"\1", key)
        return str(super()._remove_adapter_name_from_key(key, adapter_name))


def _holders(model: nn.Module) -> dict[nn.Parameter, dict[str, nn.Module]]:
    """By parameter, the modules that hold it, by path; a module that its parent has under two names counts twice."""
    found: dict[nn.Parameter, dict[str, nn.Module]] = {}
    children = (
        (f"{path}.{name}".lstrip("."), m) for path, p in model.named_modules() for name, m in p._modules.items()
    )
    for path, module in (("", model), *children):
        for parameter in () if module is None else module._parameters.values():
            if parameter is not None:
                found.setdefault(parameter, {})[f"'{path}'" if path else "the model"] = module
    return found


def refuse_tied(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """MergeError where another module of the model holds the weight of one of PEFT's adapted layers, by path."""
    holders = _holders(model)
    for path, layer in layers.items():
        shared = list(holders.get(layer.get_base_layer()._parameters.get("weight"), {}))
        if len(shared) > 1:
            raise MergeError(
                f"cannot merge into '{path}': its weight is shared (tied) with another module"
                f" ({', '.join(shared[:3])}), which the merge would change, too. Keep the adapter unmerged, or give"
                " each module a weight of its own, a clone"
            )


def _depths(model: nn.Module, paths: Iterable[str]) -> list[float]:
    """Depth of each module in the model, 0 to 1: the number of its block, the first in its path, over the last one's.

    Blocks without an adapter count too. It is 0.5 for a single block, and for a module in none, such as a head.
    """
    depths = []
    for path in paths:
        number = re.search(r"(?:^|(?<=\.))\d+(?=\.|$)", path)
        last = 0
        if number is not None:
            around = model.get_submodule(path[: number.start()].rstrip("."))
            last = max(int(name) for name in around._modules if name.isdecimal())
        depths.append(int(number[0]) / last if number is not None and last else 0.5)
    return depths


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's file with today's names of its tensors; ConfigError for a file of a pre-release of dyads."""
    old = next((key for key in state if _OLD_NAMES.search(key)), None)
    if old is not None:
        raise ConfigError(
            f"the adapter was saved by a pre-release of dyads, whose files name A and B otherwise ('{old}'): train it"
            " again with this version"
        )
    return {_GATE.sub(r"\1gate_\2", key): value for key, value in state.items()}


def _disable_fast_path(module: nn.Module, args: tuple[Any, ...]) -> None:
    """No-op hook: its presence disables the fast path of nn.TransformerEncoderLayer."""

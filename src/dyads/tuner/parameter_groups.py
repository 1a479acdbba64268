# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of an optimizer: learning rates of A, B, routers and embeddings as multiples of one base rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dyads.errors import ConfigError, did_you_mean
from dyads.methods.core import ROLES, Core

__all__ = ["parameter_groups"]

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    rates: Mapping[str, float] | None = None,
    weight_decay: float | None = None,
    no_decay: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Trainable parameters of a model with an adapter, in groups for any torch optimizer.

    `rates` maps roles to multiples of `lr`: "A" and "B" (the down- and up-projections, also of PEFT's LoRA), "router"
    (what turns a token or an embedding into gates: routers, gates, MTL-LoRA's transformations) and "embedding" (vectors
    of tasks, and their projection). A missing role has 1; heads and other trained modules always have 1. LoRA+ (arXiv
    2402.12354) is {"B": 16}. With `weight_decay` every group has it, but for parameters named in `no_decay`.

        optimizer = torch.optim.AdamW(dyads.parameter_groups(model, lr=1e-3, rates={"router": 0.3}))

    Every group has a `name`, its role, beside `params` and `lr`. ConfigError for an unknown role and for a multiple
    that is not above 0: a part that is not to train is frozen instead (`requires_grad_(False)`).
    """
    rates = dict(rates or {})
    for role, multiple in rates.items():
        if role not in ROLES:
            raise ConfigError(f"rates: unknown role '{role}'{did_you_mean(role, ROLES)}")
        if isinstance(multiple, bool) or not isinstance(multiple, (int, float)) or not 0 < multiple < float("inf"):
            raise ConfigError(f"rates: {role} must be a number above 0, got {multiple!r}")
    roles, without = _roles(model), set(no_decay)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((roles.get(parameter, "other"), name in without), []).append(parameter)
    order = (*ROLES, "other")
    found = []
    for role, undecayed in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        group = {"params": groups[role, undecayed], "lr": lr * rates.get(role, 1.0), "name": role}
        if weight_decay is not None:
            group["weight_decay"] = 0.0 if undecayed else weight_decay
        found.append(group)
    return found


def _roles(model: nn.Module) -> dict[nn.Parameter, str]:
    """Roles of the parameters of adapters, PEFT's LoRA of linear layers, convolutions and embeddings included."""
    roles: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules():
        factor = next((part for part in path.split(".")[-2:] if part in _FACTORS), None)
        if isinstance(module, Core):
            roles.update({parameter: module.role(name) for name, parameter in module.named_parameters()})
        elif factor is not None:
            roles.update(dict.fromkeys(module.parameters(), factor[-1]))
    return roles

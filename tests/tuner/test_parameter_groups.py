# SPDX-License-Identifier: Apache-2.0
"""Parameter groups: every trainable parameter once, with the rate of its role."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

import dyads
from dyads import MoDEConfig, MoREConfig, TaskMoDEConfig
from dyads.errors import ConfigError
from dyads.methods import methods
from tiny import TASKS, Variant, tiny_model

TARGETS = ["q_proj", "v_proj"]


def adapted(config: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama"), config)


def roles_of(model: nn.Module, **options: Any) -> dict[str, str]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = dyads.parameter_groups(model, 1e-3, **options)
    return {names[id(p)]: group["name"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("variant", [Variant(m.key) for m in methods()], ids=lambda v: v.id)
def test_every_trainable_parameter_is_in_one_group(variant: Variant) -> None:
    model = adapted(variant.config(target_modules=TARGETS, modules_to_save=["lm_head"]))
    groups = dyads.parameter_groups(model, 1e-3)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {group["lr"] for group in groups} == {1e-3}
    for name, role in roles_of(model).items():
        part = re.search(r"\.lora_(A|B|core)\.", name)
        if part is None:
            assert role == "other", name
        elif part[1] == "core":
            assert role == "A" if name.endswith(".cores") else role in ("router", "embedding"), name
        else:
            assert role == part[1], name


def test_roles_have_the_rates_they_are_given() -> None:
    config = TaskMoDEConfig(r=2, num_experts=3, task_dim=4, contrastive=0.1, tasks=list(TASKS), target_modules=TARGETS)
    model = adapted(config)
    groups = dyads.parameter_groups(model, 2e-3, rates={"A": 0.5, "router": 0.25, "embedding": 4}, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("A", 1e-3, 0.1),
        ("B", 2e-3, 0.1),
        ("router", 5e-4, 0.1),
        ("embedding", 8e-3, 0.1),
    ]
    by_name = {name.rpartition(".")[2]: role for name, role in roles_of(model).items() if "lora_core" in name}
    assert by_name == {
        "router": "router",
        "task_router": "router",
        "embedding": "embedding",
        "projection": "embedding",
    }


def test_parameters_without_weight_decay_have_a_group_of_their_own() -> None:
    model = adapted(MoREConfig(r=4, tasks=list(TASKS), contrastive=0.0, target_modules=TARGETS))
    biases = [name for name, p in model.named_parameters() if name.endswith("gate_bias") and p.requires_grad]
    groups = dyads.parameter_groups(model, 1e-3, weight_decay=0.1, no_decay=biases)
    undecayed = [g for g in groups if g["weight_decay"] == 0.0]
    assert [(g["name"], len(g["params"])) for g in undecayed] == [("router", len(biases))]


def test_pefts_lora_has_roles_too() -> None:
    model = adapted(LoraConfig(r=2, target_modules=[*TARGETS, "embed_tokens"]))
    assert set(roles_of(model).values()) == {"A", "B"}
    groups = dyads.parameter_groups(model, 1e-3, rates={"B": 16})
    assert [(g["name"], g["lr"]) for g in groups] == [("A", 1e-3), ("B", 16e-3)]


def test_an_optimizer_takes_the_steps_of_each_rate() -> None:
    """The first step of SGD is −rate · gradient, group by group."""
    model = adapted(MoDEConfig(r=2, num_experts=3, target_modules=TARGETS, init_weights=False))
    rates = {"A": 0.5, "B": 2.0, "router": 3.0}
    optimizer = torch.optim.SGD(dyads.parameter_groups(model, 0.1, rates=rates))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    optimizer.step()
    roles = roles_of(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None
            assert p.grad.abs().max() > 0, name
            assert_close(p.detach(), before[name] - 0.1 * rates[roles[name]] * p.grad)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"rooter": 0.3}, "rates: unknown role 'rooter' – did you mean 'router'"),
        ({"router": 0}, "rates: router must be a number above 0, got 0"),
        ({"B": float("inf")}, "rates: B must be a number above 0, got inf"),
        ({"B": True}, "rates: B must be a number above 0, got True"),
    ],
)
def test_wrong_rates_are_refused(rates: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dyads.parameter_groups(adapted(MoDEConfig(r=2, target_modules=TARGETS)), 1e-3, rates=rates)

# SPDX-License-Identifier: Apache-2.0
"""Configs: contradictions are refused with the value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from dyads.errors import ConfigError
from dyads.methods import MoDEConfig, MoLoRAConfig, MoREConfig, build_config, method, method_names, methods
from tiny import Variant

METHODS = [Variant(m.key) for m in methods()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"r must be a whole number, 1 or more, got 0"),
        ({"r": 2.5}, r"r must be a whole number, 1 or more, got 2.5"),
        ({"r": True}, r"r must be a whole number, 1 or more, got True"),
        ({"lora_dropout": "0.1"}, r"lora_dropout must be a number, got '0.1'"),
        ({"lora_alpha": "abc"}, r"lora_alpha must be a number, got 'abc'"),
        ({"lora_alpha": 0}, r"lora_alpha must be above 0 \(None is scale 1\), got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be at least 0 and below 1, got 1.0"),
        ({"init_std": -1.0}, r"init_std must be above 0 .*got -1.0"),
        ({"target_modules": ".*q", "layers_to_transform": [1]}, r"layers_to_transform cannot be used with a regular"),
        ({"layers_pattern": "h"}, r"layers_pattern only says where layers_to_transform counts.*got 'h'"),
    ],
)
def test_shared_fields_refuse_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"mode: {message}"):
        MoDEConfig(**options)


@pytest.mark.parametrize("variant", METHODS, ids=lambda v: v.id)
def test_every_method_checks_the_shared_fields(variant: Variant) -> None:
    with pytest.raises(ConfigError, match=f"{variant.key}: lora_dropout must be at least 0 and below 1, got 1.0"):
        variant.config(lora_dropout=1.0)
    assert variant.config(lora_alpha=None).scaling == 1.0
    config = variant.config(lora_alpha=8)
    divisor = {"smora": lambda: config.top_k, "hmora": lambda: config.r**0.5}.get(variant.key, lambda: config.r)
    assert config.scaling == 8 / divisor()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoDEConfig(r=4, num_experts=0), "mode: num_experts must be a whole number, 1 or more, got 0"),
        (
            lambda: MoDEConfig(r=6, group_size=4),
            r"group_size must divide r = 6, that is be one of \[1, 2, 3, 6\], got 4",
        ),
        (lambda: MoDEConfig(r=4, group_size=8), r"group_size must divide r = 4, that is be one of \[1, 2, 4\], got 8"),
        (lambda: MoDEConfig(router_std=0), "router_std must be above 0: equal routers never tell experts apart, got 0"),
        (lambda: MoLoRAConfig(num_experts=-1), "molora: num_experts must be a whole number, 1 or more, got -1"),
        (lambda: MoLoRAConfig(shared_down="yes"), "molora: shared_down must be true or false, got 'yes'"),
        (lambda: MoREConfig(), r"more: tasks are missing: give their names \(.*\) or their number \(num_tasks=8\)"),
        (lambda: MoREConfig(tasks=["a", "b", "a"]), r"tasks must differ from one another \(a is there twice\)"),
        (lambda: MoREConfig(tasks="rte"), r"tasks must be a list of names, such as \['rte', 'cola'\], got 'rte'"),
        (lambda: MoREConfig(tasks=[]), "tasks must name at least one task"),
        (lambda: MoREConfig(tasks=["a"], num_tasks=2), "num_tasks = 2, but tasks names 1: leave num_tasks out"),
        (lambda: MoREConfig(num_tasks=0), "num_tasks must be a whole number, 1 or more, got 0"),
        (lambda: MoREConfig(num_tasks=2, task_dim=0), "task_dim must be a whole number, 1 or more, got 0"),
    ],
)
def test_methods_refuse_contradictions(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_baseline_has_our_alpha() -> None:
    assert build_config("lora", {"r": 34}).lora_alpha == MoDEConfig(r=34).lora_alpha == 16
    assert build_config("lora", {"r": 34, "lora_alpha": 8}).lora_alpha == 8


def test_the_papers_settings_are_a_preset() -> None:
    config = build_config("mode", {"preset": "paper", "r": 6, "num_experts": 2})
    assert (config.scaling, config.init_std, config.r, config.num_experts) == (1.0, 0.01, 6, 2)
    assert build_config("mode", {"preset": "paper", "init_std": 0.5, "lora_alpha": 12, "r": 6}).scaling == 2.0
    assert MoLoRAConfig.paper(r=4).init_std == 0.02
    more = MoREConfig.paper(num_tasks=3)
    assert (more.selector, more.linear_scaling, more.contrastive, more.task_dim) == (
        "straight_through",
        "ranks",
        0.1,
        None,
    )


@pytest.mark.parametrize(
    ("name", "preset", "message"),
    [
        ("mode", "papers", "method 'mode': preset must be paper, or left out, got 'papers'"),
        ("lora", "paper", "method 'lora': preset is for the other methods: leave it out, got 'paper'"),
    ],
)
def test_unknown_presets_are_refused(name: str, preset: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(name, {"preset": preset})


def test_options_of_a_recipe_are_checked_by_name() -> None:
    with pytest.raises(ConfigError, match="unknown option 'n_experts' of method 'mode' – did you mean 'num_experts'"):
        build_config("mode", {"n_experts": 4})
    with pytest.raises(
        ConfigError, match="unknown option 'lora_dropot' of method 'lora' – did you mean 'lora_dropout'"
    ):
        build_config("lora", {"lora_dropot": 0.1})
    with pytest.raises(ConfigError, match="unknown method 'modee' – did you mean 'mode'"):
        build_config("modee", {})
    with pytest.raises(ConfigError, match="unknown method 'mor' – did you mean 'more'"):
        method("mor")
    with pytest.raises(ConfigError, match="method 'lora': `layers_to_transform` cannot be used when `target_modules`"):
        build_config("lora", {"target_modules": ".*q", "layers_to_transform": [1]})
    assert {"lora", "mode", "molora", "more"} <= set(method_names())


def test_task_conditioned_methods_learn_the_tasks_of_the_suite_unless_told_otherwise() -> None:
    assert build_config("more", {"r": 2}, ("a", "b")).tasks == ["a", "b"]
    assert build_config("more", {"r": 2, "num_tasks": 2}, ("a", "b")).tasks == ["a", "b"]
    assert build_config("more", {"r": 2, "num_tasks": 5}, ("a", "b")).task_names == ("0", "1", "2", "3", "4")
    assert build_config("mode", {"r": 2}, ("a", "b")).task_names is None


def test_sizes_beyond_any_adapter_are_refused_at_once() -> None:
    for key, option in (("mode", "r"), ("moelora", "r"), ("more", "num_tasks"), ("poly", "num_experts")):
        with pytest.raises(ConfigError, match=f"{option} must be at most 1,048,576, got 1000000000"):
            build_config(key, {option: 10**9}, ("a", "b"))

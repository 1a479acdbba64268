# SPDX-License-Identifier: Apache-2.0
"""Registry of methods: a method is one file in this folder that registers a config.

    @register("toy", "one line for `dyads methods`")
    @dataclass
    class ToyConfig(DyadsConfig):      # fields, and core(d), which builds the Core of a layer with d inputs
        ...

It imports `register`, DyadsConfig and Core from their own modules, not from the package, which is not complete yet. No
other source file changes: the package's public names, PEFT, recipes, the command line and the tests of the contract
read the registry. Tests ask for a line in docs/formula.md's table (`dyads methods --format markdown`), an entry in
docs/papers.md and a contender in benchmarks/contenders.py. The `TYPE_CHECKING` lists are for editors only.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from peft import PeftConfig

from dyads.errors import ConfigError, did_you_mean
from dyads.methods.config import DyadsConfig

__all__ = ["Method", "build_config", "method", "method_names", "methods", "register"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A line of the registry."""

    key: str
    config: type[Any]
    summary: str


_METHODS: dict[str, Method] = {}


def register(key: str, summary: str) -> Callable[[type[Any]], type[Any]]:
    """Enter a config into the registry under the name that recipes and the command line use."""

    def enter(config: type[Any]) -> type[Any]:
        config.key = key
        _METHODS[key] = Method(key, config, summary)
        return config

    return enter


def methods() -> tuple[Method, ...]:
    """The methods of the family, by the names of their files: a new method is one new file in this folder."""
    package = sys.modules[__name__.rpartition(".")[0]]
    for module in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")
    return tuple(_METHODS.values())


def method(key: str) -> Method:
    """The method of that name; ConfigError with the nearest names when there is none."""
    known = {entry.key: entry for entry in methods()}
    if key not in known:
        raise ConfigError(f"unknown method '{key}'{did_you_mean(key, method_names())}")
    return known[key]


def method_names() -> tuple[str, ...]:
    """Every method that can be trained: the family's, and PEFT's own LoRA as the baseline."""
    return ("lora", *(entry.key for entry in methods()))


def build_config(name: str, options: dict[str, Any], task_names: tuple[str, ...] | None = None) -> PeftConfig:
    """The PEFT config of a method from the options of a recipe.

    Unknown options are refused with the nearest names. `preset: paper` gives the fields that are not among the options
    the values of the method's paper (`DyadsConfig.paper`). A task-conditioned method without `tasks` gets the given
    task names, unless `num_tasks` differs from their number.
    """
    if name == "lora":
        from peft import LoraConfig

        config_class: type[Any] = LoraConfig
    else:
        config_class = method(name).config
    options = dict(options)
    preset = options.pop("preset", None)
    fields = {f.name for f in dataclasses.fields(config_class) if f.init and f.name != "peft_type"}
    for key in options:
        if key not in fields:
            near = did_you_mean(key, sorted(fields - set(PeftConfig.__dataclass_fields__)))
            raise ConfigError(f"unknown option '{key}' of method '{name}'{near}")
    if name == "lora":
        options.setdefault("lora_alpha", DyadsConfig.lora_alpha)  # PEFT's own is 8; a fair baseline has ours
    if preset is not None:
        if preset != "paper" or name == "lora":
            known = "is for the other methods: leave it out" if name == "lora" else "must be paper, or left out"
            raise ConfigError(f"method '{name}': preset {known}, got {preset!r}")
        options = config_class.paper_options(options) | options
    if (
        task_names
        and name != "lora"
        and "tasks" not in options
        and options.get("num_tasks", len(task_names)) == len(task_names)
        and config_class.learns_tasks(options)
    ):
        options["tasks"] = list(task_names)
    try:
        return config_class(**options)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method '{name}': {error}") from error

# SPDX-License-Identifier: Apache-2.0
"""dyads: one adapter for many tasks, with mixtures of rank-one experts, native to PEFT.

>>> from dyads import MoDEConfig
>>> from peft import get_peft_model
>>> model = get_peft_model(model, MoDEConfig(r=4, num_experts=16))  # doctest: +SKIP

Importing dyads is light: torch and PEFT are loaded when a name that needs them is first used. Where PEFT is there
already, or is imported later, it learns about the methods by itself, so that `PeftModel.from_pretrained` finds them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = {
    "HydraLoRAConfig": "dyads.methods",
    "MOELoRAConfig": "dyads.methods",
    "MTLLoRAConfig": "dyads.methods",
    "MoDEConfig": "dyads.methods",
    "MoLoRAConfig": "dyads.methods",
    "MoREConfig": "dyads.methods",
    "PolyConfig": "dyads.methods",
    "SMoRAConfig": "dyads.methods",
    "TaskMoDEConfig": "dyads.methods",
    "add_task": "dyads.tuner",
    "auxiliary_loss": "dyads.tuner",
    "use_task": "dyads.tuner",
}

__all__ = [
    "HydraLoRAConfig",
    "MOELoRAConfig",
    "MTLLoRAConfig",
    "MoDEConfig",
    "MoLoRAConfig",
    "MoREConfig",
    "PolyConfig",
    "SMoRAConfig",
    "TaskMoDEConfig",
    "__version__",
    "add_task",
    "auxiliary_loss",
    "use_task",
]

if TYPE_CHECKING:
    from dyads.methods import (
        HydraLoRAConfig,
        MoDEConfig,
        MOELoRAConfig,
        MoLoRAConfig,
        MoREConfig,
        MTLLoRAConfig,
        PolyConfig,
        SMoRAConfig,
        TaskMoDEConfig,
    )
    from dyads.tuner import add_task, auxiliary_loss, use_task


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'dyads' has no attribute '{name}'")
    importlib.import_module("dyads.tuner")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _TellPeft(importlib.abc.MetaPathFinder):
    """Registers our methods right after someone imports PEFT, without importing it for those who never do."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is None or spec.loader is None:
            return None
        inner = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            inner(module)
            importlib.import_module("dyads.tuner")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module("dyads.tuner")
else:
    import importlib.util

    sys.meta_path.insert(0, _TellPeft())

# SPDX-License-Identifier: Apache-2.0
"""dyads: one adapter for many tasks, with mixtures of rank-one experts, native to PEFT.

>>> from dyads import MoDEConfig
>>> from peft import get_peft_model
>>> model = get_peft_model(model, MoDEConfig(r=4, num_experts=16))  # doctest: +SKIP

Importing dyads is light: torch and PEFT are imported when a name that needs them is first used. The methods are
registered with PEFT as soon as both are imported, in either order, so that `PeftModel.from_pretrained` finds them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "TaskCollator",
    "__version__",
    "add_task",
    "auxiliary_loss",
    "parameter_groups",
    "use_task",
    "with_tasks",
]
"""The public functions. The configs of all registered methods are public names too: `dyads.MoDEConfig` and so on."""

if TYPE_CHECKING:
    from dyads.methods import CoMoLConfig as CoMoLConfig
    from dyads.methods import HMoRAConfig as HMoRAConfig
    from dyads.methods import HydraLoRAConfig as HydraLoRAConfig
    from dyads.methods import MoDEConfig as MoDEConfig
    from dyads.methods import MOELoRAConfig as MOELoRAConfig
    from dyads.methods import MoLoRAConfig as MoLoRAConfig
    from dyads.methods import MoREConfig as MoREConfig
    from dyads.methods import MTLLoRAConfig as MTLLoRAConfig
    from dyads.methods import PolyConfig as PolyConfig
    from dyads.methods import SMoRAConfig as SMoRAConfig
    from dyads.methods import TaskMoDEConfig as TaskMoDEConfig
    from dyads.tuner import TaskCollator, add_task, auxiliary_loss, parameter_groups, use_task, with_tasks


def __getattr__(name: str) -> Any:
    if name in __all__ or name.endswith("Config"):
        for package in ("dyads.tuner", "dyads.methods"):  # the tuner first: it registers the methods with PEFT
            found = getattr(importlib.import_module(package), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module 'dyads' has no attribute '{name}'")


def __dir__() -> list[str]:
    configs = {entry.config.__name__ for entry in importlib.import_module("dyads.methods").methods()}
    return sorted({*__all__, *configs})


def _check_versions() -> None:
    importlib.import_module("dyads.versions").check_versions()


class _RegisterWithPeft(importlib.abc.MetaPathFinder):
    """Registers our methods right after someone imports PEFT, without importing it for those who never do."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        # The other finders are called one by one: importlib.util.find_spec would call this one again. Finding a spec
        # imports nothing and often only tests whether PEFT is installed, so this finder stays until PEFT is executed.
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return None
        inner = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _check_versions()
            inner(module)
            importlib.import_module("dyads.tuner")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    _check_versions()
    importlib.import_module("dyads.tuner")
else:
    sys.meta_path.insert(0, _RegisterWithPeft())

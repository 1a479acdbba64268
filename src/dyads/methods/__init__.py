# SPDX-License-Identifier: Apache-2.0
"""Methods, one file each. Every config that a file here registers is a name of this package."""

from typing import TYPE_CHECKING

# First, and before any module of this package: importing PEFT registers our methods (see dyads/__init__.py), and for
# that every module here must be importable.
import peft  # noqa: F401

from dyads.methods.config import DyadsConfig, TaskConditioned
from dyads.methods.core import Core
from dyads.methods.registry import Method, build_config, method, method_names, methods, register

if TYPE_CHECKING:
    from dyads.methods.comol import CoMoLConfig as CoMoLConfig
    from dyads.methods.hmora import HMoRAConfig as HMoRAConfig
    from dyads.methods.hydralora import HydraLoRAConfig as HydraLoRAConfig
    from dyads.methods.mode import MoDEConfig as MoDEConfig
    from dyads.methods.moelora import MOELoRAConfig as MOELoRAConfig
    from dyads.methods.molora import MoLoRAConfig as MoLoRAConfig
    from dyads.methods.more import MoREConfig as MoREConfig
    from dyads.methods.mtl_lora import MTLLoRAConfig as MTLLoRAConfig
    from dyads.methods.poly import PolyConfig as PolyConfig
    from dyads.methods.smora import SMoRAConfig as SMoRAConfig
    from dyads.methods.task_mode import TaskMoDEConfig as TaskMoDEConfig

globals().update({entry.config.__name__: entry.config for entry in methods()})

__all__ = [
    "Core",
    "DyadsConfig",
    "Method",
    "TaskConditioned",
    "build_config",
    "method",
    "method_names",
    "methods",
    "register",
    *(entry.config.__name__ for entry in methods()),
]

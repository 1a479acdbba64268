# SPDX-License-Identifier: Apache-2.0
"""Which methods are there? One file a paper; importing this package fills the registry."""

# First, and before any module of this package: importing PEFT makes it know our methods (see dyads/__init__.py), and
# for that every module here must be free to be imported.
import peft  # noqa: F401

from dyads.methods.base import Core, DyadsConfig, Method, build_config, method, method_names, methods
from dyads.methods.hydralora import HydraLoRAConfig
from dyads.methods.mode import MoDEConfig
from dyads.methods.moelora import MOELoRAConfig
from dyads.methods.molora import MoLoRAConfig
from dyads.methods.more import MoREConfig
from dyads.methods.mtl_lora import MTLLoRAConfig
from dyads.methods.poly import PolyConfig
from dyads.methods.smora import SMoRAConfig
from dyads.methods.task_mode import TaskMoDEConfig

__all__ = [
    "Core",
    "DyadsConfig",
    "HydraLoRAConfig",
    "MOELoRAConfig",
    "MTLLoRAConfig",
    "Method",
    "MoDEConfig",
    "MoLoRAConfig",
    "MoREConfig",
    "PolyConfig",
    "SMoRAConfig",
    "TaskMoDEConfig",
    "build_config",
    "method",
    "method_names",
    "methods",
]

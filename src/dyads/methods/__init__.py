# SPDX-License-Identifier: Apache-2.0
"""Which methods are there? One file a paper; importing this package fills the registry."""

from dyads.methods.base import Core, DyadsConfig, Method, build_config, method, method_names, methods
from dyads.methods.mode import MoDEConfig
from dyads.methods.molora import MoLoRAConfig
from dyads.methods.more import MoREConfig

__all__ = [
    "Core",
    "DyadsConfig",
    "Method",
    "MoDEConfig",
    "MoLoRAConfig",
    "MoREConfig",
    "build_config",
    "method",
    "method_names",
    "methods",
]

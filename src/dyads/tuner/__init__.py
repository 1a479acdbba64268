# SPDX-License-Identifier: Apache-2.0
"""How do the methods live inside PEFT? Importing this package registers them."""

from dyads.tuner.layer import DyadsLayer
from dyads.tuner.model import DyadsModel
from dyads.tuner.register import register_methods
from dyads.tuner.routing import Routing, auxiliary_loss, use_task

__all__ = ["DyadsLayer", "DyadsModel", "Routing", "auxiliary_loss", "register_methods", "use_task"]

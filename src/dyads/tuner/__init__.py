# SPDX-License-Identifier: Apache-2.0
"""The methods inside PEFT. Importing this package registers them."""

from dyads.tuner.add_task import STARTS, add_task, similarity_to_tasks
from dyads.tuner.layer import DyadsLinear
from dyads.tuner.model import DyadsModel
from dyads.tuner.parameter_groups import parameter_groups
from dyads.tuner.register import register_methods
from dyads.tuner.routing import Routing, auxiliary_loss, use_task
from dyads.tuner.task_collator import TaskCollator
from dyads.tuner.trainers import with_tasks

__all__ = [
    "STARTS",
    "DyadsLinear",
    "DyadsModel",
    "Routing",
    "TaskCollator",
    "add_task",
    "auxiliary_loss",
    "parameter_groups",
    "register_methods",
    "similarity_to_tasks",
    "use_task",
    "with_tasks",
]

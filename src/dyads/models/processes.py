# SPDX-License-Identifier: Apache-2.0
"""Processes that run together, and the device of each, as accelerate sees them."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState

__all__ = ["launched", "on_cpus"]


def on_cpus() -> bool:
    """Whether torchrun or accelerate launch started processes on a machine without an accelerator: they use gloo."""
    return "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()


def launched() -> PartialState:
    """The state of all processes, which the first call connects where TrainingArguments has not."""
    return PartialState(cpu=on_cpus())

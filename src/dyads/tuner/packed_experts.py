# SPDX-License-Identifier: Apache-2.0
"""Packed expert weights: parameters of three axes that LoRA adapts by `target_parameters`, and dyads does not.

transformers 5 keeps the experts of Mixtral, Qwen-MoE and others in one parameter, where version 4 had a linear layer
for each. For LoRA, PEFT turns their old names, and "all-linear", into `target_parameters`.
"""

from __future__ import annotations

import copy
import warnings

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from dyads.errors import ConfigError
from dyads.methods.config import DyadsConfig

__all__ = ["check_packed"]


def check_packed(config: DyadsConfig, model: nn.Module) -> None:
    """ConfigError for target modules that are packed, and a warning where others cover less than they do for LoRA."""
    targets = config.target_modules
    if not targets:
        return
    as_lora = LoraConfig(target_modules=copy.copy(targets))
    try:
        convert_peft_config_for_transformers(as_lora, model, None)
        packed = sorted(as_lora.target_parameters or ())
    except ValueError:  # for LoRA some names need each other, which are fused into one parameter
        packed = ["gate_up_proj"]
    if not packed:
        return
    there = [name for name, _ in model.named_modules()]
    if not isinstance(targets, str):
        absent = [t for t in sorted(targets) if not any(n == t or n.endswith(f".{t}") for n in there)]
        if absent:
            raise ConfigError(
                f"{config.key}: target_modules {', '.join(absent)}: this model packs its experts into parameters"
                f" ({', '.join(packed)}), which only LoRA can adapt (target_parameters). Leave them out"
            )
    warnings.warn(
        f"{config.key}: target_modules covers fewer weights of this model than for LoRA, which also adapts packed"
        f" parameters: {', '.join(packed)}. dyads adapts linear layers only",
        stacklevel=2,
    )

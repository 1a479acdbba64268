# SPDX-License-Identifier: Apache-2.0
"""Registration of the methods with PEFT.

`peft.utils.register_peft_method` only takes names that PEFT's own enum lists, so the entries go straight into the three
mappings that PEFT looks methods up in (checked with PEFT 0.21.2 and its save, load, merge and generate paths; peft_type
is compared as a string everywhere).
"""

from __future__ import annotations

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from dyads.methods.config import PEFT_TYPE_PREFIX
from dyads.methods.registry import methods
from dyads.tuner.model import DyadsModel

__all__ = ["register_methods"]


def register_methods() -> None:
    """Register every method with PEFT; repeated calls change nothing."""
    for entry in methods():
        peft_type = PEFT_TYPE_PREFIX + entry.key.upper()
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = entry.config
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = DyadsModel
        PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = DyadsModel.prefix


register_methods()

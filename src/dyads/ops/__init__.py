# SPDX-License-Identifier: Apache-2.0
"""What is computed? The operator `dyadic`, the slow double sum it must equal, and its fast path `fused`."""

from dyads.ops.dyadic import Frozen, Gating, dyadic
from dyads.ops.fused import Held, Splits, Together, autocast_dtype, fused, plain
from dyads.ops.oracle import dyadic_sum

__all__ = [
    "Frozen",
    "Gating",
    "Held",
    "Splits",
    "Together",
    "autocast_dtype",
    "dyadic",
    "dyadic_sum",
    "fused",
    "plain",
]

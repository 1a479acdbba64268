# SPDX-License-Identifier: Apache-2.0
"""What is computed? The operator `dyadic`, the slow double sum it must equal, and its fast path `fused`."""

from dyads.ops.dyadic import Frozen, Gating, dyadic
from dyads.ops.fused import Held, Splits, Together, autocast_dtype, fused, plain
from dyads.ops.kernel import Choice, Kernel, kernel, without_kernel
from dyads.ops.oracle import dyadic_sum

__all__ = [
    "Choice",
    "Frozen",
    "Gating",
    "Held",
    "Kernel",
    "Splits",
    "Together",
    "autocast_dtype",
    "dyadic",
    "dyadic_sum",
    "fused",
    "kernel",
    "plain",
    "without_kernel",
]

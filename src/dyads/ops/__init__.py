# SPDX-License-Identifier: Apache-2.0
"""What is computed? The operator `dyadic`, the slow double sum it must equal, and its fast path `fused`."""

from dyads.ops.compile import cache_folder
from dyads.ops.dyadic import Frozen, Gating, dyadic
from dyads.ops.fused import Adapted, Splits, can_share, fused, fused_all, plain, serves, unshared
from dyads.ops.held import Held, Together
from dyads.ops.kernel import Choice, Kernel, kernel, without_kernel
from dyads.ops.oracle import dyadic_sum
from dyads.ops.products import autocast_dtype
from dyads.ops.siblings import Siblings
from dyads.ops.tiles import untiled

__all__ = [
    "Adapted",
    "Choice",
    "Frozen",
    "Gating",
    "Held",
    "Kernel",
    "Siblings",
    "Splits",
    "Together",
    "autocast_dtype",
    "cache_folder",
    "can_share",
    "dyadic",
    "dyadic_sum",
    "fused",
    "fused_all",
    "kernel",
    "plain",
    "serves",
    "unshared",
    "untiled",
    "without_kernel",
]

# SPDX-License-Identifier: Apache-2.0
"""The operator, its slow oracle, and its cache for decoding."""

from dyads.ops.cached import CachedOperator
from dyads.ops.operator import (
    Frozen,
    Gating,
    LinearGating,
    autocast_dtype,
    dyadic,
    fused,
    in_backward,
    plain,
    require_present,
    without_autocast,
)
from dyads.ops.oracle import dyadic_sum

__all__ = [
    "CachedOperator",
    "Frozen",
    "Gating",
    "LinearGating",
    "autocast_dtype",
    "dyadic",
    "dyadic_sum",
    "fused",
    "in_backward",
    "plain",
    "require_present",
    "without_autocast",
]

# SPDX-License-Identifier: Apache-2.0
"""What is computed? The operator `dyadic`, and the slow double sum it must equal."""

from dyads.ops.dyadic import Gating, dyadic
from dyads.ops.oracle import dyadic_sum

__all__ = ["Gating", "dyadic", "dyadic_sum"]

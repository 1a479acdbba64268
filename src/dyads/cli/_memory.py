# SPDX-License-Identifier: Apache-2.0
"""What happens to memory that a training step gives back? The process keeps it for the next step.

By default glibc returns freed memory to the system, and a training step on a CPU gets it back page by page: a quarter
of a million page faults a step for SmolLM2 at 8 × 128 tokens. A command has its process to itself and asks glibc not
to. The price: a process stays as large as its largest step, and is up to a quarter larger then (LOG.md).
"""

from __future__ import annotations

import os
import sys

__all__ = ["keep_memory"]

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER, _LARGEST = -1, 2**31 - 1

_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Have glibc keep what this process frees, up to 2 GiB a piece; whether it does.

    Nothing is done where another allocator than glibc's serves, and where the environment has a wish of its own
    (MALLOC_TRIM_THRESHOLD_ and the like, GLIBC_TUNABLES).
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OWN):
        return False
    import ctypes  # here, as `dyads --help` must be quick and does without

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_TRIM_THRESHOLD, _NEVER), mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TOP_PAD, 2**26)])

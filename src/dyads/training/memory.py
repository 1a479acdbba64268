# SPDX-License-Identifier: Apache-2.0
"""Setting of glibc's allocator: memory that a training step frees stays with the process.

By default glibc returns freed memory to the system, and the next step on a CPU gets it back page by page: a quarter of
a million page faults per step for SmolLM2 at 8 × 128 tokens. The setting is for commands, which own their process. Its
price: the process stays as large as its largest step, which is up to a quarter larger too (LOG.md).
"""

from __future__ import annotations

import os
import sys

__all__ = ["keep_memory"]

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER, _LARGEST = -1, 2**31 - 1

_CONFIGURED_BY = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES",
)


def keep_memory() -> bool:
    """Make glibc keep memory that this process frees, in blocks of up to 2 GiB; returns whether it does.

    It does not with another C library, and where an environment variable configures the allocator already
    (MALLOC_TRIM_THRESHOLD_ and the like, GLIBC_TUNABLES).
    """
    if sys.platform != "linux" or any(name in os.environ for name in _CONFIGURED_BY):
        return False
    import ctypes  # not at the top: `dyads --help` is quick without it

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_TRIM_THRESHOLD, _NEVER), mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TOP_PAD, 2**26)])

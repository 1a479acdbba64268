# SPDX-License-Identifier: Apache-2.0
"""A process keeps memory that it frees, unless the environment configures glibc's allocator."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from dyads.training.memory import keep_memory

FREED = """
import sys
from dyads.training.memory import keep_memory

def pages():
    return int(open("/proc/self/statm").read().split()[1])

kept = keep_memory() if sys.argv[1] == "keep" else None
before = pages()
block = bytearray(2**26)
block[::4096] = b"x" * len(block[::4096])
del block
print(kept, pages() - before)
"""
PAGES = 2**26 // 4096
glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the setting is glibc's"
)


def pages_kept(how: str, **environment: str) -> tuple[str, int]:
    """What `keep_memory` returned in a new process, and how many pages of a freed block of 64 MiB stayed with it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", FREED, how], capture_output=True, text=True, check=True, env={**clean, **environment}
    )
    kept, pages = done.stdout.split()
    return kept, int(pages)


@glibc
def test_freed_memory_stays_with_the_process() -> None:
    kept, pages = pages_kept("keep")
    assert kept == "True"
    assert pages >= PAGES
    assert pages_kept("without")[1] < PAGES // 4


@glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_setting_in_the_environment_is_not_overridden(name: str) -> None:
    kept, pages = pages_kept("keep", **{name: "131072" if name != "GLIBC_TUNABLES" else "glibc.malloc.top_pad=131072"})
    assert kept == "False"
    assert pages < PAGES // 4


def test_other_platforms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_memory()

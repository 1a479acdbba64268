# SPDX-License-Identifier: Apache-2.0
"""A command keeps the memory that its steps give back, unless the environment wants it otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import dyads.cli
from dyads.cli._memory import keep_memory

STEPS = """
import resource, sys
from dyads.cli._memory import keep_memory
kept = keep_memory() if sys.argv[1] == "keep" else None

def step():
    for size in (1, 5, 40, 3):
        block = bytearray(size * 2**20)
        block[::4096] = b"x" * len(block[::4096])
        del block

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's"
)


def faults(how: str, **environment: str) -> tuple[str, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True, env={**clean, **environment}
    )
    said, count = done.stdout.split()
    return said, int(count)


@glibc
def test_memory_that_a_step_frees_serves_the_next_step() -> None:
    said, kept = faults("keep")
    _, given_back = faults("as it comes")
    assert said == "True"
    assert given_back > 10 * 10_000  # 49 MiB a step are 12,544 pages
    assert kept < 100


@glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_a_wish_in_the_environment_stands(name: str) -> None:
    said, given_back = faults("keep", **{name: "131072"})
    assert said == "False"
    assert given_back > 10 * 10_000


def test_nothing_is_done_where_there_is_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_memory()


def test_every_verb_keeps_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(dyads.cli, "keep_memory", lambda: asked.append("kept"))
    CliRunner().invoke(dyads.cli.main, ["train", str(tmp_path / "none.yaml")])
    assert asked == ["kept"]
    CliRunner().invoke(dyads.cli.main, ["--help"])
    assert asked == ["kept"]

# SPDX-License-Identifier: Apache-2.0
"""Kills: whatever call a process ends at, the same command then gives the same files and results (tests/kills.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the shim reads /proc")
HARNESS = Path(__file__).parents[1] / "kills.py"


def kills(*arguments: str) -> dict[str, int]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(HARNESS), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    total: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return total


def test_twenty_kills_spread_over_all_commands_lose_nothing() -> None:
    total = kills("--fault", "kill", "--spread", "20")
    assert total["kills"] == 20
    assert total["not_resumable"] == total["different"] == total["foreign"] == total["hangs"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "full", "time"])
def test_every_kill_of_every_command_loses_nothing(fault: str) -> None:
    total = kills("--fault", fault)
    assert total["kills"] + total["full"] >= 600

# SPDX-License-Identifier: Apache-2.0
"""Kills: whatever call a process ends at, the same command then gives the same files and results (tests/kills.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import forked

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the shim reads /proc")
FAILURES = ("not_resumable", "different", "foreign", "hangs", "lost")


def kills(*arguments: str) -> dict[str, int]:
    def work() -> None:
        import kills  # in the fork: it changes the environment and the filters of warnings

        failed = kills.main(list(arguments))
        assert not any(failed[kind] for kind in FAILURES), failed

    done = forked.run(work, timeout=3 * 3600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def test_nine_kills_spread_over_all_commands_lose_nothing() -> None:
    assert kills("--spread", "9", "--real")["kills"] == 9


@pytest.mark.slow
def test_every_kill_of_every_command_loses_nothing(tmp_path: Path) -> None:
    results = tmp_path / "kills.jsonl"
    counts = kills("--results", str(results))
    assert counts["kills"] >= 1000
    assert kills("--results", str(results)) == counts
    assert len(results.read_text().splitlines()) == counts["kills"], "what passed is not repeated"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full", "denied", "time"])
def test_other_faults_lose_nothing(fault: str) -> None:
    how = ("--count", "100") if fault == "time" else ("--spread", "200")
    assert kills("--fault", fault, *how)[fault] >= 100

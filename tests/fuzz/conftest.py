# SPDX-License-Identifier: Apache-2.0
"""Profiles of hypothesis: a few examples in the default suite, thousands with `--hypothesis-profile full`.

The environment variable FUZZ_RESULTS names a file to which a line is appended for every test that passed; such tests
are not repeated, so a run that was cut off goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from hostile import TALLY, Tally

shared: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=15, derandomize=True, **shared)
settings.register_profile("full", max_examples=1000, print_blob=True, **shared)

RESULTS = Path(os.environ["FUZZ_RESULTS"]) if os.environ.get("FUZZ_RESULTS") else None


def _passed() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS is not None and RESULTS.exists() else []
    return {line["test"]: line for line in map(json.loads, lines)}


def pytest_configure(config: Any) -> None:
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("few")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.when == "call" and report.passed and RESULTS is not None:
        tried = {key: value - getattr(item.before, key) for key, value in asdict(TALLY).items() if key != "slowest"}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            line = {"test": item.nodeid, **tried, "slowest": TALLY.slowest, "seconds": round(report.duration, 1)}
            file.write(json.dumps(line) + "\n")


def pytest_runtest_setup(item: Any) -> None:
    if item.nodeid in _passed():
        pytest.skip("passed before")
    TALLY.slowest, item.before = 0.0, replace(TALLY, slowest=0.0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = list(_passed().values()) or [asdict(TALLY)]
    total = Tally(*(sum(line[key] for line in lines) for key in ("accepted", "refused")))
    if count := total.accepted + total.refused:
        slowest = max(line["slowest"] for line in lines)
        terminalreporter.line(
            f"fuzz: {count:,} inputs, {total.accepted:,} accepted, {total.refused:,} refused, slowest {slowest:.2f} s"
        )

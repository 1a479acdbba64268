# SPDX-License-Identifier: Apache-2.0
"""Profiles of hypothesis: a few examples in the default suite, thousands with `--hypothesis-profile full`."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

shared: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=25, derandomize=True, **shared)
settings.register_profile("full", max_examples=1200, print_blob=True, **shared)


def pytest_configure(config: Any) -> None:
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("few")

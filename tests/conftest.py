# SPDX-License-Identifier: Apache-2.0
"""What every test gets: no network, and the fixtures of several rooms."""

from __future__ import annotations

import os

import pytest

FIXTURES = ("variants", "browsers", "made_runs", "made_studies")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.register_assert_rewrite(*FIXTURES)


def pytest_configure(config: pytest.Config) -> None:
    """Loads the fixtures, but not in the controller of `pytest -n`: it runs no test, and workers wait for it."""
    if not hasattr(config, "workerinput") and config.getoption("numprocesses", None):
        return
    for plugin in FIXTURES:
        config.pluginmanager.import_plugin(plugin)

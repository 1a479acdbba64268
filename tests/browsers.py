# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


def chromium() -> str | None:
    """The path of a Chromium on this machine; None without one."""
    named = os.environ.get("DYADS_CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome", "chrome"]
    return next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium by Playwright, whose event loop ends with the module: other tests run their own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    path = chromium()
    if path is None:
        pytest.skip("needs Chromium: `apt-get install chromium`, or DYADS_CHROMIUM=PATH")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()

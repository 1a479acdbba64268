# SPDX-License-Identifier: Apache-2.0
"""Tests of the site in a browser: nothing overflows, no errors, no other server, and the search answers questions."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pages import ROOT

pytestmark = pytest.mark.slow

SEARCHED = {
    "own chat data": "how-do-i-train-on-my-own-chat-data",
    "two GPUs": "can-i-train-on-two-gpus",
    "which method": "which-method-should-i-take",
    "load without dyads": "can-i-load-an-adapter-without-dyads",
    "resume": "how-do-i-resume-an-interrupted-training",
    "interval": "what-does-the-interval-mean",
    "add a metric": "how-do-i-add-a-metric",
    "memory 8B": "how-much-memory-does-a-model-of-eight-billion-parameters-need",
    "serve": "how-do-i-serve-it",
    "cite": "how-do-i-cite-dyads",
    "bibtex": "how-do-i-cite-dyads",
}
"""What a new user types into the search, and the answer that is to come first."""

OVERFLOWING = """() => {
    const wide = document.documentElement.clientWidth + 1, found = [];
    if (document.documentElement.scrollWidth > wide) found.push(`the page is ${document.documentElement.scrollWidth}`);
    for (const element of document.querySelectorAll('.md-content *')) {
        const box = element.getBoundingClientRect();
        if (!box.width || box.right <= wide) continue;
        let around = element;
        while (around && getComputedStyle(around).overflowX === 'visible') around = around.parentElement;
        if (!around?.closest('.md-content *')) found.push(element.outerHTML.slice(0, 80));
    }
    return found;
}"""
"""Elements beyond the right edge that are in nothing that scrolls."""


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of the built site, and the paths of its pages."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    handler = functools.partial(Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pages = sorted(path.parent.relative_to(folder).as_posix() for path in folder.rglob("index.html"))
        yield f"http://127.0.0.1:{server.server_port}/", pages
        server.shutdown()


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_no_page_overflows_or_reports_an_error_or_reads_from_another_server(
    site: tuple[str, list[str]],
    browser: Any,
    width: int,
    scheme: str,
) -> None:
    address, paths = site
    assert len(paths) > 30
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda response: response.status >= 400 and problems.append(response.url))
    page.on("request", lambda request: re.match(f"{address}|data:|blob:", request.url) or problems.append(request.url))
    for path in paths:
        page.goto(address + path)
        problems += [f"{path}: {found}" for found in page.evaluate(OVERFLOWING)]
    context.close()
    assert not problems


def test_the_search_finds_the_questions_of_a_new_user(
    site: tuple[str, list[str]],
    browser: Any,
) -> None:
    page = browser.new_page()
    page.goto(site[0])
    box = page.locator(".md-search__input")
    for words, anchor in SEARCHED.items():
        box.click()
        box.fill("")
        box.press_sequentially(words)
        first = page.locator(".md-search-result__item").first
        first.locator(f"a[href$='#{anchor}']").first.wait_for(state="attached", timeout=10_000)
    first.locator(f"a[href$='#{anchor}']").first.click()
    page.wait_for_url(f"**/questions/**#{anchor}")
    assert page.locator(f"h2#{anchor}").is_visible()
    page.close()

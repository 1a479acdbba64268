# SPDX-License-Identifier: Apache-2.0
"""The server's page in a headless Chromium: answers side by side, keyboard, themes, phones, injected markup."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dyads.runs.folder import RunFolder
from dyads.scoring.evaluate import generate
from dyads.serving.limits import Keys, Limits
from dyads.serving.server import Server
from made_runs import TASKS
from made_servers import served

BAD = "<img src=x onerror=document.title='injected'>"
TEXT = "tree stone tree fox"


@pytest.fixture(scope="module")
def server(made: dict[str, RunFolder]) -> Iterator[Server]:
    with served({"more": made["more"], BAD: made["lora"]}) as server:
        yield server


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server, and refuses errors on it and requests to others."""
    problems: list[str] = []
    contexts = []

    def opened(address: str, *, width: int = 1200, scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on(
            "console",
            lambda m: (
                problems.append(m.text) if m.type == "error" and "Failed to load resource" not in m.text else None
            ),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: problems.append(r.url) if not r.url.startswith(address) else None)
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [problem for problem in problems if "favicon" not in problem] == []


def test_tasks_answer_side_by_side(server: Server, open_page: Callable[..., Any], made: dict[str, RunFolder]) -> None:
    templates = made["more"].templates()
    examples = [templates[task].example({templates[task].input_column or "input": TEXT}) for task in TASKS]
    expected = generate(made["more"], examples, list(TASKS), batch_size=1)
    page = open_page(server.address)
    page.wait_for_selector("#models input")
    assert page.locator("#models input:checked").count() == 3
    page.focus("#text")
    page.keyboard.type(TEXT)
    page.keyboard.press("Control+Enter")
    page.locator("article p", has_text="tokens").nth(2).wait_for()
    assert page.locator("article h2").all_text_contents() == [f"more/{task}" for task in TASKS]
    assert page.locator("article output").all_text_contents() == expected
    assert page.locator("#stop").is_disabled()


def test_names_are_text_and_refusals_are_shown(server: Server, open_page: Callable[..., Any]) -> None:
    page = open_page(server.address)
    page.wait_for_selector("#models input")
    assert page.locator("#models label", has_text=BAD).count() == 1 + len(TASKS)
    page.fill("#filter", "nothing like it")
    assert page.locator("#models label:visible").count() == 0
    page.fill("#filter", "first_word")
    page.locator("#models label:visible").last.click()
    page.fill("#text", "fox")
    page.fill("#tokens", "99999")
    page.focus("#ask")
    page.keyboard.press("Enter")
    page.wait_for_selector("article p.bad")
    assert "the server writes at most 1024 tokens" in page.locator("article p.bad").first.text_content()
    assert page.locator("article h2", has_text=BAD).count() == 1
    assert page.title() == "dyads: tasks side by side"
    assert page.locator("img").count() == 0


def test_the_page_fits_a_phone_in_both_themes(server: Server, open_page: Callable[..., Any]) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        page = open_page(server.address, width=390, scheme=scheme)
        page.wait_for_selector("#models input")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_a_key_is_entered_on_the_page(open_page: Callable[..., Any], made: dict[str, RunFolder]) -> None:
    with served({"more": made["more"]}, limits=Limits(keys=Keys(["secret"]))) as guarded:
        page = open_page(guarded.address)
        page.wait_for_selector("#note.bad")
        assert "API key is missing" in page.locator("#note").text_content()
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("#models input")

# SPDX-License-Identifier: Apache-2.0
"""The page in a headless Chromium: no errors, figures, filters, hover, keyboard, themes, phones, injected markup."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dyads.comparing.comparison import compare
from dyads.report.page import page_of

Open = Callable[..., Any]
OPENED = "() => document.activeElement.name === 'task'"
"""Whether a link has opened the instances, whose first filter has the focus then."""


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of some runs from its file, and refuses errors on it."""
    problems: list[str] = []
    contexts = []

    def opened(
        paths: list[Path], *, width: int = 1440, scheme: str = "light", model: bool = False, at: str = ""
    ) -> Any:
        file = tmp_path / "page.html"
        file.write_text(page_of(compare(paths), model=model), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: problems.append(r.url) if not r.url.startswith("file:") else None)
        page.goto(file.as_uri() + at)
        page.wait_for_selector("html[data-ready=yes]", timeout=10_000)
        return page

    opened.problems = problems  # type: ignore[attr-defined]
    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def drawn(page: Any) -> bool:
    """Whether the heat map has more than one colour."""
    found: bool = page.evaluate(
        """() => {
            const c = document.getElementById("map");
            const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            const seen = new Set();
            for (let i = 0; i < d.length; i += 4) seen.add([d[i], d[i + 1], d[i + 2], d[i + 3]].join());
            return seen.size > 8;
        }"""
    )
    return found


def test_all_figures_are_drawn(open_page: Open, learned: list[Path]) -> None:
    page = open_page(learned, model=True)
    assert page.locator("#strips svg circle").count() == 3 * page.locator("#strips li:not(.axis)").count()
    assert page.locator("#curves polyline").count() == 3
    assert drawn(page)
    assert page.locator("#taskmap circle").count() > 2
    assert page.locator("#dendrogram polyline").count() == page.locator("#taskmap circle").count() - 1
    assert page.locator("#tokens span").count() > 3
    for method in range(3):
        page.select_option("#learned-method", str(method))
        maps = page.locator("#learned-map option").count()
        for number in range(maps):
            page.select_option("#learned-map", str(number))
            assert drawn(page), (method, number)


def test_the_tokens_change_with_the_layer_and_name_their_expert(open_page: Open, learned: list[Path]) -> None:
    page = open_page(learned, model=True)
    experts = "() => [...document.querySelectorAll('#tokens span')].map((s) => s.dataset.expert).join()"
    before = page.evaluate(experts)
    page.focus("#token-layer")
    seen = {before}
    for _ in range(6):
        page.keyboard.press("ArrowRight")
        seen.add(page.evaluate(experts))
    assert len(seen) > 1
    assert "v_proj" in page.text_content("#token-layer-name") or "proj" in page.text_content("#token-layer-name")
    page.hover("#tokens span >> nth=0")
    assert "% of the weight" in page.text_content("#tip")


def test_filters_leave_the_matching_instances(open_page: Open, fifteen: Callable[..., list[Path]]) -> None:
    paths = fifteen(tasks=3, methods=3, n=30)
    page = open_page(paths)
    comparison = compare(paths)

    def found() -> int:
        return int(page.text_content("#found").split()[0].replace(",", ""))

    assert found() == 90
    assert page.locator("#list > li").count() == 20
    page.click("#more")
    assert page.locator("#list > li").count() == 40
    page.select_option("#filters [name=task]", "1")
    assert found() == 30
    page.select_option("#filters [name=method]", "2")
    page.select_option("#filters [name=show]", "wrong")
    from dyads.runs.folder import RunFolder

    rows = [
        {p["id"]: p for p in RunFolder(column.runs[0]).predictions(comparison.tasks[1].task)}
        for column in comparison.columns
    ]
    assert found() == sum(p["scores"]["rouge_l"] < 100 for p in rows[2].values())
    page.select_option("#filters [name=show]", "all")
    page.select_option("#filters [name=against]", "1")
    assert found() == sum(p["scores"]["rouge_l"] > rows[1][i]["scores"]["rouge_l"] for i, p in rows[2].items())
    page.select_option("#filters [name=against]", "")
    answer = rows[2]["task 1-3"]["prediction"]
    page.fill("#filters [name=text]", answer.upper())
    assert found() >= 1
    page.click("#list summary >> nth=0")
    body = page.text_content("#list .body")
    assert rows[2]["task 1-3"]["prompt"] in body
    assert "the stone" in body
    for row in rows:
        assert row["task 1-3"]["prediction"] in body


def test_every_aggregate_opens_its_instances(open_page: Open, fifteen: Callable[..., list[Path]]) -> None:
    paths = fifteen(tasks=3, methods=3, n=10)
    page = open_page(paths)
    page.click("#strips li:not(.axis) >> nth=1 >> circle >> nth=2")
    page.wait_for_function(OPENED)
    chosen = page.evaluate("() => Object.fromEntries(new FormData(document.getElementById('filters')))")
    name = page.text_content("#strips li:not(.axis) >> nth=1 >> .task a")
    assert page.locator("#filters [name=task] option:checked").text_content() == name
    assert chosen["method"] == "2"
    page.focus("#order")
    page.click(".wins tbody tr >> nth=1 >> td >> nth=2 >> a")
    page.wait_for_function(OPENED)
    chosen = page.evaluate("() => Object.fromEntries(new FormData(document.getElementById('filters')))")
    assert (chosen["method"], chosen["against"], chosen["task"]) == ("1", "2", "")
    page = open_page(paths, at="#instances?task=2&method=1&show=right")
    chosen = page.evaluate("() => Object.fromEntries(new FormData(document.getElementById('filters')))")
    assert (chosen["task"], chosen["method"], chosen["show"]) == ("2", "1", "right")


def test_the_seed_chooses_the_answers(open_page: Open, fifteen: Callable[..., list[Path]]) -> None:
    page = open_page(fifteen(seeds=2))
    first = page.text_content("#list summary >> nth=0")
    page.select_option("#filters [name=seed]", "1")
    assert page.text_content("#list summary >> nth=0") != first


def test_a_tip_is_shown_for_the_mouse_and_the_keyboard(open_page: Open, learned: list[Path]) -> None:
    page = open_page(learned, model=True)
    dot = page.locator("#strips a[data-tip] >> nth=0")
    dot.hover()
    assert page.text_content("#tip") == dot.get_attribute("data-tip")
    assert page.is_visible("#tip")
    page.mouse.move(2, 2)
    assert page.is_hidden("#tip")
    dot.focus()
    assert page.is_visible("#tip")
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")
    box = page.locator("#map").bounding_box()
    page.locator("#map").scroll_into_view_if_needed()
    box = page.locator("#map").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 6, box["y"] + 5)
    assert "task " in page.text_content("#map-readout")


def test_the_page_is_used_by_keyboard(open_page: Open, learned: list[Path]) -> None:
    page = open_page(learned, model=True)
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    first = page.text_content("#map-readout")
    page.keyboard.press("ArrowDown")
    assert page.text_content("#map-readout") not in ("", first)
    page.focus("#curves")
    page.keyboard.press("ArrowRight")
    one = page.text_content("#curve-readout")
    page.keyboard.press("ArrowRight")
    assert one.startswith("step 1:")
    assert page.text_content("#curve-readout").startswith("step 2:")
    page.focus("#list summary >> nth=0")
    page.keyboard.press("Enter")
    assert page.locator("#list details[open]").count() == 1
    page.focus("#strips a >> nth=0")
    page.keyboard.press("Enter")
    page.wait_for_function(OPENED)


def test_tasks_are_sorted_by_the_chosen_order(open_page: Open, fifteen: Callable[..., list[Path]]) -> None:
    page = open_page(fifteen(tasks=6))
    names = "() => [...document.querySelectorAll('#strips li:not(.axis)')].map((l) => l.dataset.name)"
    by_spread = page.evaluate(names)
    page.select_option("#order", "name")
    assert page.evaluate(names) == sorted(by_spread) != by_spread
    page.select_option("#order", "score")
    scores = [float(score) for score in page.evaluate(names.replace("dataset.name", "dataset.score"))]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_button(scheme: str, open_page: Open, learned: list[Path]) -> None:
    page = open_page(learned, scheme=scheme)
    paper = "() => getComputedStyle(document.body).backgroundColor"
    dark, light = "rgb(18, 22, 27)", "rgb(255, 255, 255)"
    assert page.evaluate(paper) == (dark if scheme == "dark" else light)
    page.click("#theme")
    assert page.evaluate(paper) == (light if scheme == "dark" else dark)
    page.click("#theme")
    assert page.evaluate(paper) == (dark if scheme == "dark" else light)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable_on_their_ground(scheme: str, open_page: Open, learned: list[Path]) -> None:
    """Contrast of 4.5 for texts and 3 for marks (WCAG 2)."""
    page = open_page(learned, scheme=scheme)

    def luminance(name: str) -> float:
        text = page.evaluate(f"() => getComputedStyle(document.documentElement).getPropertyValue('{name}').trim()")
        digits = text.lstrip("#")
        digits = "".join(2 * c for c in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        a, b = sorted((luminance(one), luminance(other)), reverse=True)
        return (a + 0.05) / (b + 0.05)

    for name in ("--ink", "--soft", "--accent"):
        for ground in ("--paper", "--panel"):
            assert contrast(name, ground) >= 4.5, (name, ground)
    for number in range(8):
        assert contrast(f"--c{number}", "--paper") >= 3, number


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_screen(width: int, open_page: Open, learned: list[Path]) -> None:
    page = open_page(learned, width=width, model=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.click("#list summary >> nth=0")
    page.eval_on_selector_all("details", "all => all.forEach((one) => { one.open = true; })")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_injected_markup_is_inert(open_page: Open, hostile: list[Path]) -> None:
    page = open_page(hostile)
    for number in range(page.locator("#curve option").count()):
        page.select_option("#curve", str(number))
        page.focus("#curves")
        page.keyboard.press("ArrowRight")
    page.click("#list summary >> nth=0")
    assert "onerror=" in page.text_content("#list .body")
    assert page.title() != "owned"
    assert page.locator("img").count() == 0
    assert page.locator("b").count() == 0
    assert page.locator("script").count() == 2


def test_scripts_of_others_do_not_run(open_page: Open, hostile: list[Path]) -> None:
    """Also markup that reached the page would not run: the content security policy allows the page's script alone."""
    page = open_page(hostile)
    blocked = page.evaluate(
        "() => new Promise((done) => { document.addEventListener('securitypolicyviolation', () => done(true));"
        " const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s);"
        " setTimeout(() => done(false), 2000); })"
    )
    assert blocked
    assert page.title() != "1"
    assert any("Content Security Policy" in text for text in open_page.problems)  # type: ignore[attr-defined]
    open_page.problems.clear()  # type: ignore[attr-defined]

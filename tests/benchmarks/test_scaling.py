# SPDX-License-Identifier: Apache-2.0
"""Tests of the measurements behind docs/scaling.md: made-up tasks, the arithmetic, and pages that hold the results."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.large_models import Large

from benchmarks import growth, large_models, many_tasks
from dyads.tasks.files import FilesSpec


def test_made_up_tasks_are_a_file_of_own_rows_and_each_has_its_rule(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    many_tasks.write_rows(path, 9)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert Counter(row["task"] for row in rows) == {f"task-{k:04d}": 26 for k in range(9)}
    for row in rows:
        k = int(row["task"][-4:])
        word = row["input"].split()[k % 4]
        assert row["output"] == "".join(chr((ord(letter) - 97 + k // 4) % 26 + 97) for letter in word)
    suite = FilesSpec(path=str(path)).load()
    assert len(suite.tasks) == 9


def test_arithmetic_of_a_large_model() -> None:
    large = Large(weights=16_000, peak=500, layers=4, trained={})
    assert large.alone(10) == 16_000 + 120 + 500 + 600_000_000
    assert large.sharded(10, 8) == 16_120 / 8 + 4_000 + 500 + 600_000_000
    assert large.sent(10, 1) == large.sent_sharded(10, 1) == 0
    assert large.sent(10, 8) == pytest.approx(2 * 7 / 8 * 40)
    assert large.sent_sharded(10, 8) == pytest.approx(7 / 8 * (32_000 + 120))


def test_a_table_replaces_the_last_one_on_the_page() -> None:
    page = "before\n<b>\n\nold\n\n<e>\nafter"
    once = many_tasks.replaced(page, "<b>", "<e>", "new")
    assert once == "before\n<b>\n\nnew\n\n<e>\nafter"
    assert many_tasks.replaced(once, "<b>", "<e>", "new") == once


def test_the_page_holds_the_tables_of_the_result_files() -> None:
    page = many_tasks.PAGE.read_text(encoding="utf-8")
    for module in (many_tasks, growth):
        rows = json.loads(module.RESULTS.read_text(encoding="utf-8"))["rows"]
        assert module.table(rows) in page
    models = json.loads(large_models.RESULTS.read_text(encoding="utf-8"))["models"]
    assert large_models.tables({name: Large(**sizes) for name, sizes in models.items()}) in page


def test_growth_is_no_worse_than_proportional_to_tasks() -> None:
    rows = json.loads(many_tasks.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert rows[-1]["tasks"] == 1000
    for few, many in itertools.pairwise(rows):
        ratio = many["tasks"] / few["tasks"]
        for method, taken in many["methods"].items():
            assert taken["evaluate"]["seconds"] < ratio * few["methods"][method]["evaluate"]["seconds"]
            assert taken["start"] < ratio * few["methods"][method]["start"]
        for verb in ("tasks_verb", "compare", "inspect", "report"):
            assert many[verb]["seconds"] < ratio * few[verb]["seconds"]
    few, _, many = rows
    for method, taken in many["methods"].items():
        before = few["methods"][method]
        assert taken["step"] == pytest.approx(before["step"], rel=0.2), "a step takes as long"
        assert taken["train_memory"] < 1.1 * before["train_memory"]
        assert taken["evaluate"]["memory"] < 2 * before["evaluate"]["memory"]
    for verb in ("tasks_verb", "compare", "inspect", "report"):
        assert many[verb]["memory"] < 2.01 * few[verb]["memory"], "the page says that it at most doubles"

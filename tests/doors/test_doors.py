# SPDX-License-Identifier: Apache-2.0
"""docs/compatibility.md says what every door does with every method."""

from __future__ import annotations

from pathlib import Path

import pytest

from doors import COLUMNS, Door, doors
from doors.page import PAGE, read, write

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries explain what they do
HINT = "write the page anew: PYTHONPATH=src:tests python -m doors"


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some libraries write below the working directory


def check(door: Door, columns: list[str], folder: Path) -> None:
    committed = read(PAGE.read_text("utf-8")).get((door.section, door.name), {})
    for column in columns:
        assert door.cell(column, folder / column) == committed.get(column), f"{column}: {HINT}"


@pytest.mark.parametrize("number", range(len(doors())), ids=lambda n: f"{doors()[n].section}: {doors()[n].name}")
def test_cells_are_what_the_page_says(number: int, tmp_path: Path) -> None:
    check(doors()[number], list(COLUMNS)[number % 4 :: 4], tmp_path)  # each door with a few methods, and each method


@pytest.mark.slow
@pytest.mark.parametrize("door", doors(), ids=lambda d: f"{d.section}: {d.name}")
def test_every_cell_is_what_the_page_says(door: Door, tmp_path: Path) -> None:
    check(door, list(COLUMNS), tmp_path)


def test_the_page_has_these_doors_and_is_written_as_by_the_command() -> None:
    text = PAGE.read_text("utf-8")
    cells = read(text)
    assert list(cells) == [(door.section, door.name) for door in doors()], HINT
    assert write(doors(), cells) == text, HINT


def test_no_cell_is_without_a_mark_and_no_refusal_without_a_reason() -> None:
    for row in read(PAGE.read_text("utf-8")).values():
        assert list(row) == list(COLUMNS)
        assert all(cell.mark in ("✓", "no", "–") and (cell.mark == "✓") == (not cell.reason) for cell in row.values())

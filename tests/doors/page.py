# SPDX-License-Identifier: Apache-2.0
"""Page of the doors: written from their cells, and read again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from doors import COLUMNS, Cell, Door

__all__ = ["PAGE", "read", "write"]

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
INTRODUCTION = Path(__file__).with_name("introduction.md")
"""The text above the tables, which is written by hand."""
PEFTS_TESTS = Path(__file__).with_name("pefts_tests.md")
"""The text below them, too."""

Cells = Mapping[tuple[str, str], Mapping[str, Cell]]
"""By section and name of a door, and by column."""


def write(doors: list[Door], cells: Cells) -> str:
    """The page."""
    reasons: dict[str, int] = {}
    lines = [INTRODUCTION.read_text("utf-8").rstrip(), ""]
    for section in dict.fromkeys(door.section for door in doors):
        lines += [f"## {section}", "", "| | " + " | ".join(COLUMNS) + " |", "|---|" + ":-:|" * len(COLUMNS)]
        for door in doors:
            if door.section == section:
                row = cells[section, door.name]
                shown = []
                for column in COLUMNS:
                    cell = row[column]
                    number = f" ({reasons.setdefault(cell.reason, len(reasons) + 1)})" if cell.reason else ""
                    shown.append(cell.mark + number)
                lines.append(f"| {door.name} | " + " | ".join(shown) + " |")
        lines.append("")
    lines += ["## Reasons", "", *(f"{number}. {reason}" for reason, number in reasons.items()), ""]
    lines.append(PEFTS_TESTS.read_text("utf-8"))
    return "\n".join(lines)


def read(text: str) -> dict[tuple[str, str], dict[str, Cell]]:
    """The cells of a page."""
    reasons = {int(number): reason for number, reason in re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE)}
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    section, columns = "", list(COLUMNS)
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| | "):
            columns = [name.strip() for name in line.strip("|").split("|")[1:]]
        elif line.startswith("| "):
            name, *marks = (part.strip() for part in line.strip("|").split("|"))
            row = {}
            for column, text_of_cell in zip(columns, marks, strict=True):
                mark, _, number = text_of_cell.partition(" (")
                row[column] = Cell(mark, reasons[int(number.rstrip(")"))] if number else "")
            found[section, name] = row
    return found

# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """The lines of a table.

    The first `left` columns are aligned left, the others right; all left where the header is empty strings. A line
    break in a cell becomes a space.
    """
    left = left if any(header) else len(header)
    ruler = ["---" if i < left else "---:" for i in range(len(header))]
    return [_line(header), "|" + "|".join(ruler) + "|", *map(_line, rows)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

# SPDX-License-Identifier: Apache-2.0
"""Picture of the README: scores with their intervals, drawn from a table of docs/results.md.

python docs/picture.py        # writes docs/sni15.svg
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

DOCS = Path(__file__).parent
TABLE = "10 runs of packaged:smollm2-135m"
"""Start of the line above the table."""
LOW, HIGH, COLUMNS = 5.0, 35.0, 40


def rows(page: str) -> list[tuple[str, float, float, float, str]]:
    """(method, score, low, high, parameters) of every row, the highest score first."""
    _, _, after = page.partition(TABLE)
    lines = [line for line in after.splitlines()[1:] if line][2:]
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        method, score, interval, _, _, parameters, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        low, _, high = interval.partition(" to ")
        found.append((method, float(score), float(low), float(high), parameters))
    return sorted(found, key=lambda row: -row[1])


def bar(score: float, low: float, high: float) -> Text:
    """The interval as a line, with a dot at the score."""
    first, at, last = (round((value - LOW) / (HIGH - LOW) * (COLUMNS - 1)) for value in (low, score, high))
    cells = ["━" if first <= i <= last else " " for i in range(COLUMNS)]
    cells[at] = "●"
    return Text("".join(cells))


def picture() -> str:
    """The SVG."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("method")
    table.add_column("parameters", justify="right")
    table.add_column("ROUGE-L", justify="right")
    table.add_column(f"95 % interval, {LOW:.0f} to {HIGH:.0f}")
    for method, score, low, high, parameters in rows((DOCS / "results.md").read_text(encoding="utf-8")):
        trained = parameters != "–"
        style = "bold cyan" if method.startswith("LoRA") else "" if trained else "dim"
        table.add_row(method, parameters, f"{score:.1f}", bar(score, low, high), style=style)
    console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(table)
    title = "fifteen Super-NaturalInstructions tasks, one adapter, SmolLM2-135M, one seed"
    return console.export_svg(title=title, unique_id="sni15")


if __name__ == "__main__":
    (DOCS / "sni15.svg").write_text(picture(), encoding="utf-8")

# SPDX-License-Identifier: Apache-2.0
"""Tables of measured numbers, built from the file of results beside their page.

    python docs/tables.py                     # writes the tables of every page that has one
    python docs/tables.py --read FILE.md      # the tables of a Markdown file, to be put into a file of results

`docs/PAGE.json` holds {"tables": [{"source", "head", "align", "rows"}, …], "lines": […], "facts": {…}}. The tables are
in the order of the page, each found there by its head; `align` has a letter for each column, l or r; `source` says by
which command, at which commit and on which machine the numbers of this and the next tables were measured. `lines` are
those that the commands print around their tables, `facts` the numbers that sentences alone have, and what they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGES = ("export", "reliability", "results", "serving", "step-cost", "transfer")
"""Pages with a file of results; the benchmarks write those of benchmarks.md and scaling.md."""
RULES = {"l": "---", "r": "---:"}


def row_of(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def cells_of(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def lines_of(table: dict[str, Any]) -> list[str]:
    """A table of a file of results in Markdown."""
    rule = "|" + "|".join(RULES[letter] for letter in table["align"]) + "|"
    return [row_of(table["head"]), rule, *map(row_of, table["rows"])]


def results(page: str) -> dict[str, Any]:
    """The file of results of a page."""
    found: dict[str, Any] = json.loads((DOCS / f"{page}.json").read_text(encoding="utf-8"))
    return found


def built(text: str, tables: list[dict[str, Any]]) -> str:
    """The text of a page with these tables in the place of those that have the same heads, in order."""
    lines = text.splitlines()
    at = 0
    for table in tables:
        heads = [i for i in range(at, len(lines)) if lines[i][:1] == "|" and cells_of(lines[i]) == table["head"]]
        if not heads:
            raise SystemExit(f"no table with the head {row_of(table['head'])} on the page, or not in this order")
        start = end = heads[0]
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        new = lines_of(table)
        lines[start:end] = new
        at = start + len(new)
    return "\n".join(lines) + "\n"


def read(text: str) -> list[dict[str, Any]]:
    """The tables of a Markdown text as a file of results holds them."""
    tables: list[dict[str, Any]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|") and not before.startswith("|"):
            tables.append({"head": cells_of(line), "align": "", "rows": []})
        elif line.startswith("|") and not tables[-1]["align"]:
            tables[-1]["align"] = "".join("r" if cell.endswith(":") else "l" for cell in cells_of(line))
        elif line.startswith("|"):
            tables[-1]["rows"].append(cells_of(line))
        before = line
    return tables


def to_json(page: dict[str, Any]) -> str:
    """A file of results, a line for each row."""

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    tables = []
    for table in page.get("tables", ()):
        own = [f'   "{key}": {text(table[key])}' for key in ("source", "head", "align") if key in table]
        rows = ",\n".join(f"    {text(row)}" for row in table["rows"])
        tables.append("  {\n" + ",\n".join([*own, f'   "rows": [\n{rows}\n   ]']) + "\n  }")
    parts = [' "tables": [\n' + ",\n".join(tables) + "\n ]"] if tables else []
    if page.get("lines"):
        parts.append(' "lines": [\n' + ",\n".join(f"  {text(line)}" for line in page["lines"]) + "\n ]")
    if page.get("facts"):
        facts = (f"  {text(number)}: {text(what)}" for number, what in page["facts"].items())
        parts.append(' "facts": {\n' + ",\n".join(facts) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(arguments: list[str]) -> None:
    """Write the pages, or print the tables of a file."""
    if arguments[:1] == ["--read"]:
        print(to_json({"tables": read(Path(arguments[1]).read_text(encoding="utf-8"))}), end="")
        return
    for page in PAGES:
        path = DOCS / f"{page}.md"
        path.write_text(built(path.read_text(encoding="utf-8"), results(page).get("tables", [])), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

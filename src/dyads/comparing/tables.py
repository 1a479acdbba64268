# SPDX-License-Identifier: Apache-2.0
"""How does a comparison look? In the terminal, as Markdown, as CSV and as JSON.

Markdown has every name in full. The terminal never cuts a number: where the names of methods are too long to stand
above the columns they become letters, and where the columns are too many a table goes on below itself. CSV is tidy,
one line a value; JSON holds all of it.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dyads.comparing.comparable import Curve
from dyads.comparing.compare import Column, Comparison, Pair
from dyads.comparing.intervals import Interval

__all__ = ["FORMATS", "to_csv", "to_json", "to_markdown", "to_terminal"]

_Names: TypeAlias = Callable[[str], str]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MANY_PAIRS = 15


def to_terminal(comparison: Comparison, width: int = 80) -> str:
    """Tables for a terminal, coloured by escape codes; what prints them strips those where they are not wanted."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system="standard", highlight=False)
    labels = [c.label for c in comparison.columns]
    letters = {label: _letter(i) for i, label in enumerate(labels)}
    short = letters if _too_wide(comparison, labels, width) else {label: label for label in labels}

    console.print(Text(_headline(comparison), style="bold"))
    for title, header, rows in (_scores(comparison), _costs(comparison)):
        table = _table(title)
        if short is letters:
            table.add_column("")
        table.add_column(header[0], overflow="fold")
        for name in header[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for label, row in zip(labels, rows, strict=True):
            table.add_row(*([letters[label]] if short is letters else []), *row)
        console.print()
        console.print(table)

    names = _shortened([t.task for t in comparison.tasks], 27 if short is letters else 34)
    metrics = {t.metric for t in comparison.tasks}
    left = [["task", "n"], *([n, str(t.n)] for n, t in zip(names, comparison.tasks, strict=True))]
    if len(metrics) > 1:
        left = [
            [row[0], kind, row[1]]
            for row, kind in zip(left, ["metric", *(t.metric for t in comparison.tasks)], strict=True)
        ]
    title = "Scores by task" if len(metrics) > 1 else f"{metrics.pop()} by task"
    cells = [[f"{c.scores[i].value:.1f}" for c in comparison.columns] for i in range(len(comparison.tasks))]
    best = [_best([c.scores[i].value for c in comparison.columns]) for i in range(len(comparison.tasks))]
    _print_wide(console, title, left, [short[x] for x in labels], cells, best, width)

    if len(labels) > 1:
        left = [["row ahead of column"], *([short[label]] for label in labels)]
        cells = [[_win(comparison, a, b) for b in labels] for a in labels]
        _print_wide(console, "Win rates over tasks, %", left, [short[x] for x in labels], cells, [set()] * len(labels))
        console.print(Text("* p < 0.05, ** p < 0.01 against even chances (sign test over tasks)", style="dim"))
        table = _table("Differences, with paired 95 % intervals")
        for i, name in enumerate(("", "micro", "interval", "macro", "interval")):
            table.add_column(name, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
        for pair in _shown_pairs(comparison):
            cells_of = [_signed(pair.micro), _range(pair.micro), _signed(pair.macro), _range(pair.macro)]
            table.add_row(f"{short[pair.row]} − {short[pair.column]}", *cells_of)
        console.print()
        console.print(table)
    _print_notes(console, comparison)
    return re.sub(r" +((?:\x1b\[0m)?)$", r"\1", stream.getvalue(), flags=re.M)  # rich fills lines up with blanks


def to_markdown(comparison: Comparison) -> str:
    """Tables in GitHub's Markdown, every name in full; the best of a row is bold."""
    labels = [c.label for c in comparison.columns]
    out = [_headline(comparison), ""]
    _, score_header, score_rows = _scores(comparison)
    _, cost_header, cost_rows = _costs(comparison)
    both = [[*s, *c[1:]] for s, c in zip(score_rows, cost_rows, strict=True)]
    out += [*_markdown([*score_header, *cost_header[1:]], both), "", "### By task", ""]
    rows = []
    for i, task in enumerate(comparison.tasks):
        values = [c.scores[i].value for c in comparison.columns]
        best = _best(values)
        cells = [f"**{v:.1f}**" if j in best else f"{v:.1f}" for j, v in enumerate(values)]
        rows.append([task.task, task.metric, f"v{task.version}", str(task.n), *cells])
    out += [*_markdown(["task", "metric", "version", "n", *labels], rows, left=3), ""]
    if len(labels) > 1:
        out += [
            "### Win rates",
            "",
            "Share of the tasks (%) on which the row is ahead of the column, a tie counts half.",
            "",
        ]
        out += _markdown(
            ["", *labels], [[a, *(_win(comparison, a, b).replace("*", r"\*") for b in labels)] for a in labels]
        )
        out += ["", r"\* p < 0.05, \*\* p < 0.01 against even chances (sign test over tasks).", ""]
        out += ["### Differences", "", "Row minus column, with paired 95 % bootstrap intervals.", ""]
        pairs = [
            [f"{p.row} − {p.column}", _signed(p.micro), _range(p.micro), _signed(p.macro), _range(p.macro)]
            for p in _shown_pairs(comparison)
        ]
        out += [*_markdown(["", "micro", "interval", "macro", "interval"], pairs), ""]
    out += ["### Notes", "", *(f"- {note}" for note in _all_notes(comparison))]
    return "\n".join(out) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line a value: of each task, then micro and macro, for each column."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        (
            *("level", "task", "metric", "version", "n", "label", "method", "parameters", "steps", "seeds"),
            *("value", "low", "high", "train_seconds", "evaluate_seconds"),
        )
    )
    total = sum(t.n for t in comparison.tasks)
    for column in comparison.columns:
        about = [column.label, column.method, column.parameters, column.steps, " ".join(map(str, column.seeds))]
        seconds = [f"{column.train_seconds:.1f}", f"{column.evaluate_seconds:.1f}"]
        for task, score in zip(comparison.tasks, column.scores, strict=True):
            writer.writerow(["task", task.task, task.metric, task.version, task.n, *about, *_exact(score), *seconds])
        for level, score in (("micro", column.micro), ("macro", column.macro)):
            writer.writerow([level, "", "headline", "", total, *about, *_exact(score), *seconds])
    return stream.getvalue()


def to_json(comparison: Comparison) -> str:
    """Everything, numbers unrounded."""
    content = {"schema": 1, **dataclasses.asdict(comparison)}
    for column, plain in zip(comparison.columns, content["columns"], strict=True):
        plain["scores"] = dict(zip((t.task for t in comparison.tasks), plain["scores"], strict=True))
        plain["reference"] = column.reference
    for pair, plain in zip(comparison.pairs, content["pairs"], strict=True):
        plain["win_rate"] = pair.win_rate
    return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "terminal": to_terminal,
    "markdown": to_markdown,
    "csv": to_csv,
    "json": to_json,
}
"""The formats by the name that `dyads compare --format` takes."""


# --- what is shown, whatever the format -------------------------------------------------------------------------------


def _headline(comparison: Comparison) -> str:
    n = sum(t.n for t in comparison.tasks)
    runs = sum(len(c.runs) for c in comparison.columns)
    return (
        f"{_count(runs, 'run')} of {comparison.model} · {comparison.split} split · "
        f"{_count(len(comparison.tasks), 'task')}, {_count(n, 'instance')}"
    )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _scores(comparison: Comparison) -> tuple[str, list[str], list[list[str]]]:
    spread = any(len(c.seeds) > 1 for c in comparison.columns)
    header = ["method", "micro", "95 % interval", "macro", "95 % interval", *(["micro by seed"] if spread else [])]
    rows = [
        [c.label, f"{c.micro.value:.1f}", _range(c.micro), f"{c.macro.value:.1f}", _range(c.macro)]
        + ([_spread(c)] if spread else [])
        for c in comparison.columns
    ]
    return "Scores", header, rows


def _costs(comparison: Comparison) -> tuple[str, list[str], list[list[str]]]:
    header = ["method", "parameters", "seeds", "steps", "training", "scoring", "loss at end"]
    rows = [
        [
            c.label,
            f"{c.parameters:,}" if not c.reference else "–",
            str(len(c.seeds)),
            f"{c.steps:,}" if not c.reference else "–",
            _time(c.train_seconds) if not c.reference else "–",
            _time(c.evaluate_seconds),
            _loss(c.curves),
        ]
        for c in comparison.columns
    ]
    return "Cost", header, rows


def _spread(column: Column) -> str:
    if len(column.seeds) == 1:
        return "one seed"
    return f"{min(column.micro_by_seed):.1f} to {max(column.micro_by_seed):.1f}"


def _loss(curves: Sequence[Curve]) -> str:
    if not curves:
        return "–"
    mean = sum(c.last for c in curves) / len(curves)
    return f"{mean:.3f}" + (" falling" if any(c.falls for c in curves) else "")


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _range(interval: Interval) -> str:
    return f"{interval.low:.1f} to {interval.high:.1f}"


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.1f}"


def _exact(score: Interval) -> list[str]:
    return [f"{score.value:.6g}", f"{score.low:.6g}", f"{score.high:.6g}"]


def _best(values: Sequence[float]) -> set[int]:
    top = max(round(v, 1) for v in values)
    best = {i for i, v in enumerate(values) if round(v, 1) == top}
    return best if len(best) < len(values) else set()


def _win(comparison: Comparison, row: str, column: str) -> str:
    if row == column:
        return "·"
    pair = comparison.pair(row, column)
    stars = "**" if pair.p_value < 0.01 else "*" if pair.p_value < 0.05 else ""
    return f"{100 * pair.win_rate:.0f}{stars}"


def _shown_pairs(comparison: Comparison) -> list[Pair]:
    """Against the baseline; without one every pair once, or, where those are many, against the first trained column."""
    labels = [c.label for c in comparison.columns]
    baseline = comparison.baseline
    if baseline is None and len(labels) * (len(labels) - 1) / 2 > _MANY_PAIRS:
        baseline = _stand_in(comparison)
    if baseline is not None:
        return [comparison.pair(label, baseline) for label in labels if label != baseline]
    return [comparison.pair(b, a) for i, a in enumerate(labels) for b in labels[i + 1 :]]


def _stand_in(comparison: Comparison) -> str:
    return next((c.label for c in comparison.columns if not c.reference), comparison.columns[0].label)


def _all_notes(comparison: Comparison) -> list[str]:
    seeds = any(len(c.seeds) > 1 for c in comparison.columns)
    notes = [
        "micro: mean over all instances; macro: mean over tasks; both of each task's headline metric, 0 to 100",
        f"intervals: {comparison.resamples:,} bootstrap resamples of the instances within each task"
        + (" and of the seeds" if seeds else "")
        + ", the same for every method",
    ]
    k = len(comparison.columns)
    if comparison.baseline is None and k * (k - 1) / 2 > _MANY_PAIRS:
        notes.append(
            f"of {k * (k - 1) // 2} differences those from {_stand_in(comparison)} are shown; --baseline chooses"
        )
    return [*notes, *comparison.notes]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    ruler = ["---" if i < left else "---:" for i in range(len(header))]
    return [line(header), line(ruler), *(line(row) for row in rows)]


# --- terminal ---------------------------------------------------------------------------------------------------------


def _letter(i: int) -> str:
    return _LETTERS[i] if i < 26 else _LETTERS[i // 26 - 1] + _LETTERS[i % 26]


def _too_wide(comparison: Comparison, labels: Sequence[str], width: int) -> bool:
    """Whether full names above the columns (two blanks between columns) leave too little room for the tasks."""
    longest = min(34, max(len(t.task) for t in comparison.tasks))
    metric = max(len(t.metric) for t in comparison.tasks) if len({t.metric for t in comparison.tasks}) > 1 else -2
    return longest + metric + 12 + sum(max(5, len(label)) + 2 for label in labels) > width


def _shortened(names: Sequence[str], limit: int) -> list[str]:
    """Long names without their middle; in full again where two would look the same."""
    short = [n if len(n) <= limit else f"{n[: limit - 10]}…{n[-9:]}" for n in names]
    return [s if short.count(s) == 1 else n for s, n in zip(short, names, strict=True)]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)


def _print_wide(
    console: Console,
    title: str,
    left: Sequence[Sequence[str]],
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    best: Sequence[set[int]],
    width: int = 80,
) -> None:
    """A table with as many columns at a time as fit; `left` are the columns repeated in every part, head first."""
    used = sum(max(len(row[i]) for row in left) + 2 for i in range(len(left[0])))
    sizes = [max(len(h), *(len(row[j]) for row in cells)) + 2 for j, h in enumerate(header)]
    parts: list[list[int]] = [[]]
    for j, size in enumerate(sizes):
        if parts[-1] and used + sum(sizes[k] for k in parts[-1]) + size > width:
            parts.append([])
        parts[-1].append(j)
    for number, part in enumerate(parts):
        table = _table(title if not number else f"{title} (continued)")
        for name in left[0]:
            table.add_column(name, overflow="fold", justify="right" if name == "n" else "left")
        for j in part:
            table.add_column(header[j], justify="right", no_wrap=True)
        for names, row, top in zip(left[1:], cells, best, strict=True):
            table.add_row(*names, *(Text(row[j], style="bold green" if j in top else "") for j in part))
        console.print()
        console.print(table)


def _print_notes(console: Console, comparison: Comparison) -> None:
    console.print()
    for note in _all_notes(comparison):
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(Text("·", style="dim"), Text(note, style="dim"))
        console.print(grid)

# SPDX-License-Identifier: Apache-2.0
"""Tables of a comparison for the terminal, in Markdown, CSV and JSON.

Markdown has every name in full. In the terminal no number is cut: labels that are too long for column heads become
letters, and a table with too many columns continues below itself. rich measures and draws the tables, but would squeeze
or cut columns that do not fit, so dividing them stands here. CSV has one line a value; JSON holds everything.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dyads.comparing.comparison import GIVEN_TASK, Column, Comparison, Verdict
from dyads.comparing.intervals import Interval
from dyads.comparing.scored_runs import Curve
from dyads.errors import visible, visible_in
from dyads.markdown import markdown_table

__all__ = [
    "FORMATS",
    "all_notes",
    "fixed",
    "headline",
    "loss_text",
    "p_text",
    "range_text",
    "signed_text",
    "time_text",
    "to_csv",
    "to_json",
    "to_markdown",
    "to_terminal",
    "verdict_text",
]

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_STARS = "* p < 0.05, ** p < 0.01 of as wide a margin when the two change places within seeds; not corrected"
_NO_STARS = "Win rates are not tested: fewer than six common seeds give no p-value below 0.05."
_SEEDS_FOR_STARS = 6  # 2 / 2^6 is the first below 0.05


def to_terminal(comparison: Comparison, width: int = 80) -> str:
    """Tables for a terminal, coloured by escape codes, which a caller strips where they are not wanted."""
    comparison = visible_in(comparison)
    stream = io.StringIO()
    options: dict[str, Any] = {"force_terminal": True, "color_system": "standard"}
    options |= {"highlight": False, "markup": False, "emoji": False}  # names are no markup
    console = Console(file=stream, width=width, **options)
    labels = [c.label for c in comparison.columns]
    shown = [c.shown for c in comparison.columns]
    lettered = not _fits(console, _by_task(comparison, shown, range(len(labels))))
    short = dict(zip(labels, map(_letter, range(len(labels))) if lettered else shown, strict=True))

    console.print(Text(headline(comparison), style="bold"))
    for title, header, rows in (_scores(comparison), _costs(comparison)):
        table = _table(title)
        if lettered:
            table.add_column("")
        table.add_column(header[0], overflow="fold")
        for name in header[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for label, row in zip(labels, rows, strict=True):
            table.add_row(*([short[label]] if lettered else []), *row)
        _print(console, table)

    heads = list(short.values())
    _print_divided(console, len(labels), lambda part: _by_task(comparison, heads, part))
    if len(labels) > 1:
        _print_divided(console, len(labels), lambda part: _win_rates(comparison, heads, part))
        console.print(Text(_about_stars(comparison), style="dim"))
        _print(console, _differences(comparison, short))
    console.print()
    for note in all_notes(comparison):
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(Text("·", style="dim"), Text(note, style="dim"))
        console.print(grid)
    return re.sub(r" +((?:\x1b\[0m)?)$", r"\1", stream.getvalue(), flags=re.M)  # rich fills lines up with blanks


def to_markdown(comparison: Comparison) -> str:
    """Tables in GitHub's Markdown, every name in full; the best of a row is bold."""
    comparison = visible_in(comparison)
    labels = [c.label for c in comparison.columns]
    shown = {c.label: c.shown for c in comparison.columns}
    out = [headline(comparison), ""]
    _, score_header, score_rows = _scores(comparison)
    _, cost_header, cost_rows = _costs(comparison)
    both = [[*s, *c[1:]] for s, c in zip(score_rows, cost_rows, strict=True)]
    out += [*markdown_table([*score_header, *cost_header[1:]], both), "", "### By task", ""]
    rows = []
    for i, task in enumerate(comparison.tasks):
        values = [c.scores[i].value for c in comparison.columns]
        best = _best(values)
        cells = [f"**{v:.1f}**" if j in best else f"{v:.1f}" for j, v in enumerate(values)]
        rows.append([task.task, task.metric, f"v{task.version}", str(task.n), *cells])
    out += [*markdown_table(["task", "metric", "version", "n", *shown.values()], rows, left=3), ""]
    if len(labels) > 1:
        out += [
            "### Win rates",
            "",
            "Share of the tasks (%) on which the row is ahead of the column, a tie counts half.",
            "",
        ]
        out += markdown_table(
            ["", *shown.values()],
            [[shown[a], *(_win(comparison, a, b).replace("*", r"\*") for b in labels)] for a in labels],
        )
        out += ["", _about_stars(comparison).replace("*", r"\*"), ""]
        out += ["### Differences", "", f"Row minus column, {_about_intervals(comparison)}.", ""]
        header = ["", *(x for level in ("micro", "macro") for x in (level, "95 % interval", "corrected p", "verdict"))]
        pairs = [
            [
                f"{shown[p.row]} − {shown[p.column]}",
                *(
                    signed_text(p.micro),
                    range_text(p.micro),
                    p_text(p.micro_holm),
                    verdict_text(p.micro, p.micro_verdict),
                ),
                *(
                    signed_text(p.macro),
                    range_text(p.macro),
                    p_text(p.macro_holm),
                    verdict_text(p.macro, p.macro_verdict),
                ),
            ]
            for p in comparison.differences
        ]
        out += [*markdown_table(header, pairs), ""]
    out += ["### Notes", "", *(f"- {note}" for note in all_notes(comparison))]
    return "\n".join(out) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line a value: of each task, micro and macro for each column, then the differences (of label, `minus`)."""
    comparison = visible_in(comparison)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        (
            *("level", "task", "metric", "version", "n", "label", "method", "parameters", "steps", "seeds"),
            *("value", "low", "high", "train_seconds", "evaluate_seconds", "minus", "p", "corrected_p", "verdict"),
        )
    )
    total = sum(t.n for t in comparison.tasks)
    about = {
        c.label: (c.label, c.method, c.parameters, c.steps, " ".join(map(str, c.seeds))) for c in comparison.columns
    }
    for column in comparison.columns:
        rest = [f"{column.train_seconds:.1f}", f"{column.evaluate_seconds:.1f}", "", "", "", ""]
        for task, score in zip(comparison.tasks, column.scores, strict=True):
            of_task = ("task", task.task, task.metric, task.version, task.n)
            writer.writerow([*of_task, *about[column.label], *_exact(score), *rest])
        for level, score in (("micro", column.micro), ("macro", column.macro)):
            writer.writerow([level, "", "headline", "", total, *about[column.label], *_exact(score), *rest])
    for p in comparison.differences:
        for level, score, corrected, verdict in (
            ("micro", p.micro, p.micro_holm, p.micro_verdict),
            ("macro", p.macro, p.macro_holm, p.macro_verdict),
        ):
            rest = ["", "", p.column, f"{score.p:.6g}", f"{corrected:.6g}", verdict]
            writer.writerow([level, "", "headline", "", total, *about[p.row], *_exact(score), *rest])
    return stream.getvalue()


def to_json(comparison: Comparison) -> str:
    """Everything, numbers unrounded; a bound of an interval that is not known is null."""
    content = {"schema": 2, **dataclasses.asdict(dataclasses.replace(comparison, samples=()))}
    del content["samples"]
    for column, plain in zip(comparison.columns, content["columns"], strict=True):
        plain["scores"] = dict(zip((t.task for t in comparison.tasks), plain["scores"], strict=True))
        plain["reference"] = column.reference
    for pair, plain in zip(comparison.pairs, content["pairs"], strict=True):
        plain |= {"win_rate": pair.win_rate, "micro_verdict": pair.micro_verdict, "macro_verdict": pair.macro_verdict}
    return visible(json.dumps(_finite(content), ensure_ascii=False, indent=1, allow_nan=False), keep="\n") + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and math.isinf(value) else value


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "terminal": to_terminal,
    "markdown": to_markdown,
    "csv": to_csv,
    "json": to_json,
}
"""The formats by the name that `dyads compare --format` takes."""


# --- contents of all formats ----------------------------------------------------------------------------------------


def headline(comparison: Comparison) -> str:
    """Runs, model, split, tasks and instances in one line."""
    n = sum(t.n for t in comparison.tasks)
    runs = sum(len(c.runs) for c in comparison.columns)
    return (
        f"{counted(runs, 'run')} of {comparison.model} · {comparison.split} split · "
        f"{counted(len(comparison.tasks), 'task')}, {counted(n, 'instance')}"
    )


def counted(n: int, what: str) -> str:
    """A number of things: "1 run", "2,009 instances"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _scores(comparison: Comparison) -> tuple[str, list[str], list[list[str]]]:
    spread = any(len(c.seeds) > 1 for c in comparison.columns)
    header = ["method", "micro", "95 % interval", "macro", "95 % interval", *(["micro by seed"] if spread else [])]
    rows = [
        [c.shown, f"{c.micro.value:.1f}", range_text(c.micro), f"{c.macro.value:.1f}", range_text(c.macro)]
        + ([_spread(c)] if spread else [])
        for c in comparison.columns
    ]
    return "Scores", header, rows


def _costs(comparison: Comparison) -> tuple[str, list[str], list[list[str]]]:
    header = ["method", "parameters", "seeds", "steps", "training", "scoring", "loss at end"]
    rows = [
        [
            c.shown,
            f"{c.parameters:,}" if not c.reference else "–",
            str(len(c.seeds)),
            f"{c.steps:,}" if not c.reference else "–",
            time_text(c.train_seconds) if not c.reference else "–",
            time_text(c.evaluate_seconds),
            loss_text(c.curves),
        ]
        for c in comparison.columns
    ]
    return "Cost", header, rows


def _spread(column: Column) -> str:
    if len(column.seeds) == 1:
        return "one seed"
    return f"{min(column.micro_by_seed):.1f} to {max(column.micro_by_seed):.1f}"


def loss_text(curves: Sequence[Curve]) -> str:
    """The mean loss at the end, and whether it still fell."""
    if not curves:
        return "–"
    return f"{fmean(c.last for c in curves):.3f}" + (" falling" if any(c.falls for c in curves) else "")


def time_text(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def range_text(interval: Interval) -> str:
    """The bounds of an interval."""
    return f"{fixed(interval.low)} to {fixed(interval.high)}" if math.isfinite(interval.low) else "–"


def signed_text(interval: Interval) -> str:
    """The value of an interval with its sign."""
    return fixed(interval.value, "+")


def fixed(value: float, sign: str = "") -> str:
    """A number with one decimal, and 0.0 for what is rounded to it from below."""
    return f"{round(value, 1) + 0.0:{sign}.1f}"


def _exact(score: Interval) -> list[str]:
    return [f"{x:.6g}" if math.isfinite(x) else "" for x in (score.value, score.low, score.high)]


def p_text(corrected: float | None) -> str:
    """A corrected p-value."""
    assert corrected is not None, "differences that are shown have a corrected p-value"
    return "< 0.001" if corrected < 0.001 else f"{corrected:.3f}"


def verdict_text(difference: Interval, verdict: Verdict) -> str:
    """The verdict, in brackets where it is about these trained adapters alone."""
    return verdict if difference.over_seeds or verdict == "undecided" else f"({verdict})"


def _about_intervals(comparison: Comparison) -> str:
    known = {level.over_seeds for pair in comparison.differences for level in (pair.micro, pair.macro)}
    over = "instances alone" if known == {False} else "instances and seeds"
    return f"paired 95 % intervals over {over}"


def _about_stars(comparison: Comparison) -> str:
    many = {c.label for c in comparison.columns if len(c.seeds) >= _SEEDS_FOR_STARS}
    tested = any(pair.p_value is not None and {pair.row, pair.column} & many for pair in comparison.pairs)
    return _STARS if tested else _NO_STARS


def _best(values: Sequence[float]) -> set[int]:
    top = max(round(v, 1) for v in values)
    best = {i for i, v in enumerate(values) if round(v, 1) == top}
    return best if len(best) < len(values) else set()


def _win(comparison: Comparison, row: str, column: str) -> str:
    if row == column:
        return "·"
    pair = comparison.pair(row, column)
    p = 1.0 if pair.p_value is None else pair.p_value
    return f"{100 * pair.win_rate:.0f}{'**' if p < 0.01 else '*' if p < 0.05 else ''}"


def all_notes(comparison: Comparison) -> list[str]:
    """What the numbers mean, then the notes of the comparison."""
    notes = ["micro: mean over all instances; macro: mean over tasks; both of each task's headline metric, 0 to 100"]
    intervals = "intervals: Student's t over the instances of each task"
    if any(len(c.seeds) > 1 for c in comparison.columns):
        intervals += " and over seeds"
    notes.append(intervals + ", each by itself")
    family = len(comparison.differences)
    if family > 1:
        notes.append(
            f"verdicts: Holm's correction over {family} differences, so that the chance of any false 'ahead' or "
            "'behind' in a column is at most 5 %"
        )
    if any(c.given_task for c in comparison.columns):
        notes.append(
            f"{GIVEN_TASK} the gates are given the task of each instance (`task=` in use); those of others are not"
        )
    return [*notes, *comparison.notes]


# --- Markdown ---------------------------------------------------------------------------------------------------------


# --- terminal ---------------------------------------------------------------------------------------------------------


def _letter(i: int) -> str:
    return _LETTERS[i] if i < 26 else _LETTERS[i // 26 - 1] + _LETTERS[i % 26]


def _shortened(names: Sequence[str], limit: int) -> list[str]:
    """Names, the long ones without their middle unless two would then look the same."""
    short = [n if len(n) <= limit else f"{n[: limit - 10]}…{n[-9:]}" for n in names]
    return [s if short.count(s) == 1 else n for s, n in zip(short, names, strict=True)]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)


def _by_task(comparison: Comparison, heads: Sequence[str], part: Sequence[int]) -> Table:
    """Scores of some columns; names of tasks are shortened, and more so below letters."""
    columns, tasks = comparison.columns, comparison.tasks
    names = _shortened([t.task for t in tasks], 34 if heads[0] == columns[0].shown else 27)
    metrics = dict.fromkeys(t.metric for t in tasks)
    table = _table("Scores by task" if len(metrics) > 1 else f"{next(iter(metrics))} by task")
    table.add_column("task", overflow="fold")
    if len(metrics) > 1:
        table.add_column("metric", overflow="fold")
    table.add_column("n", justify="right")
    for j in part:
        table.add_column(heads[j], justify="right", no_wrap=True)
    for i, (name, task) in enumerate(zip(names, tasks, strict=True)):
        best = _best([c.scores[i].value for c in columns])
        cells = (Text(f"{columns[j].scores[i].value:.1f}", style="bold green" if j in best else "") for j in part)
        table.add_row(name, *([task.metric] if len(metrics) > 1 else []), str(task.n), *cells)
    return table


def _win_rates(comparison: Comparison, heads: Sequence[str], part: Sequence[int]) -> Table:
    labels = [c.label for c in comparison.columns]
    table = _table("Win rates over tasks, %")
    table.add_column("row ahead of column", overflow="fold")
    for j in part:
        table.add_column(heads[j], justify="right", no_wrap=True)
    for head, label in zip(heads, labels, strict=True):
        table.add_row(head, *(_win(comparison, label, labels[j]) for j in part))
    return table


def _differences(comparison: Comparison, short: Mapping[str, str]) -> Table:
    minus = {pair.column for pair in comparison.differences}
    of = f" from {short[next(iter(minus))]}" if len(minus) == 1 else ""
    table = _table(f"Differences{of}, {_about_intervals(comparison)}")
    for name in ("", "micro", "interval", "verdict", "macro", "interval", "verdict"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name), overflow="fold")
    for p in comparison.differences:
        name = short[p.row] if of else f"{short[p.row]} − {short[p.column]}"
        verdicts = [verdict_text(p.micro, p.micro_verdict), verdict_text(p.macro, p.macro_verdict)]
        micro, macro = ("–" if v == "undecided" else v for v in verdicts)
        table.add_row(
            name, signed_text(p.micro), range_text(p.micro), micro, signed_text(p.macro), range_text(p.macro), macro
        )
    return table


def _fits(console: Console, table: Table) -> bool:
    return Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width


def _print(console: Console, table: Table) -> None:
    console.print()
    console.print(table)


def _print_divided(console: Console, columns: int, table_of: Callable[[Sequence[int]], Table]) -> None:
    """A table with as many columns at a time as fit; each part repeats the names of its rows."""
    part: list[int] = []
    parts = [part]
    for j in range(columns):
        if part and not _fits(console, table_of([*part, j])):
            part = []
            parts.append(part)
        part.append(j)
    for number, part in enumerate(parts):
        table = table_of(part)
        if number:
            table.title = f"{table.title} (continued)"
        _print(console, table)

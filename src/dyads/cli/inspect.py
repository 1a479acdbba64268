# SPDX-License-Identifier: Apache-2.0
"""`dyads inspect`: sizes and modules of an adapter, and analyses of what it learned."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dyads.analysis import questions
from dyads.errors import visible, visible_in

if TYPE_CHECKING:
    from dyads.analysis.inspection import Inspection
    from dyads.analysis.named_array import Table

QUESTIONS = questions()
_WIDTH = max(map(len, ["summary", *QUESTIONS])) + 2
_HELP = f"""Show what the adapter in RUN, the folder of a run or of an adapter, is and learned.

\b
{"summary":{_WIDTH}}method, config, sizes, modules; ranks that tasks chose
{chr(10).join(f"{name:{_WIDTH}}{line}" for name, line in QUESTIONS.items())}

A model is loaded only where gates look at the layer's input (MoDE and others): for questions over a few instances of
each task, and for tokens.
"""


@click.command(
    help=_HELP,
    short_help="Show an adapter: sizes, ranks, and what it learned.",
    epilog="""\b
Examples:
  dyads inspect runs/more
  dyads inspect runs/more --layers
  dyads inspect runs/mode --what routing
  dyads inspect runs/mode --what tokens --task sort_words
  dyads inspect runs/single/* --what clusters
  dyads inspect runs/more/adapter --format csv > ranks.csv""",
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--what",
    type=click.Choice(["summary", *QUESTIONS]),
    metavar="QUESTION",
    default="summary",
    show_default=True,
    help="The question; see above.",
)
@click.option("--layers", is_flag=True, help="In the summary, also the rank of every task in every layer.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "csv"]),
    default="text",
    show_default=True,
    help="json has all details, csv one line a number.",
)
@click.option("--instances", type=click.IntRange(min=1), help="Instances of each task that are read. Default: 4.")
@click.option("--task", help="For tokens: the task. Default: the first.")
@click.option("--instance", metavar="ID", help="For tokens: the instance. Default: the first that is scored.")
def command(
    runs: tuple[Path, ...],
    what: str,
    layers: bool,
    form: str,
    instances: int | None,
    task: str | None,
    instance: str | None,
) -> None:
    """The summary, or the answer to a question."""
    width = min(120, shutil.get_terminal_size((80, 24)).columns)
    given = {"instances": instances, "task": task, "instance": instance}
    options = {name: value for name, value in given.items() if value is not None}
    _check(what, len(runs), options)
    run = runs[0]
    if what != "summary":
        if layers:
            raise click.UsageError("--layers is for the summary; --format csv has every layer")
        answer = import_module(f"dyads.analysis.{what}").answer
        result = visible_in(answer(runs if _takes(what, "runs") else run, **options))
        text = {"json": _result_json, "csv": _result_csv}[form](what, result) if form != "text" else ""
        about = str(run) if len(runs) == 1 else f"{len(runs)} runs"
        click.echo(text or _result_text(what, about, result, width), nl=False)
        return
    from dyads.analysis.inspection import inspect
    from dyads.runs.saved import SavedAdapter

    inspection = inspect(SavedAdapter.read(run))
    if form == "json":
        text = visible(_json(inspection), keep="\n")
    elif form == "csv":
        text = _csv(visible_in(inspection))
    else:
        text = _text(visible_in(inspection), layers, width)
    click.echo(text, nl=False)


def _takes(what: str, argument: str) -> bool:
    """Whether a question has an argument; the summary has none."""
    return what != "summary" and argument in signature(import_module(f"dyads.analysis.{what}").answer).parameters


def _check(what: str, runs: int, options: dict[str, Any]) -> None:
    """Refuse a number of runs or an option that is for other questions."""
    several = _takes(what, "runs")
    if several and runs < 2:
        raise click.UsageError(f"--what {what} compares runs: give two runs or more")
    if not several and runs > 1:
        others = _listed([name for name in QUESTIONS if _takes(name, "runs")])
        raise click.UsageError(f"--what {what} is about one run, and {runs} are given; several are for {others}")
    for option in options:
        if not _takes(what, option):
            others = _listed([name for name in QUESTIONS if _takes(name, option)])
            raise click.UsageError(f"--{option} is for --what {others}")


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _result_json(what: str, result: Any) -> str:
    from dyads.analysis.named_array import arrays_of

    arrays = {name: array.as_json() for name, array in arrays_of(result).items()}
    facts = {name: getattr(result, name) for name in ("task", "instance", "texts") if hasattr(result, name)}
    content = {"schema": 1, "what": what, **facts, "arrays": arrays, "notes": result.notes}
    return visible(json.dumps(content, ensure_ascii=False, allow_nan=False), keep="\n") + "\n"


def _result_csv(what: str, result: Any) -> str:
    """One line for every number of every array; an axis that an array lacks is empty."""
    from dyads.analysis.named_array import arrays_of

    arrays = arrays_of(result)
    names = list(dict.fromkeys(name for array in arrays.values() for name in array.names))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["array", *names, "value"])
    for title, array in arrays.items():
        for labels, value in array.rows():
            by_axis = dict(zip(array.names, labels, strict=True))
            number = f"{value:.6g}" if value == value else ""  # nan: there is none
            writer.writerow([title, *(by_axis.get(name, "") for name in names), number])
    return stream.getvalue()


def _result_text(what: str, about: str, result: Any, width: int) -> str:
    out = [_wrapped(visible(f"{what} of {about}"), width, bold=True)]
    for table in result.tables:
        out += _result_table(table, width)
    return "\n".join([*out, "", *(_wrapped(f"· {note}", width, indent="  ") for note in result.notes)]).rstrip() + "\n"


def _result_table(table: Table, width: int) -> list[str]:
    rows = [[text if len(text) <= 30 else f"{text[:17]}…{text[-12:]}" for text in row] for row in table.rows]
    first, *others = table.header
    return _table(table.title, [first], others, rows, width)


def _json(inspection: Inspection) -> str:
    content = {"schema": 1, **dataclasses.asdict(inspection)}
    for module, entry in zip(inspection.modules, content["modules"], strict=True):
        entry["ranks"] = dict(zip(inspection.tasks, module.ranks, strict=True)) if module.ranks else {}
    return json.dumps(content, ensure_ascii=False, indent=1, default=str) + "\n"


def _csv(inspection: Inspection) -> str:
    """One line per module, or per module and task where tasks choose ranks."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("module", "kind", "in_features", "out_features", "parameters", "largest_rank", "task", "rank"))
    for m in inspection.modules:
        about = (m.name, m.kind, m.in_features, m.out_features, m.parameters, m.rank)
        for task, rank in zip(inspection.tasks, m.ranks, strict=True) if m.ranks else [("", "")]:
            writer.writerow((*about, task, rank))
    return stream.getvalue()


def _text(inspection: Inspection, layers: bool, width: int) -> str:
    count = len(inspection.modules)
    out = [
        _wrapped(f"{inspection.method} adapter in {inspection.path}", width, bold=True),
        _wrapped(f"base model  {inspection.base_model or 'not named'}", width),
        _wrapped(f"config      {', '.join(f'{k}={_cell(v)}' for k, v in inspection.config.items())}", width),
        f"parameters  {inspection.parameters:,} in {count} module{'' if count == 1 else 's'}",
    ]
    rows = []
    for kind in inspection.kinds:
        modules = inspection.of_kind(kind)
        sizes = sorted({(m.in_features, m.out_features) for m in modules}, key=str)
        shown = ", ".join("?" if a is None else f"{a}→{b}" for a, b in sizes[:2]) + (", …" if len(sizes) > 2 else "")
        rows.append([kind, str(len(modules)), shown, f"{sum(m.parameters for m in modules):,}"])
    out += _table("Modules", ["kind"], ["modules", "in→out", "parameters"], rows, width)
    if inspection.chooses:
        out += _ranks(inspection, width)
        if layers:
            out += _by_layer(inspection, width)
        out += _agreement(inspection, width)
    elif layers:
        rows = [[m.name, f"{m.parameters:,}"] for m in inspection.modules]
        out += _table("Every module", ["module"], ["parameters"], rows, width)
    return "\n".join([*out, "", *(_wrapped(f"· {note}", width, indent="  ") for note in inspection.notes)]) + "\n"


def _ranks(inspection: Inspection, width: int) -> list[str]:
    kinds = inspection.kinds
    header = ["used", *(["all"] if len(kinds) > 1 else []), *kinds]
    rows = []
    for i, name in enumerate(_numbered(inspection.tasks)):
        cells = [f"{100 * inspection.used(i):.0f} %"]
        for kind in ([None] if len(kinds) > 1 else []) + list(kinds):
            ranks = [m.ranks[i] for m in inspection.of_kind(kind)]
            low, high = min(ranks), max(ranks)
            spread = _number(low) if low == high else f"{_number(low)}–{_number(high)}"
            cells.append(f"{sum(ranks) / len(ranks):.1f} {spread:>5}")
        rows.append([name, *cells])
    largest = sorted({m.rank or 0 for m in inspection.modules})
    of = f"{largest[0]}" if len(largest) == 1 else f"{largest[0]} to {largest[-1]}"
    title = f"Ranks by task, of {of}: mean over modules, lowest–highest"
    return _table(title, ["task"], header, rows, width)


def _by_layer(inspection: Inspection, width: int) -> list[str]:
    out = []
    for kind in inspection.kinds:
        modules = inspection.of_kind(kind)
        names = _numbered(inspection.tasks)
        rows = [[name, *(_number(m.ranks[i]) for m in modules)] for i, name in enumerate(names)]
        title = f"Ranks in every layer: {kind}"
        out += _table(title, ["task"], [m.place or "–" for m in modules], rows, width, gap=1)
    return out


def _agreement(inspection: Inspection, width: int) -> list[str]:
    """For every task the other task whose choices agree most with its own, and the one whose choices agree least."""
    tasks = inspection.tasks
    if len(tasks) < 2:
        return []
    number = {name: i for i, name in enumerate(tasks)}
    rows = []
    for i, name in enumerate(_numbered(tasks)):
        others = [
            (pair.same, -pair.apart, number[(set(pair.tasks) - {tasks[i]}).pop()])
            for pair in inspection.agreement
            if tasks[i] in pair.tasks
        ]
        cells = []
        for same, apart, other in (max(others), min(others)):
            cells.append(f"{other:2}: {100 * same:3.0f} % {-apart:5.1f}")
        rows.append([name, *cells])
    title = "Which tasks choose alike: share of modules with the same choice, ranks apart"
    return _table(title, ["task"], ["most alike", "least alike"], rows, width)


def _numbered(tasks: Sequence[str]) -> list[str]:
    """Task names with their numbers; long names lose their middle, and the numbers keep them distinct."""
    return [f"{i:2} " + (name if len(name) <= 30 else f"{name[:19]}…{name[-10:]}") for i, name in enumerate(tasks)]


def _table(
    title: str, left: list[str], header: list[str], rows: list[list[str]], width: int, gap: int = 2
) -> list[str]:
    """A table, split into parts that fit the width; every part repeats the first column."""
    first = max(len(row[0]) for row in [left, *rows])
    sizes = [max(len(name), *(len(row[j + 1]) for row in rows)) for j, name in enumerate(header)]
    parts: list[list[int]] = [[]]
    for j in range(len(header)):
        if parts[-1] and first + sum(sizes[k] + gap for k in [*parts[-1], j]) > width:
            parts.append([])
        parts[-1].append(j)
    out = []
    for number, part in enumerate(parts):
        out += ["", click.style(f"{title} (continued)" if number else title, bold=True)]
        for cells in [[*left, *header], *rows]:
            columns = (" " * gap + f"{cells[j + 1]:>{sizes[j]}}" for j in part)
            out.append(f"{cells[0]:{first}}" + "".join(columns))
    return out


def _wrapped(text: str, width: int, *, indent: str = " " * 12, bold: bool = False) -> str:
    wrapped = click.wrap_text(text, width=width, subsequent_indent=indent)
    return click.style(wrapped, bold=True) if bold else wrapped


def _number(rank: float) -> str:
    return str(rank) if isinstance(rank, int) else f"{rank:.1f}"  # soft gates have expected ranks


def _cell(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)

# SPDX-License-Identifier: Apache-2.0
"""`dyads show`: scored instances of a run, with prompt, answer, reference and score."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dyads.console import json_line, print_to, printable

if TYPE_CHECKING:
    from rich.console import Console

    from dyads.runs.contents import Prediction, ScoreRow
    from dyads.runs.folder import RunFolder

_LONGEST = 1200
"""Characters of a prompt that are shown without --whole."""
_REFERENCES = 5


@click.command(
    short_help="Print scored instances of a run.",
    epilog="""\b
Examples:
  dyads show runs/demo/mode                           # its tasks
  dyads show runs/demo/mode --task sort_words         # five of its instances
  dyads show runs/demo/mode --task sort_words --wrong --n 20
  dyads show runs/demo/mode --task sort_words --wrong --json > wrong.jsonl""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--task", help="The task. Default: the run's only one; where it has several, they are listed.")
@click.option("--wrong", is_flag=True, help="Only instances below full score, the worst first.")
@click.option("--n", "count", type=click.IntRange(min=1), help="Instances. Default: 5, with --json all.")
@click.option("--whole", is_flag=True, help="Print long prompts whole.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per instance.")
def command(run: Path, task: str | None, wrong: bool, count: int | None, whole: bool, as_json: bool) -> None:
    """Print instances of the last evaluation of RUN: prompt, answer, reference and score."""
    from rich.console import Console

    from dyads.comparing.metric_moments import instance_score
    from dyads.errors import RunError, did_you_mean
    from dyads.runs.folder import RunFolder

    folder = RunFolder.open(run)
    headlines = {row["task"]: row for row in folder.scores()["scores"] if row["headline"]}
    if task is None and len(headlines) == 1:
        task = next(iter(headlines))
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if task is None:
        _list(console, folder, list(headlines.values()))
        return
    if task not in headlines:
        raise RunError(f"'{folder.path}' has no scores of a task '{task}'{did_you_mean(task, headlines)}")
    headline = headlines[task]
    found = folder.predictions(task)
    values = [instance_score(prediction, headline) for prediction in found]
    order = list(range(len(found)))
    below = [i for i in order if values[i] < 100]
    if wrong:
        order = sorted(below, key=lambda i: values[i])
    shown = [found[i] for i in order[: count or (None if as_json else 5)]]
    if as_json:
        for prediction in shown:
            click.echo(json_line({"task": task, **prediction}))
        return
    title = f"{task}: {headline['metric']} {headline['value']:.1f}, {len(below)} of {len(found)} below full score"
    print_to(console, printable(title), style="bold")
    for prediction in shown:
        _show(console, prediction, instance_score(prediction, headline) >= 100, whole)
    if wrong and not below:
        print_to(console, "no instance is below full score")
    elif len(shown) < len(order):
        print_to(console, f"\n{len(shown)} of {len(order)} shown; --n {len(order)} shows all", style="dim")


def _list(console: Console, folder: RunFolder, headlines: Sequence[ScoreRow]) -> None:
    from rich.table import Table
    from rich.text import Text

    from dyads.comparing.metric_moments import instance_score

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    for name in ("score", "n", "below full"):
        table.add_column(name, justify="right")
    for row in headlines:
        below = sum(instance_score(prediction, row) < 100 for prediction in folder.predictions(row["task"]))
        table.add_row(Text(printable(row["task"])), row["metric"], f"{row['value']:.1f}", str(row["n"]), str(below))
    print_to(console, table)
    print_to(console, f"\ndyads show {folder.path} --task TASK --wrong prints those below full score", soft_wrap=True)


def _show(console: Console, prediction: Prediction, right: bool, whole: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    scores = ", ".join(f"{metric} {value:.1f}" for metric, value in prediction["scores"].items())
    print_to(console, f"\n{printable(str(prediction['id']))}" + f"  {scores}" * bool(scores), style="bold")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    references = [printable(reference) for reference in prediction["references"]]
    more = len(references) - _REFERENCES
    table.add_row("  prompt", Text(_prompt(prediction, whole)))
    table.add_row("  answer", Text(printable(prediction["prediction"]) or "(empty)", style="green" if right else "red"))
    for number, reference in enumerate(references[:_REFERENCES]):
        table.add_row("  reference" if number == 0 else "  or", Text(reference))
    if more > 0:
        table.add_row("", f"… and {more} more")
    print_to(console, table)


def _prompt(prediction: Prediction, whole: bool) -> str:
    if "prompt" not in prediction:
        return "(not kept by this evaluation; `dyads evaluate` again keeps it)"
    text = printable(prediction["prompt"]).rstrip("\n")
    if whole or len(text) <= _LONGEST:
        return text
    start, end = text[: _LONGEST * 2 // 3], text[-_LONGEST // 3 :]
    return f"{start}\n… {len(text) - len(start) - len(end):,} characters left out; --whole prints them …\n{end}"

# SPDX-License-Identifier: Apache-2.0
"""The verb `dyads compare`: tables of scored runs side by side, with intervals and win rates."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from dyads.console import printable


@click.command(
    short_help="Compare runs, task by task and over all.",
    epilog="""\b
Examples:
  dyads compare runs/demo                       # every run in that folder
  dyads compare runs/demo/lora runs/demo/mode   # these two
  dyads compare runs/demo --baseline "LoRA 9" --out results.md""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["terminal", "markdown", "csv", "json"]),
    help="Default: terminal, or by the ending of --out (md, csv, json).",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write there instead of the screen.")
@click.option("--baseline", metavar="LABEL", help="Show differences from this run name only.")
def command(runs: tuple[Path, ...], form: str | None, out: Path | None, baseline: str | None) -> None:
    """Compare runs, task by task and over all.

    RUN is the folder of a run, or one that holds runs: then all that have scores are taken, and the others named.
    Runs of one name are one column, over their seeds. Runs scored on other tasks, instances or models are refused;
    other differences (budget, learning rate, …) are noted below the tables.

    Intervals cover instances and, with two or more seeds, seeds. Verdicts are corrected for the number of differences.
    """
    from dyads.comparing.comparison import compare
    from dyads.comparing.tables import FORMATS, to_terminal
    from dyads.errors import RunError
    from dyads.runs.manifest import write_output

    endings = {".md": "markdown", ".csv": "csv", ".json": "json"}
    form = form or (endings.get(out.suffix, "markdown") if out else "terminal")
    if out is not None and not out.absolute().parent.is_dir():  # refused before the work, not after
        raise RunError(f"cannot write '{out}': there is no folder '{out.parent}'")
    comparison = compare(runs, baseline=baseline)
    if form == "terminal":
        text = to_terminal(comparison, width=shutil.get_terminal_size((80, 24)).columns)
    else:
        text = FORMATS[form](comparison)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_output(out, click.unstyle(text))
        click.echo(printable(f"written to {out}"), err=True)

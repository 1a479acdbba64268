# SPDX-License-Identifier: Apache-2.0
"""`dyads study`: a grid of runs from one file, and verdicts on the claims that it decides."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dyads.cli import command_line, reports
from dyads.console import Reporter, Styled, printable

if TYPE_CHECKING:
    from dyads.studies.outcome import Outcome
    from dyads.studies.run import Runner


def _show_keys(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from dyads.studies.spec import study_keys

    for key in study_keys():
        click.echo(click.wrap_text(f"{key.name}{f' = {key.default}' if key.default else ''}", subsequent_indent="  "))
        click.echo(click.wrap_text(key.help, initial_indent="    ", subsequent_indent="    "))
    ctx.exit()


@click.command(
    short_help="Run a grid of recipes and decide claims about them.",
    epilog="""\b
A small study:
  name: first
  recipe: base.yaml
  vary:
    method:
      LoRA: {method: {name: lora, r: 9}}
      MoDE: {method: {name: mode, r: 4, num_experts: 2}}
    seed: [0, 1, 2, 3, 4]
  budget: {like: LoRA, within: 3}
  claims:
    - {ahead: MoDE, of: LoRA, by: 1, on: macro}
\b
Examples:
  dyads study first.yaml --workers 2
  dyads study first.yaml --status        # what is done, and the time left
  dyads study first.yaml --only '*seed0' # some of the cells
  dyads study --keys                     # what a study can hold""",
)
@click.argument("study", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="local: processes of this machine. ray: tasks of Ray (pip install 'dyads[study]').",
)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="The cells whose names match alone, such as 'MoDE-*' or '*seed0'; repeatable.",
)
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override a key of every recipe; repeatable.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="The study's folder. Default: runs/studies/NAME."
)
@click.option("--status", is_flag=True, help="Show the grid and the time left; run nothing.")
@click.option(
    "--keys", is_flag=True, is_eager=True, expose_value=False, callback=_show_keys, help="List every key of a study."
)
@reports
@click.pass_context
def command(
    ctx: click.Context,
    study: Path,
    workers: int,
    engine: str,
    only: tuple[str, ...],
    overrides: tuple[str, ...],
    out: Path | None,
    status: bool,
    reporter: Reporter,
) -> None:
    """Run the grid of recipes that STUDY, a YAML file, describes, and decide its claims.

    Every cell of the grid is an ordinary run folder. Started again, a study keeps what is done and continues what was
    interrupted. It ends in tables, curves and a verdict for each claim, also written to verdict.md and verdict.json.
    """
    from dyads.runs.signals import TerminatedError, ends_by_signal
    from dyads.studies.grid import load_study
    from dyads.studies.progress import StudyFolder
    from dyads.studies.run import Runner

    loaded = load_study(study, overrides)
    runner = Runner(loaded, StudyFolder(out or Path("runs") / "studies" / loaded.spec.name), only)
    if status:
        _report_status(runner, workers, reporter)
        return
    counts = runner.check()
    for line in _counted(runner, counts):
        reporter.note("counted", line)
    try:
        with ends_by_signal():
            outcome = runner.run(workers=workers, engine=engine, reporter=reporter)
    except (KeyboardInterrupt, TerminatedError):
        states = runner.states().values()
        done = sum(s.state == "done" for s in states)
        again = command_line(ctx)
        click.echo(printable(f"\ninterrupted, {done} of {len(states)} runs done\nTo continue:\n  {again}"), err=True)
        ctx.exit(130)
    _report_outcome(runner, outcome, reporter)
    if runner.failed:
        ctx.exit(1)


def _counted(runner: Runner, counts: dict[str, int]) -> list[str]:
    """A line for every method and table; seeds do not differ."""
    lines = [
        f"{', '.join([cell.label, *(v.name for v in runner.study.table_of(combination))])}:"
        f" {counts[cell.name]:,} parameters"
        for combination, cell in runner.cells.items()
        if cell.name in counts
    ]
    return list(dict.fromkeys(lines))


def _printed(*parts: Any) -> Styled:
    """Tables and texts as a terminal shows them; without colours where standard output is none."""
    import io
    import shutil

    from rich.console import Console

    stream = io.StringIO()
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((100, 24)).columns
    console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False, force_terminal=terminal)
    for part in parts:
        if callable(part):
            text = part(width)
            stream.write(text if terminal else click.unstyle(text))
        else:
            console.print(printable(part) if isinstance(part, str) else part)
    return Styled("\n".join(line.rstrip() for line in stream.getvalue().splitlines()))


def _report_status(runner: Runner, workers: int, reporter: Reporter) -> None:
    from dyads.console import duration
    from dyads.studies.progress import grid_table, seconds_left

    cells, of_all = runner.selected(), runner.states()
    waiting = runner.waiting() & {runner.study.group_of(combination) for combination in cells}
    states = {cell.name: of_all[cell.name] for cell in cells.values()}
    count = {
        state: sum(s.state == state for s in states.values())
        for state in ("done", "running", "interrupted", "failed", "left")
    }
    lines = [", ".join(f"{n} {state}" for state, n in count.items() if n or state == "done")]
    left = seconds_left(runner.distinct().values(), of_all, workers, states)
    if count["done"] < len(states):
        at_once = f", {workers} at a time" if workers > 1 else ""
        beside = " and the trials of choose" if waiting else ""
        lines.append(f"time left: {duration(left) if left is not None else 'unknown'}{at_once}{beside}")
    lines += [
        f"{name} failed: {state.reason} ({runner.folder.path / 'logs' / name}.txt)"
        for name, state in states.items()
        if state.state == "failed"
    ]
    changed = runner.changed()
    lines += [f"another recipe in {line}" for line in changed]
    text = _printed(grid_table(runner.study, cells, states, waiting), "\n".join(lines))
    facts = {name: {"state": s.state, "step": s.step, "macro": s.score} for name, s in states.items()}
    reporter.result("status", text, runs=facts, seconds_left=left, changed=changed, **count)


def _report_outcome(runner: Runner, outcome: Outcome, reporter: Reporter) -> None:
    import json

    from dyads.comparing.tables import to_terminal
    from dyads.studies.outcome import choices_table, claims_table, curves_table, of_other_recipes, to_json

    parts: list[Any] = []
    for table, comparison in outcome.comparisons.items():
        title = ", ".join(f"{value.axis} {value.name}" for value in table)
        parts += [f"\n{title}"] if title else []
        parts.append(lambda width, shown=comparison: to_terminal(shown, width=width))
        if curves := curves_table(outcome, table):
            parts += ["", curves]
    if outcome.choices:
        parts += ["", choices_table(outcome)]
    if outcome.judgements:
        parts += ["", claims_table(outcome)]
    parts += [of_other_recipes(outcome)] if outcome.changed else []
    parts += ["", *(f"{name} failed: {reason}" for name, reason in runner.failed.items())]
    parts.append(f"written to {runner.folder.verdict_md} and {runner.folder.verdict_json}")
    reporter.result("studied", _printed(*parts), **json.loads(to_json(outcome)))

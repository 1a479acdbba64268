# SPDX-License-Identifier: Apache-2.0
"""`dyads train`: training and scoring of one recipe, into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from dyads.cli import reports, resumable
from dyads.console import Reporter


def _show_keys(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from dyads.recipe.load import recipe_keys

    for key in recipe_keys():
        variant = len(key.choices) == 1
        value_text = f": {key.choices[0]}" if variant else f" = {key.default}" if key.default else ""
        click.echo(click.wrap_text(f"{key.name}{value_text}", subsequent_indent="        "))
        choices = [f"One of: {', '.join(key.choices)}"] if key.choices and not variant else []
        for text in (*choices, key.help):
            click.echo(click.wrap_text(text, initial_indent="    ", subsequent_indent="    "))
    ctx.exit()


@click.command(
    short_help="Train and score the adapter of a recipe.",
    epilog="""\b
The smallest recipe:
  name: mode-16x4
  model: {name: packaged:smollm2-135m}
  method: {name: mode, r: 4, num_experts: 16}
  tasks: {family: starter}
\b
Examples:
  dyads train recipes/demo/mode.yaml
  dyads train recipes/demo/mode.yaml --set seed=1 --set train.steps=200
  dyads train recipes/demo/mode.yaml --resume    # continue an interrupted run
  dyads train --keys                             # what a recipe can hold
  dyads methods                                  # what `method:` can hold
  dyads tasks --family starter                   # what `tasks:` gives""",
)
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override a key of the recipe; repeatable.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="The run's folder. Default: runs/NAME-seedSEED."
)
@click.option(
    "--resume",
    flag_value=True,
    default=False,
    type=click.UNPROCESSED,
    help="Continue the run in that folder from its last checkpoint.",
)
@click.option(
    "--auto-resume",
    "resume",
    flag_value="auto",
    type=click.UNPROCESSED,
    help="Continue the run in that folder if there is one, else start it.",
)
@click.option("--no-evaluate", is_flag=True, help="Train only; `dyads evaluate` scores later.")
@click.option(
    "--keys", is_flag=True, is_eager=True, expose_value=False, callback=_show_keys, help="List every key of a recipe."
)
@reports
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool | Literal["auto"],
    no_evaluate: bool,
    reporter: Reporter,
) -> None:
    """Train and score the adapter that RECIPE, a YAML file, describes."""
    reporter.waiting(f"reading {recipe}, its tasks and its model")
    from dyads.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    out = out or Path("runs") / f"{loaded.name}-seed{loaded.seed}"
    with resumable(out):
        from dyads.training.train import train

        folder = train(loaded, out, resume=resume, evaluate=not no_evaluate, reporter=reporter)
    if not folder.is_scored:
        text = f"{folder.path}: not scored\nnext: dyads evaluate {folder.path}"
        reporter.result("trained", text, run=str(folder.path))
        return
    scores = folder.scores()
    micro, macro = (scores[level]["headline"] for level in ("micro", "macro"))
    tasks = {row["task"]: row["value"] for row in scores["scores"] if row["headline"]}
    text = f"{folder.path}: micro {micro:.1f}, macro {macro:.1f}\nnext: dyads compare {folder.path} OTHER…"
    reporter.result("scored", text, run=str(folder.path), micro=micro, macro=macro, tasks=tasks)

# SPDX-License-Identifier: Apache-2.0
"""`dyads tasks`: list of a suite's tasks with their sizes and metrics."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click

from dyads.console import printable
from dyads.errors import visible


@click.command(
    short_help="List the tasks of a family or recipe.",
    epilog="""\b
Examples:
  dyads tasks --family starter
  dyads tasks --family sni --path natural-instructions
  dyads tasks --family sni --path natural-instructions --option track=xlingual
  dyads tasks --recipe recipes/demo/mode.yaml --show reverse_words""",
)
@click.option("--family", help="A family of tasks: starter, sni, files, …")
@click.option("--path", help="The folder or file of the tasks' data.")
@click.option(
    "--option", "options", multiple=True, metavar="KEY=VALUE", help="Another option of the family; repeatable."
)
@click.option("--recipe", type=click.Path(dir_okay=False, path_type=Path), help="The tasks of this recipe instead.")
@click.option("--show", metavar="TASK", help="Print a task's first example of each split instead of the list.")
def command(
    family: str | None, path: str | None, options: tuple[str, ...], recipe: Path | None, show: str | None
) -> None:
    """List the tasks of a family or recipe: id, name, sizes, metric, version and fingerprint."""
    from dyads.errors import ConfigError, TaskError, did_you_mean
    from dyads.recipe.load import parse_tasks
    from dyads.recipe.yaml_source import YamlSource, read_file, read_overrides

    if (family is None) == (recipe is None):
        raise click.UsageError("give either --family or --recipe")
    chosen = YamlSource({}, {}) if recipe is None else read_file(recipe)
    given = read_overrides(options, "--option")
    for key, value in (("family", family), ("path", path)):
        if value is not None and key in given.data:
            raise ConfigError(f"--{key} {value} and --option {key}={given.data[key]} are both given: remove one")
        if value is not None:
            chosen = YamlSource({"tasks": {key: value}}, {("tasks", key): f"--{key} {value}"}).over(chosen)
    if options:
        origins = {("tasks", *place): origin for place, origin in given.origins.items()}
        chosen = YamlSource({"tasks": given.data}, origins).over(chosen)
    source = f"--family {family}" if recipe is None else str(recipe)
    suite = parse_tasks(chosen, source, _how_to_give).load()
    if show is not None:
        found = [task for task in suite.tasks if task.name == show]
        if not found:
            raise TaskError(f"there is no task '{show}'{did_you_mean(show, [t.name for t in suite.tasks])}")
        for split in ("train", "validation", "test"):
            for example in found[0].split(split)[:1]:
                click.secho(f"{split}, {visible(example.id)}", bold=True)
                reference = click.style(printable(example.references[0]), fg="green")
                click.echo(f"{printable(example.prompt)}{reference}\n")
        return
    names = [visible(task.name) for task in suite.tasks]
    width = max(map(len, names), default=4)
    wide = max([len("metric"), *(len(task.metric) for task in suite.tasks)])
    between = "  "

    def row(number: int | str, name: str, sizes: str, metric: str, version: str) -> str:
        return f"{number:>4}  {name:{width}}{between}{sizes}  {metric:{wide}}  {version}"

    header = ("id", "task", f"{'train':>7} {'valid.':>7} {'test':>7}", "metric")
    if sys.stdout.isatty() and len(row(*header, "1 (0123456789ab)")) > shutil.get_terminal_size().columns:
        between, width = "\n    ", 0  # long names have lines of their own
    click.secho(row(*header, "version"), bold=True)
    for i, (name, task) in enumerate(zip(names, suite.tasks, strict=True)):
        sizes = f"{len(task.train):7,} {len(task.validation):7,} {len(task.test):7,}"
        click.echo(row(i, name, sizes, task.metric, f"{task.version} ({task.fingerprint()})"))
    for note in suite.notes:
        click.echo(visible(f"· {note}"))


def _how_to_give(key: str) -> str:
    known = {"path": "add --path", "tasks": "add it to the recipe, or use --family"}
    return known.get(key, f"add --option {key}=…")

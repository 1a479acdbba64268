# SPDX-License-Identifier: Apache-2.0
"""`dyads adapt`: a trained adapter learns a new task from a few examples."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    short_help="Teach a trained adapter a new task from a few examples.",
    epilog="""\b
A task is a file of your own (JSONL or CSV, as for `tasks: {family: files}`),
or a recipe (YAML) whose section `tasks` names it; what else stands in that
recipe, such as `train`, holds here too.
\b
Examples:
  dyads adapt runs/demo/more --task new.jsonl --shots 16
  dyads adapt runs/demo/more --task new.jsonl --start mean --parts all
  dyads adapt runs/glue/mode --task recipes/glue-transfer/cb.yaml --shots 4 \\
    --parts all --set train.learning_rate=1e-3""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--task", "source", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSONL, CSV or a recipe."
)
@click.option("--shots", type=click.IntRange(min=1), help="Training examples of the new task. Default: all of them.")
@click.option(
    "--parts",
    type=click.Choice(["task", "gate", "all"]),
    help="What trains: what is kept for the new task alone, so that old tasks stay as they are to the bit; also"
    " routers and gates; or everything that the run trained. Default: task.",
)
@click.option(
    "--start",
    type=click.Choice(["nearest", "mean", "fresh"]),
    help="What the new task starts as: the most similar task, the mean of all, or drawn anew. Default: nearest where"
    " the method can tell (it has a contrastive loss), else mean.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Chooses the examples. Default: the run's.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override a key of the recipe; repeatable.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="The new run's folder. Default: RUN-FILE-SHOTS."
)
@click.option("--resume", is_flag=True, help="Go on with the run in that folder, from its last checkpoint.")
@click.option("--no-evaluate", is_flag=True, help="Train only; `dyads evaluate` scores later.")
def command(
    run: Path,
    source: Path,
    shots: int | None,
    parts: str | None,
    start: str | None,
    seed: int | None,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    no_evaluate: bool,
) -> None:
    """Teach the adapter in the folder RUN a new task, into a run of its own; RUN stays as it is.

    It trains for 100 steps, with the run's other settings and batches of at most 16, unless the recipe or --set says
    otherwise.
    """
    from dyads.runs.folder import RunFolder

    RunFolder.open(run)  # refused before torch is imported
    from dyads.training.adapt import adapt_recipe
    from dyads.training.train import train

    given = {"shots": shots, "parts": parts, "start": start}
    recipe = adapt_recipe(run, source, {k: v for k, v in given.items() if v is not None}, overrides, seed=seed)
    here = run if run.name else run.resolve()
    out = out or here.with_name("-".join([here.name, source.stem, *([str(shots)] if shots else [])]))
    folder = train(recipe, out, resume=resume, evaluate=not no_evaluate)
    started = [line for line in folder.log() if line.get("event") == "adapted"][-1]  # again where it was resumed
    for task, scores in started.get("similarity", {}).items():
        (best, score), *others = scores.items()
        runner_up = f"; next {others[0][0]} {others[0][1]:.3f}" if others else ""
        click.echo(f"{task} starts as its most similar task, {best} ({score:.3f}{runner_up})")
    if not folder.is_scored:
        click.echo(f"{folder.path}: not scored; next: dyads evaluate {folder.path}")
        return
    for row in folder.scores()["scores"]:
        if row["headline"]:
            click.echo(f"{row['task']}: {row['metric']} {row['value']:.1f}, n={row['n']}")
    click.echo(f"{folder.path}: next: dyads compare {folder.path} OTHER…")

# SPDX-License-Identifier: Apache-2.0
"""`dyads adapt`: few-shot training of a trained adapter on a new task."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from dyads.cli import reports, resumable
from dyads.console import Reporter
from dyads.errors import visible


@click.command(
    short_help="Teach a trained adapter a new task from a few examples.",
    epilog="""\b
The task is a JSONL or CSV file of examples (as for `tasks: {family: files}`),
or a recipe (YAML) with a section `tasks`; its section `train` and others
override those of the run.
\b
Examples:
  dyads adapt runs/demo/mtl-lora --task new.jsonl --shots 16
  dyads adapt runs/demo/mtl-lora --task new.jsonl --start mean --parts all
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
    help="What trains: the parameters of the new task alone, which leaves answers to known tasks bit-identical; all"
    " routers and gates; or everything that the run trained. Default: task.",
)
@click.option(
    "--start",
    type=click.Choice(["nearest", "mean", "fresh"]),
    help="How the new task's parameters start: as those of the most similar task, as the mean of all tasks, or random."
    " Default: nearest where the run has a contrastive loss, else mean.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Chooses the examples. Default: the run's.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override a key of the recipe; repeatable.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="The new run's folder. Default: RUN-FILE-SHOTS."
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
@reports
def command(
    run: Path,
    source: Path,
    shots: int | None,
    parts: str | None,
    start: str | None,
    seed: int | None,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool | Literal["auto"],
    no_evaluate: bool,
    reporter: Reporter,
) -> None:
    """Train the adapter of the folder RUN on a new task, into a new run; RUN is unchanged.

    Defaults are 100 steps, batches of at most 16 examples, and otherwise the settings of RUN; the recipe and --set
    override them.
    """
    from dyads.runs.folder import RunFolder

    RunFolder.open(run)  # a missing run is refused before torch is imported
    reporter.waiting(f"reading {run} and {source}")
    from dyads.training.adapt import adapt_recipe

    given = {"shots": shots, "parts": parts, "start": start}
    recipe = adapt_recipe(run, source, {k: v for k, v in given.items() if v is not None}, overrides, seed=seed)
    here = run if run.name else run.resolve()
    out = out or here.with_name("-".join([here.name, source.stem, *([str(shots)] if shots else [])]))
    with resumable(out):
        from dyads.training.train import train

        folder = train(recipe, out, resume=resume, evaluate=not no_evaluate, reporter=reporter)
    started = [{}, *(line for line in folder.log() if line.get("event") == "adapted")][-1]  # one per resumption
    similarity = started.get("similarity", {})
    lines = []
    for task, scores in similarity.items():
        if not scores:
            continue
        (best, score), *others = scores.items()
        runner_up = f"; next {others[0][0]} {others[0][1]:.3f}" if others else ""
        lines.append(visible(f"{task} starts as its most similar task, {best} ({score:.3f}{runner_up})"))
    facts = {"run": str(folder.path), "similarity": similarity}
    if not folder.is_scored:
        lines += [f"{folder.path}: not scored", f"next: dyads evaluate {folder.path}"]
        reporter.result("trained", "\n".join(lines), **facts)
        return
    rows = [row for row in folder.scores()["scores"] if row["headline"]]
    lines += [visible(f"{row['task']}: {row['metric']} {row['value']:.1f}, n={row['n']}") for row in rows]
    lines.append(f"next: dyads compare {folder.path} OTHER…")
    reporter.result("scored", "\n".join(lines), **facts, tasks={row["task"]: row["value"] for row in rows})

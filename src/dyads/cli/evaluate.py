# SPDX-License-Identifier: Apache-2.0
"""`dyads evaluate`: score the adapter of a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    short_help="Score the adapter of a run.",
    epilog="""\b
Examples:
  dyads evaluate runs/demo/mode
  dyads evaluate runs/demo/mode --split validation --limit 50""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--split", help="test, validation or train. Default: the recipe's.")
@click.option("--limit", type=click.IntRange(min=1), help="Instances per task. Default: the recipe's.")
def command(run: Path, split: str | None, limit: int | None) -> None:
    """Score the adapter in the folder RUN on all its tasks, replacing earlier scores."""
    from dyads.runs.folder import RunFolder

    folder = RunFolder.open(run)  # refused before torch is imported
    from dyads.runs.evaluate import evaluate

    scores = evaluate(folder, split=split, limit=limit)
    rows = [row for row in scores["scores"] if row["headline"]]
    width = max(len(row["task"]) for row in rows)
    for row in rows:
        click.echo(f"{row['task']:{width}}  {row['metric']:11}  {row['value']:6.1f}  n={row['n']}")
    click.echo(
        f"micro {scores['micro']['headline']:.1f}, macro {scores['macro']['headline']:.1f}, {scores['split']} split"
    )

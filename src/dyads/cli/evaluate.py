# SPDX-License-Identifier: Apache-2.0
"""`dyads evaluate`: score the adapter of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dyads.cli import reports
from dyads.console import Reporter
from dyads.errors import visible

if TYPE_CHECKING:
    from dyads.tasks import FamilySpec


@click.command(
    short_help="Score the adapter of a run.",
    epilog="""\b
--tasks takes other tasks than the run's own from a recipe, a .jsonl or .csv
file (`dyads tasks --family files`) or another run. Where gates depend on the
task and do not know it, --unseen decides: refuse it, answer it as the nearest
known task (by a few inputs or by description), or with the mean of all known
tasks. An encoder has no head for such a task: `dyads adapt` learns one.
\b
Examples:
  dyads evaluate runs/demo/mode
  dyads evaluate runs/demo/mode --split validation --limit 50
  dyads evaluate runs/more --tasks new.jsonl --unseen nearest --out runs/new""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--split", help="test, validation or train. Default: the recipe's.")
@click.option("--limit", type=click.IntRange(min=1), help="Instances per task. Default: the recipe's.")
@click.option("--tasks", type=click.Path(path_type=Path), help="Other tasks: a recipe, .jsonl, .csv, or a run.")
@click.option("--unseen", type=click.Choice(["error", "nearest", "mean"]), help="Default: the recipe's, or error.")
@click.option("--nearest-by", type=click.Choice(["inputs", "description"]), help="Default: the recipe's, or inputs.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the scores to this new run folder, without an adapter; needed with --tasks.",
)
@reports
def command(
    run: Path,
    split: str | None,
    limit: int | None,
    tasks: Path | None,
    unseen: str | None,
    nearest_by: str | None,
    out: Path | None,
    reporter: Reporter,
) -> None:
    """Score the adapter in the folder RUN on all its tasks, replacing earlier scores, or on others."""
    from dyads.runs.folder import RunFolder

    folder = RunFolder.open(run)  # a missing run is refused before torch is imported
    how: dict[str, Any] = {"split": split, "limit": limit, "unseen": unseen, "nearest_by": nearest_by, "into": out}
    if tasks is not None:
        if out is None:
            raise click.UsageError("--tasks needs --out, a new folder: the run keeps the scores of its own tasks")
        how["suite"] = _tasks(tasks)
    own = folder.recipe().evaluate
    if out is None and (unseen not in (None, own.unseen) or nearest_by not in (None, own.nearest_by)):
        raise click.UsageError(
            f"another policy for unseen tasks than the run's own ({own.unseen}, by {own.nearest_by}) needs --out, a new"
            " folder: comparisons read it from the recipe"
        )
    reporter.waiting(f"reading {run}, its tasks and its model")
    from dyads.scoring.evaluate import evaluate

    scores = evaluate(
        folder, **how, on_stand_in=lambda stand_in: reporter.note("unseen", str(stand_in)), reporter=reporter
    )
    rows = [row for row in scores["scores"] if row["headline"]]
    names = [visible(row["task"]) for row in rows]
    width = max(map(len, names))
    micro, macro = (scores[level]["headline"] for level in ("micro", "macro"))
    lines = [
        f"{name:{width}}  {row['metric']:11}  {row['value']:6.1f}  n={row['n']}"
        for name, row in zip(names, rows, strict=True)
    ]
    lines.append(f"micro {micro:.1f}, macro {macro:.1f}, {scores['split']} split")
    reporter.result(
        "scored",
        "\n".join(lines),
        run=str(out or run),
        split=scores["split"],
        micro=micro,
        macro=macro,
        tasks={row["task"]: row["value"] for row in rows},
    )


def _tasks(path: Path) -> FamilySpec:
    """The tasks of a run folder, of a JSONL or CSV file, or of a recipe."""
    from dyads.recipe.load import parse_tasks
    from dyads.recipe.yaml_source import read_file
    from dyads.runs.folder import RunFolder
    from dyads.tasks.files import FilesSpec

    if path.is_dir():
        return RunFolder.open(path).recipe().tasks
    if path.suffix.lower() in (".jsonl", ".csv"):
        return FilesSpec(path=(path,))
    return parse_tasks(read_file(path), str(path), lambda key: f"add it to {path.name}")

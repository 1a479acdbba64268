# SPDX-License-Identifier: Apache-2.0
"""`dyads export`: ordinary PEFT LoRAs from a run's adapter, one per task."""

from __future__ import annotations

from pathlib import Path

import click

from dyads.console import printable


@click.command(
    short_help="Write an adapter as plain PEFT LoRAs.",
    epilog="""\b
Examples:
  dyads export runs/more --task sort_words --out loras/sort_words
  dyads export runs/more --all-tasks --out loras
  dyads inspect runs/more            # which rank each task uses""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--task", metavar="NAME", help="The task; needed where the gates look at one.")
@click.option("--all-tasks", is_flag=True, help="Every task, each into a folder of its name below --out.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new or empty folder.")
@click.option(
    "--trim",
    is_flag=True,
    help="Give every layer its own rank, by rank_pattern, which not every serving engine supports.",
)
def command(run: Path, task: str | None, all_tasks: bool, out: Path, trim: bool) -> None:
    """Write the adapter in RUN as an ordinary LoRA, equal to it for one task, which PEFT loads without dyads.

    RUN is the folder of a run or of an adapter. Methods whose gates look at nothing or at the task are exported
    exactly; others are refused. All layers get the largest rank that one of them needs, padded with zeros.
    """
    if task is not None and all_tasks:
        raise click.UsageError("give either --task or --all-tasks")
    from dyads.export import export, export_all
    from dyads.runs.saved import SavedAdapter

    adapter = SavedAdapter.read(run)
    written = export_all(adapter, out, trim=trim) if all_tasks else [export(adapter, out, task=task, trim=trim)]
    for lora in written:
        low = min(lora.ranks.values())
        ranks = f"rank {lora.rank}" if low == lora.rank else f"ranks {low} to {lora.rank}"
        click.echo(printable(f"{lora.path}: {ranks} in {len(lora.ranks)} modules"))

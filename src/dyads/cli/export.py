# SPDX-License-Identifier: Apache-2.0
"""`dyads export`: ordinary PEFT LoRAs from a run's adapter, or checkpoints with the adapter merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from dyads.cli import reports
from dyads.console import Reporter
from dyads.errors import visible


@click.command(
    short_help="Write an adapter as plain PEFT LoRAs, or merged into its model.",
    epilog="""\b
Examples:
  dyads export runs/more --task sort_words --out loras/sort_words
  dyads export runs/more --all-tasks --out loras
  dyads export runs/more --task sort_words --gguf --out loras/sort_words
  dyads export runs/more --task sort_words --merge --out models/sort_words
  dyads export runs/mode --approximate data.jsonl --rank 16 --out lora
  dyads inspect runs/more            # which rank each task uses""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--task", metavar="NAME", help="The task; needed where the gates look at one.")
@click.option("--all-tasks", is_flag=True, help="Every task, each into a folder of its name below --out.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new or empty folder.")
@click.option(
    "--merge",
    "merges",
    is_flag=True,
    help="Write the base model with the adapter in its weights, as a transformers checkpoint.",
)
@click.option(
    "--approximate",
    "data",
    metavar="DATA",
    type=click.Path(dir_okay=False, path_type=Path),
    help="For gates that look at the token: fit LoRAs on this JSONL or CSV file of examples, and write the nearest.",
)
@click.option("--rank", type=click.IntRange(min=1), help="With --approximate: the rank of the LoRA. Default: 16.")
@click.option(
    "--trim",
    is_flag=True,
    help="Give every layer its own rank, by rank_pattern, which not every serving engine supports.",
)
@click.option(
    "--gguf",
    is_flag=True,
    help="Also write adapter.gguf, the LoRA for llama.cpp, Ollama and LM Studio, beside the files of PEFT.",
)
@click.option("--no-verify", is_flag=True, help="Do not reload the result with stock PEFT to compare its logits.")
@reports
def command(
    run: Path,
    task: str | None,
    all_tasks: bool,
    out: Path,
    merges: bool,
    data: Path | None,
    rank: int | None,
    trim: bool,
    gguf: bool,
    no_verify: bool,
    reporter: Reporter,
) -> None:
    """Write the adapter in RUN as an ordinary LoRA, equal to it for one task, which PEFT loads without dyads.

    RUN is the folder of a run or of an adapter. Methods whose gates look at nothing or at the task are exported
    exactly; others need --approximate. All layers get the largest rank that one of them needs, padded with zeros; with
    --all-tasks, the largest of all tasks. The cards of the folders have the commands that serve them.

    Before the folder gets its name, another process, which cannot import dyads, reloads it with PEFT, and its logits
    are compared with those of the adapter.

    With --approximate, three LoRAs are fitted on the training split of DATA: by regression, layer by layer; with the
    gates at their mean; and by an SVD of the mean update. Relative errors and scores on its other splits are printed,
    and the LoRA with the smallest error is written: for a task, for every task of DATA, or one for all of them.
    """
    if task is not None and all_tasks:
        raise click.UsageError("give either --task or --all-tasks")
    if merges and trim:
        raise click.UsageError("--trim is for LoRAs, and --merge writes none: leave one of them out")
    if merges and gguf:
        raise click.UsageError(
            "--gguf is for LoRAs, and --merge writes none: leave one of them out (llama.cpp's convert_hf_to_gguf.py"
            " converts a merged checkpoint)"
        )
    if rank is not None and data is None:
        raise click.UsageError(
            "--rank is for --approximate, and an exact export has the rank that it needs: leave it out"
        )
    if trim and data is not None:
        raise click.UsageError("--approximate gives all layers one rank: leave --trim out")
    reporter.waiting(f"reading {run}, writing {out}{'' if no_verify else ' and verifying it'}")
    from dyads.export import export, export_all
    from dyads.export.gguf_adapter import gguf_layout
    from dyads.export.merged import merge, merge_all
    from dyads.export.verify import unverifiable, verify
    from dyads.runs.folder import RunFolder
    from dyads.runs.saved import SavedAdapter

    if data is not None:
        _approximate(run, data, out, rank, task, all_tasks, merges, gguf, not no_verify, reporter)
        return
    adapter = SavedAdapter.read(run)
    folder = RunFolder(run) if RunFolder(run).is_run else None
    outcome = ["not verified (--no-verify)"]

    def check(folders: Mapping[str | None, Path]) -> None:
        if no_verify:
            return
        if (reason := unverifiable(adapter, folder)) is not None:
            outcome[:] = [f"not verified: {reason}"]
            return
        outcome[:] = [verify(folders, adapter, folder, merged=merges).text]

    layout = gguf_layout(adapter, folder) if gguf else None
    lines: list[str]
    if merges:
        many = (
            merge_all(adapter, folder, out, check=check)
            if all_tasks
            else [merge(adapter, folder, out, task=task, check=check)]
        )
        lines = [one.text for one in many]
    elif all_tasks:
        lines = [one.text for one in export_all(adapter, out, trim=trim, gguf=layout, check=check)]
    else:
        lines = [export(adapter, out, task=task, trim=trim, gguf=layout, check=check).text]
    reporter.result("exported", "\n".join(map(visible, [*lines, *outcome])), folder=str(out))


def _approximate(
    run: Path,
    data: Path,
    out: Path,
    rank: int | None,
    task: str | None,
    all_tasks: bool,
    merges: bool,
    gguf: bool,
    verifies: bool,
    reporter: Reporter,
) -> None:
    from dyads.errors import RunError
    from dyads.export.approximate import DEFAULT_RANK, approximate
    from dyads.runs.folder import RunFolder

    if not RunFolder(run).is_run:
        raise RunError(
            f"'{run}' is no run, and --approximate needs its recipe, which says how prompts are read: give the folder"
            " of the run"
        )
    written, prices, verification = approximate(
        RunFolder.open(run),
        data,
        out,
        rank=rank or DEFAULT_RANK,
        task=task,
        all_tasks=all_tasks,
        merges=merges,
        gguf=gguf,
        verifies=verifies,
        reporter=reporter,
    )
    outcome = "not verified (--no-verify)" if verification is None else verification.text
    lines = [*[price.text for price in prices], *[one.text for one in written], outcome]
    facts = {
        str(price.task): {"exported": price.chosen.name, "adapter": price.score, **price.candidate_facts}
        for price in prices
    }
    reporter.result("exported", "\n".join(visible(line, keep="\n") for line in lines), folder=str(out), tasks=facts)

# SPDX-License-Identifier: Apache-2.0
"""Growth of a training step with tasks, experts, ranks, tokens and processes, on SmolLM2-135M.

Each row changes one number of a common setting. It is measured in a process of its own (with two processes: under
torchrun), as the CPU seconds of a step and the peak memory of a process. Ratios are to the first row of a group.

    python -m benchmarks.growth --write-docs    also docs/growth.json and the table of docs/scaling.md; 5 minutes
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import click

from benchmarks.environment import environment
from benchmarks.many_tasks import PAGE, replaced
from benchmarks.rounds import ROOT, child_environment
from benchmarks.training import TARGETS

RESULTS = ROOT / "docs" / "growth.json"
BEGIN, END = "<!-- growth: begin -->", "<!-- growth: end -->"
STEPS = 5


@dataclass(frozen=True)
class Row:
    """One training: its group, what it changes, and the method with its options."""

    group: str
    label: str
    method: str
    options: tuple[tuple[str, int], ...]
    tasks: int = 0
    tokens: int = 64
    examples: int = 8
    processes: int = 1


def _options(**options: int) -> tuple[tuple[str, int], ...]:
    return tuple(options.items())


ROWS = (
    *(Row("tasks", f"MTL-LoRA 4x4, {n:,} tasks", "mtl_lora", _options(num_experts=4, r=4), n) for n in (10, 100, 1000)),
    *(Row("tasks", f"MoRE 16, {n:,} tasks", "more", _options(r=16, task_dim=16), n) for n in (10, 100, 1000)),
    *(Row("experts", f"MoDE {n}x4", "mode", _options(num_experts=n, r=4)) for n in (4, 16, 64)),
    *(Row("rank", f"MoDE 4x{n}", "mode", _options(num_experts=4, r=n)) for n in (4, 16, 64)),
    *(Row("tokens", f"MoDE 4x4, {n} tokens", "mode", _options(num_experts=4, r=4), 0, n, 2) for n in (64, 256, 512)),
    *(
        Row("processes", f"MoDE 4x4, {n} × {8 // n} examples", "mode", _options(num_experts=4, r=4), 0, 64, 8 // n, n)
        for n in (1, 2)
    ),
)


def train(row: Row) -> dict[str, float]:
    """CPU seconds of a step and peak memory (MB) of this process."""
    import torch
    import torch.distributed as dist
    from peft import get_peft_model

    from dyads.methods import build_config
    from dyads.models.load import load_model
    from dyads.recipe.spec import ModelSpec

    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = ModelSpec(name="packaged:smollm2-135m", dtype="bfloat16", attention="eager")
    names = tuple(f"task-{k:04d}" for k in range(row.tasks)) or None
    options = {**dict(row.options), "target_modules": TARGETS}
    model: Any = get_peft_model(load_model(spec), build_config(row.method, options, names))
    vocabulary = model.config.vocab_size
    trained = [p for p in model.parameters() if p.requires_grad]
    if row.processes > 1:
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, vocabulary, (row.examples, row.tokens), generator=generator)
    routed = {"task": torch.randint(row.tasks, (row.examples,), generator=generator)} if row.tasks else {}
    seconds = []
    for _ in range(STEPS + 1):
        begin, wall = time.process_time(), time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False, **routed).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append((time.process_time() - begin, time.perf_counter() - wall))
    if row.processes > 1:
        dist.destroy_process_group()
    return {
        "seconds": statistics.median(cpu for cpu, _ in seconds[1:]),
        "wall": statistics.median(wall for _, wall in seconds[1:]),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "trained": sum(p.numel() for p in trained),
    }


def measure(row: Row) -> dict[str, Any]:
    """`train` in a new process; the answer of the first of several."""
    alone = [sys.executable, "-m"]
    several = [*alone, "torch.distributed.run", "--nproc-per-node", str(row.processes), "-m"]
    command = [*(several if row.processes > 1 else alone), "benchmarks.growth", "--row", str(ROWS.index(row))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=child_environment(1), cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**asdict(row), **found}


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as a Markdown table."""
    lines = [["grows", "", "trained", "CPU s a step", "ratio", "wall s", "peak memory, MB", "ratio"]]
    lines.append(["---", "---", *["---:"] * 6])
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        base = first.setdefault((row["group"], row["method"]), row)
        lines.append(
            [
                row["group"],
                row["label"],
                f"{row['trained']:,}",
                f"{row['seconds']:.2f}",
                f"{row['seconds'] / base['seconds']:.2f}",
                f"{row['wall']:.2f}",
                f"{row['memory']:,.0f}",
                f"{row['memory'] / base['memory']:.2f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--row", type=click.IntRange(0, len(ROWS) - 1), hidden=True)
@click.option("--write-docs", is_flag=True, help=f"Write {RESULTS.name} and the table in {PAGE.name}.")
def main(row: int | None, write_docs: bool) -> None:
    """Measure what a training step takes as one number grows."""
    if row is not None:
        found = train(ROWS[row])
        if int(os.environ.get("RANK", "0")) == 0:
            click.echo(json.dumps(found))
        return
    rows = [measure(row) for row in ROWS]
    click.echo(table(rows))
    if write_docs:
        RESULTS.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), BEGIN, END, table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Growth with the number of tasks: a run over 10, 100 and 1,000 made-up tasks, verb by verb, as a user calls them.

Every verb is a process of its own, so its CPU seconds and its peak memory have the start of Python in them. Training
makes as many steps for each number of tasks, and scoring answers as many instances of every task: what a step costs
should not depend on the number of tasks, and what is done once for every task may grow in proportion to it.

    python -m benchmarks.many_tasks                     10, 100, 1,000 tasks; about half an hour on one core
    python -m benchmarks.many_tasks --tasks 10,50       fewer
    python -m benchmarks.many_tasks --write-docs        also docs/many-tasks.json, .svg and the table in docs/scaling.md
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.environment import environment
from benchmarks.rounds import ROOT, child_environment
from benchmarks.training import TARGETS

METHODS: dict[str, dict[str, Any]] = {
    "LoRA 9": {"name": "lora", "r": 9},
    "TaskMoDE h 4x4": {"name": "task_mode", "score": "h+task", "num_experts": 4, "r": 4, "task_dim": 8},
    "MTL-LoRA 4x4": {"name": "mtl_lora", "num_experts": 4, "r": 4},
}
TRAIN_ROWS, TEST_ROWS, SHORT, STEPS = 24, 2, 5, 20
WORDS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "tiger",
    "piano",
    "ladder",
    "winter",
    "candle",
    "bridge",
    "rocket",
    "garden",
]
PAGE, RESULTS, FIGURE = (ROOT / "docs" / name for name in ("scaling.md", "many-tasks.json", "many-tasks.svg"))
BEGIN, END = "<!-- many tasks: begin -->", "<!-- many tasks: end -->"


def write_rows(path: Path, tasks: int) -> None:
    """Made-up tasks in JSONL: task k asks for word k mod 4 of four, each letter k // 4 further in the alphabet."""
    shuffled = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for k in range(tasks):
            for row in range(TRAIN_ROWS + TEST_ROWS):
                words = shuffled.sample(WORDS, 4)
                moved = "".join(chr((ord(letter) - 97 + k // 4) % 26 + 97) for letter in words[k % 4])
                line = {
                    "task": f"task-{k:04d}",
                    "instruction": f"Rule {k}.",
                    "input": " ".join(words),
                    "output": moved,
                    "split": "train" if row < TRAIN_ROWS else "test",
                }
                file.write(json.dumps(line) + "\n")


def timed(arguments: list[str], log: Path) -> dict[str, float]:
    """CPU seconds and peak memory (MB) of one verb in a process of its own; its output goes to a file."""
    command = [sys.executable, "-m", "dyads.cli", *arguments]
    with log.open("wb") as out:
        actions = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, out.fileno(), 2)]
        pid = os.posix_spawn(command[0], command, child_environment(1), file_actions=actions)
        _, status, usage = os.wait4(pid, 0)
    if status:
        raise click.ClickException(f"`dyads {' '.join(arguments)}` failed: see {log}")
    return {"seconds": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss / 1e3}


def recipe(name: str, method: dict[str, Any], rows: Path) -> dict[str, Any]:
    """A recipe of `dyads train`."""
    return {
        "name": name,
        "model": {"name": "packaged:smollm2-135m", "dtype": "bfloat16", "attention": "eager"},
        "method": {**method, "target_modules": TARGETS},
        "tasks": {"family": "files", "path": str(rows), "metric": "exact_match"},
        "mixture": {"kind": "uniform", "batches": "mixed"},
        "train": {"steps": STEPS, "batch_size": 16, "learning_rate": 2e-3, "save_steps": None, "threads": 1},
        "evaluate": {"batch_size": 32, "max_new_tokens": 6},
    }


def measure(tasks: int, folder: Path) -> dict[str, Any]:
    """What every verb takes with that number of tasks, in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = folder / "rows.jsonl"
    write_rows(rows, tasks)
    found: dict[str, Any] = {"tasks": tasks, "methods": {}}
    for label, method in METHODS.items():
        slug = re.sub(r"\W+", "-", label)
        path, run = folder / f"{slug}.yaml", folder / "runs" / slug
        path.write_text(json.dumps(recipe(label, method, rows)), encoding="utf-8")  # JSON is YAML
        short = timed(
            [
                "train",
                str(path),
                "--no-evaluate",
                "--out",
                str(folder / "short" / slug),
                "--set",
                f"train.steps={SHORT}",
            ],
            folder / f"{slug}-short.log",
        )
        train = timed(["train", str(path), "--no-evaluate", "--out", str(run)], folder / f"{slug}.log")
        found["methods"][label] = {
            "start": short["seconds"] - SHORT * (train["seconds"] - short["seconds"]) / (STEPS - SHORT),
            "step": (train["seconds"] - short["seconds"]) / (STEPS - SHORT),
            "train_memory": train["memory"],
            "adapter": (run / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6,
            "evaluate": timed(["evaluate", str(run)], folder / f"{slug}-evaluate.log"),
        }
    runs, mixture = str(folder / "runs"), str(folder / "runs" / "MTL-LoRA-4x4")
    found["tasks_verb"] = timed(["tasks", "--recipe", str(folder / "LoRA-9.yaml")], folder / "tasks.log")
    found["compare"] = timed(["compare", runs], folder / "compare.log")
    found["inspect"] = timed(["inspect", mixture, "--what", "tasks"], folder / "inspect.log")
    page = folder / "report.html"
    found["report"] = timed(["report", runs, "--no-model", "--out", str(page)], folder / "report.log")
    found["page"] = page.stat().st_size / 1e6
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as a Markdown table, a column for each number of tasks."""
    lines = [["", *(f"{row['tasks']:,} tasks" for row in rows)]]
    for label in METHODS:
        for key, name, form in (
            ("start", "train: before and after the steps, s", "{:.1f}"),
            ("step", "train: a step, s", "{:.2f}"),
            ("train_memory", "train: peak memory, MB", "{:,.0f}"),
            ("adapter", "adapter file, MB", "{:.1f}"),
        ):
            lines.append([f"{label} · {name}", *(form.format(row["methods"][label][key]) for row in rows)])
        seconds = (row["methods"][label]["evaluate"]["seconds"] for row in rows)
        lines.append([f"{label} · evaluate, s", *(f"{value:.1f}" for value in seconds)])
    for key, name in (
        ("tasks_verb", "tasks"),
        ("compare", "compare"),
        ("inspect", "inspect --what tasks"),
        ("report", "report"),
    ):
        lines.append([f"{name}, s", *(f"{row[key]['seconds']:.1f}" for row in rows)])
        lines.append([f"{name}: peak memory, MB", *(f"{row[key]['memory']:,.0f}" for row in rows)])
    lines.append(["report: size of the page, MB", *(f"{row['page']:.1f}" for row in rows)])
    lines.insert(1, ["---", *("---:" for _ in rows)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds of every verb over the number of tasks, on logarithmic axes, with a line of proportional growth."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "dyads"  # the same file for the same numbers
    tasks = [row["tasks"] for row in rows]
    method = "MTL-LoRA 4x4"
    curves = {
        f"train, a step ({method})": [row["methods"][method]["step"] for row in rows],
        f"train, the rest ({method})": [row["methods"][method]["start"] for row in rows],
        f"evaluate ({method})": [row["methods"][method]["evaluate"]["seconds"] for row in rows],
        **{name: [row[name]["seconds"] for row in rows] for name in ("compare", "inspect", "report")},
    }
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, seconds in curves.items():
        axes.plot(tasks, seconds, marker="o", label=name)
    axes.plot(tasks, [0.01 * n for n in tasks], color="0.6", linestyle=":", label="proportional")
    axes.set(xscale="log", yscale="log", xlabel="tasks", ylabel="CPU seconds")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, metadata={"Date": None})


def replaced(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between two marks."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--tasks", "counts", default="10,100,1000", show_default=True, help="Numbers of tasks, comma-separated.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/many-tasks"), show_default=True)
@click.option("--write-docs", is_flag=True, help=f"Write {RESULTS.name}, {FIGURE.name} and the table in {PAGE.name}.")
def main(counts: str, out: Path, write_docs: bool) -> None:
    """Measure what every verb takes with more and more tasks. Numbers of tasks that are measured already are kept."""
    rows = []
    for tasks in (int(count) for count in counts.split(",")):
        kept = out / f"{tasks}.json"
        if not kept.exists():
            begin = time.monotonic()
            found = measure(tasks, out / str(tasks))
            kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
            click.echo(f"{tasks:,} tasks: {time.monotonic() - begin:.0f} s")
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
    click.echo(table(rows))
    if write_docs:
        RESULTS.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
        draw(rows, FIGURE)
        text = f"{table(rows)}\n\n![Growth with the number of tasks]({FIGURE.name})"
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), BEGIN, END, text), encoding="utf-8")


if __name__ == "__main__":
    main()

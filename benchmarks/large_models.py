# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of large runs: memory and communication of Gemma-2B, Llama-8B and a Llama of 70B with 16 to 1,000 tasks.

Nothing is timed and no weights are read: one training step is counted on the meta device (dyads.models.step_cost), and
what is replicated or sharded follows from the sizes. On N GPUs

    DistributedDataParallel   memory  weights + 12 P + peak + 0.6 GB
                              sent    2 (N - 1) / N · 4 P bytes a step
    FSDP2                     memory  (weights + 12 P) / N + block + peak + 0.6 GB
                              sent    (N - 1) / N · (2 · weights + 12 P) bytes a step

with P trained parameters in fp32, `weights` bytes of the frozen model, and `block` the largest transformer block, which
is whole while it computes. The peak is that of the examples of one GPU, with gradient checkpointing.

    python -m benchmarks.large_models                 about ten minutes on one core
    python -m benchmarks.large_models --write-docs    also docs/large-models.json and the tables of docs/scaling.md
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from transformers import GemmaConfig, LlamaConfig, PretrainedConfig

from benchmarks.environment import environment
from benchmarks.many_tasks import PAGE, replaced
from benchmarks.training import TARGETS
from dyads.models.budget import count
from dyads.models.step_cost import OWN_MEMORY, step_cost

SHAPES: dict[str, PretrainedConfig] = {
    "Gemma-2B": GemmaConfig(
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    ),
    "Llama-8B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Llama-70B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA 16": ("lora", {"r": 16}),
    "MoDE 4x4": ("mode", {"num_experts": 4, "r": 4}),
    "TaskMoDE h 4x4": ("task_mode", {"score": "h+task", "num_experts": 4, "r": 4, "task_dim": 8}),
    "MTL-LoRA 4x4": ("mtl_lora", {"num_experts": 4, "r": 4}),
    "MoRE 16": ("more", {"r": 16, "task_dim": 16}),
}
TASKS = (16, 100, 1000)
EXAMPLES, TOKENS = 8, 512
"""Of one GPU's micro-batch."""
RESULTS = PAGE.with_name("large-models.json")
BEGIN, END = "<!-- large models: begin -->", "<!-- large models: end -->"


@dataclass(frozen=True)
class Large:
    """What one model takes with the largest adapter of the table."""

    weights: int
    """Bytes of the frozen model in bf16."""
    peak: int
    """Bytes of activations, gradients and temporary tensors, with gradient checkpointing."""
    layers: int
    trained: dict[str, dict[str, int]]
    """Trained parameters by method and number of tasks."""

    def alone(self, parameters: int) -> float:
        """Bytes on every GPU where everything is replicated (one GPU, or DistributedDataParallel)."""
        return self.weights + 12 * parameters + self.peak + OWN_MEMORY

    def sharded(self, parameters: int, gpus: int) -> float:
        """Bytes on every GPU under FSDP2, with one block whole at a time."""
        return (self.weights + 12 * parameters) / gpus + self.weights / self.layers + self.peak + OWN_MEMORY

    def sent(self, parameters: int, gpus: int) -> float:
        """Bytes that every GPU sends in a step of DistributedDataParallel: an all-reduce of the adapter's gradients."""
        return 2 * (gpus - 1) / gpus * 4 * parameters

    def sent_sharded(self, parameters: int, gpus: int) -> float:
        """Bytes under FSDP2: weights gathered in forward and backward, gradients reduced and scattered."""
        return (gpus - 1) / gpus * (2 * (self.weights + 4 * parameters) + 4 * parameters)


def measured(name: str, folder: Path) -> Large:
    """The sizes of one model."""
    config = SHAPES[name]
    path = folder / name
    config.save_pretrained(path)
    trained = {
        label: {
            str(tasks): count(str(path), method, {**options, "target_modules": TARGETS}, _names(tasks)).trainable
            for tasks in TASKS
        }
        for label, (method, options) in METHODS.items()
    }
    method, options = METHODS["MoDE 4x4"]
    cost = step_cost(
        str(path),
        method,
        {**options, "target_modules": TARGETS},
        examples=EXAMPLES,
        tokens=TOKENS,
        checkpointing=True,
    )
    return Large(cost.weights, cost.peak, config.num_hidden_layers, trained)


def tables(found: dict[str, Large]) -> str:
    """Two tables: trained parameters, and memory and communication."""
    columns = [f"{name}, {tasks:,} tasks" for name in found for tasks in TASKS]
    lines = [["trained parameters, millions", *columns], ["---", *("---:" for _ in columns)]]
    for label in METHODS:
        sizes = [large.trained[label][str(tasks)] / 1e6 for large in found.values() for tasks in TASKS]
        lines += [[label, *(f"{size:.1f}" for size in sizes)]]
    apart = (large.trained["LoRA 16"][str(t)] * t for large in found.values() for t in TASKS)
    lines.append(["one LoRA 16 for each task", *(f"{parameters / 1e6:,.0f}" for parameters in apart)])
    first = _markdown(lines)
    label, gpus = "MoDE 4x4", 8
    head = ["GB", "frozen weights", f"{label} and its AdamW", "activations", "a GPU, replicated"]
    head += [*(f"a GPU of {n}, FSDP2" for n in (8, 64)), "sent in a step, DDP", "sent in a step, FSDP2"]
    rows = [head, ["---", *("---:" for _ in head[1:])]]
    for name, large in found.items():
        parameters = large.trained[label][str(TASKS[0])]
        sizes = (large.weights, 12 * parameters, large.peak, large.alone(parameters))
        shards = (large.sharded(parameters, n) for n in (8, 64))
        sent = (large.sent(parameters, gpus), large.sent_sharded(parameters, gpus))
        rows.append([name, *(f"{value / 1e9:.{2 if value < 1e9 else 1}f}" for value in (*sizes, *shards, *sent))])
    return f"{first}\n\n{_markdown(rows)}"


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _names(tasks: int) -> tuple[str, ...]:
    return tuple(f"task-{k:04d}" for k in range(tasks))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--write-docs", is_flag=True, help=f"Write {RESULTS.name} and the tables of {PAGE.name}.")
def main(write_docs: bool) -> None:
    """Count what large models take."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: measured(name, Path(folder)) for name in SHAPES}
    text = tables(found)
    click.echo(text)
    if write_docs:
        models = {name: asdict(large) for name, large in found.items()}
        RESULTS.write_text(
            json.dumps({"environment": environment(), "models": models}, indent=1) + "\n", encoding="utf-8"
        )
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), BEGIN, END, text), encoding="utf-8")


if __name__ == "__main__":
    main()

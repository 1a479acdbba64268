# SPDX-License-Identifier: Apache-2.0
"""Progress of a training: the opening summary, the line of steps, and the estimate after the first ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from dyads.console import Reporter, Tracker, duration, rounded, size
from dyads.recipe.spec import Recipe
from dyads.runs.checkpoints import last_checkpoint, step_of
from dyads.runs.folder import RunFolder
from dyads.tasks import Suite

__all__ = ["ProgressCallback", "memory_of", "show_summary", "state_of"]

_FIRST_STEPS = 3
"""Steps after which time and memory are estimated."""
_NOTES = 5
"""Notes on the tasks that are shown."""


def show_summary(
    reporter: Reporter,
    recipe: Recipe,
    suite: Suite,
    folder: RunFolder,
    *,
    device: torch.device | None = None,
    base: int = 0,
    trained: int = 0,
    heads: int = 0,
    tokens: Sequence[int] = (),
) -> None:
    """Show what a run does before it starts.

    `base` and `trained` count parameters, `heads` those of an encoder's heads, `tokens` the input tokens of every step;
    all are absent where nothing trains.
    """
    spec, model, method = recipe.train, recipe.model, recipe.method
    lines = {"model": f"{model.name}, {model.dtype}"}
    data: dict[str, Any] = {"run": str(folder.path), "name": recipe.name, "model": model.name, "dtype": model.dtype}
    if device is not None:
        lines["model"] = f"{model.name}, {_millions(base)} parameters in {model.dtype}, on {_named(device)}"
        data |= {"device": str(device), "base_parameters": base}
    options = ", ".join(f"{key}={_cell(value)}" for key, value in method.options.items())
    lines["method"] = f"{method.name} ({options})" if options else method.name
    data |= {"method": method.name, "options": method.options, "seed": recipe.seed}
    if trained:
        of_heads = f", and {heads:,} in heads" if heads else ""
        lines["trains"] = f"{trained:,} parameters, {rounded(100 * trained / base)} % of the model's{of_heads}"
        data |= {"parameters": trained, "head_parameters": heads}
    count = {split: sum(len(task.split(split)) for task in suite.tasks) for split in ("train", recipe.evaluate.split)}
    sizes = [len(task.split(recipe.evaluate.split)) for task in recipe.evaluate.scored(suite.tasks)]
    scored = sum(len(recipe.evaluate.pick(n)) for n in sizes)
    many = f"{len(suite.tasks)} task" + "s" * (len(suite.tasks) != 1)
    lines["tasks"] = f"{many} ({recipe.tasks.family}): {count['train']:,} examples, {scored:,} instances to score"
    data |= {"tasks": [task.name for task in suite.tasks], "examples": count["train"], "instances": scored}
    if tokens:
        epochs = spec.steps * spec.batch_size / max(count["train"], 1)
        mean = sum(tokens) / len(tokens) / spec.batch_size
        lines["steps"] = (
            f"{spec.steps:,} of {spec.batch_size} examples ({rounded(epochs)} epochs), {mean:.0f} tokens an example,"
            f" rate {spec.learning_rate:g}"
        )
        data |= {"steps": spec.steps, "batch_size": spec.batch_size, "tokens": sum(tokens)}
    lines["log"] = str(folder.log_path)
    data["log"] = str(folder.log_path)
    if "tensorboard" in spec.report_to:
        lines["log"] += f"; tensorboard --logdir {folder.tensorboard}"
    reporter.summary("start", f"{recipe.name}, seed {recipe.seed}", lines, **data)
    for note in suite.notes[:_NOTES]:
        reporter.note("note", f"  · {note}")
    if (more := len(suite.notes) - _NOTES) > 0:
        reporter.note("note", f"  · … and {more} more notes, which `dyads tasks` prints")


def state_of(folder: RunFolder) -> str:
    """How far an interrupted run came: "after the training", or the step of its last checkpoint."""
    if folder.has_adapter:
        return "after the training, before the scores"
    kept = last_checkpoint(folder)
    if kept is None:
        return "before the first checkpoint, so the training starts again"
    return f"in the training; last checkpoint: step {step_of(kept):,} of {folder.recipe().train.steps:,}"


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Shows a Trainer's steps; `tokens` holds the input tokens of every step of the schedule."""

    def __init__(self, reporter: Reporter, tracker: Tracker, tokens: Sequence[int]) -> None:
        self.reporter, self.tracker, self.tokens = reporter, tracker, tokens
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first = state.global_step
        self.tracker.begin_at(self.first)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        self.tracker.update(step, self.tokens[step - 1])
        if step - self.first == _FIRST_STEPS and step < state.max_steps:
            self._estimate(args.device, state.max_steps - step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.tracker.show(loss=logs["loss"])

    def _estimate(self, device: torch.device, left: int) -> None:
        seconds = (self.tracker.seconds_left or 0.0) / left
        memory = memory_of(device)
        whole = duration(self.tracker.seconds + seconds * left)
        step = f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
        text = f"  expect  {whole} for the steps, {step} each; peak memory so far {size(memory)}"
        self.reporter.note("expect", text, seconds_per_step=seconds, peak_memory=memory)


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device.type


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _cell(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def memory_of(device: torch.device) -> int:
    """The largest memory in bytes that this process took so far: of a GPU's allocator, else of the process itself."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)

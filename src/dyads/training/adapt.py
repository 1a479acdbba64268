# SPDX-License-Identifier: Apache-2.0
"""Few-shot adaptation: a trained adapter learns new tasks, and its outputs for the known tasks can stay bit-identical.

The recipe is that of the adapted run with other tasks and a section `adapt`. The adapter is loaded; its method's
per-task parameters get one row per new task (tuner/add_task.py), and an encoder gets one head. `adapt.parts` says what
trains:

    task   the rows of the new tasks: outputs for all other tasks stay bit-identical
    gate   all parameters of the gates: embeddings and routers
    all    everything that the adapted run trained: A and B, and modules that its config trains beside them

Heads of known tasks never change. An interrupted adaptation resumes only from the adapter that it started from.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from dyads.data.batches import Collator, PairCollator, TaskDataset
from dyads.errors import ConfigError, RunError, shortened
from dyads.methods.core import Core
from dyads.models.heads import Head, TaskHeads, attach_heads, heads_of, read_heads
from dyads.models.processes import launched
from dyads.recipe.load import recipe_keys
from dyads.recipe.recipe_errors import validated
from dyads.recipe.spec import Recipe, differences
from dyads.recipe.yaml_source import YamlSource, read_file, read_overrides, read_text, to_yaml
from dyads.runs.adapter import check_adapter, fingerprint, load_adapter
from dyads.runs.folder import RunFolder
from dyads.tasks import Task
from dyads.tuner import DyadsLinear, add_task, similarity_to_tasks
from dyads.tuner.routing import find_routing

__all__ = [
    "ExtendedAdapter",
    "RestoreFrozenRows",
    "adapt_recipe",
    "adaptation",
    "choose_start",
    "load_extended",
    "source_facts",
    "source_run",
]


_STEPS, _LARGEST_BATCH = 100, 16
"""Defaults of an adaptation, which has few examples."""
_ADAPTER = "default"
_FINGERPRINT = "source_adapter"
"""Key in a run's environment: the fingerprint of the adapter that the adaptation started from."""
_COMPARED, _COMPARED_BATCH = 64, 16
"""Examples of a new task that are compared with the known tasks, and their batch size."""


@dataclass
class ExtendedAdapter:
    """A trained adapter on its base model, with rows for the new tasks."""

    model: PeftModel
    task_names: tuple[str, ...]
    """All tasks, known ones first."""
    heads: tuple[Head, ...]
    task_tables: tuple[Tensor, ...]
    """The per-task parameters and buffers of all layers: one row per task."""
    new_tasks: int
    """How many of the tasks, the last ones, are new."""
    frozen_rows: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """Parameters of which only the last rows train, each with the values of its other rows."""

    @property
    def heads_module(self) -> TaskHeads | None:
        """The module of heads that trains; None for a language model."""
        found = [m for m in self.model.modules() if isinstance(m, TaskHeads)]
        return found[-1] if found else None  # PEFT's trainable copy comes after the base model's original

    def unfreeze(self, parts: str, method: str) -> None:
        """Let `parts` of the adapter train and nothing else; ConfigError where the method (its name) has no such parts.

        Rows of new heads train in any case.
        """
        cores = [m.core(_ADAPTER) for m in self.model.modules() if isinstance(m, DyadsLinear)]
        gates = [p for core in cores for p in core.parameters()]
        trained: list[nn.Parameter] = []
        if parts == "gate":
            trained = gates
        if parts == "all":
            trained = [p for p in self.model.parameters() if p.requires_grad]  # PEFT loaded it as trainable
        self.model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        if parts == "task" and self._gates_read_tables(cores):
            for tensor in self.task_tables:
                if isinstance(tensor, nn.Parameter):
                    self._train_last_rows(tensor, self.new_tasks)
        heads = self.heads_module
        if not trained and not self.frozen_rows and (heads is None or parts == "gate"):
            ways = "--parts gate or --parts all" if gates and parts == "task" else "--parts all"
            wanted = {"task": "per-task parameters that its gates read", "gate": "gates"}.get(parts, "parameters")
            raise ConfigError(f"'{method}' has no {wanted}, so nothing would train: adapt with {ways}")
        if heads is not None:
            count = sum(head.rows for head in self.heads[-self.new_tasks :])
            self._train_last_rows(heads.weight, count)
            self._train_last_rows(heads.bias, count)

    def _gates_read_tables(self, cores: Sequence[Core]) -> bool:
        """Whether the gates depend on the per-task parameters.

        MoRE's `frozen_random` gates do not: only the contrastive loss reads its embeddings.
        """
        rows = [t for t in self.task_tables if isinstance(t, nn.Parameter)]
        for row in rows:
            row.requires_grad_(True)
        place = torch.tensor([len(self.task_names) - 1], device=rows[0].device) if rows else torch.tensor([0])
        read = [core.task_scores(place) for core in cores] if rows else []
        for row in rows:
            row.requires_grad_(False)
        return any(gates is not None and gates.requires_grad for gates in read)

    def _train_last_rows(self, parameter: nn.Parameter, count: int) -> None:
        first = len(parameter) - count

        def last_rows(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[:first] = 0
            return gradient

        parameter.requires_grad_(True)
        parameter.register_hook(last_rows)  # type: ignore[no-untyped-call]
        self.frozen_rows.append((parameter, parameter[:first].detach().clone()))

    def trainable(self, module: nn.Module) -> int:
        """The number of trainable elements of a module, without the frozen rows of its parameters."""
        frozen = {id(parameter): rows.numel() for parameter, rows in self.frozen_rows}
        return sum(p.numel() - frozen.get(id(p), 0) for p in module.parameters() if p.requires_grad)

    @torch.no_grad()
    def start_from_most_similar(
        self, dataset: TaskDataset, collator: Collator | PairCollator, encoder_decoder: bool
    ) -> dict[str, dict[str, float]]:
        """Copy to every new task the row of the known task with the highest contrastive score (MoRE) on its examples.

        At most 64 examples of a task are compared. Returns, for every new task, the scores of all known tasks, highest
        first.
        """
        device = launched().device  # the Trainer's choice
        self.model.to(device)
        known = len(self.task_names) - self.new_tasks
        found: dict[str, dict[str, float]] = {}
        for number, task in enumerate(dataset.tasks):
            place, total = dataset.places[number], torch.zeros(known)
            compared = range(len(task.train))
            if len(compared) > _COMPARED:
                compared = random.Random(f"compared/{task.name}").sample(compared, _COMPARED)  # type: ignore[assignment]
            for start in range(0, len(compared), _COMPARED_BATCH):
                at = compared[start : start + _COMPARED_BATCH]
                batch: dict[str, Any] = dict(collator([dataset[number, i] for i in at]))  # type: ignore[arg-type,misc]
                ids = batch.pop("task")
                if not encoder_decoder:
                    batch.pop("labels")
                inputs = {key: value.to(device) for key, value in batch.items()}
                total += similarity_to_tasks(self.model, inputs, ids.to(device), _ADAPTER)[:, :known].sum(0).cpu()
            scores = (total / len(compared)).tolist()
            best = max(range(known), key=scores.__getitem__)
            for tensor in self.task_tables:
                tensor[place] = tensor[best]
            ranked = sorted(zip(self.task_names, scores, strict=False), key=lambda pair: -pair[1])
            found[task.name] = {name: round(score, 6) for name, score in ranked}
        return found


class RestoreFrozenRows(TrainerCallback):  # type: ignore[misc]
    """Writes frozen rows back after every step: weight decay changes them even where their gradient is 0."""

    def __init__(self, extended: ExtendedAdapter) -> None:
        self.extended = extended

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, rows in self.extended.frozen_rows:
            parameter[: len(rows)] = rows


def source_run(recipe: Recipe, tasks: Sequence[Task]) -> RunFolder:
    """The run that recipe.adapt names, checked before a model is loaded.

    RunError where there is none or its model or method differs from the recipe's; ConfigError where it already knows
    one of the tasks.
    """
    assert recipe.adapt is not None
    folder = RunFolder.open(recipe.adapt.run)
    check_adapter(folder)
    adapted = folder.recipe()
    for what in ("model", "method"):
        changed = differences(getattr(adapted, what).model_dump(), getattr(recipe, what).model_dump())
        changed.pop("attention", None)  # another implementation, the same model
        if changed:
            key, (then, now) = next(iter(changed.items()))
            raise RunError(
                f"'{folder.path}' was trained with {what}.{key} = {then!r}, and the recipe that adapts it has {now!r}:"
                f" use the same section `{what}` in both"
            )
    known = folder.task_names()
    if repeated := [task.name for task in tasks if task.name in known]:
        raise ConfigError(
            f"'{folder.path}' already knows task '{repeated[0]}': give the new task another name, or train a new run on"
            " all tasks with `dyads train`"
        )
    return folder


def source_facts(recipe: Recipe, folder: RunFolder) -> dict[str, str]:
    """Entries of the environment file of the run in `folder`: the fingerprint of the adapter that it starts from.

    RunError where the run in `folder` started from another adapter: its checkpoint would be combined with weights that
    it was not trained on.
    """
    assert recipe.adapt is not None
    source = RunFolder.open(recipe.adapt.run)
    now = fingerprint(source)
    started_from = folder.environment().get(_FINGERPRINT, now) if folder.task_names() else now
    if started_from != now:
        raise RunError(
            f"cannot resume '{folder.path}': the adapter of '{source.path}' has changed since (SHA-256"
            f" {shortened(started_from)[:12]}… then, {now[:12]}… now; was that run trained again?): restore the earlier"
            " adapter, or adapt the new one from the start with another --out"
        )
    return {_FINGERPRINT: now}


def load_extended(recipe: Recipe, folder: RunFolder, base: PreTrainedModel, tasks: Sequence[Task]) -> ExtendedAdapter:
    """The adapter of the run in `folder` on its base model, with rows (and heads) for the new tasks."""
    assert recipe.adapt is not None
    heads: tuple[Head, ...] = ()
    if folder.heads.is_file():
        heads = read_heads(folder.heads)
        attach_heads(base, heads, recipe.model.pool)
    model = load_adapter(base, folder, trains=True)
    routing = find_routing(model)
    gated = routing.names.get(_ADAPTER, ()) if routing else ()
    known = tuple(head.task for head in heads) or gated or folder.task_names()
    new = tuple(task.name for task in tasks)
    tables: tuple[Tensor, ...] = ()
    start = "fresh" if recipe.adapt.start == "fresh" else "mean"
    for name in new if gated else ():
        tables = add_task(model, name, start)
    if heads:
        more = heads_of(tasks)
        for module in [m for m in model.modules() if isinstance(m, TaskHeads)]:
            module.add(more, recipe.seed)
        heads += more
    return ExtendedAdapter(model, (*known, *new), heads, tables, len(new))


def choose_start(recipe: Recipe, extended: ExtendedAdapter) -> str:
    """How the rows of new tasks are initialised: `adapt.start`, or by default "nearest" where the method has a
    contrastive loss, "mean" where it has none, and "none" where it has no per-task parameters.
    """
    assert recipe.adapt is not None
    if not extended.task_tables:
        if recipe.adapt.start is not None:
            raise ConfigError(
                f"adapt.start is {recipe.adapt.start}, but '{recipe.method.name}' has no per-task parameters to"
                " initialise: leave adapt.start (--start) out"
            )
        return "none"
    if recipe.adapt.start is not None:
        return recipe.adapt.start
    layers = (m for m in extended.model.modules() if isinstance(m, DyadsLinear))
    return "nearest" if any(layer.core(_ADAPTER).compares_samples for layer in layers) else "mean"


def adaptation(run: Path, given: Mapping[str, Any]) -> YamlSource:
    """A run's recipe as the base of its adaptation's: without tasks, with a section `adapt` and few steps.

    `given` is the section `adapt` without the run.
    """
    adapted = RunFolder.open(run).recipe()
    whole = adapted.resolved()
    del whole["tasks"]  # replaced as a whole, not key by key
    whole["adapt"] = {"run": str(run if run.name else run.resolve()), **given}
    whole["evaluate"] = {**whole["evaluate"], "limit": None, "split": "test", "tasks": "all"}
    shots = given.get("shots") or _LARGEST_BATCH
    size = min(_LARGEST_BATCH, adapted.train.batch_size, shots if isinstance(shots, int) else _LARGEST_BATCH)
    whole["train"] |= {
        "steps": _STEPS,
        "batch_size": size,
        "gradient_accumulation": max(n for n in range(1, adapted.train.gradient_accumulation + 1) if size % n == 0),
        "warmup": min(adapted.train.warmup_steps / adapted.train.steps, 0.99),  # the same share of fewer steps
        "validation_limit": None,
        "validation_steps": None,
    }
    return read_text(to_yaml(whole), f"the recipe of {run}")


def adapt_recipe(
    run: Path, source: Path, given: dict[str, Any], overrides: Sequence[str] = (), seed: int | None = None
) -> Recipe:
    """The recipe of an adaptation: that of the run, with the tasks in a file and defaults for few examples.

    `source` is a JSONL or CSV file of task family `files`, or a recipe whose sections replace the run's: `tasks`, and
    optionally `name`, `mixture`, `train` and `evaluate`. `given` is the section `adapt` without the run; `overrides`
    are those of `dyads train --set`.
    """
    base = adaptation(run, given)
    options = [f"{given['shots']}-shot"] if "shots" in given else []
    options += [str(given[key]) for key in ("parts", "start") if key in given]
    name = ", ".join([base.data["name"], " ".join([source.stem, *options])])
    base.data["name"] = re.sub(r'[/\\:*?"<>|]', "-", name)
    if seed is not None:
        base.data["seed"] = seed
    if source.suffix.lower() in (".jsonl", ".csv"):
        if not source.is_file():
            raise ConfigError(f"there is no file '{source}': --task needs a JSONL or CSV file of examples, or a recipe")
        tasks = read_text(to_yaml({"tasks": {"family": "files", "path": [str(source)]}}), str(source))
    else:
        tasks = read_file(source)
        if "tasks" not in tasks.data:
            raise ConfigError(f"{source} has no section `tasks`: name the new task there")
        if other := sorted(tasks.data.keys() - set(_SOURCE)):
            raise ConfigError(
                f"{source} has '{other[0]}', which comes from the adapted run or the command line: beside `tasks` only"
                f" {', '.join(_SOURCE[1:])} are allowed"
            )
    for override in overrides:
        if override.startswith("adapt."):
            raise ConfigError(f"--set {override}: use --shots, --parts or --start instead")
    layer = tasks.over(base)
    if overrides:
        layer = read_overrides(overrides).over(layer)
    return validated(Recipe, layer, str(source), recipe_keys)


_SOURCE = ("tasks", "name", "mixture", "train", "evaluate")

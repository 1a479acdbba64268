# SPDX-License-Identifier: Apache-2.0
"""How does a trained adapter learn a new task from a few examples, without harm to those that it knows?

The recipe is the run's own, with other tasks and a section `adapt` that names the run. Its adapter is loaded, every new
task gets a row in what the method keeps per task (tuner/add_task.py) and an encoder a head, and as many parts of it
train as the recipe says:

    task   the rows of the new tasks alone: the outputs of all others stay as they are, to the bit
    gate   what decides about the ranks as well: embeddings, routers, gates
    all    everything that the run trained: A and B as well, and what its config trains beside them

The heads of known tasks never change. An adaptation that was cut off goes on only from the adapter that it began from.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from dyads.data.batches import Collator, PairCollator, TaskDataset
from dyads.errors import ConfigError, RunError
from dyads.methods.base import Core
from dyads.models.heads import Head, TaskHeads, attach, heads_of
from dyads.models.heads import read as read_heads
from dyads.recipe.recipe_errors import validated
from dyads.recipe.spec import Recipe, differences, recipe_keys
from dyads.recipe.yaml_source import of_file, of_overrides, of_text, to_yaml
from dyads.runs.adapter import check_adapter, fingerprint, load_adapter
from dyads.runs.folder import RunFolder
from dyads.tasks import Task
from dyads.tuner import DyadsLayer, add_task, similarity_to_tasks
from dyads.tuner.routing import find_routing

__all__ = ["Adapted", "KeepRows", "adapt_recipe", "facts_of_source", "load_adapted", "source_of", "start_of"]


_STEPS, _LARGEST_BATCH = 100, 16
"""Of a training on a few examples, unless the recipe says otherwise."""
_ADAPTER = "default"
_FACT = "source_adapter"
"""The key of a run's environment that tells by a fingerprint which adapter it began from."""
_COMPARED, _AT_ONCE = 64, 16
"""Examples of a new task that are compared with the known ones, and how many of them at once."""


@dataclass
class Adapted:
    """A trained adapter with room for the new tasks."""

    model: PeftModel
    names: tuple[str, ...]
    """All tasks that the run knows now, the new ones last."""
    heads: tuple[Head, ...]
    grown: tuple[Tensor, ...]
    """What the method keeps per task, in all layers."""
    new: int
    """How many tasks are new: the last rows."""
    kept: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """Parameters of which only the last rows train, with the rows before them."""

    @property
    def heads_module(self) -> TaskHeads | None:
        """The heads that train; None where the model answers in text."""
        found = [m for m in self.model.modules() if isinstance(m, TaskHeads)]
        return found[-1] if found else None  # PEFT keeps the base model's own before the copy that it trains

    def choose(self, parts: str, method: str) -> None:
        """Let these parts train and nothing else; ConfigError where the method (its name) does not have them."""
        cores = [m.core(_ADAPTER) for m in self.model.modules() if isinstance(m, DyadsLayer)]
        gates = [p for core in cores for p in core.parameters()]
        whole: list[nn.Parameter] = []
        if parts == "gate":
            whole = gates
        if parts == "all":
            whole = [p for p in self.model.parameters() if p.requires_grad]  # as PEFT loads it to be trained again
        self.model.requires_grad_(False)
        for parameter in whole:
            parameter.requires_grad_(True)
        kept = len(self.kept)
        if parts == "task" and self._rows_are_read(cores):
            for tensor in self.grown:
                if isinstance(tensor, nn.Parameter):
                    self._train_last_rows(tensor, self.new)
        heads = self.heads_module
        if not whole and len(self.kept) == kept and (heads is None or parts == "gate"):
            ways = "--parts gate or --parts all" if gates and parts == "task" else "--parts all"
            raise ConfigError(f"'{method}' has no parts of its own for a {parts} to train: adapt with {ways}")
        if heads is not None:
            count = sum(head.rows for head in self.heads[-self.new :])
            self._train_last_rows(heads.weight, count)
            self._train_last_rows(heads.bias, count)

    def _rows_are_read(self, cores: Sequence[Core]) -> bool:
        """Whether gates depend on what is kept per task. One that was drawn once and for all may have embeddings beside
        it, which nothing but a loss reads."""
        rows = [t for t in self.grown if isinstance(t, nn.Parameter)]
        for row in rows:
            row.requires_grad_(True)
        place = torch.tensor([len(self.names) - 1], device=rows[0].device) if rows else torch.tensor([0])
        read = [core.of_task(place) for core in cores] if rows else []
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
        self.kept.append((parameter, parameter[:first].detach().clone()))

    def trainable(self, module: nn.Module) -> int:
        """How many numbers of a module train; of what trains by rows, the rows."""
        fixed = {id(parameter): rows.numel() for parameter, rows in self.kept}
        return sum(p.numel() - fixed.get(id(p), 0) for p in module.parameters() if p.requires_grad)

    @torch.no_grad()
    def start_from_most_similar(
        self, dataset: TaskDataset, collator: Collator | PairCollator, encoder_decoder: bool
    ) -> dict[str, dict[str, float]]:
        """Start every new task as the known one that its examples are most like, by MoRE's contrastive score.

        Of many examples 64 are compared. Gives, for every new task, the scores of all known ones, the highest first.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"  # where the Trainer puts the model
        self.model.to(device)
        known = len(self.names) - self.new
        found: dict[str, dict[str, float]] = {}
        for number, task in enumerate(dataset.tasks):
            place, total = dataset.places[number], torch.zeros(known)
            compared = range(len(task.train))
            if len(compared) > _COMPARED:
                compared = random.Random(f"compared/{task.name}").sample(compared, _COMPARED)  # type: ignore[assignment]
            for start in range(0, len(compared), _AT_ONCE):
                at = compared[start : start + _AT_ONCE]
                batch: dict[str, Any] = dict(collator([dataset[number, i] for i in at]))  # type: ignore[arg-type,misc]
                ids = batch.pop("task")
                if not encoder_decoder:
                    batch.pop("labels")
                inputs = {key: value.to(device) for key, value in batch.items()}
                total += similarity_to_tasks(self.model, inputs, ids.to(device), _ADAPTER)[:, :known].sum(0).cpu()
            scores = (total / len(compared)).tolist()
            best = max(range(known), key=scores.__getitem__)
            for tensor in self.grown:
                tensor[place] = tensor[best]
            ranked = sorted(zip(self.names, scores, strict=False), key=lambda pair: -pair[1])
            found[task.name] = {name: round(score, 6) for name, score in ranked}
        return found


class KeepRows(TrainerCallback):  # type: ignore[misc]
    """Puts the rows that are not to change back after every step: an optimizer may decay what has no gradient."""

    def __init__(self, adapted: Adapted) -> None:
        self.adapted = adapted

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, rows in self.adapted.kept:
            parameter[: len(rows)] = rows


def source_of(recipe: Recipe, tasks: Sequence[Task]) -> RunFolder:
    """The run that recipe.adapt names, looked at before anything is loaded.

    RunError where there is none, or its model or method is another one; ConfigError where it knows one of the tasks.
    """
    assert recipe.adapt is not None
    folder = RunFolder.open(recipe.adapt.run)
    check_adapter(folder)
    theirs = folder.recipe()
    for what in ("model", "method"):
        changed = differences(getattr(theirs, what).model_dump(), getattr(recipe, what).model_dump())
        changed.pop("attention", None)  # how, not what
        if changed:
            key, (then, now) = next(iter(changed.items()))
            raise RunError(
                f"'{folder.path}' was trained with {what}.{key} = {then!r}, and the recipe that adapts it has {now!r}:"
                f" leave the section {what} as it is there"
            )
    known = folder.task_names()
    if twice := [task.name for task in tasks if task.name in known]:
        raise ConfigError(
            f"'{folder.path}' knows task '{twice[0]}' already: give the new one another name, or train on with the old"
            " ones by `dyads train`"
        )
    return folder


def facts_of_source(recipe: Recipe, folder: RunFolder) -> dict[str, str]:
    """What the run in `folder` keeps in its environment about the run that it adapts: which adapter it began from.

    RunError where it began from another one than is there now: what is trained of it would lie on what is not.
    """
    assert recipe.adapt is not None
    source = RunFolder.open(recipe.adapt.run)
    now = fingerprint(source)
    began = folder.environment().get(_FACT, now) if folder.task_names() else now
    if began != now:
        raise RunError(
            f"cannot resume '{folder.path}': the adapter of '{source.path}' is not the one that it began from (SHA-256"
            f" {began[:12]}… then, {now[:12]}… now; was that run trained anew?), and the two would be mixed: put the"
            " earlier one back, or adapt the new one from the start with another --out"
        )
    return {_FACT: now}


def load_adapted(recipe: Recipe, folder: RunFolder, base: PreTrainedModel, tasks: Sequence[Task]) -> Adapted:
    """The adapter of the run, on its base model, with the new tasks in it."""
    assert recipe.adapt is not None
    heads: tuple[Head, ...] = ()
    if folder.heads.is_file():
        heads = read_heads(folder.heads)
        attach(base, heads, recipe.model.pool)
    model = load_adapter(base, folder, trains=True)
    routing = find_routing(model)
    gated = routing.names.get(_ADAPTER, ()) if routing else ()
    known = tuple(head.task for head in heads) or gated or folder.task_names()
    new = tuple(task.name for task in tasks)
    grown: tuple[Tensor, ...] = ()
    start = "fresh" if recipe.adapt.start == "fresh" else "mean"
    for name in new if gated else ():
        grown = add_task(model, name, start)
    if heads:
        more = heads_of(tasks)
        for module in [m for m in model.modules() if isinstance(m, TaskHeads)]:
            module.add(more)
        heads += more
    return Adapted(model, (*known, *new), heads, grown, len(new))


def start_of(recipe: Recipe, adapted: Adapted) -> str:
    """How the new tasks start: as the recipe says, or by the method: nearest where it can tell, else mean."""
    assert recipe.adapt is not None
    if not adapted.grown:
        if recipe.adapt.start is not None:
            raise ConfigError(
                f"adapt.start is {recipe.adapt.start}, but '{recipe.method.name}' keeps nothing per task that could"
                " start anywhere: leave it out"
            )
        return "none"
    if recipe.adapt.start is not None:
        return recipe.adapt.start
    layers = (m for m in adapted.model.modules() if isinstance(m, DyadsLayer))
    return "nearest" if any(layer.core(_ADAPTER).compares_samples for layer in layers) else "mean"


def adapt_recipe(
    run: Path, source: Path, given: dict[str, Any], overrides: Sequence[str] = (), seed: int | None = None
) -> Recipe:
    """The recipe that teaches a run the tasks in a file: the run's own, with what has to differ.

    `source` is JSONL or CSV (family files), or a recipe: what it says of its tasks, of training and of scoring lies on
    top of the run's. `given` is the section `adapt` without the run, and `overrides` are as for `dyads train --set`.
    """
    theirs = RunFolder.open(run).recipe()
    whole = theirs.resolved()
    del whole["tasks"]  # those of the source take their place whole, also where they are of the same family
    whole["adapt"] = {"run": str(run if run.name else run.resolve()), **given}
    told = [f"{given['shots']}-shot"] if "shots" in given else []
    told += [str(given[key]) for key in ("parts", "start") if key in given]
    whole["name"] = re.sub(r'[/\\:*?"<>|]', "-", ", ".join([theirs.name, " ".join([source.stem, *told])]))
    whole["seed"] = theirs.seed if seed is None else seed
    whole["evaluate"] = {**whole["evaluate"], "limit": None, "split": "test"}
    size = min(_LARGEST_BATCH, theirs.train.batch_size, given.get("shots", _LARGEST_BATCH))
    whole["train"] |= {
        "steps": _STEPS,
        "batch_size": size,
        "gradient_accumulation": max(n for n in range(1, theirs.train.gradient_accumulation + 1) if size % n == 0),
        "warmup": min(theirs.train.warmup_steps / theirs.train.steps, 0.99),  # as a share: there are fewer steps here
        "validation_limit": None,
    }
    if source.suffix.lower() in (".jsonl", ".csv"):
        if not source.is_file():
            raise ConfigError(f"there is no file '{source}'; it is to hold the rows of the new task")
        tasks = of_text(to_yaml({"tasks": {"family": "files", "path": [str(source)]}}), str(source))
    else:
        tasks = of_file(source)
        if "tasks" not in tasks.data:
            raise ConfigError(f"{source} has no section `tasks`, so it names no new task")
        if other := sorted(tasks.data.keys() - set(_SOURCE)):
            raise ConfigError(
                f"{source} has '{other[0]}', which the run decides or the command line says: beside `tasks` it may have"
                f" {', '.join(_SOURCE[1:])}"
            )
    for override in overrides:
        if override.startswith("adapt."):
            raise ConfigError(f"--set {override}: say it by --shots, --parts or --start")
    layer = tasks.over(of_text(to_yaml(whole), f"the recipe of {run}"))
    if overrides:
        layer = of_overrides(overrides).over(layer)
    return validated(Recipe, layer, str(source), recipe_keys)


_SOURCE = ("tasks", "name", "mixture", "train", "evaluate")

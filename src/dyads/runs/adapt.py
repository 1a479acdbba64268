# SPDX-License-Identifier: Apache-2.0
"""How does a trained adapter learn a new task from a few examples, without harm to those that it knows?

The recipe is the run's own, with other tasks and a section `adapt` that names the run. Its adapter is loaded, every new
task gets a row in what the method keeps per task (tuner/add_task.py) and an encoder a head, and as many parts of it
train as the recipe says:

    task   the rows of the new tasks alone: the outputs of all others stay as they are, to the bit
    gate   what decides about the ranks as well: embeddings, routers, gates
    all    A and B as well

The heads of known tasks never change.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from dyads.data.batches import Collator, PairCollator, TaskDataset
from dyads.errors import ConfigError, RunError, TaskError
from dyads.runs.config import Recipe, differences, recipe_keys
from dyads.runs.evaluate import load_adapter
from dyads.runs.folder import RunFolder
from dyads.runs.heads import Head, TaskHeads, attach, heads_of
from dyads.runs.heads import read as read_heads
from dyads.runs.keys import validated
from dyads.runs.layers import of_file, of_overrides, of_text, to_yaml
from dyads.tasks import Example, Suite, Task
from dyads.tuner import DyadsLayer, add_task, similarity_to_tasks
from dyads.tuner.routing import find_routing

__all__ = ["Adapted", "KeepRows", "adapt_recipe", "few_shot", "load_adapted", "start_of"]


_STEPS, _LARGEST_BATCH = 100, 16
"""Of a training on a few examples, unless the recipe says otherwise."""
_COMPARED = 16
"""Examples that are compared with the tasks at once."""


def few_shot(suite: Suite, shots: int | None, seed: int) -> Suite:
    """The suite with `shots` training examples of every task, chosen by the seed; all of them where shots is None.

    With labels they are chosen label by label in turn, so that no label has two more than another as long as it has
    examples left; which labels come first is chance too. TaskError for a task that has fewer.
    """
    return Suite(tuple(replace(task, train=_shots(task, shots, seed)) for task in suite.tasks), suite.notes)


def _shots(task: Task, shots: int | None, seed: int) -> tuple[Example, ...]:
    if shots is None:
        return task.train
    if len(task.train) < shots:
        raise TaskError(f"task '{task.name}' has {len(task.train)} training examples, fewer than {shots} shots")
    chance = random.Random(f"shots/{seed}/{task.name}")
    order = chance.sample(range(len(task.train)), len(task.train))
    if task.labels:
        by_label: dict[str, list[int]] = {}
        for i in order:
            by_label.setdefault(task.train[i].references[0], []).append(i)
        ranked = [(place, k, i) for k, places in enumerate(by_label.values()) for place, i in enumerate(places)]
        order = [i for _, _, i in sorted(ranked)]
    return tuple(task.train[i] for i in sorted(order[:shots]))


@dataclass
class Adapted:
    """A trained adapter with room for the new tasks."""

    model: PeftModel
    names: tuple[str, ...]
    """All tasks it knows now, the new ones last; the new ones alone where it keeps nothing per task."""
    heads: tuple[Head, ...]
    grown: tuple[Tensor, ...]
    """What the method keeps per task, in all layers."""
    new: int
    """How many tasks are new: the last rows."""
    adapter: str = "default"
    kept: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """Parameters of which only the last rows train, with the rows before them."""

    @property
    def heads_module(self) -> TaskHeads | None:
        """The heads that train; None where the model answers in text."""
        found = [m for m in self.model.modules() if isinstance(m, TaskHeads)]
        return found[-1] if found else None  # PEFT keeps the base model's own before the copy that it trains

    def choose(self, parts: str, method: str) -> None:
        """Let these parts train and nothing else; ConfigError where the method (its name) does not have them."""
        layers = [m for m in self.model.modules() if isinstance(m, DyadsLayer)]
        rows = [t for t in self.grown if isinstance(t, nn.Parameter)]
        whole: list[nn.Parameter] = []
        if parts != "task":
            whole = [p for layer in layers for p in layer.core(self.adapter).parameters()]
        if parts == "all":
            prefix = self.model.base_model.prefix
            whole = [p for name, p in self.model.named_parameters() if prefix in name]
        heads = self.heads_module
        if not whole and not rows and (heads is None or parts == "gate"):
            ways = "--parts all" if parts == "gate" or not layers else "--parts gate or --parts all"
            raise ConfigError(f"'{method}' has no parts of its own for a {parts} to train: adapt with {ways}")
        self.model.requires_grad_(False)
        for parameter in whole:
            parameter.requires_grad_(True)
        if parts == "task":
            for parameter in rows:
                self._train_last_rows(parameter, self.new)
        if heads is not None:
            count = sum(head.rows for head in self.heads[-self.new :])
            self._train_last_rows(heads.weight, count)
            self._train_last_rows(heads.bias, count)

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

        Gives, for every new task, the scores of all known ones, the most similar first.
        """
        device = next(self.model.parameters()).device
        known = len(self.names) - self.new
        found: dict[str, dict[str, float]] = {}
        for number, task in enumerate(dataset.tasks):
            place, total = dataset.places[number], torch.zeros(known)
            for start in range(0, len(task.train), _COMPARED):
                at = range(start, min(start + _COMPARED, len(task.train)))
                batch: dict[str, Any] = dict(collator([dataset[number, i] for i in at]))  # type: ignore[arg-type,misc]
                ids = batch.pop("task")
                if not encoder_decoder:
                    batch.pop("labels")
                inputs = {key: value.to(device) for key, value in batch.items()}
                total += similarity_to_tasks(self.model, inputs, ids.to(device), self.adapter)[:, :known].sum(0).cpu()
            scores = (total / len(task.train)).tolist()
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


def load_adapted(recipe: Recipe, base: PreTrainedModel, tasks: Sequence[Task], is_encoder: bool) -> Adapted:
    """The adapter of the run that recipe.adapt names, on its base model, with the new tasks in it.

    RunError where there is no such run or its model or method is another one; ConfigError where it knows one of the
    tasks already.
    """
    assert recipe.adapt is not None
    folder = RunFolder.open(recipe.adapt.run)
    theirs = folder.recipe()
    for what in ("model", "method"):
        changed = differences(getattr(theirs, what).model_dump(), getattr(recipe, what).model_dump())
        if changed:
            key, (then, now) = next(iter(changed.items()))
            raise RunError(
                f"'{folder.path}' was trained with {what}.{key} = {then!r}, and the recipe that adapts it has {now!r}:"
                f" leave the section {what} as it is there"
            )
    new = tuple(task.name for task in tasks)
    heads: tuple[Head, ...] = ()
    if is_encoder:
        heads = read_heads(folder.heads)
        attach(base, heads, recipe.model.pool)
    model = load_adapter(base, folder)
    routing = find_routing(model)
    gated = routing.names.get("default", ()) if routing else ()
    known = tuple(head.task for head in heads) or gated
    if twice := [name for name in new if name in known]:
        raise ConfigError(
            f"'{folder.path}' knows task '{twice[0]}' already: give the new one another name, or train on with the old"
            " ones by `dyads train`"
        )
    if gated and gated == tuple(str(i) for i in range(len(gated))):
        raise ConfigError(
            f"the tasks of '{folder.path}' have numbers in the place of names (num_tasks), so a new one has no place"
            " among them: train it with `tasks`, or leave both out"
        )
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
    return "nearest" if any(layer.core(adapted.adapter).compares_samples for layer in layers) else "mean"


def adapt_recipe(
    run: Path, source: Path, given: dict[str, Any], overrides: Sequence[str] = (), seed: int | None = None
) -> Recipe:
    """The recipe that teaches a run the tasks in a file: the run's own, with what has to differ.

    `source` is JSONL or CSV (family files), or a recipe whose sections lie on top of the run's; `given` goes into the
    section `adapt`, and `overrides` are as for `dyads train --set`.
    """
    theirs = RunFolder.open(run).recipe()
    whole = theirs.resolved()
    del whole["tasks"]  # those of the source take their place whole, also where they are of the same family
    whole["adapt"] = {"run": str(run), **given}
    whole["name"] = ", ".join([theirs.name, *([f"{given['shots']}-shot"] if "shots" in given else [])])
    whole["evaluate"] = {**whole["evaluate"], "limit": None, "split": "test"}
    size = min(_LARGEST_BATCH, theirs.train.batch_size, given.get("shots", _LARGEST_BATCH))
    parts = max(n for n in range(1, theirs.train.gradient_accumulation + 1) if size % n == 0)
    whole["train"] = {
        **whole["train"],
        "steps": _STEPS,
        "batch_size": size,
        "gradient_accumulation": parts,
        "validation_limit": None,
        "warmup": min(theirs.train.warmup, _STEPS) if theirs.train.warmup >= 1 else theirs.train.warmup,
    }
    whole["seed"] = theirs.seed if seed is None else seed
    layer = of_text(to_yaml(whole), f"the recipe of {run}")
    if source.suffix.lower() in (".jsonl", ".csv"):
        tasks = of_text(to_yaml({"tasks": {"family": "files", "path": [str(source)]}}), str(source))
        if not source.is_file():
            raise ConfigError(f"there is no file '{source}'; it is to hold the rows of the new task")
    else:
        tasks = of_file(source)
        if "tasks" not in tasks.data:
            raise ConfigError(f"{source} has no section `tasks`, so it names no new task")
    layer = tasks.over(layer)
    if overrides:
        layer = of_overrides(overrides).over(layer)
    return validated(Recipe, layer, str(source), recipe_keys)

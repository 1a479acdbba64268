# SPDX-License-Identifier: Apache-2.0
"""Approximate export of adapters whose gates look at the token: the best LoRA of a rank on given data, with its price.

Three LoRAs are made from the training split of the data: by regression (regression.py), layer by layer with the layers
before already replaced; with the gates frozen at their mean; and by the SVD of the mean update. The one whose outputs
on the other splits are nearest to the adapter's is exported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dyads.console import SILENT, Reporter
from dyads.data.batches import PairTokenizer
from dyads.errors import ConfigError, RoutingError, RunError, did_you_mean
from dyads.export.activations import (
    groups_of,
    inner,
    inner_factor,
    mean_matrices,
    moments,
    outer_factor,
    replaced,
    watched,
)
from dyads.export.gguf_adapter import GgufLayout, gguf_layout
from dyads.export.lora import Check, Exported, Lora, refuse_full, write_lora, write_loras
from dyads.export.merged import Merged, write_merged
from dyads.export.regression import mean_gates, mean_update, reduced_rank
from dyads.export.verify import Verification, base_of, compare, float_model, model_logits, plain_prompts, prompts_for
from dyads.markdown import markdown_table
from dyads.recipe.file_names import file_name
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import unfinished
from dyads.runs.saved import SavedAdapter
from dyads.scoring.answerer import Answerer
from dyads.tasks import SPLITS, Example, Task, load_suite
from dyads.tasks.files import FilesSpec
from dyads.tasks.own_rows import ANY, OwnRowsSpec
from dyads.tasks.template import Template
from dyads.tuner.layer import DyadsLinear, adapted_layers

__all__ = ["DEFAULT_RANK", "Candidate", "Price", "approximate", "candidates_of", "fit_layers", "tasks_of"]

DEFAULT_RANK = 16
"""The largest rank that vLLM takes unless `--max-lora-rank` raises it."""
_LAST = 64
"""The positions at the end of a sequence whose outputs are compared."""
_ROWS = 4
"""Sequences in a batch; they have the same length, so that none is padded."""


@dataclass(frozen=True)
class Candidate:
    """A LoRA in the place of an adapter, measured on held-out instances."""

    name: str
    lora: Lora
    error: float
    """|output − adapter's| / |base model's − adapter's|: 0 is the adapter, 1 is no better than the base model."""
    layers: dict[str, float]
    """|ΔW x − y| / |y| of every layer at its inputs x, with the adapter's y, and the LoRA in all layers before it."""
    score: float


@dataclass(frozen=True)
class Price:
    """The loss of an approximate export."""

    task: str | None
    """None: one LoRA for all tasks of the data."""
    rank: int
    fitted: int
    """Training instances."""
    tokens: int
    held_out: int
    """Instances that the errors and scores are of."""
    metric: str
    score: float
    """The adapter's own."""
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        """The candidate with the smallest error of outputs, the first of equals."""
        return min(self.candidates, key=lambda candidate: candidate.error)

    @property
    def table(self) -> list[list[str]]:
        """Rows of the scores and errors, the header first."""
        rows = [["", "relative error", self.metric], ["adapter", "–", f"{self.score:.1f}"]]
        for one in self.candidates:
            name = one.name + (" (exported)" if one is self.chosen else "")
            rows.append([name, f"{one.error:.3f}", f"{one.score:.1f}"])
        return rows

    @property
    def layer_table(self) -> list[list[str]]:
        """Rows of the errors by layer, the header first."""
        rows = [["relative error in layer", *[one.name for one in self.candidates]]]
        return [
            *rows,
            *[[module, *[f"{c.layers[module]:.3f}" for c in self.candidates]] for module in self.chosen.layers],
        ]

    @property
    def candidate_facts(self) -> dict[str, dict[str, float]]:
        """Error and score by candidate, for programs."""
        return {one.name: {"error": one.error, "score": one.score} for one in self.candidates}

    @property
    def title(self) -> str:
        """One line about the data."""
        of_task = "all tasks" if self.task is None else self.task
        return (
            f"{of_task}: rank {self.rank}, fitted on {self.fitted} instances ({self.tokens:,} tokens), measured on"
            f" {self.held_out} held out"
        )

    @property
    def text(self) -> str:
        """Tables for a terminal."""
        return "\n".join([self.title, *_aligned(self.table), *_aligned(self.layer_table)])

    @property
    def markdown(self) -> str:
        """The section of a card."""
        return "\n".join(
            [
                "## What it loses",
                "",
                self.title + ".",
                "",
                *markdown_table(self.table[0], self.table[1:]),
                "",
                *markdown_table(self.layer_table[0], self.layer_table[1:]),
            ]
        )


def approximate(
    run: RunFolder,
    data: Path,
    out: Path,
    *,
    rank: int = DEFAULT_RANK,
    task: str | None = None,
    all_tasks: bool = False,
    merges: bool = False,
    gguf: bool = False,
    verifies: bool = True,
    reporter: Reporter = SILENT,
) -> tuple[list[Exported] | list[Merged], list[Price], Verification | None]:
    """Write the nearest LoRA of a rank, for a task, for every task of the data, or one for all of them, with its price.

    `data` is a file of the family `files`; rows of a task that the run knows are put into the task's form. With
    `merges` it is merged into the base model; with `gguf` the folder has a GGUF adapter too. RoutingError where the
    gates look at the task and none is named.
    """
    adapter = SavedAdapter.read(run.path)
    if adapter.method == "lora":
        raise RunError(f"cannot approximate the adapter in '{adapter.path}' (lora): it is an ordinary LoRA already")
    if rank < 1:
        raise ConfigError(f"--rank must be at least 1, got {rank}")
    refuse_full(out, again=False)
    layout = gguf_layout(adapter, run) if gguf else None
    tasks = tasks_of(run, data)
    known = [one.name for one in tasks]
    if task is not None and task not in known:
        raise RoutingError(f"'{data}' has no rows of task '{task}'{did_you_mean(task, known)}")
    if adapter.task_names and task is None and not all_tasks:
        raise RoutingError(
            f"cannot approximate the adapter in '{adapter.path}' ({adapter.method}) for all tasks at once: its gates"
            f" look at the task; name one (--task), or use --all-tasks{did_you_mean('', known)}"
        )
    sets: dict[str | None, list[Task]] = {task: [one for one in tasks if task in (None, one.name)]}
    if all_tasks:
        sets = {one.name: [one] for one in tasks}
    answerer = Answerer(run)
    answerer.check([one for several in sets.values() for one in several])
    base, prompts, expected = base_of(adapter, run), {}, {}
    prices: dict[str | None, Price] = {}
    for name, several in sets.items():
        prices[name] = _price(answerer, name, several, rank, reporter)
    needs_task = answerer.needs_task
    del answerer
    if verifies:
        prompts = {name: plain_prompts(base, texts) for name, texts in prompts_for(run, sets).items()}
        expected = _expected(float_model(adapter, run, base), prices, prompts, needs_task)
    verified: list[Verification] = []

    def check(folders: Mapping[str | None, Path]) -> None:
        if verifies:
            verified.append(compare(folders, prompts, expected, base, merged=merges))

    written = _write(adapter, run, out, prices, all_tasks, merges, layout, check)
    return written, list(prices.values()), verified[0] if verified else None


def tasks_of(run: RunFolder, data: Path) -> list[Task]:
    """The tasks of a data file, those that the run knows in the form that their prompts had in training.

    Labels and metrics that the run's recipe gives to tasks of own rows hold here too.
    """
    templates = run.templates()
    tasks = load_suite(FilesSpec(path=(data,))).tasks
    spec = run.recipe().tasks
    if isinstance(spec, OwnRowsSpec):
        names = {ANY, *(task.name for task in tasks)}
        labels = {name: value for name, value in spec.labels.items() if name in names}
        metric = {name: value for name, value in spec.metric.items() if name in names}
        if labels or metric:
            tasks = load_suite(FilesSpec(path=(data,), labels=labels, metric=metric)).tasks
    return [_in_form(task, templates.get(task.name)) for task in tasks]


def _in_form(task: Task, template: Template | None) -> Task:
    """The task with its inputs put into a template; unchanged where that has several columns, or a row has no input."""
    splits = {name: task.split(name) for name in SPLITS}
    column = template.input_column if template is not None else None
    if template is None or column is None or any(len(e.segments) != 1 for part in splits.values() for e in part):
        return task

    def formed(example: Example) -> Example:
        given = {column: example.segments[0]}
        return template.example(given, id=example.id, references=example.references, choices=example.choices)

    train, validation, test = (tuple(map(formed, splits[name])) for name in SPLITS)
    return replace(task, template=template, train=train, validation=validation, test=test)


def _price(answerer: Answerer, name: str | None, tasks: list[Task], rank: int, reporter: Reporter) -> Price:
    fitted = [(task, example) for task in tasks for example in task.train]
    held_out = [[*task.validation, *task.test] for task in tasks]
    batches = _batches(answerer, fitted)
    model, layers = answerer.model, adapted_layers(answerer.model)
    loras = candidates_of(model, layers, batches, rank, reporter)
    others = _batches(answerer, [(task, e) for task, part in zip(tasks, held_out, strict=True) for e in part])
    errors = _errors(model, layers, loras, others)
    spec = answerer.recipe.evaluate
    if spec.answer == "likelihood" and not all(task.labels for task in tasks):
        spec = spec.model_copy(update={"answer": "generate", "length_normalise": False})

    def score() -> tuple[float, str]:
        texts = answerer.answer(tasks, held_out, spec, reporter)
        found = [task.score(t, part)[0] for task, t, part in zip(tasks, texts, held_out, strict=True)]
        metrics = dict.fromkeys(one.metric for one in found)
        return sum(one.value for one in found) / len(found), ", ".join(metrics)

    own, metric = score()
    candidates = []
    for key, lora in loras.items():
        with replaced(layers, lora):
            candidates.append(Candidate(key, lora, *errors[key], score()[0]))
    return Price(
        name,
        max(max(lora.ranks.values()) for lora in loras.values()),
        len(fitted),
        sum(batch["input_ids"].numel() for batch in batches),
        sum(map(len, held_out)),
        metric,
        own,
        tuple(candidates),
    )


@torch.no_grad()
def candidates_of(
    model: Any,
    layers: Mapping[str, DyadsLinear],
    batches: Sequence[Mapping[str, Any]],
    rank: int,
    reporter: Reporter = SILENT,
) -> dict[str, Lora]:
    """The three LoRAs of a rank that are fitted on batches, by name; the model is unchanged."""
    means = mean_matrices(model, layers, batches)
    layers = {name: layer for name, layer in layers.items() if name in means}  # those that the data reaches
    made = {"mean gates": mean_gates, "mean update": mean_update}
    rivals = {
        key: _lora({n: make(outer_factor(layer), means[n], inner_factor(layer), rank) for n, layer in layers.items()})
        for key, make in made.items()
    }
    return {"regression": fit_layers(model, layers, means, batches, rank, reporter), **rivals}


@torch.no_grad()
def fit_layers(
    model: Any,
    layers: Mapping[str, DyadsLinear],
    means: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Any]],
    rank: int,
    reporter: Reporter = SILENT,
) -> Lora:
    """The LoRA by regression, in the order of the forward pass, every layer with those before it already replaced.

    `means` has E[G] of every layer, for the prior. Layers with the same input are fitted in one pass.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    groups = groups_of(model, layers, batches[0])
    with reporter.track("fitting", sum(len(group) for group, _ in groups), speed="layers/s") as tracker:
        for group, calls in groups:
            with replaced(layers, _lora(found)):
                sums = moments(model, layers, group, calls, batches)
            assert sums.xx is not None
            for name in group:
                layer = layers[name]
                prior = means[name].float() @ inner_factor(layer)
                found[name] = reduced_rank(outer_factor(layer), sums.xx, sums.ux[name], prior, rank)
            tracker.advance(len(group))
    return _lora({name: found[name] for name in layers if name in found})


def _lora(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Lora:
    """A LoRA of (up, down) by module, in float32."""
    downs = {name: down.float().cpu() for name, (_, down) in pairs.items()}
    return Lora(downs, {name: up.float().cpu() for name, (up, _) in pairs.items()})


@torch.no_grad()
def _errors(
    model: Any, layers: Mapping[str, DyadsLinear], loras: Mapping[str, Lora], batches: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, dict[str, float]]]:
    """By LoRA, the relative error of the model's outputs and that of every layer's update."""
    some = next(iter(loras.values()))
    nothing = Lora({n: down[:0] for n, down in some.downs.items()}, {n: up[:, :0] for n, up in some.ups.items()})
    wrong, size = dict.fromkeys(loras, 0.0), 0.0
    by_layer = {key: {name: [0.0, 0.0] for name in lora.downs} for key, lora in loras.items()}
    for batch in batches:
        own = _outputs(model, batch)
        with replaced(layers, nothing):
            size += float((_outputs(model, batch) - own).square().sum())
        for key, lora in loras.items():
            sums = by_layer[key]

            def see(name: str, x: Tensor, lora: Lora = lora, sums: dict[str, list[float]] = sums) -> None:
                y = F.linear(inner(layers[name], x)[0], outer_factor(layers[name]))
                down, up = lora.downs[name].to(x.device), lora.ups[name].to(x.device)
                sums[name][0] += float((F.linear(F.linear(x.float(), down), up) - y).square().sum())
                sums[name][1] += float(y.square().sum())

            with replaced(layers, lora), watched({name: layers[name] for name in lora.downs}, see):
                wrong[key] += float((_outputs(model, batch) - own).square().sum())
    return {
        key: (_relative(wrong[key], size), {name: _relative(*sums) for name, sums in by_layer[key].items()})
        for key in loras
    }


def _relative(wrong: float, size: float) -> float:
    """The root of wrong / size; 0 where both are 0, and inf where only the size is."""
    if size > 0:
        return math.sqrt(wrong / size)
    return 0.0 if wrong == 0 else float("inf")


def _outputs(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logits, or an encoder's hidden states, at the last positions."""
    output = model(**batch)
    logits: Tensor = output.logits if "logits" in output else output[0]
    return logits[:, -_LAST:].float()


def _batches(answerer: Answerer, examples: Sequence[tuple[Task, Example]]) -> list[dict[str, Any]]:
    """Arguments of the model's call for prompts with their answers, only sequences of one length in a batch."""
    tokenizer, needs_task = answerer.prompt_tokenizer, answerer.needs_task
    rows: list[dict[str, Any]] = []
    for task, example in examples:
        limit = task.max_prompt_tokens
        if isinstance(tokenizer, PairTokenizer):
            ((ids, types),) = tokenizer.read([example], limit)
            row: dict[str, Any] = {"input_ids": ids, **({"token_type_ids": types} if answerer.collator.types else {})}
        else:
            encoded = tokenizer.encode(example, 0, limit)
            row = {"input_ids": encoded.input_ids}
            if tokenizer.encoder_decoder:
                row["labels"] = encoded.labels
        rows.append({**row, "task": task.name})
    rows.sort(key=_lengths)
    found = []
    for _, same in groupby(rows, key=_lengths):
        alike = list(same)
        for start in range(0, len(alike), _ROWS):
            some = alike[start : start + _ROWS]
            batch: dict[str, Any] = {
                key: torch.tensor([row[key] for row in some], device=answerer.device)
                for key in some[0]
                if key != "task"
            }
            found.append({**batch, **({"task": [row["task"] for row in some]} if needs_task else {})})
    return found


def _lengths(row: Mapping[str, Any]) -> tuple[int, int]:
    return len(row["input_ids"]), len(row.get("labels", ()))


def _expected(
    model: Any, prices: Mapping[str | None, Price], prompts: Mapping[str | None, Sequence[Tensor]], needs_task: bool
) -> dict[str | None, list[Tensor]]:
    """The logits of the chosen LoRAs, with the model in float32, as the exported folder is reloaded."""
    layers = adapted_layers(model)
    found = {}
    for name, price in prices.items():
        with replaced(layers, price.chosen.lora):
            found[name] = model_logits(model, prompts[name], name if needs_task else None)
    return found


def _write(
    adapter: SavedAdapter,
    run: RunFolder,
    out: Path,
    prices: Mapping[str | None, Price],
    all_tasks: bool,
    merges: bool,
    gguf: GgufLayout | None,
    check: Check,
) -> list[Exported] | list[Merged]:
    sections = {name: price.markdown for name, price in prices.items()}
    if all_tasks and not merges:
        rank = max(price.rank for price in prices.values())
        names = [str(name) for name in prices]
        return write_loras(
            adapter,
            out,
            names,
            lambda name: prices[name].chosen.lora,
            rank,
            gguf=gguf,
            prices=cast("Any", sections),
            check=check,
        )
    written: list[Any] = []
    with unfinished(out) as folder:
        for name, price in prices.items():
            at = file_name(str(name)) if all_tasks else ""
            lora, places = price.chosen.lora, (folder / at, out / at)
            if merges:
                written.append(write_merged(adapter, run, lora, *places, task=name, price=sections[name]))
            else:
                options: dict[str, Any] = {"task": name, "rank": price.rank, "gguf": gguf, "price": sections[name]}
                written.append(write_lora(adapter, lora, *places, **options))
        check({name: folder / (file_name(str(name)) if all_tasks else "") for name in prices})
    return written


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table with columns of one width: texts on the left, numbers on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]

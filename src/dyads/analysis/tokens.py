# SPDX-License-Identifier: Apache-2.0
"""Tokens: for one input, which experts every token used, by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dyads.analysis.gates import Reader, shares, watch
from dyads.analysis.inspection import kinds_of
from dyads.analysis.named_array import NamedArray, Table
from dyads.errors import RunError, did_you_mean
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter, sort_key
from dyads.tasks import Example, Task
from dyads.tuner.layer import adapted_layers

__all__ = ["TokenExperts", "answer", "token_experts", "token_experts_of"]

QUESTION = "the experts that each token of one instance used"


@dataclass(frozen=True)
class TokenExperts:
    """The weights of the experts for the tokens of one instance: its prompt and its first reference."""

    task: str
    instance: str
    texts: tuple[str, ...]
    """The texts of the tokens."""
    weights: NamedArray
    """(token layer choice expert): weights that have the sum 1 in every choice."""
    notes: tuple[str, ...]

    def most(self, layer: str | None = None) -> list[tuple[int, float]]:
        """For every token, the expert with the most weight and that weight, in one layer or as a mean over layers.

        Weights of several choices are averaged.
        """
        values = (self.weights.at(layer=layer) if layer else self.weights.mean("layer")).mean("choice").values
        return [(int(row.argmax()), float(row.max())) for row in values]

    @property
    def tables(self) -> tuple[Table, ...]:
        """The most used expert of every token, by kind of module."""
        kinds = np.array(kinds_of(self.weights.axes["layer"])[0])
        names = list(dict.fromkeys(kinds.tolist()))
        by_kind = [self.weights.values[:, kinds == kind].mean((1, 2)) for kind in names]
        rows = []
        for i, text in enumerate(self.texts):
            cells = (f"{values[i].argmax()} {100 * values[i].max():3.0f} %" for values in by_kind)
            rows.append((f"{i} {text!r}", *cells))
        title = f"Most used expert by token: {self.task}, {self.instance}"
        return (Table(title, ("token", *names), tuple(rows)),)


def answer(run: Path, task: str | None = None, instance: str | None = None) -> TokenExperts:
    """The answer of `dyads inspect --what tokens`."""
    return token_experts(run, task, instance)


def token_experts(run: str | Path | RunFolder, task: str | None = None, instance: str | None = None) -> TokenExperts:
    """The experts of one instance's tokens; by default the first of the run's first task."""
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    adapter = SavedAdapter.read(folder.path)
    if not adapter.looks_at & {"x", "h"}:
        raise RunError(
            f"the gates of the adapter in '{folder.path}' do not look at the layer's input, so all tokens use the same"
            " experts; `dyads inspect RUN --what routing` shows which"
        )
    reader = Reader(folder)
    names = [one.name for one in reader.tasks]
    if task is not None and task not in names:
        raise RunError(f"'{folder.path}' has no task '{task}'{did_you_mean(task, names)}")
    chosen = reader.tasks[names.index(task) if task is not None else 0]
    examples = reader.examples(chosen)
    found = next((e for e in examples if instance in (None, e.id)), None)
    if found is None:
        ids = [example.id for example in examples]
        raise RunError(f"task '{chosen.name}' has no instance '{instance}'{did_you_mean(str(instance), ids)}")
    return token_experts_of(reader, chosen, found)


def token_experts_of(reader: Reader, task: Task, example: Example) -> TokenExperts:
    """The experts of one instance's tokens; of an encoder-decoder those of the encoder."""
    found: dict[str, Tensor] = {}
    decoder = {path for path, layer in adapted_layers(reader.model).items() if layer.of_decoder}

    def keep(name: str, weights: Tensor, matrices: Callable[[], Tensor]) -> None:
        if name not in decoder:
            found[name] = shares(weights.double())

    with watch(reader.model, keep):
        count = reader.read(task, example)
    layers = sorted((name for name, weights in found.items() if len(weights) == count), key=sort_key)
    if not layers:
        raise RunError(f"no adapted layer sees the tokens of '{example.id}' one by one")
    values = np.stack([found[name].numpy() for name in layers], axis=1)
    ids = reader.encode(task, example)["input_ids"][0].tolist()
    texts = tuple(reader.answerer.tokenizer.decode([i]) for i in ids)
    axes = {"token": range(count), "layer": layers, "choice": range(values.shape[2])}
    notes = ("the decoder's layers are left out",) if decoder else ()
    array = NamedArray.of(values, **axes, expert=range(values.shape[3]))
    return TokenExperts(task.name, example.id, texts, array, notes)

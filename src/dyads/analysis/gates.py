# SPDX-License-Identifier: Apache-2.0
"""Gates of a trained adapter, by task and layer.

Gates that look at the task alone, or at nothing, are computed from the saved weights. Those that look at the layer's
input are means over the tokens of some instances, for which the base model is loaded and run. An instance is read as
in training, prompt and reference together, one at a time, so that there is no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyads.analysis.named_array import NamedArray
from dyads.data.batches import Collator, PairTokenizer, pad_id_of
from dyads.errors import RunError
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter
from dyads.scoring.answerer import Answerer
from dyads.tasks import Example, Task, load_suite
from dyads.tuner.layer import DyadsLinear, adapted_layers

__all__ = [
    "ALL_TASKS",
    "INSTANCES",
    "Reader",
    "TaskGates",
    "check_equal_sizes",
    "entropy",
    "exact_gates",
    "gates_of",
    "shares",
    "watch",
]

INSTANCES = 4
"""Instances of each task that are read, the first of the scored split."""
ALL_TASKS = "all tasks"
"""The label in place of a task where gates look at nothing."""
Seen = Callable[[str, Tensor, Callable[[], Tensor]], None]
"""Called with a layer's path, the weights of its experts (tokens K n), and a function for its G (tokens q p)."""


@dataclass(frozen=True)
class TaskGates:
    """The gates of every task in every layer."""

    adapter: SavedAdapter
    weights: NamedArray
    """(task layer choice expert): mean weight, normalised so that the experts of a choice have the sum 1."""
    entropy: NamedArray
    """(task layer choice): mean entropy of the weights of one token, from 0 (one expert) to 1 (all equal)."""
    matrices: tuple[Tensor, ...]
    """By layer: the mean G of every task (T q p)."""
    tokens: int
    """How many tokens were read; 0 where the gates do not depend on any."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of the arrays."""
        return self.weights.axes["task"]

    @property
    def notes(self) -> list[str]:
        """What the numbers are means of."""
        if not self.tokens:
            return []
        many = f"{self.tokens:,} tokens of {len(self.tasks)} task{'s' * (len(self.tasks) != 1)}"
        return [f"gates depend on the layer's input: the numbers are means over {many}"]


def gates_of(run: str | Path | RunFolder, instances: int = INSTANCES, reader: Reader | None = None) -> TaskGates:
    """The gates of the adapter of a run; its base model is loaded only where they depend on the layer's input.

    `reader` is the run's, where it is loaded already.
    """
    path = run.path if isinstance(run, RunFolder) else Path(run)
    adapter = SavedAdapter.read(path)
    if any(layer.core is None for layer in adapter.layers):
        raise RunError(
            f"the adapter in '{path}' is PEFT's own LoRA, which has no gates: its update is the same for every input;"
            " `dyads inspect RUN` shows its sizes"
        )
    if not adapter.looks_at & {"x", "h"}:
        return exact_gates(adapter)
    return _measured_gates(adapter, reader or Reader(_run_of(path)), instances)


def _run_of(path: Path) -> RunFolder:
    folder = RunFolder(path)
    if not folder.is_run and RunFolder(path.absolute().parent).is_run:
        folder = RunFolder(path.absolute().parent)  # the adapter's folder inside a run
    if not folder.is_run:
        raise RunError(
            f"the gates of the adapter in '{path}' depend on the layer's input, so the run's model and tasks are"
            " needed: give the folder of a run"
        )
    return folder


def exact_gates(adapter: SavedAdapter) -> TaskGates:
    """The gates of an adapter that look at the task alone, or at nothing."""
    tasks = adapter.task_names or (ALL_TASKS,)
    weights, matrices = [], []
    for layer in adapter.layers:
        core, A = layer.core, layer.A
        assert core is not None
        assert A is not None
        wide = torch.promote_types(A.dtype, torch.float32)
        h, x = A.new_zeros(1, core.p, dtype=wide), A.new_zeros(1, A.shape[1], dtype=wide)
        ids = [torch.tensor([t]) if adapter.task_names else None for t in range(len(tasks))]
        with torch.no_grad():
            weights.append(torch.stack([_rows(core.choices(h, x, task), 2).mean(0) for task in ids]))
        matrices.append(torch.stack([layer.matrix(t) for t in range(len(tasks))]))
    stacked = shares(_of_layers(adapter, weights, 1).double())
    return _result(adapter, tasks, stacked, entropy(stacked), tuple(matrices), 0)


def _measured_gates(adapter: SavedAdapter, reader: Reader, instances: int) -> TaskGates:
    modules = [layer.module for layer in adapter.layers]
    weights, spread, matrices = [], [], []
    tokens = 0
    for task in reader.tasks:
        sums: dict[str, list[Any]] = {name: [0, 0.0, 0.0, 0.0] for name in modules}
        for example in reader.examples(task)[:instances]:
            with watch(reader.model, partial(_add, sums)):
                tokens += reader.read(task, example)
        if not all(total[0] for total in sums.values()):
            idle = next(name for name, total in sums.items() if not total[0])
            raise RunError(f"no instance of task '{task.name}' passes through '{idle}': there is nothing to analyse")
        weights.append(_of_layers(adapter, [sums[name][1] / sums[name][0] for name in modules], 0))
        spread.append(torch.stack([sums[name][2] / sums[name][0] for name in modules]))
        matrices.append([sums[name][3] / sums[name][0] for name in modules])
    by_layer = tuple(torch.stack(of_layer) for of_layer in zip(*matrices, strict=True))
    names = tuple(task.name for task in reader.tasks)
    return _result(adapter, names, shares(torch.stack(weights)), torch.stack(spread), by_layer, tokens)


def _add(sums: dict[str, list[Any]], name: str, weights: Tensor, matrices: Callable[[], Tensor]) -> None:
    total, w = sums[name], shares(weights.double())
    total[0] += len(w)
    total[1] = total[1] + w.sum(0)
    total[2] = total[2] + entropy(w).sum(0)
    total[3] = total[3] + matrices().double().sum(0)


def _of_layers(adapter: SavedAdapter, by_layer: Sequence[Tensor], axis: int) -> Tensor:
    """The weights of all layers along a new axis; RunError where layers differ in their choices or experts."""
    check_equal_sizes(adapter, [tuple(weights.shape[-2:]) for weights in by_layer])
    return torch.stack(list(by_layer), dim=axis)


def check_equal_sizes(adapter: SavedAdapter, sizes: Sequence[tuple[int, ...]]) -> None:
    """RunError unless all layers have as many choices and experts."""
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        of_first, of_other = ("×".join(map(str, sizes[i])) for i in (0, other))
        raise RunError(
            f"the layers of the adapter in '{adapter.path}' have gates of unequal sizes (rank_pattern): {of_first} in"
            f" '{adapter.layers[0].module}' and {of_other} in '{adapter.layers[other].module}', so no table of layers"
            " and experts holds them; `dyads inspect RUN` shows every layer's size"
        )


def _result(
    adapter: SavedAdapter,
    tasks: Sequence[str],
    weights: Tensor,
    spread: Tensor,
    matrices: tuple[Tensor, ...],
    tokens: int,
) -> TaskGates:
    modules = [layer.module for layer in adapter.layers]
    places = {"task": tasks, "layer": modules, "choice": range(weights.shape[2])}
    return TaskGates(
        adapter,
        NamedArray.of(weights.numpy(), **places, expert=range(weights.shape[3])),
        NamedArray.of(spread.numpy(), **places),
        matrices,
        tokens,
    )


def shares(weights: Tensor) -> Tensor:
    """Weights whose absolute values have the sum 1 along the last axis; zeros stay zeros."""
    size = weights.abs()
    return size / size.sum(-1, keepdim=True).clamp_min(1e-12)


def entropy(weights: Tensor) -> Tensor:
    """Entropy along the last axis, from 0 (one expert) to 1 (all equal); 0 for a single expert."""
    n = weights.shape[-1]
    if n < 2:
        return weights.new_zeros(weights.shape[:-1])
    spread: Tensor = torch.special.xlogy(weights, weights).sum(-1)
    return -spread / float(np.log(n))


def _rows(values: Tensor, axes: int) -> Tensor:
    """All leading axes as one: (rows …), one row where there are none."""
    return values.reshape(-1, *values.shape[values.ndim - axes :])


@contextmanager
def watch(model: nn.Module, seen: Seen, adapter: str = "default") -> Iterator[None]:
    """Within this context, `seen` is called with the gates of every layer in every forward pass of the model.

    In training, tokens that the attention mask hides are left out.
    """
    handles = [
        layer.register_forward_pre_hook(partial(_observe, seen, path, adapter))
        for path, layer in adapted_layers(model, adapter).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled blocks call it as it is
@torch.no_grad()
def _observe(seen: Seen, path: str, adapter: str, layer: DyadsLinear, args: tuple[Any, ...]) -> None:
    x = args[0]
    weights, g = layer.routes(adapter, x)
    core, tokens = layer.core(adapter), x.shape[:-1].numel()
    call = layer.routing.running().training
    mask = None if call is None else call.mask(x, layer.of_decoder)

    def of_tokens(values: Tensor) -> Tensor:
        # Gates of a sample, or of no token at all, have one row for many tokens.
        spread = values.expand(*x.shape[:-1], *values.shape[-2:]) if values.ndim == x.ndim + 1 else values
        rows = _rows(spread, 2).expand(tokens, -1, -1)
        return rows if mask is None or mask.numel() != tokens else rows[mask.reshape(-1) != 0]

    seen(path, of_tokens(weights.float()).cpu(), lambda: of_tokens(core.matrix(g.float())).cpu())


class Reader:
    """A run's model with its adapter, and the instances of its tasks."""

    def __init__(self, folder: RunFolder) -> None:
        self.answerer = Answerer(folder)
        self.model = self.answerer.model
        self.recipe = folder.recipe()
        self.routed = self.answerer.needs_task
        known = self.answerer.task_names  # gates have no row for a task that was not trained on
        tasks = load_suite(self.recipe.tasks).tasks
        self.tasks = tuple(task for task in tasks if not self.routed or task.name in known)

    def examples(self, task: Task) -> tuple[Example, ...]:
        """The instances of the scored split; those of the training split where it has none."""
        return task.split(self.recipe.evaluate.split) or task.train

    def encode(self, task: Task, example: Example) -> dict[str, Tensor]:
        """The arguments of the model's call for one instance."""
        tokenizer = self.answerer.prompt_tokenizer
        limit = task.max_prompt_tokens
        if isinstance(tokenizer, PairTokenizer):
            ids, types = tokenizer.read([example], limit)[0]
            inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            return {**inputs, **({"token_type_ids": torch.tensor([types])} if self.answerer.collator.types else {})}
        collator = Collator(pad_id_of(self.answerer.tokenizer), encoder_decoder=tokenizer.encoder_decoder)
        batch = collator([tokenizer.encode(example, 0, limit)])
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if tokenizer.encoder_decoder:
            shifted: Any = self.model.prepare_decoder_input_ids_from_labels
            inputs["decoder_input_ids"] = shifted(labels=batch["labels"])
        return inputs

    @torch.inference_mode()
    def read(self, task: Task, example: Example) -> int:
        """Run the model on one instance; the number of its tokens."""
        inputs = {key: value.to(self.answerer.device) for key, value in self.encode(task, example).items()}
        tokens = inputs["input_ids"].shape[1]
        self.model(**inputs, **({"task": task.name} if self.routed else {}))
        return tokens

# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for unseen tasks: rows for gates that depend on the task, taken from the known tasks.

Gates that depend on the task have a row for every task of the training. An unseen task gets a new row: the mean of all
rows, or a copy of that of the nearest known task, with which its answers are bit-identical to those for that task. The
nearest task is found with the base model alone, from a few inputs of every task, without answers, or from its
description:

    v_t       = mean over texts of the mean over tokens of the base model's last hidden states        (d)
    c         = mean over the known tasks of v_k
    sim(u, k) = cos(v_u - c, v_k - c)

Without centring, similarities do not discriminate: over inputs of the twelve starter tasks, with SmolLM2-135M,
cos(v_u, v_k) is 0.96 to 1.00, and sim(u, k) -0.62 to 0.85.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from dyads.data.batches import Collator, PromptTokenizer, pad_id_of
from dyads.errors import DyadsError, RunError, TaskError
from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder
from dyads.tasks import Example, Task, load_suite
from dyads.tuner.add_task import add_task

__all__ = ["INPUTS", "StandIn", "by_mean", "by_nearest", "described", "own_tasks"]

INPUTS = 8
"""How many inputs of a task are compared: the first of the split."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """The known task whose row an unseen task got; None: the mean of all rows."""

    task: str
    known: str | None = None
    similarity: float | None = None
    """From -1 to 1; None for the mean."""
    runner_up: str | None = None
    """The second nearest; None where there is only one known task."""
    runner_up_similarity: float | None = None

    def __str__(self) -> str:
        if self.known is None:
            return f"{self.task} is unseen: answered with the mean over the known tasks"
        after = f"; next {self.runner_up}, {self.runner_up_similarity:.2f}" if self.runner_up else ""
        return f"{self.task} is unseen: answered as {self.known} (similarity {self.similarity:.2f}{after})"


def by_mean(model: PeftModel, unseen: Iterable[str]) -> list[StandIn]:
    """Add every unseen task with the mean of the known tasks' rows."""
    start: str | int = "mean"
    for name in unseen:
        rows = add_task(model, name, start)
        start = len(rows[0]) - 1  # further tasks copy this row, since a new mean would include it
    return [StandIn(name) for name in unseen]


def by_nearest(
    model: PeftModel,
    prompt_tokenizer: PromptTokenizer,
    unseen: Mapping[str, Sequence[Example]],
    known: Mapping[str, Sequence[Example]],
    *,
    batch_size: int,
) -> list[StandIn]:
    """Add every unseen task with the row of its nearest known task; both come with the texts to compare."""
    known_vectors, unseen_vectors = (
        _vectors(model, prompt_tokenizer, list(texts.values()), batch_size) for texts in (known, unseen)
    )
    names, centre, found = list(known), known_vectors.mean(0), []
    for task, similarities in zip(
        unseen, F.cosine_similarity(unseen_vectors[:, None] - centre, known_vectors - centre, -1), strict=True
    ):
        values, places = similarities.sort(descending=True, stable=True)
        ranked = [(names[int(place)], float(value)) for place, value in zip(places, values, strict=True)]
        add_task(model, task, names.index(ranked[0][0]))
        found.append(StandIn(task, *ranked[0], *(ranked[1] if len(ranked) > 1 else (None, None))))
    return found


@torch.inference_mode()
def _vectors(
    model: PeftModel, prompt_tokenizer: PromptTokenizer, texts: Sequence[Sequence[Example]], batch_size: int
) -> Tensor:
    """v_t for every task (T d), in fp32."""
    base = model.get_base_model()
    body = base.get_encoder() if base.config.is_encoder_decoder else base.base_model
    owners = [task for task, examples in enumerate(texts) for _ in examples]
    prompts = [prompt_tokenizer.prompt(example) for examples in texts for example in examples]
    collator = Collator(
        pad_id_of(prompt_tokenizer.tokenizer)
    )  # pads on the right, for a decoder too: positions start at 0
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    device = base.get_input_embeddings().weight.device
    sums: Tensor | None = None
    with model.disable_adapter():
        for start in range(0, len(order), batch_size):
            at = order[start : start + batch_size]
            batch = collator.prompts([prompts[i] for i in at], [0] * len(at))
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            hidden = body(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            if sums is None:
                sums = pooled.new_zeros(len(texts), pooled.shape[1])
            sums.index_add_(0, torch.tensor([owners[i] for i in at], device=device), pooled)
    assert sums is not None, "there are known tasks, and each has texts"
    return sums / torch.tensor([[len(examples)] for examples in texts], device=device)


def described(tasks: Iterable[Task]) -> dict[str, list[Example]]:
    """The description of every task, as an example, by the task's name; TaskError where one has none."""
    tasks = list(tasks)
    if without := [task.name for task in tasks if not task.description]:
        raise TaskError(
            f"nearest_by 'description' compares the descriptions of tasks, but {', '.join(without)} "
            f"{'have' if len(without) > 1 else 'has'} none: choose nearest_by: inputs, or unseen: mean"
        )
    return {task.name: [Example(task.name, task.description, ("",))] for task in tasks}


def own_tasks(recipe: Recipe) -> tuple[Task, ...]:
    """The tasks that a run's adapter was trained on, through all runs that it adapts, oldest first.

    RunError where their data cannot be read.
    """
    try:
        tasks = load_suite(recipe.tasks).tasks
        while recipe.adapt is not None:
            recipe = RunFolder.open(recipe.adapt.run).recipe()
            tasks = (*load_suite(recipe.tasks).tasks, *tasks)
        return tuple(task for task in tasks if task.train)
    except (DyadsError, OSError) as error:
        raise RunError(
            f"unseen 'nearest' compares with the tasks that the run was trained on, which cannot be read: {error};"
            " restore their data, or choose unseen: mean"
        ) from error

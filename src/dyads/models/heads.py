# SPDX-License-Identifier: Apache-2.0
"""Task heads: a linear head per task with which an encoder answers, on one vector for the whole text.

    z = pool(hidden)        mean of the tokens' hidden states, or the first token's      (b d)
    y = W z + c             the heads of all tasks in one matrix, a row per class        (b rows)

A classification task with C labels has C rows, a regression task one. All heads are computed for every sample, which
costs less than the smallest layer, and the sample's task, the same that the gates get, selects its rows. A batch may
therefore mix tasks, and no sample depends on the others. The loss is the cross-entropy over the task's rows, or the
squared error of the number, standardised by the mean and deviation of the training split, so that both start near 1.

The heads are one module of the base model, `task_heads`, which PEFT trains and saves with any adapter
(`modules_to_save`). The file heads.json beside the adapter keeps the labels and scaling of their rows.
"""

from __future__ import annotations

import inspect
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dyads.data.batches import EncodedPair, PairCollator, PairTokenizer, pad_id_of
from dyads.errors import RunError, TaskError, shortened
from dyads.models.loss import loss_in_call
from dyads.reading import read_json
from dyads.tasks import Example, Task

__all__ = [
    "MODULE",
    "Head",
    "HeadQuestion",
    "TaskHeads",
    "answer_by_heads",
    "attach_heads",
    "collator_of",
    "head_loss",
    "heads_of",
    "pair_tokenizer_of",
    "read_heads",
    "write_heads",
]

MODULE = "task_heads"
"""The name of the module in the base model."""
_INIT_STD = 0.02
"""Standard deviation of a head's initial weights, as in BERT."""


@dataclass(frozen=True, slots=True)
class Head:
    """The labels, or the scaling, of one task's head."""

    task: str
    labels: tuple[str, ...]
    """In the order of the rows; empty for a regression task, which has one row."""
    mean: float = 0.0
    """Mean of the training split's numbers; the head predicts (number - mean) / deviation."""
    deviation: float = 1.0

    @property
    def rows(self) -> int:
        """The number of rows in the matrix."""
        return len(self.labels) or 1

    def text(self, values: Sequence[float], choices: Sequence[str] = ()) -> str:
        """The answer for the head's values: the label with the highest (among `choices`, if given), or the number."""
        if not self.labels:
            return f"{values[0] * self.deviation + self.mean:.4f}"
        return max(choices or self.labels, key=lambda label: values[self.labels.index(label)])


_HEADS = TypeAdapter(tuple[Head, ...])


def heads_of(tasks: Sequence[Task]) -> tuple[Head, ...]:
    """A head for every task; TaskError for tasks without labels or numbers, or without training examples."""
    if unlabelled := [task.name for task in tasks if not task.labels and not task.regression]:
        raise TaskError(
            f"an encoder answers by a head, which needs labels or numbers, and {', '.join(unlabelled[:5])}"
            f"{f', … ({len(unlabelled)} in all)' if len(unlabelled) > 5 else ''} has answers in free text: give"
            " its labels (`tasks.labels: {TASK: [no, yes]}` for your own files), use a model that generates, or"
            " leave it out"
        )
    if untrained := [task.name for task in tasks if not task.train]:
        raise TaskError(
            f"an encoder answers by a head that is trained, and {', '.join(untrained[:5])} has no training examples:"
            " give it some (split_dev: 0.5 takes half of its dev file), or leave it out"
        )
    heads = []
    for task in tasks:
        numbers = [float(task.target(example)) for example in task.train] if task.regression else []
        spread = statistics.pstdev(numbers) if numbers else 0.0
        heads.append(Head(task.name, task.labels, statistics.fmean(numbers or [0.0]), spread or 1.0))
    return tuple(heads)


def write_heads(path: Path, heads: Sequence[Head]) -> None:
    """Write heads.json."""
    path.write_text(json.dumps([asdict(head) for head in heads], ensure_ascii=False, indent=1) + "\n", "utf-8")


def read_heads(path: Path) -> tuple[Head, ...]:
    """The heads in heads.json; RunError if it is missing or damaged."""
    try:
        rows = read_json(path, error=RunError, remedy="train the run again")
        return _HEADS.validate_python(rows)
    except (FileNotFoundError, ValidationError) as error:
        reason = shortened(" ".join(str(error).split()))
        raise RunError(f"cannot read the labels of the heads from {path}: {reason}; train the run again") from error


class TaskHeads(nn.Module):
    """The heads of all tasks as one linear map, in float32 for a model of any precision."""

    first: Tensor
    rows: Tensor
    number: Tensor

    def __init__(self, width: int, heads: Sequence[Head], pool: str) -> None:
        super().__init__()
        self.heads, self.pool = tuple(heads), pool
        self.weight = nn.Parameter(torch.empty(sum(head.rows for head in heads), width))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))
        nn.init.normal_(self.weight, std=_INIT_STD)
        self._register_rows()

    def _register_rows(self) -> None:
        """Set the buffers with each task's first row, number of rows and kind."""
        rows = torch.tensor([head.rows for head in self.heads], device=self.weight.device)
        number = torch.tensor([not head.labels for head in self.heads], device=self.weight.device)
        for name, value in (("rows", rows), ("first", rows.cumsum(0) - rows), ("number", number)):
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def add(self, heads: Sequence[Head], seed: int) -> None:
        """Append heads with random weights, the same for every method of a seed; the existing ones keep theirs."""
        count = sum(head.rows for head in heads)
        random = torch.Generator().manual_seed(seed)
        weight = nn.init.normal_(torch.empty(count, self.weight.shape[1]), std=_INIT_STD, generator=random)
        weight = weight.to(self.weight)
        for name, more in (("weight", weight), ("bias", self.bias.new_zeros(count))):
            before = getattr(self, name)
            setattr(self, name, nn.Parameter(torch.cat([before, more]), requires_grad=before.requires_grad))
        self.heads += tuple(heads)
        self._register_rows()

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The values of all heads (b rows) for hidden states (b t d) and an attention mask (b t)."""
        hidden = hidden.float()
        if self.pool == "first":
            pooled = hidden[:, 0]
        else:
            weights = mask[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return F.linear(pooled, self.weight.float(), self.bias.float())

    def loss(self, values: Tensor, task: Tensor, targets: Tensor) -> Tensor:
        """The sum over samples of cross-entropy or squared error, for values (b rows), task (b) and targets (b)."""
        first, number = self.first[task], self.number[task]
        row = torch.arange(values.shape[1], device=values.device)
        own = (row >= first[:, None]) & (row < (first + self.rows[task])[:, None])
        index = first + torch.where(number, 0, targets).long()
        entropy = F.cross_entropy(values.masked_fill(~own, -torch.inf), index, reduction="none")
        squared = (values.gather(1, first[:, None])[:, 0] - targets) ** 2
        return torch.where(number, squared, entropy).sum()


def attach_heads(model: PreTrainedModel, heads: Sequence[Head], pool: str) -> None:
    """Add heads with random weights to an encoder."""
    model.add_module(MODULE, TaskHeads(int(model.config.hidden_size), heads, pool))


def _heads_in(model: nn.Module) -> Any:
    return getattr(model.get_base_model() if isinstance(model, PeftModel) else model, MODULE)


@dataclass(frozen=True)
class _Targets:
    """The target of a head for an example: its label's row, or its standardised number. Picklable, for data workers."""

    tasks: Mapping[int, Task]
    heads: tuple[Head, ...]

    def __call__(self, number: int, example: Example) -> float:
        head = self.heads[number]
        return (self.tasks[number].target(example) - head.mean) / head.deviation


def pair_tokenizer_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    heads: Sequence[Head] = (),
    tasks: Mapping[int, Task] = MappingProxyType({}),
) -> PairTokenizer:
    """A tokenizer of texts and pairs; the smallest limit of the recipe, the tokenizer and the model's positions holds.

    The heads and the tasks, by their ids, are needed in training only, for the targets.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or max_prompt_tokens
    target = _Targets(dict(tasks), tuple(heads))
    limit = min(max_prompt_tokens, tokenizer.model_max_length, positions)
    return PairTokenizer(tokenizer, target, max_prompt_tokens=limit)


def collator_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PairCollator:
    """A collator for pairs; it adds token_type_ids for a model that has an embedding for them."""
    accepted = "token_type_ids" in inspect.signature(type(model).forward).parameters
    return PairCollator(pad_id_of(tokenizer), accepted and getattr(model.config, "type_vocab_size", 0) > 1)


def head_loss(
    unwrapped: nn.Module, model: nn.Module, inputs: dict[str, Any], task: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the samples' losses, their number, and the auxiliary loss; `inputs` are the model's arguments."""
    heads = _heads_in(unwrapped)

    def loss_of(output: Any) -> Tensor:
        values = heads(output.last_hidden_state, inputs["attention_mask"])
        loss: Tensor = heads.loss(values, task, targets)
        return loss

    loss, auxiliary = loss_in_call(unwrapped, model, inputs, loss_of)
    return loss, torch.tensor(len(targets), device=targets.device), auxiliary


@dataclass(frozen=True, slots=True)
class HeadQuestion:
    """A tokenised example, whose task is the index of a head, and its choices (empty: all labels)."""

    encoded: EncodedPair
    choices: tuple[str, ...] = ()


@torch.inference_mode()
def answer_by_heads(
    model: nn.Module,
    questions: Sequence[HeadQuestion],
    collator: PairCollator,
    *,
    batch_size: int,
    tasks: bool = False,
    done: Callable[[int], object] = lambda rows: None,
) -> list[str]:
    """The answers of the heads, in the order of the questions; `tasks`: whether the gates depend on the task."""
    heads = _heads_in(model)
    firsts: list[int] = heads.first.tolist()
    answers = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].encoded))
    for start in range(0, len(order), batch_size):
        at = order[start : start + batch_size]
        batch = collator([questions[i].encoded for i in at])
        unused = ("labels",) if tasks else ("labels", "task")
        inputs = {k: cast(Tensor, v).to(heads.bias.device) for k, v in batch.items() if k not in unused}
        values = heads(model(**inputs).last_hidden_state, inputs["attention_mask"]).tolist()
        for i, row in zip(at, values, strict=True):
            number = questions[i].encoded.task
            first, head = firsts[number], heads.heads[number]
            answers[i] = head.text(row[first : first + head.rows], questions[i].choices)
        done(len(at))
    return answers

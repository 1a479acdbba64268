# SPDX-License-Identifier: Apache-2.0
"""How does an encoder answer? By a linear head of every task's own, on one vector for the whole text.

    z = pool(hidden)        the mean of the tokens' hidden states, or the first one's      (b d)
    y = W z + c             the heads of all tasks, one below the other: a row a class     (b rows)

A task with C labels has C rows, one with numbers a single row. All heads are computed, since together they are smaller
than one layer's smallest map; which rows are a sample's own is told by its task, the same that gates are given. So a
batch may mix tasks, and no sample depends on its neighbours. The loss of a sample is the cross-entropy over its own
rows, or the squared error of its number, which is standardised by mean and deviation of the training split, so that
both kinds of loss start near 1.

The heads are one module of the base model, `task_heads`, which PEFT trains and saves beside any adapter
(`modules_to_save`). What their rows mean stands in heads.json beside the adapter.
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
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dyads.data.batches import EncodedPair, PairCollator, PairTokenizer, pad_id_of
from dyads.errors import RunError, TaskError
from dyads.tasks import Example, Task

__all__ = [
    "MODULE",
    "Head",
    "HeadQuestion",
    "TaskHeads",
    "answer",
    "attach",
    "collator_of",
    "head_loss",
    "heads_of",
    "pair_tokenizer_of",
    "read",
    "write",
]

MODULE = "task_heads"
"""The name of the heads in the base model."""
_START = 0.02
"""Standard deviation of a head's weights at the start, as BERT's own."""


@dataclass(frozen=True, slots=True)
class Head:
    """What the rows of one task's head stand for."""

    task: str
    labels: tuple[str, ...]
    """In the order of the rows; empty: one row, a number."""
    mean: float = 0.0
    """Of the numbers in the training split, in their own unit; the head gives (number - mean) / deviation."""
    deviation: float = 1.0

    @property
    def rows(self) -> int:
        """Its rows in the matrix."""
        return len(self.labels) or 1

    def text(self, values: Sequence[float], choices: Sequence[str] = ()) -> str:
        """What the head's values say: the label with the highest, among `choices` where there are some, or a number."""
        if not self.labels:
            return f"{values[0] * self.deviation + self.mean:.4f}"
        return max(choices or self.labels, key=lambda label: values[self.labels.index(label)])


def heads_of(tasks: Sequence[Task]) -> tuple[Head, ...]:
    """A head for every task; TaskError for those that ask for free text."""
    if free := [task.name for task in tasks if not task.labels and not task.regression]:
        raise TaskError(
            f"an encoder answers by a head, which needs labels or numbers, and {', '.join(free[:5])}"
            f"{f', … ({len(free)} in all)' if len(free) > 5 else ''} asks for free text: give its labels"
            " (`tasks.labels: {TASK: [no, yes]}` for your own files), take a model that generates, or leave it out"
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


def write(path: Path, heads: Sequence[Head]) -> None:
    """Keep what the rows mean."""
    path.write_text(json.dumps([asdict(head) for head in heads], ensure_ascii=False, indent=1) + "\n", "utf-8")


def read(path: Path) -> tuple[Head, ...]:
    """What `write` kept; RunError where it is missing or broken."""
    try:
        rows = json.loads(path.read_text("utf-8"))
        return tuple(Head(**{**row, "labels": tuple(row["labels"])}) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} does not say what the heads answer: {error}; train the run again") from error


class TaskHeads(nn.Module):
    """The heads of all tasks as one linear map, in float32 whatever the model's precision."""

    first: Tensor
    rows: Tensor
    number: Tensor

    def __init__(self, width: int, heads: Sequence[Head], pool: str) -> None:
        super().__init__()
        self.heads, self.pool = tuple(heads), pool
        self.weight = nn.Parameter(torch.empty(sum(head.rows for head in heads), width))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))
        nn.init.normal_(self.weight, std=_START)
        self._place()

    def _place(self) -> None:
        """Write down which rows are whose."""
        rows = torch.tensor([head.rows for head in self.heads], device=self.weight.device)
        number = torch.tensor([not head.labels for head in self.heads], device=self.weight.device)
        for name, value in (("rows", rows), ("first", rows.cumsum(0) - rows), ("number", number)):
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def add(self, heads: Sequence[Head]) -> None:
        """Put further heads below, drawn anew; those that there are stay as they are."""
        count = sum(head.rows for head in heads)
        weight = nn.init.normal_(self.weight.new_empty(count, self.weight.shape[1]), std=_START)
        for name, more in (("weight", weight), ("bias", self.bias.new_zeros(count))):
            before = getattr(self, name)
            setattr(self, name, nn.Parameter(torch.cat([before, more]), requires_grad=before.requires_grad))
        self.heads += tuple(heads)
        self._place()

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """All heads' values (b rows) from hidden states (b t d) and their mask (b t), 1 where a token is."""
        hidden = hidden.float()
        if self.pool == "first":
            pooled = hidden[:, 0]
        else:
            weights = mask[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return F.linear(pooled, self.weight.float(), self.bias.float())

    def loss(self, values: Tensor, task: Tensor, targets: Tensor) -> Tensor:
        """The sum over samples of cross-entropy or squared error: values (b rows), tasks (b), targets (b)."""
        first, number = self.first[task], self.number[task]
        row = torch.arange(values.shape[1], device=values.device)
        own = (row >= first[:, None]) & (row < (first + self.rows[task])[:, None])
        index = first + torch.where(number, 0, targets).long()
        entropy = F.cross_entropy(values.masked_fill(~own, -torch.inf), index, reduction="none")
        squared = (values.gather(1, first[:, None])[:, 0] - targets) ** 2
        return torch.where(number, squared, entropy).sum()


def attach(model: PreTrainedModel, heads: Sequence[Head], pool: str) -> None:
    """Give an encoder its heads, drawn anew."""
    model.add_module(MODULE, TaskHeads(int(model.config.hidden_size), heads, pool))


def _heads_in(model: nn.Module) -> Any:
    return getattr(model.get_base_model() if isinstance(model, PeftModel) else model, MODULE)


@dataclass(frozen=True)
class _Targets:
    """What a head is to give for an example: its label's row, or its number, standardised. Can be sent to workers."""

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
    """The tokenizer with the smallest of its limits: the recipe's, its own, and the positions that the model has.

    For training it is given the heads and by their numbers the tasks, and then knows what they are to learn.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or max_prompt_tokens
    target = _Targets(dict(tasks), tuple(heads))
    limit = min(max_prompt_tokens, tokenizer.model_max_length, positions)
    return PairTokenizer(tokenizer, target, max_prompt_tokens=limit)


def collator_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PairCollator:
    """Pads pairs, and names the texts of a pair to a model that has an embedding for them."""
    named = "token_type_ids" in inspect.signature(type(model).forward).parameters
    return PairCollator(pad_id_of(tokenizer), named and getattr(model.config, "type_vocab_size", 0) > 1)


def head_loss(
    unwrapped: nn.Module, model: nn.Module, inputs: dict[str, Any], task: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of the samples' losses, their number); `inputs` is what the model is called with."""
    heads = _heads_in(unwrapped)
    values = heads(model(**inputs).last_hidden_state, inputs["attention_mask"])
    return heads.loss(values, task, targets), torch.tensor(len(targets), device=targets.device)


@dataclass(frozen=True, slots=True)
class HeadQuestion:
    """An example in tokens, its task the place of a head, and what it may choose from (nothing given: all labels)."""

    encoded: EncodedPair
    choices: tuple[str, ...] = ()


@torch.inference_mode()
def answer(
    model: nn.Module,
    questions: Sequence[HeadQuestion],
    collator: PairCollator,
    *,
    batch_size: int,
    tasks: bool = False,
    done: Callable[[int], object] = lambda rows: None,
) -> list[str]:
    """What the heads say, in the order of the questions; `tasks` says whether the gates look at the task."""
    heads = _heads_in(model)
    answers = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].encoded))
    for start in range(0, len(order), batch_size):
        at = order[start : start + batch_size]
        batch = collator([questions[i].encoded for i in at])
        unread = ("labels",) if tasks else ("labels", "task")
        inputs = {k: cast(Tensor, v).to(heads.bias.device) for k, v in batch.items() if k not in unread}
        values = heads(model(**inputs).last_hidden_state, inputs["attention_mask"]).tolist()
        for i, row in zip(at, values, strict=True):
            number = questions[i].encoded.task
            first = int(heads.first[number])
            head = heads.heads[number]
            answers[i] = head.text(row[first : first + head.rows], questions[i].choices)
        done(len(at))
    return answers

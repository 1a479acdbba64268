# SPDX-License-Identifier: Apache-2.0
"""Batches: padded tensors with attention masks and task ids, in the order of a schedule.

There are three types: `Batch` (training), `PromptBatch` (generation) and `PairBatch` (heads of an encoder). The
attention mask marks padding; token ids cannot, since pad and eos may be the same token and eos is a label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
from torch import LongTensor, Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from dyads.data.tokens import IGNORED, Encoded, EncodedPair, PairTokenizer, PromptTokenizer, encode
from dyads.errors import ConfigError, TaskError
from dyads.tasks.task import Task

__all__ = [
    "IGNORED",
    "Batch",
    "Collator",
    "Encoded",
    "EncodedPair",
    "PairBatch",
    "PairCollator",
    "PairTokenizer",
    "PromptBatch",
    "PromptTokenizer",
    "ScheduledBatches",
    "TaskDataset",
    "encode",
    "pad_id_of",
    "prompt_batches",
]

Side = Literal["left", "right"]


class PromptBatch(TypedDict):
    """Prompts for generation, padded on the left (on the right for an encoder-decoder)."""

    input_ids: Tensor  # (b t)
    attention_mask: Tensor  # (b t) 1 for tokens, 0 for padding
    task: Tensor  # (b) task ids


class Batch(PromptBatch):
    """Training examples, padded on the right."""

    labels: Tensor  # (b t), or (b target) for an encoder-decoder; IGNORED (-100) where there is no loss


class PairBatch(Batch, total=False):
    """Texts or pairs for the heads of an encoder, padded on the right; labels (b) hold class ids or numbers."""

    token_type_ids: Tensor  # (b t) 0 or 1, the text of the pair; only for models with token types


@dataclass(frozen=True)
class Collator:
    """Pads encoded examples to the longest and stacks them."""

    pad_id: int
    side: Side = "right"
    encoder_decoder: bool = False
    """Labels then have their own width, and are padded on the right for either `side`."""
    multiple_of: int = 1
    """Widths are rounded up to a multiple of this; 8 suits GPUs."""

    def __call__(self, examples: Sequence[Encoded]) -> Batch:
        if not self.encoder_decoder:
            for e in examples:
                if len(e.labels) != len(e.input_ids):
                    raise ConfigError(
                        f"an example has {len(e.input_ids)} tokens and {len(e.labels)} labels: it was encoded for an "
                        f"encoder-decoder; pass encoder_decoder=True to the Collator too"
                    )
        ids = [e.input_ids for e in examples]
        return {
            "input_ids": _pad(ids, self.pad_id, self.side, self.multiple_of),
            "attention_mask": _pad([[1] * len(i) for i in ids], 0, self.side, self.multiple_of),
            "labels": _pad(
                [e.labels for e in examples],
                IGNORED,
                "right" if self.encoder_decoder else self.side,
                self.multiple_of,
            ),
            "task": torch.tensor([e.task for e in examples], dtype=torch.long),
        }

    def prompts(self, ids: Sequence[Sequence[int]], tasks: Sequence[int]) -> PromptBatch:
        """Pad tokenised prompts and stack them."""
        return {
            "input_ids": _pad(ids, self.pad_id, self.side, self.multiple_of),
            "attention_mask": _pad([[1] * len(i) for i in ids], 0, self.side, self.multiple_of),
            "task": torch.tensor(list(tasks), dtype=torch.long),
        }


@dataclass(frozen=True)
class PairCollator:
    """Pads encoded pairs to the longest and stacks them."""

    pad_id: int
    types: bool = True
    """Whether the model has token types."""

    def __call__(self, examples: Sequence[EncodedPair]) -> PairBatch:
        ids = [e.input_ids for e in examples]
        batch: PairBatch = {
            "input_ids": _pad(ids, self.pad_id),
            "attention_mask": _pad([[1] * len(i) for i in ids], 0),
            "labels": torch.tensor([e.target for e in examples], dtype=torch.float32),
            "task": torch.tensor([e.task for e in examples], dtype=torch.long),
        }
        if self.types:
            batch["token_type_ids"] = _pad([e.types for e in examples], 0)
        return batch


def _pad(rows: Sequence[Sequence[int]], value: int, side: Side = "right", multiple_of: int = 1) -> Tensor:
    width = -(-max(map(len, rows)) // multiple_of) * multiple_of
    padded = torch.full((len(rows), width), value, dtype=torch.long)
    for row, ids in zip(padded, rows, strict=True):
        at = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        row[at] = LongTensor(list(ids))
    return padded


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the pad token, or of eos where there is none (the attention mask hides both)."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ConfigError(
            f"the tokenizer {type(tokenizer).__name__} has neither a pad nor an eos token; set tokenizer.pad_token"
        )
    return int(pad)


@dataclass
class TaskDataset(Dataset[Encoded | EncodedPair]):
    """One split of all tasks, indexed by (task, index). An example is tokenised when it is first read, then cached."""

    tasks: Sequence[Task]
    prompt_tokenizer: PromptTokenizer | PairTokenizer
    split: str = "train"
    places: Sequence[int] = ()
    """The ids of the tasks for gates and heads; empty: 0, 1, …"""
    _encoded: dict[tuple[int, int], Encoded | EncodedPair] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.places = self.places or range(len(self.tasks))

    def __getitem__(self, at: tuple[int, int]) -> Encoded | EncodedPair:
        if at not in self._encoded:
            number, index = at
            task, place = self.tasks[number], self.places[number]
            self._encoded[at] = self.prompt_tokenizer.encode(
                task.split(self.split)[index], place, task.max_prompt_tokens
            )
        return self._encoded[at]

    def __len__(self) -> int:
        return sum(len(task.split(self.split)) for task in self.tasks)

    def lengths(self) -> list[list[int]]:
        """Token counts of every example of every task, for `mixture.schedule`."""
        return [self.prompt_tokenizer.lengths(task.split(self.split), task.max_prompt_tokens) for task in self.tasks]


class ScheduledBatches(Sampler[list[tuple[int, int]]]):
    """A batch sampler that yields the batches of a schedule, for `DataLoader(dataset, batch_sampler=…)`.

    It always starts at the first batch; to resume, skip batches with accelerate's `skip_first_batches`.
    """

    def __init__(self, batches: Sequence[list[tuple[int, int]]]) -> None:
        if not batches:
            raise TaskError("the schedule has no batches; train for at least one step")
        self.batches = list(batches)
        # Read by accelerate when it shards batches over processes (checked with accelerate 1.15).
        self.batch_size = len(self.batches[0])
        self.drop_last = False

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def prompt_batches(
    prompts: Sequence[Sequence[int]],
    prompt_tokenizer: PromptTokenizer,
    batch_size: int,
    *,
    tasks: int | Sequence[int] = 0,
) -> Iterator[tuple[list[int], PromptBatch]]:
    """Batches of prompts with their positions in `prompts`, longest first: too large a batch fails at once.

    `tasks` holds the task id of every prompt, or is one id for all.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    ids_of = [tasks] * len(prompts) if isinstance(tasks, int) else list(tasks)
    if len(ids_of) != len(prompts):
        raise TaskError(f"{len(ids_of)} task ids for {len(prompts)} prompts; give one per prompt, or one for all")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    collator = Collator(
        pad_id_of(prompt_tokenizer.tokenizer), side="right" if prompt_tokenizer.encoder_decoder else "left"
    )
    for start in range(0, len(order), batch_size):
        positions = order[start : start + batch_size]
        yield positions, collator.prompts([prompts[i] for i in positions], [ids_of[i] for i in positions])

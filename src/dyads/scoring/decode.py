# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of many prompts with continuous batching; answers equal those of `generate` up to rounding.

- A finished row leaves the batch at once, and as soon as a quarter of the slots are free the next prompts are prefilled
  and join: one queue over all questions, in which no task waits for the longest answers of another.
- Prompts of a task often share a prefix (the task's definition), which is prefilled once. This is exact: a layer's keys
  and values for a token depend on the tokens before it and on the row's task, and both are the same.
- Keys and values are not copied from step to step (slots.py) nor repeated for every query head (models/attention.py).
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from dyads.models.attention import GROUPED, supports_grouped
from dyads.scoring.slots import Slots
from dyads.tasks import Example

__all__ = ["Question", "decode", "refusal"]

LEAST_SHARED = 16
"""The shortest shared prefix, in tokens, that is prefilled on its own."""
PREFILL_TOKENS = 512
"""Size of a prefill in tokens from which further prompts join only if they are nearly as long as its longest."""

HARMLESS = {
    *(f"{name}_token_id" for name in ("bos", "eos", "pad", "decoder_start")),
    *("max_length", "max_new_tokens", "num_beams", "use_cache", "transformers_version", "_from_model_config"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
}
"""Generation settings that `decode` sets itself, or that greedy decoding does not use."""
TESTED = ("eager", "sdpa", GROUPED)
"""Attention implementations that ignore masked keys at any position."""
REQUIRED = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to answer."""

    prompt: list[int]
    """In tokens."""
    limit: int
    """The largest number of tokens of the answer."""
    task: str | int | None = None
    """None where the gates do not depend on the task."""
    example: Example | None = None
    """The example whose prompt it is, for the text of the answer."""
    strip: bool = True
    """Whether white space around the answer is removed."""


def refusal(model: nn.Module) -> str | None:
    """Why `decode` cannot replace this model's greedy `generate`; None where it can."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "its adapter adds virtual tokens to the prompt"
    model = _base(model)
    if not isinstance(model, PreTrainedModel):
        return "it is not a transformers model"
    config, kind = model.config.get_text_config(decoder=True), type(model)
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if kind.generate is not GenerationMixin.generate:
        return "it overrides generate"
    if kind.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return "it overrides prepare_inputs_for_generation"
    if lacking := [name for name in REQUIRED if name not in inspect.signature(kind.forward).parameters]:
        return f"its forward pass takes no {lacking[0]}"
    if not kind._supports_attention_backend:
        return "it does not support transformers' attention interface"
    if model.config._attn_implementation not in TESTED:
        return f"attention implementation {model.config._attn_implementation} is not tested with `decode`"
    if odd := [type(x).__name__ for x in DynamicCache(config=config).layers if type(x) is not DynamicLayer]:
        return f"its cache has a {odd[0]}"
    ropes = getattr(config, "rope_parameters", None) or {}
    if any(rope in ("dynamic", "longrope") for rope in (ropes.get("rope_type"), ropes.get("type"))):
        return "its positions depend on the longest prompt of a batch"
    settings = model.generation_config.to_diff_dict().items()
    if special := sorted(key for key, value in settings if key not in HARMLESS and value not in (None, False)):
        return f"its generation config sets {special[0]}"
    return None


@torch.inference_mode()
def decode(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    batch_size: int,
    eos: int | Sequence[int],
    pad: int,
    tasks: bool = False,
    done: Callable[[int], object] = lambda rows: None,
) -> list[list[int]]:
    """Greedy answers in tokens, eos included, in the order of the questions, for a model without a `refusal`.

    `eos` is the token that ends an answer, or several. `tasks`: pass the task of every row to the model. `done(n)` is
    called whenever n answers are finished.
    """
    ends = {eos} if isinstance(eos, int) else set(eos)
    batch = _Batch(model, min(batch_size, len(questions)), pad, tasks)
    queue, rows = _queue(questions), []
    answers: list[list[int]] = [[] for _ in questions]
    try:
        while queue or batch.rows:
            free = batch_size - len(batch.rows)
            if queue and (not batch.rows or free >= max(1, batch_size // 4)):
                rows = _next(queue, free)
                tokens = batch.read(rows)
            else:
                rows = batch.rows
                tokens = batch.step()
            for row, token in zip(rows, tokens, strict=True):
                row.answer.append(token)
            ended = [row for row in batch.rows if row.answer[-1] in ends or len(row.answer) == row.question.limit]
            for row in ended:
                answers[row.number] = row.answer
            if ended:
                batch.drop(ended)
                done(len(ended))
    finally:
        batch.attend(batch.own)
    return answers


@dataclass(eq=False)
class _Prefix:
    """The prefix shared by the prompts of a task, and its keys and values once it is prefilled."""

    ids: list[int]
    cache: Cache | None = None


@dataclass(eq=False)
class _Row:
    """A question with the tokens of its answer so far; `number` is its place among the questions."""

    number: int
    question: Question
    prefix: _Prefix | None
    answer: list[int] = field(default_factory=list)

    @property
    def rest(self) -> list[int]:
        """The prompt after the shared prefix."""
        return self.question.prompt[len(self.prefix.ids) if self.prefix else 0 :]

    @property
    def cached(self) -> int:
        """The number of tokens with cached keys and values: all but the newest."""
        return len(self.question.prompt) + len(self.answer) - 1


def _queue(questions: Sequence[Question]) -> deque[_Row]:
    """Rows grouped by shared prefix, longest prompts first: a batch that does not fit in memory fails at the start."""
    members: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        members.setdefault(question.task, []).append(number)
    groups: dict[_Prefix | None, list[_Row]] = {}
    for numbers in members.values():
        prompts = [questions[i].prompt for i in numbers]
        shared = _shared(prompts)[: min(map(len, prompts)) - 1]  # every row has at least one token of its own
        prefix = _Prefix(shared) if len(shared) >= LEAST_SHARED and len(numbers) > 1 else None
        groups.setdefault(prefix, []).extend(_Row(i, questions[i], prefix) for i in numbers)
    for rows in groups.values():
        rows.sort(key=lambda row: -len(row.question.prompt))
    ordered = sorted(groups.values(), key=lambda rows: -len(rows[0].question.prompt))
    return deque(row for rows in ordered for row in rows)


def _shared(prompts: Sequence[list[int]]) -> list[int]:
    """The longest common prefix of all prompts, which is that of the smallest and the largest of them."""
    first, last = min(prompts), max(prompts)
    differing = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differing, len(first))]


def _next(queue: deque[_Row], most: int) -> list[_Row]:
    """The rows of the next prefill: with one prefix, and of similar length, since padding costs as much as tokens."""
    rows = [queue.popleft()]
    width = len(rows[0].rest)
    while queue and len(rows) < most and queue[0].prefix is rows[0].prefix:
        if len(rows) * width >= PREFILL_TOKENS and len(queue[0].rest) < 0.8 * width:
            break
        rows.append(queue.popleft())
    return rows


class _Batch:
    """The rows in progress: row i has slot i of the cache."""

    def __init__(self, model: nn.Module, slots: int, pad: int, tasks: bool) -> None:
        self.model, self.pad, self.tasks = model, pad, tasks
        self.base = _base(model)
        self.device = self.base.device
        # Grouped attention materialises all scores of a prompt, as eager attention does. sdpa does not, so it is kept
        # for prefills.
        self.own = self.reading = self.stepping = self.base.config._attn_implementation
        if self.device.type == "cpu" and self.own in ("eager", "sdpa") and supports_grouped(self.base.config):
            self.stepping = GROUPED
            self.reading = GROUPED if self.own == "eager" else self.own
        # A tensor index, which copies the last positions. With 1, they are a strided slice, for whose product with the
        # LM head torch copies the head's weights once per row.
        self.last = torch.tensor([-1], device=self.device)
        self.rows: list[_Row] = []
        self.cache = Slots(len(self._new_cache().layers), slots, self.device)

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.base.config.get_text_config(decoder=True))

    def read(self, rows: list[_Row]) -> list[int]:
        """Prefill rows with one prefix; returns the first token of every answer."""
        prefix = rows[0].prefix
        self.attend(self.reading)
        if prefix and prefix.cache is None:
            prefix.cache = self._new_cache()
            ids = torch.tensor([prefix.ids], device=self.device)
            at = torch.arange(len(prefix.ids), device=self.device)[None]
            self._forward(rows[:1], ids, torch.ones_like(ids), at, prefix.cache)
        lengths, width = [len(row.question.prompt) for row in rows], max(len(row.rest) for row in rows)
        mask = self.cache.reading([row.cached for row in self.rows], lengths, width, prefix and prefix.cache)
        ids = torch.tensor([[self.pad] * (width - len(row.rest)) + row.rest for row in rows], device=self.device)
        at = torch.arange(-width, 0, device=self.device) + torch.tensor(lengths, device=self.device)[:, None]
        tokens = self._forward(rows, ids, mask, at.clamp(min=0), self.cache)
        for row in rows:
            row.prefix = None  # so that its cache is freed with the last row that needs it
        self.rows = self.rows + rows
        return tokens

    def step(self) -> list[int]:
        """Returns the next token of every row."""
        self.attend(self.stepping)
        cached = [row.cached for row in self.rows]
        ids = torch.tensor([row.answer[-1:] for row in self.rows], device=self.device)
        at = torch.tensor(cached, device=self.device)[:, None]
        return self._forward(self.rows, ids, self.cache.stepping(cached), at, self.cache)

    def drop(self, ended: Sequence[_Row]) -> None:
        """Remove finished rows."""
        slots = [i for i, row in enumerate(self.rows) if row not in ended]
        self.rows = [self.rows[slot] for slot in self.cache.keep(slots)]

    def attend(self, name: str) -> None:
        """Set the model's attention implementation."""
        if self.base.config._attn_implementation != name:
            self.base.set_attn_implementation(name)

    def _forward(self, rows: list[_Row], ids: Tensor, mask: Tensor, at: Tensor, cache: Cache) -> list[int]:
        task = {"task": [row.question.task for row in rows]} if self.tasks else {}
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=at,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=self.last,
            **task,
        ).logits
        tokens: list[int] = logits[:, -1].argmax(-1).tolist()
        return tokens


def _base(model: nn.Module) -> Any:
    """The transformers model, which an adapter changes in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model

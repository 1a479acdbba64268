# SPDX-License-Identifier: Apache-2.0
"""Decoder with continuous batching, for scoring (`decode`) and for the server; greedy answers equal those of `generate`
up to rounding.

- A finished or cancelled row leaves the batch at once, and the next prompts are prefilled and join while others go on:
  one queue over all questions, in which no task waits for the longest answers of another.
- Prompts of a task often share a prefix (the task's definition), which is prefilled once. This is exact: a layer's keys
  and values for a token depend on the tokens before it and on the row's task, and both are the same.
- A sampled row draws with a random generator of its own (sampling.py), one number per token, so that its answer does
  not depend on the other rows.
- Keys and values are not copied from step to step (slots.py) nor repeated for every query head (models/attention.py).
- The size of their buffer may be bounded, and the tokens of a prefill: rows then wait for room, and a long prompt is
  read in parts.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from dyads.models.attention import GROUPED, supports_grouped
from dyads.scoring.sampling import Sampler, Sampling, TokenLogprobs, logprobs_of
from dyads.scoring.slots import Slots, cache_argument
from dyads.tasks import Example
from dyads.tuner.row_adapters import RowAdapters

__all__ = ["Answer", "Decoder", "Prefix", "Question", "decode", "refusal", "shared_prefix"]

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
REQUIRED = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")


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
    sampling: Sampling | None = None
    """None: the most likely token."""
    logprobs: int | None = None
    """How many of the most likely tokens are reported at every place, with their log-probabilities; None: nothing."""
    adapter: str | None = None
    """The adapter of its row, in a model whose rows have adapters of their own; None: the base model."""
    ends: frozenset[int] = frozenset()
    """Tokens that end the answer, beside those of the decoder."""


@dataclass(eq=False)
class Prefix:
    """The tokens with which several prompts of a task begin, and their keys and values once they are prefilled."""

    ids: list[int]
    cache: Cache | None = None


@dataclass(eq=False)
class Answer:
    """A question with the tokens of its answer so far."""

    question: Question
    prefix: Prefix | None = None
    """None after the prefill, so that its cache is freed with the last answer that needs it."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One for every token, where the question wants them."""
    ended: bool = False
    """Whether the last token ends it; False for a cancelled one."""
    sampler: Sampler | None = None

    @property
    def rest(self) -> list[int]:
        """The prompt after the shared prefix."""
        return self.question.prompt[len(self.prefix.ids) if self.prefix else 0 :]

    @property
    def cached(self) -> int:
        """The number of tokens with cached keys and values: all but the newest."""
        return len(self.question.prompt) + len(self.tokens) - 1

    @property
    def longest(self) -> int:
        """The tokens of prompt and answer, if the answer reaches its limit."""
        return len(self.question.prompt) + self.question.limit


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
    required = (*REQUIRED, cache_argument(kind))
    if lacking := [name for name in required if name not in inspect.signature(kind.forward).parameters]:
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
    """Answers in tokens, eos included, in the order of the questions, for a model without a `refusal`.

    `eos` is the token that ends an answer, or several. `tasks`: pass the task of every row to the model. `done(n)` is
    called whenever n answers are finished.
    """
    slots = min(batch_size, len(questions))
    join = batch_size // 4 - (batch_size - slots)
    answers: dict[int, Answer] = {}
    with Decoder(model, slots=slots, eos=eos, pad=pad, tasks=tasks, join=join, mixes=False) as decoder:
        for number, prefix in _ordered(questions):
            answers[number] = decoder.submit(questions[number], prefix)
        while decoder.running or decoder.waiting:
            if ended := sum(answer.ended for answer in decoder.step()):
                done(ended)
    return [answers[number].tokens for number in range(len(questions))]


class Decoder:
    """Answers in progress: `submit` adds a question, `step` makes one forward pass, `cancel` drops an answer.

    All calls are made in one thread. As a context manager it gives the model its own attention back at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        slots: int,
        eos: int | Sequence[int],
        pad: int,
        tasks: bool = False,
        adapters: RowAdapters | None = None,
        join: int = 1,
        mixes: bool = True,
        cache_tokens: int | None = None,
        prefill_tokens: int | None = None,
    ) -> None:
        """`slots` rows are decoded at once. `join`: the free slots from which waiting questions join running rows.

        `cache_tokens`: the most rows times columns of the buffer of keys and values, beyond which questions wait;
        alone a question of any length is answered. `prefill_tokens`: the most tokens of prompts, with padding, in one
        forward pass; a longer prompt is read in parts.

        `tasks`: pass the task of every row to the model. `adapters`: those that the rows of this model have.
        `mixes`: whether questions with different prefixes are prefilled together.
        """
        self.ends = {eos} if isinstance(eos, int) else set(eos)
        self.slots, self.join, self.mixes = slots, max(1, join), mixes
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Answer] = deque()
        self._batch = _Batch(model, slots, pad, tasks, adapters, cache_tokens, prefill_tokens)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *error: object) -> None:
        self._batch.attend(self._batch.own)

    @property
    def running(self) -> list[Answer]:
        """The answers in the batch."""
        return self._batch.rows

    def submit(self, question: Question, prefix: Prefix | None = None) -> Answer:
        """Add a question to the queue; its prompt begins with the prefix, and has at least one token more."""
        sampler = None if question.sampling is None else Sampler(question.sampling)
        answer = Answer(question, prefix, sampler=sampler)
        if self.prefill_tokens is not None and len(answer.rest) > self.prefill_tokens:
            answer.prefix = Prefix(question.prompt[:-1])  # of its own, since prefixes are read in parts
        self.waiting.append(answer)
        return answer

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """Prefill waiting questions, or add a token to every running answer; returns the answers with a new token.

        Ended answers leave the batch. There is an answer that waits or runs.
        """
        batch, free = self._batch, self.slots - len(self._batch.rows)
        joins = self.waiting and (not batch.rows or free >= self.join)
        new = self._next(free) if joins else []
        rows = batch.read(new) if new else batch.step()
        for row in rows:
            row.ended = self.is_end(row) or len(row.tokens) == row.question.limit
        batch.drop([row for row in rows if row.ended])
        return rows

    def is_end(self, answer: Answer) -> bool:
        """Whether the last token of an answer is one that ends it."""
        return answer.tokens[-1] in self.ends or answer.tokens[-1] in answer.question.ends

    @torch.inference_mode()
    def cancel(self, answer: Answer) -> None:
        """Drop an answer that waits or runs; nothing for another one."""
        if answer in self.waiting:
            self.waiting.remove(answer)
        else:
            self._batch.drop([row for row in self._batch.rows if row is answer])

    def clear(self) -> None:
        """Drop all answers; after an error in a forward pass the decoder can be used again."""
        self.waiting.clear()
        self._batch.clear()

    def _next(self, most: int) -> list[Answer]:
        """The answers of the next prefill, in the order of the queue, as many as there is room for."""
        rows: list[Answer] = []
        while self.waiting and len(rows) < most and self._joins(self.waiting[0], rows):
            rows.append(self.waiting.popleft())
        return rows

    def _joins(self, row: Answer, rows: list[Answer]) -> bool:
        """Whether the next row of the queue is prefilled together with `rows`, and has room beside the running ones."""
        others = [*self._batch.rows, *rows]
        longest = max(other.longest for other in (*others, row))
        if others and not self._batch.cache.has_room(len(others) + 1, longest):
            return False
        if not rows:
            return True
        if (not self.mixes and row.prefix is not rows[0].prefix) or self._in_parts(row) or self._in_parts(rows[0]):
            return False
        # Of similar length, since padding costs as much as tokens.
        shorter, longer = sorted((max(len(one.rest) for one in rows), len(row.rest)))
        if len(rows) * longer >= PREFILL_TOKENS and shorter < 0.8 * longer:
            return False
        return self.prefill_tokens is None or (len(rows) + 1) * longer <= self.prefill_tokens

    def _in_parts(self, row: Answer) -> bool:
        """Whether the prefix of a row is still to be read, and too long for one forward pass."""
        most, prefix = self.prefill_tokens, row.prefix
        return most is not None and prefix is not None and prefix.cache is None and len(prefix.ids) > most


def _ordered(questions: Sequence[Question]) -> list[tuple[int, Prefix | None]]:
    """The numbers of all questions grouped by shared prefix, longest prompts first: a batch that does not fit in memory
    fails at the start."""
    members: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        members.setdefault(question.task, []).append(number)
    groups: dict[Prefix | None, list[int]] = {}
    for numbers in members.values():
        shared = shared_prefix([questions[i].prompt for i in numbers])
        prefix = Prefix(shared) if shared and len(numbers) > 1 else None
        groups.setdefault(prefix, []).extend(numbers)
    for numbers in groups.values():
        numbers.sort(key=lambda i: -len(questions[i].prompt))
    ordered = sorted(groups.items(), key=lambda group: -len(questions[group[1][0]].prompt))
    return [(number, prefix) for prefix, numbers in ordered for number in numbers]


def shared_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """The longest prefix of all prompts that leaves each a token of its own; empty if it has less than LEAST_SHARED."""
    first, last = min(prompts), max(prompts)  # their common prefix is that of all
    differing = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    shared = first[: min(next(differing, len(first)), min(map(len, prompts)) - 1)]
    return shared if len(shared) >= LEAST_SHARED else []


class _Batch:
    """The rows in progress: row i has slot i of the cache."""

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        pad: int,
        tasks: bool,
        adapters: RowAdapters | None,
        cache_tokens: int | None,
        prefill_tokens: int | None,
    ) -> None:
        self.model, self.pad, self.tasks, self.adapters = model, pad, tasks, adapters
        self.base = _base(model)
        self.cache_argument = cache_argument(type(self.base))
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
        self.slots, self.cache_tokens, self.prefill_tokens = slots, cache_tokens, prefill_tokens
        self.clear()

    def clear(self) -> None:
        """Drop all rows, with their keys and values."""
        self.rows: list[Answer] = []
        self.cache = Slots(len(self._new_cache().layers), self.slots, self.device, self.cache_tokens)

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.base.config.get_text_config(decoder=True))

    def read(self, rows: list[Answer]) -> list[Answer]:
        """Prefill new rows, each of which gets its first token; returns them."""
        self.attend(self.reading)
        for prefix in {row.prefix: None for row in rows if row.prefix}:
            if prefix.cache is None:
                prefix.cache = self._read_prefix(prefix, next(row for row in rows if row.prefix is prefix))
        lengths, width = [len(row.question.prompt) for row in rows], max(len(row.rest) for row in rows)
        prefixes = [row.prefix.cache if row.prefix else None for row in rows]
        mask = self.cache.reading([row.cached for row in self.rows], lengths, width, prefixes)
        ids = torch.tensor([[self.pad] * (width - len(row.rest)) + row.rest for row in rows], device=self.device)
        at = torch.arange(-width, 0, device=self.device) + torch.tensor(lengths, device=self.device)[:, None]
        logits = self._forward(rows, ids, mask, at.clamp(min=0), self.cache)
        for row in rows:
            row.prefix = None
        self.rows = self.rows + rows
        self._extend(rows, logits)
        return rows

    def _read_prefix(self, prefix: Prefix, row: Answer) -> DynamicCache:
        """Keys and values of a prefix of the row, in parts of at most `prefill_tokens` tokens."""
        cache, count = self._new_cache(), len(prefix.ids)
        ids = torch.tensor([prefix.ids], device=self.device)
        at = torch.arange(count, device=self.device)[None]
        size = self.prefill_tokens or count
        for start in range(0, count, size):
            part = slice(start, start + size)
            mask = torch.ones_like(ids[:, : part.stop])
            self._forward([row], ids[:, part], mask, at[:, part], cache)
        return cache

    def step(self) -> list[Answer]:
        """Give every row its next token; returns them."""
        self.attend(self.stepping)
        cached = [row.cached for row in self.rows]
        ids = torch.tensor([row.tokens[-1:] for row in self.rows], device=self.device)
        at = torch.tensor(cached, device=self.device)[:, None]
        self._extend(self.rows, self._forward(self.rows, ids, self.cache.stepping(cached), at, self.cache))
        return self.rows

    def drop(self, ended: Sequence[Answer]) -> None:
        """Remove rows."""
        if ended:
            slots = [i for i, row in enumerate(self.rows) if row not in ended]
            self.rows = [self.rows[slot] for slot in self.cache.keep(slots)]

    def attend(self, name: str) -> None:
        """Set the model's attention implementation."""
        if self.base.config._attn_implementation != name:
            self.base.set_attn_implementation(name)

    def _extend(self, rows: Sequence[Answer], logits: Tensor) -> None:
        """Add the next token to every row, from its logits (b vocabulary)."""
        tokens: list[int] = logits.argmax(-1).tolist()
        for i, row in enumerate(rows):
            token = tokens[i] if row.sampler is None else row.sampler.draw(logits[i])
            row.tokens.append(token)
            if row.question.logprobs is not None:
                row.logprobs.append(logprobs_of(logits[i], token, row.question.logprobs))

    def _forward(self, rows: list[Answer], ids: Tensor, mask: Tensor, at: Tensor, cache: Cache) -> Tensor:
        """Logits of the next token (b vocabulary)."""
        given = [row.question.task for row in rows]
        own: AbstractContextManager[None] = nullcontext()
        task = {"task": given} if self.tasks else {}
        if self.adapters is not None:
            own = self.adapters.use([row.question.adapter for row in rows], given)
        with own:
            logits: Tensor = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=at,
                use_cache=True,
                logits_to_keep=self.last,
                **{self.cache_argument: cache},
                **task,
            ).logits
        return logits[:, -1]


def _base(model: nn.Module) -> Any:
    """The transformers model, which an adapter changes in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model

# SPDX-License-Identifier: Apache-2.0
"""Tokenisation: from an example to token ids and labels, alike in training and generation.

    decoder only     input_ids = prompt + target + eos      labels = -100 … -100 + target + eos
    encoder-decoder  input_ids = prompt (with its special tokens)      labels = target + eos
    encoder          input_ids = [CLS] text [SEP] text [SEP]           target = a number for the head of the task

Prompt and target are tokenised separately and concatenated, so that a prompt has the same tokens in training and in
generation. Spaces at the end of a decoder's prompt move to the start of its target ("Output:" + " Paris"), because most
tokenizers join a space to the next word; the text is unchanged.

Limits: if a prompt has shorter versions (fewer demonstrations), the first that fits is used. A prompt that is still too
long loses its middle for a decoder, which needs the definition at the start and the cue at the end, and its end for an
encoder-decoder, as in the official Super-NaturalInstructions scoring. The limit of a target includes eos; a longer
target is cut and gets no eos, so that the model does not learn to stop in the middle of a sentence. Of a pair of texts
for an encoder, the longer one loses its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyads.errors import ConfigError
from dyads.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Encoded", "EncodedPair", "PairTokenizer", "PromptTokenizer", "encode"]

IGNORED = -100
"""The label of positions without loss."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training example in tokens."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids` for a decoder; the target alone for an encoder-decoder."""
    task: int

    def __len__(self) -> int:
        """Number of input tokens, by which examples are sorted."""
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One example in tokens for an encoder with heads."""

    input_ids: list[int]
    types: list[int]
    """The text of the pair that each token belongs to, 0 or 1."""
    target: float
    """Training target of the head: a class id, or a number."""
    task: int

    def __len__(self) -> int:
        """Number of input tokens, by which examples are sorted."""
        return len(self.input_ids)


class PromptTokenizer:
    """Tokenises prompts and targets within limits.

    A prompt has the special tokens that the tokenizer adds by default. For a decoder, those at the start (bos) are kept
    and those at the end (eos, [SEP]) are left out, since the answer follows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int | None = None,
        max_target_tokens: int | None = None,
        encoder_decoder: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer {type(tokenizer).__name__} has no eos token to end an answer with; "
                f"set tokenizer.eos_token"
            )
        self.tokenizer, self.encoder_decoder = tokenizer, encoder_decoder
        self.max_prompt_tokens, self.max_target_tokens = max_prompt_tokens, max_target_tokens
        self.eos = int(tokenizer.eos_token_id)
        self.start, self.end = _special_tokens(tokenizer)
        if not encoder_decoder:
            self.end = []
        room = len(self.start) + len(self.end) + 1
        if max_prompt_tokens is not None and max_prompt_tokens < room:
            raise ConfigError(
                f"max_prompt_tokens is {max_prompt_tokens}, a prompt needs at least {room} with special tokens"
            )
        if max_target_tokens is not None and max_target_tokens < 1:
            raise ConfigError(f"max_target_tokens is {max_target_tokens}, a target needs at least 1")

    def prompt(self, example: Example, limit: int | None = None) -> list[int]:
        """The tokens of the prompt, at most `limit` (default: `max_prompt_tokens`)."""
        limit = self.max_prompt_tokens if limit is None else limit
        room = None if limit is None else max(1, limit - len(self.start) - len(self.end))
        for text in (example.prompt, *example.shorter):
            ids = self._ids(self._prompt_text(text))
            if room is None or len(ids) <= room:
                break
        if room is not None and len(ids) > room:
            tail = 0 if self.encoder_decoder else room // 2
            ids = ids[: room - tail] + ids[len(ids) - tail :]
        return self.start + ids + self.end

    def target(self, example: Example) -> list[int]:
        """The tokens of the first reference, with eos unless they were cut."""
        return self.choice(example, example.references[0])[: self.max_target_tokens]

    def choice(self, example: Example, answer: str) -> list[int]:
        """The tokens of one candidate answer with eos, never cut."""
        return [*self._ids(self._answer_text(example, answer)), self.eos]

    def encode(self, example: Example, task: int, limit: int | None = None) -> Encoded:
        """The example for training; at least one position has a label."""
        prompt, target = self.prompt(example, limit), self.target(example)
        if self.encoder_decoder:
            return Encoded(prompt, target, task)
        return Encoded(prompt + target, [IGNORED] * len(prompt) + target, task)

    def lengths(self, examples: Sequence[Example], limit: int | None = None) -> list[int]:
        """`len(self.encode(e, …))` of every example, but faster; shorter prompts are not tried."""
        if not examples:
            return []
        limit = self.max_prompt_tokens if limit is None else limit
        special = len(self.start) + len(self.end)
        prompts = [len(ids) + special for ids in self._many([self._prompt_text(e.prompt) for e in examples])]
        prompts = prompts if limit is None else [min(n, limit) for n in prompts]
        if self.encoder_decoder:
            return prompts
        targets = [len(ids) + 1 for ids in self._many([self._answer_text(e, e.references[0]) for e in examples])]
        most = self.max_target_tokens
        return [p + (t if most is None else min(t, most)) for p, t in zip(prompts, targets, strict=True)]

    def _prompt_text(self, prompt: str) -> str:
        return prompt if self.encoder_decoder else prompt.rstrip(" ")

    def _answer_text(self, example: Example, answer: str) -> str:
        return example.prompt[len(self._prompt_text(example.prompt)) :] + answer

    def _ids(self, text: str) -> list[int]:
        return self._many([text])[0]

    def _many(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return ids


class PairTokenizer:
    """Tokenises the segments of an example, one text or a pair, for an encoder with heads.

    For an example without segments it uses the prompt. `target` maps task id and example to the training target of the
    head.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        target: Callable[[int, Example], float],
        *,
        max_prompt_tokens: int | None = None,
    ) -> None:
        room = tokenizer.num_special_tokens_to_add(pair=True) + 2
        if max_prompt_tokens is not None and max_prompt_tokens < room:
            raise ConfigError(
                f"max_prompt_tokens is {max_prompt_tokens}, a pair of texts needs at least {room} with special tokens"
            )
        self.tokenizer, self.target, self.max_prompt_tokens = tokenizer, target, max_prompt_tokens

    def read(self, examples: Sequence[Example], limit: int | None = None) -> list[tuple[list[int], list[int]]]:
        """(token ids, token types) of every example, at most `limit` (default: `max_prompt_tokens`)."""
        limit = self.max_prompt_tokens if limit is None else limit
        encoded: list[tuple[list[int], list[int]]] = [([], [])] * len(examples)
        for many in (1, 2):  # a tokenizer takes a list of texts, or a list of pairs
            rows = [(i, segments) for i, e in enumerate(examples) if len(segments := e.segments or (e.prompt,)) == many]
            if not rows:
                continue
            cut = {"truncation": "longest_first", "max_length": limit} if limit is not None else {}
            batch = self.tokenizer(
                *([segments[k] for _, segments in rows] for k in range(many)),
                return_attention_mask=False,
                return_token_type_ids=True,
                verbose=False,
                **cut,
            )
            for (i, _), ids, types in zip(rows, batch["input_ids"], batch["token_type_ids"], strict=True):
                encoded[i] = (ids, types)
        return encoded

    def encode(self, example: Example, task: int, limit: int | None = None) -> EncodedPair:
        """The example for training."""
        ((ids, types),) = self.read([example], limit)
        return EncodedPair(ids, types, self.target(task, example), task)

    def lengths(self, examples: Sequence[Example], limit: int | None = None) -> list[int]:
        """`len(self.encode(e, …))` of every example."""
        return [len(ids) for ids, _ in self.read(examples, limit)]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    *,
    task: int = 0,
    max_prompt_tokens: int | None = None,
    max_target_tokens: int | None = None,
    encoder_decoder: bool = False,
) -> Encoded:
    """Tokenise one example; for many, keep a `PromptTokenizer`."""
    prompt_tokenizer = PromptTokenizer(
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        max_target_tokens=max_target_tokens,
        encoder_decoder=encoder_decoder,
    )
    return prompt_tokenizer.encode(example, task)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer adds before and after a text, found by tokenising one."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_special: list[int] = tokenizer("a")["input_ids"]
    for at in range(len(with_special) - len(bare) + 1):
        if with_special[at : at + len(bare)] == bare:
            return with_special[:at], with_special[at + len(bare) :]
    return [], []

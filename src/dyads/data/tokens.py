# SPDX-License-Identifier: Apache-2.0
"""Tokenisation: from an example to token ids and labels, alike in training and generation.

    decoder only     input_ids = prompt + target + eos      labels = -100 … -100 + target + eos
    encoder-decoder  input_ids = prompt (with its special tokens)      labels = target + eos
    encoder          input_ids = [CLS] text [SEP] text [SEP]           target = a number for the head of the task

Prompt and target are tokenised separately and concatenated, so that a prompt has the same tokens in training and in
generation. Spaces at the end of a decoder's prompt move to the start of its target ("Output:" + " Paris"), because most
tokenizers join a space to the next word. The text is unchanged, except by tokenizers that put a space before every text
(some of SentencePiece's): before the target there are two then, in training and in generation. Special tokens in a text
are ordinary text (text_tokens.py). Examples with messages are rendered by the model's chat template (chat.py), and
earlier answers of the assistant have labels too.

Limits: if a prompt has shorter versions (fewer demonstrations), the first that fits is used. A prompt that is still too
long loses its middle for a decoder, which needs the definition at the start and the cue at the end, and its end for an
encoder-decoder, as in the official Super-NaturalInstructions scoring. The limit of a target includes eos; a longer
target is cut and gets no eos, so that the model does not learn to stop in the middle of a sentence. Of a pair of texts
for an encoder, the longer one loses its end. A decoder with a number of positions leaves room for the answer: prompt
and target together, and prompt and generated answer, have at most as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from dyads.data.chat import IGNORED, TRANSCRIPT, ChatTemplate
from dyads.data.text_tokens import TextTokenizer
from dyads.errors import ConfigError, TaskError
from dyads.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Encoded", "EncodedPair", "PairTokenizer", "PromptTokenizer", "encode"]


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
    and those at the end (eos, [SEP]) are left out, since the answer follows. A decoder with a chat template reads the
    messages of an example, whose special tokens are the template's.

    `positions` is the number of tokens that a decoder can read and write together, or each side of an encoder-decoder;
    `answer_tokens` of them (default: `max_target_tokens`), but at most half, are kept free for the answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int | None = None,
        max_target_tokens: int | None = None,
        encoder_decoder: bool = False,
        chat_template: str | None = None,
        positions: int | None = None,
        answer_tokens: int | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer {type(tokenizer).__name__} has no eos token to end an answer with; "
                f"set tokenizer.eos_token"
            )
        self.tokenizer, self.encoder_decoder = tokenizer, encoder_decoder
        self.chat = ChatTemplate(tokenizer, chat_template) if chat_template and not encoder_decoder else None
        self._transcript: ChatTemplate | None = None
        self.text = self.chat.text if self.chat else TextTokenizer(tokenizer)
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
        self.positions = positions
        if positions is not None:
            answer = max_target_tokens if answer_tokens is None else answer_tokens
            free = 0 if encoder_decoder else min(positions // 2, positions if answer is None else answer)
            most = positions - free if max_prompt_tokens is None else min(positions - free, max_prompt_tokens)
            max_prompt_tokens = most
            max_target_tokens = _smaller(positions if encoder_decoder else positions - most, max_target_tokens)
        self.max_prompt_tokens, self.max_target_tokens = max_prompt_tokens, max_target_tokens

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer: eos, and that of the chat template."""
        return (self.eos,) if self.chat is None else tuple(dict.fromkeys((self.eos, self.chat.end)))

    def prompt(self, example: Example, limit: int | None = None) -> list[int]:
        """The tokens of the prompt, at most `limit` (default: `max_prompt_tokens`)."""
        return self._prompt(example, limit)[0]

    def _prompt(self, example: Example, limit: int | None = None) -> tuple[list[int], list[int]]:
        """(ids, labels) of the prompt: the labels of a conversation's earlier answers are their tokens."""
        limit = _smaller(self.max_prompt_tokens, limit)
        room = None if limit is None else max(1, limit - len(self.start) - len(self.end))
        if (chat := self._chat(example)) is not None:
            start = [] if chat is self.chat else self.start
            try:
                ids, labels = chat.prompt(example.messages, limit if chat is self.chat else room)
            except TaskError as error:
                raise TaskError(f"example '{example.id}': {error}") from error
            return start + ids, [IGNORED] * len(start) + labels
        for text in (example.prompt, *example.shorter):
            ids = self._ids(self._prompt_text(text))
            if room is None or len(ids) <= room:
                break
        if room is not None and len(ids) > room:
            tail = 0 if self.encoder_decoder else room // 2
            ids = ids[: room - tail] + ids[len(ids) - tail :]
        ids = self.start + ids + self.end
        return ids, [IGNORED] * len(ids)

    def target(self, example: Example) -> list[int]:
        """The tokens of the first reference, with eos unless they were cut."""
        return self.choice(example, example.references[0])[: self.max_target_tokens]

    def choice(self, example: Example, answer: str) -> list[int]:
        """The tokens of one candidate answer with eos, never cut."""
        if (chat := self._chat(example)) is not None:
            return chat.answer(example.messages, answer)
        return [*self._ids(self._answer_text(example, answer)), self.eos]

    def encode(self, example: Example, task: int, limit: int | None = None) -> Encoded:
        """The example for training; at least one position has a label."""
        (prompt, labels), target = self._prompt(example, limit), self.target(example)
        if self.encoder_decoder:
            return Encoded(prompt, target, task)
        return Encoded(prompt + target, labels + target, task)

    def lengths(self, examples: Sequence[Example], limit: int | None = None) -> list[int]:
        """`len(self.encode(e, …))` of every example, but faster; shorter prompts are not tried."""
        if not examples:
            return []
        if any(self._chat(example) is not None for example in examples):
            return [len(self.encode(example, 0, limit)) for example in examples]
        limit = _smaller(self.max_prompt_tokens, limit)
        special = len(self.start) + len(self.end)
        prompts = [len(ids) + special for ids in self._many([self._prompt_text(e.prompt) for e in examples])]
        prompts = prompts if limit is None else [min(n, limit) for n in prompts]
        if self.encoder_decoder:
            return prompts
        targets = [len(ids) + 1 for ids in self._many([self._answer_text(e, e.references[0]) for e in examples])]
        most = self.max_target_tokens
        return [p + (t if most is None else min(t, most)) for p, t in zip(prompts, targets, strict=True)]

    def answer_limit(self, prompt: Sequence[int], wanted: int) -> int:
        """The number of tokens that can be generated after a prompt, at most `wanted`."""
        if self.positions is None or self.encoder_decoder:
            return wanted
        return max(1, min(wanted, self.positions - len(prompt)))

    def answer_text(self, example: Example, ids: Sequence[int]) -> str:
        """The text of a generated answer, without what the prompt's form puts around it."""
        at = next((i for i, id_ in enumerate(ids) if id_ in self.ends), len(ids))
        lead, trail = self.around_answer(example)
        return self.text_of(ids[:at]).removeprefix(lead).removesuffix(trail)

    def around_answer(self, example: Example) -> tuple[str, str]:
        """What the prompt's form puts before and after a generated answer."""
        if (chat := self._chat(example)) is not None:
            return chat.lead, chat.trail
        return example.prompt[len(self._prompt_text(example.prompt)) :], ""

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """The tokens of one byte, <0x00> to <0xFF>, of a SentencePiece tokenizer."""
        vocabulary = self.tokenizer.get_vocab()
        names = (f"<0x{byte:02X}>" for byte in range(256))
        return frozenset(vocabulary[name] for name in names if name in vocabulary)

    def _chat(self, example: Example) -> ChatTemplate | None:
        """The template that renders the example's messages; None where its prompt is read as it is."""
        if self.encoder_decoder or not example.messages:
            return None
        if self.chat is None and len(example.messages) > 1:
            self._transcript = self._transcript or ChatTemplate(self.tokenizer, TRANSCRIPT)
            return self._transcript
        return self.chat

    def _prompt_text(self, prompt: str) -> str:
        return prompt if self.encoder_decoder else prompt.rstrip(" ")

    def _answer_text(self, example: Example, answer: str) -> str:
        return example.prompt[len(self._prompt_text(example.prompt)) :] + answer

    def _ids(self, text: str) -> list[int]:
        return self._many([text])[0]

    def _many(self, texts: list[str]) -> list[list[int]]:
        return self.text(texts)


def _smaller(one: int | None, other: int | None) -> int | None:
    return min(n for n in (one, other) if n is not None) if (one, other) != (None, None) else None


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
        self.text = TextTokenizer(tokenizer)

    def read(self, examples: Sequence[Example], limit: int | None = None) -> list[tuple[list[int], list[int]]]:
        """(token ids, token types) of every example, at most `limit`, and `max_prompt_tokens` in any case."""
        limit = _smaller(self.max_prompt_tokens, limit)
        return self.text.pairs([example.segments or (example.prompt,) for example in examples], limit)

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

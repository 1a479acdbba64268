# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of given choices as continuations of a prompt.

    score(c) = Σ_i log p(c_i | prompt, c_1 … c_{i-1})        c_1 … c_n: the tokens of a choice, then eos

With eos included, as in training, this is the probability of answering exactly c: without it, "a" could never lose to
"a b". Divided by n it is a mean per token (`evaluate.length_normalise`).

A prompt is computed once for all its choices: a decoder's keys and values, or an encoder's hidden states, are repeated
for them. A decoder with any other kind of cache computes every prompt again with every choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from dyads.scoring.decode import refusal
from dyads.scoring.slots import cache_argument

__all__ = ["ChoiceQuestion", "log_likelihoods"]


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A prompt and the choices for its answer."""

    prompt: list[int]
    """In tokens."""
    texts: Sequence[str]
    """The choices as text."""
    answers: list[list[int]]
    """The choices in tokens, with eos."""
    task: str | int | None = None
    """None where the gates do not depend on the task."""

    def best(self, sums: Sequence[float], length_normalise: bool = False) -> str:
        """The text with the highest sum of log-probabilities, or mean per token; the first of equals."""
        scores = [s / len(a) for s, a in zip(sums, self.answers, strict=True)] if length_normalise else sums
        return self.texts[max(range(len(scores)), key=lambda i: scores[i])]


@dataclass(frozen=True, slots=True)
class _Call:
    """A batch of questions; choice i belongs to prompt rows[i]."""

    model: nn.Module
    base: Any
    prompts: list[list[int]]
    answers: list[list[int]]
    rows: Tensor
    pad: int
    task: dict[str, Any]
    """`task=` for a pass over the prompts; empty where the gates do not depend on the task."""
    row_task: dict[str, Any]
    """The same for a pass over the choices."""


@torch.inference_mode()
def log_likelihoods(
    model: nn.Module,
    questions: Sequence[ChoiceQuestion],
    *,
    batch_size: int,
    pad: int,
    tasks: bool = False,
    done: Callable[[int], object] = lambda rows: None,
) -> list[list[float]]:
    """Sums of log-probabilities, one for every choice of every question.

    `tasks`: pass the task of every row to the model. `done(n)` is called after each batch with its number of questions.
    A batch holds up to `batch_size` choices, and at least one question.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.config.is_encoder_decoder:
        score = _encoder_decoder
    else:
        score = _decoder if refusal(model) is None else _decoder_without_cache
    found: list[list[float]] = [[] for _ in questions]
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt))
    while order:
        at, order = _batch(order, questions, batch_size)
        batch = [questions[i] for i in at]
        rows = [place for place, question in enumerate(batch) for _ in question.answers]
        call = _Call(
            model=model,
            base=base,
            prompts=[question.prompt for question in batch],
            answers=[answer for question in batch for answer in question.answers],
            rows=torch.tensor(rows, device=base.device),
            pad=pad,
            task={"task": [question.task for question in batch]} if tasks else {},
            row_task={"task": [batch[row].task for row in rows]} if tasks else {},
        )
        sums = iter(score(call).tolist())
        for i in at:
            found[i] = [next(sums) for _ in questions[i].answers]
        done(len(at))
    return found


def _batch(order: list[int], questions: Sequence[ChoiceQuestion], batch_size: int) -> tuple[list[int], list[int]]:
    """The questions of the next batch, and the remaining ones."""
    rows, end = 0, 0
    while end < len(order) and (not end or rows + len(questions[order[end]].answers) <= batch_size):
        rows += len(questions[order[end]].answers)
        end += 1
    return order[:end], order[end:]


def _decoder(call: _Call) -> Tensor:
    """One pass over the prompts, padded on the left, into a cache; one over the choices, padded on the right."""
    ids, mask = _padded(call.prompts, call.pad, call.base.device, left=True)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=call.base.config.get_text_config(decoder=True))
    kept = {cache_argument(type(call.base)): cache, "use_cache": True}
    # A tensor rather than 1, for the reason given in scoring/decode.py.
    last = {"logits_to_keep": torch.tensor([-1], device=ids.device)}
    logits = call.model(input_ids=ids, attention_mask=mask, position_ids=at, **kept, **last, **call.task).logits
    answers, real = _padded(call.answers, call.pad, ids.device)
    logits = logits[call.rows]  # (choices 1 vocabulary): for their first tokens
    if answers.shape[1] > 1:
        cache.batch_select_indices(call.rows)
        mask = torch.cat([mask[call.rows], real[:, :-1]], 1)
        at = at[call.rows, -1:] + 1 + torch.arange(answers.shape[1] - 1, device=ids.device)
        rest = call.model(
            input_ids=answers[:, :-1], attention_mask=mask, position_ids=at, **kept, **call.row_task
        ).logits
        logits = torch.cat([logits, rest], 1)
    return _sums(logits, answers, real)


def _decoder_without_cache(call: _Call) -> Tensor:
    """One pass over every choice after its prompt, padded on the right."""
    prompts = [call.prompts[row] for row in call.rows.tolist()]
    both = [prompt + answer for prompt, answer in zip(prompts, call.answers, strict=True)]
    ids, mask = _padded(both, call.pad, call.base.device)
    logits = call.model(input_ids=ids, attention_mask=mask, use_cache=False, **call.row_task).logits
    answers, real = _padded(call.answers, call.pad, ids.device)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
    at = ends[:, None] - 1 + torch.arange(answers.shape[1], device=ids.device)
    at = at.clamp(max=ids.shape[1] - 1)  # positions after a shorter choice, masked in the sum, may not exist
    return _sums(logits[torch.arange(len(at), device=ids.device)[:, None], at], answers, real)


def _encoder_decoder(call: _Call) -> Tensor:
    """One encoder pass over the prompts, one decoder pass over the choices."""
    ids, mask = _padded(call.prompts, call.pad, call.base.device)
    answers, real = _padded(call.answers, call.pad, ids.device)
    inputs = call.base.prepare_decoder_input_ids_from_labels(labels=answers)
    # Through the whole model rather than its encoder: only the adapted model's own forward takes `task=`.
    first = inputs[: len(ids), :1].expand(len(ids), 1)
    read = call.model(input_ids=ids, attention_mask=mask, decoder_input_ids=first, use_cache=False, **call.task)
    hidden = BaseModelOutput(last_hidden_state=read.encoder_last_hidden_state[call.rows])
    logits = call.model(
        encoder_outputs=hidden,
        attention_mask=mask[call.rows],
        decoder_input_ids=inputs,
        use_cache=False,
        **call.row_task,
    ).logits
    return _sums(logits, answers, real)


def _padded(rows: Sequence[list[int]], pad: int, device: Any, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """(tokens, mask), both (rows, longest)."""
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    ids = [[pad] * gap + row if left else row + [pad] * gap for row, gap in zip(rows, gaps, strict=True)]
    real = [
        [0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in zip(rows, gaps, strict=True)
    ]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def _sums(logits: Tensor, answers: Tensor, real: Tensor) -> Tensor:
    """Σ log p over the real tokens of every choice: logits (c n v), tokens and mask (c n)."""
    of_token = logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    return (of_token * real).sum(1)

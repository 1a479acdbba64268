# SPDX-License-Identifier: Apache-2.0
"""Which of some given answers does a language model find most likely to follow a prompt?

    score(c) = Σ_i log p(c_i | prompt, c_1 … c_{i-1})        c_1 … c_n: the tokens of a choice, then eos

This is the probability of answering exactly the choice, its end included, as training has it: without eos, a choice
that another one begins with could never lose to it. Divided by n it is a mean per token (`evaluate.length_normalise`).

A prompt is read once for all its choices: a decoder's keys and values, or an encoder's hidden states, are repeated for
them. Decoders that keep something else in their cache read every prompt with every choice, from its start.
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

__all__ = ["Choice", "log_likelihoods"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A prompt in tokens, what may be answered, in text and in tokens with eos, and the task (None: no gate looks)."""

    prompt: list[int]
    texts: Sequence[str]
    answers: list[list[int]]
    task: str | int | None = None

    def best(self, sums: Sequence[float], length_normalise: bool = False) -> str:
        """The text with the highest sum of log-probabilities, or mean; of equals the first."""
        scores = [s / len(a) for s, a in zip(sums, self.answers, strict=True)] if length_normalise else sums
        return self.texts[max(range(len(scores)), key=lambda i: scores[i])]


@dataclass(frozen=True, slots=True)
class _Call:
    """A batch of questions: row i is choice i, of the prompt rows[i]."""

    model: nn.Module
    base: Any
    prompts: list[list[int]]
    answers: list[list[int]]
    rows: Tensor
    pad: int
    task: dict[str, Any]
    row_task: dict[str, Any]


@torch.inference_mode()
def log_likelihoods(
    model: nn.Module,
    questions: Sequence[Choice],
    *,
    batch_size: int,
    pad: int,
    tasks: bool = False,
    done: Callable[[int], object] = lambda rows: None,
) -> list[list[float]]:
    """Sums of log-probabilities, one for every choice of every question.

    `tasks` says whether the gates look at the task; `done` is told how many questions have just been answered. A batch
    holds up to `batch_size` choices, and at least one question with all of its.
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
        asked = [questions[i] for i in at]
        rows = [place for place, question in enumerate(asked) for _ in question.answers]
        call = _Call(
            model=model,
            base=base,
            prompts=[question.prompt for question in asked],
            answers=[answer for question in asked for answer in question.answers],
            rows=torch.tensor(rows, device=base.device),
            pad=pad,
            task={"task": [question.task for question in asked]} if tasks else {},
            row_task={"task": [asked[row].task for row in rows]} if tasks else {},
        )
        sums = iter(score(call).tolist())
        for i in at:
            found[i] = [next(sums) for _ in questions[i].answers]
        done(len(at))
    return found


def _batch(order: list[int], questions: Sequence[Choice], batch_size: int) -> tuple[list[int], list[int]]:
    """The questions of the next batch, and those that are left."""
    rows, end = 0, 0
    while end < len(order) and (not end or rows + len(questions[order[end]].answers) <= batch_size):
        rows += len(questions[order[end]].answers)
        end += 1
    return order[:end], order[end:]


def _decoder(call: _Call) -> Tensor:
    """Prompts are padded on the left and kept; the choices follow, padded on the right."""
    ids, mask = _padded(call.prompts, call.pad, call.base.device, left=True)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=call.base.config.get_text_config(decoder=True))
    kept = {"past_key_values": cache, "use_cache": True}
    # A tensor, not 1: see scoring/decode.py.
    last = {"logits_to_keep": torch.tensor([-1], device=ids.device)}
    logits = call.model(input_ids=ids, attention_mask=mask, position_ids=at, **kept, **last, **call.task).logits
    answers, real = _padded(call.answers, call.pad, ids.device)
    logits = logits[call.rows]  # (choices 1 vocabulary): their first tokens
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
    """Every choice behind its prompt, padded on the right."""
    prompts = [call.prompts[row] for row in call.rows.tolist()]
    both = [prompt + answer for prompt, answer in zip(prompts, call.answers, strict=True)]
    ids, mask = _padded(both, call.pad, call.base.device)
    logits = call.model(input_ids=ids, attention_mask=mask, use_cache=False, **call.row_task).logits
    answers, real = _padded(call.answers, call.pad, ids.device)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
    at = ends[:, None] - 1 + torch.arange(answers.shape[1], device=ids.device)
    at = at.clamp(max=ids.shape[1] - 1)  # behind a shorter choice there may be nothing, and nothing is asked of it
    return _sums(logits[torch.arange(len(at), device=ids.device)[:, None], at], answers, real)


def _encoder_decoder(call: _Call) -> Tensor:
    """Prompts are read once; the decoder reads every choice from its start."""
    ids, mask = _padded(call.prompts, call.pad, call.base.device)
    answers, real = _padded(call.answers, call.pad, ids.device)
    inputs = call.base.prepare_decoder_input_ids_from_labels(labels=answers)
    # By a call of the whole model, and not of its encoder alone, since only that tells the gates their tasks.
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
    """(tokens, 1 where there is one), both (rows, longest)."""
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

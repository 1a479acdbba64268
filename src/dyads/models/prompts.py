# SPDX-License-Identifier: Apache-2.0
"""Prompts of a language model: its chat template, and the limits that its positions and the recipe set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dyads.data.tokens import PromptTokenizer
from dyads.errors import ConfigError
from dyads.models.load import Kind
from dyads.reading import read_text
from dyads.recipe.spec import ModelSpec, Recipe
from dyads.tasks import Task

__all__ = ["chat_template_of", "positions_of", "prompt_tokenizer_of"]

_LARGEST_TEMPLATE = 2**20
"""Bytes of a chat template."""


def chat_template_of(
    spec: ModelSpec, kind: Kind, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
) -> str | None:
    """The chat template with which a model reads the tasks; None where it reads their prompts as they are.

    Only tasks whose template is of kind `chat` have one: the prompts of published protocols stay as they are.
    """
    chats = any(task.template is not None and task.template.chat for task in tasks)
    if spec.chat_template == "none" or (spec.chat_template == "auto" and (not chats or kind != "causal")):
        return None
    if kind != "causal":
        what = {"seq2seq": "an encoder-decoder", "encoder": "an encoder"}.get(kind)
        raise ConfigError(f"model.chat_template is for decoders, and '{spec.name}' is {what}: leave it out")
    if spec.chat_template != "auto":
        if not chats:
            raise ConfigError(
                f"model.chat_template '{spec.chat_template}' has no effect: no task is in chat form, and published"
                " protocols keep their prompts; leave it out"
            )
        try:
            return read_text(Path(spec.chat_template).expanduser(), error=ConfigError, most=_LARGEST_TEMPLATE)
        except FileNotFoundError as error:
            reason = f"cannot read '{spec.chat_template}': {error.strerror}"
        except (ConfigError, RuntimeError) as error:  # RuntimeError: `~user`, where there is no such user
            reason = str(error)
        raise ConfigError(f"model.chat_template: {reason}; give a Jinja file, auto or none")
    if not tokenizer.chat_template:
        return None
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, and none is the default
        raise ConfigError(f"model '{spec.name}': {error}; give a file with one as model.chat_template") from None
    return template


def positions_of(config: Any) -> int | None:
    """The number of tokens that the model reads at once; None where its config sets none."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return None


def prompt_tokenizer_of(
    config: Any, kind: Kind, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, chat_template: str | None
) -> PromptTokenizer:
    """The prompt tokenizer of a run, alike in training and scoring.

    The smallest limit of the recipe and of the model's positions holds; room for the longest answer is kept free.
    """
    train, evaluate = recipe.train, recipe.evaluate
    return PromptTokenizer(
        tokenizer,
        max_prompt_tokens=train.max_prompt_tokens,
        max_target_tokens=train.max_target_tokens,
        encoder_decoder=kind == "seq2seq",
        chat_template=chat_template,
        positions=positions_of(config),
        answer_tokens=max(train.max_target_tokens, evaluate.max_new_tokens or 0),
    )

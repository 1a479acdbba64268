# SPDX-License-Identifier: Apache-2.0
"""Loading of base models: a hub id, a folder or a packaged model becomes a frozen transformers model."""

from __future__ import annotations

import inspect
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from dyads.errors import ConfigError, DyadsError, RunError
from dyads.models.attention import GROUPED, is_plain
from dyads.models.packaged import PACKAGED, PREFIX, resolve
from dyads.recipe.spec import ModelSpec

__all__ = [
    "Kind",
    "auto_class",
    "kind_of",
    "load_model",
    "load_tokenizer",
    "model_config",
    "without_pooler",
]

Kind = Literal["causal", "seq2seq", "encoder"]


def model_config(name: str, revision: str | None = None) -> Any:
    """The transformers config of a model, without its weights."""
    return _explain(name, lambda: AutoConfig.from_pretrained(resolve(name), revision=revision))


def kind_of(name: str, config: Any, asked: str = "auto") -> Kind:
    """Decoder only, encoder-decoder or encoder, as the config says; ConfigError where something else is asked for.

    An encoder is what transformers has a masked language model of. Asked for as a decoder it stays what it is.
    """
    if config.is_encoder_decoder:
        found: Kind = "seq2seq"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        found = "encoder"
    else:
        found = "causal"
    if asked in ("auto", found):
        return found
    if "encoder" in (asked, found):
        read = {"causal": "a decoder", "seq2seq": "an encoder-decoder", "encoder": "an encoder"}[found]
        answers = "by heads, not in text" if found == "encoder" else "in text, and has no heads"
        raise ConfigError(
            f"model.kind '{asked}' does not fit model '{name}': {config.model_type} is {read}, which answers {answers};"
            " leave model.kind out, or choose another model"
        )
    return "seq2seq" if asked == "seq2seq" else "causal"


def auto_class(kind: Kind) -> Any:
    """transformers' class that loads a model of this kind."""
    return {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM, "encoder": AutoModel}[kind]


def without_pooler(model: Any) -> Any:
    """An encoder as heads read it: the layer that BERT puts on its first token would be computed for nothing."""
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        model.pooler = None
    return model


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """The base model, in evaluation mode and frozen."""
    path, name = resolve(spec.name), spec.name
    config = model_config(name, spec.revision)
    if spec.attention == GROUPED and not is_plain(config):
        raise ConfigError(
            f"model.attention '{GROUPED}' is not known to be right for model '{name}' ({config.model_type}): leave it"
            " out, or use eager"
        )
    kind = kind_of(name, config, spec.kind)
    options = {"dtype": getattr(torch, spec.dtype), "revision": spec.revision, "attn_implementation": spec.attention}
    model = _explain(name, lambda: auto_class(kind).from_pretrained(path, **options))
    model.requires_grad_(False)
    if kind == "encoder":
        return cast(PreTrainedModel, without_pooler(model).eval())
    # Generation settings that come with a checkpoint (sampling, penalties, beams) must not leak into greedy scoring.
    own = model.generation_config.to_dict()
    model.generation_config = GenerationConfig(**{k: v for k, v in own.items() if k.endswith("_token_id")})
    return model.eval()


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end token (padding is masked by attention)."""
    tokenizer = _explain(name, lambda: AutoTokenizer.from_pretrained(resolve(name), revision=revision))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _explain(name: str, load: Any) -> Any:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for every load, most of them under a second, buries what matters
    try:
        return load()
    except DyadsError:  # says it already
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"model '{name}' could not be loaded: {reason} – give a hub id, a folder that"
            f" holds a transformers model, or one of: {', '.join(PREFIX + key for key in PACKAGED)}"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()

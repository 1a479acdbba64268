# SPDX-License-Identifier: Apache-2.0
"""Loading of base models: a hub id, a folder or a packaged model becomes a frozen transformers model."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
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

from dyads.errors import ConfigError, DyadsError, RunError, reason_of
from dyads.models.attention import GROUPED, supports_grouped
from dyads.models.packaged import PACKAGED, PREFIX, resolve
from dyads.models.processes import launched
from dyads.models.quantization import quantization_config
from dyads.reading import SETTINGS
from dyads.recipe.spec import ModelSpec

__all__ = [
    "Kind",
    "auto_class",
    "kind_of",
    "load_model",
    "load_tokenizer",
    "model_config",
    "without_pooler",
    "without_progress_bars",
]

Kind = Literal["causal", "seq2seq", "encoder"]

_MOST_LAYERS = 10_000
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Python files of a model are not run. Without the argument transformers prompts for it on the terminal."""


def model_config(name: str, revision: str | None = None) -> Any:
    """The transformers config of a model, without its weights."""
    path = resolve(name)
    file = os.path.join(path, "config.json")
    if os.path.isfile(file) and os.path.getsize(file) > SETTINGS:
        raise RunError(f"model '{name}' could not be loaded: its config.json has more than {SETTINGS:,} bytes")
    config = _load(name, lambda: AutoConfig.from_pretrained(path, revision=revision, **_NO_CODE))
    layers = [value for key, value in vars(config).items() if "layer" in key and isinstance(value, int)]
    if max(layers, default=0) > _MOST_LAYERS:
        raise RunError(f"model '{name}' could not be loaded: its config.json has more than {_MOST_LAYERS:,} layers")
    if "/" in str(getattr(config, "_attn_implementation", "")):
        raise RunError(
            f"model '{name}' could not be loaded: its config.json names an attention kernel, code that would be"
            " downloaded; remove attn_implementation there"
        )
    return config


def kind_of(name: str, config: Any, wanted: str = "auto") -> Kind:
    """Decoder, encoder-decoder or encoder, by the model's config; ConfigError if that does not fit `wanted`.

    A model is an encoder if transformers has a masked language model of its type and its config is not a decoder's.
    """
    if config.is_encoder_decoder:
        found: Kind = "seq2seq"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        found = "encoder"
    else:
        found = "causal"
    if wanted in ("auto", found):
        return found
    if "encoder" in (wanted, found):
        described = {"causal": "a decoder", "seq2seq": "an encoder-decoder", "encoder": "an encoder"}[found]
        answers = "by heads, not in text" if found == "encoder" else "in text, and has no heads"
        raise ConfigError(
            f"model.kind '{wanted}' does not fit model '{name}': {config.model_type} is {described}, which answers"
            f" {answers}; leave model.kind out, or choose another model"
        )
    return "seq2seq" if wanted == "seq2seq" else "causal"


def auto_class(kind: Kind) -> Any:
    """The auto class of transformers for models of this kind."""
    return {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM, "encoder": AutoModel}[kind]


def without_pooler(model: Any) -> Any:
    """The encoder without BERT's pooler, whose output the heads do not use."""
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        model.pooler = None
    return model


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """The base model, in evaluation mode and frozen."""
    path, name = resolve(spec.name), spec.name
    config = model_config(name, spec.revision)
    if spec.attention == GROUPED and not supports_grouped(config):
        raise ConfigError(
            f"model.attention '{GROUPED}' is not known to be right for model '{name}' ({config.model_type}): leave it"
            " out, or use eager"
        )
    kind = kind_of(name, config, spec.kind)
    options: dict[str, Any] = {
        "dtype": getattr(torch, spec.dtype),
        "revision": spec.revision,
        "attn_implementation": spec.attention,
    }
    if spec.quantization is not None:
        options["quantization_config"] = quantization_config(spec.quantization)
        options["device_map"] = {"": str(launched().device)}  # some formats are made on the device itself
    model = _load(name, lambda: auto_class(kind).from_pretrained(path, **options, **_NO_CODE))
    model.requires_grad_(False)
    if kind == "encoder":
        return cast(PreTrainedModel, without_pooler(model).eval())
    # The checkpoint's generation settings (sampling, penalties, beams) must not change how runs are scored, and no
    # training shows the first or last tokens that some checkpoints force (BART's).
    settings = model.generation_config.to_dict()
    ids = {key: settings.get(key) for key in _TOKEN_IDS}
    model.generation_config = _load(name, lambda: GenerationConfig(**ids))
    return model.eval()


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; without a padding token it pads with the end token, which the attention mask hides."""
    tokenizer = _load(name, lambda: AutoTokenizer.from_pretrained(resolve(name), revision=revision, **_NO_CODE))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(name: str, load: Any) -> Any:
    """The result of `load`, without progress bars; RunError with transformers' reason if it fails."""
    try:
        with without_progress_bars():
            return load()
    except DyadsError:
        raise
    except BaseException as error:  # whatever transformers makes of a folder with any content
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of the tokenizers in Rust
            raise
        reason = reason_of(error)
        if re.match(r"[.~/\\]|[A-Za-z]:", name) and not os.path.exists(name):
            reason = "there is no such folder"
        raise RunError(
            f"model '{name}' could not be loaded: {reason} – give a hub id, a folder with"
            f" a transformers model, or one of: {', '.join(PREFIX + key for key in PACKAGED)}"
        ) from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Within this context transformers shows no progress bars: most loads take less than a second."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

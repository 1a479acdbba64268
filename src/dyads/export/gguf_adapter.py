# SPDX-License-Identifier: Apache-2.0
"""GGUF adapters: a LoRA as the file that llama.cpp, Ollama and LM Studio load beside a base model in GGUF.

The file names the architecture and has `blk.3.attn_q.weight.lora_a` (r d) and `….lora_b` (o r) for every module, with
alpha = r. llama.cpp rotates neighbouring rows 2i and 2i + 1 of a head in some architectures where transformers rotates
rows i and i + d/2. The rows of their q and k are in another order in GGUF files, and so are those of lora_b.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dyads.errors import RunError
from dyads.export.verify import base_of
from dyads.models.load import model_config
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter

__all__ = ["ARCHITECTURES", "GGUF_ADAPTER", "GgufLayout", "gguf_layout", "interleave", "write_gguf"]

GGUF_ADAPTER = "adapter.gguf"

ARCHITECTURES = {
    "cohere": ("command-r", False),
    "cohere2": ("cohere2", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "gpt2": ("gpt2", False),
    "granite": ("granite", True),
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "olmo": ("olmo", True),
    "olmo2": ("olmo2", False),
    "phi": ("phi2", False),
    "phi3": ("phi3", False),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "seed_oss": ("seed_oss", False),
    "smollm3": ("smollm3", True),
    "stablelm": ("stablelm", False),
    "starcoder2": ("starcoder2", False),
}
"""By transformers' model_type: llama.cpp's architecture, and whether its rows of q and k are interleaved.

Those whose weights llama.cpp stores as they are otherwise; it splits or reorders weights of BLOOM, Falcon and GPT-NeoX.
"""


@dataclass(frozen=True)
class GgufLayout:
    """The tensors of llama.cpp that an adapter's modules are."""

    architecture: str
    names: dict[str, str]
    """The tensor of every module."""
    heads: dict[str, int]
    """The attention heads in every module whose rows are interleaved."""


def gguf_layout(adapter: SavedAdapter, run: RunFolder | None) -> GgufLayout:
    """The layout of an adapter's modules in a GGUF file; RunError where llama.cpp has no tensor for one of them."""
    if importlib.util.find_spec("gguf") is None:
        raise RunError("--gguf needs the package gguf, which is not installed: run `pip install gguf`")
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    if adapter.method == "lora":
        raise RunError(
            f"the adapter in '{adapter.path}' is PEFT's own LoRA: leave --gguf out, and convert that folder with"
            " llama.cpp's convert_lora_to_gguf.py"
        )
    base, task_type = base_of(adapter, run), adapter.config.task_type
    if base.kind != "causal" or task_type not in (None, "CAUSAL_LM"):
        given = {"seq2seq": "an encoder-decoder", "encoder": "an encoder"}.get(base.kind, f"used for {task_type}")
        raise RunError(f"--gguf is for decoders that generate text, and '{base.name}' is {given}; leave --gguf out")
    if adapter.others:
        others = ", ".join(sorted({key.removeprefix("base_model.model.") for key in adapter.others}))
        raise RunError(f"--gguf writes LoRAs, and the adapter has other weights too ({others}); leave --gguf out")
    config = model_config(base.name, base.revision)
    if config.model_type not in ARCHITECTURES:
        raise RunError(
            f"--gguf does not know where llama.cpp has the weights of the architecture '{config.model_type}'"
            f" ('{base.name}'); it knows {', '.join(ARCHITECTURES)}. Leave --gguf out, or write a checkpoint (--merge)"
            " for llama.cpp's convert_hf_to_gguf.py"
        )
    architecture, interleaved = ARCHITECTURES[config.model_type]
    number = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        raise RunError(
            f"the installed package gguf does not know llama.cpp's architecture '{architecture}': run"
            " `pip install -U gguf`, or leave --gguf out"
        )
    tensors = get_tensor_name_map(number, config.num_hidden_layers)
    names, heads = {}, {}
    for layer in adapter.layers:
        name = tensors.get_name(layer.module)
        if name is None or (name == "output" and config.tie_word_embeddings):
            raise RunError(
                f"--gguf cannot write the LoRA of '{layer.module}': llama.cpp has no such tensor of its own in the"
                f" architecture '{architecture}'; leave --gguf out"
            )
        names[layer.module] = f"{name}.weight"
        if interleaved and name.endswith((".attn_q", ".attn_k")):
            heads[layer.module] = _heads(config, name.endswith("q"), layer.module, layer.out_features)
    return GgufLayout(architecture, names, heads)


def _heads(config: Any, of_queries: bool, module: str, features: int | None) -> int:
    """The number of heads whose rows a module of q or k has; RunError where the config is another model's."""
    heads: int = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if not of_queries:
        heads = getattr(config, "num_key_value_heads", None) or heads
    if features != heads * size:
        raise RunError(
            f"the adapter's '{module}' has {features} outputs, and the base model's config {heads} heads of {size}: the"
            " adapter is of another model; mend base_model_name_or_path in its config, or leave --gguf out"
        )
    return heads


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads · 2 · d/2, …) in llama.cpp's order: row i + d/2 of every head behind row i."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def write_gguf(
    layout: GgufLayout, downs: Mapping[str, Tensor], ups: Mapping[str, Tensor], rank: int, path: Path, task: str | None
) -> None:
    """Write the factors (k d) and (o k) of every module, padded with zeros to a rank, in float32."""
    from gguf import GGUFType, GGUFWriter, Keys

    with closing(GGUFWriter(path, layout.architecture)) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))
        if task is not None:
            writer.add_string(Keys.Adapter.LORA_TASK_NAME, task)
        for module, down in downs.items():
            name, up, missing = layout.names[module], ups[module], rank - len(down)
            if module in layout.heads:
                up = interleave(up, layout.heads[module])
            writer.add_tensor(f"{name}.lora_a", F.pad(down.float(), (0, 0, 0, missing)).contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", F.pad(up.float(), (0, missing)).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()

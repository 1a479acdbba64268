# SPDX-License-Identifier: Apache-2.0
"""Model cards of exported folders: where the weights come from, and the commands that load and serve them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import PurePath
from typing import Any

import dyads
from dyads.export.gguf_adapter import GGUF_ADAPTER
from dyads.markdown import markdown_table
from dyads.models.heads import MODULE as HEADS
from dyads.models.packaged import hub_id
from dyads.runs.card import base_model, front_matter, prompts
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter
from dyads.runs.weights import WEIGHTS

__all__ = ["all_tasks_card", "lora_card", "merged_card", "serve_commands"]

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank takes (vLLM 0.11)."""

_HEADS_NOTE = (
    f"`{HEADS}.safetensors` has the heads of all tasks: `weight` and `bias` of one linear map on the pooled hidden"
    f" states. `{HEADS}.json` lists, task by task, the meaning of its rows."
)


def lora_card(
    adapter: SavedAdapter,
    config: Any,
    task: str | None,
    ranks: Mapping[str, int],
    *,
    trim: bool,
    heads: bool,
    gguf: bool,
    price: str | None,
) -> str:
    """The card of a LoRA; `price` is the section about what it loses, for one that only approximates the adapter."""
    low, high = min(ranks.values()), config.r
    rank = f"{high}" if low == high else f"{low} to {high}, " + ("each layer its own" if trim else "padded with zeros")
    of_task = "" if task is None else f" for task `{task}`"
    does = f"equals a `{adapter.method}` adapter of dyads{of_task}, up to rounding."
    if price is not None:
        does = f"approximates a `{adapter.method}` adapter of dyads{of_task}; the table below has what it loses."
    commands = [] if trim or heads else serve_commands(config, {task or "adapter": "."})
    commands += [("llama.cpp", _llama_server(config, ["."]))] if gguf else []
    return "\n".join(
        [
            front_matter(adapter.config.base_model_name_or_path, ["lora"]),
            f"# LoRA of a {adapter.method} adapter{of_task}",
            "",
            f"An ordinary LoRA that {does}",
            "PEFT loads it without dyads:",
            "",
            "```python",
            *_loading(config),
            "```",
            "",
            *_prompts(adapter, task),
            *_serving(commands),
            *([_HEADS_NOTE, ""] if heads else []),
            *([price, ""] if price is not None else []),
            *_facts(adapter, task, ("rank", rank)),
        ]
    )


def all_tasks_card(adapter: SavedAdapter, names: Mapping[str, str], rank: int, trim: bool, gguf: bool) -> str:
    """The card of a folder with a LoRA for every task; `names` has the folder of each."""
    config = adapter.config
    heads = any(f".{HEADS}." in key for key in adapter.others)
    commands = [] if trim or heads else serve_commands(config, {name: name for name in names.values()}, rank)
    commands += [("llama.cpp", _llama_server(config, list(names.values())))] if gguf else []
    return "\n".join(
        [
            front_matter(config.base_model_name_or_path, ["lora"]),
            f"# LoRAs of a {adapter.method} adapter, one for each of {len(names)} tasks",
            "",
            "Every folder is an ordinary LoRA that PEFT loads without dyads.",
            "",
            *_serving(commands),
            *markdown_table(("task", "folder"), [[task, f"`{name}`"] for task, name in names.items()], left=2),
            "",
            *_facts(adapter, None, ("rank", "each layer its own" if trim else f"{rank}, alpha {rank}")),
        ]
    )


def merged_card(adapter: SavedAdapter, task: str | None, dtype: str, heads: bool, price: str | None) -> str:
    """The card of a checkpoint that the adapter is merged into."""
    config = adapter.config
    of_task = "" if task is None else f" for task `{task}`"
    merged = f"{'an approximation of ' if price is not None else ''}a `{adapter.method}` adapter of dyads{of_task}"
    return "\n".join(
        [
            front_matter(config.base_model_name_or_path, ["merged"], library="transformers"),
            f"# {PurePath(config.base_model_name_or_path or 'A model').name} with a {adapter.method} adapter{of_task}",
            "",
            f"The base model with {merged} in its weights. transformers loads it without dyads and PEFT.",
            "",
            *_prompts(adapter, task),
            *([_HEADS_NOTE, ""] if heads else []),
            *([price, ""] if price is not None else []),
            *_facts(adapter, task, ("weights", dtype)),
        ]
    )


def _loading(config: Any) -> list[str]:
    """Lines of Python that load a LoRA."""
    auto = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
    auto_class = auto.get(config.task_type, "AutoModel")
    name = config.base_model_name_or_path or "the base model"
    return [
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f'base = {auto_class}.from_pretrained("{hub_id(name) or f"path/to/{PurePath(name).name}"}")',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    ]


def _prompts(adapter: SavedAdapter, task: str | None) -> list[str]:
    """The form of the prompts, where the adapter is that of a run."""
    run = RunFolder(adapter.path.parent)
    if not run.is_run or run.adapter != adapter.path:
        return []
    return prompts(run, run.task_names() if task is None else [task], exported=True)


def serve_commands(config: Any, folders: Mapping[str, str], rank: int | None = None) -> list[tuple[str, str]]:
    """(engine, shell command) that serve LoRAs by name, to be run in the folder that the paths start from.

    Empty for what the engines do not take: other models than decoders, and modules or tokens trained beside the LoRA. A
    base model that is a folder is named by a place to fill in.
    """
    rank = config.r if rank is None else rank
    if config.task_type != "CAUSAL_LM" or config.base_model_name_or_path is None:
        return []
    if config.trainable_token_indices or [module for module in config.modules_to_save or () if module != HEADS]:
        return []
    name = config.base_model_name_or_path
    base = hub_id(name) or f"path/to/{PurePath(name).name}"
    found = []
    if room := next((size for size in _VLLM_RANKS if size >= rank), None):
        modules = _modules(folders, ("name", "path"))
        command = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(room), "--lora-modules", *modules]
        found.append(("vLLM", shlex.join(command)))
    paths = _modules(folders, ("lora_name", "lora_path"))
    command = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora", "--lora-paths", *paths]
    found.append(("SGLang", shlex.join(command)))
    return found


def _llama_server(config: Any, folders: Sequence[str]) -> str:
    """The shell command that serves GGUF adapters in folders; of several, every request chooses one by its number."""
    base = PurePath(config.base_model_name_or_path or "model").name
    command = ["llama-server", "-m", f"path/to/{base}.gguf"]
    if len(folders) > 1:
        command.append("--lora-init-without-apply")
    for folder in folders:
        path = GGUF_ADAPTER if folder == "." else f"{folder}/{GGUF_ADAPTER}"
        command += ["--lora", f'"{path}"' if "," in path else path]  # a row of a CSV file
    return shlex.join(command)


def _modules(folders: Mapping[str, str], keys: tuple[str, str]) -> list[str]:
    """NAME=PATH of every LoRA; JSON where the name or the path has a character that separates."""
    return [
        json.dumps(dict(zip(keys, pair, strict=True))) if set("=,") & set("".join(pair)) else "=".join(pair)
        for pair in folders.items()
    ]


def _serving(commands: Sequence[tuple[str, str]]) -> list[str]:
    if not commands:
        return []
    names = " or ".join(engine for engine, _ in commands)
    return [f"{names} serves it; run the command in this folder:", "", "```sh", *[c for _, c in commands], "```", ""]


def _facts(adapter: SavedAdapter, task: str | None, *more: tuple[str, str]) -> list[str]:
    config, weights = adapter.config, adapter.path / WEIGHTS
    rows = [
        ["base model", base_model(config.base_model_name_or_path, config.revision)],
        ["adapter", str(adapter.path)],
        ["its weights, SHA-256", f"`{sha256(weights.read_bytes()).hexdigest()}`"],
        ["method", f"{adapter.method}, r = {config.r}"],
        *([["task", task]] if task is not None else []),
        *map(list, more),
        ["written by", f"`dyads export`, dyads {dyads.__version__}"],
    ]
    return [*markdown_table(("", ""), rows), ""]

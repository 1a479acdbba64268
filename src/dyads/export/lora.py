# SPDX-License-Identifier: Apache-2.0
"""Ordinary PEFT LoRAs that equal an adapter, for a task or for all, and load and serve without dyads.

    ΔW = scale · B G A = (scale · B U) (V A)        G = U V, (q p) = (q k)(k p)

Where the gates look at nothing, or at a task that is named, G is a constant matrix, and its factors give a LoRA of rank
k. Rows and columns of zeros are dropped: a prefix of ranks exports at exactly that rank. Otherwise k is the smaller
side of G, or its numerical rank where that is smaller (Poly, whose skills share r coefficients). The scale is
multiplied into lora_B, so that lora_alpha = r.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from dyads.errors import MergeError, RoutingError, RunError, did_you_mean, visible
from dyads.export.card import all_tasks_card, lora_card
from dyads.export.gguf_adapter import GGUF_ADAPTER, GgufLayout, write_gguf
from dyads.models.heads import MODULE as HEADS
from dyads.models.load import model_config
from dyads.models.packaged import hub_id
from dyads.recipe.file_names import file_name
from dyads.runs.adapter import sort_sets
from dyads.runs.card import CARD
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import MANIFEST, seal, unfinished, writing
from dyads.runs.saved import SavedAdapter
from dyads.runs.weights import WEIGHTS, read_weights

__all__ = [
    "Check",
    "Exported",
    "Lora",
    "check_exact",
    "check_task",
    "copy_lora",
    "export",
    "export_all",
    "factors",
    "lora_of",
    "refuse_full",
    "write_lora",
    "write_loras",
    "write_task_heads",
]

Check = Callable[[Mapping[str | None, Path]], object]
"""Called with the written folders, by task, before they get their final names; its error removes them."""


@dataclass(frozen=True)
class Exported:
    """A folder that an export wrote."""

    path: Path
    task: str | None
    rank: int
    """The rank that all modules have; with `trim`, the largest of `ranks`."""
    ranks: dict[str, int]
    """The rank that every module needs; without `trim` smaller ones are padded with zeros."""
    gguf: bool = False
    """Whether the folder has a GGUF adapter too."""

    @property
    def text(self) -> str:
        """One line for people."""
        low = min(self.ranks.values())
        ranks = f"rank {self.rank}" if low == self.rank else f"ranks {low} to {self.rank}"
        return f"{self.path}: {ranks} in {len(self.ranks)} modules" + (f", and {GGUF_ADAPTER}" if self.gguf else "")


@dataclass(frozen=True)
class Lora:
    """The factors of a LoRA by module, with the scale multiplied into `ups`."""

    downs: dict[str, Tensor]
    """(k d)"""
    ups: dict[str, Tensor]
    """(o k)"""

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every module, at least 1: PEFT has no LoRA of rank 0."""
        return {module: max(1, len(down)) for module, down in self.downs.items()}


def export(
    adapter: SavedAdapter,
    out: Path,
    *,
    task: str | None = None,
    trim: bool = False,
    gguf: GgufLayout | None = None,
    check: Check | None = None,
) -> Exported:
    """Write the adapter as a LoRA into an empty or new folder; `task` is needed where its gates look at the task.

    All layers get the largest rank that one of them needs, padded with zeros, as serving engines require; with `trim`
    each has its own (`rank_pattern`). With `gguf` (gguf_adapter.py) the folder has a GGUF adapter too. MergeError where
    the gates look at the layer's input; RoutingError where the task is missing or unknown, or given although the gates
    do not look at it; RunError where the folder is not empty, unless it holds this export already.
    """
    check_exact(adapter, task)
    refuse_full(out)
    with unfinished(out) as folder:
        written = write_lora(adapter, lora_of(adapter, task), folder, out, task=task, trim=trim, gguf=gguf)
        if check is not None:
            check({task: folder})
    return written


def export_all(
    adapter: SavedAdapter,
    out: Path,
    *,
    trim: bool = False,
    gguf: GgufLayout | None = None,
    check: Check | None = None,
) -> list[Exported]:
    """`export` for every task, each into a folder named after it (recipe/file_names.py), and one card for all.

    Without `trim` the LoRAs of all tasks have the same rank, so that a server can hold any of them in one buffer.
    """
    tasks = adapter.task_names
    check_exact(adapter, tasks[0] if tasks else "…")
    refuse_full(out)
    # The ranks first, and then one LoRA after the other: those of a thousand tasks need not fit into memory.
    rank = max(max(lora_of(adapter, task).ranks.values()) for task in tasks)
    return write_loras(
        adapter, out, list(tasks), lambda task: lora_of(adapter, task), rank, trim=trim, gguf=gguf, check=check
    )


def write_loras(
    adapter: SavedAdapter,
    out: Path,
    tasks: list[str],
    lora: Callable[[str], Lora],
    rank: int,
    *,
    trim: bool = False,
    gguf: GgufLayout | None = None,
    prices: Mapping[str, str] | None = None,
    check: Check | None = None,
) -> list[Exported]:
    """Write a LoRA of one rank for every task, each into a folder named after it, and one card for all.

    `prices` holds, by task, the section of the card about what the LoRA loses; it then only approximates the adapter.
    """
    with unfinished(out) as folder:
        names = [file_name(task) for task in tasks]
        written = [
            write_lora(
                adapter,
                lora(task),
                folder / name,
                out / name,
                task=task,
                trim=trim,
                rank=rank,
                gguf=gguf,
                price=(prices or {}).get(task),
            )
            for name, task in zip(names, tasks, strict=True)
        ]
        if check is not None:
            check({task: folder / name for name, task in zip(names, tasks, strict=True)})
        card = all_tasks_card(adapter, dict(zip(tasks, names, strict=True)), rank, trim, gguf is not None)
        (folder / CARD).write_text(visible(card, "\n"), encoding="utf-8")
    return written


@torch.no_grad()
def factors(G: Tensor) -> tuple[Tensor, Tensor]:
    """U (q k) and V (k p) with U V = G and the smallest k.

    Where every row, or every column, of G has at most one entry, the factors select rows or columns of G, without
    rounding and however small the entries are. Otherwise k is torch.linalg.matrix_rank(G), which counts singular values
    below the rounding of G's dtype as zero.
    """
    used = G.ne(0)
    rows, columns = used.any(1).nonzero().flatten(), used.any(0).nonzero().flatten()
    k = min(len(rows), len(columns))
    sparse = k == 0 or int(used.sum(1).max()) == 1 or int(used.sum(0).max()) == 1
    if not sparse and (rank := int(torch.linalg.matrix_rank(G))) < k:
        U, S, V = torch.linalg.svd(G.double(), full_matrices=False)
        return (U[:, :rank] * S[:rank]).to(G.dtype), V[:rank].to(G.dtype)
    if len(columns) == k:
        return G[:, columns], torch.eye(G.shape[1], dtype=G.dtype, device=G.device)[columns]
    return torch.eye(G.shape[0], dtype=G.dtype, device=G.device)[:, rows], G[rows]


def check_exact(adapter: SavedAdapter, task: str | None) -> None:
    """Refuse an adapter that no LoRA equals, or that is one, and a task that is missing, unknown or needless."""
    what = f"cannot export the adapter in '{adapter.path}' ({adapter.method})"
    if adapter.method == "lora":
        raise RunError(f"{what}: it is already an ordinary PEFT LoRA; use that folder itself")
    if adapter.looks_at & {"x", "h"}:
        raise MergeError(
            f"{what}: its gates look at the layer's input, so no ordinary LoRA equals it. Load it with dyads (`import"
            " dyads` before PEFT loads it), fit the nearest LoRA (`dyads export --approximate DATA.jsonl`), or train a"
            " method whose gates look at nothing or at the task."
        )
    check_task(adapter, task, what)


def check_task(adapter: SavedAdapter, task: str | None, what: str) -> None:
    """RoutingError for a task that is missing, unknown or needless; `what` begins its message."""
    names = adapter.task_names
    if not names and task is not None:
        raise RoutingError(
            f"{what} for a task: its gates do not look at it, and one LoRA is for all tasks; leave --task and"
            " --all-tasks out"
        )
    if names and task is None:
        raise RoutingError(
            f"{what} without a task: every task has its own update; name one (--task), or use --all-tasks"
            f"{did_you_mean('', names)}"
        )
    if names and task not in names:
        raise RoutingError(f"{what} for task '{task}', which it does not know{did_you_mean(str(task), names)}")


def lora_of(adapter: SavedAdapter, task: str | None) -> Lora:
    """The LoRA that equals the adapter, for a task where its gates look at it."""
    number = adapter.task_names.index(task) if task is not None else None
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    for layer in adapter.layers:
        assert layer.A is not None
        assert layer.B is not None
        G = layer.matrix(number)
        U, V = factors(G)
        downs[layer.module] = V @ layer.A.to(G.dtype)
        ups[layer.module] = adapter.config.for_layer(layer.module).scaling * (layer.B.to(G.dtype) @ U)
    return Lora(downs, ups)


def write_lora(
    adapter: SavedAdapter,
    lora: Lora,
    folder: Path,
    out: Path,
    *,
    task: str | None,
    trim: bool = False,
    rank: int | None = None,
    gguf: GgufLayout | None = None,
    price: str | None = None,
) -> Exported:
    """Write a LoRA of the adapter's layers into `folder`, whose final name is `out`; a `rank` above its own pads it.

    With `gguf` a GGUF adapter too, whose layers all have the largest rank, as its alpha is one number.
    """
    ranks = lora.ranks
    largest = max(ranks.values()) if rank is None or trim else rank
    # PEFT matches the keys as regular expressions at the end of a module's name; "^" makes them match whole names.
    smaller = {f"^{re.escape(module)}": r for module, r in ranks.items() if trim and r < largest}
    config = _config(adapter, tuple(ranks), largest, smaller)
    state = {key: value for key, value in adapter.others.items() if not _is_head(key)}
    for module, r in ranks.items():
        size = r if trim else largest
        missing = size - len(lora.downs[module])
        down = F.pad(lora.downs[module], (0, 0, 0, missing))
        state[f"base_model.model.{module}.lora_A.weight"] = down.contiguous()
        state[f"base_model.model.{module}.lora_B.weight"] = F.pad(lora.ups[module], (0, missing)).contiguous()
    folder.mkdir(exist_ok=True)
    with writing(out):
        _write_files(folder, config, state)
        heads = write_task_heads(adapter, folder)
        if gguf is not None:
            write_gguf(gguf, lora.downs, lora.ups, largest, folder / GGUF_ADAPTER, task)
        card = lora_card(adapter, config, task, ranks, trim=trim, heads=heads, gguf=gguf is not None, price=price)
        (folder / CARD).write_text(visible(card, "\n"), encoding="utf-8")
        seal(folder)
    return Exported(out, task, largest, ranks, gguf is not None)


def copy_lora(adapter: SavedAdapter, folder: Path) -> None:
    """Write the files of an adapter that is PEFT's own LoRA, without an encoder's heads, for PEFT to load."""
    config = copy.copy(adapter.config)
    config.modules_to_save = [m for m in config.modules_to_save or () if m != HEADS] or None
    state = {key: value for key, value in read_weights(adapter.path).items() if not _is_head(key)}
    folder.mkdir(exist_ok=True)
    _write_files(folder, config, state)


def write_task_heads(adapter: SavedAdapter, folder: Path) -> bool:
    """Write an encoder's heads, which are no module that PEFT could load, as files of their own; whether it has any."""
    heads = {key: value for key, value in adapter.others.items() if _is_head(key)}
    if heads:
        weights = {key.rpartition(".")[2]: value.contiguous() for key, value in heads.items()}
        save_file(weights, str(folder / f"{HEADS}.safetensors"))
        shutil.copyfile(adapter.path / "heads.json", folder / f"{HEADS}.json")
    return bool(heads)


def _is_head(key: str) -> bool:
    return f".{HEADS}." in key


def _write_files(folder: Path, config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    config.save_pretrained(str(folder))
    sort_sets(folder, config)
    save_file(dict(state), str(folder / WEIGHTS), metadata={"format": "pt"})


def _config(adapter: SavedAdapter, modules: tuple[str, ...], rank: int, smaller: dict[str, int]) -> LoraConfig:
    source = adapter.config
    # Copied from the adapter, so that PEFT adapts the same modules.
    which: dict[str, Any] = {
        name: getattr(source, name)
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    }
    if isinstance(source.target_modules, str):  # a regular expression, which serving engines do not read
        which = {"target_modules": set(modules)}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        **which,
        modules_to_save=[m for m in source.modules_to_save or () if m != HEADS] or None,
        trainable_token_indices=source.trainable_token_indices,
        ensure_weight_tying=source.ensure_weight_tying,
        task_type=source.task_type,
        auto_mapping=source.auto_mapping,
        base_model_name_or_path=_known_elsewhere(source.base_model_name_or_path),
        revision=source.revision,
        inference_mode=True,
        fan_in_fan_out=_stored_in_by_out(source.base_model_name_or_path, source.revision, modules),
    )


def _known_elsewhere(base: str | None) -> str | None:
    """The id on the hub of a base model, else its name or folder."""
    return (hub_id(base) or base) if base is not None else None


@lru_cache(maxsize=1)
def _stored_in_by_out(model: str | None, revision: str | None, modules: tuple[str, ...]) -> bool:
    """Whether the base model stores these weights as (in, out), as GPT-2's Conv1D does; loads no weights.

    False where the model cannot be built: PEFT then corrects it, with a warning, when it loads the LoRA.
    """
    if model is None:
        return False
    try:
        config = model_config(model, revision)
        with torch.device("meta"):
            skeleton = AutoModel.from_config(config, trust_remote_code=False)
    except Exception:  # whatever transformers makes of a config with any content
        return False
    transposed = [name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)]
    # Names in a model without a head lack the prefix ("transformer.") of those in a model with one.
    return any(module == name or module.endswith(f".{name}") for module in modules for name in transposed)


def refuse_full(out: Path, *, again: bool = True) -> None:
    """Refuse a file, and a folder that is not empty, but with `again` for one with exports, which may be these."""
    manifests = [path for pattern in (MANIFEST, f"*/{MANIFEST}") for path in out.glob(pattern) if path.is_file()]
    exported = bool(manifests) and not any(RunFolder(path.parent).is_run for path in manifests)
    if out.exists() and not (again and exported) and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"'{out}' is {'not empty' if out.is_dir() else 'a file'}; choose another --out")

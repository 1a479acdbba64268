# SPDX-License-Identifier: Apache-2.0
"""Export of an adapter as an ordinary PEFT LoRA, which loads and serves without dyads.

    ΔW = scale · B G A = (scale · B U) (V A)        G = U V, (q p) = (q k)(k p)

Where the gates look at nothing, or at a task that is named, G is a constant matrix, and its factors give a LoRA of rank
k. Rows and columns of zeros are dropped: a prefix of ranks exports at exactly that rank. Otherwise k is the smaller
side of G, or its numerical rank where that is smaller (Poly, whose skills share r coefficients). The scale is
multiplied into lora_B, so that lora_alpha = r.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

import dyads
from dyads.errors import MergeError, RoutingError, RunError, did_you_mean, visible
from dyads.models.heads import MODULE as HEADS
from dyads.models.load import model_config
from dyads.models.packaged import hub_id
from dyads.recipe.file_names import file_name
from dyads.runs.adapter import sort_sets
from dyads.runs.card import CARD, base_model, front_matter, table
from dyads.runs.manifest import MANIFEST, seal, unfinished, writing
from dyads.runs.saved import SavedAdapter
from dyads.runs.weights import WEIGHTS

__all__ = ["Exported", "export", "export_all", "factors"]


@dataclass(frozen=True)
class Exported:
    """A LoRA that `export` wrote."""

    path: Path
    task: str | None
    rank: int
    """The largest of `ranks`."""
    ranks: dict[str, int]
    """The rank that every module needs; without `trim` smaller ones are padded with zeros."""


def export(adapter: SavedAdapter, out: Path, *, task: str | None = None, trim: bool = False) -> Exported:
    """Write the adapter as a LoRA into an empty or new folder; `task` is needed where its gates look at the task.

    All layers get the largest rank that one of them needs, padded with zeros, as serving engines require; with `trim`
    each has its own (`rank_pattern`). MergeError where the gates look at the layer's input; RoutingError where the task
    is missing or unknown, or given although the gates do not look at it; RunError where the folder is not empty, unless
    it holds this export already.
    """
    _check(adapter, task)
    _refuse_full(out)
    with unfinished(out) as folder:
        return _write(adapter, folder, out, task, trim)


def export_all(adapter: SavedAdapter, out: Path, *, trim: bool = False) -> list[Exported]:
    """`export` for every task, each into a folder named after it (recipe/file_names.py)."""
    tasks = adapter.task_names
    _check(adapter, tasks[0] if tasks else "…")
    _refuse_full(out)
    with unfinished(out) as folder:
        names = [file_name(task) for task in tasks]
        return [_write(adapter, folder / n, out / n, t, trim) for n, t in zip(names, tasks, strict=True)]


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
        return G[:, columns], torch.eye(G.shape[1], dtype=G.dtype)[columns]
    return torch.eye(G.shape[0], dtype=G.dtype)[:, rows], G[rows]


def _check(adapter: SavedAdapter, task: str | None) -> None:
    what = f"cannot export the adapter in '{adapter.path}' ({adapter.method})"
    if adapter.method == "lora":
        raise RunError(f"{what}: it is already an ordinary PEFT LoRA; use that folder itself")
    if adapter.looks_at & {"x", "h"}:
        raise MergeError(
            f"{what}: its gates look at the layer's input, so no ordinary LoRA equals it. Load it with dyads (`import"
            " dyads` before PEFT loads it), or train a method whose gates look at nothing or at the task."
        )
    names = adapter.task_names
    if not names and task is not None:
        raise RoutingError(
            f"{what} for a task: its gates do not look at it, and one LoRA is for all tasks; leave --task out"
        )
    if names and task is None:
        raise RoutingError(
            f"{what} without a task: every task has its own update; name one (--task), or use --all-tasks"
            f"{did_you_mean('', names)}"
        )
    if names and task not in names:
        raise RoutingError(f"{what} for task '{task}', which it does not know{did_you_mean(str(task), names)}")


def _write(adapter: SavedAdapter, folder: Path, out: Path, task: str | None, trim: bool) -> Exported:
    number = adapter.task_names.index(task) if task is not None else None
    source = adapter.config
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    for layer in adapter.layers:
        assert layer.A is not None
        assert layer.B is not None
        G = layer.matrix(number)
        U, V = factors(G)
        downs[layer.module] = V @ layer.A.to(G.dtype)
        ups[layer.module] = source.for_layer(layer.module).scaling * (layer.B.to(G.dtype) @ U)
    ranks = {module: max(1, len(down)) for module, down in downs.items()}  # PEFT has no LoRA of rank 0
    largest = max(ranks.values())
    # PEFT matches the keys as regular expressions at the end of a module's name; "^" makes them match whole names.
    smaller = {f"^{re.escape(module)}": r for module, r in ranks.items() if trim and r < largest}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        # Copied from the adapter, so that PEFT adapts the same modules.
        target_modules=source.target_modules,
        exclude_modules=source.exclude_modules,
        layers_to_transform=source.layers_to_transform,
        layers_pattern=source.layers_pattern,
        modules_to_save=[m for m in source.modules_to_save or () if m != HEADS] or None,
        task_type=source.task_type,
        auto_mapping=source.auto_mapping,
        base_model_name_or_path=_known_elsewhere(source.base_model_name_or_path),
        revision=source.revision,
        inference_mode=True,
        fan_in_fan_out=_stored_in_by_out(source.base_model_name_or_path, source.revision, tuple(ranks)),
    )
    # An encoder's heads are no module of a base model, where PEFT could load them: they get files of their own.
    heads = {key: value for key, value in adapter.others.items() if f".{HEADS}." in key}
    state = {key: value for key, value in adapter.others.items() if key not in heads}
    for module, r in ranks.items():
        size = r if trim else largest
        missing = size - len(downs[module])
        down = F.pad(downs[module], (0, 0, 0, missing))
        state[f"base_model.model.{module}.lora_A.weight"] = down.contiguous()
        state[f"base_model.model.{module}.lora_B.weight"] = F.pad(ups[module], (0, missing)).contiguous()
    folder.mkdir(exist_ok=True)
    with writing(out):
        config.save_pretrained(str(folder))
        sort_sets(folder, config)
        save_file(state, str(folder / WEIGHTS), metadata={"format": "pt"})
        if heads:
            save_file(
                {key.rpartition(".")[2]: value.contiguous() for key, value in heads.items()},
                str(folder / f"{HEADS}.safetensors"),
            )
            shutil.copyfile(adapter.path / "heads.json", folder / f"{HEADS}.json")
        (folder / CARD).write_text(visible(_card(adapter, task, ranks, trim, bool(heads)), "\n"), "utf-8")
        seal(folder)
    return Exported(out, task, largest, ranks)


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


_HEADS_NOTE = (
    f"`{HEADS}.safetensors` has the heads of all tasks: `weight` and `bias` of one linear map on the pooled hidden"
    f" states. `{HEADS}.json` lists, task by task, the meaning of its rows."
)


def _known_elsewhere(base: str | None) -> str | None:
    """The id on the hub of a base model, else its name or folder."""
    return (hub_id(base) or base) if base is not None else None


def _card(adapter: SavedAdapter, task: str | None, ranks: dict[str, int], trim: bool, heads: bool) -> str:
    base, revision = adapter.config.base_model_name_or_path, adapter.config.revision
    low, high = min(ranks.values()), max(ranks.values())
    rank = f"{high}" if low == high else f"{low} to {high}, " + ("each layer its own" if trim else "padded with zeros")
    of_task = "" if task is None else f" for task `{task}`"
    weights = adapter.path / WEIGHTS
    rows = [
        ["base model", base_model(base, revision)],
        ["adapter", str(adapter.path)],
        ["its weights, SHA-256", f"`{sha256(weights.read_bytes()).hexdigest()}`"],
        ["method", f"{adapter.method}, r = {adapter.config.r}"],
        *([["task", task]] if task is not None else []),
        ["rank", rank],
        ["written by", f"`dyads export`, dyads {dyads.__version__}"],
    ]
    return "\n".join(
        [
            front_matter(base, ["lora"]),
            f"# LoRA of a {adapter.method} adapter{of_task}",
            "",
            f"An ordinary LoRA that equals a `{adapter.method}` adapter of dyads{of_task}, up to rounding.",
            "PEFT loads it without dyads:",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")',
            "```",
            "",
            *([_HEADS_NOTE, ""] if heads else []),
            *table(rows),
            "",
        ]
    )


def _refuse_full(out: Path) -> None:
    """Refuse a folder that holds something else than an export, which may be this one (`unfinished`)."""
    exported = out.is_dir() and any(path.is_file() for path in (*out.glob(MANIFEST), *out.glob(f"*/{MANIFEST}")))
    if out.exists() and not exported and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"'{out}' is {'not empty' if out.is_dir() else 'a file'}; choose another --out")

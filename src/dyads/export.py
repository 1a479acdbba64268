# SPDX-License-Identifier: Apache-2.0
"""How does an adapter become an ordinary PEFT LoRA, which needs no dyads to be loaded or served?

    ΔW = scale · Bᵀ G A = (scale · Bᵀ U) (V A)        G = U V, (q p) = (q k)(k p)

Where the gates look at nothing or at a task that is named, G is made of numbers, and the two factors are a LoRA of
rank k. Only what G uses is kept: for a prefix of ranks exactly those, otherwise the smaller side of G, or its rank
where that is smaller still (Poly, whose skills share r coefficients). The scale goes into lora_B, and lora_alpha = r.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

import dyads
from dyads.errors import DyadsError, MergeError, RoutingError, RunError, did_you_mean
from dyads.models.heads import MODULE as HEADS
from dyads.models.load import model_config
from dyads.runs.saved import SavedAdapter

__all__ = ["Exported", "export", "export_all", "factors"]


@dataclass(frozen=True)
class Exported:
    """A LoRA that was written."""

    path: Path
    task: str | None
    rank: int
    """The largest of its layers."""
    ranks: dict[str, int]
    """What every module needs; without `trim` smaller ones are filled up with zeros."""


def export(adapter: SavedAdapter, out: Path, *, task: str | None = None, trim: bool = False) -> Exported:
    """Write the adapter, for a task where its gates look at one, as a LoRA into an empty or new folder.

    All layers get the largest rank that one needs, filled up with zeros, as serving engines want it; with `trim` each
    has its own (`rank_pattern`). MergeError where the gates look at the layer's input, RoutingError where the task is
    missing, unknown or makes no difference, RunError where the folder is not empty.
    """
    _check(adapter, task)
    with _whole_or_not_at_all(out) as folder:
        return _write(adapter, folder, out, task, trim)


def export_all(adapter: SavedAdapter, out: Path, *, trim: bool = False) -> list[Exported]:
    """The same for every task, each into a folder of its name; characters that file systems refuse become %XX."""
    tasks = adapter.task_names
    _check(adapter, tasks[0] if tasks else "…")
    with _whole_or_not_at_all(out) as folder:
        names = [_folder_name(task) for task in tasks]
        return [_write(adapter, folder / n, out / n, t, trim) for n, t in zip(names, tasks, strict=True)]


@torch.no_grad()
def factors(G: Tensor) -> tuple[Tensor, Tensor]:
    """U (q k) and V (k p) with U V = G and k as small as it gets; by selection, without rounding, where that does it.

    Gates that leave one entry in every row, or column, make it a matter of selection, however small they are. Else the
    rank is counted as torch.linalg.matrix_rank does: what is below the rounding of G's own dtype is nothing.
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
        raise RunError(f"{what}: it is an ordinary PEFT LoRA already; take that folder as it is")
    if adapter.looks_at & {"x", "h"}:
        raise MergeError(
            f"{what}: its gates look at the layer's input, so no plain LoRA equals it. Use it with dyads (`import"
            " dyads` before PEFT loads it), or train a method whose gates look at nothing or at the task."
        )
    names = adapter.task_names
    if not names and task is not None:
        raise RoutingError(f"{what} for a task: its gates look at none, and one LoRA serves all tasks; leave it out")
    if names and task is None:
        raise RoutingError(
            f"{what} without a task, as every task has its own update: name one (--task), or take --all-tasks"
            f"{did_you_mean('', names)}"
        )
    if names and task not in names:
        raise RoutingError(f"{what} for task '{task}', which it does not know{did_you_mean(str(task), names)}")


def _write(adapter: SavedAdapter, folder: Path, out: Path, task: str | None, trim: bool) -> Exported:
    number = adapter.task_names.index(task) if task is not None else None
    scale, source = adapter.config.scaling, adapter.config
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    for layer in adapter.layers:
        assert layer.A is not None
        assert layer.B is not None
        G = layer.matrix(number)
        U, V = factors(G)
        downs[layer.module] = V @ layer.A.to(G.dtype)
        ups[layer.module] = scale * (layer.B.to(G.dtype) @ U)
    ranks = {module: max(1, len(down)) for module, down in downs.items()}  # PEFT knows no LoRA of rank 0
    largest = max(ranks.values())
    # PEFT takes the keys for regular expressions of a name's end, so these say that they are whole.
    smaller = {f"^{re.escape(module)}": r for module, r in ranks.items() if trim and r < largest}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        # As the adapter's own, so that PEFT finds the same modules by the same rules.
        target_modules=source.target_modules,
        exclude_modules=source.exclude_modules,
        layers_to_transform=source.layers_to_transform,
        layers_pattern=source.layers_pattern,
        modules_to_save=[m for m in source.modules_to_save or () if m != HEADS] or None,
        task_type=source.task_type,
        auto_mapping=source.auto_mapping,
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        inference_mode=True,
        fan_in_fan_out=_stored_in_by_out(source.base_model_name_or_path, source.revision, tuple(ranks)),
    )
    # The heads of an encoder are no module that PEFT could put into a bare model: they lie beside, with their meaning.
    heads = {key: value for key, value in adapter.others.items() if f".{HEADS}." in key}
    state = {key: value for key, value in adapter.others.items() if key not in heads}
    for module, r in ranks.items():
        size = r if trim else largest
        missing = size - len(downs[module])
        down = F.pad(downs[module], (0, 0, 0, missing))
        state[f"base_model.model.{module}.lora_A.weight"] = down.contiguous()
        state[f"base_model.model.{module}.lora_B.weight"] = F.pad(ups[module], (0, missing)).contiguous()
    folder.mkdir(exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(state, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    if heads:
        save_file(
            {key.rpartition(".")[2]: value.contiguous() for key, value in heads.items()},
            str(folder / f"{HEADS}.safetensors"),
        )
        shutil.copy(adapter.path / "heads.json", folder / f"{HEADS}.json")
    (folder / "README.md").write_text(_card(adapter, task, ranks, trim, bool(heads)), encoding="utf-8")
    return Exported(out, task, largest, ranks)


@lru_cache(maxsize=1)
def _stored_in_by_out(model: str | None, revision: str | None, modules: tuple[str, ...]) -> bool:
    """Whether the base model keeps these weights as (in, out), as GPT-2's Conv1D; looked up without its weights.

    Where the model cannot be asked, False: PEFT sets it right when it loads the LoRA, with a warning.
    """
    if model is None:
        return False
    try:
        config = model_config(model, revision)
        with torch.device("meta"):
            skeleton = AutoModel.from_config(config)
    except (DyadsError, ValueError, ImportError):
        return False
    turned = [name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)]
    # A bare model's names lack what a head's model puts before them ("transformer.").
    return any(module == name or module.endswith(f".{name}") for module in modules for name in turned)


_HEADS_NOTE = (
    f"`{HEADS}.safetensors` holds the heads of all tasks: `weight` and `bias` of one linear map on the pooled hidden"
    f" states. `{HEADS}.json` says, task by task, what the rows stand for."
)


def _card(adapter: SavedAdapter, task: str | None, ranks: dict[str, int], trim: bool, heads: bool) -> str:
    base = adapter.config.base_model_name_or_path
    low, high = min(ranks.values()), max(ranks.values())
    rank = (
        f"{high}" if low == high else f"{low} to {high}, " + ("each layer its own" if trim else "filled up with zeros")
    )
    of_task = "" if task is None else f" for task `{task}`"
    head = [
        "---",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "library_name: peft",
        "tags:",
        "- lora",
        "---",
    ]
    weights = adapter.path / "adapter_model.safetensors"
    return "\n".join(
        [
            *head,
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
            "| | |",
            "|---|---|",
            f"| base model | {base or 'not named by the adapter'} |",
            f"| adapter | {adapter.path} |",
            f"| its weights, SHA-256 | `{sha256(weights.read_bytes()).hexdigest()}` |",
            f"| method | {adapter.method}, r = {adapter.config.r} |",
            *([f"| task | {task.replace('|', chr(92) + '|')} |"] if task is not None else []),
            f"| rank | {rank} |",
            f"| written by | `dyads export`, dyads {dyads.__version__} |",
            "",
        ]
    )


def _folder_name(task: str) -> str:
    name = quote(task, safe=" ()+,;=@!~")
    return name if name.strip(". ") else name.replace(".", "%2E").replace(" ", "%20")


@contextmanager
def _whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all is written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"'{out}' is {'not empty' if out.is_dir() else 'a file'}; choose another --out")
    partial = out.absolute().parent / f".{out.name}-{uuid4().hex}"
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

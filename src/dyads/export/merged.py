# SPDX-License-Identifier: Apache-2.0
"""Merged checkpoints: the base model with an adapter in its weights, as transformers saves any model.

PEFT merges the LoRA that equals the adapter for the task. The sum is rounded once, to the dtype of the base model's
checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from dyads.errors import DyadsError, RunError, reason_of, visible
from dyads.export.card import merged_card
from dyads.export.lora import (
    Check,
    Lora,
    check_exact,
    check_task,
    copy_lora,
    lora_of,
    refuse_full,
    write_lora,
    write_task_heads,
)
from dyads.export.verify import base_of, load_checkpoint
from dyads.models.load import without_progress_bars
from dyads.recipe.file_names import file_name
from dyads.runs.card import CARD
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import remove, seal, unfinished, writing
from dyads.runs.saved import SavedAdapter
from dyads.tuner.model import refuse_tied

__all__ = ["Merged", "merge", "merge_all", "write_merged"]


@dataclass(frozen=True)
class Merged:
    """A checkpoint that `merge` wrote."""

    path: Path
    task: str | None
    dtype: str
    parameters: int

    @property
    def text(self) -> str:
        """One line for people."""
        return f"{self.path}: merged, {self.parameters:,} parameters in {self.dtype}"


def merge(
    adapter: SavedAdapter, run: RunFolder | None, out: Path, *, task: str | None = None, check: Check | None = None
) -> Merged:
    """Write the base model with the adapter merged for a task into an empty or new folder.

    `run` is the run of the adapter, None for one without. Refuses what `export` refuses, but for PEFT's own LoRA, which
    merges too.
    """
    lora = _lora(adapter, task)
    refuse_full(out)
    with unfinished(out) as folder:
        written = write_merged(adapter, run, lora, folder, out, task=task)
        if check is not None:
            check({task: folder})
    return written


def merge_all(adapter: SavedAdapter, run: RunFolder | None, out: Path, *, check: Check | None = None) -> list[Merged]:
    """`merge` for every task, each into a folder named after it."""
    tasks = adapter.task_names
    _lora(adapter, tasks[0] if tasks else "…")
    refuse_full(out)
    with unfinished(out) as folder:
        names = [file_name(task) for task in tasks]
        written = [
            write_merged(adapter, run, _lora(adapter, task), folder / name, out / name, task=task)
            for name, task in zip(names, tasks, strict=True)
        ]
        if check is not None:
            check({task: folder / name for name, task in zip(names, tasks, strict=True)})
    return written


def _lora(adapter: SavedAdapter, task: str | None) -> Lora | None:
    """The LoRA that equals the adapter for a task; None for PEFT's own LoRA, which is one."""
    if adapter.method == "lora":
        check_task(adapter, task, f"cannot merge the adapter in '{adapter.path}' (lora)")
        return None
    check_exact(adapter, task)
    return lora_of(adapter, task)


def write_merged(
    adapter: SavedAdapter,
    run: RunFolder | None,
    lora: Lora | None,
    folder: Path,
    out: Path,
    *,
    task: str | None,
    price: str | None = None,
) -> Merged:
    """Write the base model with a LoRA merged into `folder`, whose final name is `out`; None: the adapter is a LoRA."""
    base = base_of(adapter, run)
    folder.mkdir(exist_ok=True)
    plain = folder / ".lora"
    with writing(out):
        if lora is None:
            copy_lora(adapter, plain)
        else:
            write_lora(adapter, lora, plain, out, task=task)
    try:
        model = _merged(PeftModel.from_pretrained(load_checkpoint(base), str(plain)))
    except DyadsError:
        raise
    except Exception as error:  # whatever transformers and PEFT make of a folder with any content
        raise RunError(f"cannot merge the adapter in '{adapter.path}': {reason_of(error)}") from error
    with writing(out):
        remove(plain)
        dtype = str(model.dtype).removeprefix("torch.")
        with without_progress_bars():
            model.save_pretrained(str(folder))
        tokenizer = AutoTokenizer.from_pretrained(base.name, revision=base.revision, trust_remote_code=False)
        template = run.chat_template() if run is not None else None
        if template is not None:  # the one that the run was trained with, if not the model's own
            tokenizer.chat_template = template
        tokenizer.save_pretrained(str(folder))
        heads = write_task_heads(adapter, folder)
        card = merged_card(adapter, task, dtype, heads, price)
        (folder / CARD).write_text(visible(card, "\n"), encoding="utf-8")
        seal(folder)
    return Merged(out, task, dtype, model.num_parameters())


def _merged(model: PeftModel) -> PreTrainedModel:
    """The base model with its LoRA merged; ValueError for a tied weight, and for a sum that is not finite."""
    refuse_tied(model, {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")})
    # PEFT's safe_merge would round the update before it is added.
    merged: PreTrainedModel = model.merge_and_unload()
    for name, value in merged.named_parameters():
        if not torch.isfinite(value).all():
            raise ValueError(f"the merged weight of '{name.rpartition('.')[0]}' is not finite")
    return merged

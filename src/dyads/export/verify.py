# SPDX-License-Identifier: Apache-2.0
"""Verification of exported folders: reloaded by stock PEFT in a process that cannot import dyads.

The logits of real prompts, those that the run has predictions for, must be those of the adapter in this process. Both
processes read all weights as float32, so that nothing but the order of sums differs; a merged checkpoint in half
precision also differs by the rounding of its weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyads.errors import DyadsError, RunError, shortened
from dyads.export import stock_reload
from dyads.models.heads import attach_heads, read_heads
from dyads.models.load import kind_of, load_model, load_tokenizer, model_config, without_progress_bars
from dyads.models.packaged import resolve
from dyads.runs.adapter import load_adapter
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter

__all__ = [
    "Base",
    "Verification",
    "base_of",
    "compare",
    "float_model",
    "load_checkpoint",
    "model_logits",
    "plain_prompts",
    "prompts_for",
    "prompts_of",
    "unverifiable",
    "verify",
]

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_KINDS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}
_PROMPTS, _LONGEST, _LAST = 4, 256, 16
"""The number of prompts, the tokens read of each, and the last positions whose logits are compared."""
_ALL_PROMPTS = 64
"""Prompts for all folders together, but at least one for each: logits of a thousand tasks must fit into memory."""
_TOLERANCE = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""The largest difference of logits, by the dtype of the exported weights, as a share of the largest logit."""
_SENTENCES = (
    "The capital of France is",
    "Question: Is seven a prime number? Answer:",
    "Once upon a time there was a fox who lived by a river and",
    "def area(width, height):\n    return",
)
"""Prompts for an adapter without a run."""


@dataclass(frozen=True)
class Base:
    """The base model of an adapter."""

    name: str
    """A hub id or a folder."""
    revision: str | None
    auto: str
    """The auto class of transformers that loads it."""
    kind: str
    """Decoder (causal), encoder-decoder (seq2seq) or encoder."""


@dataclass(frozen=True)
class Verification:
    """The agreement of exported folders with the adapter."""

    prompts: int
    difference: float
    """The largest difference of two logits, as a share of the largest logit."""

    @property
    def text(self) -> str:
        """One line for people."""
        return (
            f"verified: PEFT reloads it without dyads; on {self.prompts} prompts logits agree to {self.difference:.1e}"
        )


def base_of(adapter: SavedAdapter, run: RunFolder | None) -> Base:
    """The base model of a run, or the one that an adapter's config names; RunError without one that can be read."""
    spec = run.recipe().model if run is not None else None
    name = adapter.config.base_model_name_or_path if spec is None else spec.name
    if name is None:
        raise RunError(f"the adapter in '{adapter.path}' names no base model (base_model_name_or_path)")
    revision = adapter.config.revision if spec is None else spec.revision
    config = model_config(name, revision)
    kind = kind_of(name, config, "auto" if spec is None else spec.kind)
    return Base(resolve(name), revision, _AUTO.get(adapter.config.task_type or _KINDS[kind], "AutoModel"), kind)


def load_checkpoint(base: Base, dtype: Any = "auto") -> Any:
    """The base model as transformers loads it, with its generation config; by default in its checkpoint's dtype."""
    auto = getattr(transformers, base.auto)
    with without_progress_bars():
        return auto.from_pretrained(base.name, revision=base.revision, dtype=dtype, trust_remote_code=False).eval()


def prompts_for(run: RunFolder | None, tasks: Collection[str | None]) -> dict[str | None, list[str]]:
    """Prompts by task, fewer of each where there are many tasks."""
    most = max(1, _ALL_PROMPTS // max(1, len(tasks)))
    return {task: prompts_of(run, task)[:most] for task in tasks}


def prompts_of(run: RunFolder | None, task: str | None) -> list[str]:
    """Prompts of a task, or of all tasks, that the run has predictions for; ordinary sentences without a scored run."""
    found: list[str] = []
    if run is not None and run.is_scored:
        names = [row["task"] for row in run.scores()["scores"] if row["headline"]]
        for name in [task] if task in names else names:
            found += [row["prompt"] for row in run.predictions(name)[:_PROMPTS]]
    share = max(1, len(found) // _PROMPTS)
    return found[::share][:_PROMPTS] or list(_SENTENCES)


def plain_prompts(base: Base, texts: Sequence[str]) -> list[Tensor]:
    """The token ids (1 t) of texts."""
    tokenizer = load_tokenizer(base.name, base.revision)
    return [torch.tensor([tokenizer(text)["input_ids"][:_LONGEST]]) for text in texts]


def float_model(adapter: SavedAdapter, run: RunFolder | None, base: Base) -> Any:
    """The base model with the adapter, all weights in float32, also where the run's base model was quantised."""
    if run is None:
        return PeftModel.from_pretrained(load_checkpoint(base, torch.float32), str(adapter.path)).eval()
    spec = run.recipe().model.model_copy(update={"dtype": "float32", "quantization": None})
    model = load_model(spec)
    if base.kind == "encoder":
        attach_heads(model, read_heads(run.heads), spec.pool)
    return load_adapter(model, run)


@torch.inference_mode()
def model_logits(model: Any, prompts: Sequence[Tensor], task: str | None) -> list[Tensor]:
    """The last logits of every prompt, or an encoder's hidden states; None: without a task."""
    given = {} if task is None else {"task": task}
    found = []
    for ids in prompts:
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder, **given)
        found.append(output[0][0, -_LAST:].float())
    return found


def _reloaded_logits(
    base: Base, cases: Sequence[tuple[Path, Sequence[Tensor]]], *, merged: bool
) -> Iterator[list[Tensor]]:
    """For every exported folder and its prompts the logits in a process that cannot import dyads; RunError if it fails.

    A folder holds a LoRA, or with `merged` a checkpoint.
    """
    with tempfile.TemporaryDirectory() as name:
        place, listed = Path(name), []
        for number, (folder, prompts) in enumerate(cases):
            inputs, logits = place / f"{number}.inputs", place / f"{number}.logits"
            save_file({str(i): ids.contiguous() for i, ids in enumerate(prompts)}, inputs)
            source = {"base": str(folder), "revision": None, "lora": None}
            if not merged:
                source = {"base": base.name, "revision": base.revision, "lora": str(folder)}
            files = {"inputs": str(inputs), "logits": str(logits), "last": _LAST}
            listed.append({"auto": base.auto, **source, **files})
        (place / "cases.json").write_text(json.dumps(listed), encoding="utf-8")
        command = [sys.executable, stock_reload.__file__, str(place / "cases.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise RunError(f"the export was written, but PEFT cannot load it without dyads: {shortened(reason)}")
        for number in range(len(cases)):  # one after the other, as they may be many
            found = load_file(place / f"{number}.logits")
            yield [found[str(i)] for i in range(len(found))]


def verify(
    folders: Mapping[str | None, Path],
    adapter: SavedAdapter,
    run: RunFolder | None,
    *,
    merged: bool = False,
) -> Verification:
    """Compare exported folders, by task, with the adapter; RunError where their logits differ.

    DyadsError where there is no base model to load.
    """
    base = base_of(adapter, run)
    prompts = {task: plain_prompts(base, texts) for task, texts in prompts_for(run, folders).items()}
    model = float_model(adapter, run, base)
    expected = {task: model_logits(model, prompts[task], task) for task in folders}
    del model  # before the other process loads the base model
    return compare(folders, prompts, expected, base, merged=merged)


def compare(
    folders: Mapping[str | None, Path],
    prompts: Mapping[str | None, Sequence[Tensor]],
    expected: Mapping[str | None, Sequence[Tensor]],
    base: Base,
    *,
    merged: bool = False,
) -> Verification:
    """Compare the logits of exported folders, by task, with those that are expected; RunError where they differ."""
    reloaded = _reloaded_logits(base, [(folder, prompts[task]) for task, folder in folders.items()], merged=merged)
    worst = 0.0
    for (task, folder), found in zip(folders.items(), reloaded, strict=True):
        dtype = str(model_config(str(folder)).dtype).removeprefix("torch.") if merged else "float32"
        allowed = _TOLERANCE.get(dtype, _TOLERANCE["bfloat16"])
        for ours, theirs in zip(expected[task], found, strict=True):
            difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30))
            if not difference <= allowed:  # also where it is NaN
                of_task = "" if task is None else f" of task '{task}'"
                raise RunError(
                    f"the export{of_task} is not the adapter: reloaded without dyads its logits differ by"
                    f" {difference:.1e} of the largest, and {allowed:.0e} is allowed; nothing was written (--no-verify"
                    " writes it anyway)"
                )
            worst = max(worst, difference)
    return Verification(sum(map(len, prompts.values())), worst)


def unverifiable(adapter: SavedAdapter, run: RunFolder | None) -> str | None:
    """Why an export cannot be verified: the base model is not named, or cannot be loaded; None where it can."""
    try:
        base = base_of(adapter, run)
        load_tokenizer(base.name, base.revision)
    except DyadsError as error:
        return str(error)
    return None

# SPDX-License-Identifier: Apache-2.0
"""Reader of an adapter's two files, its config and its weights, with limits, and without running code from them.

Weights are read from safetensors only, never from a pickle. A weight that is NaN or infinite is refused by its name.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from peft import PeftConfig
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import dyads.tuner  # noqa: F401  # registers the methods with PEFT
from dyads.errors import RunError, notice, shortened
from dyads.methods import DyadsConfig, methods
from dyads.methods.config import PEFT_TYPE_PREFIX
from dyads.reading import SETTINGS, parse_json, read_json

__all__ = ["CONFIG", "WEIGHTS", "method_of", "read_config", "read_weights", "refuse_not_finite", "refuse_other_sizes"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LARGEST_HEADER = 64 * 2**20
_MOST_TENSORS = 1_000_000
_LARGEST_NUMBER = 1_000_000
"""Of an adapter's config: PEFT builds an adapter of that size before it reads the weights."""
_CHECKED = (
    *("base_model_name_or_path", "revision", "task_type", "r", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
)
"""Fields of PEFT's LoraConfig whose types are checked; others also take values that their annotations lack."""
_PATTERNS = {"rank_pattern": dict[str, int] | None, "alpha_pattern": dict[str, float] | None}
"""The types of fields that PEFT's LoraConfig annotates as any dict."""


def read_config(folder: Path) -> Any:
    """The config of the adapter in a folder: one of dyads' methods, or PEFT's LoRA; RunError for anything else."""
    path = folder / CONFIG
    try:
        content = read_json(path, error=RunError, most=SETTINGS)
    except FileNotFoundError:
        raise RunError(f"'{folder}' has no {CONFIG}") from None
    if not isinstance(content, dict) or not isinstance(content.get("peft_type"), str):
        raise RunError(f"the adapter in '{folder}' is truncated or no adapter: {CONFIG} has no peft_type")
    known = {f"{PEFT_TYPE_PREFIX}{method.key.upper()}" for method in methods()} | {"LORA"}
    if content["peft_type"] not in known:
        raise RunError(
            f"the adapter in '{folder}' is of PEFT's type {shortened(content['peft_type'], 60)}, which this version of"
            " dyads cannot read: it reads its own methods (`dyads methods`) and PEFT's LoRA"
        )
    if content.get("megatron_config") is not None:
        raise RunError(f"the adapter in '{folder}' needs Megatron, which dyads does not support (megatron_config)")
    ranks = content.get("rank_pattern")
    numbers = {**content, **(ranks if isinstance(ranks, dict) else {})}
    for key, value in numbers.items():
        if isinstance(value, int | float) and not -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER:
            raise RunError(
                f"{path}: '{shortened(key, 60)}': numbers up to {_LARGEST_NUMBER:,} are read, got"
                f" {shortened(value, 60)}"
            )
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever a config's constructor makes of values of any type
        raise RunError(
            f"the adapter in '{folder}' is truncated or no adapter: {CONFIG}: {shortened(str(error))}"
        ) from error
    _check_types(type(config), content, path)
    for warning in caught:
        notice(f"{path}: {shortened(str(warning.message))}")
    return config


def _check_types(config: type[Any], content: dict[str, Any], path: Path) -> None:
    """RunError for the first option whose value is not of its field's type; PEFT takes any."""
    hints = {**get_type_hints(config), **_PATTERNS}
    checked = [f.name for f in dataclasses.fields(config)] if issubclass(config, DyadsConfig) else _CHECKED
    key = ""
    try:
        for key in content.keys() & set(checked):
            TypeAdapter(hints[key]).validate_python(content[key])
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].lower()
        raise RunError(f"{path}: '{key}': {reason}, got {shortened(content[key], 60)}") from None


def method_of(config: Any) -> str:
    """The method of an adapter's config, as recipes name it."""
    return config.key if isinstance(config, DyadsConfig) else "lora"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the adapter in a folder, by PEFT's keys; RunError if the file is damaged or one is not finite."""
    path = folder / WEIGHTS
    _check_header(path)
    try:
        weights = load_file(str(path))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunError(f"the adapter in '{folder}' is truncated or no adapter: {shortened(str(error))}") from error
    refuse_not_finite(weights, f"the adapter in '{folder}'")
    return weights


def refuse_other_sizes(config: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """RunError where the config describes other numbers of directions than the weights have.

    PEFT would build the adapter at the config's size before it compares them.
    """
    rows = {key: len(value) for key, value in weights.items() if ".lora_A." in key and value.ndim == 2}
    ranks = (config.r, *(getattr(config, "rank_pattern", None) or {}).values())
    largest = max(rows.values(), default=0)
    reason = f"r is {max(ranks)}, and lora_A has at most {largest} rows" if rows and max(ranks) > largest else ""
    name = next(iter(rows), None)
    if name is not None and isinstance(config, DyadsConfig) and not reason:
        A, B = weights[name], weights.get(name.replace(".lora_A.", ".lora_B."))
        with torch.device("meta"):
            core = config.core(A.shape[1] * config.feature_blocks)
        if B is not None and B.ndim == 2 and (len(A), B.shape[1]) != (core.p, core.q):
            reason = f"A and B have {len(A)} and {B.shape[1]} directions, the method {core.p} and {core.q}"
        elif sum(p.numel() for p in core.parameters()) > sum(value.numel() for value in weights.values()):
            reason = "its gates have more parameters than all weights together"
    if reason:
        raise RunError(
            f"the weights of the adapter in '{folder}' do not fit its {CONFIG} ({reason}): one of the two files belongs"
            " to another adapter"
        )


def _check_header(path: Path) -> None:
    """RunError if the header of a safetensors file is larger than any of an adapter, or no JSON object."""
    what = f"the adapter in '{path.parent}' is truncated or no adapter: {path.name}"
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _LARGEST_HEADER:
                raise RunError(f"{what} has a header of {size:,} bytes; at most {_LARGEST_HEADER:,} are read")
            text = file.read(size).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{what} cannot be read: {shortened(str(error))}") from error
    header = parse_json(text, f"{what}, header", error=RunError)
    if not isinstance(header, dict) or len(header) > _MOST_TENSORS:
        raise RunError(f"{what} has no header of at most {_MOST_TENSORS:,} tensors")


def refuse_not_finite(weights: Mapping[str, Tensor], what: str) -> None:
    """RunError that names the first weight with a NaN or an infinite number."""
    for name, value in weights.items():
        if (value.is_floating_point() or value.is_complex()) and not bool(value.float().isfinite().all()):
            raise RunError(
                f"{what} has NaN or infinite numbers in '{shortened(name)}': its training diverged, or the file is"
                " damaged; train it again, with a lower train.learning_rate"
            )

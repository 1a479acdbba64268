# SPDX-License-Identifier: Apache-2.0
"""Saved adapter: its config and weights as one object per layer, read without loading the base model.

The file holds A, B and the core of every adapted layer, and the shapes of A and B are those of the base model's layer.
A core built from the config with these weights computes the gates of a task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyads.errors import RunError, shortened
from dyads.methods import Core, DyadsConfig
from dyads.runs.adapter import check_adapter, check_files
from dyads.runs.folder import RunFolder
from dyads.runs.weights import CONFIG, WEIGHTS, method_of, read_config, read_weights, refuse_other_sizes
from dyads.tuner.model import current_names

__all__ = ["SavedAdapter", "SavedLayer", "sort_key"]

_PEFT_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_[A-Za-z_]+)(\.(?P<inner>.+))?")


@dataclass(frozen=True)
class SavedLayer:
    """An adapted layer. A layer of PEFT's LoRA has no core, and one that is not linear neither features nor A and B."""

    module: str
    """The layer's path in the base model."""
    in_features: int | None
    out_features: int | None
    parameters: int
    A: Tensor | None = None
    """Inner directions (p d)."""
    B: Tensor | None = None
    """Outer directions (o q)."""
    core: Core | None = None

    def matrix(self, task: int | None) -> Tensor:
        """G (q p) for a task's id, or for gates that depend on nothing (`Core.matrix_of`)."""
        assert self.A is not None
        assert self.core is not None
        return self.core.matrix_of(self.A, torch.tensor([task]) if "task" in self.core.looks_at else None)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter of one of dyads' methods, or of PEFT's LoRA, as read from its folder."""

    path: Path
    config: Any
    method: str
    layers: tuple[SavedLayer, ...]
    """Sorted by path, with layer numbers compared as numbers."""
    others: dict[str, Tensor]
    """The weights outside the adapted layers, by PEFT's keys: heads and other modules_to_save."""

    @classmethod
    def read(cls, path: str | Path) -> SavedAdapter:
        """The adapter in a run's folder, or in a folder of PEFT's format."""
        folder = _adapter_folder(Path(path))
        config, state = read_config(folder), current_names(read_weights(folder))
        refuse_other_sizes(config, state, folder)
        parts: dict[str, dict[str, dict[str, Tensor]]] = {}
        others: dict[str, Tensor] = {}
        for key, value in state.items():
            match = _PART.fullmatch(key)
            if match is None:
                others[key] = value
            else:
                module = match["module"].removeprefix(_PEFT_PREFIX)
                parts.setdefault(module, {}).setdefault(match["part"], {})[match["inner"] or ""] = value
        if not parts:
            raise RunError(f"'{folder / WEIGHTS}' holds no adapted layer; train the adapter again")
        modules = sorted(parts, key=sort_key)
        if isinstance(config, DyadsConfig):
            layers = tuple(_layers(folder, config, {name: parts[name] for name in modules}))
        else:
            layers = tuple(_lora_layer(name, parts[name]) for name in modules)
        return cls(folder, config, method_of(config), layers, others)

    @property
    def looks_at(self) -> frozenset[str]:
        """What the gates of the layers depend on, from {"x", "h", "task"}."""
        return frozenset[str]().union(*(layer.core.looks_at for layer in self.layers if layer.core is not None))

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks of the gates, in the order of their ids; empty if the gates do not depend on the task."""
        return (getattr(self.config, "task_names", None) or ()) if "task" in self.looks_at else ()

    @property
    def parameters(self) -> int:
        """The number of trained parameters, with routers, gates, embeddings and heads."""
        return sum(layer.parameters for layer in self.layers) + sum(value.numel() for value in self.others.values())


def _adapter_folder(path: Path) -> Path:
    """The folder of the adapter's files; RunError if there is none."""
    run = RunFolder(path)
    folder = run.adapter if run.is_run else path
    if run.is_run and not run.recipe().method.trains:
        raise RunError(f"'{path}' is a run of {run.recipe().method.name}, which trains nothing: it has no adapter")
    if run.is_run:
        check_adapter(run)
    if not (folder / CONFIG).is_file():
        if not path.is_dir():
            raise RunError(f"there is no folder '{path}'; give the folder of a run or of an adapter")
        inside = [p.name for p in sorted(path.iterdir()) if RunFolder(p).is_run or (p / CONFIG).is_file()]
        shown = ", ".join(inside[:5]) + (", …" if len(inside) > 5 else "")
        raise RunError(
            f"'{path}' holds neither a run (config.yaml) nor an adapter ({CONFIG})"
            + (f"; in it there are: {shown}" if inside else "; `dyads train` makes the one with the other in it")
        )
    if not (folder / WEIGHTS).is_file():
        raise RunError(f"'{folder}' has no {WEIGHTS}; adapters are read from safetensors only")
    check_files(folder)
    return folder


def _layers(folder: Path, config: DyadsConfig, parts: dict[str, dict[str, dict[str, Tensor]]]) -> Iterator[SavedLayer]:
    # Where a core cuts a layer's features into blocks, A is stored at the width of one block.
    blocks = config.feature_blocks
    cores: dict[str, Core] = {}
    states = {name: part.get("lora_core", {}) for name, part in parts.items()}
    name = ""
    try:
        for name, part in parts.items():
            if part.keys() - {"lora_core"} != {"lora_A", "lora_B"}:
                raise ValueError(f"it has {', '.join(sorted(part))}")
            for side in ("lora_A", "lora_B"):
                if part[side].keys() != {"weight"} or part[side]["weight"].ndim != 2:
                    raise ValueError(f"{side} is no matrix")
                if not part[side]["weight"].is_floating_point():
                    raise ValueError(f"{side} has numbers of type {part[side]['weight'].dtype}")
            cores[name] = config.for_layer(name).core(part["lora_A"]["weight"].shape[1] * blocks).eval()
        # Parameters that layers share are saved with one of them only, which has all its keys.
        config.share(
            {n: cores[n] for n in sorted(cores, key=lambda n: states[n].keys() != cores[n].state_dict().keys())}
        )
        for name, core in cores.items():
            A, B = parts[name]["lora_A"]["weight"], parts[name]["lora_B"]["weight"]
            core.load_state_dict(states[name], assign=True)
            p, q = len(A), B.shape[1]
            if (p, q, blocks) != (core.p, core.q, core.feature_blocks):
                raise ValueError(f"A and B have {p} and {q} directions, the method {core.p} and {core.q}")
            trained = A.numel() + B.numel() + sum(p.numel() for p in core.parameters())
            A, B = core.block_diagonal(A), core.block_diagonal(B.t()).t()
            yield SavedLayer(name, A.shape[1], B.shape[0], trained, A, B, core)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = shortened(" ".join(str(error).split()))
        raise RunError(
            f"the weights of '{shortened(name)}' in '{folder}' do not fit its {CONFIG} ({reason}): one of the two files"
            " belongs to another adapter"
        ) from error


def _lora_layer(name: str, parts: dict[str, dict[str, Tensor]]) -> SavedLayer:
    trained = sum(value.numel() for part in parts.values() for value in part.values())
    A, B = parts.get("lora_A", {}).get("weight"), parts.get("lora_B", {}).get("weight")
    if A is None or B is None or A.ndim != 2 or B.ndim != 2:
        return SavedLayer(name, None, None, trained)
    return SavedLayer(name, A.shape[1], B.shape[0], trained, A, B)


def sort_key(path: str) -> list[tuple[int, str]]:
    """Key that sorts modules by path, with layer numbers compared as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]

# SPDX-License-Identifier: Apache-2.0
"""Inspection of a saved adapter without inputs: config, sizes, modules, and the ranks that tasks use.

Where the gates look at the task alone, the method is a matrix G (q p) for every task and layer. A task *uses* an outer
direction where its row of G is not zero; the number of directions that it uses is its rank in that layer. For MoRE this
is the rank that its gate chose, or, with its soft selector, which gives no gate 0, the expected rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from peft import PeftConfig
from torch import Tensor

from dyads.runs.saved import SavedAdapter

__all__ = ["Agreement", "Inspection", "Module", "inspect", "kinds_of"]


@dataclass(frozen=True)
class Module:
    """An adapted module of the base model."""

    name: str
    kind: str
    """The parts of its name that distinguish it from other modules of a layer, such as q_proj."""
    place: str
    """The numbers in its name that differ between modules, such as that of its layer."""
    in_features: int | None
    out_features: int | None
    parameters: int
    rank: int | None
    """The number of outer directions, which bounds `ranks`; None for PEFT's own LoRA."""
    ranks: tuple[float, ...]
    """The rank of every task, in the order of the tasks; empty where tasks do not choose ranks."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of two tasks' choices of ranks."""

    tasks: tuple[str, str]
    same: float
    """Share of the modules in which both use the same directions, from 0 to 1."""
    apart: float
    """Mean |difference| of their ranks."""


@dataclass(frozen=True)
class Inspection:
    """The contents of an adapter."""

    path: str
    method: str
    base_model: str | None
    config: dict[str, Any]
    """Options that differ from the method's defaults, and r."""
    parameters: int
    looks_at: tuple[str, ...]
    """What the gates depend on: x (the layer's input), h (A x), task."""
    tasks: tuple[str, ...]
    """The tasks that the gates distinguish, in the order of their ids."""
    modules: tuple[Module, ...]
    agreement: tuple[Agreement, ...]
    """For every pair of tasks, where tasks choose ranks."""
    notes: tuple[str, ...]

    @property
    def chooses(self) -> bool:
        """Whether tasks choose ranks."""
        return bool(self.modules[0].ranks)

    def of_kind(self, kind: str | None) -> list[Module]:
        """The modules of a kind; all modules for None."""
        return [module for module in self.modules if kind in (None, module.kind)]

    def used(self, task: int) -> float:
        """The share of all ranks that a task uses, from 0 to 1."""
        return sum(m.ranks[task] for m in self.modules) / sum(m.rank or 0 for m in self.modules)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of modules, in the order of the first of each."""
        return tuple(dict.fromkeys(module.kind for module in self.modules))


def inspect(adapter: SavedAdapter) -> Inspection:
    """Read an adapter."""
    names = adapter.task_names
    used: list[list[Tensor]] = []  # by layer and task: a mask of outer directions
    ranks: list[tuple[float, ...]] = [()] * len(adapter.layers)
    if adapter.looks_at == {"task"}:
        used = [[layer.matrix(t).ne(0).any(1) for t in range(len(names))] for layer in adapter.layers]
        if all(hasattr(layer.core, "ranks") for layer in adapter.layers):
            ranks = [tuple(layer.core.ranks().tolist()) for layer in adapter.layers]  # type: ignore[union-attr,operator]
        elif all(bool(mask.all()) for masks in used for mask in masks):
            used = []
        else:
            ranks = [tuple(int(mask.sum()) for mask in masks) for masks in used]
    kinds, places = kinds_of([layer.module for layer in adapter.layers])
    modules = tuple(
        Module(
            layer.module,
            kind,
            place,
            layer.in_features,
            layer.out_features,
            layer.parameters,
            None if layer.core is None else layer.core.q,
            ranks[i],
        )
        for i, (layer, kind, place) in enumerate(zip(adapter.layers, kinds, places, strict=True))
    )
    agreement = []
    for (i, one), (j, other) in combinations(enumerate(names), 2) if used else ():
        alike = [bool((masks[i] == masks[j]).all()) for masks in used]
        same = sum(a and round(r[i]) == round(r[j]) for a, r in zip(alike, ranks, strict=True)) / len(used)
        apart = sum(abs(m.ranks[i] - m.ranks[j]) for m in modules) / len(modules)
        agreement.append(Agreement((one, other), same, apart))
    return Inspection(
        str(adapter.path),
        adapter.method,
        adapter.config.base_model_name_or_path,
        _config(adapter.config),
        adapter.parameters,
        tuple(sorted(adapter.looks_at)),
        names,
        modules,
        tuple(agreement),
        tuple(_notes(adapter, bool(used), agreement)),
    )


def _notes(adapter: SavedAdapter, chooses: bool, agreement: list[Agreement]) -> list[str]:
    notes = []
    if adapter.method == "lora":
        notes.append("no gates: PEFT's own LoRA is the same update for every input")
    elif adapter.looks_at & {"x", "h"}:
        seen = " and ".join([*(["the task"] if "task" in adapter.looks_at else []), "the layer's input"])
        notes.append(
            f"the gates look at {seen}: the experts and ranks in use differ from token to token and cannot be read"
            " without inputs; config, sizes and modules can"
        )
    elif adapter.looks_at:
        if not chooses:
            notes.append("every task weights all directions by its own gates and chooses no ranks")
        notes.append("the gates look at the task alone: `dyads export --task NAME` writes a task as an ordinary LoRA")
    else:
        notes.append("the gates look at nothing: `dyads export` writes the adapter as an ordinary LoRA")
    if getattr(adapter.config, "selector", "") == "soft":
        notes.append("soft gates give no rank weight 0: the ranks shown are expected ranks")
    if agreement and all(pair.same == 1 for pair in agreement):
        notes.append("all tasks choose the same ranks in all modules")
    if adapter.others:
        trained = sum(value.numel() for value in adapter.others.values())
        notes.append(f"{trained:,} of the parameters belong to whole modules saved beside the adapter")
    return notes


def _config(config: Any) -> dict[str, Any]:
    """Options that differ from the config's defaults, without PEFT's own fields (base model, versions, …); and r."""
    about_peft = {f.name for f in dataclasses.fields(PeftConfig)} | {"tasks"}
    shown: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        printable = isinstance(value, (bool, int, float, str, list, tuple, set, dict))
        if f.name == "r" or (f.name not in about_peft and printable and value != default):
            shown[f.name] = sorted(value, key=str) if isinstance(value, set) else value
    return shown


def kinds_of(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The kind and the place of each module: the words and the numbers in its name that not all modules share.

    >>> kinds_of(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.mlp.c_proj"])
    (['attn.c_proj', 'mlp.c_proj', 'mlp.c_proj'], ['0', '0', '1'])
    """
    paths = [name.split(".") for name in names]
    words = [[part for part in path if not part.isdecimal()] for path in paths]
    shared = set.intersection(*map(set, words))
    own = [[part for part in path[:-1] if part not in shared] + path[-1:] for path in words]
    all_own = {tuple(path) for path in own}

    def shortest(path: list[str]) -> str:
        tails = [path[i:] for i in range(len(path) - 1, -1, -1)]
        alone = (t for t in tails if sum(list(other[-len(t) :]) == t for other in all_own) == 1)
        return ".".join(next(alone, path))

    numbers = [[part for part in path if part.isdecimal()] for path in paths]
    if len({len(n) for n in numbers}) == 1:
        differ = [i for i in range(len(numbers[0])) if len({n[i] for n in numbers}) > 1]
        numbers = [[n[i] for i in differ] for n in numbers]
    return [shortest(path) for path in own], [".".join(n) for n in numbers]

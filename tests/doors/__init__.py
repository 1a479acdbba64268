# SPDX-License-Identifier: Apache-2.0
"""Doors: ways into dyads from other libraries, each tried with every method; docs/compatibility.md is their table.

A door is one function. It is given a `Case`, does what a user would write, and asserts that the result is right. It
returns nothing where that works, `refused(reason)` where it saw the refusal that a user sees, and `absent(reason)`
where the method has nothing of the kind:

    @door("PEFT", "save_pretrained, PeftModel.from_pretrained")
    def saved(case: Case) -> Cell | None:
        ...

A new door is a new function in a file `of_<library>.py` of this folder. `PYTHONPATH=src:tests python -m doors` writes
the page; test_doors.py compares the page with what the doors do.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dyads.methods import DyadsConfig, methods
from tiny import TARGETS, TASKS, Variant, batch, task_of, tiny_model

__all__ = ["COLUMNS", "Case", "Cell", "Door", "absent", "door", "doors", "refused", "refuses"]

COLUMNS = {
    **{key: Variant(key) for key in sorted(m.key for m in methods())},
    "mode, 1 expert": Variant("mode", (("num_experts", 1),)),
}
"""Every method, and MoDE with one expert, whose gates look at nothing."""


@dataclass(frozen=True)
class Cell:
    """What became of a method at a door."""

    mark: str = "✓"
    reason: str = ""


def refused(reason: str) -> Cell:
    """A refusal that the door has seen, with its reason."""
    return Cell("no", reason)


def absent(reason: str) -> Cell:
    """Not applicable."""
    return Cell("–", reason)


@dataclass
class Case:
    """A method at a door, and an empty folder."""

    variant: Variant
    folder: Path
    _count: int = field(default=0, repr=False)

    @property
    def looks_at(self) -> frozenset[str]:
        return self.variant.looks_at

    @property
    def merges(self) -> bool:
        """Whether the adapter is one weight update, for a task at most."""
        return not self.looks_at & {"x", "h"}

    def config(self, **options: Any) -> DyadsConfig:
        usual = {"target_modules": TARGETS["llama"], "init_weights": False, "lora_dropout": 0.0}
        return self.variant.config(**usual | options)

    def model(self, base: nn.Module | None = None, **options: Any) -> PeftModel:
        """A tiny Llama, or the base given, with an adapter; another one at every call."""
        self._count += 1
        torch.manual_seed(self._count)
        return get_peft_model(base or tiny_model("llama"), self.config(**options)).eval()

    @property
    def inputs(self) -> dict[str, Tensor]:
        return batch("llama")

    @property
    def task(self) -> dict[str, Any]:
        """`task=` for three rows."""
        return task_of(self.variant.config(), *TASKS)

    @property
    def one_task(self) -> dict[str, Any]:
        """`task=` for all rows."""
        return task_of(self.variant.config(), "cola")

    @property
    def merge_task(self) -> dict[str, Any]:
        return {"task": "cola"} if "task" in self.looks_at else {}

    def logits(self, model: nn.Module, **task: Any) -> Tensor:
        with torch.no_grad():
            return model(**self.inputs, **(task or self.task)).logits

    def bare(self, model: nn.Module) -> Tensor:
        """The logits without a task."""
        with torch.no_grad():
            return model(**self.inputs).logits


Check = Callable[[Case], Cell | None]


@dataclass(frozen=True)
class Door:
    """A way in, as a line of the page."""

    section: str
    name: str
    check: Check

    def cell(self, column: str, folder: Path) -> Cell:
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        try:
            return self.check(Case(COLUMNS[column], folder)) or Cell()
        except BaseException as error:
            print(f"{self.section}, {self.name}: {column}")
            raise error


_DOORS: list[Door] = []


def door(section: str, name: str) -> Callable[[Check], Check]:
    """Add a function to the doors."""

    def enter(check: Check) -> Check:
        _DOORS.append(Door(section, name, check))
        return check

    return enter


def doors() -> list[Door]:
    """The doors of all files, section by section."""
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("of_"):
            importlib.import_module(f"{__name__}.{module.name}")
    sections = list(dict.fromkeys(d.section for d in _DOORS))
    return sorted(_DOORS, key=lambda d: sections.index(d.section))


@contextmanager
def refuses(error: type[Exception], message: str) -> Iterator[None]:
    """Asserts the refusal that a user sees."""
    with pytest.raises(error, match=message):
        yield

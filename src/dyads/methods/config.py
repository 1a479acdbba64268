# SPDX-License-Identifier: Apache-2.0
"""Config of a method: the fields that all methods share, as a PEFT config."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dyads.errors import ConfigError
from dyads.methods.core import Core
from dyads.methods.lora_words import LoraWords

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PEFT_TYPE_PREFIX", "DyadsConfig", "PeftTypeName", "TaskConditioned"]

# Prefixed, so that a method that PEFT itself ships one day cannot collide with one of ours.
PEFT_TYPE_PREFIX = "DYADS_"
_LARGEST = 2**20
"""Of sizes. Larger ones would take minutes to refuse."""


class PeftTypeName(str):
    """Name of a PEFT method outside of PEFT's enum, with what PEFT and transformers read from a member of the enum."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # as an enum member; PEFT's model status cuts off the part before the dot


_IMPORT_NOTE = """
## Loading

This adapter's method comes with [dyads](https://pypi.org/project/dyads/). Import it before PEFT loads the adapter:

```python
import dyads  # registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


@dataclasses.dataclass
class DyadsConfig(LoraWords):
    """The fields every method has. Names are PEFT's wherever PEFT has one."""

    r: int = dataclasses.field(default=8, metadata={"help": "The rank."})
    lora_alpha: float | None = dataclasses.field(
        default=16, metadata={"help": "The update is scaled by lora_alpha / r. None: the scale is 1."}
    )
    lora_dropout: float = dataclasses.field(
        default=0.0, metadata={"help": "Dropout on the input of A, in [0, 1). Routers read the input without dropout."}
    )
    target_modules: list[str] | str | None = dataclasses.field(
        default=None, metadata={"help": "Names, a regular expression, or 'all-linear'. Not set: as PEFT's LoRA."}
    )
    exclude_modules: list[str] | str | None = dataclasses.field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave alone."}
    )
    layers_to_transform: list[int] | int | None = dataclasses.field(
        default=None, metadata={"help": "Indices of the layers to adapt. Not set: all."}
    )
    layers_pattern: list[str] | str | None = dataclasses.field(
        default=None, metadata={"help": "Name of the list of layers, where it is not a common one."}
    )
    modules_to_save: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Modules to train and save whole beside the adapter, for instance a head."}
    )
    init_weights: bool = dataclasses.field(
        default=True, metadata={"help": "True: B = 0, a fresh adapter changes nothing. False: random B, for tests."}
    )
    init_std: float | None = dataclasses.field(
        default=None, metadata={"help": "Standard deviation of A at the start. Not set: Kaiming-uniform, as LoRA."}
    )

    PAPER: ClassVar[dict[str, Any]] = {}
    """Fields whose value in the method's paper, or in its public code, is not our default."""
    key: ClassVar[str]
    """The method's name in recipes and on the command line; set by `register`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = PeftTypeName(PEFT_TYPE_PREFIX + self.key.upper())
        self.require_whole("r")
        for name in ("lora_alpha", "lora_dropout", "init_std"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            self.require(number or (value is None and name != "lora_dropout"), name, "must be a number")
        self.require(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", "must be above 0 (None is scale 1)")
        self.require(0 <= self.lora_dropout < 1, "lora_dropout", "must be at least 0 and below 1")
        self.check_words()
        self.require(
            self.init_std is None or self.init_std > 0, "init_std", "must be above 0 (leave it out for LoRA's)"
        )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                self.require(
                    getattr(self, name) is None,
                    name,
                    "cannot be used with a regular expression in target_modules: put the layers into the expression,"
                    " or give target_modules as a list of names",
                )
        self.require(
            not self.layers_pattern or self.layers_to_transform is not None,
            "layers_pattern",
            "only says where layers_to_transform counts: set layers_to_transform too",
        )

    def require(self, holds: bool, name: str, reason: str) -> None:
        """Refuse the value of a field, with the value and the reason."""
        if not holds:
            raise ConfigError(f"{self.key}: {name} {reason}, got {getattr(self, name)!r}")

    def require_whole(self, name: str) -> None:
        """Refuse a field that is no whole number of at least 1, or is larger than that of any adapter."""
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        self.require(whole, name, "must be a whole number, 1 or more")
        self.require(value <= _LARGEST, name, f"must be at most {_LARGEST:,}")

    @classmethod
    def paper(cls, **options: Any) -> Self:
        """A config with the settings of the method's paper for every field that is not given; `preset: paper` in a
        recipe. Scale 1 (lora_alpha = r) where the paper names none."""
        return cls(**cls.paper_options(options) | options)

    @classmethod
    def paper_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The fields that `paper` sets beside these options."""
        return {"lora_alpha": options.get("r", cls.r), **cls.PAPER}

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or 1 where lora_alpha is None (the MoDE paper has no scale)."""
        return self.scaling_for(self.r)

    def scaling_for(self, rank: int) -> float:
        """The scale of an update that passes through so many ranks."""
        if self.lora_alpha is None:
            return 1.0
        return self.lora_alpha / (rank**0.5 if self.use_rslora else rank)

    @property
    def feature_blocks(self) -> int:
        """Blocks that a layer's features are cut into (`Core.feature_blocks`)."""
        return 1

    @property
    def task_names(self) -> tuple[str, ...] | None:
        """Names of the tasks the gates know, in the order of their ids; None for a method that ignores the task."""
        return None

    @classmethod
    def learns_tasks(cls, options: dict[str, Any]) -> bool:
        """Whether `build_config` fills in the recipe's task names for these options, where `tasks` is missing."""
        return {"tasks", "num_tasks"} <= cls.__dataclass_fields__.keys()

    def core(self, d: int) -> Core:
        """The method's core for a layer with d input features."""
        raise NotImplementedError

    def sharing_groups(self, modules: Sequence[str]) -> list[str]:
        """A group for each of the adapter's modules, given by their paths: layers of one group share what their method
        shares (`Core.share_with`). By default all layers are one group."""
        return [""] * len(modules)

    def share(self, cores: Mapping[str, Core]) -> None:
        """Let the layers of each group share what their method shares, given their cores by the modules' paths.

        The first core of a group keeps the parameters.
        """
        first: dict[str, Core] = {}
        for core, group in zip(cores.values(), self.sharing_groups(tuple(cores)), strict=True):
            core.share_with(first.setdefault(group, core))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; the model card also says that dyads must be imported first."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if not card.is_file():
            # PEFT saves an adapter that is not called 'default' one folder below its card.
            card = Path(save_directory).parent / "README.md"
            if not card.is_file() or "library_name: peft" not in card.read_text(encoding="utf-8"):
                return
        if "import dyads" not in card.read_text(encoding="utf-8"):
            with card.open("a", encoding="utf-8") as f:
                f.write(_IMPORT_NOTE)


@dataclasses.dataclass
class TaskConditioned(DyadsConfig):
    """The fields of a method whose gates look at the task. Name the tasks, or say how many there are."""

    tasks: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Names of the tasks, in the order of their ids."}
    )
    num_tasks: int | None = dataclasses.field(
        default=None, metadata={"help": "Number of tasks, where they have no names."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(not isinstance(self.tasks, str), "tasks", "must be a list of names, such as ['rte', 'cola']")
        if self.tasks is not None:
            self.tasks = [str(name) for name in self.tasks]
            twice = sorted(name for name, times in Counter(self.tasks).items() if times > 1)
            self.require(not twice, "tasks", f"must differ from one another ({', '.join(twice)} is there twice)")
            self.require(len(self.tasks) > 0, "tasks", "must name at least one task")
            if self.num_tasks not in (None, len(self.tasks)):
                raise ConfigError(
                    f"{self.key}: num_tasks = {self.num_tasks}, but tasks names {len(self.tasks)}: leave num_tasks out"
                )
            self.num_tasks = len(self.tasks)
        if self.num_tasks is not None:
            self.require_whole("num_tasks")
        elif self.needs_tasks:
            raise ConfigError(
                f"{self.key}: tasks are missing: give their names (tasks=['rte', …]) or their number (num_tasks=8)"
            )

    @property
    def needs_tasks(self) -> bool:
        """Whether the gates depend on the task. Where they do not, `tasks` is accepted and has no effect."""
        return True

    def with_tasks(self, names: Sequence[str]) -> Self:
        """A copy of this config for these tasks; the first of them are its present ones."""
        larger = copy.copy(self)
        larger.tasks, larger.num_tasks = list(names), len(names)
        return larger

    @property
    def task_names(self) -> tuple[str, ...] | None:
        if not self.needs_tasks:
            return None
        return tuple(self.tasks) if self.tasks else tuple(str(i) for i in range(self.num_tasks or 0))

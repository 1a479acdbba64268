# SPDX-License-Identifier: Apache-2.0
"""What do all methods share? The fields of a config, the contract of a core, and the registry they enter.

A method is a config (a `PeftConfig`), a core (its `route` and `mix` inside one adapted layer) and a line in the
registry. Everything else – layers, merging, saving, tasks in a batch, tests – a method gets by existing.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn

from dyads.errors import ConfigError, did_you_mean
from dyads.ops.kernel import Choice

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Core",
    "DyadsConfig",
    "Method",
    "TaskConditioned",
    "build_config",
    "method",
    "method_names",
    "methods",
    "register",
]

# Peft types are prefixed, so that a method that PEFT itself ships one day cannot collide with an adapter of ours.
PEFT_TYPE_PREFIX = "DYADS_"

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
class DyadsConfig(PeftConfig):  # type: ignore[misc]
    """The fields every method has. Names are PEFT's wherever PEFT has one."""

    r: int = dataclasses.field(default=8, metadata={"help": "The rank."})
    lora_alpha: float | None = dataclasses.field(
        default=None, metadata={"help": "The update is scaled by lora_alpha / r. Not set: the scale is 1."}
    )
    lora_dropout: float = dataclasses.field(
        default=0.0, metadata={"help": "Dropout on the input of A, in [0, 1). Routers always see the whole input."}
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

    key: ClassVar[str]
    """The method's name in recipes and on the command line; set by `register`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = PEFT_TYPE_PREFIX + self.key.upper()
        self.require_whole("r")
        for name in ("lora_alpha", "lora_dropout", "init_std"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            self.require(number or (value is None and name != "lora_dropout"), name, "must be a number")
        self.require(
            self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", "must be above 0 (leave it out for scale 1)"
        )
        self.require(0 <= self.lora_dropout < 1, "lora_dropout", "must be at least 0 and below 1")
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
        """Refuse a field that is no whole number of at least 1."""
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        self.require(whole, name, "must be a whole number, 1 or more")

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or 1 where lora_alpha is not set (the MoDE paper has no scale)."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.r

    @property
    def task_names(self) -> tuple[str, ...] | None:
        """Names of the tasks the gates know, in the order of their ids; None for a method that looks at no task."""
        return None

    @classmethod
    def learns_tasks(cls, options: dict[str, Any]) -> bool:
        """Whether a recipe with these options wants the names of its tasks, where it gives none itself."""
        return {"tasks", "num_tasks"} <= cls.__dataclass_fields__.keys()

    def core(self, d: int) -> Core:
        """The method's core for a layer with d input features."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; also tells the reader of the model card to import dyads first."""
        super().save_pretrained(save_directory, **kwargs)
        for card in (Path(save_directory) / "README.md", Path(save_directory).parent / "README.md"):
            # PEFT puts an adapter that is not called 'default' one folder below its card.
            if card.is_file() and "import dyads" not in card.read_text(encoding="utf-8"):
                with card.open("a", encoding="utf-8") as f:
                    f.write(_IMPORT_NOTE)
                break


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
            twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
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
                f"{self.key}: tell it the tasks, either by name (tasks=['rte', …]) or by number (num_tasks=8)"
            )

    @property
    def needs_tasks(self) -> bool:
        """Whether the gates look at the task. Where they do not, tasks may be told all the same, and change nothing."""
        return True

    def with_tasks(self, names: Sequence[str]) -> Self:
        """This config for these tasks, the first of which are those that it has."""
        larger = copy.copy(self)
        larger.tasks, larger.num_tasks = list(names), len(names)
        return larger

    @property
    def task_names(self) -> tuple[str, ...] | None:
        if not self.needs_tasks:
            return None
        return tuple(self.tasks) if self.tasks else tuple(str(i) for i in range(self.num_tasks or 0))


class Core(nn.Module):
    """A method inside one adapted layer.

    p and q count the inner directions (rows of A) and the outer directions (rows of B). `looks_at` names what the
    gates depend on, from {"x", "h", "task"}: merging is exact where it is empty, or is {"task"} and a task is named.
    """

    p: int
    q: int
    gate_axes: ClassVar[int] = 1
    """How many trailing axes of the gates belong to one token."""
    looks_at: frozenset[str] = frozenset()
    splits: bool = True
    """Whether route(h, x, task) = select(h, W x, of_task(task)), three parts that the fused operator can take apart."""
    heads: int = 1
    """Parts that the layer's features are cut into. With more than one, every inner direction reads one part and every
    outer direction writes one: stored are A (p d/heads) and B (q o/heads), and `whole` puts them in their places."""
    has_auxiliary_loss: bool = False
    """Whether `auxiliary_loss` has something to say."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if {"route", "score"} & vars(cls).keys():
            cls.splits = bool(vars(cls).get("splits", False))  # who writes one of them must say that it still splits
        if {"select", "mix"} & vars(cls).keys() and not {"gradients", "keeps_gates"} & vars(cls).keys():
            cls.keeps_gates = False  # the gradients it inherits are another method's
        for ancestor in cls.__mro__:
            if "choice" in vars(ancestor):
                break
            if cls.parts_of_choice & vars(ancestor).keys():
                cls.choice = Core.choice  # type: ignore[method-assign]  # what it inherits is another method's too
                break

    def router_rows(self) -> Tensor | None:
        """Weights W (s d) of scores that are linear in x; None where the gates do not look at x."""
        return None

    def of_task(self, task: Tensor | None) -> Tensor | None:
        """What the gates need from the tasks (b), with b as its first axis; None where they look at none."""
        return None

    def select(self, h: Tensor, scores: Tensor | None, of_task: Tensor | None) -> Tensor:
        """Gates from h = A x (… p), scores W x (… s), and what the tasks gave.

        Every token's gates are its own: which axes come before the last is up to the caller, who may give rows.
        It may run once more in backward, so it must give the same again and touch nothing that it reads: a gate with
        noise writes `route` instead. Gradients reach what it is given and nothing else, so it reads no parameter.
        """
        raise NotImplementedError

    keeps_gates: bool = False
    """Whether `gradients` is there: it is given the gates, and backward need not select again."""

    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of u = mix(h; select(h, scores)) for h and the scores, where the gates depend on scores alone."""
        raise NotImplementedError

    parts_of_choice: ClassVar[frozenset[str]] = frozenset({"select", "mix", "gradients"})
    """Methods that `choice` stands for: who writes one of them anew does not inherit it."""

    def choice(self) -> Choice | None:
        """What select, mix and gradients do, where they are those of softmax gates that are computed in one pass."""
        return None

    def route(self, h: Tensor, x: Tensor, task: Tensor | None) -> Tensor:
        """Gates from h (… p), the layer's input x (… d) and the tasks (b): select(h, score(h, x), of_task(task))."""
        return self.select(h, self.score(h, x), self.of_task(task))

    def score(self, h: Tensor, x: Tensor) -> Tensor | None:
        """Scores of the tokens (… s): W x with W = router_rows(); None where there are none.

        A core whose scores are not linear in x writes its own, and then does not split.
        """
        W = self.router_rows()
        return None if W is None else F.linear(x, W.to(x.dtype))

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the starting values of routers, gates and embeddings; nothing where a core has none."""

    def share_with(self, first: Core) -> None:
        """Take what all layers of an adapter share from its first layer's core; nothing where they share nothing.

        What is shared stays a part of the first core alone, so that it is counted, saved and trained once.
        """

    def auxiliary_loss(self, x: Tensor, task: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """What this layer adds to the training loss, weighted already: a scalar, or None for nothing.

        x is the layer's input (b t d), or (n d) where the layer sees rows; task (b) holds ids of the samples, one for
        every row of the first axis of x; mask (b t) is nonzero for real tokens. A mask of another size than x has
        tokens does not apply, and all count.
        """
        return None

    compares_samples: bool = False
    """Whether embeddings of the tasks are trained to be like their samples, so that `similarity` says something."""

    def similarity(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """How much the samples of this layer's input are like every task: (b T), from -1 to 1. x and mask are those of
        `auxiliary_loss`."""
        raise NotImplementedError

    def stored(self, features: int) -> int:
        """Width of the rows that are stored for a layer with so many features in, or out."""
        if features % self.heads:
            raise ConfigError(
                f"a layer with {features} features cannot be cut into {self.heads} equal parts: choose another number"
                " of parts, or leave the layer out with exclude_modules"
            )
        return features // self.heads

    def whole(self, rows: Tensor) -> Tensor:
        """A or B as the operator takes it, (p w·heads), from what is stored, (p w): the first p/heads rows go to the
        first part of the features, and so on, with zeros elsewhere. With one head nothing changes.
        """
        if self.heads == 1:
            return rows
        parts = rows.view(self.heads, -1, rows.shape[-1])
        placed: Tensor = torch.block_diag(*parts.unbind(0))  # type: ignore[no-untyped-call]
        return placed

    def matrix(self, g: Tensor) -> Tensor:
        """G = mix(I; g), shape (… q p): the method written out for these gates, since mix is linear in h."""
        identity = torch.eye(self.p, dtype=g.dtype, device=g.device)
        rows = self.mix(identity, g.unsqueeze(-1 - self.gate_axes))
        return rows.transpose(-1, -2)


@dataclasses.dataclass(frozen=True)
class Method:
    """A line of the registry."""

    key: str
    config: type[Any]
    summary: str


_METHODS: dict[str, Method] = {}


def register(key: str, summary: str) -> Callable[[type[Any]], type[Any]]:
    """Enter a config into the registry under the name that recipes and the command line use."""

    def enter(config: type[Any]) -> type[Any]:
        config.key = key
        _METHODS[key] = Method(key, config, summary)
        return config

    return enter


def methods() -> tuple[Method, ...]:
    """The methods of the family, by the names of their files: a new method is one new file in this folder."""
    package = sys.modules[__name__.rpartition(".")[0]]
    for module in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")
    return tuple(_METHODS.values())


def method(key: str) -> Method:
    """The method of that name; ConfigError with the nearest names when there is none."""
    known = {entry.key: entry for entry in methods()}
    if key not in known:
        raise ConfigError(f"unknown method '{key}'{did_you_mean(key, method_names())}")
    return known[key]


def method_names() -> tuple[str, ...]:
    """Every method that can be trained: the family's, and PEFT's own LoRA as the baseline."""
    return ("lora", *(entry.key for entry in methods()))


def build_config(name: str, options: dict[str, Any], task_names: tuple[str, ...] | None = None) -> PeftConfig:
    """The PEFT config of a method from the options of a recipe.

    Unknown options are refused with the nearest names. A task-conditioned method that is not told `tasks` learns the
    given task names, unless `num_tasks` says that there are more or fewer.
    """
    if name == "lora":
        from peft import LoraConfig

        config_class: type[Any] = LoraConfig
        options = dict(options)
    else:
        config_class = method(name).config
        options = dict(options)
    fields = {f.name for f in dataclasses.fields(config_class) if f.init and f.name != "peft_type"}
    for key in options:
        if key not in fields:
            near = did_you_mean(key, sorted(fields - set(PeftConfig.__dataclass_fields__)))
            raise ConfigError(f"unknown option '{key}' of method '{name}'{near}")
    if name == "lora" and "lora_alpha" not in options:
        # PEFT's default alpha is 8 whatever the rank; ours is scale 1, and a fair baseline has the same.
        options["lora_alpha"] = options.get("r", 8)
    if (
        task_names
        and name != "lora"
        and "tasks" not in options
        and options.get("num_tasks", len(task_names)) == len(task_names)
        and config_class.learns_tasks(options)
    ):
        options["tasks"] = list(task_names)
    try:
        return config_class(**options)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method '{name}': {error}") from error

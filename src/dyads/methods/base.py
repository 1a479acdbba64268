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


class PeftTypeName(str):
    """Name of a PEFT method outside of PEFT's enum, with the `.value` that PEFT and transformers read from a type."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


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
        self.peft_type: Any = PeftTypeName(PEFT_TYPE_PREFIX + self.key.upper())
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
    """A method inside one adapted layer: its routers, gates and embeddings, and the two functions of the formula.

        delta(x) = scale · B mix(h; g)        g = route(h, x, task)        h = A x

    A core needs `p`, `q`, `looks_at`, `route` and `mix`; autograd then trains every parameter that they read. Faster
    paths are opt-in: a core whose gates are `select(h, R x, task_scores(task))` writes these three parts instead of
    `route` and declares `linear_scores`; one with the derivative of its gates declares `closed_form`. Both declarations
    are verified when an adapter is created (`check_declarations`).
    """

    p: int
    """Inner directions: rows of A."""
    q: int
    """Outer directions: columns of B."""
    looks_at: frozenset[str] = frozenset()
    """What the gates depend on, from {"x", "h", "task"}. Merging is exact where it is empty, or is {"task"} and a task
    is named."""
    gate_axes: ClassVar[int] = 1
    """How many trailing axes of the gates belong to one token."""
    linear_scores: bool = False
    """Whether route(h, x, task) = select(h, scores, task_scores(task)) with scores = R x, R h or None."""
    router_input: str = "x"
    """What R = router_weight() multiplies: "x" or "h"."""
    closed_form: bool = False
    """Whether `gradients` is the derivative of mix(h; select(scores + task_scores))."""
    feature_blocks: int = 1
    """Blocks that the layer's features are cut into. With more than one, every inner direction reads one block and
    every outer direction writes one; A (p d/blocks) and B (o/blocks q) are stored without zeros (`block_diagonal`)."""
    has_auxiliary_loss: bool = False
    """Whether `auxiliary_loss` returns a loss."""
    compares_samples: bool = False
    """Whether task embeddings are trained to resemble their samples, which gives `similarity` a meaning."""

    def route(self, h: Tensor, x: Tensor, task: Tensor | None) -> Tensor:
        """Gates from h (… p), the layer's input x (… d) and the task ids (b). Gates of a token depend on that token
        and its task alone, and must be the same when gradient checkpointing runs the layer again."""
        return self.select(h, self.score(h, x), self.task_scores(task))

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        """Outer coefficients (… q) from the inner ones h (… p) and the gates. Linear in h."""
        raise NotImplementedError

    def router_weight(self) -> Tensor | None:
        """R (s d), or (s p) with router_input "h"; None for a core without a router."""
        return None

    def score(self, h: Tensor, x: Tensor) -> Tensor | None:
        """Scores of the tokens (… s): R x or R h; None without a router."""
        R = self.router_weight()
        seen = h if self.router_input == "h" else x
        return None if R is None else F.linear(seen, R.to(seen.dtype))

    def task_scores(self, task: Tensor | None) -> Tensor | None:
        """What the gates take from the task ids (b): (b …); None for a core that ignores the task."""
        return None

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        """Gates from h = A x (… p), the scores of the tokens (… s) and `task_scores`.

        With `linear_scores` it may run again in backward and reads no parameter, as gradients reach its arguments only.
        """
        raise NotImplementedError

    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of u = mix(h; g) for h (… p) and for the sum of scores and `task_scores` (… s), given du (… q)."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the initial values of routers, gates and embeddings."""

    def share_with(self, first: Core) -> None:
        """Replace what all layers of an adapter share by that of its first layer's core.

        Shared parameters stay part of the first core alone, so they are counted, saved and trained once.
        """

    def auxiliary_loss(self, x: Tensor, task: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """This layer's term of the training loss, weighted already: a scalar, or None.

        x is the layer's input (b t d), or (n d) where the layer sees rows; task (b) holds the ids of the samples, one
        for every row of the first axis of x; mask (b t) is nonzero for real tokens. A mask of another size than x has
        tokens does not apply, and all tokens count.
        """
        return None

    def similarity(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Similarity of the samples of this layer's input to every task: (b T), from -1 to 1. x and mask are those of
        `auxiliary_loss`."""
        raise NotImplementedError

    def stored_width(self, features: int) -> int:
        """Columns of the stored A, or rows of the stored B, for a layer with so many features in, or out."""
        if features % self.feature_blocks:
            raise ConfigError(
                f"a layer with {features} features cannot be cut into {self.feature_blocks} equal blocks: choose"
                " another number of blocks, or leave the layer out with exclude_modules"
            )
        return features // self.feature_blocks

    def block_diagonal(self, A: Tensor) -> Tensor:
        """A (p d) of the formula from the stored A (p d/blocks): the first p/blocks rows read the first block of the
        features, and so on, with zeros elsewhere. B is stored the same way, transposed. With one block, A itself.
        """
        if self.feature_blocks == 1:
            return A
        blocks = A.view(self.feature_blocks, -1, A.shape[-1]).unbind(0)
        placed: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return placed

    def matrix(self, g: Tensor) -> Tensor:
        """G = mix(I; g), shape (… q p): the method written out for these gates, since mix is linear in h."""
        identity = torch.eye(self.p, dtype=g.dtype, device=g.device)
        rows = self.mix(identity, g.unsqueeze(-1 - self.gate_axes))
        return rows.transpose(-1, -2)

    def check_declarations(self, d: int, num_tasks: int) -> None:
        """ConfigError where `linear_scores` or `closed_form` is declared and does not hold, for a layer of d features.

        A parameter that `select` or `mix` reads would silently not train; the wrong derivative would silently train
        towards something else. Both are tried on two random samples, without changing the global random state.
        """
        if not self.linear_scores:
            return
        name, probe = type(self).__name__, copy.deepcopy(self).eval()
        generator = torch.Generator().manual_seed(0)
        h, x, du = (torch.randn(2, n, generator=generator, dtype=torch.float32) for n in (self.p, d, self.q))
        device = next((t.device for t in (*self.parameters(), *self.buffers())), h.device)
        h, x, du = h.to(device), x.to(device), du.to(device)
        task = torch.tensor([0, num_tasks - 1], device=device) if num_tasks else None
        probe = probe.float()
        with torch.no_grad():
            scores, task_scores = Core.score(probe, h, x), probe.task_scores(task)
        with torch.enable_grad():
            g = probe.select(h, scores, task_scores)
            u = probe.mix(h, g)
        if u.requires_grad:
            raise ConfigError(
                f"{name} declares linear_scores, but its select or mix reads a parameter, which would get no gradient:"
                " set linear_scores = False, or read the parameter in router_weight or task_scores"
            )
        if device.type == "meta":
            return
        with torch.no_grad():
            if not torch.allclose(u, probe.mix(h, probe.route(h, x, task)), rtol=1e-4, atol=1e-5):
                raise ConfigError(
                    f"{name} declares linear_scores, but its route differs from select(h, R {self.router_input},"
                    " task_scores(task)): set linear_scores = False"
                )
        if self.closed_form:
            self._check_gradients(probe, h, scores, task_scores, du)

    def _check_gradients(
        self, probe: Core, h: Tensor, scores: Tensor | None, task_scores: Tensor | None, du: Tensor
    ) -> None:
        with torch.enable_grad():
            leaves = [h.requires_grad_(), *(t.requires_grad_() for t in (scores, task_scores) if t is not None)]
            g = probe.select(h, scores, task_scores)
            wanted = torch.autograd.grad(probe.mix(h, g), leaves, du)
        with torch.no_grad():
            dh, ds = probe.gradients(h, g.detach(), du)
        found = [dh, *[ds.reshape(w.shape) for w in wanted[1:]]]
        if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, wanted, strict=True)):
            raise ConfigError(
                f"{type(self).__name__} declares closed_form, but its gradients are not the derivative of its select"
                " and mix: set closed_form = False, or override gradients too"
            )


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

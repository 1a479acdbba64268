# SPDX-License-Identifier: Apache-2.0
"""Regret of a shared learning rate, per parametrisation, measured on a small regression over several tasks.

    python recipes/parametrisation/toy.py [--stage NAME …] [--out runs/parametrisation] [--variants] [--quick]

A frozen network of four residual layers is adapted to a teacher: the same network, whose weights differ by a low-rank
map per task and one that all tasks share. Tokens carry their task's mean, so that a token router can find the task.
Every method trains on the same batches with AdamW (no weight decay) and a linear warm-up and decay of the rate.

A parametrisation (`Rule`) turns one base rate into the rates of A, B, routers and embeddings, given the rank r that a
token passes through and the number of experts m. The scale of the update is part of it: B starts at zero, so Adam with
scale s and rate λ on B takes the same steps as scale 1 with rate sλ. Rules are therefore compared on one set of
trainings at scale 1, and two rules that lead to the same rates share them. Rates lie on a lattice of half octaves.

Per rule the table gives the base rate with the least worst regret, and over the variants (methods × ranks) there:
    regret     (loss − best loss of this rule over the rates) / best loss: worst and mean; also at half and twice the
               rate
    shortfall  (loss − best loss of any rule in the table) / that: worst and mean. A rule that is equally bad at all
               rates has no regret; it has a shortfall.
Losses are validation errors over the variance of what there is to learn: 1 + noise before training, noise at best.

Results are lines of JSON in OUT/results.jsonl, one a training, appended as they come: start again to continue.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dyads.methods import build_config
from dyads.ops import dyadic

TASKS = 8
NOISE = 0.25  # variance, where what there is to learn has 1
TASK_DIM = 16


# --- methods ---


@dataclass(frozen=True)
class Variant:
    """One method at one rank: r is the rank a token passes through, m the experts that a softmax chooses among."""

    name: str
    method: str
    options: tuple[tuple[str, Any], ...]
    r: float
    m: int = 1
    size: int = 0  # which rung of the ladder of ranks

    @property
    def router_inputs(self) -> int:
        """Inputs of the router that sees the token; 0 for the layer's whole width."""
        options = dict(self.options)
        return int(options["r"]) if options.get("score") == "h" else 0

    @property
    def task_inputs(self) -> int:
        """Inputs of the router that sees the task; 1 where its scores are free numbers, 0 for the layer's width."""
        return 1 if self.method == "mtl_lora" else int(dict(self.options).get("task_dim") or 0)

    def without_unused(self, cell: Cell) -> Cell:
        """The cell with 0 for the rates that none of the parameters follows."""
        used = {ROLES[name] for name, _ in self.core(8).named_parameters()}
        return replace(cell, **dict.fromkeys({"router", "task", "embedding"} - used, 0.0))

    def adapt(self, toy: Toy) -> Adapted:
        """The network with this method's cores."""
        return Adapted(self, toy)

    def core(self, d: int) -> nn.Module:
        """The library's core for a layer of width d, its routers as large as N(0, 0.02²) is for a width of 576."""
        options = dict(self.options)
        if "num_experts" in options and self.method in ("mode", "molora", "task_mode"):
            options.setdefault("router_std", 0.48 / d**0.5)
        return build_config(self.method, options).core(d)


def ladder(
    name: str, method: str, ranks: Sequence[int], m: int = 1, passes: float = 1.0, **options: Any
) -> list[Variant]:
    """A method at several ranks. `passes` is the share of its ranks that a token passes through."""
    found = []
    for size, r in enumerate(ranks):
        given = {"r": r, **options, **({"num_experts": m} if m > 1 or method == "mode" else {})}
        found.append(Variant(f"{name} {r}", method, tuple(given.items()), r * passes, m, size))
    return found


TASK_EMBEDDING = {"num_tasks": TASKS, "task_dim": TASK_DIM}
MORE = {**TASK_EMBEDDING, "linear_scaling": "none", "contrastive": 0.0, "embedding_init": "normal"}
FREE = {"num_tasks": TASKS, "embedding": "none", "embedding_init": "normal", "linear_scaling": "none"}
LADDERS = {
    "lora": ladder("LoRA", "mode", (4, 8, 16)),
    "molora": ladder("MoLORA 4×", "molora", (1, 2, 4), 4),
    "molora_sd": ladder("MoLORA-SD 4×", "molora", (1, 2, 4), 4, shared_down=True),
    "mode": ladder("MoDE 4×", "mode", (1, 2, 4), 4),
    "mode_8": ladder("MoDE 8×", "mode", (1, 2), 8),
    "mode_h": ladder("MoDE h 8×", "mode", (1, 2, 4), 8, score="h"),
    "task_mode": ladder("TaskMoDE 4×", "task_mode", (1, 2, 4), 4, contrastive=0.0, **TASK_EMBEDDING),
    "more_soft": ladder("MoRE soft", "more", (4, 8, 16), passes=0.5, selector="soft", **MORE),
    "more_subset": ladder("MoRE subset", "more", (4, 8, 16), passes=0.5, selector="subset", **MORE),
    "mtl_lora": ladder("MTL-LoRA 4×", "mtl_lora", (2, 4, 8), 4, num_tasks=TASKS),
    # Forms that are looked at, but that no rule is to serve:
    "more_paper": ladder("MoRE paper", "more", (4, 8, 16), num_tasks=TASKS, preset="paper"),
    "more_prefix": ladder("MoRE prefix", "more", (4, 8, 16), selector="straight_through", **MORE),
    "more_soft_kaiming": ladder(
        "MoRE soft Kaiming", "more", (4, 8, 16), passes=0.5, selector="soft", **{**MORE, "embedding_init": "kaiming"}
    ),
    "more_subset_kaiming": ladder(
        "MoRE subset Kaiming",
        "more",
        (4, 8, 16),
        passes=0.5,
        selector="subset",
        **{**MORE, "embedding_init": "kaiming"},
    ),
    "more_soft_free": ladder("MoRE soft free", "more", (4, 8, 16), passes=0.5, selector="soft", **FREE),
    "more_subset_free": ladder("MoRE subset free", "more", (4, 8, 16), passes=0.5, selector="subset", **FREE),
    "more_soft_contrastive": ladder(
        "MoRE soft contrastive", "more", (4, 8, 16), passes=0.5, selector="soft", **{**MORE, "contrastive": 0.1}
    ),
    "task_mode_contrastive": ladder(
        "TaskMoDE contrastive 4×", "task_mode", (1, 2, 4), 4, contrastive=0.1, **TASK_EMBEDDING
    ),
    "task_mode_wide": ladder(
        "TaskMoDE wide 4×", "task_mode", (1, 2, 4), 4, contrastive=0.0, num_tasks=TASKS, task_dim=None
    ),
    "task_mode_alone": ladder(
        "TaskMoDE task alone 4×", "task_mode", (1, 2, 4), 4, contrastive=0.0, score="task", **TASK_EMBEDDING
    ),
}
SERVED = tuple(LADDERS)[:10]


# --- rules ---


@dataclass(frozen=True)
class Rule:
    """Rates as multiples of one base rate λ, as powers of two (half steps allowed).

    A: λ · 2^a    B, times the scale: λ · 2^b · (8 / r)^rank · m^experts    embeddings: λ · 2^embedding
    routers of the token: λ · 2^router · (d / f)^fan_in, with f inputs    of the task: λ · 2^task · (d / f)^fan_in
    """

    a_init: str = "kaiming"
    rank: float = 1.0
    experts: float = 0.0
    b: float = 0.0
    a: float = 0.0
    router: float = 0.0
    task: float = 0.0
    embedding: float = 0.0
    fan_in: float = 0.0

    def cell(self, variant: Variant, log_rate: float, d: int) -> Cell:
        """The rates of this rule at base rate 2^log_rate, on the lattice of half octaves."""
        scale = self.rank * math.log2(8 / variant.r) + self.experts * math.log2(variant.m)
        router, task = (self.fan_in * math.log2(d / (f or d)) for f in (variant.router_inputs, variant.task_inputs))
        exponents = (self.a, self.b + scale, self.router + router, self.task + task, self.embedding)
        return variant.without_unused(Cell(self.a_init, *(round(2 * (log_rate + e)) / 2 for e in exponents)))

    def __str__(self) -> str:
        shown = f"{self.a_init} r^-{self.rank:g} m^{self.experts:g} B·2^{self.b:g}"
        for name in ("a", "router", "task", "embedding"):
            if getattr(self, name):
                shown += f" {name}·2^{getattr(self, name):g}"
        return shown + (f" fan-in^-{self.fan_in:g}" if self.fan_in else "")


@dataclass(frozen=True)
class Cell:
    """What one training is given beside its variant and seed: A's start, and log2 of the rates."""

    a_init: str
    a: float
    b: float
    router: float
    task: float
    embedding: float

    @property
    def hopeless(self) -> bool:
        """Whether B would move by more than one a step: that diverges, and is not worth a training."""
        return self.b > 0

    def tuple(self) -> tuple[str, float, float, float, float, float]:
        return self.a_init, self.a, self.b, self.router, self.task, self.embedding


def start_of_a(kind: str, rows: int, d: int) -> Tensor:
    """A's start: Kaiming-uniform as LoRA's, orthonormal rows, or normal as N(0, 0.01²) is for a width of 576."""
    A = torch.empty(rows, d)
    if kind == "kaiming":
        return nn.init.kaiming_uniform_(A, a=5**0.5)
    if kind == "orthogonal":
        return nn.init.orthogonal_(A)
    assert kind == "normal", kind
    return nn.init.normal_(A, std=0.24 / d**0.5)


ROLES = {
    **dict.fromkeys(("router",), "router"),
    **dict.fromkeys(("task_router", "gate_weight", "gate_bias", "logits", "weights"), "task"),
    **dict.fromkeys(("embedding", "projection"), "embedding"),
    "transform": "a",  # MTL-LoRA's
}
"""Which rate of a cell the parameters of a core follow."""


# --- the regression ---


@dataclass(frozen=True)
class Toy:
    """Sizes of the regression and length of the training."""

    d: int = 64
    layers: int = 4
    decay: float = 0.5
    steps: int = 200
    samples: int = 16  # a batch
    tokens: int = 8  # a sample
    train_samples: int = 1024
    valid_samples: int = 256
    rank: int = 4  # of every task's map, and of the shared one

    @property
    def label(self) -> str:
        return f"{self.layers}×{self.d}×{self.steps}"


class Data:
    """Base network, teacher, and the training and validation samples of one seed."""

    def __init__(self, toy: Toy, seed: int) -> None:
        g = torch.Generator().manual_seed(1000 + seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        d, r = toy.d, toy.rank
        self.base = [normal(d, d) / d**0.5 for _ in range(toy.layers)]
        deltas = []
        for W in self.base:
            own, shared = (normal(n, d, r) @ normal(n, r, d) for n in (TASKS, 1))
            delta = own + shared
            deltas.append(delta * (0.5 * W.norm() / delta.norm(dim=(1, 2)).mean()))
        means = 0.3 * normal(TASKS, d)
        # As in a language model some features are far larger than others.
        spread = torch.arange(1, d + 1).pow(-toy.decay)[torch.randperm(d, generator=g)]
        spread = spread / spread.square().mean().sqrt()
        samples = toy.train_samples + toy.valid_samples
        task = torch.arange(samples) % TASKS
        x = (normal(samples, toy.tokens, d) + means[task].unsqueeze(1)) * spread
        before = after = x
        for i, (W, delta) in enumerate(zip(self.base, deltas, strict=True)):
            before = before + F.linear(inner(before, i), W)
            after = after + torch.einsum("std,sod->sto", inner(after, i), W + delta[task])
        change = after - before
        self.unit, n = change.square().mean().sqrt(), toy.train_samples  # of what there is to learn
        target = after + self.unit * NOISE**0.5 * normal(*change.shape)
        self.train, self.valid = (x[:n], task[:n], target[:n]), (x[n:], task[n:], target[n:])
        self.order = torch.cat([torch.randperm(n, generator=g) for _ in range(toy.steps * toy.samples // n + 1)])


def inner(x: Tensor, layer: int) -> Tensor:
    """What the map of a layer sees: the normalised stream, after a ReLU in all layers but the first."""
    x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return x if layer == 0 else x.relu()


class Adapted(nn.Module):
    """A core for every layer of the network; called with stacked parameters of many trainings through vmap."""

    def __init__(self, variant: Variant, toy: Toy) -> None:
        super().__init__()
        self.cores = nn.ModuleList(variant.core(toy.d) for _ in range(toy.layers))

    def forward(self, x: Tensor, task: Tensor, base: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor]) -> Any:
        """(the network's answer, auxiliary loss)."""
        auxiliary = x.new_zeros(())
        for i in range(len(self.cores)):
            seen = inner(x, i)
            auxiliary = auxiliary + self.auxiliary(i, seen, A[i], task) / len(self.cores)
            x = x + F.linear(seen, base[i]) + self.update(i, seen, A[i], B[i], task)
        return x, auxiliary

    def update(self, i: int, seen: Tensor, A: Tensor, B: Tensor, task: Tensor) -> Tensor:
        """What layer i adds to its frozen map."""
        return dyadic(seen, A, B, self.cores[i], task)

    def auxiliary(self, i: int, seen: Tensor, A: Tensor, task: Tensor) -> Tensor:
        """The loss of layer i beside the task's own."""
        core = self.cores[i]
        return core.auxiliary_loss(seen, task, None) if core.has_auxiliary_loss else seen.new_zeros(())

    def start(self, stacked: dict[str, Tensor]) -> None:
        """Change the start of a set of trainings: parameters by name, stacked, with A and B of layer i as Ai and Bi."""


def train(toy: Toy, variant: Variant, cells: Sequence[Cell], seed: int, data: Data) -> list[float]:
    """Validation losses of one variant trained at several cells of rates, all from the same start, side by side."""
    torch.manual_seed(seed)
    model = variant.adapt(toy)
    for core in model.cores:
        core.reset_parameters()
    n = len(cells)
    stacked: dict[str, Tensor] = {}
    for name, value in model.named_parameters():
        stacked[name] = value.detach().expand(n, *value.shape).clone()
    for i, core in enumerate(model.cores):
        starts = {}
        for kind in ("kaiming", "orthogonal", "normal"):  # all are drawn, so that none depends on which are asked for
            starts[kind] = start_of_a(kind, core.p, toy.d)
        stacked[f"A{i}"] = torch.stack([starts[cell.a_init] for cell in cells])
        stacked[f"B{i}"] = torch.zeros(n, toy.d, core.q)
    model.start(stacked)
    rates = {}
    for name, value in stacked.items():
        which = {"A": "a", "B": "b"}.get(name[0]) or ROLES[name.split(".", 2)[2]]
        rate = torch.tensor([2.0 ** getattr(cell, which) for cell in cells])
        rates[name] = rate.view(n, *[1] * (value.ndim - 1))
    parameters = [value.requires_grad_() for value in stacked.values()]
    buffers = dict(model.named_buffers())

    def losses(given: dict[str, Tensor], x: Tensor, task: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        A, B = ([given[f"{which}{i}"] for i in range(toy.layers)] for which in "AB")
        own = {name: value for name, value in given.items() if name[0] not in "AB"}
        y, auxiliary = functional_call(model, {**own, **buffers}, (x, task, data.base, A, B))
        return ((y - target) / data.unit).square().mean(), auxiliary

    side_by_side = torch.vmap(losses, in_dims=(0, None, None, None), randomness="same")  # which dropout needs
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    warm_up = max(1, toy.steps // 10)
    for step in range(toy.steps):
        rows = data.order[step * toy.samples : (step + 1) * toy.samples]
        loss, auxiliary = side_by_side(stacked, *(part[rows] for part in data.train))
        gradients = torch.autograd.grad((loss + auxiliary).sum(), parameters, allow_unused=True)
        share = min((step + 1) / warm_up, (toy.steps - step) / (toy.steps - warm_up))
        with torch.no_grad():
            for p, gradient, m, v, rate in zip(parameters, gradients, first, second, rates.values(), strict=True):
                if gradient is None:
                    continue
                m.lerp_(gradient, 0.1)
                v.lerp_(gradient.square(), 0.001)
                size = (v / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
                p.sub_(rate * (share / (1 - 0.9 ** (step + 1))) * m / size)
    model.eval()
    with torch.no_grad():
        parts = zip(*(part.split(64) for part in data.valid), strict=True)
        found = torch.stack([side_by_side(stacked, *part)[0] for part in parts]).mean(0)
    return found.nan_to_num(10, 10).clamp(max=10).tolist()


# --- results ---


@dataclass
class Results:
    """Losses of trainings that are done, in memory and in a file of JSON lines."""

    path: Path
    toy: Toy
    losses: dict[tuple[str, Cell, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a line was cut off
            self.path.write_text(whole, encoding="utf-8")
        for line in map(json.loads, whole.splitlines()):
            if line["toy"] == self.toy.label:
                self.losses[line["variant"], Cell(*line["cell"]), line["seed"]] = line["loss"]

    def compute(self, variants: Sequence[Variant], cells: dict[str, list[Cell]], seeds: int, batch: int = 32) -> None:
        """Train what is missing, `batch` trainings at a time."""
        for seed in range(seeds):
            data = Data(self.toy, seed)
            for variant in variants:
                open_cells = {c for c in cells[variant.name] if not c.hopeless}
                missing = sorted(
                    (c for c in open_cells if (variant.name, c, seed) not in self.losses), key=lambda c: c.tuple()
                )
                for start in range(0, len(missing), batch):
                    some = missing[start : start + batch]
                    found = train(self.toy, variant, some, seed, data)
                    with self.path.open("a", encoding="utf-8") as file:
                        for cell, loss in zip(some, found, strict=True):
                            self.losses[variant.name, cell, seed] = loss
                            line = {"toy": self.toy.label, "variant": variant.name, "cell": cell.tuple(), "seed": seed}
                            file.write(json.dumps({**line, "loss": round(loss, 5)}) + "\n")
                if missing:
                    print(f"seed {seed}: {variant.name}: {len(missing)} trainings", flush=True)

    def loss(self, variant: Variant, cell: Cell, seeds: int) -> float:
        if cell.hopeless:
            return 10.0
        return sum(self.losses[variant.name, cell, seed] for seed in range(seeds)) / seeds


# --- stages ---

RATES = range(-10, -1)  # log2 of the base rate: 0.001 to 0.25, which for a width of 64 are high, but not too high


@dataclass(frozen=True)
class Stage:
    """Rules that are compared, on which methods, sizes and seeds."""

    rules: tuple[Rule, ...]
    methods: tuple[str, ...] = SERVED
    sizes: tuple[int, ...] = (0, 2)
    seeds: int = 2
    toy: Toy = Toy()

    @property
    def variants(self) -> list[Variant]:
        return [v for name in self.methods for v in LADDERS[name] if v.size in self.sizes]


SHORT = Toy(steps=60)
SCALES = tuple(Rule("kaiming", *of) for of in product((0, 0.5, 1), (0, 0.5, 1), (-2, 0, 2, 4)))
STARTS = tuple(
    Rule(start, *of)
    for start in ("kaiming", "orthogonal", "normal")
    for of in product((0.5, 1), (0, 0.5), (-2, 0, 2, 4))
)
MULTIPLES = (
    *(Rule(router=e) for e in (-4, -2, 0, 2, 4)),
    *(Rule(task=e) for e in (-2, 2, 4, 6)),
    *(Rule(embedding=e) for e in (-4, -2, 2, 4)),
    *(Rule(a=e) for e in (-4, -2, 2)),
    *(Rule(fan_in=f, router=e, task=e) for f in (0.5, 1) for e in (-4, -2, 0)),
)
WIDTHS = tuple(Rule(b=b, a=a) for a in (0, -2) for b in (-2, 0, 2, 4))
WIDTH_METHODS = ("lora", "mode", "mode_h", "task_mode", "more_soft")
FORMS = tuple(Rule(task=t, embedding=e) for t in (0, 2, 4) for e in (0, 2, 4))
TASK_METHODS = tuple(name for name in LADDERS if name.startswith(("more", "task")))
LAST = (
    Rule(rank=0),  # scale 1
    Rule(),  # alpha / r
    Rule(rank=0.5, experts=0.5),
    *(Rule(fan_in=f) for f in (0.5, 1)),
    Rule(fan_in=0.5, router=-2),
    Rule(fan_in=0.5, embedding=2),
    Rule(rank=0.5, experts=0.5, fan_in=0.5),
)
LAST_METHODS = (*(name for name in SERVED if "more" not in name), "more_soft_kaiming", "more_subset_kaiming")
STAGES = {
    "scale": Stage(SCALES),
    "scale-short": Stage(SCALES, toy=SHORT),
    "start": Stage(STARTS),
    "start-short": Stage(STARTS, toy=SHORT),
    "width-short": Stage(WIDTHS, WIDTH_METHODS, (1,), toy=SHORT),
    "width-3": Stage(WIDTHS, WIDTH_METHODS, (1,), toy=replace(SHORT, d=192)),
    "forms": Stage(FORMS, TASK_METHODS, (0, 2)),
    "forms-short": Stage(FORMS, TASK_METHODS, (0, 2), toy=SHORT),
    "last-short": Stage(LAST, LAST_METHODS, (0, 1, 2), 3, SHORT),
    "last": Stage(LAST, LAST_METHODS, (0, 1, 2), 3),
    "last-3": Stage(LAST, LAST_METHODS, (1,), 3, replace(SHORT, d=192)),
    "rates": Stage(MULTIPLES),
    "rates-short": Stage(MULTIPLES, toy=SHORT),
}


# --- the table ---


@dataclass(frozen=True)
class Row:
    """What one rule comes to over the variants, as numbers per variant."""

    rule: Rule
    rate: float
    best: dict[str, float]  # loss at the variant's own best rate under this rule
    shared: dict[str, float]  # loss at the shared rate
    regret: dict[str, float]  # shared ÷ best − 1
    half: dict[str, float]  # the same at half the shared rate
    twice: dict[str, float]  # the same at twice the shared rate
    shortfall: dict[str, float] = field(default_factory=dict)  # shared ÷ best of any rule − 1


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    found = list(values)
    return sum(found) / len(found)


def rows(results: Results, stage: Stage, seeds: int, rates: Sequence[int] = RATES) -> list[Row]:
    """A row for every rule of a stage, at the rate with its least worst regret; sorted by the worst shortfall."""
    found = []
    for rule in stage.rules:
        losses = {v.name: [results.loss(v, rule.cell(v, k, stage.toy.d), seeds) for k in rates] for v in stage.variants}
        best = {name: min(at) for name, at in losses.items()}
        regrets = [{name: at[i] / best[name] - 1 for name, at in losses.items()} for i in range(len(rates))]
        i = min(range(len(rates)), key=lambda i: max(regrets[i].values()))
        near = (regrets[j] if 0 <= j < len(rates) else {} for j in (i - 1, i + 1))
        found.append(Row(rule, rates[i], best, {name: at[i] for name, at in losses.items()}, regrets[i], *near))
    bests = {name: min(row.best[name] for row in found) for name in found[0].best}
    found = [
        replace(row, shortfall={name: loss / bests[name] - 1 for name, loss in row.shared.items()}) for row in found
    ]
    return sorted(found, key=lambda row: max(row.shortfall.values()))


def table(found: Sequence[Row], top: int = 30) -> str:
    """The rows as text, in per cent of the loss."""
    lines = ["rule | log2 rate | regret: worst, mean | at half the rate | at twice the rate | shortfall"]
    for row in found[:top]:
        parts = [str(row.rule), str(row.rate)]
        for numbers in (row.regret, row.half, row.twice, row.shortfall):
            worst = max(numbers, key=numbers.__getitem__, default="-")
            numbers = numbers or {worst: math.nan}
            parts.append(f"{100 * numbers[worst]:.1f} ({worst}), {100 * mean(numbers.values()):.1f}")
        lines.append(" | ".join(parts))
    return "\n".join(lines)


def per_variant(found: Sequence[Row]) -> str:
    """Loss at the shared rate, and at the variant's own best, of every variant under every rule shown."""
    lines = [" | ".join(["variant", *(f"{row.rule} at 2^{row.rate}" for row in found)])]
    lines += [
        " | ".join([name, *(f"{row.shared[name]:.3f} ({row.best[name]:.3f})" for row in found)])
        for name in found[0].best
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what a stage wants and is not there yet, and print its table."""
    parser = argparse.ArgumentParser(description="Regret of a shared learning rate, per parametrisation.")
    parser.add_argument("--stage", action="append", choices=tuple(STAGES), help="Default: all.")
    parser.add_argument("--out", type=Path, default=Path("runs/parametrisation"))
    parser.add_argument("--seeds", type=int, help="Default: the stage's.")
    parser.add_argument("--quick", action="store_true", help="A small network and few steps, to see it work.")
    parser.add_argument("--top", type=int, default=30, help="Rules that the table shows.")
    parser.add_argument("--variants", action="store_true", help="Show the losses of every variant too.")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # small products gain nothing from more
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.stage or STAGES:
        stage = STAGES[name]
        if options.quick:
            stage = replace(stage, toy=Toy(d=16, layers=2, steps=20, train_samples=128, valid_samples=64), sizes=(0,))
        seeds = options.seeds or stage.seeds
        results = Results(options.out / "results.jsonl", stage.toy)
        results.compute(
            stage.variants,
            {v.name: [rule.cell(v, k, stage.toy.d) for rule in stage.rules for k in RATES] for v in stage.variants},
            seeds,
        )
        found = rows(results, stage, seeds)
        print(f"\n{name}: {len(stage.variants)} variants, {seeds} seeds\n{table(found, options.top)}")
        if options.variants:
            print(f"\n{per_variant(found[: options.top])}")


if __name__ == "__main__":
    main()

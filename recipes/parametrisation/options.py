# SPDX-License-Identifier: Apache-2.0
"""Options of mixtures from recent papers, each beside its plain form on the regression of toy.py.

    python recipes/parametrisation/options.py [--out runs/options] [--seeds 8] [--quick]

Every option is trained from the same start, on the same batches and at the same rates as the form without it, with
equally many trained parameters (within 1.5 %). The difference is (loss with the option ÷ loss without) − 1, per seed.
It is shown at the shared rate, 2^-5 (LOG.md, 2026-11-28), and with each form at its own best rate of five, the one with
the least mean loss over the seeds. Intervals are Student's over the seeds, 95 %. The line "all" averages the methods of
an option within each seed; an option helps if that interval lies below zero at both rates.

    frozen A           orthogonal A that does not train; what it saves goes into more ranks or experts (LoRI,
                       arXiv 2504.07448; Zhu et al., arXiv 2402.16842)
    random B           B ~ N(0, √r / (64 d)) at the start, less what it adds with equal gates (R-LoRA, arXiv 2502.15455)
    orthogonal router  rows of the router orthogonal to one another at the start, as long as they are without
    √gates             gradients of A and B as if gates were their square roots (arXiv 2502.15828)
    align              0.01 · symmetric KL divergence between the tasks' A x, each taken for normally distributed
                       (Align-LoRA, arXiv 2508.05078)
    contrastive        0.1 · MoRE's contrastive loss (arXiv 2505.22694), which align is to replace
    dropout            a tenth of the coefficients of up-vectors dropped in training, each by itself (R-LoRA drops them
                       for each expert by itself too)
    √r                 scale ∝ 1/√r in place of 1/r (GOAT, arXiv 2502.16894)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor, nn
from toy import LADDERS, TASKS, Adapted, Cell, Results, Rule, Toy, Variant

RATES = (-7, -6, -5, -4, -3)
SHARED = -5
DROPPED = 0.1
ALIGN = 0.01


# --- what an option changes in the network ---


class SquareRootGates(Adapted):
    """The values of the gates as they are; A and B get gradients as with their square roots."""

    def update(self, i: int, seen: Tensor, A: Tensor, B: Tensor, task: Tensor) -> Tensor:
        core, h = self.cores[i], F.linear(seen, A)
        g = core.route(h, seen, task)
        root = g.detach().sqrt()
        return F.linear(core.mix(h, root), B) + F.linear(core.mix(h.detach(), g - root), B.detach())


class DropoutOfUps(Adapted):
    """Every up-vector's coefficient is dropped by itself, for every token."""

    def update(self, i: int, seen: Tensor, A: Tensor, B: Tensor, task: Tensor) -> Tensor:
        core, h = self.cores[i], F.linear(seen, A)
        u = core.mix(h, core.route(h, seen, task))
        return F.linear(F.dropout(u, DROPPED, self.training), B)


class Aligned(Adapted):
    """The coefficients A x of all tasks are trained to have one mean and one variance."""

    def auxiliary(self, i: int, seen: Tensor, A: Tensor, task: Tensor) -> Tensor:
        h = F.linear(seen, A)
        of_task = F.one_hot(task, TASKS).to(h.dtype)  # (b T)
        count = of_task.sum(0) * h.shape[1]
        share = of_task / count.clamp_min(1)
        mean = torch.einsum("bT,btr->Tr", share, h)
        var = torch.einsum("bT,btr->Tr", share, (h - (of_task @ mean).unsqueeze(1)).square()) + 1e-8
        # KL(i ‖ j) + KL(j ‖ i): the logarithms of the variances cancel.
        squares = (mean.unsqueeze(0) - mean.unsqueeze(1)).square() + var.unsqueeze(0)
        pairs = 0.5 * (squares / var.unsqueeze(1) + squares.transpose(0, 1) / var.unsqueeze(0) - 2).sum(-1) / 2
        there = (count > 0).to(h.dtype)
        counted = there.unsqueeze(0) * there.unsqueeze(1) * (1 - torch.eye(TASKS))
        return ALIGN * (pairs * counted).sum() / counted.sum().clamp_min(1) + super().auxiliary(i, seen, A, task)


class OrthogonalRouters(Adapted):
    """Rows of the router that are orthogonal, as far as it has inputs, and as long as random ones are on average."""

    def start(self, stacked: dict[str, Tensor]) -> None:
        for name, value in stacked.items():
            if name.endswith(".router"):
                rows = value[0]
                length = rows.square().sum(-1).mean().sqrt()
                new = nn.init.orthogonal_(torch.empty_like(rows))
                value.copy_((new / new.square().sum(-1).mean().sqrt() * length).expand_as(value))


class RandomB(Adapted):
    """Up-vectors that differ from the start; with equal gates they add nothing at first."""

    def start(self, stacked: dict[str, Tensor]) -> None:
        self.offsets = []
        for i, core in enumerate(self.cores):
            A, B = stacked[f"A{i}"], stacked[f"B{i}"]
            d, r = B.shape[1], core.q // core.num_experts
            B.copy_((torch.randn(B.shape[1:]) * (r**0.25 / 8 / d**0.5)).expand_as(B))
            equal = torch.full(core.gate_shape, 1 / core.num_experts)
            self.offsets.append(B[0] @ core.matrix(equal) @ A[0])

    def update(self, i: int, seen: Tensor, A: Tensor, B: Tensor, task: Tensor) -> Tensor:
        return super().update(i, seen, A, B, task) - F.linear(seen, self.offsets[i])


# --- options beside their plain forms ---


@dataclass(frozen=True)
class Changed(Variant):
    """A method in a network that an option changes."""

    network: type[Adapted] = Adapted

    def adapt(self, toy: Toy) -> Adapted:
        return self.network(self, toy)


@dataclass(frozen=True)
class Form:
    """A method as it is trained: its variant, and from a base rate to the rates of its parameters."""

    variant: Variant
    rule: Rule = field(default_factory=Rule)
    frozen: bool = False

    @property
    def key(self) -> str:
        """A name for the trainings of this form, which differ from those of others."""
        return self.variant.name

    def cell(self, k: float, d: int) -> Cell:
        """The rates at base rate 2^k."""
        cell = self.rule.cell(self.variant, k, d)
        return replace(cell, a_init="orthogonal", a=-math.inf) if self.frozen else cell

    def trained(self, d: int) -> int:
        """Parameters that train, in one layer of width d."""
        core = self.variant.core(d)
        return (0 if self.frozen else core.p * d) + core.q * d + sum(p.numel() for p in core.parameters())


@dataclass(frozen=True)
class Pair:
    """An option on one method, and the method without it."""

    option: str
    plain: Form
    changed: Form


def of(ladder: str, size: int) -> Variant:
    """A rung of a ladder of toy.py."""
    return next(v for v in LADDERS[ladder] if v.size == size)


PLAIN = (of("molora_sd", 2), of("mode", 1), of("mode_h", 1), of("task_mode", 1))


def with_network(variant: Variant, option: str, network: type[Adapted]) -> Variant:
    """The variant in a network that the option changes."""
    own = {name: getattr(variant, name) for name in ("method", "options", "r", "m", "size")}
    return Changed(name=f"{variant.name} {option}", **own, network=network)


def larger(variant: Variant, r: int, m: int) -> Variant:
    """The variant with other numbers of ranks and experts, which are frozen A's to spend."""
    options = {
        **dict(variant.options),
        "r": r,
        **({"num_experts": m} if "num_experts" in dict(variant.options) else {}),
    }
    return replace(variant, name=f"{variant.name} frozen {r}×{m}", options=tuple(options.items()), r=r, m=m)


def pairs() -> list[Pair]:
    """Every option on every method that it fits."""
    found = []
    sizes = {of("lora", 1): (16, 1), PLAIN[0]: (5, 4), PLAIN[1]: (3, 3), PLAIN[2]: (2, 9), PLAIN[3]: (3, 3)}
    for variant, (r, m) in sizes.items():
        found.append(Pair("frozen A", Form(variant), Form(larger(variant, r, m), frozen=True)))
    networks: dict[str, type[Adapted]] = {
        "random B": RandomB,
        "orthogonal router": OrthogonalRouters,
        "√gates": SquareRootGates,
        "dropout": DropoutOfUps,
    }
    for option, network in networks.items():
        found += [Pair(option, Form(v), Form(with_network(v, option, network))) for v in PLAIN]
    # Embeddings as wide as the layer, so that the contrastive loss needs no projection.
    wide = of("task_mode_wide", 1)
    found += [Pair("align", Form(v), Form(with_network(v, "align", Aligned))) for v in (PLAIN[3], wide)]
    losses = {**dict(wide.options), "contrastive": 0.1}
    contrastive = replace(wide, name=f"{wide.name} contrastive", options=tuple(losses.items()))
    found.append(Pair("contrastive", Form(wide), Form(contrastive)))
    found += [Pair("√r", Form(variant), Form(variant, Rule(rank=0.5))) for variant in PLAIN]
    return found


# --- results ---


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and Student's interval of 95 % over the seeds."""
    values = torch.tensor(differences, dtype=torch.float64)
    half = float(student.ppf(0.975, len(values) - 1)) * float(values.std()) / len(values) ** 0.5
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def verdict(*intervals: tuple[float, float, float]) -> str:
    """`helps` if all intervals lie below zero, `hurts` if all lie above it, else `undecided`."""
    if all(high < 0 for _, _, high in intervals):
        return "helps"
    return "hurts" if all(low > 0 for _, low, _ in intervals) else "undecided"


def table(compared: Sequence[Pair], loss: Callable[[Form, float, int], float], seeds: int, d: int) -> str:
    """One line for each option and method, and one for each option with several."""
    lines = ["option | method | parameters | at the shared rate, % | each at its best rate, % | best rates | verdict"]

    def best(form: Form) -> float:
        return min(RATES, key=lambda k: sum(loss(form, k, seed) for seed in range(seeds)))

    def show(found: tuple[float, float, float]) -> str:
        return f"{found[0]:+.2f} ({found[1]:+.2f} to {found[2]:+.2f})"

    for option in dict.fromkeys(pair.option for pair in compared):
        of_option: list[tuple[list[float], list[float]]] = []
        for pair in (p for p in compared if p.option == option):
            rates = best(pair.plain), best(pair.changed)
            differences = (
                [100 * (loss(pair.changed, SHARED, s) / loss(pair.plain, SHARED, s) - 1) for s in range(seeds)],
                [100 * (loss(pair.changed, rates[1], s) / loss(pair.plain, rates[0], s) - 1) for s in range(seeds)],
            )
            of_option.append(differences)
            found = tuple(map(interval, differences))
            sizes = f"{pair.changed.trained(d)} : {pair.plain.trained(d)}"
            shown = [option, pair.plain.key, sizes, *map(show, found), f"2^{rates[1]} : 2^{rates[0]}", verdict(*found)]
            lines.append(" | ".join(shown))
        if len(of_option) > 1:
            means = [[sum(at) / len(at) for at in zip(*side, strict=True)] for side in zip(*of_option, strict=True)]
            found = tuple(map(interval, means))
            lines.append(" | ".join([option, "all", "", *map(show, found), "", verdict(*found)]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description="Options of mixtures beside their plain forms, on a toy regression.")
    parser.add_argument("--out", type=Path, default=Path("runs/options"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="A small network and few steps, to see it work.")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # small products gain nothing from more
    toy = Toy(d=16, layers=2, steps=20, train_samples=128, valid_samples=64) if options.quick else Toy()
    options.out.mkdir(parents=True, exist_ok=True)
    results, compared = Results(options.out / "options.jsonl", toy), pairs()
    forms = [form for pair in compared for form in (pair.plain, pair.changed)]
    cells: dict[str, list[Cell]] = {}
    for form in forms:
        cells.setdefault(form.key, []).extend(form.cell(k, toy.d) for k in RATES)
    results.compute(list({form.key: form.variant for form in forms}.values()), cells, options.seeds)
    results = Results(results.path, toy)  # as the file has them, so that the same table is printed again

    def loss(form: Form, k: float, seed: int) -> float:
        cell = form.cell(k, toy.d)
        return 10.0 if cell.hopeless else results.losses[form.key, cell, seed]

    print(table(compared, loss, options.seeds, toy.d))


if __name__ == "__main__":
    main()

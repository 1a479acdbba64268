# SPDX-License-Identifier: Apache-2.0
"""Verdicts on a study's claims: supported, not supported or undecided, with corrected intervals.

A claim says where the true difference D of two methods lies: `ahead … by b` says D ≥ b, `equal … within w` says
-w ≤ D ≤ w. With the interval of comparing/intervals.py for D,

    supported        the interval lies where the claim says (with `clear_of: c`: the estimate ≥ b, the interval > c)
    not supported    the interval lies elsewhere
    undecided        it lies in both
    open             some of the claim's runs have no scores yet

Each verdict is a test of D against the nearest bound. Holm's procedure holds the chance of any false verdict among a
study's claims on one metric at 5 %; the interval of a claim has the level at which that procedure tested it, so that it
excludes the bound exactly if there is a verdict. Runs with one seed decide nothing about methods.

For an undecided claim the smallest number of seeds is given with which its interval is expected to exclude the bound,
if the estimate and the variances stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dyads.comparing.comparison import Comparison
from dyads.comparing.intervals import LEVEL, Array, Sample, holm, holm_levels
from dyads.comparing.tables import counted
from dyads.errors import ConfigError, did_you_mean
from dyads.studies.grid import SEED, Cell, Combination, Study
from dyads.studies.spec import ClaimSpec

__all__ = ["Claim", "Judgement", "Verdict", "claims_of", "judge"]

Verdict = Literal["supported", "not supported", "undecided", "open"]

_MOST_SEEDS = 100
_INSTANCES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)


@dataclass(frozen=True)
class Claim:
    """A claim about two columns of one table."""

    spec: ClaimSpec
    row: str
    column: str
    table: Combination
    where: Combination
    """Values of the other axes."""
    runs: tuple[Cell, ...]

    @property
    def text(self) -> str:
        """The claim as a sentence."""
        spec = self.spec
        if spec.equal:
            said = f"{self.row} equals {self.column} within {spec.within:g}"
        else:
            said = f"{self.row} ahead of {self.column}" + (f" by {spec.by:g}" if spec.by else "")
            said += f", interval above {spec.clear_of:g}," if spec.clear_of is not None else ""
        place = ", ".join(f"{v.axis} {v.name}" for v in self.table)
        return f"{said} on {spec.on}" + (f" ({place})" if place else "")

    def bound(self, value: float) -> float:
        """The bound of the claim that a difference is tested against."""
        spec = self.spec
        if spec.equal:
            assert spec.within is not None
            return math.copysign(spec.within, value)
        return spec.by if value < spec.by or spec.clear_of is None else spec.clear_of

    def holds(self, value: float) -> bool:
        """Whether a difference is where the claim says."""
        spec = self.spec
        return abs(value) <= spec.within if spec.within is not None else value >= spec.by


@dataclass(frozen=True)
class Judgement:
    """A claim's verdict, with the difference that it rests on. Numbers are None while the claim is open."""

    claim: Claim
    verdict: Verdict
    value: float | None = None
    low: float | None = None
    high: float | None = None
    level: float | None = None
    """Of the interval: higher than 0.95 by the correction."""
    p: float | None = None
    corrected_p: float | None = None
    over_seeds: bool = False
    needs: str = ""
    """What it would take to decide; empty where it is decided."""


def claims_of(study: Study, cells: Mapping[Combination, Cell]) -> tuple[Claim, ...]:
    """Every claim for every combination of the other axes; ConfigError for one that no two columns fit."""
    return tuple(claim for i in range(len(study.spec.claims)) for claim in _claims(study, cells, i))


def _claims(study: Study, cells: Mapping[Combination, Cell], number: int) -> Iterator[Claim]:
    spec, place = study.spec.claims[number], f"claims.{number}"
    column = study.find(spec.column, f"{place}.{'of' if spec.ahead else 'to'}")
    if SEED in spec.where:
        raise ConfigError(f"{study.path}: '{place}.where' names '{SEED}', but a claim is about all seeds: drop it")
    groups: dict[Combination, list[Cell]] = {}
    for combination, cell in cells.items():
        runs = groups.setdefault(study.group_of(combination), [])
        if cell not in runs:
            runs.append(cell)
    for name in spec.rows:
        row = study.find(name, f"{place}.{'ahead' if spec.ahead else 'equal'}")
        if row.axis != column.axis or row.axis in (SEED, *study.table_axes) or row is column:
            raise ConfigError(
                f"{study.path}: '{place}' compares '{row.name}' with '{column.name}', which are not two columns of one"
                f" table: name two values of one axis{did_you_mean(name, [v.name for v in study.axes[column.axis]])}"
            )
        found = False
        for group in groups:
            other = tuple(column if v is row else v for v in group)
            if row not in group or other not in groups or not study.matches(group, spec.where, f"{place}.where"):
                continue
            one, two = groups[group], groups[other]
            if one == two:  # a method that trains nothing has one run for all training settings
                continue
            found = True
            rest = tuple(v for v in group if v is not row)
            yield Claim(spec, one[0].label, two[0].label, study.table_of(group), rest, (*one, *two))
        if not found:
            raise ConfigError(f"{study.path}: '{place}' is about no two cells of the study: see its 'where'")


def judge(claims: Sequence[Claim], comparisons: Mapping[Combination, Comparison]) -> tuple[Judgement, ...]:
    """The verdict of every claim; one whose runs are not all in the comparison of its table is open."""
    results = [_compared(claim, comparisons.get(claim.table)) for claim in claims]
    for metric in dict.fromkeys(claim.spec.on for claim in claims):
        family = [i for i, claim in enumerate(claims) if claim.spec.on == metric]
        # Claims that cannot be decided, or not yet, are counted, so that the correction does not change when they can.
        ps = [p if (p := results[i].p) is not None and results[i].over_seeds else 1.0 for i in family]
        for i, corrected, level in zip(family, holm(ps), holm_levels(ps), strict=True):
            if results[i].p is not None:
                results[i] = _decided(results[i], comparisons[claims[i].table], corrected, level)
    return tuple(results)


def _compared(claim: Claim, comparison: Comparison | None) -> Judgement:
    """The difference of a claim's columns, not corrected; open if a run is missing."""
    by_label = {c.label: c for c in comparison.columns} if comparison is not None else {}
    for label in (claim.row, claim.column):
        runs = [cell for cell in claim.runs if cell.label == label]
        have = by_label[label].seeds if label in by_label else ()
        lacking = [cell for cell in runs if cell.recipe.seed not in have]
        if lacking:
            return Judgement(claim, "open", needs=f"{len(lacking)} of {len(runs)} runs of {label} have no scores")
    assert comparison is not None
    sample, weights = _difference(claim, comparison)
    value = sample.interval(weights).value
    p = sample.interval(weights, null=claim.bound(value)).p
    return Judgement(claim, "undecided", value, p=p, over_seeds=sample.over_seeds)


def _difference(claim: Claim, comparison: Comparison) -> tuple[Sample, Array]:
    return comparison.difference(claim.row, claim.column), comparison.weights(claim.spec.on)


def _decided(found: Judgement, comparison: Comparison, corrected: float, level: float) -> Judgement:
    claim, value = found.claim, found.value
    assert value is not None
    sample, weights = _difference(claim, comparison)
    interval = sample.interval(weights, level=level)
    verdict: Verdict = "undecided"
    if corrected < 1 - LEVEL:
        verdict = "supported" if claim.holds(value) else "not supported"
    needs = "" if verdict != "undecided" else _needs(sample, weights, level, abs(value - claim.bound(value)))
    return replace(
        found,
        verdict=verdict,
        low=interval.low if math.isfinite(interval.low) else None,
        high=interval.high if math.isfinite(interval.high) else None,
        level=level,
        corrected_p=corrected if found.over_seeds else None,
        needs=needs,
    )


def _needs(sample: Sample, weights: Array, level: float, distance: float) -> str:
    """What would make the interval narrower than the distance of the estimate from the claim's bound."""
    if not sample.over_seeds:
        return "more seeds, five or more: one seed says nothing about another training"
    seeds, alike = max(sample.seeds), len(sample.seeds) == 1

    def enough(instances: float) -> int | None:
        most = 1 if sample.seedless else _MOST_SEEDS
        fits = (k for k in range(seeds, most + 1) if _width(k, instances) < distance)
        return next(fits, None)

    def _width(k: int, instances: float) -> float:
        return sample.half_width(weights, level=level, seeds=k, instances=instances)

    found = enough(1.0)
    if found is not None:
        found = max(found, seeds + alike)
        return f"{counted(found - seeds, 'more seed')} ({found} in all)" if alike else f"{found} seeds of each"
    both = [(factor * k, factor, k) for factor in _INSTANCES if (k := enough(factor)) is not None]
    if both:
        _, factor, k = min(both)  # the fewest answers to score
        more = f" and {counted(k - seeds, 'more seed')} ({k} in all)" if k > seeds else ""
        more = more if alike else f" and {k} seeds of each"
        return f"{factor:g} times the instances{more}; seeds alone do not decide it"
    return f"the estimate is {distance:.2g} from the claim's bound, too near for {_MOST_SEEDS} seeds"

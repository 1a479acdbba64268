# SPDX-License-Identifier: Apache-2.0
"""Plan of a measurement: groups of contenders with their rounds and estimated minutes, those with bars first.

A group with bars gets more rounds than the others. Estimates come from the settings' `seconds`, which were measured on
two quiet cores; they decide the order of nothing, and which groups are left out where a time limit is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.bars import BARS
from benchmarks.contenders import SETTINGS, Contender, Setting
from benchmarks.rounds import metrics_of
from benchmarks.training import GROUPS as TRAINING_GROUPS

PARTS = ("counted", "startup", "smollm2", "llama", "training", "scoring", "serving", "profile", "tiny")
BY_NAME = ("profile", "tiny")
"""Parts that are measured only when they are named."""

CHECK_SECONDS = 4.0
"""The gate, for one contender of dyads."""
SECONDS = {"counted": 70.0, "profile": 150.0}
"""Of a whole group that has no rounds of its own."""
TRAINING_SIDE = 36.0
SCORING_ROUND = 16.0
SERVING_ROUND = 45.0
STARTUP_ROUND = 2.0


@dataclass(frozen=True)
class Job:
    """One group of one part."""

    part: str
    group: str
    rounds: int
    has_bar: bool
    seconds: float
    """Estimated."""


def plan(parts: tuple[str, ...], *, rounds: int, other_rounds: int, profiles: tuple[str, ...]) -> list[Job]:
    """The jobs of some parts, those with bars first."""
    jobs: list[Job] = []
    for part in parts:
        if part in SETTINGS:
            setting, barred = SETTINGS[part], groups_with_bars(part)
            for group, names in setting.groups.items():
                n = rounds if group in barred else other_rounds
                seconds = estimate(setting, {name: setting.contenders[name] for name in names}, n)
                jobs.append(Job(part, group, n, group in barred, seconds))
        elif part == "profile":
            jobs += [Job(part, name, other_rounds, False, SECONDS[part]) for name in profiles]
        elif part == "startup":
            jobs.append(Job(part, "all", rounds, True, rounds * STARTUP_ROUND))
        elif part == "counted":
            jobs.append(Job(part, "all", 1, True, SECONDS[part]))
        elif part == "training":
            for group, sides in TRAINING_GROUPS.items():
                n = rounds if group == "main" else other_rounds
                jobs.append(Job(part, group, n, group == "main", n * len(sides) * TRAINING_SIDE))
        elif part == "serving":
            jobs.append(Job(part, "all", other_rounds, True, other_rounds * SERVING_ROUND))
        else:
            jobs.append(Job(part, "all", rounds, True, rounds * SCORING_ROUND))
    return sorted(jobs, key=lambda job: not job.has_bar)


def groups_with_bars(part: str) -> set[str]:
    """The groups of a setting in which a bar is measured: the first that holds both of its sides."""
    groups = SETTINGS[part].groups
    found = set()
    for bar in BARS:
        sides = {bar.top, bar.bottom}
        first = next((group for group, names in groups.items() if bar.part == part and sides <= set(names)), None)
        if first is not None:
            found.add(first)
    return found


def estimate(setting: Setting, contenders: dict[str, Contender], rounds: int) -> float:
    """Seconds of a group: its gate, then starting, warming up and measuring every contender."""
    starts = -(-rounds // setting.lives)
    total = 0.0
    for name, contender in contenders.items():
        once = contender.slowness * sum(setting.seconds[m] for m in metrics_of(name, setting, contenders))
        total += starts * (setting.seconds["start"] + 2 * once) + rounds * once
        total += CHECK_SECONDS if name != setting.reference else 0
    return total

# SPDX-License-Identifier: Apache-2.0
"""Page: results as tables on the terminal, and as docs/benchmarks.md.

A result is a JSON file of one group: {part, group, settings, facts, rounds, errors, environment}. `facts[name]` holds
what does not change, `rounds[i][metric][name]` what was measured in a round. Ratios are taken within a round. All
results of a page come from one commit and one machine; others are refused.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bars import BARS, Bar
from benchmarks.contenders import SETTINGS, Setting
from benchmarks.counted import BATCH, LENGTH, REFERENCE, WIDTH
from benchmarks.environment import machine
from benchmarks.plan import Job
from benchmarks.profile import KINDS, NEW_TOKENS, PROFILED
from benchmarks.scoring import METRICS as SCORING_METRICS
from benchmarks.serving import LABELS as SERVING_LABELS
from benchmarks.training import GROUPS as TRAINING_GROUPS
from benchmarks.training import LABELS as TRAINING_LABELS

MEGA = 1e6
NOT_SETTLED = "not settled"
NOT_MEASURED = "not measured"
WIDEST = 0.25
"""Quartiles of a ratio that lie further apart than this share of it leave it open: it is printed as not settled."""
FEWEST = 3
"""A ratio of timings from fewer rounds is not settled either."""
HEADS = {"step": "step", "forward": "forward", "decode": "decoding, tokens/s", "saved": "kept for backward"}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds; of a fact, which does not change, the value alone."""

    median: float
    low: float
    high: float
    n: int
    is_ratio: bool = False
    is_fact: bool = False

    @classmethod
    def of(cls, values: Sequence[float], *, is_ratio: bool = False) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1, is_ratio)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values), is_ratio)

    @classmethod
    def of_fact(cls, value: float) -> Spread:
        """Of a value that is the same in every round."""
        return cls(value, value, value, 1, is_fact=True)

    @property
    def is_settled(self) -> bool:
        """Whether a ratio may be quoted: it has enough rounds, and its quartiles lie close together."""
        if not self.is_ratio or self.is_fact:
            return True
        return self.n >= FEWEST and self.high - self.low <= WIDEST * self.median

    def text(self, between: str = " ", digits: int = 2) -> str:
        """0.97 (0.95–0.99); the value alone where there is only one; `not settled` in the place of an open ratio."""
        if not self.is_settled:
            return NOT_SETTLED
        if self.n == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f}{between}({self.low:.{digits}f}–{self.high:.{digits}f})"


class MixedError(Exception):
    """Results come from more than one commit or machine."""


def load(folder: Path) -> list[dict[str, Any]]:
    """All groups that were measured into a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def to_json(results: list[dict[str, Any]]) -> str:
    """Results as one list, a line for each group, without the folder that they were measured into."""
    lines = []
    for result in results:
        settings = {key: value for key, value in result["settings"].items() if key != "out"}
        lines.append(json.dumps({**result, "settings": settings}, ensure_ascii=False))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def source_of(result: dict[str, Any]) -> str:
    """Commit and machine of a result, in words."""
    return f"commit {result['environment']['commit']} on {machine(result['environment'])}"


def check_one_source(results: list[dict[str, Any]]) -> None:
    """MixedError where results come from more than one commit or machine."""
    found: dict[str, list[str]] = {}
    for result in results:
        found.setdefault(source_of(result), []).append(f"{result['part']}-{result['group']}.json")
    if len(found) > 1:
        said = "; ".join(f"{', '.join(files)}: {source}" for source, files in found.items())
        raise MixedError(
            f"results of different commits or machines do not go into one table: {said}. Measure again with --resume,"
            " or delete the files that are not wanted"
        )


def of_part(results: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """The groups of a part, in the order in which its setting names them."""
    groups = [r for r in results if r["part"] == part]
    named = {"training": TRAINING_GROUPS, **{name: setting.groups for name, setting in SETTINGS.items()}}
    order = list(named.get(part, ()))
    return sorted(groups, key=lambda r: order.index(r["group"]) if r["group"] in order else len(order))


def spread(results: list[dict[str, Any]], part: str, metric: str, top: str, bottom: str | None = None) -> Spread | None:
    """The value of a contender, or its ratio to another in the same rounds; None where it was not measured."""
    for group in of_part(results, part):
        sides = [name for name in (top, bottom) if name is not None]
        if all(metric in group["facts"].get(name, {}) for name in sides):
            values = [group["facts"][name][metric] for name in sides]
            return Spread.of_fact(values[0] if bottom is None else values[0] / values[1])
        rounds = [r[metric] for r in group["rounds"] if all(name in r.get(metric, {}) for name in sides)]
        if rounds:
            values = [r[top] if bottom is None else r[top] / r[bottom] for r in rounds]
            return Spread.of(values, is_ratio=bottom is not None and top != bottom)
    return None


def limit(bar: Bar, results: list[dict[str, Any]]) -> float:
    """The limit of a bar on the processor that the results come from."""
    return bar.limit_on(results[0]["environment"]["cpu"]) if results else bar.limit


def verdict(bar: Bar, results: list[dict[str, Any]]) -> tuple[Spread | None, str]:
    """(what was measured, met / not met / not settled / not measured)."""
    found = spread(results, bar.part, bar.metric, bar.top, bar.bottom)
    if found is None:
        return None, NOT_MEASURED
    if not found.is_settled:
        return found, NOT_SETTLED
    bound = limit(bar, results)
    met = found.median <= bound if bar.at_most else found.median >= bound
    return found, "met" if met else "not met"


def bars(results: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(what, bar, measured, verdict) of every bar."""
    rows = []
    for bar in BARS:
        found, said = verdict(bar, results)
        digits = 0 if bar.bottom is None and bar.limit == 0 else 3 if bar.part == "counted" else 2
        bound = f"{'≤' if bar.at_most else '≥'} {limit(bar, results):g}"
        rows.append((bar.what, bound, found.text(digits=digits) if found else "–", said))
    return rows


def contenders(results: list[dict[str, Any]], part: str, between: str = " ") -> list[tuple[str, ...]]:
    """(label, parameters, step, forward, decode, saved, peak above the frozen model) of every contender."""
    setting, groups = SETTINGS[part], of_part(results, part)
    frozen = next((g["facts"]["frozen"]["peak"] for g in groups if "frozen" in g["facts"]), None)
    rows: list[tuple[str, ...]] = []
    for name, contender in setting.contenders.items():
        group = next((g for g in groups if name in g["facts"] or name in g["errors"]), None)
        if group is None:
            continue
        if name in group["errors"] and name not in group["facts"]:
            rows.append((contender.label, "–", *["failed"] * len(HEADS), "–"))
            continue
        facts = group["facts"][name]
        cells = []
        for metric in HEADS:
            found = spread([group], part, metric, name, setting.reference)
            cells.append(found.text(between) if found else "–")
        above = "–" if frozen is None else f"{(facts['peak'] - frozen) / MEGA:,.0f}"
        rows.append((contender.label, f"{facts['parameters']:,}", *cells, above))
    return rows


def absolute(results: list[dict[str, Any]], part: str) -> str:
    """The values that 1.00 stands for."""
    setting = SETTINGS[part]
    said = []
    for metric, unit, digits in (("step", "s a step", 3), ("forward", "s a forward pass", 3)):
        if found := spread(results, part, metric, setting.reference):
            said.append(f"{found.median:.{digits}f} {unit}")
    if found := spread(results, part, "decode", setting.reference):
        said.append(f"{found.median:.0f} tokens/s")
    if found := spread(results, part, "saved", setting.reference):
        said.append(f"{found.median / MEGA:,.0f} MB kept for backward")
    return f"1.00 is {setting.contenders[setting.reference].label}: {', '.join(said)}."


def rounds_of(results: list[dict[str, Any]], part: str) -> str:
    """Rounds of the groups of a setting: 12 (main, growth), 3 (family)."""
    groups: dict[int, list[str]] = {}
    for group in of_part(results, part):
        groups.setdefault(len(group["rounds"]), []).append(group["group"])
    return "rounds: " + ", ".join(f"{n} ({', '.join(names)})" for n, names in groups.items())


def training(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """(side, parameters, tokens, examples/s, ratio to TRL) of every side, from the first group that has it."""
    rows: list[tuple[str, ...]] = []
    groups = of_part(results, "training")
    for name, label in TRAINING_LABELS.items():
        for group in [group for group in groups if name in group["facts"] or name in group["errors"]][:1]:
            if name in group["errors"]:
                rows.append((label, "–", "–", "failed", "–"))
            elif facts := group["facts"].get(name):
                rate = spread([group], "training", "examples", name)
                ratio = spread([group], "training", "examples", name, "trl")
                size, tokens = f"{facts['parameters']:,}", f"{facts['tokens']:,}"
                rows.append((label, size, tokens, rate.text() if rate else "–", ratio.text() if ratio else "–"))
    return rows


def scoring(results: list[dict[str, Any]]) -> str:
    """The comparison in words."""
    for group in of_part(results, "scoring"):
        said = {}
        for metric in SCORING_METRICS:
            ours, plain = (spread([group], "scoring", metric, side) for side in ("dyads", "plain"))
            ratio = spread([group], "scoring", metric, "dyads", "plain")
            if not (ours and plain and ratio):
                return ""
            said[metric] = f"{ours.text()} and {plain.text()}, ratio {ratio.text()}"
        facts = group["facts"]["dyads"]
        return (
            f"{facts['examples']} prompts of all tasks, at most {facts['new_tokens']} new tokens each; examples/s of"
            f" dyads and of a loop of `generate` in file order: {said['per_second']}, in a process as users have it;"
            f" {said['per_second_kept']}, where glibc keeps freed memory, as for the tables above: `generate` copies"
            f" all keys and values at every step, dyads none. Predictions that differ: {facts['differing_fp32']} of"
            f" {facts['compared_fp32']} in fp32, {facts['differing']} of {facts['examples']} in the run's precision."
        )
    return ""


def serving(results: list[dict[str, Any]]) -> str:
    """The comparison in words."""
    for group in of_part(results, "serving"):
        rate = {side: spread([group], "serving", "per_second", side) for side in SERVING_LABELS}
        wait = spread([group], "serving", "first_token_p95", "dyads")
        if wait is None or not all(rate.values()):
            return ""
        facts = group["facts"]["dyads"]
        said = ", ".join(f"{label} {found.text(digits=1)}" for label, found in _labelled(rate) if found)
        return (
            f"{facts['clients']} clients at once over {facts['tasks']} tasks of one run, {facts['new_tokens']} new"
            f" tokens each, SmolLM2-135M in {facts['dtype']}; tokens/s: {said}. Time to the first token, 95th"
            f" percentile of the clients, who all come at the same moment: {wait.text()} s."
        )
    return ""


def _labelled(rate: dict[str, Spread | None]) -> list[tuple[str, Spread | None]]:
    return [(label, rate[side]) for side, label in SERVING_LABELS.items()]


def profiles(results: list[dict[str, Any]]) -> dict[str, list[tuple[str, ...]]]:
    """By profile: (side, time, ratio, floor, ratio of the floor, milliseconds by kind of work …) of every side.

    The floor is the frozen model's time in the same round, plus that of the products alone.
    """
    tables: dict[str, list[tuple[str, ...]]] = {}
    for group in of_part(results, "profile"):
        profiled = PROFILED[group["group"]]
        rounds, reference = [r[profiled.metric] for r in group["rounds"]], profiled.contenders[0]
        if not rounds:
            continue
        rows: list[tuple[str, ...]] = []
        for name, facts in group["facts"].items():
            alone = facts.get("products")
            step = Spread.of([r[name] * 1e3 for r in rounds])
            is_ratio = name != reference
            ratio = Spread.of([r[name] / r[reference] for r in rounds], is_ratio=is_ratio)
            floor = [] if alone is None else [(r["frozen"] + alone) / r[reference] for r in rounds]
            floors = Spread.of(floor, is_ratio=True) if floor else None
            rows.append(
                (
                    facts["label"],
                    f"{step.median:,.0f}",
                    ratio.text(),
                    "–" if alone is None else f"{alone * 1e3:,.0f}",
                    "–" if floors is None else floors.text(),
                    *(f"{facts['split'][kind]:,.0f}" for kind in KINDS),
                )
            )
        tables[group["group"]] = rows
    return tables


def title_of_profile(name: str) -> str:
    """The work that is profiled, and its setting."""
    work = "decoding" if PROFILED[name].metric == "decode" else "a training step"
    return f"{work}, {PROFILED[name].setting}"


def counted_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """(label, parameters, then launches, bytes and compiled calls with adapters in fp32, and in bf16) of every one."""
    rows: list[tuple[str, ...]] = []
    for group in of_part(results, "counted"):
        for name, facts in ((n, f) for n, f in group["facts"].items() if not n.endswith("-bf16")):
            cells = [facts["label"], f"{facts['parameters']:,}"]
            for dtype in ("", "-bf16"):
                for metric, unit, digits in (("launches", 1, 0), ("bytes", 1e9, 2), ("compiled", 1, 0)):
                    found = spread([group], "counted", metric, name + dtype)
                    ratio = spread([group], "counted", metric, name + dtype, REFERENCE + dtype)
                    cells.append(f"{found.median / unit:.{digits}f} ({ratio.median:.2f})" if found and ratio else "–")
            rows.append(tuple(cells))
    return rows


COUNTED_ABOUT = (
    f"Counted, not timed: no GPU was at hand. One frozen bf16 linear layer of {WIDTH:,} × {WIDTH:,} and its adapter,"
    f" in fp32 or in bf16, on {BATCH * LENGTH:,} tokens, forward and backward. Launches are PyTorch's operations other"
    " than views and allocations; bytes are those of every tensor that an operation reads or writes, caches aside. The"
    " frozen layer's two products count for every contender, and so does one operation for the loss. Compiled calls are"
    " the kernels, of Inductor and of libraries, that `torch.compile` calls in code generated for a CPU; for a GPU it"
    " may fuse otherwise. Ratios to PEFT LoRA with adapters of the same dtype are in brackets. X-LoRA and Arrow are"
    " left out: X-LoRA's gates come from a pass through the whole model, and Arrow trains nothing."
)
COUNTED_HEADS = (
    "contender",
    "parameters",
    *(f"{what}, {dtype}" for dtype in ("fp32", "bf16") for what in ("launches", "GB moved", "compiled calls")),
)
HOW = (
    f"Every contender runs in a process of its own, started anew after every {Setting.lives} rounds, because a process"
    " may be a few percent faster or slower than another of its kind for as long as it lives. glibc keeps freed memory"
    " in all of them (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`). In a round, every metric is measured once"
    " for every contender of a group, one after the other, in an order that rotates; warm-up is not measured. Ratios"
    " are taken within a round. Tables show the median over rounds and, in brackets, the quartiles. A ratio whose"
    f" quartiles are wider than a quarter of it, or that has fewer than {FEWEST} rounds, is printed as *{NOT_SETTLED}*."
    " Before anything was measured, outputs and gradients of the operator, of adapted layers and of whole models of"
    " dyads were compared with a double sum over rank-one terms. `python -m benchmarks --help` shows how to run a part."
)
ROUNDS = "[benchmarks.json](benchmarks.json) has every round."
PROFILE_HEADS = ("side", "ms", "÷ the first", "its products alone, ms", "floor ÷ the first", *KINDS)
CONTENDER_HEADS = ("contender", "parameters", *HEADS.values(), "peak above frozen, MB")


def failures(results: list[dict[str, Any]], part: str) -> list[str]:
    """Contenders that failed, with their reasons."""
    said = {}
    for group in of_part(results, part):
        for name, reason in group["errors"].items():
            label = SETTINGS[part].contenders[name].label if part in SETTINGS else TRAINING_LABELS.get(name, name)
            said[label if part in SETTINGS or part == "training" else f"{part} of {name}"] = reason
    return [f"{label} failed: {reason}" for label, reason in said.items()]


def plan_to_terminal(jobs: Sequence[Job], console: Console) -> None:
    """Print the groups that will be measured, with their rounds and estimated time."""
    table = Table("part", "group", "rounds", "has a bar", "minutes", title="plan, as two quiet cores would take it")
    for job in jobs:
        table.add_row(job.part, job.group, str(job.rounds), "yes" if job.has_bar else "", f"{job.seconds / 60:.1f}")
    with_bars, total = sum(job.seconds for job in jobs if job.has_bar), sum(job.seconds for job in jobs)
    table.caption = f"{total / 60:.0f} minutes, {with_bars / 60:.0f} of them for groups with a bar, which come first"
    console.print(table)


def to_terminal(results: list[dict[str, Any]], console: Console) -> None:
    """Print every table that has results."""
    for part in SETTINGS:
        if not of_part(results, part):
            continue
        short = ("contender", "param.", "step", "fwd", "tok/s", "kept", "MB")
        table = Table(*short, title=SETTINGS[part].title, caption=absolute(results, part), padding=(0, 1, 0, 0))
        for row in contenders(results, part, between="\n"):
            millions = "–" if row[1] == "–" else f"{int(row[1].replace(',', '')) / 1e6:.2f} M"
            cells = [cell.replace("(0.", "(.").replace("–0.", "–.") for cell in row[2:]]
            table.add_row(row[0], millions, *cells)
        console.print(table)
        for line in failures(results, part):
            console.print(line, markup=False)
    if rows := counted_rows(results):
        title = "one layer, counted and not timed; in brackets ÷ PEFT LoRA; compiled calls are on the page"
        short = ("launches, fp32", "GB", "launches, bf16", "GB")
        table = Table("contender", "param.", *short, title=title, padding=(0, 1, 0, 0))
        for row in rows:
            table.add_row(row[0], row[1], *row[2:4], *row[5:7])
        console.print(table)
        for line in failures(results, "counted"):
            console.print(line, markup=False)
    for name, rows in profiles(results).items():
        table = Table(*PROFILE_HEADS[:5], title=f"where the time goes: {title_of_profile(name)}")
        for row in rows:
            table.add_row(*row[:5])
        console.print(table)
    if rows := training(results):
        table = Table("side", "parameters", "tokens", "examples/s", "÷ TRL", title="a whole training run")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for line in failures(results, "training"):
            console.print(line, markup=False)
    if said := scoring(results):
        console.print(f"scoring: {said}", markup=False)
    if said := serving(results):
        console.print(f"serving: {said}", markup=False)
    for part in ("profile", "scoring", "serving"):
        for line in failures(results, part):
            console.print(line, markup=False)
    table = Table("what", "bar", "measured", "", title="bars")
    for what, limit, found, said in bars(results):
        if said != NOT_MEASURED:
            table.add_row(what, limit, found, said)
    if table.row_count:
        console.print(table)


def to_markdown(results: list[dict[str, Any]]) -> str:
    """The page; MixedError where the results come from more than one commit or machine."""
    check_one_source(results)
    dates = sorted({result["environment"]["date"][:10] for result in results})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    lines = [
        "# Benchmarks",
        "",
        "*What each adapter costs. Written by `python -m benchmarks --write-docs` (or `make bench`); do not edit.*",
        "",
        f"Every table was measured {when} at {source_of(results[0])}. {ROUNDS}",
        "",
        HOW,
        "",
        "## Bars",
        "",
        *_markdown(("what", "bar", "measured", "verdict"), [row for row in bars(results) if row[3] != NOT_MEASURED]),
    ]
    for part, setting in SETTINGS.items():
        if part == "tiny" or not of_part(results, part):
            continue
        attention = {r["settings"].get("attention") or setting.attention for r in of_part(results, part)}
        about = (
            f"{setting.about} {absolute(results, part)} Attention: {', '.join(attention)}; {rounds_of(results, part)}."
            f" Decoding is greedy: {setting.batch} prompts of {setting.prompt} tokens, {setting.new_tokens} new each."
        )
        lines += [
            "",
            f"## {setting.title}",
            "",
            about,
            "",
            *_markdown(CONTENDER_HEADS, contenders(results, part)),
        ]
        lines += [text for line in failures(results, part) for text in ("", line)]
    if rows := counted_rows(results):
        lines += ["", "## One layer on a GPU, counted", "", COUNTED_ABOUT, "", *_markdown(COUNTED_HEADS, rows)]
        lines += [text for line in failures(results, "counted") for text in ("", line)]
    for name, table in profiles(results).items():
        (rounds,) = (len(group["rounds"]) for group in of_part(results, "profile") if group["group"] == name)
        setting = SETTINGS[PROFILED[name].setting]
        sides = f"{setting.title}. All sides in one process, {rounds} rounds."
        if PROFILED[name].metric == "decode":
            about = (
                f"{sides} Timed: {NEW_TOKENS} new tokens for each of {setting.batch} prompts of {setting.prompt}"
                " tokens. The floor of an adapter is the frozen model plus the two products of every adapted layer"
                " timed alone: no gates, sums, casts or Python."
            )
        else:
            about = (
                f"{sides} The floor of an adapter is the step of the frozen model, with gradients down to its first"
                " adapted layers, plus the matrix products of every adapted layer timed alone, two forward and four"
                " backward: no gates, sums, casts, optimizer or Python."
            )
        about += (
            " Right of it stand the milliseconds by kind of work, as the profiler sees them; its own cost for every"
            " operation is in the last column."
        )
        lines += [
            "",
            f"## Where the time goes: {title_of_profile(name)}",
            "",
            about,
            "",
            *_markdown(PROFILE_HEADS, table),
        ]
    if rows := training(results):
        facts = of_part(results, "training")[0]["settings"]
        families = {f["family"] for f in of_part(results, "training")[0]["facts"].values()}
        about = (
            f"SmolLM2-135M, {facts['dtype']}, {facts['examples']} examples of family {', '.join(families)} in steps of"
            f" {facts['batch_size']} ({facts['accumulation']} parts each), {facts['threads']} threads; from loading the"
            f" model to the saved adapter; {rounds_of(results, 'training')}. dyads computes attention as its recipes do"
            " (eager); TRL as transformers chooses, unless the row says otherwise."
        )
        lines += [
            "",
            "## A whole training run",
            "",
            about,
            "",
            *_markdown(("side", "parameters", "tokens", "examples/s", "÷ TRL"), rows),
        ]
        lines += [text for line in failures(results, "training") for text in ("", line)]
    if said := scoring(results):
        lines += ["", "## Scoring", "", said]
    if said := serving(results):
        lines += ["", "## Serving", "", said]
    lines += [
        text for part in ("profile", "scoring", "serving") for line in failures(results, part) for text in ("", line)
    ]
    return "\n".join(line if line.startswith("|") else _wrapped(line) for line in lines) + "\n"


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, width=120, break_long_words=False, break_on_hyphens=False)


def _markdown(heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows)]

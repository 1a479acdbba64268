# SPDX-License-Identifier: Apache-2.0
"""How are results read? As tables on the terminal, and as the page docs/benchmarks.md.

A result is a JSON file of one group: {part, group, facts, rounds, errors, environment}. `facts[name]` is what does not
change, `rounds[i][question][name]` what was measured in a round. Ratios are taken within a round.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bars import BARS, TRIED, Bar
from benchmarks.contenders import SETTINGS, Setting
from benchmarks.counted import BATCH, LENGTH, REFERENCE, WIDTH
from benchmarks.profile import KINDS, NEW_TOKENS, PROFILED
from benchmarks.training import LABELS as TRAINING_LABELS

MEGA = 1e6
QUESTIONS = ("step", "forward", "decode", "saved")
HEADS = {"step": "step", "forward": "forward", "decode": "decoding, tokens/s", "saved": "kept for backward"}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def text(self, between: str = " ", digits: int = 2) -> str:
        """0.97 (0.95–0.99); the median alone where it was measured once."""
        if self.n == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f}{between}({self.low:.{digits}f}–{self.high:.{digits}f})"


def load(folder: Path) -> list[dict[str, Any]]:
    """All groups that were measured into a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def of_part(results: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """The groups of a part, in the order in which its setting names them."""
    groups = [r for r in results if r["part"] == part]
    order = list(SETTINGS[part].groups) if part in SETTINGS else []
    return sorted(groups, key=lambda r: order.index(r["group"]) if r["group"] in order else len(order))


def spread(
    results: list[dict[str, Any]], part: str, question: str, top: str, bottom: str | None = None
) -> Spread | None:
    """The value of a contender, or its ratio to another in the same rounds; None where it was not measured."""
    for group in of_part(results, part):
        sides = [name for name in (top, bottom) if name is not None]
        if all(question in group["facts"].get(name, {}) for name in sides):
            values = [group["facts"][name][question] for name in sides]
            return Spread.of([values[0] if bottom is None else values[0] / values[1]])
        rounds = [r[question] for r in group["rounds"] if all(name in r.get(question, {}) for name in sides)]
        if rounds:
            return Spread.of([r[top] if bottom is None else r[top] / r[bottom] for r in rounds])
    return None


def verdict(bar: Bar, results: list[dict[str, Any]]) -> tuple[Spread | None, str]:
    """(what was measured, met / not met / not measured)."""
    found = spread(results, bar.part, bar.question, bar.top, bar.bottom)
    if found is None:
        return None, "not measured"
    met = found.median <= bar.limit if bar.at_most else found.median >= bar.limit
    return found, "met" if met else "not met"


def bars(results: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(what, bar, measured, verdict) of every bar."""
    rows = []
    for bar in BARS:
        found, said = verdict(bar, results)
        limit = f"{'≤' if bar.at_most else '≥'} {bar.limit:g}"
        whole = bar.bottom is None and bar.limit == 0
        rows.append((bar.what, limit, found.text(digits=0 if whole else 2) if found else "–", said))
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
            rows.append((contender.label, "–", *["failed"] * len(QUESTIONS), "–"))
            continue
        facts = group["facts"][name]
        cells = []
        for question in QUESTIONS:
            found = spread([group], part, question, name, setting.reference)
            cells.append(found.text(between) if found else "–")
        above = "–" if frozen is None else f"{(facts['peak'] - frozen) / MEGA:,.0f}"
        rows.append((contender.label, f"{facts['parameters']:,}", *cells, above))
    return rows


def absolute(results: list[dict[str, Any]], part: str) -> str:
    """What 1.00 stands for."""
    setting = SETTINGS[part]
    said = []
    for question, unit, digits in (("step", "s a step", 3), ("forward", "s a forward pass", 3)):
        if found := spread(results, part, question, setting.reference):
            said.append(f"{found.median:.{digits}f} {unit}")
    if found := spread(results, part, "decode", setting.reference):
        said.append(f"{found.median:.0f} tokens/s")
    if found := spread(results, part, "saved", setting.reference):
        said.append(f"{found.median / MEGA:,.0f} MB kept for backward")
    return f"1.00 is {setting.contenders[setting.reference].label}: {', '.join(said)}."


def asked(results: list[dict[str, Any]], part: str) -> str:
    """How often every question was asked: rounds of steps 14, of forward passes 7, …; from – to where groups differ."""
    said = []
    for question, name in (("step", "steps"), ("forward", "forward passes"), ("decode", "decoding")):
        times = sorted({sum(question in r for r in group["rounds"]) for group in of_part(results, part)})
        said.append(f"of {name} {'–'.join(str(n) for n in dict.fromkeys((times[0], times[-1])))}")
    return f"rounds {', '.join(said)}"


def tried(results: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(the bars, what was tried) for all that is not met and that there is something to say about."""
    said: dict[str, list[str]] = {}
    for bar in BARS:
        if verdict(bar, results)[1] == "not met" and (text := TRIED.get((bar.question, bar.bottom or ""))):
            said.setdefault(text, []).append(bar.what)
    return [("; ".join(bars), text) for text, bars in said.items()]


def training(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """(side, parameters, tokens, examples/s, ratio to TRL) of every side."""
    rows: list[tuple[str, ...]] = []
    for group in of_part(results, "training"):
        for name, label in TRAINING_LABELS.items():
            if name in group["errors"]:
                rows.append((label, "–", "–", "failed", "–"))
            elif facts := group["facts"].get(name):
                rate = spread([group], "training", "examples", name)
                ratio = spread([group], "training", "examples", name, "trl")
                size, tokens = f"{facts['parameters']:,}", f"{facts['tokens']:,}"
                rows.append((label, size, tokens, rate.text() if rate else "–", ratio.text() if ratio else "–"))
    return rows


def scoring(results: list[dict[str, Any]]) -> str:
    """The comparison in a sentence or two."""
    for group in of_part(results, "scoring"):
        ours, plain = (spread([group], "scoring", "examples", side) for side in ("dyads", "plain"))
        ratio = spread([group], "scoring", "examples", "dyads", "plain")
        if ours and plain and ratio:
            facts = group["facts"]["dyads"]
            return (
                f"{facts['asked']} prompts of all tasks, at most {facts['new_tokens']} new tokens each: dyads"
                f" {ours.text()} examples/s, a plain loop of `generate` in file order {plain.text()}, ratio"
                f" {ratio.text()}. Answers that differ: {facts['differing_fp32']} of {facts['compared_fp32']} in fp32,"
                f" {facts['differing']} of {facts['asked']} in the run's own precision."
            )
    return ""


def profiles(results: list[dict[str, Any]]) -> dict[str, list[tuple[str, ...]]]:
    """By profile: (side, time, ratio, floor, ratio of the floor, milliseconds by kind of work …) of every side.

    The floor is what the frozen model took in the same round, plus the products alone.
    """
    tables: dict[str, list[tuple[str, ...]]] = {}
    for group in of_part(results, "profile"):
        asked = PROFILED[group["group"]]
        rounds, reference = [r[asked.question] for r in group["rounds"]], asked.contenders[0]
        if not rounds:
            continue
        rows: list[tuple[str, ...]] = []
        for name, facts in group["facts"].items():
            alone = facts.get("products")
            step = Spread.of([r[name] * 1e3 for r in rounds])
            ratio = Spread.of([r[name] / r[reference] for r in rounds])
            floors = None if alone is None else Spread.of([(r["frozen"] + alone) / r[reference] for r in rounds])
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


def profiled(name: str) -> str:
    """What a profile is of, in words."""
    work = "decoding" if PROFILED[name].question == "decode" else "a training step"
    return f"{work}, {PROFILED[name].setting}"


def counted_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """(label, parameters, then launches, bytes and compiled calls with adapters in fp32, and in bf16) of every one."""
    rows: list[tuple[str, ...]] = []
    for group in of_part(results, "counted"):
        for name, facts in ((n, f) for n, f in group["facts"].items() if not n.endswith("-bf16")):
            cells = [facts["label"], f"{facts['parameters']:,}"]
            for dtype in ("", "-bf16"):
                for question, unit, digits in (("launches", 1, 0), ("bytes", 1e9, 2), ("compiled", 1, 0)):
                    found = spread([group], "counted", question, name + dtype)
                    ratio = spread([group], "counted", question, name + dtype, REFERENCE + dtype)
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
PROFILE_HEADS = ("side", "ms", "÷ the first", "its products alone, ms", "floor ÷ the first", *KINDS)
CONTENDER_HEADS = ("contender", "parameters", *HEADS.values(), "peak above frozen, MB")


def failures(results: list[dict[str, Any]], part: str) -> list[str]:
    """What did not run, and why."""
    said = {}
    for group in of_part(results, part):
        for name, reason in group["errors"].items():
            label = SETTINGS[part].contenders[name].label if part in SETTINGS else TRAINING_LABELS.get(name, name)
            said[label if part in SETTINGS or part == "training" else f"{part} of {name}"] = reason
    return [f"{label} failed: {reason}" for label, reason in said.items()]


def to_terminal(results: list[dict[str, Any]], console: Console) -> None:
    """Print every table that there is something for."""
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
        table = Table(*COUNTED_HEADS, title="one layer, counted and not timed; in brackets ÷ PEFT LoRA")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for line in failures(results, "counted"):
            console.print(line, markup=False)
    for name, rows in profiles(results).items():
        table = Table(*PROFILE_HEADS[:5], title=f"where the time goes: {profiled(name)}")
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
    for part in ("profile", "scoring"):
        for line in failures(results, part):
            console.print(line, markup=False)
    table = Table("what", "bar", "measured", "", title="bars")
    for what, limit, found, said in bars(results):
        if said != "not measured":
            table.add_row(what, limit, found, said)
    if table.row_count:
        console.print(table)


def to_markdown(results: list[dict[str, Any]]) -> str:
    """The page."""
    environments = [r["environment"] for r in results]
    dates = sorted({e["date"][:10] for e in environments})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    measured = f"Measured {when} on {'; and on '.join(dict.fromkeys(map(_machine, environments)))}."
    lines = [
        "# Benchmarks",
        "",
        "*Which adapter costs what? Made by `python -m benchmarks --write-docs` (or `make bench`); do not edit.*",
        "",
        measured,
        "",
        _computed(results),
        "",
        f"Every contender runs in a process of its own, started anew after every {Setting.lives} rounds, as it may be",
        "faster or slower than another of its kind for as long as it lives. For all alike, glibc is told to keep",
        "what is freed (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`). When a question's turn comes, it goes",
        "once to all contenders of a group that have it, one after the other, in an order that rotates: a step is",
        "asked in every round, what takes longer in some only in every second or fourth. Ratios are taken within a",
        "round. Shown are the median over rounds and, in brackets, the quartiles. Warm-up is not counted. Before",
        "anything was measured, the operator, adapted layers and whole models of our methods were compared with the",
        "plain double sum, outputs and gradients.",
        "`python -m benchmarks --help` says how to run a part of it.",
        "",
        "## What it must reach",
        "",
        *_markdown(("what", "bar", "measured", "verdict"), bars(results)),
    ]
    for part, setting in SETTINGS.items():
        if part == "tiny" or not of_part(results, part):
            continue
        attention = {r["settings"].get("attention") or setting.attention for r in of_part(results, part)}
        about = (
            f"{setting.about} {absolute(results, part)} Attention: {', '.join(attention)}; {asked(results, part)}."
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
        if PROFILED[name].question == "decode":
            about = (
                f"{sides} What is timed is answering {setting.batch} prompts of {setting.prompt} tokens with"
                f" {NEW_TOKENS} tokens each. The floor of an adapter is the frozen model plus the two products of every"
                " adapted layer timed alone: no gates, sums, casts or Python."
            )
        else:
            about = (
                f"{sides} The floor of an adapter is the step of the frozen model, with gradients down to its first"
                " adapted layers, plus the matrix products of every adapted layer timed alone, two forward and four"
                " backward: no gates, sums, casts, optimizer or Python. All of these by PyTorch: products by a unit for"
                " bf16 may lie below it."
            )
        about += (
            " Right of it, the milliseconds by kind of work, as the profiler sees them: compiled gates count as"
            " softmax, and its own cost for every operation is in the last column."
        )
        lines += ["", f"## Where the time goes: {profiled(name)}", "", about, "", *_markdown(PROFILE_HEADS, table)]
    if rows := training(results):
        facts = of_part(results, "training")[0]["settings"]
        families = {f["family"] for f in of_part(results, "training")[0]["facts"].values()}
        about = (
            f"SmolLM2-135M, {facts['dtype']}, {facts['examples']} examples of family {', '.join(families)} in steps of"
            f" {facts['batch_size']} ({facts['accumulation']} parts each), {facts['threads']} threads; from loading the"
            " model to the saved adapter. dyads computes attention as its recipes do (eager); TRL as transformers"
            " chooses, unless the row says otherwise."
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
    lines += [text for part in ("profile", "scoring") for line in failures(results, part) for text in ("", line)]
    if texts := tried(results):
        lines += ["", "## What was tried where a bar is not met"]
        lines += [line for what, text in texts for line in ("", f"*{what}.* {text}")]
    return "\n".join(lines) + "\n"


def _machine(environment: dict[str, Any]) -> str:
    """Processor and versions: groups that differ in them are not to be compared."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    cpu, cores = environment["cpu"], environment["cores"]
    return f"{cpu} ({cores} cores), Python {environment['python']}, {versions}"


def _computed(results: list[dict[str, Any]]) -> str:
    """What computed dyads' softmax gates and its products in fp32, and in which groups it was something else."""
    gates: dict[Any, str] = {None: "by PyTorch's operations"}
    tiles = {True: "by the processor's unit for bf16, to the accuracy of fp32", False: "by PyTorch", None: "by PyTorch"}
    for result in results:
        compiler = result["environment"].get("compiler")
        gates.setdefault(compiler, f"by code that {compiler} compiled")
    by_gates, by_tiles = _by(results, "compiler", gates), _by(results, "tiles", tiles)
    return (
        f"Where a row does not say otherwise, softmax gates of dyads were computed {by_gates}; the products of the"
        f" layers that it adapts, where they are in fp32 on a CPU, {by_tiles}."
    )


def _by(results: list[dict[str, Any]], fact: str, said: dict[Any, str]) -> str:
    groups: dict[str, list[str]] = {}
    for result in results:
        groups.setdefault(said[result["environment"].get(fact)], []).append(f"{result['part']} {result['group']}")
    return "; ".join(f"{what} ({', '.join(where)})" if len(groups) > 1 else what for what, where in groups.items())


def _markdown(heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows)]

# SPDX-License-Identifier: Apache-2.0
"""Outcome of a study: a comparison for each table, curves of the validation loss, and the verdict of every claim.

verdict.json holds what a repeated study gives again, so no times; verdict.md is the same as a page, with the tables of
`dyads compare`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from dyads.comparing.comparison import Column, Comparison, compare
from dyads.comparing.intervals import Interval
from dyads.comparing.tables import counted, fixed, to_markdown
from dyads.errors import visible
from dyads.markdown import markdown_table
from dyads.runs.folder import RunFolder
from dyads.studies.grid import Cell, Combination, Study
from dyads.studies.progress import StudyFolder
from dyads.studies.verdicts import Claim, Judgement, claims_of, judge

__all__ = [
    "Choice",
    "Curve",
    "Outcome",
    "claims_table",
    "curves_table",
    "of_other_recipes",
    "outcome_of",
    "to_json",
    "to_page",
]

SCHEMA = 1
_CURVE_STEPS = 8


@dataclass(frozen=True)
class Choice:
    """The validation losses of a group's trials, and the value with the lowest."""

    label: str
    key: str
    losses: dict[Any, float]
    """By value; inf for a training that diverged."""
    best: Any


Curve = dict[int, float]
"""Validation loss by step."""


@dataclass(frozen=True)
class Outcome:
    """What a study found, as far as it has run."""

    name: str
    left: int
    """Cells without scores."""
    changed: int
    """Cells whose runs in the folder have another recipe: they are left out."""
    comparisons: dict[Combination, Comparison]
    """By table; a table without a scored run is missing."""
    curves: dict[Combination, dict[str, dict[int, Curve]]]
    """By table, label and seed; runs that logged no validation loss are missing."""
    judgements: tuple[Judgement, ...]
    choices: tuple[Choice, ...]


def outcome_of(
    study: Study,
    cells: Mapping[Combination, Cell],
    folder: StudyFolder,
    choices: Sequence[Choice] = (),
    changed: Collection[str] = (),
    but: Collection[str] = (),
) -> Outcome:
    """The outcome of the cells that are scored, but for those with the names `but`, which will be.

    Those with the names `changed` have other recipes, and are left out.
    """
    tables: dict[Combination, dict[str, Cell]] = {}
    for combination, cell in cells.items():
        tables.setdefault(study.table_of(combination), {})[cell.name] = cell
    claims = claims_of(study, cells)
    baseline = _baseline(study, cells, claims)
    comparisons: dict[Combination, Comparison] = {}
    curves: dict[Combination, dict[str, dict[int, Curve]]] = {}
    left: set[str] = set()
    for table, by_name in tables.items():
        scored = [cell for name, cell in by_name.items() if name not in {*changed, *but} and folder.run(cell).is_scored]
        left |= by_name.keys() - {cell.name for cell in scored} - set(changed)
        labels = {cell.label for cell in scored}
        if scored:
            wanted = next((label for label in baseline.get(table, ()) if label in labels), None)
            comparisons[table] = compare([folder.run(cell) for cell in scored], baseline=wanted)
        for cell in scored:
            if curve := _curve(folder.run(cell)):
                curves.setdefault(table, {}).setdefault(cell.label, {})[cell.recipe.seed] = curve
    judgements = judge(claims, comparisons)
    return Outcome(study.spec.name, len(left), len(changed), comparisons, curves, judgements, tuple(choices))


def _baseline(study: Study, cells: Mapping[Combination, Cell], claims: Sequence[Claim]) -> dict[Combination, list[str]]:
    """The labels, by table, that differences may refer to: those of `baseline`, or the one that all claims name."""
    found: dict[Combination, list[str]] = {}
    for claim in claims:
        columns = found.setdefault(claim.table, [])
        if claim.column not in columns:
            columns.append(claim.column)
    if study.spec.baseline is None:
        return {table: columns for table, columns in found.items() if len(columns) == 1}
    value = study.find(study.spec.baseline, "baseline")
    named: dict[Combination, list[str]] = {}
    for combination, cell in cells.items():
        if value in combination:
            named.setdefault(study.table_of(combination), []).append(cell.label)
    # Of several labels with that value, those of claims come first.
    return {table: sorted(labels, key=lambda x: x not in found.get(table, ())) for table, labels in named.items()}


def _curve(run: RunFolder) -> Curve:
    """The validation losses of a run; a resumed run logs some steps twice, and the later line replaces the earlier."""
    lines = [line for line in run.log() if line.get("event") == "validated" and "step" in line]
    points = {int(line["step"]): line["validation_loss"] for line in lines}
    return {step: math.inf if loss is None else float(loss) for step, loss in sorted(points.items())}


# --- JSON -------------------------------------------------------------------------------------------------------------


def to_json(outcome: Outcome) -> str:
    """Everything but times; unknown bounds and infinite losses are null."""
    content = {
        "schema": SCHEMA,
        "study": outcome.name,
        "left": outcome.left,
        "changed": outcome.changed,
        "claims": [_claim(judgement) for judgement in outcome.judgements],
        "tables": [
            {
                "where": _where(table),
                "split": comparison.split,
                "tasks": [dataclasses.asdict(task) for task in comparison.tasks],
                "columns": [_column(column, comparison) for column in comparison.columns],
                "curves": {
                    label: [{"seed": seed, "losses": [list(p) for p in c.items()]} for seed, c in by_seed.items()]
                    for label, by_seed in outcome.curves.get(table, {}).items()
                },
            }
            for table, comparison in outcome.comparisons.items()
        ],
        "chosen": [
            {"label": c.label, "key": c.key, "value": c.best, "losses": [list(p) for p in c.losses.items()]}
            for c in outcome.choices
        ],
    }
    return visible(json.dumps(_finite(content), ensure_ascii=False, indent=1, allow_nan=False), keep="\n") + "\n"


def _claim(found: Judgement) -> dict[str, Any]:
    claim = found.claim
    plain = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "claim"}
    return {
        "claim": claim.text,
        "row": claim.row,
        "column": claim.column,
        "on": claim.spec.on,
        "where": _where(claim.where),
        **plain,
    }


def _column(column: Column, comparison: Comparison) -> dict[str, Any]:
    kept = ("label", "method", "given_task", "parameters", "steps", "seeds", "micro_by_seed", "macro_by_seed")
    scores = {task.task: _interval(score) for task, score in zip(comparison.tasks, column.scores, strict=True)}
    return {
        **{key: getattr(column, key) for key in kept},
        "micro": _interval(column.micro),
        "macro": _interval(column.macro),
        "scores": scores,
    }


def _interval(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _where(combination: Combination) -> dict[str, str]:
    return {value.axis: value.name for value in combination}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- tables -----------------------------------------------------------------------------------------------------------


def _claim_rows(judgements: Iterable[Judgement]) -> list[list[str]]:
    rows = []
    for found in judgements:
        value = "–" if found.value is None else fixed(found.value, "+")
        interval = "–"
        if found.low is not None and found.high is not None:
            interval = f"{fixed(found.low)} to {fixed(found.high)} ({100 * (found.level or 0):.3g} %)"
        p = "–" if found.corrected_p is None else f"{found.corrected_p:.3f}"
        rows.append([found.claim.text, found.verdict, value, interval, p, found.needs])
    return rows


_CLAIM_HEADER = ("claim", "verdict", "difference", "corrected interval", "corrected p", "what would decide it")


def _curve_rows(curves: Mapping[str, Mapping[int, Curve]]) -> tuple[list[str], list[list[str]]]:
    """Mean validation loss over seeds at a few steps, the last among them."""
    steps = sorted({step for by_seed in curves.values() for curve in by_seed.values() for step in curve})
    every = max(1, math.ceil(len(steps) / _CURVE_STEPS))
    shown = steps[::-1][::every][::-1]
    rows = []
    for label, by_seed in curves.items():
        cells = []
        for step in shown:
            losses = [curve[step] for curve in by_seed.values() if step in curve]
            cells.append(f"{fmean(losses):.4f}" if losses else "")
        rows.append([label, *cells])
    return ["validation loss at step", *(f"{step:,}" for step in shown)], rows


def _choice_rows(choices: Sequence[Choice]) -> tuple[list[str], list[list[str]]]:
    values = list(dict.fromkeys(value for choice in choices for value in choice.losses))
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    rows = []
    for choice in choices:
        marks = {v: "*" if v == choice.best else "" for v in choice.losses}
        rows.append([choice.label, *(f"{choice.losses[v]:.4f}{marks[v]}" if v in marks else "" for v in values)])
    return [f"validation loss at {choices[0].key}", *map(str, values)], rows


def claims_table(outcome: Outcome) -> Table:
    """The verdicts with what they rest on, for a terminal."""
    table = Table(
        title="Claims", title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for text, verdict, value, interval, p, needs in _claim_rows(outcome.judgements):
        table.add_row(verdict, visible(text))
        if value != "–":
            table.add_row("", f"{value}, {interval}, corrected p {p}")
        if needs:
            table.add_row("", visible(f"to decide it: {needs}" if verdict == "undecided" else needs))
    return table


def curves_table(outcome: Outcome, table: Combination) -> Table | None:
    """The validation losses of a table's runs, for a terminal; None where there are none."""
    if table not in outcome.curves:
        return None
    header, rows = _curve_rows(outcome.curves[table])
    return _terminal("Curves, means over seeds", header, rows)


def choices_table(outcome: Outcome) -> Table:
    """The losses that `choose` compared, for a terminal."""
    header, rows = _choice_rows(outcome.choices)
    return _terminal("Chosen (*)", header, rows)


def _terminal(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(visible(name), overflow="fold", justify="right" if i else "left", no_wrap=bool(i))
    for row in rows:
        table.add_row(*map(visible, row))
    return table


def to_page(outcome: Outcome) -> str:
    """The outcome as a page in GitHub's Markdown."""
    out = [f"# Study {outcome.name}", ""]
    if outcome.left:
        out += [f"{outcome.left} runs have no scores yet; claims about them are open.", ""]
    if outcome.changed:
        out += [f"{of_other_recipes(outcome)}.", ""]
    if outcome.judgements:
        out += ["## Claims", "", *markdown_table(_CLAIM_HEADER, _claim_rows(outcome.judgements), left=2), ""]
        out += [*(f"- {note}" for note in _about_claims(outcome)), ""]
    if outcome.choices:
        header, rows = _choice_rows(outcome.choices)
        marked = [[f"**{cell[:-1]}**" if cell.endswith("*") else cell for cell in row] for row in rows]
        out += ["## Choice by validation loss", "", *markdown_table(header, marked), ""]
    for table, comparison in outcome.comparisons.items():
        title = ", ".join(f"{value.axis} {value.name}" for value in table)
        out += [f"## {title or 'Scores'}", "", to_markdown(comparison)]
        if table in outcome.curves:
            header, rows = _curve_rows(outcome.curves[table])
            out += ["### Curves", "", "Means over seeds.", "", *markdown_table(header, rows), ""]
    return visible("\n".join(out).rstrip("\n"), keep="\n") + "\n"


def of_other_recipes(outcome: Outcome) -> str:
    """The runs that the outcome leaves out."""
    return f"left out: {counted(outcome.changed, 'run')} of another recipe than the study's; claims about them are open"


def _about_claims(outcome: Outcome) -> list[str]:
    families: dict[str, int] = {}
    for found in outcome.judgements:
        families[found.claim.spec.on] = families.get(found.claim.spec.on, 0) + 1
    sizes = ", ".join(f"{n} on {metric}" for metric, n in families.items())
    meaning = (
        "supported: the interval of the difference lies where the claim says; not supported: it lies elsewhere;"
        " undecided: in both; open: runs are missing"
    )
    correction = (
        f"Holm's correction over the study's claims ({sizes}): the chance of any false verdict on a metric is at most"
        " 5 %; each interval has the level at which its claim was tested"
    )
    return [meaning, correction]

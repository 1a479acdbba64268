# SPDX-License-Identifier: Apache-2.0
"""Progress of a study, read off its folder: the state of every run, the time left, and the table of the grid."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from rich.table import Table

from dyads.errors import visible
from dyads.runs.folder import RunFolder
from dyads.studies.grid import SEED, Cell, Combination, Study
from dyads.studies.jobs import is_running, last_line

__all__ = ["CellState", "StudyFolder", "grid_table", "seconds_left", "state_of"]

State = Literal["done", "running", "interrupted", "failed", "left"]


class StudyFolder:
    """The files of a study: a run folder per cell, and beside them its recipes, logs, trials and verdicts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, cell: Cell) -> RunFolder:
        """The run folder of a cell."""
        return RunFolder(self.path / cell.name)

    def recipe(self, cell: Cell) -> Path:
        """The file of a cell's resolved recipe."""
        return self.path / "recipes" / f"{cell.name}.yaml"

    def log(self, cell: Cell) -> Path:
        """The output of a cell's last process."""
        return self.path / "logs" / f"{cell.name}.txt"

    @property
    def trials(self) -> StudyFolder:
        """The trainings that `choose` compares."""
        return StudyFolder(self.path / "choose")

    @property
    def verdict_json(self) -> Path:
        """Scores, curves and verdicts, to be read by programs."""
        return self.path / "verdict.json"

    @property
    def verdict_md(self) -> Path:
        """The same as a page."""
        return self.path / "verdict.md"


@dataclass(frozen=True)
class CellState:
    """How far a cell is."""

    state: State
    step: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    score: float | None = None
    """Mean over tasks of a run that is done."""
    reason: str = ""
    """Of a failed one: the last line of its log."""


def state_of(cell: Cell, folder: StudyFolder) -> CellState:
    """The state of a cell, whichever process runs it."""
    run = folder.run(cell)
    if run.is_scored:
        scores = run.scores()
        seconds = scores["seconds"]
        return CellState("done", cell.steps, seconds["train"], seconds["evaluate"], scores["macro"]["headline"])
    lines = [line for line in (run.log() if run.is_run else []) if "step" in line and line.get("seconds") is not None]
    step, seconds_so_far = (int(lines[-1]["step"]), float(lines[-1]["seconds"])) if lines else (0, 0.0)
    if is_running(folder.log(cell)):
        return CellState("running", step, seconds_so_far)
    reason, failed = last_line(folder.log(cell))
    if failed:
        return CellState("failed", step, seconds_so_far, reason=reason)
    return CellState("interrupted" if run.is_run else "left", step, seconds_so_far)


def seconds_left(
    cells: Collection[Cell], states: Mapping[str, CellState], workers: int, selected: Container[str]
) -> float | None:
    """Expected seconds until the selected cells are done, by all of the same label, else by all; None: unknown."""
    pace: dict[str | None, list[float]] = {}
    scoring: dict[str | None, list[float]] = {}
    for cell in cells:
        state = states[cell.name]
        for label in (cell.label, None):
            if cell.steps and state.step and state.train_seconds:
                pace.setdefault(label, []).append(state.train_seconds / state.step)
            if state.state == "done":
                scoring.setdefault(label, []).append(state.evaluate_seconds)
    total = 0.0
    for cell in cells:
        state = states[cell.name]
        if state.state == "done" or cell.name not in selected:
            continue
        if cell.steps:
            known = pace.get(cell.label) or pace.get(None)
            if known is None:
                return None
            total += fmean(known) * max(cell.steps - state.step, 0)
        score = scoring.get(cell.label) or scoring.get(None)
        if score is not None:
            total += fmean(score)
    return total / max(workers, 1)


def grid_table(
    study: Study, cells: Mapping[Combination, Cell], states: Mapping[str, CellState], waiting: Iterable[Combination]
) -> Table:
    """The grid: a row per combination of the axes but the seed, a column per seed."""
    seeds = [v.name for v in study.axes.get(SEED, ())]
    table = Table(
        title=visible(f"Study {study.spec.name}"), title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False
    )
    for axis in study.axes:
        if axis != SEED:
            table.add_column(visible(axis), overflow="fold")
    for head in [f"seed {seed}" for seed in seeds] or ["run"]:
        table.add_column(visible(head), justify="right", no_wrap=True)
    waits = set(waiting)
    rows: dict[Combination, dict[str, str]] = {}
    shown: set[str] = set()
    for combination, cell in cells.items():
        group = study.group_of(combination)
        seed = next((v.name for v in combination if v.axis == SEED), "")
        again = cell.name in shown  # an untrained run that stands in an earlier place
        shown.add(cell.name)
        text = "" if again else "waits for choose" if group in waits else _text(cell, states[cell.name])
        rows.setdefault(group, {})[seed] = text
    for group, by_seed in rows.items():
        if any(by_seed.values()):
            table.add_row(*(visible(v.name) for v in group), *(by_seed.get(seed, "") for seed in seeds or [""]))
    return table


def _text(cell: Cell, state: CellState) -> str:
    if state.state == "done":
        return f"done {state.score:.1f}"
    if state.state in ("running", "interrupted") and cell.steps:
        return f"{state.state} {state.step:,}/{cell.steps:,}"
    return state.state

# SPDX-License-Identifier: Apache-2.0
"""Runner of a study: it starts the runs that are not done, watches them, and writes what they found.

Every run is an ordinary run folder, trained and scored by a process of its own that can be killed at any moment; a
study that is started again keeps complete runs and continues the others from their last checkpoints.
"""

from __future__ import annotations

import fnmatch
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dyads.console import Reporter, Tracker
from dyads.errors import ConfigError, RunError, did_you_mean, shortened
from dyads.recipe.spec import differences
from dyads.recipe.yaml_source import to_yaml
from dyads.runs.manifest import write_text
from dyads.studies.choice import check_choice, next_values, trial, validation_loss
from dyads.studies.grid import Cell, Combination, Study, scored_differences
from dyads.studies.jobs import ENGINES, Engine, Job, is_running, last_line
from dyads.studies.outcome import Choice, Outcome, outcome_of, to_json, to_page
from dyads.studies.progress import CellState, StudyFolder, seconds_left, state_of
from dyads.studies.verdicts import claims_of

__all__ = ["Runner"]

_DIVERGED = "is not finite"
"""In the error of a training that diverged."""


@dataclass
class Runner:
    """A study in its folder."""

    study: Study
    folder: StudyFolder
    only: Sequence[str] = ()
    """Patterns of the names of cells, as in a shell: those that match one are run. Empty: all."""
    failed: dict[str, str] = field(default_factory=dict)
    """The last lines of the logs of runs that failed, by name."""

    def __post_init__(self) -> None:
        choose = self.study.spec.choose
        cells = self.study.cells()
        self.trials: dict[Combination, dict[Any, Cell]] = {}
        """The short trainings of every group that `choose` chooses for, by value."""
        if choose is not None:
            for combination, cell in cells.items():
                group = self.study.group_of(combination)
                if cell.recipe.method.trains and cell.recipe.adapt is None and group not in self.trials:
                    self.trials[group] = {value: trial(self.study, combination, value) for value in choose.values}
        self.cells = self.study.cells(self.chosen()) if self.trials else cells
        self._selected = self._select()

    def _select(self) -> set[str]:
        names = sorted({cell.name for cell in self.cells.values()})
        selected: set[str] = set()
        for pattern in self.only:
            found = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
            if not found:
                raise ConfigError(f"--only {pattern}: no cell has such a name{did_you_mean(pattern, names)}")
            selected |= found
        return selected if self.only else set(names)

    # choice

    def losses(self, group: Combination) -> dict[Any, float]:
        """The validation losses of a group's trials that are complete, or diverged."""
        found: dict[Any, float] = {}
        for value, cell in self.trials[group].items():
            run = self.folder.trials.run(cell)
            loss = validation_loss(run)
            if loss is None and run.is_run and not is_running(log := self.folder.trials.log(cell)):
                reason, failed = last_line(log)
                loss = math.inf if failed and _DIVERGED in reason else None
            if loss is not None:
                found[value] = loss
        return found

    def chosen(self) -> dict[Combination, Any]:
        """The values of the groups whose trials are complete, those excepted whose trials all diverged."""
        found: dict[Combination, Any] = {}
        for group in self.trials:
            losses = self.losses(group)
            if not self._next(losses) and not math.isinf(min(losses.values())):
                found[group] = min(losses, key=lambda value: losses[value])
        return found

    def _next(self, losses: Mapping[Any, float]) -> list[Any]:
        choose = self.study.spec.choose
        assert choose is not None
        return next_values(choose.values, choose.start, losses)

    def choices(self) -> list[Choice]:
        """The choices that are made, for tables."""
        choose = self.study.spec.choose
        labels = {self.study.group_of(combination): cell.label for combination, cell in self.cells.items()}
        result = []
        for group, value in self.chosen().items():
            assert choose is not None
            place = [v.name for v in self.study.table_of(group)]
            result.append(Choice(", ".join([labels[group], *place]), choose.key, self.losses(group), value))
        return result

    # states

    def waiting(self) -> set[Combination]:
        """Groups whose value is not chosen yet."""
        return self.trials.keys() - self.chosen().keys()

    def distinct(self) -> dict[str, Cell]:
        """Every cell once, by name."""
        return {cell.name: cell for cell in self.cells.values()}

    def selected(self) -> dict[Combination, Cell]:
        """The cells that `only` selects."""
        return {combination: cell for combination, cell in self.cells.items() if cell.name in self._selected}

    def states(self) -> dict[str, CellState]:
        """The state of every cell by name."""
        waiting = self._waiting_cells()
        return {
            name: CellState("left") if name in waiting and state.state == "done" else state
            for name, cell in self.distinct().items()
            for state in [state_of(cell, self.folder)]
        }

    def _waiting_cells(self) -> set[str]:
        """The names of the cells of waiting groups: whether their scores count depends on the choice."""
        waiting = self.waiting()
        return {cell.name for combination, cell in self.cells.items() if self.study.group_of(combination) in waiting}

    def changed(self) -> list[str]:
        """A line for every selected run in the folder whose recipe is another than the study's."""
        found = {name: text for name, text in self._changed_cells().items() if name in self._selected}
        for by_value in self.trials.values():
            for cell in by_value.values():
                found[f"choose/{cell.name}"] = self._difference(cell, self.folder.trials)
        return [f"{name}: {difference}" for name, difference in found.items() if difference]

    def _changed_cells(self) -> dict[str, str]:
        choose, waiting = self.study.spec.choose, self._waiting_cells()
        found = {
            name: self._difference(cell, self.folder, but=(choose.key,) if choose and name in waiting else ())
            for name, cell in self.distinct().items()
        }
        return {name: difference for name, difference in found.items() if difference}

    def _difference(self, cell: Cell, folder: StudyFolder, but: Collection[str] = ()) -> str:
        """The keys, but for those in `but`, in which the run in the folder has another recipe than the cell."""
        run = folder.run(cell)
        if not run.is_run:
            return ""
        changed = differences(run.recipe().resolved(), cell.recipe.resolved())
        return ", ".join(
            f"{key} is {then!r} there, {now!r} here" for key, (then, now) in changed.items() if key not in but
        )

    # running

    def check(self) -> dict[str, int]:
        """Refuse what can be refused before anything trains; the counted parameters by cell."""
        from dyads.studies.parameters import check_budget, scored_names  # imports torch

        self._check_recipes()
        self._check_tables()
        claims = claims_of(self.study, self.cells)
        for claim in claims:
            names = () if claim.spec.on in ("macro", "micro") else scored_names(claim.runs[0].recipe)
            if names and claim.spec.on not in names:
                raise ConfigError(
                    f"{self.study.path}: a claim is 'on: {claim.spec.on}', neither macro, micro nor a task"
                    + did_you_mean(claim.spec.on, names)
                )
        if self.study.spec.baseline is not None:
            self.study.find(self.study.spec.baseline, "baseline")
        check_choice(self.study, self.cells)
        changed = self.changed()
        if changed:
            raise RunError(
                f"'{self.folder.path}' holds runs of other recipes than {self.study.path} describes:\n  "
                + "\n  ".join(changed)
                + "\nUndo the change, delete those folders, or choose another --out."
            )
        return check_budget(self.study, self.cells)

    def _check_recipes(self) -> None:
        seen = set()
        for cell in self.cells.values():
            resolved = cell.recipe.resolved()
            key = to_yaml([resolved["method"], resolved["train"]["trainer"]])
            if key not in seen:
                seen.add(key)
                try:
                    cell.recipe.check()
                except ConfigError as error:
                    raise ConfigError(f"{self.study.path} (cell {cell.name}): {error}") from error

    def _check_tables(self) -> None:
        """Refuse an `adjust` by which one cell of a table would be scored on something else than the others."""
        first: dict[Combination, Cell] = {}
        for combination, cell in self.cells.items() if self.study.spec.adjust else ():
            if cell.recipe.method.trains:
                one = first.setdefault(self.study.table_of(combination), cell)
                for key, (left, right) in scored_differences(one.recipe, cell.recipe).items():
                    raise ConfigError(
                        f"{self.study.path}: '{one.name}' and '{cell.name}' are in one table, but by 'adjust' they"
                        f" differ in {key} ({shortened(str(left))} and {shortened(str(right))}): set it on an axis,"
                        " which then has a table for each value"
                    )

    def run(self, *, workers: int, engine: str, reporter: Reporter) -> Outcome:
        """Run what is not done, with a line of progress, and write the outcome."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        pending, waiting = [], self._waiting_cells()
        for cell in self._selected_cells():
            run = self.folder.run(cell)
            if run.is_scored and cell.name not in waiting:
                run.clear_ended()
            else:
                pending.append(cell)
        if pending:
            started = ENGINES[engine](workers)
            try:
                self._loop(started, workers, reporter)
            finally:
                started.close()
        diverged = {group for group in self.waiting() if not self._next(self.losses(group))}
        for combination, cell in self.selected().items():
            if self.study.group_of(combination) in diverged:
                self.failed.setdefault(cell.name, "every value of 'choose' diverged: give it lower ones")
        return self.conclude()

    def conclude(self) -> Outcome:
        """The outcome so far, written into the folder."""
        changed, waiting = self._changed_cells(), self._waiting_cells()
        outcome = outcome_of(self.study, self.cells, self.folder, self.choices(), changed=changed, but=waiting)
        for path, text in ((self.folder.verdict_md, to_page(outcome)), (self.folder.verdict_json, to_json(outcome))):
            write_text(path, text)
        return outcome

    def _loop(self, engine: Engine, workers: int, reporter: Reporter) -> None:
        running: dict[Future[int], tuple[Cell, StudyFolder]] = {}
        started: set[str] = set()
        total = sum(cell.steps for cell in self._selected_cells()) or 1
        with reporter.track("study", total, speed="steps/s") as tracker:
            tracker.begin_at(self._show(tracker, workers))
            while True:
                for cell, folder in self._ready():
                    name = f"{folder.path}/{cell.name}"
                    if name not in started and len(running) < workers:
                        started.add(name)
                        running[engine.submit(self._job(cell, folder, workers))] = (cell, folder)
                if not running:
                    break
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    cell, folder = running.pop(future)
                    self._finished(cell, folder, future, reporter)
                if done:
                    self.cells = self.study.cells(self.chosen())
                self._show(tracker, workers)

    def _ready(self) -> Iterator[tuple[Cell, StudyFolder]]:
        """Trials and cells that can run now."""
        waiting = self.waiting()
        left = [
            (group, cell)
            for combination, cell in self.cells.items()
            for group in [self.study.group_of(combination)]
            if cell.name in self._selected and (group in waiting or not self.folder.run(cell).is_scored)
        ]
        for group in dict.fromkeys(group for group, _ in left if group in waiting):
            for value in self._next(self.losses(group)):
                yield self.trials[group][value], self.folder.trials
        ready = [cell for group, cell in left if group not in waiting]
        ready.sort(key=lambda cell: is_running(self.folder.log(cell)))  # those of another study, to be waited for, last
        yield from ((cell, self.folder) for cell in ready)

    def _job(self, cell: Cell, folder: StudyFolder, workers: int) -> Job:
        recipe = folder.recipe(cell)
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_text(recipe, cell.recipe.resolved_yaml())
        command = [sys.executable, "-m", "dyads.cli", "train", str(recipe), "--out", str(folder.run(cell).path)]
        command += ["--auto-resume", *(["--no-evaluate"] if folder is not self.folder else [])]
        threads = max(1, (os.cpu_count() or 1) // workers) if workers > 1 else None
        return Job(cell.name, tuple(command), folder.log(cell), Path.cwd(), threads)

    def _finished(self, cell: Cell, folder: StudyFolder, future: Future[int], reporter: Reporter) -> None:
        error = future.exception()
        reason, _ = last_line(folder.log(cell))
        is_trial = folder is not self.folder
        what = f"choose/{cell.name}" if is_trial else cell.name
        if error is None and future.result() == 0:
            run = folder.run(cell)
            loss = validation_loss(run) if is_trial else None
            shown = f"validation loss {loss:.4f}" if loss is not None else "no validation loss"
            if not is_trial:
                shown = f"macro {run.scores()['macro']['headline']:.1f}"
            elif loss is None:
                self.failed[what] = shown
            reporter.note("run", f"{what}: {shown}", run=str(run.path))
        elif is_trial and _DIVERGED in reason:
            reporter.note("run", f"{what}: diverged", run=str(folder.run(cell).path))
        else:
            self.failed[what] = str(error) if error is not None else reason
            log = str(folder.log(cell))
            reporter.note("failed", f"{what} failed: {self.failed[what]} ({log})", run=what, log=log)

    def _selected_cells(self) -> list[Cell]:
        return [cell for name, cell in self.distinct().items() if name in self._selected]

    def _show(self, tracker: Tracker, workers: int) -> int:
        """One line over the grid: the steps of all runs, how many runs are done, and the time left; gives the steps."""
        cells, of_all = self._selected_cells(), self.states()
        states = {cell.name: of_all[cell.name] for cell in cells}
        count = {state: sum(s.state == state for s in states.values()) for state in ("done", "running")}
        trials = sum(map(is_running, self.folder.trials.path.glob("logs/*.txt")))
        tracker.facts = {"runs": f"{count['done']}/{len(cells)}", "running": count["running"]}
        tracker.facts |= {"trials": trials} if trials else {}
        tracker.facts |= {"failed": len(self.failed)} if self.failed else {}
        tracker.expected = seconds_left(self.distinct().values(), of_all, workers, states)
        if cells and all(cell.steps == 0 for cell in cells):
            steps = int(count["done"] == len(cells))
        else:
            steps = sum(min(states[cell.name].step, cell.steps) for cell in cells)
        tracker.update(steps)
        return steps

# SPDX-License-Identifier: Apache-2.0
"""Family `reasoning_gym`: generated tasks of logic, algebra, games and more, each with its own scorer.

The package reasoning_gym (Stojanovski et al., 2025, arXiv 2505.24760) has about a hundred of them, and needs no
download. The prompt is the question and a line break; a model with a chat template reads it as a user's message. The
metric `reasoning_gym` is the task's own score of an answer, from 0 to 1.

A seed gives the same entries on every run, and a question is in one split only. The test split is generated first, then
validation, then train, each from its own seed: a larger train split changes neither of the others. Entries depend on
the version of the package, which is noted.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, field_validator

from dyads.errors import TaskError
from dyads.tasks.family import FamilySpec, Suite, register_family
from dyads.tasks.metrics import detail_metric
from dyads.tasks.own_rows import ANY, for_every_task
from dyads.tasks.reasoning_gym_worker import NEEDS_LINE, gym_version
from dyads.tasks.task import Task
from dyads.tasks.template import Template

__all__ = ["REASONING_GYM_TASKS", "SLOW_TASKS", "ReasoningGymSpec"]

VERSION = 1
_TASKS = """
    ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation binary_matrix
    bitwise_arithmetic caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio coin_flip color_cube_rotation
    complex_arithmetic count_bits count_primes countdown course_schedule cryptarithm decimal_arithmetic
    decimal_chain_sum dice emoji_mystery family_relationships figlet_font fraction_simplification game_of_life
    gcd group_anagrams gsm_symbolic intermediate_integration isomorphic_strings jugs kakurasu
    knights_knaves largest_island lcm leg_counting letter_counting letter_jumble list_functions mahjong_puzzle
    manipulate_matrix maze mini_sudoku modulo_grid n_queens needle_haystack number_filtering number_format
    number_sequence number_sorting palindrome_generation palindrome_partitioning path_star polynomial_equations
    polynomial_multiplication pool_matrix power_function prime_factorization products quantum_lock ransom_note rearc
    rectangle_count rotate_matrix rotten_oranges self_reference sentence_reordering shortest_path simple_equations
    simple_geometry simple_integration spell_backward spiral_matrix string_insertion string_manipulation
    string_splitting string_synthesis sudoku survo syllogism time_intervals tower_of_hanoi tsumego word_ladder
    word_sequence_reversal word_sorting
"""
REASONING_GYM_TASKS = tuple(_TASKS.split())
SLOW_TASKS = ("futoshiki", "knight_swap", "puzzle24", "sokoban", "zebra_puzzles")
SPLIT_ORDER = ("test", "validation", "train")
PATIENCE = 20.0
"""Seconds that a scorer may take for one answer; then it scores 0."""
V = TypeVar("V")
_ByTask = Annotated[dict[str, V], BeforeValidator(for_every_task)]


@register_family
class ReasoningGymSpec(FamilySpec):
    """Generated reasoning tasks with their own scorers, from the package reasoning_gym."""

    family: Literal["reasoning_gym"] = "reasoning_gym"
    """Generated reasoning tasks with their own scorers, from the package reasoning_gym"""
    names: tuple[str, ...] = REASONING_GYM_TASKS
    """Tasks in the order of their ids. The default leaves out futoshiki, knight_swap, puzzle24, sokoban and
    zebra_puzzles, of which an example takes up to a second, game_of_life_halting, whose scorer accepts any answer, and
    tasks without reference answers"""
    seed: int = 0
    """Seed of the examples; independent of the training seed"""
    difficulty: _ByTask[int] = Field(default_factory=dict)
    """Level of the task's curriculum, from 0, by task or one for all; a task without it has the package's defaults"""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Fields of a task's config in the package, by task: {chain_sum: {min_terms: 3}}; they override the difficulty"""
    train_per_task: int = Field(default=200, ge=1)
    """Training examples of every task"""
    validation_per_task: int = Field(default=20, ge=0)
    """Validation instances of every task"""
    test_per_task: int = Field(default=50, ge=1)
    """Test instances of every task"""
    max_new_tokens: int = Field(default=128, ge=1)
    """Limit of a generated answer"""

    @field_validator("names", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, given: object) -> object:
        return (given,) if isinstance(given, str) else given

    @field_validator("names")
    @classmethod
    def _different_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or len(set(names)) < len(names):
            raise ValueError(f"names must be one or more different tasks of reasoning_gym, got {list(names)}")
        return names

    @field_validator("difficulty")
    @classmethod
    def _levels_from_zero(cls, difficulty: dict[str, int]) -> dict[str, int]:
        if low := [level for level in difficulty.values() if level < 0]:
            raise ValueError(f"levels of difficulty start at 0, got {low[0]}")
        return difficulty

    def load(self) -> Suite:
        for option, given in (("difficulty", self.difficulty), ("options", self.options)):
            for name in given:
                if name not in self.names and name != ANY:
                    raise TaskError(f"{option} for task '{name}', which is not one of `names`; add it there")
        sizes = {"test": self.test_per_task, "validation": self.validation_per_task, "train": self.train_per_task}
        requests = [
            {
                "name": name,
                "seed": self.seed,
                "level": self._level(name),
                "options": self.options.get(name, {}),
                "sizes": {split: sizes[split] for split in SPLIT_ORDER},
            }
            for name in self.names
        ]
        notes: list[str] = []
        tasks = []
        for line in _generated(json.dumps({"do": "generate", "tasks": requests})):
            if "error" in line:
                missing = line["error"].startswith(NEEDS_LINE)
                raise TaskError(f"{line['error']}; pip install 'dyads[reasoning-gym]'" if missing else line["error"])
            notes += line["notes"]
            tasks.append(self._task(line))
        return Suite(tuple(tasks), (f"generated by reasoning_gym {gym_version()}", *notes))

    def _level(self, name: str) -> int | None:
        return self.difficulty.get(name, self.difficulty.get(ANY))

    def _task(self, line: dict[str, Any]) -> Task:
        name = line["name"]
        template = Template(texts=("{input}",), ends_line=True, chat=True)
        settings = {"name": name, "level": self._level(name), "options": self.options.get(name, {})}
        splits = {
            split: tuple(
                template.example(
                    {"input": entry["question"]},
                    id=f"{split}-{number}",
                    references=[entry["answer"]],
                    details=json.dumps({**settings, "entry": entry["entry"]}),
                )
                for number, entry in enumerate(entries)
            )
            for split, entries in line["splits"].items()
        }
        return Task(
            name=name,
            version=VERSION,
            train=splits["train"],
            validation=splits["validation"],
            test=splits["test"],
            metric="reasoning_gym",
            metrics=("reasoning_gym", "exact_match"),
            max_new_tokens=self.max_new_tokens,
            category=line["category"],
            description=line["about"],
            template=template,
        )


@detail_metric("reasoning_gym")
def reasoning_gym(predictions: Sequence[str], details: Sequence[str]) -> list[float]:
    """The score of the task's own scorer, 0..1; 0 where the scorer fails or takes longer than `PATIENCE`."""
    answers = [{**json.loads(one), "answer": text} for one, text in zip(details, predictions, strict=True)]
    scores: list[float] = []
    while len(scores) < len(answers):
        request = {"do": "score", "answers": answers[len(scores) :]}
        for line in _answers(request, patience=PATIENCE):
            if "error" in line:
                raise TaskError(f"{line['error']}; pip install 'dyads[reasoning-gym]'")
            if "score" in line:
                scores.append(line["score"])
            if "stopped" in line:
                scores.append(0.0)
    return scores


@lru_cache(maxsize=4)
def _generated(request: str) -> tuple[dict[str, Any], ...]:
    """The worker's lines; kept, since a process may load the same tasks several times."""
    return tuple(_answers(json.loads(request), patience=None))


def _answers(request: dict[str, Any], *, patience: float | None) -> Iterator[dict[str, Any]]:
    """The lines of a worker; {"stopped": True} ends them where an answer's score takes longer than `patience`.

    A worker that has scored is kept for the next task: importing the package takes seconds.
    """
    scores = request["do"] == "score"
    worker = _IDLE.pop() if scores and _IDLE else _Worker()
    try:
        yield from worker.answers(request, patience)
    finally:
        if scores and worker.idle:
            _IDLE.append(worker)
        else:
            worker.close()


class _Worker:
    """A worker process."""

    idle = False
    """Whether it has answered a request and takes another one."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from dyads.tasks.reasoning_gym_worker import main; main()"]
        path = os.pathsep.join(part for part in sys.path if part)
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": path, "PYTHONUTF8": "1"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 – `close` closes it
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def answers(self, request: dict[str, Any], patience: float | None) -> Iterator[dict[str, Any]]:
        """The lines for a request."""
        self.idle = scoring = False
        assert self._process.stdin
        with suppress(OSError):  # a worker that failed at its start
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=patience if scoring else None)
            except queue.Empty:
                yield {"stopped": True}
                return
            if line is None:
                self._errors.seek(0)
                said = self._errors.read().decode(errors="replace").strip().splitlines()
                status = self._process.wait()
                raise TaskError(f"reasoning_gym failed: {said[-1] if said else f'exit status {status}'}")
            found = json.loads(line)
            if "done" in found:
                self.idle = True
                return
            scoring = "at" in found
            yield found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            assert file
            with suppress(OSError):  # a line that was not read
                file.close()


_IDLE: list[_Worker] = []


@atexit.register
def _close_idle() -> None:
    while _IDLE:
        _IDLE.pop().close()

# SPDX-License-Identifier: Apache-2.0
"""What is a task: what is asked, what counts as right, and what came out?"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dyads.errors import TaskError, did_you_mean
from dyads.tasks.metrics import metric as metric_named

__all__ = ["SPLITS", "Example", "Score", "Task"]

SPLITS = ("train", "validation", "test")

# A task's name becomes a file's name (predictions/<task>.jsonl) on any system.
_UNFIT_FOR_A_FILE_NAME = re.compile(r'[/\\:*?"<>|\x00-\x1f]')


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its right answers."""

    id: str
    """Unique within the task."""
    prompt: str
    """Exactly the text the model reads."""
    references: tuple[str, ...]
    """At least one; the first is the training target."""
    shorter: tuple[str, ...] = ()
    """Prompts that say the same in fewer words, longest first (fewer demonstrations): the first that fits is read."""

    def __post_init__(self) -> None:
        if not self.references:
            raise TaskError(f"example '{self.id}' has no reference: it can be neither trained on nor scored")


@dataclass(frozen=True, slots=True)
class Score:
    """One number of one task."""

    task: str
    version: int
    metric: str
    value: float
    """0..100."""
    n: int
    """How many predictions were scored."""
    higher_is_better: bool = True
    values: tuple[float, ...] = ()
    """The same per instance, 0..100; empty for a metric that is taken over all predictions at once."""


@dataclass(frozen=True)
class Task:
    """Examples in three splits and the metrics they are judged by. Its place in the list of tasks is its integer id."""

    name: str
    version: int
    """Raised when a prompt, a split or a metric changes; scores carry it."""
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    """Not scored in results: learning rates are chosen on it."""
    test: tuple[Example, ...]
    metric: str
    """The headline."""
    metrics: tuple[str, ...]
    """Everything reported, the headline first."""
    max_new_tokens: int = 128
    """Limit of a generated answer."""
    max_prompt_tokens: int | None = None
    """Limit of a prompt; None leaves it to the recipe."""
    category: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise TaskError("a task needs a name that is not empty")
        if bad := _UNFIT_FOR_A_FILE_NAME.search(self.name):
            raise TaskError(
                f"task name '{self.name}' has the character {bad.group()!r}: predictions are stored in a file of the "
                f"task's name, so use letters, digits, '-', '_', '.' and spaces"
            )
        if self.name != self.name.strip() or self.name.startswith("."):
            raise TaskError(f"task name '{self.name}' starts or ends with a blank, or starts with a dot: rename it")
        if self.version < 1:
            raise TaskError(f"task '{self.name}': version starts at 1, got {self.version}")
        for name in self.metrics:
            metric_named(name)
        if not self.metrics or self.metrics[0] != self.metric:
            raise TaskError(f"task '{self.name}': headline metric '{self.metric}' must come first in {self.metrics}")
        seen: dict[str, str] = {}
        for split in SPLITS:
            for example in self.split(split):
                if example.id in seen:
                    raise TaskError(
                        f"task '{self.name}': id '{example.id}' stands twice (in {seen[example.id]} and {split}); "
                        f"ids must be unique within a task"
                    )
                seen[example.id] = split

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of one split; an unknown name is refused with near names."""
        if name not in SPLITS:
            raise TaskError(f"unknown split '{name}' of task '{self.name}'{did_you_mean(name, SPLITS)}")
        examples: tuple[Example, ...] = getattr(self, name)
        return examples

    def fingerprint(self, split: str = "test") -> str:
        """Twelve hex digits over the prompts and references of a split: equal means the same questions."""
        asked = [[e.prompt, list(e.references)] for e in self.split(split)]
        return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> list[Score]:
        """Judge one prediction per example by every metric of the task, the headline first."""
        if len(predictions) != len(examples):
            raise TaskError(
                f"task '{self.name}': {len(predictions)} predictions for {len(examples)} examples; give one for each"
            )
        if not examples:
            raise TaskError(f"task '{self.name}': nothing to score, the list of examples is empty")
        references = [e.references for e in examples]
        scores = []
        for name in self.metrics:
            how = metric_named(name)
            value, values = how.measure(predictions, references)
            scores.append(Score(self.name, self.version, name, value, len(examples), how.higher_is_better, values))
        return scores

# SPDX-License-Identifier: Apache-2.0
"""Tasks: prompts with references in three splits, the metrics of their predictions, and the resulting scores."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dyads.errors import TaskError, did_you_mean
from dyads.tasks.example import Example
from dyads.tasks.metrics import metric as metric_named
from dyads.tasks.template import Template

__all__ = ["SPLITS", "Example", "Score", "Task"]

SPLITS = ("train", "validation", "test")

# Predictions are stored in a file named after the task, which must work on every file system.
_NOT_IN_FILE_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f]')


@dataclass(frozen=True, slots=True)
class Score:
    """The value of one metric on one task."""

    task: str
    version: int
    metric: str
    value: float
    """In percent: 0..100, or -100..100 for correlations."""
    n: int
    """Number of scored predictions."""
    higher_is_better: bool = True
    values: tuple[float, ...] = ()
    """The values of the instances, 0..100; empty for a metric of all predictions together, such as a correlation."""


@dataclass(frozen=True)
class Task:
    """Examples in three splits with the metrics of their predictions. Its index in the suite is its integer id."""

    name: str
    version: int
    """To be raised when a prompt, a split or a metric changes; every score contains it."""
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    """For choosing learning rates; published scores are those of `test`."""
    test: tuple[Example, ...]
    metric: str
    """The headline metric."""
    metrics: tuple[str, ...]
    """All reported metrics, the headline first."""
    max_new_tokens: int = 128
    """Limit of a generated answer."""
    max_prompt_tokens: int | None = None
    """Limit of a prompt; None: that of the recipe alone."""
    category: str = ""
    labels: tuple[str, ...] = ()
    """The answers of a classification task, in the order of their class ids; empty: free text.

    For `f1` the second label is the positive class.
    """
    regression: bool = False
    """References are numbers written as text. The first is the training target as text, the last the exact value."""
    description: str = ""
    """The task in a few sentences; used to measure the similarity of two tasks."""
    template: Template | None = None
    """The form of its prompts, with which `dyads generate --task` renders a row; None: it answers raw prompts only."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise TaskError("a task has an empty name; give it one")
        if bad := _NOT_IN_FILE_NAMES.search(self.name):
            raise TaskError(
                f"task name '{self.name}' has the character {bad.group()!r}, and predictions are stored in a file with "
                f"this name; use letters, digits, '-', '_', '.' and spaces"
            )
        if self.name != self.name.strip() or self.name.startswith("."):
            raise TaskError(f"task name '{self.name}' starts or ends with a space, or starts with a dot; rename it")
        if self.version < 1:
            raise TaskError(f"task '{self.name}': version starts at 1, got {self.version}")
        if not self.metrics or self.metrics[0] != self.metric:
            raise TaskError(f"task '{self.name}': headline metric '{self.metric}' must be the first of {self.metrics}")
        seen: dict[str, str] = {}
        for split in SPLITS:
            for example in self.split(split):
                if example.id in seen:
                    raise TaskError(
                        f"task '{self.name}': id '{example.id}' is used twice (in {seen[example.id]} and {split}); "
                        f"ids must be unique within a task"
                    )
                seen[example.id] = split
        self._check_answers()
        for name in self.metrics:
            how = metric_named(name)
            if how.over_labels is not None and not self.labels:
                raise TaskError(
                    f"task '{self.name}': metric '{name}' needs class labels, but the task has none; give it "
                    f"`labels`, or use 'accuracy'"
                )
            if how.over_groups is not None and (alone := next((e.id for e in self._all() if not e.group), None)):
                raise TaskError(f"task '{self.name}': metric '{name}' needs groups, but example '{alone}' has none")
            if how.over_details is not None and (bare := next((e.id for e in self._all() if not e.details), None)):
                raise TaskError(
                    f"task '{self.name}': metric '{name}' is a family's own scorer, but example '{bare}' has no "
                    "details for it; choose another metric"
                )

    def _all(self) -> Iterator[Example]:
        return (example for split in SPLITS for example in self.split(split))

    def _check_answers(self) -> None:
        """Refuse references that are not labels of a classification, or not numbers of a regression."""
        if self.labels and self.regression:
            raise TaskError(f"task '{self.name}' has both labels and regression: leave out `labels` or `regression`")
        if self.regression:
            for example in self._all():
                if bad := [r for r in example.references if not _is_number(r)]:
                    raise TaskError(
                        f"task '{self.name}': reference '{bad[0]}' of example '{example.id}' is not a number, as "
                        f"regression needs"
                    )
        if not self.labels:
            return
        normalised = {label.strip().casefold() for label in self.labels}
        if len(self.labels) < 2 or "" in normalised or len(normalised) < len(self.labels):
            raise TaskError(
                f"task '{self.name}' needs two or more labels that differ in more than case and spaces, got "
                f"{list(self.labels)}"
            )
        known = set(self.labels)
        for example in self._all():
            for answer in (*example.references, *example.choices):
                if answer not in known:
                    raise TaskError(
                        f"task '{self.name}': answer '{answer}' of example '{example.id}' is not one of its labels "
                        f"{', '.join(self.labels)}"
                    )

    def prompt_of(self, row: Mapping[str, Any]) -> str:
        """The prompt for a row of columns, rendered as in training; TaskError for missing or unknown columns."""
        if self.template is None:
            raise TaskError(f"task '{self.name}' has no template: give its family one, or write the whole prompt")
        return self.template.prompt(row, f"task '{self.name}'")

    def choices(self, example: Example) -> tuple[str, ...]:
        """The candidate answers: those of the example, else the task's labels; empty for free text."""
        return example.choices or self.labels

    def target(self, example: Example) -> int | float:
        """The training target of a head: the class id of the first reference or, for regression, the exact number."""
        if self.regression:
            return float(example.references[-1])
        if not self.labels:
            raise TaskError(
                f"task '{self.name}' has neither labels nor numbers, so no head; use a model that generates text"
            )
        return self.labels.index(example.references[0])

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of one split."""
        if name not in SPLITS:
            raise TaskError(f"unknown split '{name}' of task '{self.name}'{did_you_mean(name, SPLITS)}")
        examples: tuple[Example, ...] = getattr(self, name)
        return examples

    def fingerprint(self, split: str = "test") -> str:
        """A hash of the prompts and references of a split, as twelve hex digits."""
        content = [[e.prompt, list(e.references)] for e in self.split(split)]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> list[Score]:
        """The score of one prediction per example by every metric of the task, the headline first."""
        if len(predictions) != len(examples):
            raise TaskError(
                f"task '{self.name}': {len(predictions)} predictions for {len(examples)} examples; give one for each"
            )
        if not examples:
            raise TaskError(f"task '{self.name}': there are no examples to score")
        references, groups = [e.references for e in examples], [e.group for e in examples]
        details = [e.details for e in examples]
        scores = []
        for name in self.metrics:
            how = metric_named(name)
            value, values = how.measure(predictions, references, labels=self.labels, groups=groups, details=details)
            scores.append(Score(self.name, self.version, name, value, len(examples), how.higher_is_better, values))
        return scores


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False

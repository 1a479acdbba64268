# SPDX-License-Identifier: Apache-2.0
"""What is a task: what is asked, what counts as right, and what came out?"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
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
    segments: tuple[str, ...] = ()
    """The raw text, or the pair of texts, that an encoder with a head reads; empty: it reads the prompt."""
    choices: tuple[str, ...] = ()
    """The answers to choose from where they differ from example to example; empty: the task's labels."""
    group: str = ""
    """Examples of one group are one question asked in parts (MultiRC), right only together for `group_accuracy`."""

    def __post_init__(self) -> None:
        if not self.references:
            raise TaskError(f"example '{self.id}' has no reference: it can be neither trained on nor scored")
        if len(self.segments) > 2:
            raise TaskError(f"example '{self.id}' has {len(self.segments)} segments: an encoder reads one text or two")
        if self.choices:
            if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices):
                raise TaskError(f"example '{self.id}' needs two or more different choices, got {list(self.choices)}")
            if strangers := [r for r in self.references if r not in self.choices]:
                raise TaskError(
                    f"example '{self.id}': the reference '{strangers[0]}' is none of its choices "
                    f"{', '.join(self.choices)}"
                )


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
    labels: tuple[str, ...] = ()
    """The answers of a classification task as they are written out, in the order of their class ids; empty: free text.

    For `f1` the second label is the positive class.
    """
    regression: bool = False
    """The references are numbers as text. Of several, the first is trained on as text and the last is exact."""
    description: str = ""
    """One sentence or a few: what the task asks. Tells how near two tasks are."""

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
        self._check_answers()
        for name in self.metrics:
            how = metric_named(name)
            if how.over_labels is not None and not self.labels:
                raise TaskError(
                    f"task '{self.name}': metric '{name}' compares classes, but the task names none; give it `labels`, "
                    f"or use 'accuracy'"
                )
            if how.over_groups is not None and (loose := next((e.id for e in self._all() if not e.group), None)):
                raise TaskError(f"task '{self.name}': metric '{name}' needs a group, but example '{loose}' has none")

    def _all(self) -> Iterator[Example]:
        return (example for split in SPLITS for example in self.split(split))

    def _check_answers(self) -> None:
        """Labels and references, or the number in a reference, fit together."""
        if self.labels and self.regression:
            raise TaskError(f"task '{self.name}' has both labels and numbers: leave out `labels` or `regression`")
        if self.regression:
            for example in self._all():
                if bad := [r for r in example.references if not _is_number(r)]:
                    raise TaskError(
                        f"task '{self.name}': reference '{bad[0]}' of example '{example.id}' is not a number, and a "
                        f"regression task has only numbers"
                    )
        if not self.labels:
            return
        alike = {label.strip().casefold() for label in self.labels}
        if len(self.labels) < 2 or "" in alike or len(alike) < len(self.labels):
            raise TaskError(
                f"task '{self.name}' needs two or more labels that differ in more than case and blanks, got "
                f"{list(self.labels)}"
            )
        known = set(self.labels)
        for example in self._all():
            for answer in (*example.references, *example.choices):
                if answer not in known:
                    raise TaskError(
                        f"task '{self.name}': answer '{answer}' of example '{example.id}' is none of its labels "
                        f"{', '.join(self.labels)}"
                    )

    def choices(self, example: Example) -> tuple[str, ...]:
        """The answers to choose from: the example's own, else the task's labels; empty for free text."""
        return example.choices or self.labels

    def target(self, example: Example) -> int | float:
        """What a head is trained on: the class id of the first reference or, with regression, the exact number."""
        if self.regression:
            return float(example.references[-1])
        if not self.labels:
            raise TaskError(f"task '{self.name}' has neither labels nor numbers: a head cannot learn it; generate text")
        return self.labels.index(example.references[0])

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
        references, groups = [e.references for e in examples], [e.group for e in examples]
        scores = []
        for name in self.metrics:
            how = metric_named(name)
            value, values = how.measure(predictions, references, labels=self.labels, groups=groups)
            scores.append(Score(self.name, self.version, name, value, len(examples), how.higher_is_better, values))
        return scores


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False

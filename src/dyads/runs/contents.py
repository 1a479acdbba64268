# SPDX-License-Identifier: Apache-2.0
"""Contents of a run's JSON files: the types of what is in them, and JSON that is safe to print."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # typing's has no run-time types that pydantic reads before Python 3.12

from dyads.errors import RunError, shortened, visible
from dyads.reading import parse_json, read_json

__all__ = [
    "PREDICTION",
    "SCHEMA",
    "SCORES",
    "Prediction",
    "ScoreRow",
    "Scores",
    "Seconds",
    "finite",
    "json_line",
    "json_text",
    "read_log_line",
    "read_object",
    "typed",
]

SCHEMA = 1
"""The version of scores.json that is written and read."""


_READ = with_config(ConfigDict(strict=True, extra="allow", allow_inf_nan=False))
T = TypeVar("T")
Whole: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""A whole number that a float can hold."""


@_READ
class _Prediction(TypedDict):
    id: str  # unique within the task
    prediction: str
    references: list[str]
    scores: dict[str, float]  # metric -> 0..100 for this instance


@_READ
class Prediction(_Prediction, total=False):
    """A line of predictions/<task>.jsonl."""

    prompt: str  # absent in runs that were scored by an earlier version


@_READ
class _ScoreRow(TypedDict):
    task: str
    version: Whole  # increases when a prompt, split or metric changes
    fingerprint: str  # hash of the scored split's texts
    category: str
    metric: str
    value: float  # on the n instances, -100..100
    n: Whole
    higher_is_better: bool
    headline: bool  # whether it is the task's metric in tables and averages


@_READ
class ScoreRow(_ScoreRow, total=False):
    """A task's score in one metric."""

    labels: list[str]  # of a classification task, in class order


@_READ
class Seconds(TypedDict):
    """Wall times."""

    train: float
    evaluate: float


@_READ
class _Scores(TypedDict):
    schema: Whole
    run: str  # the recipe's name
    method: str
    split: str
    seed: Whole
    parameters: Whole  # trained, with routers, embeddings and gates, without an encoder's heads
    seconds: Seconds
    steps: Whole
    scores: list[ScoreRow]
    micro: dict[str, float]  # by metric, and "headline": mean over the instances of all tasks
    macro: dict[str, float]  # by metric, and "headline": mean over tasks


@_READ
class Scores(_Scores, total=False):
    """The content of scores.json."""

    given_task: bool  # whether the method's gates depend on the task's identity


@_READ
class LogLine(TypedDict, total=False):
    """The entries of a line of log.jsonl that are read again; null where they were not finite."""

    event: str
    step: Whole
    seconds: float | None
    loss: float | None
    auxiliary_loss: float | None
    validation_loss: float | None
    parameters: Whole


@_READ
class AdaptedLine(TypedDict, total=False):
    """The line at the start of an adaptation."""

    similarity: dict[str, dict[str, float]]  # of the new tasks to the known ones


@_READ
class TrainedLine(TypedDict):
    """The line at the end of a training."""

    step: Whole
    seconds: float
    parameters: Whole


@_READ
class ValidatedLine(TypedDict):
    """A line with a validation loss."""

    validation_loss: float | None


PREDICTION, SCORES, _LINE_TYPE = TypeAdapter(Prediction), TypeAdapter(Scores), TypeAdapter(LogLine)
_EVENT_TYPES: dict[Any, TypeAdapter[Any]] = {
    "adapted": TypeAdapter(AdaptedLine),
    "trained": TypeAdapter(TrainedLine),
    "validated": TypeAdapter(ValidatedLine),
}
"""What the lines of an event have besides."""


def typed(adapter: TypeAdapter[T], content: Any, where: str, remedy: str) -> T:
    """The content of a file as a typed dict; RunError with the first key whose value is missing or of another type."""
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise RunError(f"{where} lacks {shortened(key)}; {remedy}") from None
        got = shortened(first["input"], 60)
        raise RunError(f"{where}: '{shortened(key)}': {first['msg'].lower()}, got {got}; {remedy}") from None


def json_line(content: Any) -> str:
    """A line of a JSONL file."""
    return _dumped(content) + "\n"


def json_text(content: Any) -> str:
    """The text of a JSON file; RunError for numbers that are not finite."""
    return _dumped(content, indent=1) + "\n"


def _dumped(content: Any, indent: int | None = None) -> str:
    """JSON in which control and bidirectional characters are escaped, so that it is safe to print."""
    try:
        return visible(json.dumps(content, ensure_ascii=False, indent=indent, allow_nan=False), keep="\n")
    except ValueError as error:
        raise RunError(f"a score or fact is not a finite number: {error}") from error


def finite(value: Any) -> Any:
    """The value with None in the place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log_line(text: str, place: str) -> LogLine | None:
    """A line of the log; None for one that a killed process left incomplete."""
    try:
        content = parse_json(text, place, error=RunError)
    except RunError:
        return None
    if not isinstance(content, dict):
        return None
    line = typed(_LINE_TYPE, content, place, "delete the line")
    if (event := line.get("event")) in _EVENT_TYPES:
        typed(_EVENT_TYPES[event], content, place, "delete the line")
    return line


def read_object(path: Path, owner: str, remedy: str = "") -> dict[str, Any]:
    """The object in a JSON file of `owner`; RunError without one, which ends with `remedy`."""
    tail = f"; {remedy}" if remedy else ""
    try:
        content = read_json(path, error=RunError, remedy=remedy)
    except FileNotFoundError:
        raise RunError(f"{owner} has no {path.name}{tail}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no object but {type(content).__name__}{tail}")
    return content

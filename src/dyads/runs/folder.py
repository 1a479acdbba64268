# SPDX-License-Identifier: Apache-2.0
"""What is in a run's folder, and where?

    config.yaml              the resolved recipe
    env.json                 versions, git hash, device, threads, command, date, tasks (and again by every resumption)
    log.jsonl                one line per logged step
    adapter/                 the trained adapter, as PEFT saves it
    checkpoints/             what training can be resumed from
    predictions/<task>.jsonl one line per instance: id, prediction, references, scores (0 to 100) by metric
    scores.json              every score with its task's version, written last: a folder that has it is complete

These names are written here and nowhere else. Files appear whole or not at all (written beside, then renamed), and
predictions together with their scores: those of an earlier evaluation stay until the new ones are all there.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import quote

from dyads.errors import RunError, did_you_mean
from dyads.recipe.load import parse_recipe
from dyads.recipe.spec import Recipe, differences
from dyads.tasks.rows import Row, read_jsonl

__all__ = ["SCHEMA", "Prediction", "RunFolder", "ScoreRow", "Scores", "Seconds", "environment"]

SCHEMA = 1
"""The version of scores.json that is written here, and the only one that is read."""


class Prediction(TypedDict):
    """A line of predictions/<task>.jsonl."""

    id: str  # unique within the task
    prediction: str
    references: list[str]
    scores: dict[str, float]  # metric -> 0..100 for this instance


class _ScoreRow(TypedDict):
    task: str
    version: int  # raised when a prompt, split or metric changes
    fingerprint: str  # of the scored split's texts
    category: str
    metric: str
    value: float  # over the n instances, -100..100
    n: int
    higher_is_better: bool
    headline: bool  # the metric that stands for the task in tables and averages


class ScoreRow(_ScoreRow, total=False):
    """A task's score by one metric."""

    labels: list[str]  # of a classification task, in the order of its classes


class Seconds(TypedDict):
    """Wall time."""

    train: float
    evaluate: float


class Scores(TypedDict):
    """The content of scores.json."""

    schema: int
    run: str  # the recipe's name
    method: str
    split: str
    seed: int
    parameters: int  # trainable ones, with routers, embeddings and gates, without an encoder's heads
    seconds: Seconds
    steps: int
    scores: list[ScoreRow]
    micro: dict[str, float]  # metric, or "headline" -> mean over the instances of all tasks
    macro: dict[str, float]  # the same -> mean over tasks


_CONFIG, _ENV, _LOG, _SCORES = "config.yaml", "env.json", "log.jsonl", "scores.json"
_HEADS = "heads.json"
_ADAPTER, _CHECKPOINTS, _PREDICTIONS, _UNFINISHED = "adapter", "checkpoints", "predictions", ".predictions-unfinished"


class RunFolder:
    """A run on disk. `RunFolder(path)` looks at nothing yet; `open` insists on a run, `create` on an empty place."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | os.PathLike[str], recipe: Recipe, *, resume: bool = False) -> RunFolder:
        """Start a run. Where there is one already it is refused; with `resume` it goes on, if its recipe is this one.

        With `resume` and no run there, a new one starts, so that a job that may be cut off has one command.
        """
        folder = cls(path)
        if folder.is_run:
            if not resume:
                raise RunError(
                    f"'{folder.path}' already holds a run (method {folder.recipe().method.name}); "
                    "go on with it by --resume, or choose another --out"
                )
            folder._refuse_other(recipe)
            return folder
        if folder.path.exists() and not folder.path.is_dir():
            raise RunError(f"'{folder.path}' is a file; a run needs a folder")
        if folder.path.exists() and any(folder.path.iterdir()):
            raise RunError(f"'{folder.path}' is not empty and holds no run; choose another --out")
        folder.path.mkdir(parents=True, exist_ok=True)
        _write(folder.path / _CONFIG, recipe.resolved_yaml())
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A run that exists."""
        folder = cls(path)
        if not folder.path.exists():
            siblings = [p.name for p in folder.path.parent.glob("*") if cls(p).is_run]
            near = did_you_mean(folder.path.name, siblings)
            raise RunError(f"there is no folder '{folder.path}'{near if 'did you mean' in near else ''}")
        if not folder.is_run:
            inside = [p.name for p in sorted(folder.path.glob("*")) if cls(p).is_run] if folder.path.is_dir() else []
            way_out = f" (it contains runs: {', '.join(inside[:5])}{', …' if len(inside) > 5 else ''})"
            raise RunError(
                f"'{folder.path}' is no run: it has no {_CONFIG}"
                + (way_out if inside else "; `dyads train` makes such folders")
            )
        return folder

    @property
    def is_run(self) -> bool:
        """Whether a run was ever started here."""
        return (self.path / _CONFIG).is_file()

    @property
    def adapter(self) -> Path:
        """Where the trained adapter lies, in PEFT's format."""
        return self.path / _ADAPTER

    @property
    def heads(self) -> Path:
        """What the heads of an encoder mean, beside the adapter; there is none for a model that answers in text."""
        return self.adapter / _HEADS

    @property
    def checkpoints(self) -> Path:
        """Where training keeps what it can be resumed from."""
        return self.path / _CHECKPOINTS

    @property
    def has_adapter(self) -> bool:
        """Whether the training ended, and left its adapter."""
        return (self.adapter / "adapter_config.json").is_file()

    @property
    def is_scored(self) -> bool:
        """Whether an evaluation was finished."""
        return (self.path / _SCORES).is_file()

    # config and environment

    def recipe(self) -> Recipe:
        """The recipe as it was resolved when the run began."""
        path = self.path / _CONFIG
        try:
            return parse_recipe(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"'{self.path}' is no run: cannot read {_CONFIG}: {error}") from error

    def write_environment(self, **facts: Any) -> None:
        """Keep `environment()` and further facts; a resumption is added to what is there."""
        path = self.path / _ENV
        now = {**environment(), **facts}
        if path.is_file():
            first = self.environment()
            first.setdefault("resumed", []).append(now)
            now = first
        _write(path, _json(now))

    def environment(self) -> dict[str, Any]:
        """What `write_environment` kept."""
        return _read_object(self.path / _ENV, f"'{self.path}'")

    def task_names(self) -> tuple[str, ...]:
        """The tasks that the run began with, in the order of their ids; none where the environment was not kept."""
        return tuple(self.environment().get("tasks", ())) if (self.path / _ENV).is_file() else ()

    # log

    def append_log(self, line: Mapping[str, Any]) -> None:
        """Add a line to the log; what is not a finite number is kept as null."""
        path = self.path / _LOG
        torn = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps(_finite(line), ensure_ascii=False) + "\n")

    def log(self) -> list[dict[str, Any]]:
        """The log's lines. Lines that a killed process left half-written are skipped."""
        path = self.path / _LOG
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        return [line for line in map(_object_or_none, texts) if line is not None]

    # predictions and scores

    def predictions_path(self, task: str) -> Path:
        """Where a task's predictions lie; characters that file systems refuse are written as %XX."""
        return self.path / _PREDICTIONS / _predictions_file(task)

    def predictions(self, task: str) -> list[Prediction]:
        """A task's predictions, in the order they were written."""
        path = self.predictions_path(task)
        if not path.is_file():
            raise RunError(f"'{self.path}' has no predictions for task '{task}'; run `dyads evaluate {self.path}`")
        remedy = f"run `dyads evaluate {self.path}` again"
        return [_prediction(row, remedy) for row in read_jsonl(path, error=RunError, remedy=remedy)]

    def write_results(self, predictions: Mapping[str, Iterable[Prediction]], scores: Scores) -> None:
        """Keep an evaluation, by task and in all, in the place of an earlier one.

        The scores go first and come last, so that those there are never belong to other predictions.
        """
        if scores["schema"] != SCHEMA:
            raise RunError(f"{_SCORES} is written with schema {SCHEMA}, got {scores['schema']}")
        text, kept, unfinished = _json(scores), self.path / _PREDICTIONS, self.path / _UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            for task, rows in predictions.items():
                lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
                _write(unfinished / _predictions_file(task), "".join(lines))
            (self.path / _SCORES).unlink(missing_ok=True)
            if kept.exists():
                shutil.rmtree(kept)
            unfinished.rename(kept)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        _write(self.path / _SCORES, text)

    def scores(self) -> Scores:
        """The scores of the last finished evaluation."""
        path = self.path / _SCORES
        again = f"run `dyads evaluate {self.path}`"
        if not path.is_file():
            raise RunError(f"'{self.path}' has no {_SCORES}: it was not evaluated, or not to the end; {again}")
        content = _read_object(path, f"'{self.path}'", again)
        if content.get("schema") != SCHEMA:
            raise RunError(
                f"{path} has schema {content.get('schema')!r}, this version of dyads reads schema {SCHEMA}; {again}"
            )
        _refuse_lacking(content, Scores, str(path), again)
        for i, row in enumerate(content["scores"]):
            _refuse_lacking(row, ScoreRow, f"scores[{i}] of {path}", again)
        return content  # type: ignore[return-value]

    def _refuse_other(self, recipe: Recipe) -> None:
        changed = differences(self.recipe().resolved(), recipe.resolved())
        if changed:
            listed = "\n  ".join(f"{key}: {then!r} there, {now!r} here" for key, (then, now) in changed.items())
            raise RunError(f"cannot resume '{self.path}': it was started with another recipe\n  {listed}")


def environment() -> dict[str, Any]:
    """What a result may depend on besides the recipe: versions, code, machine, threads, command, date."""
    packages = ("dyads", "torch", "transformers", "peft", "accelerate", "numpy", "tokenizers")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "git": _git_hash(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        **_torch_facts(),
    }


def _torch_facts() -> dict[str, Any]:
    torch = sys.modules.get("torch")  # a caller that did not need torch does not need it for this either
    if torch is None:
        return {"device": None, "threads": None}
    cuda = torch.cuda.is_available()
    return {"device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_hash() -> str | None:
    """The commit of the code that runs, "+changes" where files differ; None outside a checkout of dyads itself."""
    source = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _predictions_file(task: str) -> str:
    return f"{quote(task, safe=' ()+,;=@!~')}.jsonl"


def _prediction(row: Row, remedy: str) -> Prediction:
    try:
        return {
            "id": row.fields["id"],
            "prediction": row.fields["prediction"],
            "references": list(row.fields["references"]),
            "scores": {metric: float(value) for metric, value in row.fields["scores"].items()},
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{row.place}: no prediction with id, prediction, references and scores "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only the owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _json(content: Any) -> str:
    try:
        return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise RunError(f"a score or fact is not a finite number: {error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _object_or_none(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None


def _refuse_lacking(entry: Any, typed: type[Any], where: str, way_out: str) -> None:
    required = typed.__required_keys__  # type: ignore[attr-defined]
    there = entry if isinstance(entry, dict) else {}
    lacking = [key for key in typed.__annotations__ if key in required and key not in there]
    if lacking:
        raise RunError(f"{where} lacks {', '.join(lacking)}; {way_out}")


def _read_object(path: Path, owner: str, way_out: str = "") -> dict[str, Any]:
    tail = f"; {way_out}" if way_out else ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{owner} has no {path.name}{tail}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is truncated or not JSON ({error}){tail}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no object but {type(content).__name__}{tail}")
    return content

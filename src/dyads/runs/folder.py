# SPDX-License-Identifier: Apache-2.0
"""Run folder: the files of one run, their names and their formats.

    config.yaml              the resolved recipe
    env.json                 versions, git hash, device, threads, command, date, tasks (again for every resumption)
    templates.json           the form of each task's prompts, by task
    chat_template.jinja      the chat template, where tasks are read with one
    log.jsonl                one line per logged step
    adapter/                 the trained adapter, in PEFT's format
    checkpoints/             checkpoints for resuming the training
    tensorboard/             events for TensorBoard, where the recipe reports to it
    predictions/<task>.jsonl one line per instance: id, prompt, prediction, references, scores (0 to 100) by metric
    scores.json              every score with its task's version, written last: a folder with it is complete

No other file contains these names. Every file is written under another name and renamed when complete, and an
evaluation replaces the predictions and scores of an earlier one together.
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

from pydantic import ValidationError

from dyads.errors import RunError, TaskError, did_you_mean
from dyads.recipe.load import parse_recipe
from dyads.recipe.spec import Recipe, differences
from dyads.tasks import Task
from dyads.tasks.rows import Row, read_jsonl
from dyads.tasks.template import Template

__all__ = ["SCHEMA", "Prediction", "RunFolder", "ScoreRow", "Scores", "Seconds", "environment"]

SCHEMA = 1
"""The version of scores.json that is written and read."""


class _Prediction(TypedDict):
    id: str  # unique within the task
    prediction: str
    references: list[str]
    scores: dict[str, float]  # metric -> 0..100 for this instance


class Prediction(_Prediction, total=False):
    """A line of predictions/<task>.jsonl."""

    prompt: str  # absent in runs that were scored by an earlier version


class _ScoreRow(TypedDict):
    task: str
    version: int  # increases when a prompt, split or metric changes
    fingerprint: str  # hash of the scored split's texts
    category: str
    metric: str
    value: float  # on the n instances, -100..100
    n: int
    higher_is_better: bool
    headline: bool  # whether it is the task's metric in tables and averages


class ScoreRow(_ScoreRow, total=False):
    """A task's score in one metric."""

    labels: list[str]  # of a classification task, in class order


class Seconds(TypedDict):
    """Wall times."""

    train: float
    evaluate: float


class _Scores(TypedDict):
    schema: int
    run: str  # the recipe's name
    method: str
    split: str
    seed: int
    parameters: int  # trained, with routers, embeddings and gates, without an encoder's heads
    seconds: Seconds
    steps: int
    scores: list[ScoreRow]
    micro: dict[str, float]  # by metric, and "headline": mean over the instances of all tasks
    macro: dict[str, float]  # by metric, and "headline": mean over tasks


class Scores(_Scores, total=False):
    """The content of scores.json."""

    given_task: bool  # whether the method's gates depend on the task's identity


_CONFIG, _ENV, _LOG, _SCORES = "config.yaml", "env.json", "log.jsonl", "scores.json"
_HEADS, _TEMPLATES, _CHAT_TEMPLATE = "heads.json", "templates.json", "chat_template.jinja"
_TENSORBOARD = "tensorboard"
_ADAPTER, _CHECKPOINTS, _PREDICTIONS, _UNFINISHED = "adapter", "checkpoints", "predictions", ".predictions-unfinished"


class RunFolder:
    """A run on disk: `create` starts one in an empty folder, `open` requires one; `RunFolder(path)` checks nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | os.PathLike[str], recipe: Recipe, *, resume: bool = False) -> RunFolder:
        """Start a run, in a folder without one; with `resume`, continue a run with the same recipe, or start one.

        A job that may be interrupted can thus always be started with `resume`.
        """
        folder = cls(path)
        if folder.is_run:
            if not resume:
                raise RunError(
                    f"'{folder.path}' already holds a run (method {folder.recipe().method.name}); "
                    "continue it with --resume, or choose another --out"
                )
            folder._check_same_recipe(recipe)
            return folder
        if folder.path.exists() and not folder.path.is_dir():
            raise RunError(f"'{folder.path}' is a file; choose a folder for --out")
        for unfinished in folder.path.glob(f".{_CONFIG}.*"):  # of a process that was killed right here
            unfinished.unlink()
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
            runs = f" (it contains runs: {', '.join(inside[:5])}{', …' if len(inside) > 5 else ''})"
            raise RunError(
                f"'{folder.path}' is no run: it has no {_CONFIG}"
                + (runs if inside else "; `dyads train` writes run folders")
            )
        return folder

    @property
    def is_run(self) -> bool:
        """Whether a run was started in this folder."""
        return (self.path / _CONFIG).is_file()

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, in PEFT's format."""
        return self.path / _ADAPTER

    @property
    def heads(self) -> Path:
        """The file of an encoder's heads (labels, scaling), in the adapter's folder; absent for other models."""
        return self.adapter / _HEADS

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints for resuming."""
        return self.path / _CHECKPOINTS

    @property
    def log_path(self) -> Path:
        """The file of the log."""
        return self.path / _LOG

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's events (`train.report_to: tensorboard`)."""
        return self.path / _TENSORBOARD

    @property
    def has_adapter(self) -> bool:
        """Whether the training ended and saved its adapter."""
        return (self.adapter / "adapter_config.json").is_file()

    @property
    def is_scored(self) -> bool:
        """Whether an evaluation has finished."""
        return (self.path / _SCORES).is_file()

    # config and environment

    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        path = self.path / _CONFIG
        try:
            return parse_recipe(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"'{self.path}' is no run: cannot read {_CONFIG}: {error}") from error

    def write_environment(self, **facts: Any) -> None:
        """Write `environment()` and further facts; a resumed run appends them to its first ones."""
        path = self.path / _ENV
        now = {**environment(), **facts}
        if path.is_file():
            first = self.environment()
            first.setdefault("resumed", []).append(now)
            now = first
        _write(path, _json(now))

    def environment(self) -> dict[str, Any]:
        """The content of env.json."""
        return _read_object(self.path / _ENV, f"'{self.path}'")

    def task_names(self) -> tuple[str, ...]:
        """The tasks of the run in the order of their ids; empty if it has no env.json."""
        return tuple(self.environment().get("tasks", ())) if (self.path / _ENV).is_file() else ()

    def write_templates(self, tasks: Iterable[Task], source: RunFolder | None = None) -> None:
        """Write the templates of the tasks, after those of the run that this one adapts (`source`)."""
        templates = source.templates() if source is not None else {}
        templates.update({task.name: task.template for task in tasks if task.template is not None})
        _write(self.path / _TEMPLATES, _json({name: template.model_dump() for name, template in templates.items()}))

    def templates(self) -> dict[str, Template]:
        """The templates of the run's tasks by name; empty for a run of an earlier version."""
        path = self.path / _TEMPLATES
        if not path.is_file():
            return {}
        remedy = "restore the file, or delete it to answer raw prompts"
        content = _read_object(path, f"'{self.path}'", remedy)
        try:
            return {name: Template.model_validate(template) for name, template in content.items()}
        except (ValidationError, TaskError) as error:
            raise RunError(f"{path} holds no templates: {error}; {remedy}") from error

    def write_chat_template(self, template: str | None) -> None:
        """Write the chat template; None: the run reads prompts as they are."""
        if template is not None:
            _write(self.path / _CHAT_TEMPLATE, template)

    def chat_template(self) -> str | None:
        """The chat template of the run; None where it reads prompts as they are."""
        path = self.path / _CHAT_TEMPLATE
        return path.read_text(encoding="utf-8") if path.is_file() else None

    # log

    def append_log(self, line: Mapping[str, Any]) -> None:
        """Append a line to the log; infinite numbers and nan become null."""
        path = self.path / _LOG
        torn = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps(_finite(line), ensure_ascii=False) + "\n")

    def log(self) -> list[dict[str, Any]]:
        """The lines of the log, without those that a killed process left incomplete."""
        path = self.path / _LOG
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        return [line for line in map(_object_or_none, texts) if line is not None]

    # predictions and scores

    def predictions_path(self, task: str) -> Path:
        """The file of a task's predictions; characters that file systems refuse are written as %XX."""
        return self.path / _PREDICTIONS / _predictions_file(task)

    def predictions(self, task: str) -> list[Prediction]:
        """The predictions for a task, in the order they were written."""
        path = self.predictions_path(task)
        if not path.is_file():
            raise RunError(f"'{self.path}' has no predictions for task '{task}'; run `dyads evaluate {self.path}`")
        remedy = f"run `dyads evaluate {self.path}` again"
        return [_prediction(row, remedy) for row in read_jsonl(path, error=RunError, remedy=remedy)]

    def write_results(self, predictions: Mapping[str, Iterable[Prediction]], scores: Scores) -> None:
        """Write the predictions by task and the scores of an evaluation, in place of an earlier one's.

        The old scores are deleted first and the new ones written last, so that scores never stand beside predictions
        of another evaluation.
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
        """The scores of the last complete evaluation."""
        path = self.path / _SCORES
        again = f"run `dyads evaluate {self.path}`"
        if not path.is_file():
            raise RunError(
                f"'{self.path}' has no {_SCORES}: it was not evaluated, or the evaluation did not end; {again}"
            )
        content = _read_object(path, f"'{self.path}'", again)
        if content.get("schema") != SCHEMA:
            raise RunError(
                f"{path} has schema {content.get('schema')!r}, this version of dyads reads schema {SCHEMA}; {again}"
            )
        _check_keys(content, Scores, str(path), again)
        for i, row in enumerate(content["scores"]):
            _check_keys(row, ScoreRow, f"scores[{i}] of {path}", again)
        return content  # type: ignore[return-value]

    def _check_same_recipe(self, recipe: Recipe) -> None:
        changed = differences(self.recipe().resolved(), recipe.resolved())
        if changed:
            listed = "\n  ".join(f"{key}: {then!r} there, {now!r} here" for key, (then, now) in changed.items())
            raise RunError(f"cannot resume '{self.path}': it was started with another recipe\n  {listed}")


def environment() -> dict[str, Any]:
    """Facts that a result may depend on besides the recipe: versions, code, machine, threads, command, date."""
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
    torch = sys.modules.get("torch")  # not imported just for this
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
    """The commit of dyads' own checkout, with "+changes" if files differ from it; None if installed otherwise."""
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
        prediction = Prediction(
            id=row.fields["id"],
            prediction=row.fields["prediction"],
            references=list(row.fields["references"]),
            scores={metric: float(value) for metric, value in row.fields["scores"].items()},
        )
        if "prompt" in row.fields:
            prediction["prompt"] = str(row.fields["prompt"])
        return prediction
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


def _check_keys(entry: Any, typed: type[Any], where: str, remedy: str) -> None:
    required = typed.__required_keys__  # type: ignore[attr-defined]
    there = entry if isinstance(entry, dict) else {}
    lacking = [key for key in typed.__annotations__ if key in required and key not in there]
    if lacking:
        raise RunError(f"{where} lacks {', '.join(lacking)}; {remedy}")


def _read_object(path: Path, owner: str, remedy: str = "") -> dict[str, Any]:
    tail = f"; {remedy}" if remedy else ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{owner} has no {path.name}{tail}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is truncated or not JSON ({error}){tail}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no object but {type(content).__name__}{tail}")
    return content

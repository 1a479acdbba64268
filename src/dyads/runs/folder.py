# SPDX-License-Identifier: Apache-2.0
"""Run folder: the files of one run, their names and their formats.

    config.yaml              the resolved recipe
    env.json                 versions, git hash, device, threads, command, date, tasks (again for every resumption)
    templates.json           the form of each task's prompts and the limit of its answers, by task
    chat_template.jinja      the chat template, where tasks are read with one
    log.jsonl                one line per logged step
    adapter/                 the trained adapter, in PEFT's format, with a manifest
    checkpoints/             checkpoints for resuming the training, each with a manifest
    tensorboard/             events for TensorBoard, where the recipe reports to it
    predictions/<task>.jsonl one line per instance: id, prompt, prediction, references, scores (0 to 100) by metric
    scores.json              every score with its task's version
    manifest.json            sizes and SHA-256 of the config, the templates, and, once there are any, of the results
    .results.unfinished/     new results, until they are in the place of earlier ones
    .lock                    the process that writes into the folder, while it does

No other file contains these names. A folder is a run if its manifest lists config.yaml, and is scored if it lists
scores.json (runs/manifest.py). An evaluation replaces the predictions and scores of an earlier one together, with one
rename of the manifest.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import datetime, timezone
from functools import cache, wraps
from importlib import metadata
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pydantic import ValidationError

from dyads.errors import RunError, TaskError, notice, shortened, similar_name
from dyads.reading import SETTINGS, read_bytes, read_text
from dyads.recipe.file_names import file_name
from dyads.recipe.load import parse_recipe
from dyads.recipe.spec import Recipe, differences
from dyads.runs.contents import (
    PREDICTION,
    SCHEMA,
    SCORES,
    Prediction,
    Scores,
    finite,
    json_line,
    json_text,
    read_log_line,
    read_object,
    typed,
)
from dyads.runs.lock import LOCK, LockedError, locked
from dyads.runs.manifest import (
    MANIFEST,
    Manifest,
    clear,
    discard,
    is_unfinished,
    not_through_links,
    seal,
    sync_folder,
    write_text,
)
from dyads.tasks import Task
from dyads.tasks.rows import read_jsonl
from dyads.tasks.template import Template

__all__ = ["RunFolder", "environment"]

_CONFIG, _ENV, _LOG, _SCORES = "config.yaml", "env.json", "log.jsonl", "scores.json"
_HEADS, _TEMPLATES, _CHAT_TEMPLATE = "heads.json", "templates.json", "chat_template.jinja"
_TENSORBOARD = "tensorboard"
_ADAPTER, _CHECKPOINTS, _PREDICTIONS = "adapter", "checkpoints", "predictions"
_RESULTS, _UNFINISHED = (_PREDICTIONS, _SCORES), ".results.unfinished"


P = ParamSpec("P")
T = TypeVar("T")


def _read_again(read: Callable[P, T]) -> Callable[P, T]:
    """Read once more where it failed: an evaluation may have moved the results in between."""

    @wraps(read)
    def read_again(*args: P.args, **options: P.kwargs) -> T:
        try:
            return read(*args, **options)
        except (FileNotFoundError, RunError):
            return read(*args, **options)

    return read_again


class RunFolder:
    """A run on disk: `create` starts one in an empty folder, `open` requires one; `RunFolder(path)` checks nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | os.PathLike[str], recipe: Recipe, *, resume: bool = False) -> RunFolder:
        """Start a run, in a folder without one; with `resume`, continue a run with the same recipe, or start one.

        A job that may be interrupted can thus always be started with `resume`. What a killed process left unfinished is
        removed.
        """
        folder = cls(path)
        if folder.is_run:
            if not resume:
                raise RunError(
                    f"'{folder.path}' already holds a run (method {folder.recipe().method.name}); "
                    "continue it with --resume, or choose another --out"
                )
            folder._check_same_recipe(recipe)
            folder._clear_unfinished()
            return folder
        if folder.path.exists() and not folder.path.is_dir():
            raise RunError(f"'{folder.path}' is a file; choose a folder for --out")
        if folder.path.exists():
            folder._clear_interrupted_start()
        text = recipe.resolved_yaml()
        parse_recipe(text, f"the recipe of '{path}'")  # refuses what could not be read again, such as a text too long
        folder.path.mkdir(parents=True, exist_ok=True)
        write_text(folder.path / _CONFIG, text)
        seal(folder.path, [_CONFIG])
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A run that exists."""
        folder = cls(path)
        try:
            exists = folder.path.exists()
        except OSError as error:  # a name that is too long
            raise RunError(f"cannot open '{folder.path}': {error.strerror}") from error
        if not exists:
            siblings = [p.name for p in folder.path.parent.glob("*") if cls(p).is_run]
            raise RunError(f"there is no folder '{folder.path}'{similar_name(folder.path.name, siblings)}")
        if not folder.is_run:
            if folder.has_config:
                raise folder._without_manifest()
            inside = [p.name for p in sorted(folder.path.glob("*")) if cls(p).is_run] if folder.path.is_dir() else []
            runs = f" (it contains runs: {', '.join(inside[:5])}{', …' if len(inside) > 5 else ''})"
            raise RunError(
                f"'{folder.path}' is no run: it has no {_CONFIG}"
                + (runs if inside else "; `dyads train` writes run folders")
            )
        return folder

    def locked(self) -> AbstractContextManager[None]:
        """The lock of the folder, for as long as a process writes into it; LockedError where another one does."""
        return locked(self.path)

    @property
    def is_run(self) -> bool:
        """Whether a run was started in this folder."""
        return self.has_config and (self.path / MANIFEST).is_file()

    @property
    def was_interrupted(self) -> bool:
        """Whether a start of a run in this folder was killed before it was complete."""
        return not self.is_run and self.path.is_dir() and any(self.path.iterdir()) and not self._others()

    def _others(self) -> list[str]:
        """The names in the folder that the start of a run does not write."""
        return [p.name for p in self.path.iterdir() if p.name not in (_CONFIG, LOCK) and not is_unfinished(p)]

    def _without_manifest(self) -> RunError:
        return RunError(
            f"'{self.path}' is no complete run: it has {_CONFIG} but no {MANIFEST}, so its start was interrupted, or an"
            f" earlier version of dyads wrote it; `python -m dyads.runs.accept {self.path}` accepts its files as they"
            " are, and `dyads train … --resume` clears an interrupted start away"
        )

    def check_free(self) -> None:
        """RunError where the folder holds anything but a run or the start of one, so that none can be written there."""
        others = self._others() if self.path.is_dir() and not self.is_run else []
        if others and self.has_config:
            raise self._without_manifest()
        if others:
            raise RunError(f"'{self.path}' is not empty and holds no run; choose another --out")

    def _clear_interrupted_start(self) -> None:
        """Remove the files of a start that was killed; RunError where the folder holds anything else."""
        self.check_free()
        removed = clear(self.path)
        if self.has_config:
            (self.path / _CONFIG).unlink()
            removed.append(_CONFIG)
        if removed:
            notice(f"'{self.path}': the start of a run was interrupted; removed {', '.join(removed)}, starting again")

    def clear_ended(self) -> None:
        """Remove what a process left that was killed at its very end, in a run that is complete and will not go on."""
        places = [*self.path.iterdir(), *(self.adapter.iterdir() if self.has_adapter else ())]
        if any(is_unfinished(path) or path.name == LOCK for path in places):
            with suppress(LockedError), self.locked():
                self._clear_unfinished()

    def _clear_unfinished(self) -> None:
        """Remove what a killed process left: files that were being written, and results without a manifest."""
        self._move_results(self._manifest())
        removed = clear(self.path) + (clear(self.adapter) if self.has_adapter else [])
        for name in () if self.is_scored else _RESULTS:
            if (self.path / name).exists():
                removed.append(name)
                discard(self.path / name)
        if not self.has_adapter and self.adapter.exists():
            shutil.rmtree(self.adapter)
            removed.append(_ADAPTER)
        if removed:
            notice(f"'{self.path}': removed what an interrupted process left unfinished: {', '.join(removed)}")

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
        return (self.adapter / MANIFEST).is_file()

    @property
    def is_scored(self) -> bool:
        """Whether an evaluation has finished."""
        return any((place / _SCORES).is_file() for place in self._places) and _SCORES in self._manifest().files

    @property
    def has_config(self) -> bool:
        """Whether there is a config.yaml, complete or not."""
        return (self.path / _CONFIG).is_file()

    @property
    def has_environment(self) -> bool:
        """Whether there is an env.json."""
        return (self.path / _ENV).is_file()

    def accept(self) -> list[Path]:
        """Write manifests for the files as they are, for a run of an earlier version or after changes on purpose."""
        with suppress(RunError):  # a damaged manifest is written anew
            self._move_results(self._manifest())
        names = [name for name in (_CONFIG, _TEMPLATES, _CHAT_TEMPLATE) if (self.path / name).is_file()]
        if (self.path / _SCORES).is_file():
            names += [_SCORES, *(f"{_PREDICTIONS}/{p.name}" for p in (self.path / _PREDICTIONS).glob("*.jsonl"))]
        seal(self.path, names)
        ended = [path.parent for path in self.checkpoints.glob("checkpoint-*/trainer_state.json")]
        ended += [self.adapter] if (self.adapter / "adapter_config.json").is_file() else []
        for folder in ended:
            seal(folder)
        return [self.path, *ended]

    def damage(self) -> str | None:
        """The first file of the run that differs from the manifest of its config and scores, in words."""
        manifest = self._manifest()
        damaged = (name for name in manifest.files if self._find(name, manifest) is None)
        return next((manifest.damage([name]) for name in damaged), None)

    def _manifest(self) -> Manifest:
        return Manifest.of(self.path) or Manifest(self.path, {})

    @property
    def _places(self) -> tuple[Path, Path]:
        """The folders in which a file of the results may be."""
        return self.path / _UNFINISHED, self.path

    def _find(self, name: str, manifest: Manifest) -> Path | None:
        """The file that the manifest lists, where it is; None if it is damaged or missing."""
        found = (place / name for place in self._places if Manifest(place, manifest.files).damage([name]) is None)
        return next(found, None)

    def _check(self, name: str, remedy: str) -> Path:
        """The file of the run that the manifest lists; RunError if it is not the one that was written."""
        manifest = self._manifest()
        if (path := self._find(name, manifest)) is None:
            raise RunError(f"'{self.path}' is damaged: {manifest.damage([name])}; {remedy}")
        return path

    # config and environment

    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        path = self.path / _CONFIG
        if not self.is_run and self.has_config:
            raise self._without_manifest()
        try:
            self._check(_CONFIG, f"restore it, or accept it as it is with `python -m dyads.runs.accept {self.path}`")
            return parse_recipe(read_text(path, error=RunError, most=SETTINGS), str(path))
        except OSError as error:
            raise RunError(f"'{self.path}' is no run: cannot read {_CONFIG}: {error.strerror}") from error

    def write_environment(self, **facts: Any) -> None:
        """Write `environment()` and further facts; a resumed run appends them to its first ones."""
        path = self.path / _ENV
        now = {**environment(), **facts}
        if self.has_environment:
            first = self.environment()
            resumed = first.setdefault("resumed", [])
            if not isinstance(resumed, list):
                raise RunError(f"{path}: 'resumed' must be a list, got {shortened(resumed, 60)}; delete the file")
            resumed.append(now)
            now = first
        write_text(path, json_text(now))

    def environment(self) -> dict[str, Any]:
        """The content of env.json."""
        return read_object(self.path / _ENV, f"'{self.path}'", "restore it, or delete it: --resume writes it again")

    def task_names(self) -> tuple[str, ...]:
        """The tasks of the run in the order of their ids; empty if it has no env.json."""
        names = self.environment().get("tasks", []) if self.has_environment else []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise RunError(f"{self.path / _ENV}: 'tasks' must be a list of names, got {shortened(names, 60)}")
        return tuple(names)

    def write_templates(self, tasks: Iterable[Task], source: RunFolder | None = None) -> None:
        """Write the tasks' templates and limits, after those of the run that this one adapts (`source`)."""
        templates = source.templates() if source is not None else {}
        for task in tasks:
            if task.template is not None:
                limits = {"max_new_tokens": task.max_new_tokens, "max_prompt_tokens": task.max_prompt_tokens}
                templates[task.name] = task.template.model_copy(update=limits)
        self._write_listed(_TEMPLATES, json_text({name: template.model_dump() for name, template in templates.items()}))

    def templates(self) -> dict[str, Template]:
        """The templates of the run's tasks by name; empty for a run of an earlier version."""
        path = self.path / _TEMPLATES
        if not path.is_file():
            return {}
        remedy = "restore the file, or delete it to answer raw prompts"
        self._check_listed(_TEMPLATES, remedy)
        content = read_object(path, f"'{self.path}'", remedy)
        try:
            return {name: Template.model_validate(template) for name, template in content.items()}
        except (ValidationError, TaskError) as error:
            raise RunError(f"{path} holds no templates: {error}; {remedy}") from error

    def write_chat_template(self, template: str | None) -> None:
        """Write the chat template; None: the run reads prompts as they are."""
        if template is not None:
            self._write_listed(_CHAT_TEMPLATE, template)

    def forms(self) -> list[Path]:
        """The files with the form of prompts: templates and chat template, those that the run has."""
        return [path for name in (_TEMPLATES, _CHAT_TEMPLATE) if (path := self.path / name).is_file()]

    def chat_template(self) -> str | None:
        """The chat template of the run; None where it reads prompts as they are."""
        path = self.path / _CHAT_TEMPLATE
        if not path.is_file():
            return None
        self._check_listed(_CHAT_TEMPLATE, "restore the file")
        return read_text(path, error=RunError, most=SETTINGS)

    def _write_listed(self, name: str, text: str) -> None:
        """Write a file that the manifest lists, unless it is there already."""
        listed = self._manifest()
        if name in listed.files:
            if listed.damage([name]) is None and read_text(self.path / name, error=RunError) == text:
                return
            seal(self.path, [], listed=listed.without(name))
        write_text(self.path / name, text)
        seal(self.path, [name], listed=listed.without(name))

    def _check_listed(self, name: str, remedy: str) -> None:
        if name in self._manifest().files:
            self._check(name, remedy)

    # log

    def append_log(self, line: Mapping[str, Any]) -> None:
        """Append a line to the log; infinite numbers and nan become null."""
        path = self.path / _LOG
        with open(path, "ab+", opener=not_through_links) as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a killed process left its last line incomplete
                    file.write(b"\n")
            file.write(json_line(finite(line)).encode())
            file.flush()
            os.fsync(file.fileno())

    def log(self) -> list[dict[str, Any]]:
        """The lines of the log, without those that a killed process left incomplete."""
        path = self.path / _LOG
        try:
            texts = read_bytes(path, error=RunError).decode("utf-8", "replace").split("\n")
        except FileNotFoundError:
            texts = []
        lines = (read_log_line(text, f"{path}, line {n}") for n, text in enumerate(texts, start=1) if text.strip())
        return [dict(line) for line in lines if line is not None]

    # predictions and scores

    @_read_again
    def predictions(self, task: str) -> list[Prediction]:
        """The predictions for a task, in the order they were written."""
        name = f"{_PREDICTIONS}/{_predictions_file(task)}"
        if not any((place / name).is_file() for place in self._places):
            raise RunError(f"'{self.path}' has no predictions for task '{task}'; run `dyads evaluate {self.path}`")
        remedy = f"run `dyads evaluate {self.path}` again"
        path = self._check(name, remedy)
        rows = read_jsonl(path, error=RunError, remedy=remedy)
        return [typed(PREDICTION, dict(row.fields), row.place, remedy) for row in rows]

    def write_results(self, predictions: Mapping[str, Iterable[Prediction]], scores: Scores) -> None:
        """Write the predictions by task and the scores of an evaluation, in place of an earlier one's.

        All files are written into a folder of their own, with a manifest. This then replaces that of the run: with this
        one rename they are the results, and are read there until they are moved into the place of the earlier ones.
        Where no call can write any more, the earlier results or the new ones thus stay readable.
        """
        if scores["schema"] != SCHEMA:
            raise RunError(f"{_SCORES} is written with schema {SCHEMA}, got {scores['schema']}")
        text, new = json_text(scores), self.path / _UNFINISHED
        self._move_results(self._manifest())
        discard(new)
        try:
            (new / _PREDICTIONS).mkdir(parents=True)
            for task, rows in predictions.items():
                write_text(new / _PREDICTIONS / _predictions_file(task), "".join(map(json_line, rows)))
            write_text(new / _SCORES, text)
            manifest = seal(new, listed=self._manifest().without(_SCORES, f"{_PREDICTIONS}/"))
            if not self.is_scored:
                self._move_results(manifest)  # first: those who wait for the scores find them in their place
            (new / MANIFEST).replace(self.path / MANIFEST)
            sync_folder(self.path)
        finally:
            self._move_results(self._manifest())
            discard(new)

    def _move_results(self, manifest: Manifest) -> None:
        """Move the results that a manifest lists into the place of earlier ones, unless they are there."""
        new = self.path / _UNFINISHED
        for name in () if new.is_symlink() else _RESULTS:
            files = {file: entry for file, entry in manifest.files.items() if file.split("/")[0] == name}
            if files and (new / name).exists() and Manifest(new, files).damage() is None:
                discard(self.path / name)
                (new / name).rename(self.path / name)

    @_read_again
    def scores(self) -> Scores:
        """The scores of the last complete evaluation."""
        again = f"run `dyads evaluate {self.path}`"
        if not self.is_scored:
            raise RunError(
                f"'{self.path}' has no {_SCORES}: it was not evaluated, or the evaluation did not end; {again}"
            )
        path = self._check(_SCORES, again)
        content = read_object(path, f"'{self.path}'", again)
        if content.get("schema") != SCHEMA:
            raise RunError(
                f"{path} has schema {shortened(content.get('schema'), 60)}, this version of dyads reads schema"
                f" {SCHEMA}; {again}"
            )
        scores = typed(SCORES, content, str(path), again)
        for level, means in (("micro", scores["micro"]), ("macro", scores["macro"])):
            if "headline" not in means:
                raise RunError(f"{path} lacks {level}.headline; {again}")
        return scores

    def _check_same_recipe(self, recipe: Recipe) -> None:
        changed = differences(self.recipe().resolved(), recipe.resolved())
        if changed:
            listed = "\n  ".join(
                f"{key}: {shortened(repr(then))} there, {shortened(repr(now))} here"
                for key, (then, now) in changed.items()
            )
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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if device == "cpu" and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type  # mps, xpu, …
    return {"device": device, "threads": torch.get_num_threads()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _git_hash() -> str | None:
    """The commit of dyads' own checkout, with "+changes" if files differ from it; None if installed otherwise."""
    source = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _predictions_file(task: str) -> str:
    return f"{file_name(task)}.jsonl"

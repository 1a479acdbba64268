# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: complete once they have a manifest, checked before a resume, rotated by their steps.

transformers' Trainer writes the files of `checkpoints/checkpoint-STEP`; the manifest comes after them. File times play
no part: a clock that is set back changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dyads.errors import DyadsError, RunError, notice, reason_of
from dyads.reading import read_text
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import MANIFEST, Manifest, remove, seal

__all__ = ["checkpoint_to_resume", "complete", "last_checkpoint", "loading", "rotate", "step_of"]

_STATE = "trainer_state.json"


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint was saved after."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: RunFolder) -> list[Path]:
    """The checkpoints in the order of their steps, complete or not."""
    found = folder.checkpoints.iterdir() if folder.checkpoints.is_dir() else iter(())
    return sorted((p for p in found if re.fullmatch(r"checkpoint-[0-9]{1,18}", p.name) and p.is_dir()), key=step_of)


def last_checkpoint(folder: RunFolder) -> Path | None:
    """The latest complete checkpoint, unchecked."""
    return next((path for path in reversed(_checkpoints(folder)) if (path / MANIFEST).is_file()), None)


def complete(folder: RunFolder, checkpoint: Path, limit: int | None) -> None:
    """Write a checkpoint's manifest, and remove the oldest of more than `limit` complete ones (None: no limit)."""
    seal(checkpoint)
    rotate(folder, limit)


def rotate(folder: RunFolder, limit: int | None) -> None:
    """Remove the oldest of more than `limit` complete checkpoints (None: no limit)."""
    if limit is not None and limit > 0:
        for old in [path for path in _checkpoints(folder) if (path / MANIFEST).is_file()][:-limit]:
            remove(old)


@contextmanager
def loading(checkpoint: object) -> Iterator[None]:
    """Errors of the loaders of a checkpoint's files become a RunError that names it."""
    try:
        yield
    except DyadsError:
        raise
    except Exception as error:  # whatever torch and transformers make of files with any content
        reason = reason_of(error)
        raise RunError(
            f"'{checkpoint}' cannot be loaded: {reason}; remove it, and --resume goes on from the checkpoint before it"
        ) from error


def checkpoint_to_resume(folder: RunFolder) -> Path | None:
    """The latest checkpoint whose files are those that were written; None if there is none.

    Later ones, which are incomplete or damaged, are removed, since training writes them again.
    """
    for path in _unusable(folder):
        remove(path)
    return last_checkpoint(folder)


def _unusable(folder: RunFolder) -> Iterator[Path]:
    """The checkpoints to remove before a resume; a line says why, and where the training goes on."""
    unusable: list[tuple[Path, str]] = []
    paths = _checkpoints(folder)
    while paths:
        if (reason := _reason(paths[-1])) is None:
            break
        unusable.append((paths.pop(), reason))
    unusable += [(path, "it is incomplete") for path in paths if not (path / MANIFEST).is_file()]
    start = f"step {step_of(paths[-1])}" if paths else "the beginning"
    for path, reason in unusable:
        notice(f"'{path}' is not used: {reason}; removed, and the training goes on from {start}")
        yield path


def _reason(checkpoint: Path) -> str | None:
    try:
        manifest = Manifest.of(checkpoint)
    except DyadsError:
        return f"its {MANIFEST} is damaged"
    if manifest is None:
        return "it is incomplete"
    damage = manifest.damage(exact=True) or _mistake(checkpoint)
    return f"it is damaged: {damage}" if damage else None


def _mistake(checkpoint: Path) -> str | None:
    """The reason why the Trainer cannot go on from its own state, in words."""
    path = checkpoint / _STATE
    try:
        state = json.loads(read_text(path, error=RunError))  # with NaN, where a logged number is not finite
    except (DyadsError, OSError, ValueError, RecursionError):
        return f"{_STATE} cannot be read"
    if not isinstance(state, dict) or state.get("global_step") != step_of(checkpoint):
        return f"{_STATE} is not of step {step_of(checkpoint)}"
    numbers = [state.get(key, 0) for key in ("epoch", "total_flos", "num_input_tokens_seen")]
    if not isinstance(state.get("log_history"), list) or not all(isinstance(n, int | float) for n in numbers):
        return f"{_STATE} has values of other types than the Trainer's"
    return None

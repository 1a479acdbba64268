# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: complete once they have a manifest, checked before a resume, rotated by their steps.

transformers' Trainer writes the files of `checkpoints/checkpoint-STEP`; the manifest comes after them. File times play
no part: a clock that is set back changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dyads.errors import DyadsError, notice
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import MANIFEST, Manifest, remove, seal

__all__ = ["checkpoint_to_resume", "complete", "last_checkpoint", "step_of"]


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
    if limit is not None and limit > 0:
        for old in [path for path in _checkpoints(folder) if (path / MANIFEST).is_file()][:-limit]:
            remove(old)


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
    damage = manifest.damage(exact=True)
    return f"it is damaged: {damage}" if damage else None

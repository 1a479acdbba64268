# SPDX-License-Identifier: Apache-2.0
"""Exceptions of dyads, and the suggestion at the end of an error about an unknown name.

DyadsError
├── ConfigError   a config, recipe or option contradicts itself   (also a ValueError)
├── TaskError     a task, its data or its name
├── RunError      a run folder, a checkpoint, a training that cannot continue
├── RoutingError  a task that is missing, unknown or does not match the batch   (also a ValueError)
└── MergeError    a merge that would not be exact   (also a ValueError)
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["ConfigError", "DyadsError", "MergeError", "RoutingError", "RunError", "TaskError", "did_you_mean"]


class DyadsError(Exception):
    """Base class. The message says what was given, what is allowed, and the command or argument that mends it."""


class ConfigError(DyadsError, ValueError):
    """A config, recipe or option that contradicts itself or has an unknown name in it."""


class TaskError(DyadsError):
    """A task, its data or its name."""


class RunError(DyadsError):
    """A run folder, a checkpoint, or a training that cannot continue."""


class RoutingError(DyadsError, ValueError):
    """A task that is missing, unknown, or does not match the batch."""


class MergeError(DyadsError, ValueError):
    """A merge that would not be exact."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the most similar known names, else all known names.

    >>> did_you_mean("lerning_rate", ["learning_rate", "steps"])
    " – did you mean 'learning_rate'?"
    """
    names = [str(n) for n in known]
    lowered = {n.lower(): n for n in names}
    near = [lowered[n] for n in get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
    if near:
        return " – did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    if not names:
        return ""
    shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
    return f" – known: {shown}"

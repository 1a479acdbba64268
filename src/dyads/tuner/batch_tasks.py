# SPDX-License-Identifier: Apache-2.0
"""Tasks of a batch: one for every sample, as the ids of each adapter.

Samples are not always rows. Beam search repeats every sample k times in a row, and some layers see the tokens of all
samples as rows; which row belongs to which sample is derived from the sizes of the call, or refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dyads.errors import RoutingError, did_you_mean

__all__ = ["BatchTasks", "TaskLike", "can_be_read"]

TaskLike = Tensor | Sequence[int | str] | int | str
"""A task for every sample: a LongTensor (b), or a list of ids and names. A single name, id or tensor without axes
applies to the whole batch."""

_BATCHED = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "x")
"""Arguments of transformers' models whose first axis is the batch."""


class BatchTasks:
    """The tasks of one batch, turned into ids once per adapter and device.

    `repeats` says how often the forward pass repeats every sample (beams), `widths` how many tokens a sample may have:
    a layer that sees tokens flattened into rows has one of them per sample.
    """

    def __init__(self, task: TaskLike) -> None:
        self.for_all = isinstance(task, (int, str)) or (isinstance(task, Tensor) and task.ndim == 0)
        """Whether one task applies to the whole batch, however many rows it has."""
        if isinstance(task, Tensor):
            if task.dtype.is_floating_point or task.dtype == torch.bool or task.ndim > 1:
                raise RoutingError(
                    f"task must be whole numbers of shape (batch,), got {task.dtype} {tuple(task.shape)}"
                )
            self.task: Tensor | list[int | str] = task.reshape(-1)
        else:
            self.task = [task] if isinstance(task, (int, str)) else list(task)
            for item in self.task:
                if not isinstance(item, (int, str)) or isinstance(item, bool):
                    raise RoutingError(f"a task is a name or an id, got {item!r}")
        if len(self.task) == 0:
            raise RoutingError("task is empty: give one task for every sample")
        self.repeated = False
        """Whether a call may have several rows for every sample, as inside `generate`."""
        self.repeats = 1
        self.widths: tuple[int, ...] = ()
        self._ids: dict[tuple[str, torch.device], tuple[tuple[str, ...], Tensor]] = {}

    def __len__(self) -> int:
        return len(self.task)

    def for_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchTasks:
        """These tasks for one call of the model, from the sizes of what it is called with.

        RoutingError unless one task applies to all rows, or every row has its own (or, `repeated`, every sample).
        """
        rows = _rows(args, kwargs)
        given = len(self)
        if rows is None or self.for_all:
            return self
        if rows != given and not (self.repeated and rows % given == 0):
            raise RoutingError(
                f"task has {given} entries for a batch of {rows}: give one for every row, or a single name or id for"
                " the whole batch"
            )
        tasks = copy.copy(self)  # shares the ids that are resolved already
        tasks.repeats = rows // given
        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        tasks.widths = tuple({v.shape[1] for v in tensors if v.ndim > 1 and v.shape[0] == rows})
        return tasks

    def for_generate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchTasks:
        """These tasks for the calls of a model inside `generate`, which is called with these arguments."""
        tasks = copy.copy(self.for_call(args, kwargs))
        tasks.repeated = True
        return tasks

    def of_rows(self, adapter: str, names: tuple[str, ...], x: Tensor) -> Tensor:
        """The id of every row (first axis) of a layer's input, on its device; a single one for a vector.

        Rows are samples, or their beams. An input of two axes may also hold the tokens of all samples, one sample after
        the other. Anything else is refused: which row belongs to which sample could only be guessed.
        """
        ids = self.ids(adapter, names, x.device)
        rows = x.shape[0] if x.ndim > 1 else 1
        if self.for_all:
            return ids.expand(rows)
        samples = len(self) * self.repeats
        repeats = self.repeats
        if rows != samples:
            if x.ndim != 2 or rows % samples or rows // samples not in self.widths:
                raise RoutingError(
                    f"adapter '{adapter}': a layer sees an input of shape {tuple(x.shape)} in a batch of {samples}, so"
                    " its rows are not the samples, and their tasks are unknown. Leave such layers out"
                    " (exclude_modules), or give all samples one task."
                )
            repeats *= rows // samples
        return ids if repeats == 1 else ids.repeat_interleave(repeats)

    def ids(self, adapter: str, names: tuple[str, ...], device: torch.device) -> Tensor:
        """The tasks as ids of that adapter, (len(self)) on the device; RoutingError for one it does not know."""
        found = self._ids.get((adapter, device))
        if found is None or found[0] is not names:
            with _outside_inference_mode():  # the ids may be used in a training step later
                ids = self._resolve(adapter, names).to(device, non_blocking=True)
            found = self._ids[adapter, device] = (names, ids)
        return found[1]

    def _resolve(self, adapter: str, names: tuple[str, ...]) -> Tensor:
        if isinstance(self.task, Tensor):
            outside = (self.task < 0) | (self.task >= len(names))
            if can_be_read(self.task):
                if bool(outside.any()):
                    raise RoutingError(_unknown_id(adapter, self.task[outside][0].item(), names))
            else:
                torch._assert_async(~outside.any(), f"adapter '{adapter}': a task id is outside 0 to {len(names) - 1}")
            if not torch.compiler.is_compiling() and self.task.is_inference():
                return self.task.clone().long()
            return self.task.long()
        index = {name: i for i, name in enumerate(names)}
        ids_of: list[int] = []
        for task in self.task:
            if isinstance(task, str):
                if task not in index:
                    raise RoutingError(
                        f"adapter '{adapter}' does not know task '{task}'{did_you_mean(task, names)}"
                        f" (`dyads.add_task(model, {task!r})` would add it)"
                    )
                ids_of.append(index[task])
            else:
                if not 0 <= task < len(names):
                    raise RoutingError(_unknown_id(adapter, task, names))
                ids_of.append(task)
        return torch.tensor(ids_of, dtype=torch.long, device="cpu")


def _outside_inference_mode() -> AbstractContextManager[Any]:
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def can_be_read(tensor: Tensor) -> bool:
    """Whether reading a value does not synchronise with an accelerator or break a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _unknown_id(adapter: str, task: Any, names: tuple[str, ...]) -> str:
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:8])) + (", …" if len(names) > 8 else "")
    return f"adapter '{adapter}' does not know task {task}: its ids go from 0 to {len(names) - 1} ({shown})"


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The batch size of a call, from the first tensor that has one."""
    for value in (*args[:1], *(kwargs.get(name) for name in _BATCHED), *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            return value.shape[0] if value.ndim > 1 else 1
    return None

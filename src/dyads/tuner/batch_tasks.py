# SPDX-License-Identifier: Apache-2.0
"""Tasks of a batch: one for every sample, as the ids of each adapter.

Samples are not always rows. Beam search repeats every sample k times in a row, some layers see the tokens of all
samples as rows, and packing joins several samples in one row; which row or token belongs to which sample is derived
from the arguments of the call, or refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dyads.errors import RoutingError, did_you_mean
from dyads.tuner.packing import Packing, can_be_read

__all__ = ["BatchTasks", "TaskLike"]

TaskLike = Tensor | Sequence[int | str] | int | str
"""A task for every sample: a LongTensor (b), or a list of ids and names. A single name, id or tensor without axes
applies to the whole batch. A LongTensor (b t) has one for every token."""

_BATCHED = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "x")
"""Arguments of transformers' models whose first axis is the batch."""


class BatchTasks:
    """The tasks of one batch, turned into ids once per adapter and device.

    `repeats` says how often the forward pass repeats every sample (beams), `widths` how many tokens a sample may have:
    a layer that sees tokens flattened into rows has one of them per sample. `tokens` is the shape (b t) of a batch
    whose tokens have tasks of their own.
    """

    def __init__(self, task: TaskLike) -> None:
        self.for_all = isinstance(task, (int, str)) or (isinstance(task, Tensor) and task.ndim == 0)
        """Whether one task applies to the whole batch, however many rows it has."""
        self.tokens: tuple[int, ...] | None = None
        self.packing: Packing | None = None
        if isinstance(task, Tensor):
            if task.dtype.is_floating_point or task.dtype == torch.bool or task.ndim > 2:
                raise RoutingError(
                    "task must be whole numbers of shape (batch,), or (batch, tokens) where sequences are packed, got"
                    f" {task.dtype} {tuple(task.shape)}"
                )
            if task.ndim == 2:
                self.tokens = tuple(task.shape)
            self.task: Tensor | list[int | str] = task.reshape(-1)
        else:
            self.task = [task] if isinstance(task, (int, str)) else list(task)
            for item in self.task:
                if not isinstance(item, (int, str)) or isinstance(item, bool):
                    raise RoutingError(f"a task is a name or an id, got {item!r}")
        if len(self.task) == 0:
            raise RoutingError("task is empty: give one task for every sample")
        self.copies = 1
        """Rows that a call may have for every sample in place of one: inside `generate` its beams or answers."""
        self.repeats = 1
        self.widths: tuple[int, ...] = ()
        self._ids: dict[tuple[str, torch.device], tuple[tuple[str, ...], Tensor]] = {}

    def __len__(self) -> int:
        return len(self.task)

    def for_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchTasks:
        """These tasks for one call of the model, from the arguments that it is called with.

        RoutingError unless one task applies to all rows, or every row, packed sequence or token has its own, or every
        sample of `copies` rows.
        """
        first = _first_batched(args, kwargs)
        if first is None or self.for_all:
            return self
        rows, given = first.shape[0] if first.ndim > 1 else 1, len(self)
        if self.tokens is not None:
            if self.tokens != first.shape[:2]:
                raise RoutingError(
                    f"task has shape {self.tokens} for a batch of shape {tuple(first.shape[:2])}: give one task for"
                    " every token, or one for every row"
                )
            return self
        tasks = copy.copy(self)  # shares the ids that are resolved already
        if rows not in (given, given * self.copies):
            if first.ndim > 1:
                tasks.packing = Packing.of_call(kwargs, rows, first.shape[1], given)
            if tasks.packing is None:
                raise RoutingError(
                    f"task has {given} entries for a batch of {rows}: give one for every row (or for every packed"
                    " sequence, with position_ids or cu_seq_lens_q), or a single name or id for the whole batch"
                )
            tasks.tokens = tuple(first.shape[:2])
            return tasks
        tasks.repeats = rows // given
        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        tasks.widths = tuple({v.shape[1] for v in tensors if v.ndim > 1 and v.shape[0] == rows})
        return tasks

    def for_generate(self, args: tuple[Any, ...], kwargs: dict[str, Any], copies: int) -> BatchTasks:
        """These tasks for the calls of a model inside `generate`, which is called with these arguments.

        There every sample has one row, as in the encoder, or `copies` in a row. Models that compute other rows too, as
        Dia does for its guidance, behind those of the batch, are refused.
        """
        tasks = copy.copy(self.for_call(args, kwargs))
        if tasks.tokens is not None:
            raise RoutingError("generate needs one task for every row, and not for every token or packed sequence")
        tasks.copies = copies
        return tasks

    def flattened(self, x: Tensor) -> Tensor:
        """A layer's input (b t d) with the tokens as rows (n d), where tokens have tasks of their own."""
        if x.shape[:-1] != self.tokens:
            raise RoutingError(
                f"a layer sees an input of shape {tuple(x.shape)} in a batch of {self.tokens} tokens with a task for"
                " each, so which token is which is unknown. Leave such layers out (exclude_modules), or do not pack"
            )
        return x.flatten(0, -2)

    def of_rows(self, adapter: str, names: tuple[str, ...], x: Tensor) -> Tensor:
        """The id of every row (first axis) of a layer's input, on its device; a single one for a vector.

        Rows are samples, or their beams. An input of two axes may also hold the tokens of all samples, one sample after
        the other. Anything else is refused: which row belongs to which sample could only be guessed.
        """
        ids = self.ids(adapter, names, x.device)
        rows = x.shape[0] if x.ndim > 1 else 1
        if self.for_all:
            return ids.expand(rows)
        if self.packing is not None:
            ids = ids[self.packing.sequence.to(x.device)]
        samples = len(ids) * self.repeats
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

    def samples(
        self, adapter: str, x: Tensor, task: Tensor, mask: Tensor | None, *, needed: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, task, mask) of a layer's tokens (n d) as samples (b t d), for losses on samples, where they are packed.

        A task for every token does not say where samples begin: RoutingError where that is `needed`.
        """
        if self.packing is not None:
            real = x.new_ones(len(x)) if mask is None else mask.reshape(-1).to(x.dtype)
            return self.packing.unpacked(x), self.packing.unpacked(task)[:, 0], self.packing.unpacked(real)
        if needed and self.tokens is not None:
            raise RoutingError(
                f"adapter '{adapter}' compares samples with their tasks, and a task for every token does not say where"
                " samples begin: give one for every packed sequence, with position_ids or cu_seq_lens_q"
            )
        return x, task, mask

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


def _unknown_id(adapter: str, task: Any, names: tuple[str, ...]) -> str:
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:8])) + (", …" if len(names) > 8 else "")
    return f"adapter '{adapter}' does not know task {task}: its ids go from 0 to {len(names) - 1} ({shown})"


def _first_batched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first argument of a call that has the batch as its first axis."""
    for value in (*args[:1], *(kwargs.get(name) for name in _BATCHED), *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    return None

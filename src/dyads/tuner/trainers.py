# SPDX-License-Identifier: Apache-2.0
"""Trainers of transformers and TRL with tasks and auxiliary losses (checked with transformers 5.23 and TRL 1.16).

Private names relied on here: `_set_signature_columns_if_needed` of Trainer, and of TRL's GRPO and RLOO trainers
`_generate_and_score_completions` and `_get_per_token_logps_and_entropies`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dyads.errors import RoutingError
from dyads.tuner.batch_tasks import BatchTasks
from dyads.tuner.routing import Routing, find_routing
from dyads.tuner.task_collator import COLUMN, TaskCollator

__all__ = ["with_tasks"]

T = TypeVar("T")


def with_tasks(trainer: type[T]) -> type[T]:
    """A subclass of a trainer (Trainer, TRL's SFT, DPO, KTO, ORPO, CPO, GRPO, RLOO and others) for models with dyads.

    The column `task` of the dataset, a name or an id, reaches the model; auxiliary losses are part of the loss that is
    optimised, whatever the trainer makes its loss of. RoutingError for a trainer whose rows cannot be followed.
    """
    generates = hasattr(trainer, "_generate_and_score_completions")
    bases = (_GeneratesWithTasks, trainer) if generates else (_WithTasks, trainer)
    return type(trainer.__name__, bases, {"__module__": trainer.__module__, "__doc__": with_tasks.__doc__})


class _WithTasks:
    """Keeps the column `task`, and adds auxiliary losses."""

    model: nn.Module
    loss_is_scaled_for_ga: bool | None
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    current_gradient_accumulation_steps: int
    _signature_columns: list[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        routing = find_routing(self.model)
        if routing is not None:
            self.data_collator.names = _names(routing)

    @property
    def data_collator(self) -> TaskCollator:
        collator: TaskCollator = self.__dict__["data_collator"]
        return collator

    @data_collator.setter
    def data_collator(self, inner: Callable[[list[Any]], Any]) -> None:
        self.__dict__["data_collator"] = inner if isinstance(inner, TaskCollator) else TaskCollator(inner)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if COLUMN not in self._signature_columns:
            self._signature_columns.append(COLUMN)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        with self._tasks_of(inputs):
            return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc,no-any-return]

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._tasks_of(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _tasks_of(self, inputs: Any) -> AbstractContextManager[None]:
        """The tasks of a batch for calls of the model that do not pass them on."""
        routing = find_routing(self.model)
        if routing is None or not routing.names:
            return nullcontext()
        if isinstance(inputs, Mapping):
            tasks = inputs.get(COLUMN)
            if isinstance(tasks, Tensor) and {"chosen_input_ids", "rejected_input_ids"} <= inputs.keys():
                tasks = torch.cat([tasks, tasks])  # the ORPO and CPO trainers join both halves themselves
            return nullcontext() if tasks is None else routing.using(tasks)
        if routing.need_tasks() and routing.ambient is None:
            raise RoutingError(
                f"{type(self).__name__} makes its batches out of rows while it trains, and with_tasks cannot follow"
                " which of them has which task: train on rows of one task, within `with dyads.use_task(model, …)`"
            )
        return nullcontext()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As the trainer's, with the auxiliary loss added; the mean of several forward passes."""
        routing = find_routing(model)
        losses: list[Tensor] = []
        with nullcontext() if routing is None else routing.keeping_losses(losses):
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not losses:
            return found
        loss = found[0] if return_outputs else found
        auxiliary = torch.stack([kept.to(loss.device) for kept in losses]).mean()
        if self._loss_is_scaled(num_items_in_batch):  # else Trainer.training_step divides the sum
            auxiliary = auxiliary / self.current_gradient_accumulation_steps
        loss = loss + auxiliary.to(loss.dtype)
        return (loss, found[1]) if return_outputs else loss

    def _loss_is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the trainer's loss is divided by the number of accumulated calls already, as training_step has it."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return scaled


class _GeneratesWithTasks(_WithTasks):
    """A trainer that generates completions of the rows, and passes its own inputs to the model."""

    def _tasks_of(self, inputs: Any) -> AbstractContextManager[None]:
        return nullcontext()  # `inputs` are rows whose completions may be generated already, in another order

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        ids = self._ids(inputs)
        if ids is None:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc,no-any-return]
        routing = find_routing(self.model)
        assert routing is not None
        with routing.using(ids):
            scored = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        return {**scored, COLUMN: ids.to(next(v for v in scored.values() if isinstance(v, Tensor)).device)}

    def _ids(self, rows: list[dict[str, Any]]) -> Tensor | None:
        routing = find_routing(self.model)
        names = None if routing is None else _names(routing)
        if names is None:
            return None
        if len(names) == 1 and not any(COLUMN in row for row in rows):
            return None
        if any(COLUMN not in row for row in rows):
            raise RoutingError(f"the rows of the dataset have no column `{COLUMN}`, which the adapter needs")
        return BatchTasks([row[COLUMN] for row in rows]).ids("default", names, torch.device("cpu"))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        routing = find_routing(model)
        if routing is None or COLUMN not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with routing.using(inputs[COLUMN]):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        batch_size: int | None = None, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        # It calls the model on `batch_size` rows after the other.
        routing = find_routing(model)
        tasks = None if routing is None else routing.ambient
        given = (model, input_ids, attention_mask, logits_to_keep, batch_size, *args)
        if tasks is None or batch_size is None or tasks.for_all:
            return super()._get_per_token_logps_and_entropies(*given, **kwargs)  # type: ignore[misc]
        assert isinstance(tasks.task, Tensor)
        turns = iter(torch.split(tasks.task, batch_size))
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, COLUMN: next(turns)}), with_kwargs=True
        )
        try:
            return super()._get_per_token_logps_and_entropies(*given, **kwargs)  # type: ignore[misc]
        finally:
            hook.remove()


def _names(routing: Routing) -> tuple[str, ...] | None:
    """The names of the tasks, which must be the same for all adapters; None where no adapter looks at a task."""
    known = set(routing.names.values())
    if len(known) > 1:
        raise RoutingError(f"the adapters {', '.join(routing.names)} know different tasks: train one at a time")
    return next(iter(known), None)

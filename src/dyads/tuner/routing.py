# SPDX-License-Identifier: Apache-2.0
"""Routing: the tasks of a running forward pass on the way to the adapted layers.

Every adapted layer of a model holds the model's one `Routing`. What belongs to a forward pass is a `ForwardPass`, which
the model's call makes, and which layers find by their thread: passes of several threads do not meet. Three rules:

- a pass ends with the model's call, so a call without `task=` never gets the task of an earlier one;
- gradient checkpointing runs layers again in backward, perhaps in another thread and after other passes: the second run
  gets the pass of the first (model_calls.py);
- `use_task` and `generate` set tasks for the passes within a context, by a context variable, so that they hold across
  awaits and in threads that copy the context (asyncio.to_thread).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dyads.errors import RoutingError, did_you_mean
from dyads.ops import CachedOperator, in_backward
from dyads.tuner.auxiliary import TrainingCall
from dyads.tuner.backward_check import BackwardCheck, GradientWatch
from dyads.tuner.batch_tasks import BatchTasks, TaskLike
from dyads.tuner.packing import can_be_read

__all__ = [
    "ForwardPass",
    "OperatorCache",
    "Routing",
    "RowGroup",
    "RowGroups",
    "auxiliary_loss",
    "find_routing",
    "use_task",
]

OperatorCache = dict[int, dict[str, CachedOperator]]
"""Operators by layer and adapter."""


class ForwardPass:
    """A running call of a model: the tasks of its batch, and in training what its layers give back."""

    def __init__(self, model: nn.Module | None, outer: ForwardPass | None, tasks: BatchTasks | None = None) -> None:
        self.model, self.outer, self.tasks = model, outer, tasks
        self.training: TrainingCall | None = None
        self.check: BackwardCheck | None = None


@dataclass(frozen=True)
class RowGroup:
    """The rows of a forward pass that have the same adapter."""

    adapter: str
    rows: Tensor | None
    """Their places in the batch; None: all rows."""
    tasks: BatchTasks | None
    """Their tasks, where the gates look at them."""


@dataclass(frozen=True)
class RowGroups:
    """The adapters of the rows of a forward pass (row_adapters.py)."""

    count: int
    """Rows in the batch, with those that have no adapter."""
    groups: Sequence[RowGroup]


class _Thread:
    """What one thread runs. Not context variables, which torch.compile cannot trace (torch 2.13)."""

    def __init__(self) -> None:
        self.current: ForwardPass | None = None
        self.tasks: BatchTasks | None = None
        """Those of `use_task` again, for compiled code."""
        self.open = 0
        """How many `using` have begun here and not ended."""
        self.interleaved = False
        """Whether some of them belong to other coroutines, so that `tasks` may be theirs."""
        self.cache: OperatorCache | None = None
        self.check: BackwardCheck | None = None
        self.kept: list[Tensor] | None = None
        """The auxiliary losses of `keeping_losses`."""
        self.rows: RowGroups | None = None
        """The adapters of the rows, where they differ; the active adapters then do not count."""
        self.untaken: Tensor | None = None
        """The auxiliary loss of the last call, where the model returned no loss to add it to."""


class _Threads(threading.local):
    """A `_Thread` for every thread; torch.compile cannot assign attributes of a threading.local itself (torch 2.13)."""

    def __init__(self) -> None:
        self.own = _Thread()


@dataclass(frozen=True)
class _Used:
    """The tasks of the innermost `using` of a context, and how many are around each other there."""

    tasks: BatchTasks | None = None
    depth: int = 0


_TASKS: ContextVar[Mapping[Any, _Used]] = ContextVar("dyads_tasks", default=MappingProxyType({}))
"""By Routing: the tasks of forward passes without `task=`."""

_ONE_BATCH = threading.Lock()

_ONLY = BatchTasks(0)
"""The tasks of any batch, for an adapter that knows one task."""


class Routing:
    """Tasks of the adapters of one model, and its running forward passes."""

    def __init__(self) -> None:
        self.names: dict[str, tuple[str, ...]] = {}
        """Task names of the adapters that look at a task."""
        self.requests: BatchTasks | None = None
        """The task of requests of continuous batching, while they are answered."""
        self.merged: dict[str, int] = {}
        """The task that an adapter is merged for, while it is."""
        self.undo: list[Any] = []
        """Callables that take our wrappers off the model (model_calls.py)."""
        self.checked = False
        """Whether a backward pass through all adapters was observed (backward_check.py)."""
        self.gradients = GradientWatch(self._passed)
        self._threads = _Threads()
        self._caches: list[OperatorCache] = []

    def __getstate__(self) -> dict[str, Any]:
        # Passes, their losses and caches belong to threads, hooks to parameters: they can be neither copied nor stored.
        return {key: v for key, v in self.__dict__.items() if key not in ("gradients", "_threads", "_caches")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, gradients=GradientWatch(self._passed), _threads=_Threads(), _caches=[])

    @property
    def here(self) -> _Thread:
        """What this thread runs."""
        return self._threads.own

    # --- tasks --------------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, task: TaskLike | BatchTasks | None) -> Iterator[None]:
        """Within this context a forward pass, or a call of a layer, without a task of its own has this one."""
        tasks = task if task is None or isinstance(task, BatchTasks) else BatchTasks(task)
        here, outer = self.here, _TASKS.get().get(self, _Used())
        token = _TASKS.set({**_TASKS.get(), self: _Used(tasks, outer.depth + 1)})
        current, here.current = here.current, None
        here.tasks, here.interleaved = tasks, here.interleaved or here.open > outer.depth
        here.open += 1
        try:
            yield
        finally:
            _TASKS.reset(token)
            here.current, here.tasks = current, outer.tasks
            here.open -= 1
            here.interleaved = here.interleaved and here.open > 0

    @property
    def ambient(self) -> BatchTasks | None:
        """The tasks of the innermost `using`."""
        if not torch.compiler.is_compiling():
            return _TASKS.get().get(self, _Used()).tasks
        if self.here.interleaved:
            raise RoutingError(
                "use_task of several coroutines at a time: compiled code needs task=… in the call itself"
            )
        return self.here.tasks

    def running(self) -> ForwardPass:
        """The forward pass of this thread; outside of any, one with the tasks of `using`."""
        return self.here.current or ForwardPass(None, None, self.ambient)

    def tasks(self) -> BatchTasks | None:
        """The tasks of the running forward pass."""
        current = self.here.current
        return self.ambient if current is None else current.tasks

    def flattens(self, x: Tensor) -> BatchTasks | None:
        """The running tasks where they belong to tokens, and x (b t d) has its tokens on two axes."""
        tasks = self.tasks() if self.names else None
        return tasks if tasks is not None and tasks.tokens is not None and x.ndim > 2 else None

    def ids(self, adapter: str, x: Tensor) -> Tensor:
        """The task of every row (first axis) of a layer's input, on its device; a single row for a vector."""
        names = self.names[adapter]
        tasks = self.tasks()
        if tasks is None and len(names) == 1:
            tasks = _ONLY
        if tasks is None and in_backward():
            raise RoutingError(
                f"adapter '{adapter}' needs a task, and its layer runs again in backward, by a kind of checkpointing"
                " that is not transformers': do both forward and backward within `with dyads.use_task(model, …)`, or"
                " call model.gradient_checkpointing_enable()"
            )
        if tasks is None:
            raise RoutingError(
                f"adapter '{adapter}' needs a task: pass task=… to the model's call or to generate, one name or id for"
                f" every sample{did_you_mean('', names)}. dyads.with_tasks(Trainer), also of TRL's trainers, passes the"
                " column `task` of the dataset on. Around code that cannot pass it, use"
                " `with dyads.use_task(model, …)`."
            )
        return tasks.of_rows(adapter, names, x)

    def need_tasks(self) -> list[str]:
        """The adapters whose gates look at a task, and that know more than one."""
        return [adapter for adapter, names in self.names.items() if len(names) > 1]

    @contextmanager
    def requests_of(self, tasks: BatchTasks) -> Iterator[None]:
        """Within this context requests of continuous batching, in any thread, have this task; one context at a time."""
        with _ONE_BATCH:
            self.requests = tasks
            try:
                yield
            finally:
                self.requests = None

    def check_merged(self, adapter: str) -> None:
        """RoutingError where a forward pass has another task than the one that the adapter is merged for."""
        tasks = self.tasks()
        if tasks is None or adapter not in self.merged:
            return
        names, merged = self.names[adapter], self.merged[adapter]
        # On the device where the tasks are, where reading them costs nothing.
        ids = tasks.ids(adapter, names, tasks.task.device if isinstance(tasks.task, Tensor) else torch.device("cpu"))
        message = (
            f"adapter '{adapter}' is merged into the model for task '{names[merged]}', so it cannot serve another one:"
            " call unmerge_adapter() first"
        )
        if not can_be_read(ids):
            torch._assert_async((ids == merged).all(), message)
        elif bool((ids != merged).any()):
            raise RoutingError(message)

    @contextmanager
    def keeping_losses(self, losses: list[Tensor]) -> Iterator[None]:
        """Within this context auxiliary losses of forward passes go to the list, and not into the model's own loss."""
        before, self.here.kept = self.here.kept, losses
        try:
            yield
        finally:
            self.here.kept = before

    def next_check(self) -> BackwardCheck | None:
        """The check of a forward pass of training that starts; None after the first backward pass."""
        if self.here.check is not None:
            self.here.check.end()  # of a pass without a backward pass so far
        self.here.check = None if self.checked else BackwardCheck(self.gradients, self._passed)
        return self.here.check

    def note_call(self, layer: str, B: Tensor) -> None:
        """Note that a layer was called, uncompiled."""
        if not self.checked:
            self.gradients.called.add(layer)
            if (running := self.here.current) is not None and running.check is not None:
                running.check.called(layer, B)

    def _passed(self) -> None:
        self.checked = True
        self.gradients.end()

    # --- operators of weights that do not change ----------------------------------------------------------------------

    @contextmanager
    def unchanged_weights(self) -> Iterator[None]:
        """A promise that adapters do not change within this context: layers join and cast their weights only once.

        For the many small forward passes of decoding; it holds without gradients, and in the thread that gives it.
        """
        if self.here.cache is not None:
            yield
            return
        cache = self.here.cache = {}
        self._caches.append(cache)
        try:
            yield
        finally:
            self.here.cache = None
            self._caches = [kept for kept in self._caches if kept is not cache]

    @property
    def cache(self) -> OperatorCache | None:
        """Operators by layer and adapter, inside `unchanged_weights`."""
        return self.here.cache

    def forget_weights(self) -> None:
        """Empty the caches of all threads, after a change of weights."""
        for cache in self._caches:
            cache.clear()


@contextmanager
def use_task(model: nn.Module, task: TaskLike | None) -> Iterator[None]:
    """Within this context, forward passes of `model` or of its parts without a task have this one.

    For code that cannot pass `task=` itself: a pipeline, an evaluation harness, a call of one submodule. A list has a
    task for every row of the batches within; a single name or id applies to batches of any size.
    """
    routing = find_routing(model)
    if routing is None:
        raise RoutingError(f"{type(model).__name__} has no dyads adapter, so there is no task to use")
    with routing.using(task):
        yield


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Take the auxiliary loss of the last forward pass of `model`, to add it to a loss of your own making.

    It is the mean over the adapted layers of the losses that their method adds, weighted already (MoRE's contrastive
    loss, a load-balancing loss). 0 in evaluation, for a method without one, when it was taken before, and where the
    model itself returned a loss, which then contains it. The next forward pass drops it.
    """
    routing = find_routing(model)
    loss = None if routing is None else routing.here.untaken
    if routing is None or loss is None:
        return torch.zeros(())  # adds to a loss on any device
    routing.here.untaken = None
    return loss


def find_routing(model: nn.Module) -> Routing | None:
    """The Routing of the adapted layers of a model, None where it has none."""
    for module in model.modules():
        routing = module.__dict__.get("routing")
        if isinstance(routing, Routing):
            return routing
    return None

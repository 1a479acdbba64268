# SPDX-License-Identifier: Apache-2.0
"""Wrappers of a base model's call, `generate` and gradient checkpointing, which take `task=` and make forward passes.

They are objects set on the model and not closures, so that a deep copy of it has wrappers of its own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dyads.errors import RoutingError
from dyads.ops import in_backward
from dyads.tuner.auxiliary import TrainingCall
from dyads.tuner.batch_tasks import BatchTasks, TaskLike
from dyads.tuner.routing import ForwardPass, Routing

__all__ = ["attach", "detach"]

_CONTINUOUS = ("init_continuous_batching", "continuous_batching_context_manager")
"""Functions of transformers that make a manager of continuous batching (5.23)."""
_REQUEST = re.compile(r"^req_(\d+)")
"""The start of a request's name: its number in the batch."""


def attach(routing: Routing, model: nn.Module) -> None:
    """Make `model` accept `task=` in its call and in `generate`, and keep its tasks through checkpointing."""
    enter = model.register_forward_pre_hook(
        _EnterForward(routing, own_task=_passes_task(model)), with_kwargs=True, prepend=True
    )
    leave = model.register_forward_hook(_LeaveForward(routing), always_call=True, with_kwargs=True)
    routing.undo = [enter.remove, leave.remove]
    wrappers = (
        ("generate", _Generate),
        ("generate_batch", _GenerateBatch),
        *((name, _ContinuousBatching) for name in _CONTINUOUS),
        ("_set_gradient_checkpointing", _SetCheckpointing),
    )
    for name, wrapper in wrappers:
        inner: Any = getattr(model, name, None)
        if callable(inner):
            model.__dict__[name] = wrapper(inner, model, routing)
            routing.undo.append(_Remove(model, name))
    _wrap_checkpointing(routing, model)


def detach(routing: Routing, model: nn.Module) -> None:
    """Undo everything that `attach` and checkpointing changed on the model."""
    for undo in routing.undo:
        undo()
    routing.undo = []
    for module in model.modules():
        func = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(func, _Checkpoint):
            module.__dict__["_gradient_checkpointing_func"] = func.func


def _wrap_checkpointing(routing: Routing, model: nn.Module) -> None:
    """Wrap the functions that transformers gave its layers for checkpointing (checked with transformers 5.23)."""
    for module in model.modules():
        func = module.__dict__.get("_gradient_checkpointing_func")
        if func is not None and not isinstance(func, _Checkpoint):
            module.__dict__["_gradient_checkpointing_func"] = _Checkpoint(func, routing)


def _takes_task(function: Any) -> bool:
    """Whether a model's function has a `task` of its own, as Whisper's generate ("transcribe" or "translate")."""
    return "task" in inspect.signature(function).parameters


def _passes_task(model: nn.Module) -> bool:
    """Whether `task` is a keyword of the model itself, or of a module in it that its `**kwargs` may reach."""
    own = inspect.signature(type(model).forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
        return _takes_task(type(model).forward)
    # TorchScript's modules have forwards that cannot be inspected.
    kinds = {type(module) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)}
    return any(_takes_task(kind.forward) for kind in kinds)


class _Remove:
    """Undo an attribute that was set on an instance."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self) -> None:
        self.owner.__dict__.pop(self.name, None)


class _EnterForward:
    """The start of a forward pass."""

    def __init__(self, routing: Routing, *, own_task: bool) -> None:
        self.routing, self.own_task = routing, own_task

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        routing, here = self.routing, self.routing.here
        here.current = _without_interrupted(here.current, model)
        entered = here.current = ForwardPass(model, here.current)  # first: an error below must find it, to end it
        here.untaken = None
        task = None if self.own_task else kwargs.pop("task", None)
        if model.training and torch.is_grad_enabled():
            entered.training = TrainingCall(model, args, kwargs)
            if entered.outer is None and not torch.compiler.is_compiling() and not in_backward():
                entered.check = routing.next_check()
        if routing.names:
            tasks = routing.ambient if task is None else BatchTasks(task)
            if tasks is None and "read_index" in kwargs:  # paged attention, in the thread of continuous batching
                tasks = routing.requests
            entered.tasks = None if tasks is None else tasks.for_call(args, kwargs)
            if entered.training is not None:
                entered.training.tasks = entered.tasks
        return args, kwargs


def _without_interrupted(current: ForwardPass | None, model: nn.Module) -> ForwardPass | None:
    """The pass around a call of `model` that starts, without passes that were interrupted, as by Ctrl-C in a notebook.

    PyTorch calls the hook that ends a pass after an Exception, and not after a KeyboardInterrupt. A model may also call
    itself; then its first call is on the stack.
    """
    around, entered = current, current
    while entered is not None:
        if entered.model is model:
            around = entered.outer
        entered = entered.outer
    if around is current or torch.compiler.is_compiling() or _calls_on_stack(model) > 1:
        return current
    return around


def _calls_on_stack(model: nn.Module) -> int:
    code, frame, calls = nn.Module._call_impl.__code__, inspect.currentframe(), 0
    while frame is not None:
        calls += frame.f_code is code and frame.f_locals["self"] is model
        frame = frame.f_back
    return calls


class _LeaveForward:
    """The end of a forward pass, also by an error."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        here = self.routing.here
        ended = here.current
        if ended is None or ended.model is not model:
            return None  # a hook before _EnterForward raised an error
        here.current = ended.outer
        call = ended.training
        if call is None or output is None:  # None: an error ended it
            return None
        loss = call.loss()
        with_loss = None if loss is None or here.kept is not None else call.added_to(output, loss)
        if with_loss is None and loss is not None:
            outer = None if ended.outer is None else ended.outer.training
            if outer is not None:
                outer.losses += call.losses  # a nested call: the outer one returns the loss
            elif here.kept is not None:
                here.kept.append(loss)
            else:
                here.untaken = loss
        if ended.check is not None:
            ended.check.returned(output if with_loss is None else with_loss, loss)
        return with_loss


class _Checkpoint:
    """A checkpointing function whose second run has the forward pass of its first."""

    def __init__(self, func: Callable[..., Any], routing: Routing) -> None:
        self.func, self.routing = func, routing

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        routing, first = self.routing, self.routing.running()

        def run_in_its_pass(*inner: Any, **inner_kwargs: Any) -> Any:
            here = routing.here  # of the thread that runs backward
            before, here.current = here.current, first
            try:
                return run(*inner, **inner_kwargs)
            finally:
                here.current = before

        return self.func(run_in_its_pass, *args, **kwargs)


class _SetCheckpointing:
    """The model's own switch for gradient checkpointing, after which its functions are wrapped."""

    def __init__(self, inner: Callable[..., Any], model: nn.Module, routing: Routing) -> None:
        self.inner, self.model, self.routing = inner, model, routing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.inner(*args, **kwargs)
        _wrap_checkpointing(self.routing, self.model)
        return result


class _Generate:
    """The model's own `generate`, with `task=`; where it has a `task` itself, ours comes from `use_task`."""

    def __init__(self, inner: Callable[..., Any], model: nn.Module, routing: Routing) -> None:
        self.inner, self.model, self.routing, self.own_task = inner, model, routing, _takes_task(inner)

    def __call__(self, *args: Any, task: TaskLike | None = None, **kwargs: Any) -> Any:
        routing = self.routing
        if self.own_task and task is not None:
            kwargs["task"], task = task, None
        tasks = routing.ambient if task is None else BatchTasks(task)
        if tasks is None or not routing.names:
            with routing.unchanged_weights():
                return self.inner(*args, **kwargs)
        tasks = tasks.for_generate(args, kwargs, _copies(self.model, args, kwargs))
        with routing.using(tasks), routing.unchanged_weights():
            return self.inner(*args, **kwargs)


def _copies(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many rows transformers' `generate` makes of every sample (`_expand_inputs_for_generation`, 5.23)."""
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)

    own = getattr(model, "generation_config", None)

    def option(name: str) -> int:
        given = (kwargs.get(name), getattr(config, name, None), getattr(own, name, None))
        return next((number for number in given if number is not None), 1)

    return max(option("num_beams"), option("num_return_sequences"))


class _GenerateBatch:
    """The model's own `generate_batch` (continuous batching), once for every task of its requests.

    It joins the tokens of all requests into one row and computes in a thread of its own, where they have no tasks.
    """

    def __init__(self, inner: Callable[..., Any], model: nn.Module, routing: Routing) -> None:
        self.inner, self.routing = inner, routing

    def __call__(self, inputs: list[list[int]], *args: Any, task: TaskLike | None = None, **kwargs: Any) -> Any:
        routing = self.routing
        if not routing.need_tasks():
            return self.inner(inputs, *args, **kwargs)
        tasks = routing.ambient if task is None else BatchTasks(task)
        if tasks is None:
            raise RoutingError("generate_batch needs a task: pass task=…, one name or id for every request or for all")
        if not tasks.for_all and len(tasks) != len(inputs):
            raise RoutingError(f"task has {len(tasks)} entries for {len(inputs)} requests: give one for every request")
        if kwargs.get("persistent_manager"):
            raise RoutingError(
                "persistent_manager=True may keep the computations of one task for another: leave it out"
            )
        for adapter in routing.need_tasks():
            tasks.ids(adapter, routing.names[adapter], torch.device("cpu"))  # here: the thread only logs its errors
        given = tasks.task.tolist() if isinstance(tasks.task, torch.Tensor) else tasks.task
        places: dict[int | str, list[int]] = {}
        for place in range(len(inputs)):
            places.setdefault(given[0] if tasks.for_all else given[place], []).append(place)
        answers: list[tuple[int, str, Any]] = []
        for one, own in places.items():
            with routing.requests_of(BatchTasks(one)):
                found = self.inner([inputs[place] for place in own], *args, **kwargs)
            for key, answer in found.items():
                number = int(_REQUEST.match(key)[1])  # type: ignore[index]
                answers.append((own[number], _REQUEST.sub(f"req_{own[number]}", key), answer))
        answers.sort(key=lambda answer: answer[0])
        for _, key, answer in answers:
            answer.request_id = key
        return {key: answer for _, key, answer in answers}


class _ContinuousBatching:
    """The model's own managers of continuous batching, whose requests have no tasks outside `generate_batch`."""

    def __init__(self, inner: Callable[..., Any], model: nn.Module, routing: Routing) -> None:
        self.inner, self.routing = inner, routing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.routing.requests is None and self.routing.need_tasks():
            raise RoutingError(
                f"adapter '{self.routing.need_tasks()[0]}' needs a task for every request, and a manager of continuous"
                " batching joins the tokens of all requests into one row: use generate_batch(…, task=…), or merge the"
                " adapter for one task"
            )
        return self.inner(*args, **kwargs)

# SPDX-License-Identifier: Apache-2.0
"""Wrappers of a base model's call, `generate` and gradient checkpointing, which take `task=` and make forward passes.

They are objects set on the model and not closures, so that a deep copy of it has wrappers of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dyads.tuner.auxiliary import TrainingCall
from dyads.tuner.batch_tasks import BatchTasks, TaskLike
from dyads.tuner.routing import ForwardPass, Routing

__all__ = ["attach", "detach"]


def attach(routing: Routing, model: nn.Module) -> None:
    """Make `model` accept `task=` in its call and in `generate`, and keep its tasks through checkpointing."""
    enter = model.register_forward_pre_hook(_EnterForward(routing), with_kwargs=True, prepend=True)
    leave = model.register_forward_hook(_LeaveForward(routing), always_call=True, with_kwargs=True)
    routing.undo = [enter.remove, leave.remove]
    for name, wrapper in (("generate", _Generate), ("_set_gradient_checkpointing", _SetCheckpointing)):
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


class _Remove:
    """Undo an attribute that was set on an instance."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self) -> None:
        self.owner.__dict__.pop(self.name, None)


class _EnterForward:
    """The start of a forward pass."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        routing, here = self.routing, self.routing.here
        ambient = routing.ambient
        entered = here.current = ForwardPass(model, here.current)  # first: an error below must find it, to end it
        here.untaken = None
        task = kwargs.pop("task", None)
        if model.training and torch.is_grad_enabled():
            entered.training = TrainingCall(model, args, kwargs)
        if routing.names:
            tasks = ambient if task is None else BatchTasks(task)
            entered.tasks = None if tasks is None else tasks.for_call(args, kwargs)
        return args, kwargs


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
        if call is None or not call.losses or output is None:  # None: an error ended it
            return None
        with_loss = call.added_to(output)
        if with_loss is not None:
            return with_loss
        outer = None if ended.outer is None else ended.outer.training
        if outer is None:
            here.untaken = call.loss()
        else:
            outer.losses += call.losses  # a nested call: the outer one returns the loss
        return None


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
    """The model's own `generate`, with `task=`."""

    def __init__(self, inner: Callable[..., Any], model: nn.Module, routing: Routing) -> None:
        self.inner, self.routing = inner, routing

    def __call__(self, *args: Any, task: TaskLike | None = None, **kwargs: Any) -> Any:
        routing = self.routing
        tasks = routing.ambient if task is None else BatchTasks(task)
        if tasks is None or not routing.names:
            with routing.unchanged_weights():
                return self.inner(*args, **kwargs)
        with routing.using(tasks.for_generate(args, kwargs)), routing.unchanged_weights():
            return self.inner(*args, **kwargs)

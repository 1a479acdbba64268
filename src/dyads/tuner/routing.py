# SPDX-License-Identifier: Apache-2.0
"""Routing state: the tasks of a forward pass on the way to the adapted layers, auxiliary losses on the way back.

`task=` is taken from the call of the base model (or its `generate`) and kept in one `Routing` object that every adapted
layer holds. Three rules make that safe:

- the state ends with its forward pass, so a pass without `task=` never gets the task of an earlier one;
- gradient checkpointing runs layers again in backward, when another forward pass may have come between: the function
  that transformers hands its layers for checkpointing is wrapped, so that the second run has the state of its first;
- beam search and num_return_sequences repeat every sample k times in a row, and so are its tasks.

The same object collects the auxiliary losses of the layers. Their mean over the layers is added to the loss that the
model returns, or is kept for `auxiliary_loss` where the model returns none.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyads.errors import RoutingError, did_you_mean
from dyads.methods.core import Core
from dyads.ops import CachedOperator, in_backward

__all__ = ["Routing", "RoutingState", "TaskLike", "auxiliary_loss", "use_task"]

_IGNORED = -100  # the label of positions that are not learned, everywhere in transformers

TaskLike = Tensor | Sequence[int | str] | int | str
"""A task for every sample: a LongTensor (b), or a list of ids and names; a single one stands for the whole batch."""


class RoutingState:
    """The tasks of one forward pass, turned into ids once per adapter.

    `repeats` says how often the forward pass repeats every sample (beams), `widths` how many tokens a sample may have:
    a layer that sees tokens flattened into rows has one of them per sample.
    """

    def __init__(self, task: TaskLike) -> None:
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
        self.repeats = 1
        self.widths: tuple[int, ...] = ()
        self._ids: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.task)

    def ids(self, adapter: str, names: tuple[str, ...], device: torch.device) -> Tensor:
        """The tasks as ids of that adapter, (len(self)) on the device; RoutingError for one it does not know."""
        if adapter not in self._ids:
            self._ids[adapter] = self._resolve(adapter, names)
        ids = self._ids[adapter]
        if ids.device != device:
            ids = self._ids[adapter] = ids.to(device)
        return ids

    def _resolve(self, adapter: str, names: tuple[str, ...]) -> Tensor:
        if isinstance(self.task, Tensor):
            outside = (self.task < 0) | (self.task >= len(names))
            if _can_be_read(self.task):
                if bool(outside.any()):
                    raise RoutingError(_unknown_id(adapter, self.task[outside][0].item(), names))
            else:
                torch._assert_async(~outside.any(), f"adapter '{adapter}': a task id is outside 0 to {len(names) - 1}")
            return self.task.long()
        index = {name: i for i, name in enumerate(names)}
        ids = []
        for task in self.task:
            if isinstance(task, str):
                if task not in index:
                    raise RoutingError(
                        f"adapter '{adapter}' does not know task '{task}'{did_you_mean(task, names)}"
                        f" (`dyads.add_task(model, {task!r})` would add it)"
                    )
                ids.append(index[task])
            else:
                if not 0 <= task < len(names):
                    raise RoutingError(_unknown_id(adapter, task, names))
                ids.append(task)
        return torch.tensor(ids, dtype=torch.long)

    def for_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, repeated: bool) -> RoutingState:
        """This state for one call of the model, from the sizes of what it is called with.

        Without `repeated` every row of the batch needs a task of its own, or all share one.
        """
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 0]
        rows = _rows(args, kwargs)
        given = len(self)
        if rows is None or given == 1:
            return self
        if rows != given and not (repeated and rows % given == 0):
            raise RoutingError(f"task has {given} entries for a batch of {rows}: give one for every sample")
        state = copy.copy(self)  # shares the ids that are resolved already
        state.repeats = rows // given
        state.widths = tuple({v.shape[1] for v in tensors if v.ndim > 1 and v.shape[0] == rows})
        return state


class TrainingCall:
    """One call of a model in training: the masks of its tokens, and the auxiliary losses of its layers so far."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1:
            kwargs = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        self.losses: list[Tensor] = []
        self._model = model
        self._mask = _as_mask(kwargs.get("attention_mask"))
        self._labels = kwargs.get("labels")
        self._items = kwargs.get("num_items_in_batch")
        self._decoder_mask = self._decoder_tokens = None
        self._two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        if self._two_sided:
            self._decoder_mask = _as_mask(kwargs.get("decoder_attention_mask"))
            given = [self._decoder_mask, kwargs.get("decoder_input_ids"), self._labels]
            self._decoder_tokens = next((t.numel() for t in given if isinstance(t, Tensor)), None)

    def mask(self, x: Tensor, of_decoder: bool) -> Tensor | None:
        """The mask (b t) of a layer's tokens, nonzero for real ones; None where the call gives none.

        In the decoder of an encoder-decoder, cross-attention has layers on the tokens of either side, which are
        distinguished by their number. Where both sides have equally many, all count as the decoder's.
        """
        tokens = x.shape[:-1].numel()
        if of_decoder and tokens == self._decoder_tokens:
            if self._decoder_mask is None and isinstance(self._labels, Tensor) and self._labels.numel() == tokens:
                self._decoder_mask = _as_mask(self._labels != _IGNORED)
            return self._decoder_mask
        return self._mask if self._mask is not None and self._mask.numel() == tokens else None

    @property
    def has_labels(self) -> bool:
        return self._labels is not None

    def loss(self) -> Tensor:
        """Mean over the layers."""
        return torch.stack([loss.to(self.losses[0].device) for loss in self.losses]).mean()

    def share(self) -> Tensor | float:
        """The share of this call in a batch that is accumulated from several calls: 1, or its share of the labels.

        Where the model's loss is divided by num_items_in_batch, the labels of the whole batch, the Trainer divides it
        no further. All other losses are means over the call, which the Trainer averages.
        """
        if self._items is None or not isinstance(self._labels, Tensor):
            return 1.0
        # Many models accept that number without using it, T5 for one. Those that use it pass it to `loss_function`.
        code = getattr(inspect.unwrap(type(self._model).forward), "__code__", None)
        if code is None or "loss_function" not in code.co_names:
            return 1.0
        # As the Trainer counts them (transformers 5.23): a decoder by itself predicts the next token.
        loss = getattr(self._model, "loss_function", None)
        shifts = getattr(loss, "__name__", "") == "ForCausalLMLoss" and not self._two_sided
        labels = self._labels[..., 1:] if shifts else self._labels
        share: Tensor = labels.ne(_IGNORED).sum() / self._items
        return share


def _as_mask(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _can_be_read(tensor: Tensor) -> bool:
    """Whether reading a value does not synchronise with an accelerator or break a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _unknown_id(adapter: str, task: Any, names: tuple[str, ...]) -> str:
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:8])) + (", …" if len(names) > 8 else "")
    return f"adapter '{adapter}' does not know task {task}: its ids go from 0 to {len(names) - 1} ({shown})"


class Routing:
    """Carries the tasks of a forward pass from the model's call to its adapted layers.

    One object per adapted model; it serves one forward pass at a time, not several threads at once.
    """

    def __init__(self) -> None:
        self.names: dict[str, tuple[str, ...]] = {}
        """Task names of the adapters that look at a task."""
        self.merged: dict[str, int] = {}
        """The task that an adapter is merged for, while it is."""
        self.state: RoutingState | None = None
        self.ambient: RoutingState | None = None
        """The state of forward passes without `task=`, inside `using`, for instance while generating."""
        self.cache: dict[int, dict[str, CachedOperator]] | None = None
        """Operators by layer and adapter, inside `unchanged_weights`."""
        self.call: TrainingCall | None = None
        """The running call of a model in training."""
        self.untaken: Tensor | None = None
        """The auxiliary loss of the last call, where the model returned no loss to add it to."""
        self._outer: list[tuple[RoutingState | None, TrainingCall | None]] = []
        self._undo: list[Callable[[], None]] = []

    def __getstate__(self) -> dict[str, Any]:
        # Losses of a forward pass belong to its graph, which can be neither copied nor stored.
        return {**self.__dict__, "call": None, "untaken": None, "cache": None}

    @contextmanager
    def using(self, task: TaskLike | None) -> Iterator[None]:
        """Within this context a forward pass without a task of its own has this one."""
        before = (self.state, self.ambient)
        self.state = self.ambient = None if task is None else RoutingState(task)
        try:
            yield
        finally:
            self.state, self.ambient = before

    @contextmanager
    def unchanged_weights(self) -> Iterator[None]:
        """A promise that adapters do not change within this context: layers join and cast their weights only once.

        For the many small forward passes of decoding; it holds without gradients only.
        """
        before = self.cache
        self.cache = {} if before is None else before
        try:
            yield
        finally:
            self.cache = before

    def forget_weights(self) -> None:
        """Empty the cache, after a change of weights."""
        if self.cache is not None:
            self.cache.clear()

    def ids(self, adapter: str, x: Tensor) -> Tensor:
        """The task of every row (first axis) of a layer's input, on its device; a single row for a vector.

        Rows are samples, or their beams. An input of two axes may also hold the tokens of all samples, one sample after
        the other. Anything else is refused: which row belongs to which sample could only be guessed.
        """
        names = self.names[adapter]
        if self.state is None:
            raise RoutingError(
                f"adapter '{adapter}' needs a task: pass task=… to the model's call or to generate, one name or id for"
                f" every sample{did_you_mean('', names)}. Around code that calls parts of the model itself, use"
                " `with dyads.use_task(model, …)`."
            )
        ids = self.state.ids(adapter, names, x.device)
        rows = x.shape[0] if x.ndim > 1 else 1
        if len(self.state) == 1:
            return ids.expand(rows)
        samples = len(self.state) * self.state.repeats
        repeats = self.state.repeats
        if rows != samples:
            if x.ndim != 2 or rows % samples or rows // samples not in self.state.widths:
                raise RoutingError(
                    f"adapter '{adapter}': a layer sees an input of shape {tuple(x.shape)} in a batch of {samples}, so"
                    " its rows are not the samples, and their tasks are unknown. Leave such layers out"
                    " (exclude_modules), or give all samples one task."
                )
            repeats *= rows // samples
        return ids if repeats == 1 else ids.repeat_interleave(repeats)

    def check_merged(self, adapter: str) -> None:
        """RoutingError where a forward pass has another task than the one that the adapter is merged for."""
        if self.state is None or adapter not in self.merged:
            return
        names, merged = self.names[adapter], self.merged[adapter]
        task = self.state.task
        device = task.device if isinstance(task, Tensor) else torch.device("cpu")  # where reading them costs nothing
        ids = self.state.ids(adapter, names, device)
        message = (
            f"adapter '{adapter}' is merged into the model for task '{names[merged]}', so it cannot serve another one:"
            " call unmerge_adapter() first"
        )
        if not _can_be_read(ids):
            torch._assert_async((ids == merged).all(), message)
        elif bool((ids != merged).any()):
            raise RoutingError(message)

    def collect(self, adapter: str, core: Core, x: Tensor, task: Tensor | None, of_decoder: bool) -> None:
        """Collect the auxiliary loss of a layer with input x, in training.

        The second run of gradient checkpointing computes it again, as it must, and does not collect it again.
        """
        again = not torch.compiler.is_compiling() and in_backward()
        if self.call is None and not again:
            return  # a part of the model that is called by itself, or a model in evaluation
        if not torch.is_grad_enabled():
            if self.call is not None:
                raise RoutingError(
                    f"adapter '{adapter}' has an auxiliary loss, and one of its layers runs without gradients inside a"
                    " forward pass with gradients, so that its loss would be left out. If that is gradient"
                    " checkpointing, choose the kind that is not reentrant (use_reentrant=False)"
                )
            return
        if x.numel() == 0:
            return
        loss = core.auxiliary_loss(x, task, None if self.call is None else self.call.mask(x, of_decoder))
        if loss is not None and self.call is not None and not again:
            self.call.losses.append(loss)

    def attach(self, model: nn.Module) -> None:
        """Make `model` accept `task=` in its call and in `generate`, and keep its tasks through checkpointing."""
        enter = model.register_forward_pre_hook(_EnterForward(self), with_kwargs=True, prepend=True)
        leave = model.register_forward_hook(_LeaveForward(self), always_call=True, with_kwargs=True)
        self._undo = [enter.remove, leave.remove]
        for name, wrapper in (("generate", _Generate), ("_set_gradient_checkpointing", _SetCheckpointing)):
            inner: Any = getattr(model, name, None)
            if callable(inner):
                model.__dict__[name] = wrapper(inner, model, self)
                self._undo.append(_Remove(model, name))
        self.wrap_checkpointing(model)

    def wrap_checkpointing(self, model: nn.Module) -> None:
        """Wrap the functions that transformers gave its layers for checkpointing (checked with transformers 5.23)."""
        for module in model.modules():
            func = module.__dict__.get("_gradient_checkpointing_func")
            if func is not None and not isinstance(func, _Checkpoint):
                module.__dict__["_gradient_checkpointing_func"] = _Checkpoint(func, self)

    def detach(self, model: nn.Module) -> None:
        """Undo everything that `attach` and checkpointing changed on the model."""
        for undo in self._undo:
            undo()
        self._undo = []
        for module in model.modules():
            func = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(func, _Checkpoint):
                module.__dict__["_gradient_checkpointing_func"] = func.func


# Objects and not closures are set on the model, so that a deep copy of it has hooks of its own.


class _Remove:
    """Undo an attribute that was set on an instance."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self) -> None:
        self.owner.__dict__.pop(self.name, None)


class _EnterForward:
    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        routing = self.routing
        routing._outer.append((routing.state, routing.call))  # first: _LeaveForward is called also after an error here
        task = kwargs.pop("task", None)
        routing.state = routing.untaken = None
        routing.call = TrainingCall(model, args, kwargs) if model.training and torch.is_grad_enabled() else None
        if not routing.names:
            return args, kwargs
        if task is not None:
            routing.state = RoutingState(task).for_call(args, kwargs, repeated=False)
        elif routing.ambient is not None:
            routing.state = routing.ambient.for_call(args, kwargs, repeated=True)
        return args, kwargs


class _LeaveForward:
    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        routing, call = self.routing, self.routing.call
        routing.state, routing.call = routing._outer.pop()
        if call is None or not call.losses or output is None:  # None: an error ended it
            return None
        with_loss = _add_loss(output, call)
        if with_loss is not None:
            return with_loss
        if routing.call is None:
            routing.untaken = call.loss()
        else:
            routing.call.losses += call.losses  # a nested call: the outer one returns the loss
        return None


def _add_loss(output: Any, call: TrainingCall) -> Any:
    """The model's output with the auxiliary loss in its loss; None where it has no loss."""
    if isinstance(output, dict):
        if output.get("loss") is None:
            return None
        output["loss"] = _sum(output["loss"], call)
        return output
    if isinstance(output, tuple) and call.has_labels:
        return (_sum(output[0], call), *output[1:])
    return None


def _sum(loss: Tensor, call: TrainingCall) -> Tensor:
    return loss + (call.loss() * call.share()).to(loss)


class _Checkpoint:
    """A checkpointing function whose second run has the routing state of its first."""

    def __init__(self, func: Callable[..., Any], routing: Routing) -> None:
        self.func, self.routing = func, routing

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        routing, then = self.routing, (self.routing.state, self.routing.call)

        def run_as_then(*inner: Any, **inner_kwargs: Any) -> Any:
            now = (routing.state, routing.call)
            routing.state, routing.call = then
            try:
                return run(*inner, **inner_kwargs)
            finally:
                routing.state, routing.call = now

        return self.func(run_as_then, *args, **kwargs)


class _SetCheckpointing:
    """The model's own switch for gradient checkpointing, after which its functions are wrapped."""

    def __init__(self, inner: Callable[..., Any], model: nn.Module, routing: Routing) -> None:
        self.inner, self.model, self.routing = inner, model, routing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.inner(*args, **kwargs)
        self.routing.wrap_checkpointing(self.model)
        return result


class _Generate:
    """The model's own `generate`, with `task=`."""

    def __init__(self, inner: Callable[..., Any], model: nn.Module, routing: Routing) -> None:
        self.inner, self.routing = inner, routing

    def __call__(self, *args: Any, task: TaskLike | None = None, **kwargs: Any) -> Any:
        if task is None or not self.routing.names:
            with self.routing.unchanged_weights():
                return self.inner(*args, **kwargs)
        RoutingState(task).for_call(args, kwargs, repeated=False)  # a wrong number of tasks is refused at once
        with self.routing.using(task), self.routing.unchanged_weights():
            return self.inner(*args, **kwargs)


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The batch size of a call, from the first tensor that has one."""
    for value in (*args[:1], *(kwargs.get(name) for name in _BATCHED), *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            return value.shape[0] if value.ndim > 1 else 1
    return None


_BATCHED = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "x")


@contextmanager
def use_task(model: nn.Module, task: TaskLike | None) -> Iterator[None]:
    """Within this context, forward passes of `model` or of its parts without a task have this one.

    For code that cannot pass `task=` itself: a pipeline, an evaluation harness, a call of one submodule.
    """
    routing = find_routing(model)
    if routing is None:
        raise RoutingError(f"{type(model).__name__} has no dyads adapter, so there is no task to use")
    with routing.using(task):
        yield


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Take the auxiliary loss of the last forward pass of `model`, to add it to a loss of your own making.

    It is the mean over the adapted layers of the losses that their method adds, weighted already (MoRE's contrastive
    loss, a load-balancing loss). None in evaluation, for a method without one, when it was taken before, and where the
    model itself returned a loss, which then contains it. The next forward pass drops it.
    """
    routing = find_routing(model)
    if routing is None:
        return None
    loss, routing.untaken = routing.untaken, None
    return loss


def find_routing(model: nn.Module) -> Routing | None:
    """The Routing of the adapted layers of a model, None where it has none."""
    for module in model.modules():
        routing = module.__dict__.get("routing")
        if isinstance(routing, Routing):
            return routing
    return None

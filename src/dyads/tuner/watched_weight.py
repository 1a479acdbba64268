# SPDX-License-Identifier: Apache-2.0
"""Weight of an adapted layer as other modules see it: its shape and dtype are free to read, its values are not.

A module that multiplies by the weight of a layer itself (Mamba's dt_proj, a fused loss on lm_head) never calls the
layer, so an adapter there would have no effect. A product with this tensor is an error that names the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dyads.errors import ConfigError

__all__ = ["WatchedWeight"]

_LIKE = {"type_as", "view_as", "expand_as", "reshape_as"}
"""Functions that read the dtype or shape of their second argument; others with `_like` or `new_` in their name do."""
_VALUES = {"item", "numpy", "tolist", "__array__"}
"""Functions that return values in something else than a tensor."""


class WatchedWeight(Tensor):
    """A weight whose use in a computation is refused."""

    layer: str

    @classmethod
    def of(cls, weight: Tensor, layer: str) -> WatchedWeight:
        """The weight of the layer of that name."""
        watched = weight.as_subclass(cls)
        watched.layer = layer
        return watched

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in _VALUES and not any(isinstance(value, Tensor) for value in _flat([result])):
            return result  # a shape, dtype, device, …
        like = name in _LIKE or name.startswith("new_") or name.endswith("_like")
        if like or (name == "to" and not isinstance(args[0], cls)):
            return result
        layer = next(value.layer for value in _flat([args, kwargs]) if isinstance(value, cls))
        raise ConfigError(
            f"another module reads the weight of '{layer}' itself ({name}) and does not call that layer, so its adapter"
            " would have no effect: leave it out with exclude_modules"
        )


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Mapping):
            yield from _flat(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value

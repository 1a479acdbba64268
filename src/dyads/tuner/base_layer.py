# SPDX-License-Identifier: Apache-2.0
"""Base layers: their sizes, whether a merge can add to their weight, and the linear layer that a quantised one equals.

By protocol and not by library: a layer is a module with `in_features`, `out_features` and a forward.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from dyads.errors import ConfigError, MergeError

__all__ = ["dequantized", "features", "is_plain"]

_LARGE = (2.0**16, 2.0**8)
"""Of a probe's entries, so that a bias takes no digits from the weight in half precision; powers of two are exact. The
second where the first is too large for float16."""
_ROUNDED = 3e-3
"""Of the output, root mean square: more than a bfloat16 output is rounded, and less than an int8 input."""


def features(base_layer: nn.Module) -> tuple[int, int, bool]:
    """(in, out, whether the weight is stored in × out) of a layer that can be adapted."""
    if isinstance(base_layer, NonDynamicallyQuantizableLinear):
        raise ConfigError(
            "nn.MultiheadAttention reads the weight of its out_proj itself, so an adapter there would have no effect:"
            " leave it out with exclude_modules"
        )
    if isinstance(base_layer, nn.Linear):
        return base_layer.in_features, base_layer.out_features, False
    if isinstance(base_layer, Conv1D):
        d_in, d_out = base_layer.weight.shape
        return d_in, d_out, True
    if isinstance(base_layer, BaseTunerLayer):
        return features(base_layer.get_base_layer())
    # Quantised layers of other libraries (GPTQ, AWQ, HQQ, …), some of which write the names without an underscore.
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        d_in, d_out = (getattr(base_layer, name, None) for name in names)
        if isinstance(d_in, int) and isinstance(d_out, int):
            return d_in, d_out, False
    raise ConfigError(
        f"Target module {type(base_layer).__name__} is not supported: dyads adapts nn.Linear, transformers' Conv1D, and"
        " layers with in_features and out_features. Leave it out with exclude_modules, or name other target_modules."
    )


def is_plain(base: nn.Module) -> bool:
    """Whether the layer is a product with its floating-point weight, which a merge may add to."""
    weight: Any = getattr(base, "weight", None)
    if type(weight) not in (nn.Parameter, Tensor) or not weight.dtype.is_floating_point:
        return False  # codes, or a tensor subclass
    if "weight" not in base._parameters and "weight" not in base._buffers:
        return False  # computed in every call from others, as by weight_norm, spectral_norm or pruning
    if type(base).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(base, nn.Linear):
        return False
    # Another forward may round the weight or the input first, as a layer before the end of its quantisation does.
    with torch.no_grad():
        x = _random(base.in_features).to(weight)
        found = base(x)
        return found.dtype == weight.dtype and torch.allclose(found, F.linear(x, weight, base.bias), rtol=1e-3)


@torch.no_grad()
def dequantized(base: nn.Module, path: str, dtype: torch.dtype | None = None) -> nn.Linear:
    """The linear layer that computes the same as a quantised one, in `dtype`; MergeError where there is none.

    Its weight is what the layer makes of the unit vectors. A layer that rounds its input too equals no linear layer.
    """
    d_in, d_out, _ = features(base)
    tensors = [t for t in (*base.parameters(), *base.buffers()) if t.device.type != "meta"]
    device = tensors[0].device if tensors else torch.device("cpu")
    widest = _compute_dtype(base, d_in, device)
    bias = base(torch.zeros(1, d_in, dtype=widest, device=device))[0]
    unit = torch.eye(d_in, dtype=widest, device=device)
    columns = [(base(large * unit) - bias) / large for large in _LARGE]
    weight = next((found for found in columns if found.isfinite().all()), columns[-1]).T
    linear = nn.Linear(d_in, d_out, bias=bool(bias.any()), device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    for size in (1, 64):  # LLM.int8 rounds what is small
        x = (size * _random(d_in)).to(torch.bfloat16).to(linear.weight)  # which half precision has exactly
        found = base(x)
        if (linear(x) - found).square().mean().sqrt() <= _ROUNDED * found.square().mean().sqrt():
            continue
        raise MergeError(
            f"'{path}' ({type(base).__name__}) rounds its input as well as its weight, so no linear layer equals"
            " it: keep the adapter unmerged, or load the base model unquantised"
        )
    return linear.to(dtype or widest)


def _compute_dtype(base: nn.Module, d_in: int, device: torch.device) -> torch.dtype:
    """The widest dtype that the layer takes and gives."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with suppress(RuntimeError):  # of products of two dtypes
            if base(torch.zeros(1, d_in, dtype=dtype, device=device)).dtype == dtype:
                return dtype
    raise MergeError(f"{type(base).__name__} does not give back the dtype of its input, so it cannot be dequantised")


def _random(d_in: int) -> Tensor:
    return torch.randn(8, d_in, generator=torch.Generator().manual_seed(0))

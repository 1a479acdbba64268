# SPDX-License-Identifier: Apache-2.0
"""Quantised base models: transformers' quantization config from a recipe's `model.quantization`."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import utils
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from dyads.errors import ConfigError, did_you_mean, shortened
from dyads.recipe.spec import QuantizationSpec

__all__ = ["quantization_config"]

_KEY = "model.quantization"
_PACKAGES: dict[str, tuple[str, Any]] = {
    "bitsandbytes": ("bitsandbytes", utils.is_bitsandbytes_available),
    "quanto": ("optimum-quanto", utils.is_optimum_quanto_available),
    "torchao": ("torchao", utils.is_torchao_available),
}


def quantization_config(spec: QuantizationSpec) -> Any:
    """transformers' config; ConfigError where its package is missing, or where it refuses an option."""
    package, is_available = _PACKAGES[spec.quant_method]
    if not is_available():
        raise ConfigError(
            f"{_KEY}.quant_method is {spec.quant_method}, which needs a package that is missing or too old: run"
            f" `pip install -U {package}`, or leave {_KEY} out"
        )
    name, options = str(spec.quant_method), spec.options
    if spec.quant_method == "bitsandbytes":
        bits = 4 if spec.load_in_4bit else 8
        name, options = f"bitsandbytes_{bits}bit", {**options, f"load_in_{bits}bit": True}
    config = AUTO_QUANTIZATION_CONFIG_MAPPING[name]
    known = [name for name in inspect.signature(config).parameters if name != "kwargs"]
    for key in options:
        if key not in known:
            raise ConfigError(f"unknown key '{_KEY}.{key}'{did_you_mean(key, known)}")
    if spec.quant_method == "torchao":
        options["quant_type"] = _torchao_type(options.get("quant_type"))
    try:
        return config(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"transformers refuses {_KEY}: {shortened(str(error))}") from error


def _torchao_type(given: Any) -> Any:
    """A config of torchao from its class's name, or from a section with that name and its options."""
    from torchao import quantization
    from torchao.core.config import AOBaseConfig

    known = ((name, kind) for name, kind in vars(quantization).items() if inspect.isclass(kind))
    names = [name for name, kind in known if issubclass(kind, AOBaseConfig)]
    name, options = str(given), None
    if isinstance(given, dict) and len(given) == 1:
        ((name, options),) = given.items()
    if name not in names or not isinstance(options or {}, dict):
        raise ConfigError(
            f"{_KEY}.quant_type must be a config of torchao.quantization, or one with options"
            f" ({{Int4WeightOnlyConfig: {{group_size: 32}}}}), got {shortened(given, 60)}"
            f"{did_you_mean(name, names)}"
        )
    try:
        return getattr(quantization, name)(**(options or {}))
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"torchao refuses the options of {_KEY}.quant_type {name}: {shortened(str(error))}"
        ) from error

# SPDX-License-Identifier: Apache-2.0
"""Adapter of a run: loaded onto its base model if every weight matches, and identified by a hash of its weights."""

from __future__ import annotations

import hashlib
import warnings

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from dyads.errors import RunError
from dyads.models.packaged import same_model
from dyads.runs.folder import RunFolder

__all__ = ["check_adapter", "fingerprint", "load_adapter"]

_WEIGHTS = "adapter_model.safetensors"


def check_adapter(folder: RunFolder) -> None:
    """RunError if the run has no adapter: its training did not end, or it holds scores of another run's adapter."""
    if not folder.has_adapter:
        facts = folder.environment() if folder.task_names() else {}
        if "adapter" in facts:
            raise RunError(
                f"'{folder.path}' has scores of the adapter in '{facts['adapter']}' but no adapter: give that folder"
            )
        raise RunError(
            f"'{folder.path}' has no adapter: its training did not end; go on with"
            f" `dyads train RECIPE --out {folder.path} --resume`"
        )
    if not (folder.adapter / _WEIGHTS).is_file():
        raise RunError(f"'{folder.adapter}' has no {_WEIGHTS}; adapters are read from safetensors only")


def fingerprint(folder: RunFolder) -> str:
    """SHA-256 of the run's adapter weights; RunError if it has no adapter."""
    check_adapter(folder)
    return hashlib.sha256((folder.adapter / _WEIGHTS).read_bytes()).hexdigest()


def load_adapter(base: nn.Module, folder: RunFolder, *, trains: bool = False) -> PeftModel:
    """The run's adapter on its base model, in evaluation mode; RunError if it is missing or does not fit the model.

    With `trains`, the weights that the run trained require gradients; otherwise none do.
    """
    path, weights = folder.adapter, folder.adapter / _WEIGHTS
    check_adapter(folder)
    import dyads.tuner  # noqa: F401  # registers the methods with PEFT

    spec = folder.recipe().model

    def misfit(reason: str) -> RunError:
        return RunError(
            f"the adapter in '{path}' does not fit model '{spec.name}' – it was trained on another one ({reason})"
        )

    try:
        config = PeftConfig.from_pretrained(str(path))
        with safe_open(str(weights), "pt") as file:
            saved = set(file.keys())
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"the adapter in '{path}' is truncated or no adapter: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            model = PeftModel.from_pretrained(base, str(path), config=config, is_trainable=trains)
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise misfit(lines[min(1, len(lines) - 1)][:200]) from error
    # PEFT accepts an adapter of a model with another number of layers, as long as the shapes match.
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if unmatched := sorted({key for key in saved - expected if model.base_model.prefix in key} | (expected - saved)):
        raise misfit(f"{len(unmatched)} weights are in one of them only, such as {unmatched[0]}")
    trained_on = config.base_model_name_or_path
    if trained_on and not (same_model(trained_on, spec.name) and config.revision == spec.revision):
        raise RunError(
            f"the adapter in '{path}' was trained on {_described(trained_on, config.revision)}, but config.yaml names"
            f" {_described(spec.name, spec.revision)}; if the model was only moved, set base_model_name_or_path and"
            " revision in adapter/adapter_config.json as well"
        )
    model.eval()
    return model


def _described(model: str, revision: str | None) -> str:
    return f"'{model}'" + (f" at revision '{revision}'" if revision else "")

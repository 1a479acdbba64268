# SPDX-License-Identifier: Apache-2.0
"""Does a run's adapter fit its model, and which one is it? It is loaded only where every weight has its place."""

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
    """RunError where the run has no adapter yet, or only the scores of another run's."""
    if not folder.has_adapter:
        facts = folder.environment() if folder.task_names() else {}
        if "adapter" in facts:
            raise RunError(
                f"'{folder.path}' holds scores of the adapter in '{facts['adapter']}' and none itself: name that folder"
            )
        raise RunError(
            f"'{folder.path}' has no adapter: its training did not end; go on with"
            f" `dyads train RECIPE --out {folder.path} --resume`"
        )
    if not (folder.adapter / _WEIGHTS).is_file():
        raise RunError(f"'{folder.adapter}' has no {_WEIGHTS}; adapters are read from safetensors only")


def fingerprint(folder: RunFolder) -> str:
    """SHA-256 of the weights of the run's adapter: equal means the same adapter. RunError where there is none."""
    check_adapter(folder)
    return hashlib.sha256((folder.adapter / _WEIGHTS).read_bytes()).hexdigest()


def load_adapter(base: nn.Module, folder: RunFolder, *, trains: bool = False) -> PeftModel:
    """The run's adapter on its base model, in evaluation mode; RunError where there is none that was made for it.

    All is frozen, unless `trains`: then what the run trained can be trained again.
    """
    path, weights = folder.adapter, folder.adapter / _WEIGHTS
    check_adapter(folder)
    import dyads.tuner  # noqa: F401  # PEFT has to know the methods

    spec = folder.recipe().model

    def misfit(reason: str) -> RunError:
        return RunError(
            f"the adapter in '{path}' does not fit model '{spec.name}' – it was trained on another one ({reason})"
        )

    try:
        config = PeftConfig.from_pretrained(str(path))
        with safe_open(str(weights), "pt") as file:
            kept = set(file.keys())
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"the adapter in '{path}' is truncated or no adapter: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below, unlike in PEFT
            model = PeftModel.from_pretrained(base, str(path), config=config, is_trainable=trains)
    except (RuntimeError, ValueError) as error:
        shown = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise misfit(shown[min(1, len(shown) - 1)][:200]) from error
    # PEFT takes an adapter of a model with more or fewer layers, as long as those there are of the same size.
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if strange := sorted({key for key in kept - wanted if model.base_model.prefix in key} | (wanted - kept)):
        raise misfit(f"{len(strange)} weights are in one of them only, such as {strange[0]}")
    trained_on = config.base_model_name_or_path
    if trained_on and not (same_model(trained_on, spec.name) and config.revision == spec.revision):
        raise RunError(
            f"the adapter in '{path}' was trained on {_called(trained_on, config.revision)}, but config.yaml names"
            f" {_called(spec.name, spec.revision)}; if that is the same model in another place, write it into"
            " adapter/adapter_config.json too (base_model_name_or_path, revision)"
        )
    model.eval()
    return model


def _called(model: str, revision: str | None) -> str:
    return f"'{model}'" + (f" at revision '{revision}'" if revision else "")

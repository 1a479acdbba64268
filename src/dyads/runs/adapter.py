# SPDX-License-Identifier: Apache-2.0
"""Adapter of a run: saved with a manifest, and loaded onto its base model if its files and every weight match."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from dyads.errors import RunError, shortened
from dyads.models.heads import Head, write_heads
from dyads.models.packaged import resolve, same_model
from dyads.runs.card import write_card
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import Manifest, seal
from dyads.runs.weights import (
    CONFIG,
    WEIGHTS,
    method_of,
    read_config,
    read_weights,
    refuse_not_finite,
    refuse_other_sizes,
)

__all__ = ["check_adapter", "check_files", "fingerprint", "load_adapter", "save_adapter", "sort_sets"]


def save_adapter(
    model: PeftModel, folder: RunFolder, heads: Sequence[Head] = (), state: dict[str, Tensor] | None = None
) -> None:
    """Save the adapter, and an encoder's heads, as those of the run; RunError for weights that are not finite.

    Its config names the base model as the recipe does: a packaged model's folder is another one on every machine.
    `state` holds the weights of a model that is sharded over processes.

    Two trainings with the same steps write the same bytes.
    """
    weights = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    refuse_not_finite(weights, "the trained adapter")
    shutil.rmtree(folder.adapter, ignore_errors=True)  # incomplete, since a run with an adapter is not trained again
    model.save_pretrained(str(folder.adapter), state_dict=state)
    sort_sets(folder.adapter, model.peft_config["default"], base=folder.recipe().model.name)
    if heads:
        write_heads(folder.heads, heads)
    write_card(folder)
    seal(folder.adapter)


def sort_sets(adapter: Path, config: Any, base: str | None = None) -> None:
    """Sort the lists in adapter_config.json that are sets in the config: their order differs between processes.

    `base` is the base model's name in that file; None leaves it.
    """
    path = adapter / CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in vars(config).items():
        if isinstance(value, set) and isinstance(content.get(key), list):
            content[key] = sorted(content[key])
    if base is not None:
        content["base_model_name_or_path"] = base
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")  # PEFT's own format


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
    if not (folder.adapter / WEIGHTS).is_file():
        raise RunError(f"'{folder.adapter}' has no {WEIGHTS}; adapters are read from safetensors only")
    check_files(folder.adapter)


def check_files(adapter: Path) -> None:
    """RunError if the files of an adapter are not those that its manifest lists."""
    manifest = Manifest.of(adapter)
    if manifest is not None and (damage := manifest.damage()):
        raise RunError(
            f"the adapter in '{adapter}' is damaged: {damage}; restore it; or remove its folder and go on with"
            " `dyads train … --resume`; or, if you changed it yourself, accept it with"
            f" `python -m dyads.runs.accept {adapter}`"
        )


def fingerprint(folder: RunFolder) -> str:
    """SHA-256 of the run's adapter weights; RunError if it has no adapter."""
    check_adapter(folder)
    manifest = Manifest.of(folder.adapter)
    assert manifest is not None
    return manifest.files[WEIGHTS][1]


def load_adapter(base: nn.Module, folder: RunFolder, *, trains: bool = False) -> PeftModel:
    """The run's adapter on its base model, in evaluation mode; RunError if it is missing or does not fit the model.

    With `trains`, the weights that the run trained require gradients; otherwise none do.
    """
    path = folder.adapter
    check_adapter(folder)
    import dyads.tuner  # noqa: F401  # registers the methods with PEFT

    recipe = folder.recipe()
    spec = recipe.model

    def misfit(reason: str) -> RunError:
        return RunError(
            f"the adapter in '{path}' does not fit model '{spec.name}' – it was trained on another one ({reason})"
        )

    config = read_config(path)
    weights = read_weights(path)
    refuse_other_sizes(config, weights, path)
    saved = weights.keys()
    if (method := method_of(config)) != recipe.method.name:
        raise RunError(
            f"the adapter in '{path}' is one of method '{shortened(method, 60)}', but config.yaml names"
            f" '{recipe.method.name}': the adapter belongs to another run"
        )
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
            " revision in adapter/adapter_config.json as well, and accept both files with"
            f" `python -m dyads.runs.accept {folder.path}`"
        )
    model.peft_config["default"].base_model_name_or_path = resolve(spec.name)  # PEFT reads its config when saving
    model.eval()
    return model


def _described(model: str, revision: str | None) -> str:
    return f"'{model}'" + (f" at revision '{revision}'" if revision else "")

# SPDX-License-Identifier: Apache-2.0
"""Compiled blocks (`train.compile`) train the adapter of uncompiled ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder
from dyads.training.train import train

Tiny = Callable[..., Recipe]
STEADY = {"trainer": {"adam_epsilon": 1e-2, "disable_tqdm": True}, "steps": 4}


def _adapters(tiny: Tiny, tmp_path: Path, method: str, **sections: Any) -> list[RunFolder]:
    spec = {**STEADY, **sections.pop("train", {})}
    folders = []
    for compiled in (False, True):
        torch._dynamo.reset()
        recipe = tiny(method, train={**spec, "compile": compiled}, **sections)
        folders.append(train(recipe, tmp_path / str(compiled), evaluate=compiled))
    return folders


def test_the_blocks_that_a_model_repeats_are_compiled(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: blocks.append(type(self).__name__))
    for compiled in (False, True):
        train(tiny("more", train={"steps": 1, "compile": compiled}), tmp_path / str(compiled), evaluate=False)
        assert blocks == ["LlamaDecoderLayer"] * 2 * compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of the tracer
@pytest.mark.parametrize("method", ["mode", "more", "smora"])
def test_compiled_blocks_train_the_same_adapter(
    method: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[str] = []
    compile_in_place = nn.Module.compile

    def traced(self: nn.Module, **options: Any) -> None:
        blocks.append(type(self).__name__)
        compile_in_place(self, backend="eager", **options)  # the graphs without a compiler

    monkeypatch.setattr(nn.Module, "compile", traced)
    counters.clear()
    plain, compiled = _adapters(tiny, tmp_path, method, options={"target_modules": ["v_proj"]})  # few graphs
    assert blocks == ["LlamaDecoderLayer"] * 2
    assert counters["stats"]["unique_graphs"] > 0
    assert_close(_weights(compiled), _weights(plain), rtol=0.0, atol=1e-6)
    if method == "smora":
        assert any(value.any() for name, value in _weights(compiled).items() if name.endswith("bias_steps"))
    for name in ("loss", "auxiliary_loss")[: 2 if method == "more" else 1]:
        logged = [[line[name] for line in f.log() if "loss" in line] for f in (compiled, plain)]
        assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_compiling_and_checkpointing_together_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing runs its blocks uncompiled: choose one"):
        tiny("mode", train={"compile": True, "gradient_checkpointing": True})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_code_trains_the_same_adapter(tiny: Tiny, tmp_path: Path) -> None:
    plain, compiled = _adapters(tiny, tmp_path, "more")
    assert_close(_weights(compiled), _weights(plain), rtol=0.0, atol=1e-5)


def _weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")

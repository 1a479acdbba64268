# SPDX-License-Identifier: Apache-2.0
"""Runs of three methods on one tiny base model, made once for all tests of the server."""

from __future__ import annotations

import pytest

from dyads.runs.folder import RunFolder
from dyads.training.train import train
from made_runs import save_llama, tiny_recipe, word_tokenizer


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """The gates of `more` look at the task, those of `mode` at the token."""
    path = tmp_path_factory.mktemp("served")
    base = save_llama(path / "tiny-llama", word_tokenizer())
    sections = {"train": {"learning_rate": 0.05}, "evaluate": {"max_new_tokens": 12, "limit": 1}}
    return {method: train(tiny_recipe(method, base, **sections), path / method) for method in ("more", "mode", "lora")}

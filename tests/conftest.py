# SPDX-License-Identifier: Apache-2.0
"""What every test gets: no network, the same random numbers, and each method variant as a fixture."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import forked
from tiny import MLP, PLACED, UNLIKE, VARIANTS, Variant

pytest_plugins = ["browsers", "made_runs", "made_studies"]


@pytest.fixture(params=VARIANTS, ids=lambda v: v.id)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


@pytest.fixture(params=UNLIKE, ids=lambda v: v.id)
def unlike(request: pytest.FixtureRequest) -> Variant:
    """A few variants, for what a layer does whatever the method."""
    return request.param


@pytest.fixture(params=PLACED, ids=lambda p: f"{p[0].id}-{p[1]}")
def placed(request: pytest.FixtureRequest) -> tuple[Variant, str]:
    """Every variant, each in one kind of model."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def reload_in_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that reloads an export starts at once; export/test_merged.py starts the real one."""
    monkeypatch.setattr("dyads.export.verify.subprocess", SimpleNamespace(run=forked.script))


@pytest.fixture
def mlp() -> Callable[[], MLP]:
    def make() -> MLP:
        torch.manual_seed(0)
        return MLP()

    return make

# SPDX-License-Identifier: Apache-2.0
"""Fixtures that need torch: each method variant, small models, and the same random numbers for every test."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import forked
from tiny import MLP, PLACED, UNLIKE, VARIANTS, Variant


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

# SPDX-License-Identifier: Apache-2.0
"""Adapters that FSDP2 shards over two processes train, save and reload as whole ones (sharded.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest

import sharded
from launched import torchrun
from tiny import Variant

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("sharded") / "results.json"
    done = torchrun([sharded.__file__, str(path)])
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("variant", sharded.CASES, ids=lambda v: v.id)
def test_a_sharded_adapter_is_the_whole_one(variant: Variant, results: dict[str, dict[str, Any]]) -> None:
    found = results[variant.id]
    assert "error" not in found, found["error"]
    assert found["weights"] <= 1e-6
    assert found["logits"] <= 1e-5

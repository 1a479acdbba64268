# SPDX-License-Identifier: Apache-2.0
"""Variants for the contracts of a core: those of all tests, and scores, selects and edges in pairs."""

from __future__ import annotations

from typing import Any

import pytest

from tiny import VARIANTS, Variant


def _staged(key: str, score: str, select: str = "softmax", **options: Any) -> Variant:
    top_k = {"top_k": 2} if select == "top_k" else {}
    return Variant(key, tuple({"score": score, "select": select, **top_k, **options}.items()))


MORE_VARIANTS = [
    # Every score and every select, with every way to combine.
    _staged("mode", "x", "sigmoid"),
    _staged("molora", "x", "top_k", renormalise=False),
    _staged("mode", "x", "straight_through", group_size=2),
    _staged("molora", "x", temperature=2.0),
    _staged("molora", "h", "top_k", shared_down=True),
    _staged("molora", "h"),
    _staged("mode", "h", "sigmoid", group_size=2, temperature=0.5),
    _staged("mode", "h+task", group_size=2, temperature=0.5),
    _staged("molora", "h+task", "straight_through"),
    _staged("molora", "task"),
    _staged("mode", "task", "top_k"),
    _staged("molora", "x+task", shared_down=True, temperature=2.0),
    _staged("mode", "x+task", "top_k", task_dim=5),
    _staged("mode", "cosine", group_size=2),
    _staged("molora", "cosine", "top_k", temperature=0.2, learn_temperature=True),
    _staged("molora", "uniform"),
    _staged("molora", "random", "sigmoid"),
    # Other forms of the relatives.
    Variant("comol", (("score", "x"),)),
    Variant("hmora", (("shared_down", True), ("top_k", None))),
    # Ones.
    Variant("mode", (("r", 1), ("num_experts", 5))),
    Variant("task_mode", (("num_experts", 1),)),
    Variant("moelora", (("num_experts", 1),)),
    Variant("more", (("r", 1),)),
    Variant("smora", (("r", 1), ("top_k", 1))),
    Variant("comol", (("num_experts", 1),)),
    Variant("comol", (("r", 1),)),
    Variant("hmora", (("num_experts", 1),)),
]


@pytest.fixture(params=[*VARIANTS, *MORE_VARIANTS], ids=lambda v: v.id)
def any_variant(request: pytest.FixtureRequest) -> Variant:
    return request.param

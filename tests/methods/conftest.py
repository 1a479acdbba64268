# SPDX-License-Identifier: Apache-2.0
"""Which variants run through the contracts of a core? Those of all tests, and every score with every select."""

from __future__ import annotations

from itertools import cycle

import pytest

from dyads.methods.stages import SCORES, SELECTS
from tiny import VARIANTS, Variant

_COMBINES = cycle(
    [
        ("mode", ()),
        ("molora", ()),
        ("mode", (("group_size", 2),)),
        ("molora", (("shared_down", True),)),
    ]
)


def _staged() -> list[Variant]:
    """Every score with every select, each with one of the ways to combine."""
    variants = []
    for score in SCORES:
        for select in SELECTS if score != "uniform" else ("softmax",):
            key, combine = next(_COMBINES)
            top_k = (("top_k", 2),) if select == "top_k" else ()
            variants.append(Variant(key, (("score", score), ("select", select), *top_k, *combine)))
        next(_COMBINES)  # a select meets another way to combine with every score
    return variants


MORE_VARIANTS = [
    *_staged(),
    Variant("mode", (("temperature", 0.5),)),
    Variant("molora", (("temperature", 2.0), ("score", "x+task"))),
    Variant("molora", (("select", "top_k"), ("top_k", 2), ("renormalise", False))),
    Variant("mode", (("score", "cosine"), ("temperature", 0.2), ("learn_temperature", True))),
    Variant("task_mode", (("num_experts", 1),)),
    Variant("task_mode", (("score", "task"), ("task_dim", 5), ("group_size", 4))),
    Variant("moelora", (("num_experts", 1),)),
    Variant("mtl_lora", (("num_experts", 1),)),
    Variant("smora", (("top_k", 4),)),
    Variant("poly", (("num_experts", 1),)),
]


@pytest.fixture(params=VARIANTS, ids=lambda v: v.id)
def method_variant(request: pytest.FixtureRequest) -> Variant:
    """For tests of many cases: those of all tests only."""
    return request.param


@pytest.fixture(params=[*VARIANTS, *MORE_VARIANTS], ids=lambda v: v.id)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param

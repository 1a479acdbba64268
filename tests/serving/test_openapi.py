# SPDX-License-Identifier: Apache-2.0
"""Requests made up from the server's own OpenAPI description get answers that it describes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from dyads.runs.folder import RunFolder
from made_servers import served

MADE_UP = settings(
    max_examples=30,
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def checked(name: str, kind: str, answered: Counter[str]) -> Callable[[Any], None]:
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    def check(case: Any) -> None:
        if kind == "positive" and isinstance(case.body, dict) and answered[name] % 2:
            case.body["model"] = "tiny-llama"  # every second one names a model that there is
        answered[name] += 1
        # A description cannot hold all that is refused: tokens outside the vocabulary, two messages for a task.
        case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])

    return check


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_every_response_is_one_that_is_described(made: dict[str, RunFolder], kind: str) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    mode = schemathesis.GenerationMode(kind)
    answered = Counter[str]()
    with served({"more": made["more"]}, slots=8) as server:
        schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()
            if kind == "negative" and operation.method == "get":
                continue  # it has nothing that could be wrong
            check = checked(operation.label, kind, answered)
            MADE_UP(given(case=operation.as_strategy(generation_mode=mode))(check))()
        assert server.engine.is_ready
        assert server.engine.is_idle
    assert {"POST /v1/completions", "POST /v1/chat/completions"} <= answered.keys()

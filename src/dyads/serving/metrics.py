# SPDX-License-Identifier: Apache-2.0
"""Metrics of a server in Prometheus' format, with the name of the model, that is of the task, as a label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from dyads.serving.engine import Engine

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        one: dict[str, Any]
        one, model = {"registry": self.registry, "namespace": "dyads"}, ("model",)
        self.requests = Counter("requests", "Requests that ended, by outcome", ("model", "outcome"), **one)
        self.refused = Counter("refused", "Requests that were refused, by status", ("status",), **one)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", model, **one)
        self.answer_tokens = Counter("answer_tokens", "Tokens of answers", model, **one)
        self.first_tokens = Histogram(
            "time_to_first_token_seconds", "From the request to its first token", model, buckets=_SECONDS, **one
        )
        self.rows = Histogram("batch_rows", "Rows of a forward pass", buckets=_ROWS, **one)
        self.steps = Histogram("step_seconds", "A forward pass", buckets=_SECONDS, **one)
        self.waiting = Gauge("waiting", "Requests without a token so far", **one)
        self.running = Gauge("running", "Requests in a batch", **one)
        self.prefixes = Gauge("prefix_cache_bytes", "Keys and values of shared prefixes", **one)

    def observe(self, engine: Engine) -> None:
        """Read the gauges from an engine."""
        self.waiting.set_function(lambda: engine.waiting)
        self.running.set_function(lambda: engine.running)
        self.prefixes.set_function(lambda: engine.prefixes.bytes)

    def step(self, rows: int, seconds: float) -> None:
        """A forward pass was made."""
        self.rows.observe(rows)
        self.steps.observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """A request got its first token."""
        self.first_tokens.labels(model).observe(seconds)

    def ended(self, model: str, outcome: str, prompt: int, answer: int) -> None:
        """A request ended."""
        self.requests.labels(model, outcome).inc()
        self.prompt_tokens.labels(model).inc(prompt)
        self.answer_tokens.labels(model).inc(answer)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self.registry)

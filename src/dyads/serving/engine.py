# SPDX-License-Identifier: Apache-2.0
"""Engine: the one thread that owns the models, makes their forward passes, and hands every new token to its request.

Requests come through a queue and their pieces of text go out by a callback, so that no reader, however slow, holds up
a batch. What waits for a reader is bounded by the tokens of its answer.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from dyads.scoring.decode import Answer, Decoder, Question
from dyads.scoring.sampling import TokenLogprobs
from dyads.serving.answer_text import AnswerText
from dyads.serving.errors import ServingError, log, place_of
from dyads.serving.metrics import Metrics
from dyads.serving.prefix_cache import PrefixCache
from dyads.tuner.routing import find_routing

__all__ = ["Batch", "Engine", "Job", "Piece"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer."""

    text: str = ""
    tokens: tuple[tuple[int, TokenLogprobs | None], ...] = ()
    """Its tokens, without the one that ends an answer; they may be of text that is given out later."""
    offset: int = 0
    """Where in the answer's text its tokens begin."""
    finish: str | None = None
    """In the last piece: stop or length."""
    error: ServingError | None = None
    """In the last piece, in place of `finish`."""

    @property
    def is_last(self) -> bool:
        """Whether no piece follows."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """A request in the engine."""

    model: str
    """The name that the request gave, for metrics."""
    batch: Batch
    question: Question
    text: AnswerText
    deliver: Callable[[Piece], object]
    """Called in the engine's thread with every piece; must not block."""
    came: float = field(default_factory=time.monotonic)
    answer: Answer | None = None
    state: str = "waiting"
    """waiting, running or ended."""

    @property
    def answer_tokens(self) -> int:
        """The number of tokens that were generated."""
        return len(self.answer.tokens) if self.answer else 0


@dataclass(eq=False)
class Batch:
    """A model whose requests are decoded together, with its decoder."""

    decoder: Decoder
    model: torch.nn.Module
    jobs: dict[Answer, Job] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model: Any = self.model
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        """The number of tokens with an embedding, which may differ from the tokenizer's."""

    @property
    def is_busy(self) -> bool:
        """Whether an answer waits or runs."""
        return bool(self.decoder.running or self.decoder.waiting)


class Engine:
    """Decodes the requests of several batches, one forward pass of each in turn."""

    def __init__(
        self,
        batches: Sequence[Batch],
        *,
        most_waiting: int,
        prefix_bytes: int,
        metrics: Metrics,
        failed: Callable[[], object] = lambda: None,
    ) -> None:
        """`failed` is called in the engine's thread when it ends by an error, which `failure` then describes."""
        self.batches, self.most_waiting, self.metrics = tuple(batches), most_waiting, metrics
        self.failure, self._failed = "", failed
        self.prefixes = PrefixCache(prefix_bytes)
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="dyads-engine", daemon=True)
        metrics.observe(self)

    # --- called in any thread -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """Requests without a token so far."""
        return sum(job.state == "waiting" for job in list(self._jobs))

    @property
    def running(self) -> int:
        """Requests with a token, in a batch."""
        return sum(job.state == "running" for job in list(self._jobs))

    def check(self) -> None:
        """ServingError where no further request is taken."""
        if not self.is_ready:
            raise ServingError.unavailable("the server is stopping: send the request to another one, or later")
        if self.waiting >= self.most_waiting:
            raise ServingError.unavailable(
                f"{self.most_waiting} requests are waiting, the most that are taken: try again later", "queue_full"
            )

    def submit(self, job: Job) -> None:
        """Take a request; ServingError where the queue is full or the server is stopping."""
        with self._lock:
            self.check()
            self._jobs.add(job)
        self._commands.put(("submit", job))

    def cancel(self, job: Job) -> None:
        """Drop a request, whose client is gone; nothing where it has ended."""
        if job.state != "ended":
            self._commands.put(("cancel", job))

    def close(self) -> None:
        """Take no more requests."""
        self._closing = True

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._jobs

    def stop(self) -> None:
        """End all requests with an error, and the thread."""
        self.close()
        self._commands.put(("stop", None))
        if self._thread.is_alive():
            self._thread.join()

    # --- called in the engine's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        reason = ServingError.unavailable("the server is stopping: the answer is not complete")
        try:
            with ExitStack() as stack, torch.inference_mode():
                for batch in self.batches:
                    stack.enter_context(batch.decoder)
                    if (routing := find_routing(batch.model)) is not None:
                        stack.enter_context(routing.unchanged_weights())
                while self._obey():
                    for batch in self.batches:
                        if batch.is_busy:
                            self._step(batch)
        except BaseException as error:
            self.failure = place_of(error)
            log.error("the engine failed: %s", self.failure)
            reason = ServingError.unavailable("the server failed and stops: the answer is not complete", "failed")
            self._failed()
        finally:
            with self._lock:
                self._closing = True
                left = list(self._jobs)
            for job in left:
                self._fail(job, reason)

    def _obey(self) -> bool:
        """Take all commands, waiting for one where nothing is to do; False at the end."""
        wait = not any(batch.is_busy for batch in self.batches)
        while True:
            try:
                what, job = self._commands.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if job is None:
                return False
            if what == "cancel":
                self._cancel(job)
            elif job.state != "ended":
                self._submit(job)

    def _submit(self, job: Job) -> None:
        try:
            self._queue(job)
        except Exception as error:
            self._fail(job, ServingError.internal(error))

    def _queue(self, job: Job) -> None:
        prefix = self.prefixes.prefix((id(job.batch), job.question.task, job.model), job.question.prompt)
        job.answer = job.batch.decoder.submit(job.question, prefix)
        job.batch.jobs[job.answer] = job

    def _cancel(self, job: Job) -> None:
        if job.state == "ended":
            return
        if job.answer is not None:
            job.batch.decoder.cancel(job.answer)
        self._end(job, "cancelled")

    def _step(self, batch: Batch) -> None:
        began, waiting = time.monotonic(), len(batch.decoder.waiting)
        try:
            answers = batch.decoder.step()
        except Exception as error:  # out of memory, most likely: the batch is lost, and the server goes on
            batch.decoder.clear()
            for job in list(batch.jobs.values()):
                self._fail(job, ServingError.internal(error))
            return
        self.metrics.step(len(answers), time.monotonic() - began)
        if len(batch.decoder.waiting) != waiting:
            self.prefixes.trim()
        for answer in answers:
            self._advance(batch.jobs[answer], answer)

    def _advance(self, job: Job, answer: Answer) -> None:
        """Hand a new token over; an error in the text of one answer ends that one only."""
        try:
            self._hand_over(job, answer)
        except Exception as error:
            job.batch.decoder.cancel(answer)
            self._fail(job, ServingError.internal(error))

    def _hand_over(self, job: Job, answer: Answer) -> None:
        if job.state == "waiting":
            job.state = "running"
            self.metrics.first_token(job.model, time.monotonic() - job.came)
        token, is_end = answer.tokens[-1], job.batch.decoder.is_end(answer)
        text = job.text.extend(answer.tokens, ended=answer.ended)
        finish = "stop" if is_end or job.text.stopped else "length" if answer.ended else None
        if finish and not answer.ended:
            job.batch.decoder.cancel(answer)
        tokens = () if is_end else ((token, answer.logprobs[-1] if answer.logprobs else None),)
        if finish:
            self._end(job, finish)
        job.deliver(Piece(text, tokens, job.text.offset, finish))

    def _fail(self, job: Job, error: ServingError) -> None:
        self._end(job, "error")
        job.deliver(Piece(error=error))

    def _end(self, job: Job, outcome: str) -> None:
        job.state = "ended"
        if job.answer is not None:
            job.batch.jobs.pop(job.answer, None)
        self.metrics.ended(job.model, outcome, len(job.question.prompt), job.answer_tokens)
        with self._lock:
            self._jobs.discard(job)  # last: an engine that is idle has counted every request

# SPDX-License-Identifier: Apache-2.0
"""Responses: the pieces of an answer as one JSON object, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dyads.scoring.sampling import TokenLogprobs
from dyads.serving.engine import Job, Piece
from dyads.serving.errors import ServingError

__all__ = ["AnswerResponse", "Form", "until_gone"]

T = TypeVar("T")


async def until_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """The result of `work`, which is cancelled, with the result None, when the client closes its connection."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


@dataclass
class Form:
    """The form of a response: that of a chat, or of a completion."""

    job: Job
    chat: bool
    logprobs: int | None
    token_text: Callable[[int], str]
    include_usage: bool = False

    def __post_init__(self) -> None:
        kind = "chatcmpl" if self.chat else "cmpl"
        self.id, self.created = f"{kind}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The response to a request without a stream."""
        text = "".join(piece.text for piece in pieces)
        logprobs = self._logprobs(pieces)
        if logprobs and not self.chat:
            logprobs["text_offset"] = [min(offset, len(text)) for offset in logprobs["text_offset"]]
        choice = {"index": 0, "finish_reason": pieces[-1].finish, "logprobs": logprobs}
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [choice | said], "usage": self._usage()}

    def first(self) -> list[dict[str, Any]]:
        """The chunks before the first piece."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def chunk(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a piece."""
        found = []
        logprobs = self._logprobs([piece])
        if piece.text or (logprobs and piece.tokens) or (piece.finish and not self.chat):
            delta = {"content": piece.text} if self.chat else piece.text
            found.append(self._chunk(delta, None if self.chat else piece.finish, logprobs))
        if piece.finish and self.chat:
            found.append(self._chunk({}, piece.finish))
        if piece.finish and self.include_usage:
            found.append({**self._head(self._chunk_kind), "choices": [], "usage": self._usage()})
        return found

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, delta: Any, finish: str | None = None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": 0, **said, "finish_reason": finish, "logprobs": logprobs}
        return {**self._head(self._chunk_kind), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.job.model}

    def _usage(self) -> dict[str, int]:
        prompt, answer = len(self.job.question.prompt), self.job.answer_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        given: list[tuple[int, TokenLogprobs]] = []
        offsets: list[int] = []
        for piece in pieces:
            found_in = [(token, found) for token, found in piece.tokens if found is not None]
            given += found_in
            offsets += [piece.offset] * len(found_in)
        if self.chat:
            content = [
                {
                    **self._token(token, found.logprob),
                    "top_logprobs": [self._token(one, value) for one, value in found.top],
                }
                for token, found in given
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self.token_text(token) for token, _ in given],
            "token_logprobs": [_finite(found.logprob) for _, found in given],
            "top_logprobs": [{self.token_text(t): _finite(value) for t, value in found.top} for _, found in given],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        # Of a part of a character, the text has not the bytes.
        return {"token": text, "logprob": _finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


def _finite(value: float) -> float:
    """A number that JSON can hold."""
    return value if value == value and abs(value) != float("inf") else -9999.0


class AnswerResponse(Response):
    """The answer to one request, whole or as a stream; the request is dropped when its client is gone."""

    def __init__(
        self,
        form: Form,
        pieces: asyncio.Queue[Piece],
        *,
        stream: bool,
        cancel: Callable[[Job], object],
        reading_seconds: float,
        ended: Callable[[list[Piece] | None], object],
    ) -> None:
        """`reading_seconds`: how long a client may take to read a part of the stream before its request is dropped.

        `ended` is called with all pieces, or None where the client is gone.
        """
        self.form, self.pieces, self.stream = form, pieces, stream
        self.cancel, self.reading_seconds, self.ended = cancel, reading_seconds, ended
        self.status_code, self.background = 200, None
        self.media_type = "text/event-stream" if stream else "application/json"
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"} if stream else None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        got: list[Piece] = []

        async def collect() -> JSONResponse:
            while not got or not got[-1].is_last:
                got.append(await self.pieces.get())
            error = got[-1].error
            if error is not None:
                return JSONResponse(error.body, error.status, error.headers)
            return JSONResponse(self.form.whole(got))

        try:
            if self.stream:
                finished = await until_gone(self._stream(send, got), receive)
            else:
                response = await until_gone(collect(), receive)
                finished = response is not None
                if response is not None:
                    await response(scope, receive, send)  # the connection ends where the client does not read
        finally:
            self.cancel(self.form.job)
        self.ended(got if finished else None)

    async def _stream(self, send: Send, got: list[Piece]) -> bool:
        async def write(body: str, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": body.encode(), "more_body": more}
            await asyncio.wait_for(_as_coroutine(send(message)), self.reading_seconds)

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await write("".join(map(_event, self.form.first())))
            while not got or not got[-1].is_last:
                news = [await self.pieces.get()]
                while not self.pieces.empty():  # a slow client gets fewer and larger parts
                    news.append(self.pieces.get_nowait())
                got += news
                await write("".join(_event(chunk) for piece in news for chunk in self._chunks(piece)))
            await write("data: [DONE]\n\n", more=False)
        except asyncio.TimeoutError:  # the client does not read
            return False
        return True

    def _chunks(self, piece: Piece) -> list[dict[str, Any]]:
        return self.form.chunk(piece) if piece.error is None else [piece.error.body]


async def _as_coroutine(awaitable: Awaitable[None]) -> None:
    await awaitable


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error_response(error: ServingError) -> JSONResponse:
    """The response of a request that is refused."""
    return JSONResponse(error.body, error.status, error.headers)

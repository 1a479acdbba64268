# SPDX-License-Identifier: Apache-2.0
"""Application: the paths of the server, in OpenAI's protocol."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from dyads import __version__
from dyads.errors import shortened
from dyads.serving.door import Door
from dyads.serving.engine import Engine, Job, Piece
from dyads.serving.errors import ServingError, log
from dyads.serving.limits import Limits
from dyads.serving.page import PAGE
from dyads.serving.protocol import (
    ChatBody,
    ChatCompletion,
    Completion,
    CompletionBody,
    ErrorBody,
    ModelList,
    ModelObject,
)
from dyads.serving.responses import AnswerResponse, Form, error_response
from dyads.serving.served_models import Asked, ServedModel, ServedModels, Wish
from dyads.tasks.messages import SYSTEM, Message

__all__ = ["application"]

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "the request is refused",
        401: "no valid API key",
        404: "no such model",
        408: "the body did not come in time",
        413: "the body is too large",
        415: "the body is not JSON",
        429: "too many requests with this key",
        500: "the server failed",
        503: "the queue is full, or the server is stopping",
    }.items()
}


def _some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _REFUSALS[status] for status in statuses}


@dataclass
class _State:
    models: ServedModels
    engine: Engine
    limits: Limits
    log_text: bool
    created: int = field(default_factory=lambda: int(time.time()))


def application(models: ServedModels, engine: Engine, limits: Limits, *, log_text: bool = False) -> FastAPI:
    """The application of a server whose engine runs."""
    app = FastAPI(
        title="dyads",
        version=__version__,
        description="Adapters of many tasks behind OpenAI's protocol: the model's name chooses the task.",
        docs_url=None,
        redoc_url=None,
    )
    state = _State(models, engine, limits, log_text)
    app.add_exception_handler(ServingError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_middleware(Door, limits=limits, metrics=engine.metrics)
    _add_paths(app, state)
    schema = app.openapi

    def openapi() -> dict[str, Any]:
        described = schema()
        for path in described["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # a refusal has the status 400, as OpenAI's
        return described

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_paths(app: FastAPI, state: _State) -> None:
    engine, models = state.engine, state.models

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return PAGE

    @app.get("/health", summary="Whether the process answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether requests are taken", responses=_some(503))
    async def ready() -> dict[str, str]:
        engine.check()
        return {"status": "ready"}

    @app.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=PlainTextResponse,
        responses=_some(401, 429),
    )
    async def metrics() -> Response:
        return PlainTextResponse(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", summary="The base model, and every task of every run", responses=_some(401, 429))
    async def list_models() -> ModelList:
        data = [ModelObject(id=name, object="model", created=state.created, owned_by="dyads") for name in models.models]
        return ModelList(object="list", data=data)

    @app.get("/v1/models/{name:path}", summary="One model", responses=_some(401, 404, 429))
    async def one_model(name: str) -> ModelObject:
        return ModelObject(id=models[name].name, object="model", created=state.created, owned_by="dyads")

    responses = _REFUSALS | {
        200: {"content": {"text/event-stream": {}}, "description": "The answer, whole or as a stream"}
    }

    @app.post("/v1/completions", summary="Answer a prompt", response_model=Completion, responses=responses)
    async def completions(body: CompletionBody) -> Response:
        model = models[body.model]
        prompt = body.prompt
        if isinstance(prompt, list) and isinstance(prompt[0], str):
            (prompt,) = prompt
        wish = Wish(_limited(body.max_tokens, "max_tokens", state), body.sampling, body.logprobs)
        engine.check()
        asked = await run_in_threadpool(model.of_prompt, prompt, wish)  # type: ignore[arg-type]
        return _answer(model, asked, body, wish, state, chat=False)

    @app.post(
        "/v1/chat/completions",
        summary="Answer an input of a task, or a conversation",
        response_model=ChatCompletion,
        responses=responses,
    )
    async def chat_completions(body: ChatBody) -> Response:
        model = models[body.model]
        messages = [Message(SYSTEM if m.role == "developer" else m.role, m.text) for m in body.messages]
        if body.top_logprobs is not None and not body.logprobs:
            raise ServingError("top_logprobs needs logprobs: true", param="top_logprobs")
        wanted = _limited(body.max_tokens, "max_tokens", state)
        wanted = _limited(body.max_completion_tokens, "max_completion_tokens", state) or wanted
        wish = Wish(wanted, body.sampling, (body.top_logprobs or 0) if body.logprobs else None)
        engine.check()
        asked = await run_in_threadpool(model.of_messages, messages, body.columns, wish)
        return _answer(model, asked, body, wish, state, chat=True)


def _answer(
    model: ServedModel, asked: Asked, body: ChatBody | CompletionBody, wish: Wish, state: _State, *, chat: bool
) -> Response:
    engine, pieces = state.engine, asyncio.Queue[Piece]()
    if wish.max_tokens is None:
        asked = asked.limited(state.limits.answer_tokens)
    loop = asyncio.get_running_loop()

    def deliver(piece: Piece) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    text = model.answer_text(asked, body.stops)
    job = Job(model.name, model.batch, asked.question, text, deliver)
    options = body.stream_options
    form = Form(job, chat, wish.logprobs, model.token_text, bool(options and options.include_usage))
    engine.submit(job)

    def ended(got: list[Piece] | None) -> None:
        outcome = "client gone" if got is None else got[-1].finish or "error"
        line = (
            f"{form.id} {model.name}: {len(asked.question.prompt)} + {job.answer_tokens} tokens,"
            f" {time.monotonic() - job.came:.2f} s, {outcome}"
        )
        if state.log_text:
            line += f"; prompt {asked.example.prompt!r}, answer {text.text!r}"
        log.info("%s", line)

    return AnswerResponse(
        form,
        pieces,
        stream=bool(body.stream),
        cancel=engine.cancel,
        reading_seconds=state.limits.reading_seconds,
        ended=ended,
    )


def _limited(wanted: int | None, param: str, state: _State) -> int | None:
    most = state.limits.answer_tokens
    if wanted is not None and wanted > most:
        raise ServingError(f"{param} is {wanted}, and the server writes at most {most} tokens", param=param)
    return wanted


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_response(error)


async def _invalid(request: Request, error: Exception) -> Response:
    """The first contradiction between the body and its form, without the values that were given."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    # Of a value that may have several types, the error that lies deepest: it is of the type that was meant.
    first = max((one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]), key=lambda one: len(one["loc"]))
    steps = [str(step) for step in first["loc"][1:]]
    place = [step for step in steps if step.isidentifier() or step.isdigit()]  # without the types of a union
    if first["type"] == "extra_forbidden" and place[-1:] != steps[-1:]:
        place.append(steps[-1])  # a key that is no identifier
    param = shortened(place[0], 60) if place else None
    where = shortened(".".join(place), 100)
    if first["type"] == "json_invalid":
        refusal = ServingError("the body is not JSON: send an object with the header Content-Type: application/json")
    elif first["type"] == "extra_forbidden":
        refusal = ServingError(f"unknown key '{where}': this server does not have it; leave it out", param=param)
    elif first["type"] == "missing" and param is None:
        refusal = ServingError("there is no body: send a JSON object with the header Content-Type: application/json")
    else:
        refusal = ServingError(f"{where or 'the body'}: {first['msg']}", param=param)
    return error_response(refusal)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = "there is no such path: this server has /v1/models, /v1/completions and /v1/chat/completions"
    else:
        message = str(error.detail)
    refusal = ServingError(message, status=error.status_code)
    return JSONResponse(refusal.body, error.status_code, error.headers)

# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests and responses: the part of OpenAI's protocol that the server speaks.

Options that it does not have are accepted with the value that changes nothing (`n: 1`, `presence_penalty: 0`), and
refused with any other one.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from dyads.scoring.sampling import Sampling

__all__ = [
    "ChatBody",
    "ChatCompletion",
    "Completion",
    "CompletionBody",
    "ErrorBody",
    "ModelList",
    "ModelObject",
    "Usage",
]

_GIVEN = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
_Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
_Zero: TypeAlias = Annotated[float, Field(ge=0, le=0)] | None
_Whole: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
_Nothing: TypeAlias = Annotated[list[Any], Field(max_length=0)] | None
_Text: TypeAlias = Annotated[str, Field(max_length=512)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = _GIVEN

    include_usage: bool = False
    """Whether a last chunk has the numbers of tokens."""
    include_obfuscation: bool = False


class _Body(BaseModel):
    """What both kinds of requests have."""

    model_config = _GIVEN

    model: _Text
    """A name of /v1/models."""
    max_tokens: _Whole | None = None
    """Default: the limit of the task's evaluation."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Default: 0, the most likely token, as `dyads generate`."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    """The same seed gives the same answer, whatever other requests run."""
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: _Text | None = None
    """Ignored."""
    n: Annotated[int, Field(strict=True, ge=1, le=1)] | None = None
    presence_penalty: _Zero = None
    frequency_penalty: _Zero = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampling(self) -> Sampling | None:
        """How tokens are drawn; None for the most likely ones."""
        if not self.temperature:
            return None
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Sampling(seed, self.temperature, 1.0 if self.top_p is None else self.top_p)


class CompletionBody(_Body):
    """The body of /v1/completions: a whole prompt, read as it is."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1)]
    )
    """A text, or its tokens."""
    logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    """How many of the most likely tokens are reported at every place."""
    best_of: Annotated[int, Field(strict=True, ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class TextPart(BaseModel):
    """A text among the parts of a message."""

    model_config = _GIVEN

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A turn of a conversation."""

    model_config = _GIVEN

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: _Text | None = None
    """Ignored."""

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(_Body):
    """The body of /v1/chat/completions: a conversation, or the input of a task."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    """For `run/task`, the user's message is the input, which is put into the form of the task's training."""
    columns: dict[str, str] = {}
    """Columns of the task's form beside the input; not in OpenAI's protocol."""
    max_completion_tokens: _Whole | None = None
    """Another name of max_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: _Nothing = None
    metadata: dict[str, str] | None = None
    """Ignored."""
    store: Literal[False] | None = None


# --- responses --------------------------------------------------------------------------------------------------------


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class Completion(BaseModel):
    """The response of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[_CompletionChoice]
    usage: Usage | None = None


class _Reply(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class _ChatChoice(BaseModel):
    index: int
    message: _Reply
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class ChatCompletion(BaseModel):
    """The response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[_ChatChoice]
    usage: Usage | None = None


class ModelObject(BaseModel):
    """A model of /v1/models."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The response of /v1/models."""

    object: Literal["list"]
    data: list[ModelObject]


class _Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The response of a request that is refused or failed."""

    error: _Error

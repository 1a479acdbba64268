# SPDX-License-Identifier: Apache-2.0
"""Chat messages: the turns of a conversation, read from the two common forms of rows.

{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}       ShareGPT's
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dyads.errors import TaskError, listed
from dyads.tasks.rows import json_of_cell, shortened

__all__ = ["ASSISTANT", "CONVERSATIONS", "MESSAGES", "SYSTEM", "USER", "Message", "read_messages", "transcript"]

MESSAGES, CONVERSATIONS = "messages", "conversations"
"""The columns of the two forms."""
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_ROLES = {
    **{role: role for role in (SYSTEM, USER, ASSISTANT)},
    "developer": SYSTEM,
    "human": USER,
    "prompter": USER,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
}


class Message(NamedTuple):
    """A turn of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


def read_messages(given: Any, place: str) -> tuple[Message, ...]:
    """The messages of a row's list; TaskError, starting with `place`, for a list that is none of the two forms.

    A text is such a list as JSON, as in a cell of a CSV file. A system message may only be the first, and the first
    answer follows a user's message.
    """
    if isinstance(given, str):
        given = json_of_cell(given, f"{place}: the text is not a JSON list of messages")
    if not isinstance(given, (list, tuple)) or not given:
        raise TaskError(f"{place}: messages must be a list of {{role, content}}, got {shortened(given)}")
    messages = tuple(_message(one, f"{place}, message {number}") for number, one in enumerate(given, start=1))
    roles = [message.role for message in messages]
    if SYSTEM in roles[1:]:
        number = roles.index(SYSTEM, 1) + 1
        raise TaskError(f"{place}, message {number}: a system message must be the first; move or remove it")
    if USER not in roles:
        raise TaskError(f"{place}: the messages have no turn of the user; add one, or leave the row out")
    return messages


def _message(given: Any, place: str) -> Message:
    if not isinstance(given, Mapping):
        raise TaskError(f"{place}: expected {{role, content}}, got {shortened(given)}")
    role_key, text_key = ("from", "value") if "from" in given else ("role", "content")
    for key in (role_key, text_key):
        if key not in given:
            raise TaskError(f"{place}: '{key}' is missing; it has {listed(given) or 'nothing'}")
    role = _ROLES.get(given[role_key]) if isinstance(given[role_key], str) else None
    if role is None:
        raise TaskError(
            f"{place}: unknown role {shortened(given[role_key])}; the roles are system, user and assistant (ShareGPT's "
            "system, human and gpt); calls of tools are not supported"
        )
    content = given[text_key]
    if isinstance(content, (list, tuple)) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise TaskError(f"{place}: '{text_key}' must be text, got {shortened(content)}")
    return Message(role, content)


def transcript(messages: Sequence[Message]) -> str:
    """The messages as one text that ends where the next answer begins."""
    names = {USER: "User: ", ASSISTANT: "Assistant: "}
    lines = (m.content + "\n\n" if m.role == SYSTEM else f"{names[m.role]}{m.content}\n" for m in messages)
    return "".join(lines) + names[ASSISTANT]

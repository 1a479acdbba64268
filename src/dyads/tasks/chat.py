# SPDX-License-Identifier: Apache-2.0
"""Family `chat`: conversations and instructions from JSONL, JSON or CSV files.

A row is a conversation, in either of the two common forms, or an instruction with an output (Alpaca's form):

    {"messages": [{"role": "system", "content": "…"}, {"role": "user", "content": "…"}, {"role": "assistant", …}]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    {"instruction": "Name three colours.", "input": "", "output": "Red, green, blue."}

and optionally `task` (otherwise the file's name), `system`, `split`, `id`, `metric`, `labels`. The last answer of a
conversation is its reference, and the turns before it are its prompt; turns after it are left out. All of the
assistant's turns are learned. Models without a chat template read a transcript ("User: …", "Assistant: …").
"""

from __future__ import annotations

from typing import ClassVar, Literal

from dyads.tasks.family import register_family
from dyads.tasks.files import RowFilesSpec
from dyads.tasks.own_rows import CHAT_COLUMNS

__all__ = ["ChatSpec"]


@register_family
class ChatSpec(RowFilesSpec):
    """Conversations and instructions from JSONL, JSON or CSV files."""

    known: ClassVar[tuple[str, ...]] = CHAT_COLUMNS
    version: ClassVar[int] = 1
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".json", ".csv")
    example: ClassVar[str] = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
    needs_task: ClassVar[bool] = False

    family: Literal["chat"] = "chat"
    """Conversations and instructions from JSONL, JSON or CSV files."""

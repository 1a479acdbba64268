# SPDX-License-Identifier: Apache-2.0
"""File names for tasks and runs that Linux, macOS and Windows all accept.

A task may have any name: `file_name` maps it to a file's name, and no two tasks to the same. A run's name is the name
of a folder that people type, so `name_mistake` refuses what cannot be one.
"""

from __future__ import annotations

import re
from hashlib import sha256
from urllib.parse import quote

from dyads.errors import visible

__all__ = ["file_name", "name_mistake"]

_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.I | re.S)
"""Names of devices on Windows, with any ending."""
_LONGEST_TASK, _LONGEST_RUN = 120, 180
"""In bytes; file systems allow 255, with endings and marks such as `.unfinished`."""


def file_name(task: str) -> str:
    """The name, without ending, of the file or folder of a task: the task's name with other characters as %XX.

    Names that are too long, reserved, with capital letters (which macOS and Windows do not distinguish), or with a dot
    or space at an end, are cut where necessary and followed by ~ and a hash of the task's name.
    """
    escaped = quote(task, safe=" ()+,;=@!").replace("~", "%7E")
    plain = 0 < len(escaped) <= _LONGEST_TASK and escaped == escaped.strip(". ") and not _RESERVED.fullmatch(escaped)
    if plain and not re.search("[A-Z]", task):
        return escaped
    start = re.sub("%.?$", "", escaped[: _LONGEST_TASK - 40]).strip(". ")
    if _RESERVED.fullmatch(start):
        start = start.replace(".", "%2E")  # Windows looks at the name before its first dot
    return f"{start}~{sha256(task.encode()).hexdigest()[:16]}"


def name_mistake(name: str) -> str | None:
    """The reason why a run cannot have this name, None if it can."""
    if re.search(r'[/\\:*?"<>|]', name) or name != name.strip(" .") or name.startswith("-"):
        return 'no / \\ : * ? " < > |, no . or - at the start, no . or space at the end'
    if visible(name) != name:
        return "it has control characters, or marks that change the direction of text"
    if not name or _RESERVED.fullmatch(name):
        return "the name is reserved on Windows" if name else "it is empty"
    size = len(name.encode())
    return f"it has {size} bytes, and {_LONGEST_RUN} are allowed" if size > _LONGEST_RUN else None

# SPDX-License-Identifier: Apache-2.0
"""Fenced blocks of a page, run in the order of the page, in one folder.

| language | is |
|---|---|
| none, `sh` | commands; one of `PROGRAMS` or `dyads`, which runs in this process |
| `python` | code, in one namespace for the page |
| `yaml`, `json` | a file, where the fence has `title="NAME"`; else rows or sections that are read |
| `text` | after commands or code: all that they print, with `…` for what varies; elsewhere a drawing |
| `math` | a formula |

A line `*Not run in the tests: REASON.*` below a block is for what no machine of the tests can do; with
"in the tests, but for `--status`", of a study, that option alone is run: the grid is read and shown.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from click.testing import CliRunner

from dyads.cli import main

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
LANGUAGES = ("", "sh", "python", "yaml", "json", "text", "math")
COMMANDS = ("", "sh")

FENCE = re.compile(
    r'^(?P<indent> *)```(?P<language>[\w-]*)(?: title="(?P<title>[^"\n]+)")?(?P<rest>[^\n]*)\n'
    r"(?P<code>.*?)^(?P=indent)```\n"
    r"(?:\n(?P=indent)```text\n(?P<shown>.*?)^(?P=indent)```\n)?"
    r"(?:\n(?P=indent)\*Not run in the tests(?P<status>, but for `--status`)?: (?P<reason>[^*]+)\.\*\n)?",
    re.MULTILINE | re.DOTALL,
)

PROGRAMS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
    "sh": ["sh"],
}
"""Programs that a page may start, each a process of its own."""
INSTALLATION = ("git", "pip", "make", "uv")
"""Programs that install or call the tests themselves: `.ci/run` and the release checklist run these."""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    title: str | None
    code: str
    shown: str | None
    """The output below it."""
    reason: str | None
    """Why it is not run."""
    status: bool = False
    """Whether it is a study that is not run, but for `--status`."""

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def slow(self) -> bool:
        """Whether it trains, starts processes or generates tasks: more work than the default suite has time for."""
        if self.language in COMMANDS:
            return any(is_slow(words) for words in commands(self.code))
        return "reasoning_gym" in self.code or "http://127.0.0.1" in self.code


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The blocks of a page in order."""
    for fence in FENCE.finditer(text):
        assert not fence["rest"], f"{page}: a fence with {fence['rest']!r}"
        code, shown = (
            re.sub(f"^{fence['indent']}", "", part, flags=re.MULTILINE) if part is not None else None
            for part in (fence["code"], fence["shown"])
        )
        line = text[: fence.start()].count("\n") + 1
        status = fence["status"] is not None
        yield Block(page, line, fence["language"], fence["title"], code or "", shown, fence["reason"], status)


BLOCKS = {page: list(blocks_of(page, text)) for page, text in TEXTS.items()}


def commands(code: str) -> list[list[str]]:
    """The words of each command; lines that end with a backslash go on, and comments are left out."""
    return [words for line in code.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def runs_elsewhere(words: list[str]) -> bool:
    """Whether a command installs or measures, which `.ci/run` and the release checklist do, or calls the tests."""
    return words[0] in INSTALLATION or (words[:2] == ["python", "-m"] and words[2].split(".")[0] == "benchmarks")


def is_slow(words: list[str]) -> bool:
    """Whether a command is one for the slow tests."""
    if words[0] != "dyads":
        return not runs_elsewhere(words)
    if "--gpu" in words:
        return True
    return words[1] in SLOW_VERBS and not {"--status", "--keys"} & set(words)


SLOW_VERBS = {"adapt", "export", "report", "serve", "study", "train"}


class Session:
    """What a page's blocks share: a folder, which is the working directory, and a Python namespace."""

    def __init__(self, folder: Path, words: dict[str, str], names: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.words = words
        self.names = {"__name__": "__main__", **(names or {})}
        self.readers: dict[str, Callable[[str], Any]] = {}
        self.servers: list[subprocess.Popen[bytes]] = []

    def run(self, block: Block) -> str:
        """Run a block; returns what it prints to its standard output."""
        if block.title is not None:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():  # where the workspace has more rows than the page shows, they stay
                path.write_text(block.code, encoding="utf-8")
        if block.language in COMMANDS:
            return "".join(self.command(words, block) for words in commands(block.code))
        if block.language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.code, block.id, "exec"), self.names)
            return printed.getvalue()
        if block.language in self.readers:
            self.readers[block.language](block.code)
        return ""

    def command(self, words: list[str], block: Block) -> str:
        """Run one command; a redirection writes its output to a file."""
        words = [self.words.get(word, word) for word in words]
        target = words.pop() if len(words) > 2 and words[-2] == ">" else None
        if target is not None:
            words.pop()
        program, *arguments = words
        if runs_elsewhere(words):
            return ""
        if program == "dyads" and arguments[0] == "serve":
            return self.serve(arguments)
        if program == "dyads":
            result = CliRunner().invoke(main, arguments)
            code, output, error = result.exit_code, result.stdout, result.output
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise AssertionError(f"{block.id}: {shlex.join(words)}\n{result.output}") from result.exception
        else:
            assert program in PROGRAMS, f"{block.id}: no program {program} in the tests"
            done = subprocess.run(
                [*PROGRAMS[program], *arguments], cwd=self.folder, capture_output=True, text=True, check=False
            )
            code, output, error = done.returncode, done.stdout, done.stdout + done.stderr
        assert "\nWarning" not in f"\n{error}", f"{block.id}: {shlex.join(words)}\n{error}"
        assert code == 0, f"{block.id}: {shlex.join(words)} ended with {code}:\n{error[-6000:]}"
        if target is None:
            return output
        (self.folder / target).write_text(output, encoding="utf-8")
        return ""

    def serve(self, arguments: list[str]) -> str:
        """Start a server, which runs until the page ends, and wait until it takes requests."""
        with (self.folder / "server.log").open("wb") as log:
            server = subprocess.Popen([sys.executable, "-m", "dyads.cli", *arguments], stdout=log, stderr=log)
        self.servers.append(server)
        while server.poll() is None:
            with contextlib.suppress(OSError), urlopen("http://127.0.0.1:8000/ready"):
                return ""
            time.sleep(0.5)
        raise AssertionError((self.folder / "server.log").read_text(encoding="utf-8"))

    def close(self) -> None:
        """End the servers."""
        for server in self.servers:
            server.terminate()
            server.wait()


def same(shown: str, printed: str) -> bool:
    """Whether an output is the one that a page shows: `…` is any text in a line, and alone any lines."""
    pattern = "".join(
        r"(?:[^\n]*\n)*?"
        if line.strip() == "…"
        else ".*".join(re.escape(part) for part in line.rstrip().split("…")) + r"[ ]*\n"
        for line in shown.splitlines()
    )
    return re.fullmatch(pattern, printed if printed.endswith("\n") or not printed else printed + "\n") is not None

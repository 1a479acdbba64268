# SPDX-License-Identifier: Apache-2.0
"""Output of commands: an opening summary, one line of progress, and a result, for people, for logs or as JSON.

    Reporter       keeps everything to itself (`--quiet`, and the default in Python)
    TextReporter   summary and progress on standard error, the result on standard output; in a terminal the progress is
                   one line that is rewritten, elsewhere a plain line every few per cent or minutes
    JsonReporter   one JSON object per line on standard output (`--json`)

A terminal may have an encoding other than UTF-8 (cp1252, cp437, ASCII): `tolerate_encodings` lets characters that it
lacks be replaced, and text from data is printed through `printable`.
"""

from __future__ import annotations

import codecs
import io
import json
import logging
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

from dyads.errors import visible

__all__ = [
    "SILENT",
    "JsonReporter",
    "Reporter",
    "Styled",
    "TextReporter",
    "Tracker",
    "duration",
    "escape_logs",
    "json_line",
    "print_to",
    "printable",
    "rounded",
    "size",
    "tolerate_encodings",
]

Clock = Callable[[], float]

_NARROW = 72
"""Columns below which a line of progress has no bar."""


class Tracker:
    """Progress of one computation: how much is done, how fast, and the seconds left.

    `work` counts what speed is measured in, such as tokens; without it speed is in units of the progress.
    """

    def __init__(self, what: str, total: int, *, speed: str, clock: Clock = time.monotonic) -> None:
        self.what, self.total, self.speed = what, total, speed
        self.done = 0
        self.facts: dict[str, Any] = {}
        """What is shown besides, such as the loss."""
        self.expected: float | None = None
        """Seconds left, where more is known than the recent speed."""
        self._clock = clock
        self._begin = clock()
        self._work = 0.0
        self._marks: deque[tuple[float, int, float]] = deque([(self._begin, 0, 0.0)], maxlen=32)

    def begin_at(self, done: int) -> None:
        """Start the clock, with so much done before."""
        self.done, self._begin, self._work = done, self._clock(), 0.0
        self._marks.clear()
        self._marks.append((self._begin, done, 0.0))

    def update(self, done: int, work: float | None = None) -> None:
        """So much is done now, `work` of it since the last call."""
        self._work += done - self.done if work is None else work
        self.done = done
        self._marks.append((self._clock(), done, self._work))
        self.changed()

    def advance(self, more: int = 1) -> None:
        """Some more is done."""
        self.update(self.done + more)

    def show(self, **facts: Any) -> None:
        """Show these facts from now on."""
        self.facts.update(facts)
        self.changed(facts)

    def changed(self, facts: Mapping[str, Any] | None = None) -> None:
        """Called after every change; `facts` are new."""

    @property
    def seconds(self) -> float:
        """Since the clock started."""
        return self._clock() - self._begin

    @property
    def per_second(self) -> float | None:
        """Recent speed in work; None before there is one. The first unit, a warm-up, is left out if there are more."""
        return self._slope(2)

    @property
    def seconds_left(self) -> float | None:
        """None before there is a speed."""
        if self.expected is not None:
            return self.expected
        speed = self._slope(1)
        return (self.total - self.done) / speed if speed else None

    def _slope(self, column: int) -> float | None:
        marks = list(self._marks)
        first = marks[1 if len(marks) > 2 and marks[0][0] == self._begin else 0]
        elapsed, gained = marks[-1][0] - first[0], marks[-1][column] - first[column]
        return gained / elapsed if elapsed > 0 and gained > 0 else None

    def text(self) -> str:
        """Progress in one line, after the name of the computation and the count."""
        parts = [f"{name} {_number(value)}" for name, value in self.facts.items()]
        if (speed := self.per_second) is not None:
            parts.append(f"{rounded(speed)} {self.speed}")
        if self.done >= self.total:
            parts.append(f"took {duration(self.seconds)}")
        elif (left := self.seconds_left) is not None:
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)


class Reporter:
    """Takes what a long computation reports; this one is silent."""

    def summary(self, event: str, title: str, lines: Mapping[str, str], **data: Any) -> None:
        """Facts before a computation, by name."""

    def waiting(self, text: str) -> None:
        """What takes long before there is more to show; for people at a terminal."""

    def note(self, event: str, text: str, **data: Any) -> None:
        """One sentence."""

    def result(self, event: str, text: str, **data: Any) -> None:
        """What a command was called for."""

    def track(self, what: str, total: int, *, speed: str) -> AbstractContextManager[Tracker]:
        """A tracker that is shown inside the `with` block."""
        return _just(Tracker(what, total, speed=speed))


SILENT = Reporter()


class Styled(str):
    """A result with colours, whose texts from data were made printable before they were coloured."""


@contextmanager
def _just(tracker: Tracker) -> Iterator[Tracker]:
    yield tracker


class TextReporter(Reporter):
    """For people: at a terminal, or in a log."""

    def __init__(self, stream: TextIO | None = None, *, clock: Clock = time.monotonic) -> None:
        from rich.console import Console

        self._clock = clock
        self._console = Console(file=stream or sys.stderr, highlight=False, markup=False, emoji=False)

    def summary(self, event: str, title: str, lines: Mapping[str, str], **data: Any) -> None:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in lines.items():
            table.add_row(f"  {name}", printable(text))
        print_to(self._console, printable(title), style="bold", soft_wrap=True)
        print_to(self._console, table)

    def waiting(self, text: str) -> None:
        if self._console.is_terminal:
            print_to(self._console, f"{printable(text)} …", soft_wrap=True)

    def note(self, event: str, text: str, **data: Any) -> None:
        print_to(self._console, printable(text))

    def result(self, event: str, text: str, **data: Any) -> None:
        print(text if isinstance(text, Styled) else printable(text), flush=True)

    @contextmanager
    def track(self, what: str, total: int, *, speed: str) -> Iterator[Tracker]:
        if not self._console.is_interactive:
            tracker = _LineTracker(what, total, speed=speed, clock=self._clock, write=self._progress)
            yield tracker
            tracker.finish()
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
        from rich.table import Column

        def text(template: str) -> ProgressColumn:
            return TextColumn(template, table_column=Column(no_wrap=True, overflow="ellipsis"))

        columns: tuple[ProgressColumn, ...] = (
            text("{task.description}"),
            BarColumn(None),
            MofNCompleteColumn(),
            text("{task.fields[text]}"),
        )
        if self._console.width < _NARROW:
            columns = (text("{task.description} {task.completed}/{task.total} · {task.fields[text]}"),)
        with Progress(*columns, console=self._console, auto_refresh=False, expand=True) as bar, _log_above():
            shown = _BarTracker(what, total, speed=speed, clock=self._clock, bar=bar)
            try:
                yield shown
            finally:
                shown.refresh()

    def _progress(self, tracker: Tracker) -> None:
        self._console.file.write(
            f"{tracker.what} {tracker.done}/{tracker.total} · {tracker.text()}".rstrip(" ·") + "\n"
        )
        self._console.file.flush()


@contextmanager
def _log_above() -> Iterator[None]:
    """Let log handlers that hold the original standard error write to rich's, which prints above a line of progress."""
    loggers = [logging.root, *map(logging.getLogger, logging.root.manager.loggerDict)]
    handlers = [h for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)]
    moved = [(h, h.setStream(sys.stderr)) for h in handlers if h.stream is sys.__stderr__]
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)


class _BarTracker(Tracker):
    """Shown as one line of a terminal."""

    def __init__(self, *arguments: Any, bar: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._bar, self._shown = bar, float("-inf")
        self._row = bar.add_task(self.what, total=self.total, text="")

    def changed(self, facts: Mapping[str, Any] | None = None) -> None:
        now = self._clock()
        if now - self._shown >= 0.2 or self.done >= self.total:
            self._shown = now
            self.refresh()

    def refresh(self) -> None:
        self._bar.update(self._row, completed=self.done, text=self.text(), refresh=True)


class _LineTracker(Tracker):
    """Shown as lines: every twentieth of the whole, but at most one in ten seconds and at least one in five minutes."""

    def __init__(
        self, *arguments: Any, write: Callable[[Tracker], None], every_fact: bool = False, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._write, self._every_fact = write, every_fact
        self._shown, self._share, self._last = self._begin, 0.0, 0

    def begin_at(self, done: int) -> None:
        super().begin_at(done)
        self._shown, self._share = self._begin, done / max(self.total, 1)

    def changed(self, facts: Mapping[str, Any] | None = None) -> None:
        waited, share = self._clock() - self._shown, self.done / max(self.total, 1)
        due = self.done < self.total and share > self._share and waited >= (10 if share - self._share >= 0.05 else 300)
        if due or (facts and self._every_fact):
            self._line(share)

    def finish(self) -> None:
        """The last line, unless it was written."""
        if self._last != self.done:
            self._line(1.0)

    def _line(self, share: float) -> None:
        self._shown, self._share, self._last = self._clock(), share, self.done
        self._write(self)


class JsonReporter(Reporter):
    """For programs: one object per line, with the kind of event first."""

    def __init__(self, stream: TextIO | None = None, *, clock: Clock = time.monotonic) -> None:
        self._stream, self._clock = stream, clock

    def _line(self, event: str, data: Mapping[str, Any]) -> None:
        stream = self._stream or sys.stdout
        stream.write(json_line({"event": event, **data}, stream) + "\n")
        stream.flush()

    def _progress(self, tracker: Tracker) -> None:
        left = None if tracker.done >= tracker.total else tracker.seconds_left
        speed = tracker.speed.removesuffix("/s") + "_per_second"
        event = {"done": tracker.done, "total": tracker.total, "seconds": tracker.seconds, **tracker.facts}
        self._line(tracker.what, {**event, speed: tracker.per_second, "seconds_left": left})

    def summary(self, event: str, title: str, lines: Mapping[str, str], **data: Any) -> None:
        self._line(event, data)

    def note(self, event: str, text: str, **data: Any) -> None:
        self._line(event, {"text": text, **data})

    def result(self, event: str, text: str, **data: Any) -> None:
        self._line(event, data)

    @contextmanager
    def track(self, what: str, total: int, *, speed: str) -> Iterator[Tracker]:
        tracker = _LineTracker(what, total, speed=speed, clock=self._clock, write=self._progress, every_fact=True)
        yield tracker
        tracker.finish()


def print_to(console: Console, content: Any, **options: Any) -> None:
    """`console.print` without the blanks that rich pads lines with."""
    with console.capture() as capture:
        console.print(content, **options)
    console.file.write("\n".join(line.rstrip(" ") for line in capture.get().split("\n")))
    console.file.flush()


# --- text -------------------------------------------------------------------------------------------------------------

_ASCII = {
    "–": "-",
    "—": "-",
    "−": "-",
    "…": "...",
    "·": "-",
    "×": "x",
    "÷": "/",
    "±": "+-",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "µ": "u",
    "μ": "u",
    "²": "2",
    "✓": "yes",
    "━": "-",
    "─": "-",
    "╸": "-",
    "╺": "-",
    "│": "|",
    "█": "#",
    "░": ".",
}


def _substitute(error: UnicodeError) -> tuple[str, int]:
    """Error handler of encodings: an ASCII form of our own symbols, an escape such as \\u4e2d for anything else."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


def tolerate_encodings() -> None:
    """Let standard output and error replace the characters that their encoding lacks."""
    codecs.register_error("dyads.substitute", _substitute)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "backslashreplace", "surrogateescape"):
            stream.reconfigure(errors="dyads.substitute")


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 – the name of logging
        return printable(super().getMessage())


def _warning(*arguments: Any, **options: Any) -> str:
    return printable(_format_warning(*arguments, **options))


_format_warning = warnings.formatwarning


def escape_logs() -> None:
    """Let log messages and warnings of every library be printable: they quote the files that a library reads."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _warning


def printable(text: str) -> str:
    """The text with control characters and marks of direction written as escapes, line breaks and tabs kept."""
    return visible(text, keep="\n\t")


def json_line(content: Mapping[str, Any], stream: TextIO | None = None) -> str:
    """One line of JSON, in ASCII where the stream is not UTF-8; numbers that are not finite become null."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    finite = json.loads(json.dumps(content, default=str), parse_constant=lambda name: None)
    return visible(json.dumps(finite, ensure_ascii=codecs.lookup(encoding).name != "utf-8"))


def duration(seconds: float) -> str:
    """0:42, 12:05, 3:04:05 or 2 days 3:04."""
    whole = round(seconds)
    minutes, left = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} day{'s' * (days > 1)} {hours}:{minutes:02}"
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def size(count: float) -> str:
    """A number of bytes in GB, or MB below one."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def rounded(value: float) -> str:
    """A number for reading: 1,234 or 12 or 1.2 or 0.012."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

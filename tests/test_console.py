# SPDX-License-Identifier: Apache-2.0
"""Output of commands: speed and time left, lines at intervals, JSON, other encodings, control characters."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from rich.console import Console

from dyads.console import (
    SILENT,
    JsonReporter,
    Styled,
    TextReporter,
    Tracker,
    duration,
    json_line,
    printable,
    rounded,
    size,
    tolerate_encodings,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


# --- speed and time left ----------------------------------------------------------------------------------------------


def test_speed_and_time_left_leave_out_the_warm_up(clock: Clock) -> None:
    tracker = Tracker("training", 10, speed="tokens/s", clock=clock)
    tracker.begin_at(0)
    assert (tracker.per_second, tracker.seconds_left) == (None, None)
    clock.now = 60.0  # the first step compiles and allocates
    tracker.update(1, 100)
    assert (tracker.per_second, tracker.seconds_left) == (pytest.approx(100 / 60), pytest.approx(540))
    for step in (2, 3):
        clock.now += 2.0
        tracker.update(step, 100)
    assert (tracker.per_second, tracker.seconds_left) == (pytest.approx(50), pytest.approx(14))
    tracker.show(loss=1.23456)
    assert tracker.text() == "loss 1.235 · 50 tokens/s · 0:14 left"


def test_speed_is_recent_and_a_resumed_computation_starts_its_clock(clock: Clock) -> None:
    clock.now = 5.0
    tracker = Tracker("training", 200, speed="steps/s", clock=clock)
    clock.now = 100.0
    tracker.begin_at(100)
    for step in range(101, 201):
        clock.now += 10.0 if step < 150 else 1.0
        tracker.advance()
    assert tracker.per_second == pytest.approx(1.0)
    assert tracker.seconds == pytest.approx(541)
    assert tracker.text() == "1.0 steps/s · took 9:01"


# --- for logs and programs --------------------------------------------------------------------------------------------


def run_steps(reporter: TextReporter | JsonReporter, clock: Clock, steps: int, seconds: float, every: int = 1) -> None:
    with reporter.track("training", steps, speed="tokens/s") as tracker:
        tracker.begin_at(0)
        for step in range(1, steps + 1):
            clock.now += seconds
            tracker.update(step, 10)
            if step % every == 0:
                tracker.show(loss=float(step))


@pytest.mark.parametrize(
    ("steps", "seconds", "lines"),
    [(40, 0.01, 1), (100, 1.0, 10), (100, 60.0, 20), (1000, 3600.0, 1000), (3, 0.0, 1)],
)
def test_a_log_gets_a_line_every_twentieth_but_neither_too_many_nor_too_few(
    steps: int, seconds: float, lines: int, clock: Clock
) -> None:
    stream = io.StringIO()
    run_steps(TextReporter(stream, clock=clock), clock, steps, seconds)
    written = stream.getvalue().splitlines()
    assert len(written) == lines
    assert written[-1].startswith(f"training {steps}/{steps} · loss {steps}")
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_a_broken_off_computation_has_no_last_line(clock: Clock) -> None:
    stream = io.StringIO()
    reporter = TextReporter(stream, clock=clock)
    with suppress(KeyboardInterrupt), reporter.track("training", 9, speed="tokens/s") as tracker:
        tracker.update(1)
        raise KeyboardInterrupt
    assert stream.getvalue() == ""


def test_json_has_an_event_for_every_fact_and_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    reporter = JsonReporter(stream, clock=clock)
    reporter.summary("start", "title", {"model": "text"}, model="m", steps=4)
    run_steps(reporter, clock, 4, 1.0, every=2)
    run_steps(reporter, clock, 3, 1.0, every=2)
    reporter.note("note", "a note")
    reporter.result("scored", "text", micro=float("nan"))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert events[0] == {"event": "start", "model": "m", "steps": 4}
    assert [(e["event"], e["done"], e["loss"]) for e in events[1:5]] == [
        ("training", 2, 2.0),
        ("training", 4, 4.0),
        ("training", 2, 2.0),
        ("training", 3, 2.0),
    ]
    assert events[1] == {
        "event": "training",
        "done": 2,
        "total": 4,
        "seconds": 2.0,
        "loss": 2.0,
        "tokens_per_second": 10.0,
        "seconds_left": 2.0,
    }
    assert events[2]["seconds_left"] is None
    assert events[5:] == [{"event": "note", "text": "a note"}, {"event": "scored", "micro": None}]


def test_the_silent_reporter_counts_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    SILENT.summary("start", "title", {"model": "m"})
    SILENT.note("note", "text")
    SILENT.result("scored", "text")
    with SILENT.track("training", 2, speed="tokens/s") as tracker:
        tracker.update(1)
        tracker.show(loss=1.0)
        assert tracker.done == 1
    assert capfd.readouterr() == ("", "")


# --- for people -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_gets_one_line_within_its_width(width: int, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    reporter = TextReporter(stream, clock=clock)
    monkeypatch.setattr(
        reporter,
        "_console",
        Console(file=stream, force_terminal=True, force_interactive=True, width=width, color_system=None),
    )
    clock.now = 1e6
    run_steps(reporter, clock, 123_456 // 1000, 1000.0)
    shown = [part for line in stream.getvalue().split("\n") for part in line.split("\r")]
    drawn = [part.replace("\x1b[2K", "").replace("\x1b[?25l", "").replace("\x1b[?25h", "") for part in shown]
    bars = [line for line in drawn if line.startswith("training")]
    assert len(bars) > 100
    assert stream.getvalue().count("\n") <= 2, "the line is rewritten, not repeated"
    assert max(map(len, drawn)) <= width
    if width >= 80:
        assert "123/123" in bars[-1]
        assert "loss 123" in bars[-1]
        assert "took 1 day 10:10" in bars[-1]


def test_a_summary_wraps_below_its_own_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    TextReporter(stream).summary(
        "start", "name", {"model": "m", "method": "mode (" + ", ".join(f"option{i}={i}" for i in range(9)) + ")"}
    )
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["name", "  model   m"]
    assert all(line.startswith(" " * 10) for line in lines[3:])
    assert max(map(len, lines)) <= 60
    assert not any(line.endswith(" ") for line in lines)
    assert "[bold]" in _written(lambda r: r.note("note", "a [bold] :smile: note"))


def test_what_takes_long_is_printed_at_a_terminal_alone() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    TextReporter(terminal).waiting("reading a\x1b[2J")
    assert terminal.getvalue() == "reading a\\u001b[2J …\n"
    assert not _written(lambda r: r.waiting("reading"))


def _written(report: Callable[[TextReporter], Any]) -> str:
    stream = io.StringIO()
    report(TextReporter(stream))
    return stream.getvalue()


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (0.4, 42, 725, 11045, 90000, 180000)] == [
        "0:00",
        "0:42",
        "12:05",
        "3:04:05",
        "1 day 1:00",
        "2 days 2:00",
    ]
    assert [size(n) for n in (541_000_000, 1.94e9)] == ["541 MB", "1.9 GB"]
    assert [rounded(x) for x in (12345.6, 12.3, 1.26, 0.0123)] == ["12,346", "12", "1.3", "0.012"]


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("cp1252", "1 × 2 – 3 - 4 -> 5 <= 6 … \\u4e2d \\U0001f600 é ---"),
        ("cp437", "1 x 2 - 3 - 4 -> 5 ≤ 6 ... \\u4e2d \\U0001f600 é ---"),
        ("ascii", "1 x 2 - 3 - 4 -> 5 <= 6 ... \\u4e2d \\U0001f600 \\xe9 ---"),
        ("utf-8", "1 × 2 – 3 − 4 → 5 ≤ 6 … 中 😀 é ━━━"),
    ],
)
def test_an_encoding_without_our_characters_gets_others(
    encoding: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    tolerate_encodings()
    sys.stdout.write("1 × 2 – 3 − 4 → 5 ≤ 6 … 中 😀 é ━━━")
    assert raw.getvalue().decode(encoding) == expected


def test_json_stays_json_in_any_encoding() -> None:
    text = json_line({"prediction": "中 😀"}, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert text.isascii()
    assert json.loads(text) == {"prediction": "中 😀"}
    assert json_line({"a": "中"}, io.TextIOWrapper(io.BytesIO(), encoding="utf8")) == '{"a": "中"}'


def test_control_characters_are_made_visible() -> None:
    assert printable("a\tb\nc \x1b[31mred\x07 \u202egnp.exe\r \x9b \ud800") == (
        "a\tb\nc \\u001b[31mred\\u0007 \\u202egnp.exe\\u000d \\u009b \\ud800"
    )
    assert printable("naïve 中 👩\u200d🔬 می\u200cخواهم") == "naïve 中 👩\u200d🔬 می\u200cخواهم"


def test_logs_and_warnings_of_libraries_are_printable() -> None:
    code = (
        "import logging, warnings; from dyads.console import escape_logs; escape_logs(); escape_logs();"
        "logging.getLogger('transformers').warning('type %s', '\\x1b[2J'); warnings.warn('\\u202ea\\nb')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "type \\u001b[2J" in done.stderr
    assert "UserWarning: \\u202ea\nb" in done.stderr
    assert "\x1b" not in done.stderr


def test_a_result_with_colours_keeps_them_and_no_other_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    TextReporter().result("studied", Styled("\x1b[1mbold\x1b[0m"))
    TextReporter().result("scored", "\x1b[1mhostile")
    assert capsys.readouterr().out == "\x1b[1mbold\x1b[0m\n\\u001b[1mhostile\n"

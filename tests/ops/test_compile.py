# SPDX-License-Identifier: Apache-2.0
"""Is C compiled once for a processor, and anew whenever something else would come of it?"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from dyads.ops.compile import compile_c

from dyads.ops import cache_folder

of_compile: Any = import_module("dyads.ops.compile")

needs_a_compiler = pytest.mark.skipif(sys.platform == "win32" or not shutil.which("cc"), reason="no C compiler here")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source, a cache, and a compiler that notes down every call; their folder."""
    (tmp_path / "answer.c").write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    program = tmp_path / "cc"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec cc "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("CC", str(program))
    monkeypatch.setenv("DYADS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def answer(place: Path) -> int:
    found = next(compile_c(place / "answer.c", place / "answer.h"))
    result: int = found.functions.answer()
    return result


def calls(place: Path) -> int:
    """How often something was compiled or linked."""
    noted = place / "calls"
    told = noted.read_text().splitlines() if noted.exists() else []
    return sum("--version" not in one for one in told)


def kept(place: Path) -> list[Path]:
    return sorted((place / "cache").rglob("*"))


def test_the_cache_has_a_place_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYADS_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "dyads"


@needs_a_compiler
def test_what_was_compiled_once_is_found_again_also_by_another_process(place: Path) -> None:
    assert answer(place) == 42
    assert calls(place) == 2
    assert [path.suffix for path in kept(place) if path.is_file()] == [".so"], "and nothing half done lies beside it"
    code = (
        "import sys; from pathlib import Path; from dyads.ops.compile import compile_c;"
        " print(next(compile_c(*map(Path, sys.argv[1:]))).functions.answer())"
    )
    for _ in range(2):
        files = [str(place / "answer.c"), str(place / "answer.h")]
        done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
        assert done.stdout == "42\n"
    assert calls(place) == 2


@needs_a_compiler
@pytest.mark.parametrize("change", ["source", "what it includes", "compiler", "flags", "processor"])
def test_another_cause_is_compiled_anew(place: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(place) == 42
    if change == "source":
        (place / "answer.c").write_text("int answer(void) { return 43; }\n")
    elif change == "what it includes":
        (place / "answer.h").write_text("#define ANSWER 43\n")
    elif change == "compiler":
        script = (place / "cc").read_text()
        (place / "cc").write_text(script.replace("exec", "test $1 = --version && echo another one && exit\nexec"))
    elif change == "flags":
        monkeypatch.setenv("CC", f"{place / 'cc'} -DNOTHING")
    else:
        monkeypatch.setattr(of_compile, "_processor", lambda: "another one")
    assert answer(place) == (43 if change in ("source", "what it includes") else 42)
    assert calls(place) == 4
    assert len([path for path in kept(place) if path.is_file()]) == 2


@needs_a_compiler
def test_half_of_a_library_is_compiled_anew(place: Path) -> None:
    assert answer(place) == 42
    (library,) = (path for path in kept(place) if path.is_file())
    library.unlink()
    library.write_bytes(b"\x7fELF")
    assert answer(place) == 42
    assert calls(place) == 4
    assert library.stat().st_size > 1000, "and stands in its place"


@needs_a_compiler
def test_what_another_user_left_is_not_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(place) == 42
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert answer(place) == 42
    assert calls(place) == 4


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


@needs_a_compiler
@pytest.mark.parametrize("why", ["no folder", "full", "no home", "an unknown processor"])
def test_without_a_place_to_keep_it_it_is_compiled_every_time(
    place: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "no folder":
        (place / "cache").write_text("not a folder")
    elif why == "full":
        monkeypatch.setattr(shutil, "copyfile", raising(OSError(28, "No space left on device")))
    elif why == "no home":
        monkeypatch.delenv("DYADS_CACHE")
        monkeypatch.setattr(Path, "home", raising(RuntimeError("Could not determine home directory.")))
    else:
        monkeypatch.setattr(of_compile, "_processor", lambda: None)
    for times in (1, 2):
        assert answer(place) == 42
        assert calls(place) == 2 * times


@needs_a_compiler
def test_what_does_not_load_is_compiled_once(place: Path) -> None:
    (place / "answer.c").write_text("int missing(void);\nint answer(void) { return missing(); }\n")
    now = '#!/bin/sh\necho "$@" >> {0}/calls\nexec cc -Wl,-z,now "$@"\n'
    (place / "cc").write_text(now.format(place))
    for _ in range(2):
        assert list(compile_c(place / "answer.c", place / "answer.h")) == []
        assert calls(place) == 6, "two commands for each of three sets of flags, in the first of two attempts"


@needs_a_compiler
def test_where_nothing_may_be_run_from_a_temporary_folder_the_cache_serves(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ctypes.CDLL

    def loads(name: str) -> ctypes.CDLL:
        if not name.startswith(str(place / "cache")):
            raise OSError("failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", loads)
    for _ in range(2):
        assert answer(place) == 42
        assert calls(place) == 2


@needs_a_compiler
def test_a_compiler_that_is_slow_gives_nothing_and_not_something_else(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_compile, "_PATIENCE", 0.5)
    (place / "cc").write_text('#!/bin/sh\ntest "$1" = --version && exit\necho "$@" >> calls\nexec sleep 9\n')
    monkeypatch.chdir(place)
    assert list(compile_c(place / "answer.c", place / "answer.h")) == []
    assert calls(place) == 1


@needs_a_compiler
def test_flags_that_a_compiler_refuses_are_left_out(place: Path) -> None:
    script = '#!/bin/sh\nfor flag; do case $flag in -fopenmp|-m*) echo no >&2; exit 1;; esac; done\nexec cc "$@"\n'
    (place / "cc").write_text(script)
    found = next(compile_c(place / "answer.c", place / "answer.h"))
    assert found.flags == ()
    assert found.functions.answer() == 42


@pytest.mark.parametrize("command", ["/no/such/program", "cc -D'", "false"])
def test_without_a_compiler_nothing_comes_and_the_reason_is_logged(
    place: Path, command: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", command)
    with caplog.at_level(logging.DEBUG, "dyads.ops.compile"):
        assert list(compile_c(place / "answer.c", place / "answer.h")) == []
    assert ("answer.c with" in caplog.text) == (command == "false")
    assert not any(path.is_file() for path in kept(place))

# SPDX-License-Identifier: Apache-2.0
"""How does C become functions, where a compiler is at hand?

GCC or Clang (`cc`, or what `$CC` names) compiles for the processor that is there; that takes one or two seconds, and
what comes out is kept in the cache folder, under a name made of everything that it depends on. Where the folder cannot
be written to, it is compiled in every process. Why it failed is logged at level DEBUG.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Library", "cache_folder", "compile_c"]

# GCC knows -march=native on x86 only, and -mcpu=native elsewhere.
_NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
# One attempt after the other: all threads, one, whatever processor.
_FLAGS = ((_NATIVE, "-fopenmp"), (_NATIVE,), ())
_ALWAYS = ("-std=gnu11", "-O3", "-fPIC")
_LOG = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder for what takes long to make and can be made again: $DYADS_CACHE, else ~/.cache/dyads."""
    return Path(os.environ.get("DYADS_CACHE") or Path.home() / ".cache" / "dyads")


class Library(NamedTuple):
    """Compiled functions, and how they came about."""

    functions: ctypes.CDLL
    compiler: list[str]
    flags: tuple[str, ...]


def compile_c(*sources: Path) -> Iterator[Library]:
    """What comes of a file, which includes the others: with all flags, then with fewer, where anything comes at all."""
    compiler = [] if sys.platform == "win32" else _compiler()
    for flags in _FLAGS if compiler else ():
        found = _attempt(sources, compiler, flags)
        if found is not None:
            yield Library(found, compiler, flags)


def _attempt(sources: tuple[Path, ...], compiler: list[str], flags: tuple[str, ...]) -> ctypes.CDLL | None:
    try:
        return _library(sources, compiler, flags)
    except subprocess.CalledProcessError as failed:
        _LOG.debug("%s with %s: %s", sources[0].name, flags, failed.stderr)
    except (OSError, subprocess.TimeoutExpired) as failed:
        _LOG.debug("%s with %s: %s", sources[0].name, flags, failed)
    return None


def _compiler() -> list[str]:
    """The command in $CC, else cc; empty where there is none."""
    try:
        command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError:  # a quotation without an end
        return []
    return command if shutil.which(command[0]) else []


def _library(sources: tuple[Path, ...], compiler: list[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    kept = cache_folder() / "compiled" / f"{sources[0].stem}-{_key(sources, compiler, flags)}.so"
    try:
        if kept.is_file() and kept.stat().st_uid == os.getuid():
            return ctypes.CDLL(str(kept))
    except OSError as failed:  # half of a file, or not ours to read
        _LOG.debug("%s: %s", kept, failed)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, ignore_cleanup_errors=True) as folder:
            made = _compiled(sources[0], compiler, flags, folder)
            library = ctypes.CDLL(made)
            os.replace(made, kept)  # in one step: another process finds all of it or nothing
            return library
    except OSError as failed:
        _LOG.debug("%s: %s", kept.parent, failed)
    with tempfile.TemporaryDirectory(prefix="dyads-", ignore_cleanup_errors=True) as folder:
        return ctypes.CDLL(_compiled(sources[0], compiler, flags, folder))


def _compiled(source: Path, compiler: list[str], flags: tuple[str, ...], folder: str) -> str:
    """The library's file. It is linked without OpenMP's own: PyTorch has loaded one, and two would fight over cores."""
    parts = [f"{folder}/{source.stem}.o", f"{folder}/{source.stem}.so"]
    for arguments in ([*_ALWAYS, *flags, "-c", str(source), "-o", parts[0]], ["-shared", parts[0], "-o", parts[1]]):
        command = [*compiler, *arguments]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=20)
    return parts[1]


def _key(sources: tuple[Path, ...], compiler: list[str], flags: tuple[str, ...]) -> str:
    """A name for all that the result depends on: a home may be shared by machines with different processors."""
    program = shutil.which(compiler[0]) or compiler[0]
    found = os.stat(program)
    about = [*compiler, *_ALWAYS, *flags, os.path.realpath(program), found.st_mtime_ns, found.st_size, _processor()]
    made_of = [repr(about).encode(), *(source.read_bytes() for source in sources)]
    return hashlib.sha256(b"\0".join(made_of)).hexdigest()[:20]


def _processor() -> str:
    """What `native` stands for here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(sorted(line for line in lines if line.startswith(("model", "flags", "Features", "CPU "))))

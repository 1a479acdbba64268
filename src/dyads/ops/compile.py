# SPDX-License-Identifier: Apache-2.0
"""How does C become functions, where a compiler is at hand?

GCC or Clang (`cc`, or what `$CC` names) compiles for the processor that is there. That takes one or two seconds, on
processors without AVX-512 ten and more, and what comes out is kept in the cache folder, under a name made of everything
that it depends on. Where the folder cannot be used it is compiled in every process. Why it failed is logged at level
DEBUG.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
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
_PATIENCE = 180  # seconds, for a busy machine
_LOG = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder for what takes long to make and can be made again: $DYADS_CACHE, else ~/.cache/dyads."""
    return Path(os.environ.get("DYADS_CACHE") or Path.home() / ".cache" / "dyads").expanduser()


class Library(NamedTuple):
    """Compiled functions, and how they came about."""

    functions: ctypes.CDLL
    compiler: list[str]
    flags: tuple[str, ...]


def compile_c(*sources: Path) -> Iterator[Library]:
    """What comes of a file, which includes the others: with all flags, then with fewer, where anything comes at all."""
    compiler = [] if sys.platform == "win32" else _compiler()
    for flags in _FLAGS if compiler else ():
        try:
            found = _attempt(sources, compiler, flags)
        except subprocess.TimeoutExpired as slow:
            # Other flags would give other bits, and another process might be in time.
            _LOG.debug("%s with %s: %s", sources[0].name, flags, slow)
            return
        if found is not None:
            yield Library(found, compiler, flags)


def _attempt(sources: tuple[Path, ...], compiler: list[str], flags: tuple[str, ...]) -> ctypes.CDLL | None:
    try:
        return _library(sources, compiler, flags)
    except subprocess.CalledProcessError as failed:
        _LOG.debug("%s with %s: %s", sources[0].name, flags, failed.stderr)
    except OSError as failed:
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
    kept = _place(sources, compiler, flags)
    if kept is not None and os.path.lexists(kept):
        if not _is_ours(kept):
            kept = None
        elif kept.stat().st_size == 0:
            raise OSError(f"{kept}: it was compiled before and did not load")
        else:
            try:
                return ctypes.CDLL(str(kept))
            except OSError as failed:  # half of a file
                _LOG.debug("%s: %s", kept, failed)
    with tempfile.TemporaryDirectory(prefix="dyads-", ignore_cleanup_errors=True) as folder:
        made = _compiled(sources[0], compiler, flags, folder)
        _keep(made, kept)
        try:
            return ctypes.CDLL(made)
        except OSError as failed:
            _LOG.debug("%s: %s", made, failed)
        try:
            return ctypes.CDLL(str(kept))  # nothing may be run from a temporary folder here
        except OSError:
            _keep(None, kept)
            raise


def _is_ours(kept: Path) -> bool:
    """Whether nobody else can have written it."""
    found = kept.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _place(sources: tuple[Path, ...], compiler: list[str], flags: tuple[str, ...]) -> Path | None:
    """Where the library is kept; None where there is no such place, or one for several kinds of processors."""
    processor = _processor()
    if processor is None:
        return None
    try:
        key = _key(sources, compiler, flags, processor)
        return cache_folder() / "compiled" / f"{sources[0].stem}-{key}.so"
    except (OSError, RuntimeError, subprocess.SubprocessError) as failed:  # no home, or a compiler that tells nothing
        _LOG.debug("the cache: %s", failed)
        return None


def _keep(made: str | None, kept: Path | None) -> None:
    """Put a library, or that there is none, where it will be found: all of it or nothing, as far as it can be done."""
    if kept is None:
        return
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        copy = kept.with_name(f"{kept.name}.{os.getpid()}")
        try:
            if made is None:
                copy.touch()
            else:
                shutil.copyfile(made, copy)
            copy.chmod(0o700)
            os.replace(copy, kept)
        finally:
            copy.unlink(missing_ok=True)
    except OSError as failed:
        _LOG.debug("%s: %s", kept, failed)


def _compiled(source: Path, compiler: list[str], flags: tuple[str, ...], folder: str) -> str:
    """The library's file. It is linked without OpenMP's own: PyTorch has loaded one, and two would fight over cores."""
    parts = [f"{folder}/{source.stem}.o", f"{folder}/{source.stem}.so"]
    for arguments in ([*_ALWAYS, *flags, "-c", str(source), "-o", parts[0]], ["-shared", parts[0], "-o", parts[1]]):
        _run([*compiler, *arguments])
    return parts[1]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=_PATIENCE,
    )


def _key(sources: tuple[Path, ...], compiler: list[str], flags: tuple[str, ...], processor: str) -> str:
    """A name for all that the result depends on: a home may be shared by machines with different processors."""
    version = _run([*compiler, "--version"]).stdout
    about = [*compiler, *_ALWAYS, *flags, version, processor, platform.system(), *platform.libc_ver()]
    made_of = [repr(about).encode(), *(source.read_bytes() for source in sources)]
    return hashlib.sha256(b"\0".join(made_of)).hexdigest()[:20]


def _processor() -> str | None:
    """What `native` stands for here; None where that cannot be known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return None
    told = sorted(line for line in lines if line.startswith(("model", "flags", "Features", "CPU ")))
    return "\n".join([platform.machine(), *told]) if any("eatures" in one or "flags" in one for one in told) else None

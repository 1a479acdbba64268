# SPDX-License-Identifier: Apache-2.0
"""Manifest: the file that makes a config, a checkpoint, an adapter, scores or an export complete.

    {"schema": 1, "files": {"adapter_model.safetensors": {"size": 4096, "sha256": "…"}, …}}

`manifest.json` lists the sizes and SHA-256 of files in its folder. It is written last, to another name, and renamed
into place. So a process that is killed leaves either a complete thing, or files that no manifest lists, which the next
process clears away. What a manifest lists is checked before it is read.

Files are written as `.NAME.unfinished` and renamed, folders likewise. README.md is for people and is not listed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dyads.errors import RunError, shortened, visible
from dyads.reading import SETTINGS, read_json
from dyads.runs.lock import LOCK, LockedError, locked

__all__ = [
    "MANIFEST",
    "Manifest",
    "clear",
    "discard",
    "is_unfinished",
    "not_through_links",
    "remove",
    "seal",
    "sync_folder",
    "unfinished",
    "write_output",
    "write_text",
    "writing",
]

MANIFEST = "manifest.json"
_SCHEMA = 1
_UNFINISHED = ".unfinished"
_FULL = 2**20
"""Free bytes below which a failed write is due to a full disk."""
_UNLISTED = {MANIFEST, "README.md", LOCK}


@dataclass(frozen=True)
class Manifest:
    """The files that a folder's manifest lists, by their paths from the folder, with size and SHA-256."""

    folder: Path
    files: dict[str, tuple[int, str]]

    @classmethod
    def of(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder, None without one; RunError if it is damaged."""
        path = folder / MANIFEST
        again = f"restore it, or accept the files as they are with `python -m dyads.runs.accept {folder}`"
        try:
            content = read_json(path, error=RunError, remedy=again, most=SETTINGS)
        except (FileNotFoundError, NotADirectoryError):
            return None
        listed = content.get("files") if isinstance(content, dict) and content.get("schema") == _SCHEMA else None
        if not isinstance(listed, dict):
            raise RunError(f"'{path}' is no manifest of this version of dyads; {again}")
        files = {}
        for name, entry in listed.items():
            if not (isinstance(entry, dict) and _is_size(entry.get("size")) and isinstance(entry.get("sha256"), str)):
                raise RunError(f"'{path}' is damaged: its entry '{shortened(name)}' has no size and SHA-256; {again}")
            if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
                raise RunError(f"'{path}' is damaged: '{shortened(name)}' is no file in its folder; {again}")
            files[name] = (entry["size"], entry["sha256"])
        return cls(folder, files)

    def without(self, *names: str) -> Manifest:
        """The manifest without some files, or without all in a folder (`predictions/`)."""
        return Manifest(self.folder, {n: entry for n, entry in self.files.items() if not n.startswith(names)})

    def damage(self, names: Iterable[str] | None = None, *, exact: bool = False) -> str | None:
        """The first file that is missing or differs from the manifest, in words; None if there is none.

        `names` limits the check to some files. With `exact`, a file that the manifest does not list counts too.
        """
        for name in self.files if names is None else names:
            if name not in self.files:
                return f"{shortened(name)} is not listed in {MANIFEST}"
            size, digest = self.files[name]
            path = self.folder / name
            if not path.is_file():
                return f"{shortened(name)} is missing"
            if path.stat().st_size != size:
                return f"{shortened(name)} has {path.stat().st_size:,} bytes, not {size:,}"
            if _sha256(path) != digest:
                return f"the SHA-256 of {shortened(name)} is not that of {MANIFEST}"
        if exact and (extra := sorted(set(_names(self.folder)) - self.files.keys())):
            return f"{shortened(extra[0])} is not listed in {MANIFEST}"
        return None


def seal(folder: Path, names: Iterable[str] | None = None, *, listed: Manifest | None = None) -> Manifest:
    """Write the manifest of a folder: of all its files, or of some; their content reaches the disk before.

    The entries of `listed` are taken over unchecked.
    """
    files = dict(listed.files) if listed is not None else {}
    for name in sorted(_names(folder) if names is None else names):
        path = folder / name
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        files[name] = (path.stat().st_size, _sha256(path))
    for parent in sorted({(folder / name).parent for name in files} - {folder}):
        sync_folder(parent)
    entries = {name: {"size": size, "sha256": digest} for name, (size, digest) in files.items()}
    text = json.dumps({"schema": _SCHEMA, "files": entries}, ensure_ascii=False, indent=1)
    write_text(folder / MANIFEST, text + "\n")
    return Manifest(folder, files)


def not_through_links(path: str, flags: int) -> int:
    """An opener for files to write: OSError for a symbolic link, which in a foreign folder may point anywhere."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_text(path: Path, text: str) -> None:
    """Write a file under another name and rename it when its content has reached the disk."""
    temporary = path.with_name(f".{path.name}{_UNFINISHED}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n", opener=not_through_links) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_output(out: Path, text: str) -> None:
    """Write a file that the user of a command named: whole or not at all, a device or pipe as it is."""
    if out.exists() and not out.is_file():
        out.write_text(text, encoding="utf-8")
    else:
        write_text(out.resolve(), text)


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Errors of the writers of tensors, which are no OSError, become a RunError that names the file or folder."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        with suppress(OSError):
            if shutil.disk_usage(what.parent).free < _FULL:
                reason = "no space left on device"
        raise RunError(f"cannot write '{what}': {shortened(reason)}") from error


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which is renamed to it when the block ends, and removed when it fails.

    What a killed process left in its place is removed. RunError where `out` is not empty, unless it holds the same: the
    process was killed when it had finished, and was started again.
    """
    out = Path(os.path.abspath(out))
    partial = out.with_name(f".{out.name}{_UNFINISHED}")
    try:
        with locked(partial):
            for left in [path for path in partial.iterdir() if path.name != LOCK]:
                discard(left)
            yield partial
        (partial / LOCK).unlink(missing_ok=True)
        if out.is_dir() and any(out.iterdir()):
            if not _same(partial, out):
                raise RunError(f"'{out}' is not empty; choose another --out")
            shutil.rmtree(partial)
            return
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except LockedError:
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(out.parent)


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same complete things."""
    places = [{path.relative_to(folder) for path in folder.rglob(MANIFEST)} for folder in (one, other)]
    if places[0] != places[1] or {p.name for p in one.iterdir()} != {p.name for p in other.iterdir()}:
        return False
    for place in places[0]:
        manifest = Manifest.of((other / place).parent)
        if (other / place).read_bytes() != (one / place).read_bytes() or manifest is None or manifest.damage():
            return False
    return True


def remove(folder: Path) -> None:
    """Remove a folder, its manifest first: a process killed in between leaves no complete thing."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def is_unfinished(path: Path) -> bool:
    """Whether a file or folder has the name of one that is being written."""
    return path.name.startswith(".") and path.name.endswith(_UNFINISHED)


def clear(folder: Path) -> list[str]:
    """Remove what a killed process was writing in a folder; returns the names."""
    left = sorted(path for path in folder.iterdir() if is_unfinished(path))
    for path in left:
        discard(path)
    return [visible(path.name) for path in left]


def discard(path: Path) -> None:
    """Remove a file, a symbolic link, or a folder with all that is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if (path.is_file() or path.is_symlink()) and path.name not in _UNLISTED:
            yield path.relative_to(folder).as_posix()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure, where the system can open folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)

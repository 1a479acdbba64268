# SPDX-License-Identifier: Apache-2.0
"""Environment of a measurement: the commit, the processor and the versions that its numbers depend on."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.rounds import ROOT

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")
READERS = ("page.py", "bars.py")
"""Files of the benchmark that only read results: a change there leaves results valid."""
MEASURED = ("src/dyads", "benchmarks", *(f":(exclude)benchmarks/{name}" for name in READERS))
"""What git is queried for: the code that is measured and that measures."""


def environment() -> dict[str, Any]:
    """Date, versions, processor, cores and load. No names of machines or people."""
    import dyads

    installed = {name: metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {"dyads": dyads.__version__, **installed},
        "commit": commit(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def machine(environment: dict[str, Any]) -> str:
    """Processor and versions in words."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{environment['cpu']} ({environment['cores']} cores), Python {environment['python']}, {versions}"


def commit() -> str:
    """The last commit that changed the measured code, followed by a hash of that code where it has uncommitted changes.

    Commits that touch other files, such as documents, leave it alone.
    """
    found, changes = _git("log", "-1", "--format=%h", "--", *MEASURED), _git("status", "--porcelain", "--", *MEASURED)
    if found is None or found == "":
        return source()
    return f"{found}-{source()}" if changes else found


def is_committed() -> bool:
    """Whether the measured code is that of a commit."""
    return _git("status", "--porcelain", "--", *MEASURED) == ""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source() -> str:
    """A short hash of the measured code."""
    digest = hashlib.sha256()
    for folder in (ROOT / "src" / "dyads", ROOT / "benchmarks"):
        for path in sorted(folder.rglob("*.py")):
            if path.name not in READERS:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cpu() -> str:
    """The processor's name and the instructions that speed up bf16 or wide fp32."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        pairs = [line.partition(":") for line in info.read_text().splitlines()]
        facts = {key.strip(): value.strip() for key, _, value in pairs}
        flags = set(facts.get("flags", "").split())
        special = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags]
        name = facts.get("model name", platform.machine())
        return f"{name} ({', '.join(special)})" if special else name
    return platform.processor() or platform.machine()

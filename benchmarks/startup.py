# SPDX-License-Identifier: Apache-2.0
"""Start-up: seconds of `dyads --help` and `import dyads`, and the heavy modules that they load."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from benchmarks.rounds import child_environment

HEAVY = ("datasets", "matplotlib", "trl", "pandas")
COMMANDS = {
    "help": [sys.executable, "-m", "dyads.cli", "--help"],
    "import": [sys.executable, "-c", "import dyads"],
}
LABELS = {"help": "dyads --help", "import": "import dyads"}


def measure(rounds: int) -> dict[str, Any]:
    """{facts, rounds, errors}: wall time of fresh processes after a warm-up, and the heavy modules they load."""
    results: list[dict[str, dict[str, float]]] = []
    for _ in range(rounds + 1):
        answers: dict[str, float] = {}
        for name, command in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=child_environment(1))
            answers[name] = time.perf_counter() - begin
        results.append({"seconds": answers})
    code = (
        "import sys, contextlib, io, dyads\n"
        "from dyads.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['--help'], standalone_mode=False)\n"
        f"print(len({set(HEAVY)!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=child_environment(1)
    )
    facts: dict[str, Any] = {name: {"label": label} for name, label in LABELS.items()}
    facts["import"]["heavy"] = int(done.stdout)
    return {"facts": facts, "rounds": results[1:], "errors": {}}

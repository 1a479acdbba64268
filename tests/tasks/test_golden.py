# SPDX-License-Identifier: Apache-2.0
"""Is every prompt, to the character, what it was when its version was set?

A change here means: raise the task's `version`, then write the files anew with `DYADS_GOLDEN=write pytest tests/tasks`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dyads.tasks import load
from dyads.tasks.starter import STARTER_TASKS

GOLDEN = Path(__file__).parent / "golden"


def check(name, tasks, split="test"):
    lines = [
        {
            "task": t.name,
            "version": t.version,
            "id": e.id,
            "prompt": e.prompt,
            "references": list(e.references),
            "shorter": list(e.shorter),
        }
        for t in tasks
        for e in t.split(split)[:2]
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path = GOLDEN / f"{name}.jsonl"
    if os.environ.get("DYADS_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", STARTER_TASKS)
def test_starter_prompts_are_unchanged(name):
    check(f"starter_{name}", load({"family": "starter", "names": [name]}))


@pytest.mark.parametrize("protocol", ["mode", "official"])
def test_sni_prompts_are_unchanged(protocol, sni_folder):
    check(f"sni_{protocol}", load({"family": "sni", "path": sni_folder, "protocol": protocol}))


def test_prompts_of_files_are_unchanged(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [
        {
            "task": "capital",
            "input": "France",
            "output": ["Paris", "paris"],
            "split": "test",
            "instruction": "Capital?",
        },
        {"task": "capital", "input": "Chad", "output": "N'Djamena", "split": "test"},
        {"task": "capital", "input": "Peru", "output": "Lima", "split": "train"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    check("files", load({"family": "files", "path": path}))

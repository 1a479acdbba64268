# SPDX-License-Identifier: Apache-2.0
"""Is every prompt, to the character, what it was when its version was set?

A change here means: raise the task's `version`, then write the files anew with `DYADS_GOLDEN=write pytest tests/tasks`.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dyads.tasks import load
from dyads.tasks.commonsense import COMMONSENSE_TASKS
from dyads.tasks.glue import GLUE_TASKS
from dyads.tasks.starter import STARTER_TASKS
from dyads.tasks.superglue import SUPERGLUE_TASKS

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
            **{key: list(value) for key in ("segments", "choices") if (value := getattr(e, key))},
        }
        for t in tasks
        for e in t.split(split)[:2]
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path = GOLDEN / f"{name}.jsonl"
    if os.environ.get("DYADS_GOLDEN") == "write":
        for old in map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else []):
            for new in lines:
                same = old["task"] == new["task"] and old["id"] == new["id"] and old["version"] == new["version"]
                assert not same or old.items() <= new.items(), f"{old['task']} changed: raise its version"
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", STARTER_TASKS)
def test_starter_prompts_are_unchanged(name):
    check(f"starter_{name}", load({"family": "starter", "names": [name]}))


@pytest.mark.parametrize("protocol", ["mode", "official"])
def test_sni_prompts_are_unchanged(protocol, sni_folder):
    check(f"sni_{protocol}", load({"family": "sni", "path": sni_folder, "protocol": protocol}))


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_glue_prompts_are_unchanged(name, glue_folder):
    check(f"glue_{name}", load({"family": "glue", "path": glue_folder, "names": [name]}))


@pytest.mark.parametrize("name", SUPERGLUE_TASKS)
def test_superglue_prompts_are_unchanged(name, superglue_folder):
    check(f"superglue_{name}", load({"family": "superglue", "path": superglue_folder, "names": [name]}))


@pytest.mark.parametrize("name", COMMONSENSE_TASKS)
def test_commonsense_prompts_are_unchanged(name, commonsense_folder):
    spec = {"family": "commonsense", "path": commonsense_folder, "names": [name], "split_dev": 0}
    check(f"commonsense_{name}", load(spec))


def test_the_scitail_prompt_is_unchanged(scitail_folder):
    check("scitail", load({"family": "scitail", "path": scitail_folder}))


def test_a_changed_prompt_is_not_written_without_a_new_version(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "GOLDEN", tmp_path)
    tasks = load({"family": "starter", "names": ["initials"]})
    monkeypatch.setenv("DYADS_GOLDEN", "write")
    check("x", tasks)
    monkeypatch.delenv("DYADS_GOLDEN")
    first = replace(tasks[0].test[0], prompt="Another prompt")
    changed = replace(tasks[0], test=(first, *tasks[0].test[1:]))
    with pytest.raises(AssertionError, match="Another prompt"):
        check("x", [changed])
    monkeypatch.setenv("DYADS_GOLDEN", "write")
    with pytest.raises(AssertionError, match="initials changed: raise its version"):
        check("x", [changed])
    check("x", [replace(changed, version=2)])


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

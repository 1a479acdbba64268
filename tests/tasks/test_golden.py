# SPDX-License-Identifier: Apache-2.0
"""Golden files: the rendered prompts of every registered family, compared character by character.

After a change of a prompt raise the task's `version`, then write the files with
`DYADS_GOLDEN=write pytest tests/tasks/test_golden.py`. The same command writes the file of a new family.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dyads.errors import ConfigError
from dyads.tasks import families, load

GOLDEN = Path(__file__).parent / "golden"
COMMAND = "DYADS_GOLDEN=write pytest tests/tasks/test_golden.py"


def check(name, tasks):
    lines = [
        {
            "task": t.name,
            "version": t.version,
            "id": e.id,
            "prompt": e.prompt,
            "references": list(e.references),
            "shorter": list(e.shorter),
            **{key: list(value) for key in ("segments", "choices") if (value := getattr(e, key))},
            **({"messages": [list(message) for message in e.messages]} if e.messages else {}),
        }
        for t in tasks
        for e in t.test[:2]
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path = GOLDEN / f"{name}.jsonl"
    if os.environ.get("DYADS_GOLDEN") == "write":
        for old in map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else []):
            for new in lines:
                same = old["task"] == new["task"] and old["id"] == new["id"] and old["version"] == new["version"]
                assert not same or old.items() <= new.items(), f"{old['task']} changed: raise its version"
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no golden file for '{name}': write it with {COMMAND}, read it and commit it"
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("family", sorted(families()))
def test_prompts_of_every_family_are_unchanged(family, request):
    try:
        options = request.getfixturevalue(f"{family}_options")
    except pytest.FixtureLookupError:
        options = {}
    try:
        tasks = load({"family": family, **options})
    except ConfigError as error:
        pytest.fail(f"{error}\nWrite a fixture '{family}_options' in tests/tasks/conftest.py that returns its options.")
    check(family, tasks)


def test_official_sni_prompts_are_unchanged(sni_options):
    check("sni_official", load({"family": "sni", "protocol": "official", **sni_options}))


def test_a_changed_prompt_is_not_written_without_a_new_version(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "GOLDEN", tmp_path)
    tasks = load({"family": "starter", "names": ["initials"]})
    monkeypatch.delenv("DYADS_GOLDEN", raising=False)
    with pytest.raises(AssertionError, match="no golden file for 'x': write it with DYADS_GOLDEN=write pytest"):
        check("x", tasks)
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

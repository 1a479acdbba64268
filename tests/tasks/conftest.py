# SPDX-License-Identifier: Apache-2.0
"""Which tiny checkout of natural-instructions do these tests read? One made up here."""

from __future__ import annotations

import json

import pytest


def sni_task(name, n=40, definition="Name the colour of the thing", **changes):
    """The content of a task file in the upstream schema, with more keys than are read."""
    return {
        "Contributors": ["nobody"],
        "Categories": ["Colour Naming"],
        "Definition": [definition],
        "Output_language": ["English"],
        "Positive Examples": [
            {"input": "grass", "output": "green", "explanation": "It is."},
            {"input": "a ripe lemon?", "output": "Yellow.", "explanation": "It is."},
            {"input": "coal", "output": "black", "explanation": "It is."},
        ],
        "Negative Examples": [{"input": "snow", "output": "cold", "explanation": "No colour."}],
        "Instances": [
            {"id": f"{name}-{i}", "input": f"thing {i}", "output": [f"colour {i}", "grey"]} for i in range(n)
        ],
        **changes,
    }


@pytest.fixture
def sni_folder(tmp_path):
    """Three of five listed tasks: two of the train list (task001, task002), one of the test list (task009)."""
    tasks, splits = tmp_path / "sni" / "tasks", tmp_path / "sni" / "splits"
    tasks.mkdir(parents=True)
    contents = {
        "task001_colour_naming": sni_task("task001"),
        "task002_colour_guessing": sni_task("task002", 130, "Guess the colour of the thing."),
        "task009_colour_classification": sni_task("task009", 120),
    }
    for name, content in contents.items():
        (tasks / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    for track in ("default", "xlingual"):
        (splits / track).mkdir(parents=True)
        (splits / track / "train_tasks.txt").write_text(
            "task002_colour_guessing\ntask001_colour_naming\ntask003_colour_missing\n", encoding="utf-8"
        )
        (splits / track / "test_tasks.txt").write_text(
            "task009_colour_classification\ntask008_shape_missing\n", encoding="utf-8"
        )
    return tmp_path / "sni"

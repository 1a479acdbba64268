# SPDX-License-Identifier: Apache-2.0
"""Fixtures with small made-up files: a checkout of natural-instructions, folders of benchmarks.

A fixture `<family>_options` returns the options that load a family from such files; tests of every family use it.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from made_up import GLUE_LAYOUTS, glue_rows, jsonl, listed, superglue_rows, tsv


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


@pytest.fixture
def glue_folder(tmp_path):
    """Every task with 40 train and 12 dev rows, in the official layout; MRPC's files begin with a byte order mark."""
    root = tmp_path / "glue"
    for folder in GLUE_LAYOUTS:
        tsv(root / folder / "train.tsv", *glue_rows(folder, 0, 40), bom=folder == "MRPC")
        for name in ("dev_matched", "dev_mismatched") if folder == "MNLI" else ("dev",):
            start = 200 if name == "dev_mismatched" else 100
            tsv(root / folder / f"{name}.tsv", *glue_rows(folder, start, 12), bom=folder == "MRPC")
    return root


@pytest.fixture
def superglue_folder(tmp_path):
    """The few-shot layout: train, dev32 and val of every task."""
    root = tmp_path / "superglue"
    for folder in ("BoolQ", "CB", "COPA", "RTE", "WiC", "WSC", "MultiRC"):
        for name, start in (("train", 0), ("dev32", 50), ("val", 100)):
            jsonl(root / folder / f"{name}.jsonl", *superglue_rows(folder, start, 8))
    return root


@pytest.fixture
def commonsense_folder(tmp_path):
    """Every set with a test file; PIQA without a train file; one ARC question has three answers."""
    root = tmp_path / "commonsense"
    sets = {
        "ARC-Challenge": ("answer", 4),
        "ARC-Easy": ("answer", 4),
        "openbookqa": ("answer", 4),
        "social_i_qa": ("answer", 3),
        "piqa": ("solution", 2),
        "winogrande": ("option", 2),
        "boolq": ("", 2),
    }
    for folder, (word, n) in sets.items():
        for name, start in (("train", 0), ("test", 100)):
            rows = []
            for i in range(start, start + 12):
                few = 3 if folder.startswith("ARC") and i == 100 else n
                answers = [f"{word}{j + 1}" for j in range(few)] if word else ["true", "false"]
                rows.append(
                    {
                        "instruction": f"Please answer: what is {i}?\n\n"
                        + " ".join(f"{a.capitalize()}: thing {j}" for j, a in enumerate(answers) if word)
                        + f"\n\nAnswer format: {'/'.join(answers)}",
                        "input": "",
                        "output": f"the correct answer is {answers[i % few]}",
                        "answer": answers[i % few],
                    }
                )
            if (folder, name) != ("piqa", "train"):
                listed(root / folder / f"{name}.json", *rows)
    return root


@pytest.fixture
def scitail_folder(tmp_path):
    """The official tab-separated files."""
    for name, start in (("train", 0), ("dev", 50), ("test", 100)):
        rows = [
            (f"Iron {i} rusts in air.", f"Iron {i} reacts.", ("entails", "neutral")[i % 2])
            for i in range(start, start + 20)
        ]
        tsv(tmp_path / "scitail" / "tsv_format" / f"scitail_1.0_{name}.tsv", *rows)
    return tmp_path / "scitail"


@pytest.fixture
def files_options(tmp_path):
    """One task with an instruction in its first row and several references."""
    rows = [
        {"input": "France", "output": ["Paris", "paris"], "split": "test", "instruction": "Capital?"},
        {"input": "Chad", "output": "N'Djamena", "split": "test"},
        {"input": "Peru", "output": "Lima", "split": "train"},
    ]
    jsonl(tmp_path / "own.jsonl", *({"task": "capital", **row} for row in rows))
    return {"path": tmp_path / "own.jsonl"}


@pytest.fixture
def chat_options(tmp_path):
    """A conversation with a system message and an earlier answer, and a question that has its answer alone."""
    turns = ["Hi", "Hello, who is there?", "Ada", "Good morning, Ada."]
    first = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    rows = [
        {"messages": [{"role": "system", "content": "Be polite."}, *first], "split": "test"},
        {"conversations": [{"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Goodbye."}], "split": "test"},
        {"messages": first[:2], "split": "train"},
    ]
    jsonl(tmp_path / "greeting.jsonl", *rows)
    return {"path": tmp_path / "greeting.jsonl"}


@pytest.fixture
def dataset_options(tmp_path):
    """A folder that datasets saved, whose columns have other names."""
    datasets = pytest.importorskip("datasets")
    columns = {"question": ["France", "Chad"], "answers": [{"text": ["Paris", "paris"]}, {"text": ["N'Djamena"]}]}
    splits = {split: datasets.Dataset.from_dict(columns) for split in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "capital")
    return {"path": str(tmp_path / "capital"), "columns": {"input": "question", "output": "answers.text"}}


@pytest.fixture
def reasoning_gym_options():
    if find_spec("reasoning_gym") is None:
        pytest.skip("needs `pip install reasoning-gym`")
    return {"names": ["chain_sum", "spell_backward"], "train_per_task": 3, "validation_per_task": 1, "test_per_task": 2}


@pytest.fixture
def sni_options(sni_folder):
    return {"path": sni_folder}


@pytest.fixture
def glue_options(glue_folder):
    return {"path": glue_folder}


@pytest.fixture
def superglue_options(superglue_folder):
    return {"path": superglue_folder}


@pytest.fixture
def commonsense_options(commonsense_folder):
    return {"path": commonsense_folder, "split_dev": 0}


@pytest.fixture
def scitail_options(scitail_folder):
    return {"path": scitail_folder}

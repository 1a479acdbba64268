# SPDX-License-Identifier: Apache-2.0
"""The SciTail family: the same examples from every file format."""

from __future__ import annotations

import json

import pytest
from made_up import jsonl, tsv

from dyads.errors import TaskError
from dyads.tasks import load_suite
from dyads.tasks.scitail import SciTailSpec


def read(folder, **options):
    return load_suite(SciTailSpec(path=folder, **options))


def test_the_official_splits_are_kept(scitail_folder):
    suite = read(scitail_folder)
    (task,) = suite.tasks
    assert [len(task.split(s)) for s in ("train", "validation", "test")] == [20, 20, 20]
    assert (task.labels, task.metrics) == (("entails", "neutral"), ("accuracy",))
    assert [task.target(e) for e in task.test[:2]] == [0, 1]
    assert suite.notes[0].startswith(f"scitail: read from {scitail_folder}/tsv_format/scitail_1.0_train.tsv, ")


@pytest.mark.parametrize(
    ("pattern", "entails"),
    [
        ("snli_format/scitail_1.0_{}.txt", "entailment"),
        ("predictor_format/scitail_1.0_structure_{}.jsonl", "entails"),
        ("scitail_1.0_{}.txt", "entailment"),
    ],
)
def test_other_official_forms_give_the_same_examples(scitail_folder, tmp_path, pattern, entails):
    for split in ("train", "dev", "test"):
        lines = (scitail_folder / "tsv_format" / f"scitail_1.0_{split}.tsv").read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t") for line in lines]
        jsonl(
            tmp_path / "json" / pattern.format(split),
            *(
                {"sentence1": p, "sentence2": h, "gold_label": entails if label == "entails" else label, "more": 1}
                for p, h, label in rows
            ),
        )
    assert read(tmp_path / "json").tasks == read(scitail_folder).tasks


@pytest.mark.parametrize(
    ("number", "form"),
    [
        ("1529", "Premise: Iron {0} rusts. \n Hypothesis: It {0} reacts."),
        ("1554", "Sentence 1: It {0} reacts. Sentence 2: Iron {0} rusts."),
    ],
)
def test_the_samples_in_natural_instructions_are_split_by_the_seed(tmp_path, number, form):
    instances = [{"id": str(i), "input": form.format(i), "output": [("neutral", "entails")[i % 2]]} for i in range(50)]
    path = tmp_path / "tasks" / f"task{number}_scitail.json"
    path.parent.mkdir()
    content = {"Definition": ["x"], "Positive Examples": [], "Instances": instances}
    path.write_text(json.dumps(content), encoding="utf-8")
    suite = read(tmp_path, sni_task=number)
    (task,) = suite.tasks
    assert [len(task.split(s)) for s in ("train", "validation", "test")] == [27, 3, 20]
    example = min(task.train, key=lambda e: e.id)
    i = example.id.partition("-")[2]
    assert example.segments == (f"Iron {i} rusts.", f"It {i} reacts.")
    assert suite.notes == (f"scitail: read from {path}, which has no official splits: 20 of 50 examples are scored",)
    assert read(tmp_path, sni_task=number, seed=1).tasks != suite.tasks
    path.write_text(json.dumps({**content, "Instances": [{"input": "a", "output": ["neutral"]}]}), encoding="utf-8")
    with pytest.raises(TaskError, match=f"scitail.json, instance 1: not in the form of task {number}: 'a'"):
        read(tmp_path, sni_task=number)


def test_faults_are_named(scitail_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match=r"no file scitail_1.0_train.tsv, … or tasks/task1529_\*.json in"):
        read(tmp_path / "empty", names="scitail")
    tsv(scitail_folder / "tsv_format" / "scitail_1.0_test.tsv", ("a", "b", "entailment"), ("a", "b"), ("a", "b", "-"))
    assert read(scitail_folder).notes[1:] == (
        "scitail: scitail_1.0_test.tsv: dropped 1 row with too few or too many cells",
        "scitail: scitail_1.0_test.tsv: dropped 1 row without a label",
    )
    tsv(scitail_folder / "tsv_format" / "scitail_1.0_test.tsv", ("a", "b", "contradiction"))
    with pytest.raises(TaskError, match=r"test.tsv, line 1: label 'contradiction' is not one of entails, neutral"):
        read(scitail_folder)

# SPDX-License-Identifier: Apache-2.0
"""The SuperGLUE family: file formats, labels, marked pronouns, grouped answers, errors."""

from __future__ import annotations

import pytest
from made_up import jsonl, listed, superglue_rows
from pydantic import ValidationError

from dyads.errors import TaskError
from dyads.tasks import load_suite
from dyads.tasks.superglue import SUPERGLUE_TASKS, SuperGlueSpec


def read(folder, **options):
    return load_suite(SuperGlueSpec(path=folder, **options))


def one(folder, name, **options):
    return read(folder, names=name, **options).tasks[0]


def test_the_few_shot_layout_brings_its_own_validation(superglue_folder):
    suite = read(superglue_folder)
    assert tuple(t.name for t in suite.tasks) == SUPERGLUE_TASKS
    for task in suite.tasks[:-1]:
        assert (len(task.train), len(task.validation), len(task.test)) == (8, 8, 8)
    assert [len(suite.tasks[-1].split(s)) for s in ("train", "validation", "test")] == [24, 24, 24]


def test_the_official_layout_holds_out_a_share_of_train_question_by_question(superglue_folder):
    for path in superglue_folder.glob("*/dev32.jsonl"):
        path.unlink()
    assert len(one(superglue_folder, "cb").validation) == 1
    task = one(superglue_folder, "multirc", validation_share=0.3)
    assert len(task.train) + len(task.validation) == 24
    assert task.validation
    assert not {e.group for e in task.train} & {e.group for e in task.validation}


def test_labels_are_in_the_order_of_their_class_ids(superglue_folder):
    found = {t.name: (t.labels, [t.target(e) for e in t.test[:2]]) for t in read(superglue_folder).tasks}
    assert found == {
        "boolq": (("false", "true"), [1, 0]),
        "cb": (("entailment", "contradiction", "neutral"), [1, 2]),  # row 100 is the second of three
        "copa": (("choice1", "choice2"), [0, 1]),
        "rte": (("entailment", "not_entailment"), [0, 1]),
        "wic": (("false", "true"), [1, 0]),
        "wsc": (("false", "true"), [1, 0]),
        "multirc": (("false", "true"), [1, 0]),
    }


def test_metrics_are_the_official_ones_or_accuracy(superglue_folder):
    found = {t.name: t.metrics for t in read(superglue_folder).tasks}
    assert (found.pop("cb"), found.pop("multirc")) == (("accuracy", "macro_f1"), ("f1", "group_accuracy", "accuracy"))
    assert set(found.values()) == {("accuracy",)}
    assert {t.metrics for t in read(superglue_folder, metrics="paper").tasks} == {("accuracy",)}


def test_every_answer_to_a_question_is_an_example_of_its_group(superglue_folder):
    task = one(superglue_folder, "multirc")
    assert [(e.id, e.group, e.references[0]) for e in task.test[:3]] == [
        ("val-0-0-0", "val-0-0", "true"),
        ("val-0-0-1", "val-0-0", "false"),
        ("val-0-1-0", "val-0-1", "true"),
    ]
    # the first answer of each question right, the plum wrongly taken: F1 over answers, questions whole
    scores = {s.metric: s.value for s in task.score(["true"] * 3, task.test[:3])}
    assert scores == {"f1": pytest.approx(80.0), "group_accuracy": 50.0, "accuracy": pytest.approx(200 / 3)}


def test_a_limit_takes_questions_whole(superglue_folder):
    task = one(superglue_folder, "multirc", test_per_task=7)
    assert 6 <= len(task.test) <= 7
    whole = one(superglue_folder, "multirc").test
    groups = {e.group for e in task.test}
    assert [e for e in whole if e.group in groups] == list(task.test)


@pytest.mark.parametrize(
    ("text", "at", "marked"),
    [
        ("She saw it, and it was warm.", 4, "She saw it, and *it* was warm."),
        ("She saw it, and it was warm.", 2, "She saw *it*, and it was warm."),
        ("Using it , but leaving it .", 2, "Using *it* , but leaving it ."),  # off by one, as in some rows
        ("There is none here.", 1, "There is none here."),
    ],
)
def test_the_pronoun_nearest_to_its_index_is_marked(superglue_folder, text, at, marked):
    target = {"span1_text": "a coat", "span1_index": 0, "span2_text": "it", "span2_index": at}
    jsonl(superglue_folder / "WSC" / "val.jsonl", {"text": text, "target": target, "label": True, "idx": 0})
    assert one(superglue_folder, "wsc").test[0].prompt == f"wsc pronoun: it noun: a coat text: {marked}\n"


def test_the_joined_form_gives_the_same_examples(superglue_folder, tmp_path):
    joined = {
        "CB": lambda r: (f"sentence 1: {r['premise']}\nsentence 2: {r['hypothesis']}", r["label"]),
        "COPA": lambda r: (
            "\n".join(
                [
                    f'Which sentence is the {r["question"]} of "{r["premise"]}"? Choose one between A and B.',
                    f"A: {r['choice1']}",
                    f"B: {r['choice2']}",
                ]
            ),
            "AB"[r["label"]],
        ),
        "WiC": lambda r: (f"word: {r['word']}\n{r['sentence1']}\n{r['sentence2']}", str(r["label"])),
    }
    for folder, join in joined.items():
        for name, start in (("train", 0), ("dev", 100)):
            rows = [join(row) for row in superglue_rows(folder, start, 8)]
            listed(tmp_path / folder / f"{name}.json", *({"sentence": s, "label": k} for s, k in rows))
    suite = read([tmp_path, superglue_folder])
    theirs = {t.name: t for t in read(superglue_folder).tasks}
    for task in suite.tasks:
        assert task.test == theirs[task.name].test
        assert (len(task.validation) == 8) == (task.name not in ("cb", "copa", "wic")) or task.name == "multirc"
    assert f"cb: read from {tmp_path}/CB/train.json, {tmp_path}/CB/dev.json" in suite.notes


def test_rows_without_a_label_are_dropped_and_missing_labels_noted(superglue_folder):
    rows = list(superglue_rows("CB", 0, 9))
    jsonl(superglue_folder / "CB" / "train.jsonl", *rows[::3], {"premise": "a", "hypothesis": "b", "idx": 1})
    assert read(superglue_folder, names="cb").notes[1:] == (
        "cb: dropped 1 row of train.jsonl without a label",
        "cb: no training example has the label contradiction, neutral",
    )


@pytest.mark.parametrize(
    ("folder", "row", "message"),
    [
        ("CB", {"premise": "a", "hypothesis": "b", "label": "maybe"}, "line 1: label 'maybe' is not one of entailment"),
        ("CB", {"premise": "a", "label": "neutral"}, "line 1: no field 'hypothesis'; it has premise, label"),
        ("WSC", {"text": "a", "target": {}, "label": True}, "line 1: 'target' needs span1_text, span2_text and span2_"),
        ("MultiRC", {"passage": {"text": "a"}}, "line 1: 'passage' needs a text and questions"),
    ],
)
def test_a_fault_is_named_with_its_place(superglue_folder, folder, row, message):
    jsonl(superglue_folder / folder / "val.jsonl", row)
    with pytest.raises(TaskError, match=message):
        read(superglue_folder)


def test_an_unknown_joined_form_is_refused(tmp_path):
    listed(tmp_path / "CB" / "dev.json", {"sentence": "no pair", "label": "neutral"})
    with pytest.raises(TaskError, match=r"dev.json, row 1: 'sentence' is not in the form of task 'cb': 'no pair'"):
        read(tmp_path, names="cb")
    listed(tmp_path / "BoolQ" / "dev.json", {"sentence": "a", "label": "true"})
    with pytest.raises(
        TaskError, match=r"the JSON form of task 'boolq' is not supported; use train.jsonl and val.jsonl"
    ):
        read(tmp_path, names="boolq")


def test_missing_files_and_unknown_tasks_are_refused(tmp_path):
    with pytest.raises(TaskError, match=r"task 'wic' has no file WiC/train.jsonl, WiC/val.jsonl"):
        read(tmp_path, names="wic")
    with pytest.raises(ValidationError, match="unknown task 'record' – known: boolq, cb"):
        SuperGlueSpec(path=tmp_path, names="record")

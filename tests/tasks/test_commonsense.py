# SPDX-License-Identifier: Apache-2.0
"""The commonsense family: prompts, choices of each question, missing train files."""

from __future__ import annotations

import json

import pytest
from made_up import listed

from dyads.errors import TaskError
from dyads.tasks import load_suite
from dyads.tasks.commonsense import COMMONSENSE_TASKS, CommonsenseSpec


def read(folder, **options):
    return load_suite(CommonsenseSpec(path=folder, **options))


def test_prompt_and_answer_together_are_the_files_own_output(commonsense_folder):
    task = read(commonsense_folder, names="boolq").tasks[0]
    rows = json.loads((commonsense_folder / "boolq" / "test.json").read_text(encoding="utf-8"))
    for example, row in zip(task.test, rows, strict=True):
        assert example.prompt + example.references[0] == f"{row['instruction']}\n{row['output']}"


def test_sets_without_a_train_file_are_left_out_or_scored_untrained(commonsense_folder):
    suite = read(commonsense_folder)
    assert tuple(t.name for t in suite.tasks) == tuple(n for n in COMMONSENSE_TASKS if n != "piqa")
    assert any(n.startswith("left out: task 'piqa' has no train file") for n in suite.notes)
    suite = read(commonsense_folder, split_dev=0)
    assert tuple(t.name for t in suite.tasks) == COMMONSENSE_TASKS
    assert [len(t.train) for t in suite.tasks] == [11, 11, 11, 11, 0, 11, 11]


def test_choices_differ_where_the_question_has_fewer_answers(commonsense_folder):
    task = read(commonsense_folder, names="arc_c").tasks[0]
    assert task.labels == ("answer1", "answer2", "answer3", "answer4", "answer5")
    assert [len(task.choices(e)) for e in task.test[:3]] == [3, 4, 4]
    task = read(commonsense_folder, names="siqa").tasks[0]
    assert task.test[0].choices == ()
    assert task.choices(task.test[0]) == ("answer1", "answer2", "answer3")


def test_class_ids_follow_the_numbers_and_false_comes_before_true(commonsense_folder):
    tasks = {t.name: t for t in read(commonsense_folder).tasks}
    assert tasks["boolq"].labels == ("false", "true")
    assert [tasks["boolq"].target(e) for e in tasks["boolq"].test[:2]] == [1, 0]
    assert [tasks["winogrande"].target(e) for e in tasks["winogrande"].test[:2]] == [0, 1]


def test_an_input_follows_the_instruction(commonsense_folder):
    row = {"instruction": "Choose.", "input": "Up or down?", "output": "", "answer": "option1"}
    listed(commonsense_folder / "winogrande" / "test.json", row)
    example = read(commonsense_folder, names="winogrande").tasks[0].test[0]
    assert example.prompt == "Choose.\nUp or down?\nthe correct answer is "
    assert example.choices == ()


def test_an_answer_that_is_no_choice_is_refused(commonsense_folder):
    row = {"instruction": "Choose.\n\nAnswer format: answer1/answer2", "input": "", "answer": "answer3"}
    listed(commonsense_folder / "openbookqa" / "test.json", row)
    with pytest.raises(TaskError, match=r"test.json, row 1: label 'answer3' is not one of answer1, answer2"):
        read(commonsense_folder)
    listed(commonsense_folder / "openbookqa" / "test.json", {**row, "instruction": "Answer format: a/b", "answer": "a"})
    with pytest.raises(
        TaskError, match=r"task 'obqa': answer 'a' of example 'test-0' is not one of its labels answer1"
    ):
        read(commonsense_folder)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(TaskError, match=r"task 'siqa' has no file social_i_qa/train.json or test.json in"):
        read(tmp_path, names="siqa")

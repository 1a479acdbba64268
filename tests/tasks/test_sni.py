# SPDX-License-Identifier: Apache-2.0
"""The Super-NaturalInstructions family: both protocols, names of tasks, errors with their place."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from dyads.errors import TaskError
from dyads.tasks import load, load_suite
from dyads.tasks.sni import MODE_CASE_STUDY, MODE_CASE_STUDY_STAND_INS, STAND_INS, SNISpec


def read(folder, **options):
    return load_suite(SNISpec(path=folder, **options))


def rewrite(folder, name, **changes):
    path = folder / "tasks" / f"{name}.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def prompts(part):
    return {e.prompt for e in part}


def test_mode_scores_a_tenth_and_sets_validation_aside(sni_folder):
    task = {t.name: t for t in read(sni_folder).tasks}["task002_colour_guessing"]
    assert (len(task.train), len(task.validation), len(task.test)) == (111, 6, 13)
    assert (task.max_prompt_tokens, task.max_new_tokens) == (896, 128)
    assert (task.metrics, task.category) == (("rouge_l", "sni_exact_match"), "Colour Naming")
    assert task.test[0].references[1] == "grey"


def test_tasks_come_in_the_order_of_the_list_and_the_found_ones_are_counted(sni_folder):
    suite = read(sni_folder)
    assert [t.name for t in suite.tasks] == ["task002_colour_guessing", "task001_colour_naming"]
    assert suite.notes == (f"found 2 of 3 tasks of {sni_folder}/splits/default/train_tasks.txt",)


def test_official_takes_the_first_hundred_and_trains_on_the_rest_of_seen_tasks(sni_folder):
    suite = read(sni_folder, protocol="official")
    seen, short, unseen = suite.tasks
    assert [e.id for e in seen.test] == [f"task002-{i}" for i in range(100)]
    assert (len(seen.train), len(seen.validation)) == (28, 2)
    assert (len(short.train), len(short.test)) == (0, 40)
    assert (len(unseen.train), len(unseen.validation), len(unseen.test)) == (0, 0, 100)
    assert seen.max_prompt_tokens == 1024
    assert any("task001_colour_naming: no train split, 0 usable" in note for note in suite.notes)
    assert "found 1 of 2 tasks" in suite.notes[1]


def test_official_prompt_follows_the_release(sni_folder):
    example = read(sni_folder, protocol="official", names="task001").tasks[0].test[0]
    assert example.prompt == (
        "Definition: Name the colour of the thing.\n\n"
        " Positive Example 1 -\nInput: grass.\n Output: green.\n\n"
        " Positive Example 2 -\nInput: a ripe lemon?\n Output: Yellow.\n\n"
        "Now complete the following example -\nInput: thing 0.\nOutput: "
    )
    assert [p.count("Positive Example") for p in (example.prompt, *example.shorter)] == [2, 1, 0]


def test_the_number_of_demonstrations_is_an_option(sni_folder):
    example = read(sni_folder, protocol="official", names="task001", demonstrations=9).tasks[0].test[0]
    assert example.prompt.count("Positive Example") == 3  # there are no more
    assert read(sni_folder, protocol="official", names="task001", demonstrations=0).tasks[0].test[0].shorter == ()


@pytest.mark.parametrize("protocol", ["mode", "official"])
def test_equal_inputs_never_stand_on_two_sides(sni_folder, protocol):
    instances = [{"id": "same id", "input": f"thing {i % 17}", "output": [str(i)]} for i in range(150)]
    rewrite(
        sni_folder,
        "task001_colour_naming",
        Instances=[{**i, "input": f"thing {k % 5}"} for k, i in enumerate(instances[:100])] + instances,
    )
    task = read(sni_folder, names="task001", protocol=protocol).tasks[0]
    assert task.train
    assert not prompts(task.train) & prompts(task.test)
    assert not prompts(task.train) & prompts(task.validation)
    assert not prompts(task.validation) & prompts(task.test)


def test_the_split_depends_on_the_seed_and_not_on_the_other_tasks(sni_folder):
    alone, beside = read(sni_folder, names="task001").tasks[0], read(sni_folder).tasks[1]
    assert alone == beside
    assert alone.test != read(sni_folder, names="task001", seed=1).tasks[0].test


def test_a_cap_takes_train_instances_only(sni_folder):
    full, capped = (
        read(sni_folder, names="task002").tasks[0],
        read(sni_folder, names="task002", max_per_task=10).tasks[0],
    )
    assert len(capped.train) == 10
    assert set(capped.train) < set(full.train)
    assert (capped.test, capped.validation) == (full.test, full.validation)


def test_empty_outputs_are_dropped_with_a_note(sni_folder):
    instances = [{"id": str(i), "input": f"thing {i}", "output": ["", "x"] if i > 1 else [" "]} for i in range(40)]
    rewrite(sni_folder, "task001_colour_naming", Instances=instances)
    suite = read(sni_folder, names="task001")
    task = suite.tasks[0]
    assert {e.references for e in task.train + task.validation + task.test} == {("x",)}
    assert suite.notes == ("task001_colour_naming: dropped 2 of 40 instances, all their outputs are empty",)


def test_other_languages_are_scored_by_words(sni_folder):
    rewrite(sni_folder, "task001_colour_naming", Output_language=["Russian"])
    assert read(sni_folder, names="task001").tasks[0].metric == "rouge_l_words"


def test_tasks_are_named_in_full_by_number_or_by_suite(sni_folder):
    names = ("task009_colour_classification", "task001", "2")
    assert [t.name[:7] for t in read(sni_folder, names=names).tasks] == ["task009", "task001", "task002"]


def test_a_number_of_two_files_is_refused_with_both(sni_folder):
    (sni_folder / "tasks" / "task001_other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TaskError, match=r"'task001' is ambiguous in .*: task001_colour_naming, task001_other"):
        read(sni_folder, names="task001")


def test_a_task_outside_the_lists_is_noted(sni_folder):
    (sni_folder / "tasks" / "task001_colour_naming.json").rename(sni_folder / "tasks" / "task077_own.json")
    assert read(sni_folder, names="task077").notes == ("outside the default track's train and test lists: task077_own",)


def test_the_case_study_has_fifteen_tasks_and_six_stand_ins(sni_folder):
    assert len(set(MODE_CASE_STUDY)) == len(set(MODE_CASE_STUDY_STAND_INS)) == 15
    assert len(STAND_INS) == 6
    assert set(STAND_INS) <= set(MODE_CASE_STUDY)
    for name in MODE_CASE_STUDY_STAND_INS:
        content = (sni_folder / "tasks" / "task001_colour_naming.json").read_text(encoding="utf-8")
        (sni_folder / "tasks" / f"{name}.json").write_text(content, encoding="utf-8")
    suite = read(sni_folder, names="mode-case-study-stand-ins")
    assert tuple(t.name for t in suite.tasks) == MODE_CASE_STUDY_STAND_INS
    assert suite.notes[0].startswith("stand-ins: task454_swag_incorrect_answer_generation for task025_cosmosqa")
    with pytest.raises(TaskError, match=r"6 of the named tasks are not in .* use `names: mode-case-study-stand-ins`"):
        read(sni_folder, names="mode-case-study")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": "task001_color_naming"}, "unknown task 'task001_color_naming' .* mean 'task001_colour_naming'"),
        ({"names": "mode-case-studdy"}, "did you mean 'mode-case-study"),
        ({"names": "task003_colour_missing"}, r"has no file .*task003_colour_missing.json \(there are 3 task files"),
        ({"names": "task055"}, r"no task file task055_\*.json"),
        ({"names": ["1", "task001"]}, "task001_colour_naming twice, as '1' and 'task001'"),
        (
            {"names": "task001", "split_file": "test"},
            "is in the train list of track 'default', not in that of split_file: test",
        ),
    ],
)
def test_wrong_names_are_refused(sni_folder, options, message):
    with pytest.raises(TaskError, match=message):
        read(sni_folder, **options)


def test_missing_folders_and_lists_are_refused(sni_folder, tmp_path):
    with pytest.raises(TaskError, match=r"no folder .*nowhere: `path` must be a checkout of natural-instructions"):
        read(tmp_path / "nowhere")
    (sni_folder / "splits" / "default" / "test_tasks.txt").unlink()
    with pytest.raises(TaskError, match=r"no file .*test_tasks.txt: it must list the test tasks of track 'default'"):
        read(sni_folder)


def test_lists_without_any_file_are_refused(sni_folder):
    for which in ("train", "test"):
        (sni_folder / "splits" / "xlingual" / f"{which}_tasks.txt").write_text("task700_x\n", encoding="utf-8")
    with pytest.raises(TaskError, match=r"none of the tasks of .*train_tasks.txt has a file in"):
        read(sni_folder, track="xlingual")


def test_a_folder_without_task_files_is_refused(sni_folder):
    for path in (sni_folder / "tasks").iterdir():
        path.unlink()
    with pytest.raises(TaskError, match=r"no task file \(\*.json\) in"):
        read(sni_folder)


def test_a_truncated_file_is_named_with_line_and_column(sni_folder):
    path = sni_folder / "tasks" / "task001_colour_naming.json"
    text = json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1)
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(
        TaskError,
        match=r"task001_colour_naming.json, line \d+, column \d+: not valid JSON: .*; download the file again",
    ):
        read(sni_folder)


def test_a_malformed_file_is_named_with_line_and_column(sni_folder):
    path = sni_folder / "tasks" / "task001_colour_naming.json"
    path.write_text('{"Definition": ["x"],\n "Instances": oops}', encoding="utf-8")
    with pytest.raises(TaskError, match=r"task001_colour_naming.json, line 2, column 15: not valid JSON: .*; download"):
        read(sni_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Instances": []}, "task 'task001_colour_naming' has no instances"),
        ({"Instances": [{"input": "a", "output": []}]}, "has 1 instances and none has an output"),
        ({"Instances": [{"input": "a", "output": ["b"]}]}, "cannot be divided into 3 splits: it has 1 usable"),
        ({"Instances": [{"input": "a"}]}, "Instances.0.output: Field required"),
        ({"Definition": []}, "Definition: List should have at least 1 item"),
    ],
)
def test_unusable_contents_are_refused_with_the_place(sni_folder, changes, message):
    path = rewrite(sni_folder, "task001_colour_naming", **changes)
    with pytest.raises(TaskError, match=message) as error:
        read(sni_folder)
    assert str(path) in str(error.value) or "task 'task001_colour_naming'" in str(error.value)


def test_nan_is_read_where_nothing_uses_it(sni_folder):
    expected = read(sni_folder)
    rewrite(sni_folder, "task001_colour_naming", URL=[float("nan")])
    assert "NaN" in (sni_folder / "tasks" / "task001_colour_naming.json").read_text()
    assert read(sni_folder) == expected
    rewrite(sni_folder, "task001_colour_naming", Instances=[{"input": float("nan"), "output": ["a"]}])
    with pytest.raises(TaskError, match=r"Instances\.0\.input: Input should be a valid string"):
        read(sni_folder)


def test_text_that_is_not_utf8_is_refused(sni_folder):
    (sni_folder / "tasks" / "task001_colour_naming.json").write_bytes(b'{"Definition": "\xff"}')
    with pytest.raises(TaskError, match=r"not UTF-8 text \(byte 16\)"):
        read(sni_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"demonstrations": 2}, "demonstrations: 2 needs protocol: official"),
        ({"names": []}, "names is an empty list"),
        ({"protocol": "oficial"}, "'mode' or 'official'"),
        ({"max_per_task": 0}, "greater than or equal to 1"),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        SNISpec(path="x", **options)


@pytest.mark.parametrize("protocol", ["mode", "official"])
def test_the_file_of_one_task_is_read_by_itself(sni_folder, protocol):
    file = sni_folder / "tasks" / "task002_colour_guessing.json"
    alone = load({"family": "sni", "path": file, "protocol": protocol})
    assert alone == load({"family": "sni", "path": sni_folder, "names": ["task002"], "protocol": protocol})
    with pytest.raises(TaskError, match=r"is the file of one task: leave `names` and `split_file` out"):
        load({"family": "sni", "path": file, "names": ["task002"]})
    file.write_text("[1]")
    with pytest.raises(TaskError, match=r"task002_colour_guessing\.json: the top level: .*a task file has Definition"):
        load({"family": "sni", "path": file})

# SPDX-License-Identifier: Apache-2.0
"""The GLUE family: file formats, the protocols, labels and metrics, limits and errors."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from made_up import glue_rows, listed, tsv
from pydantic import ValidationError

from dyads.errors import ConfigError, TaskError
from dyads.tasks import load, load_suite
from dyads.tasks.divide import halve
from dyads.tasks.glue import GLUE_TASKS, GlueSpec


def read(folder, **options):
    return load_suite(GlueSpec(path=folder, **options))


def one(folder, name, **options):
    return read(folder, names=name, **options).tasks[0]


def test_the_nine_tasks_come_in_the_order_of_the_paper_with_wnli_last(glue_folder):
    names = tuple(t.name for t in read(glue_folder).tasks)
    assert names == GLUE_TASKS == ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")


def test_full_scores_the_dev_file_and_holds_out_a_tenth_of_train(glue_folder):
    for task in read(glue_folder).tasks:
        assert (len(task.train), len(task.validation), len(task.test)) == (36, 4, 12), task.name
        assert {e.id.partition("-")[0] for e in task.train + task.validation} == {"train"}
        assert [e.id for e in task.test] == [f"dev-{i}" for i in range(12)]
        assert not {e.prompt for e in task.train} & {e.prompt for e in task.validation}
        assert task.max_prompt_tokens is None


def test_paper_scores_the_second_half_of_the_permutation_of_four_tasks(glue_folder):
    whole = {t.name: t for t in read(glue_folder).tasks}
    for task in read(glue_folder, protocol="paper").tasks:
        dev = whole[task.name].test
        assert task.max_prompt_tokens == 128
        if task.name in ("mrpc", "rte", "cola", "stsb"):
            first, second = halve(dev, seed=1189)
            assert (task.validation, task.test, len(task.train)) == (first, second, 40)
        else:
            assert (task.test, len(task.validation), len(task.train)) == (dev, 4, 36)


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ("official", {"cola": ["matthews"], "mrpc": ["accuracy", "f1"], "stsb": ["pearson", "spearman"]}),
        ("paper", {"cola": ["matthews_exact"], "mrpc": ["accuracy_exact"], "stsb": ["pearson_digits"]}),
    ],
)
def test_metrics_are_the_official_ones_or_the_papers(glue_folder, metrics, expected):
    found = {t.name: list(t.metrics) for t in read(glue_folder, metrics=metrics).tasks}
    accuracy = expected["mrpc"][0]
    expected = {**{name: [accuracy] for name in GLUE_TASKS}, **expected}
    expected["qqp"] = expected["mrpc"]
    assert found == expected


def test_labels_stand_in_the_order_of_their_class_ids(glue_folder):
    tasks = {t.name: t for t in read(glue_folder).tasks}
    raw = {"cola": "01", "mrpc": "01", "qqp": "01", "sst2": "01", "wnli": "01"}  # the files' own class ids
    for name in raw:
        assert [tasks[name].target(e) for e in tasks[name].test] == [0, 1] * 6
    assert tasks["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert [tasks["mnli"].target(e) for e in tasks["mnli"].test] == [(100 + i) % 3 for i in range(12)]
    assert tasks["mrpc"].labels[1] == "equivalent"  # the positive class of F1
    assert tasks["qqp"].labels[1] == "duplicate"


def test_similarities_are_rounded_as_text_and_exact_as_numbers(glue_folder):
    task = one(glue_folder, "stsb")
    assert (task.regression, task.labels) == (True, ())
    assert [e.references for e in task.test[:4]] == [("4.8", "4.75"), ("0.0",), ("3.8",), ("2.2",)]
    assert [task.target(e) for e in task.test[:2]] == [4.75, 0.0]
    assert [e.references for e in one(glue_folder, "stsb", metrics="paper").test[:1]] == [("4.8",)]


def test_quotation_marks_stay(glue_folder):
    assert one(glue_folder, "mrpc").test[0].segments == ('He said " no 100 .', '" No 100 , " he said .')
    assert one(glue_folder, "qqp").test[0].segments[1] == '"What is 100 ""far"" from?"'


def test_the_mismatched_dev_file_is_an_option(glue_folder):
    matched, other = (one(glue_folder, "mnli", mnli_dev=which) for which in ("matched", "mismatched"))
    assert (matched.train, matched.validation) == (other.train, other.validation)
    assert other.test[0].segments[0] == "It rains 200."


def test_the_json_form_gives_the_same_examples(glue_folder, tmp_path):
    task, rows = one(glue_folder, "mnli"), glue_rows("MNLI", 100, 12)[1:]
    for split in ("train", "dev"):
        listed(
            tmp_path / "json" / "MNLI" / f"{split}.json",
            *({"sentence": f"sentence 1: {r[8]}\nsentence 2: {r[9]}", "label": r[11]} for r in rows),
        )
    assert one(tmp_path / "json", "mnli").test == task.test


def test_a_pair_of_questions_is_read_from_the_json_form(tmp_path):
    rows = [
        {"sentence": f"first sentence: How {i}?\nsecond sentence: Why {i}?", "label": str(i % 2 == 1)}
        for i in range(20)
    ]
    for split in ("train", "dev"):
        listed(tmp_path / "QQP" / f"{split}.json", *rows)
    example = one(tmp_path, "qqp").test[1]
    assert (example.segments, example.references) == (("How 1?", "Why 1?"), ("duplicate",))


def test_a_task_is_read_from_the_first_folder_that_has_it_and_a_note_says_which(glue_folder, tmp_path):
    tsv(tmp_path / "mine" / "RTE" / "train.tsv", *glue_rows("RTE", 500, 30))
    tsv(tmp_path / "mine" / "RTE" / "dev.tsv", *glue_rows("RTE", 600, 5))
    suite = read([tmp_path / "mine", glue_folder], names=["rte", "wnli"])
    assert [len(t.test) for t in suite.tasks] == [5, 12]
    assert suite.notes == (
        f"rte: read from {tmp_path}/mine/RTE/train.tsv, {tmp_path}/mine/RTE/dev.tsv",
        f"wnli: read from {glue_folder}/WNLI/train.tsv, {glue_folder}/WNLI/dev.tsv",
    )


def test_rows_without_a_label_and_misshapen_rows_are_dropped_with_a_note(glue_folder):
    rows = glue_rows("MNLI", 100, 12)
    tsv(glue_folder / "MNLI" / "dev_matched.tsv", *rows, (*rows[1][:-1], "-"), ("13", "cut off"))
    suite = read(glue_folder, names="mnli")
    assert len(suite.tasks[0].test) == 12
    assert suite.notes[1:] == (
        "mnli: dev_matched.tsv: dropped 1 row with too few or too many cells",
        "mnli: dev_matched.tsv: dropped 1 row without a label",
    )


def test_prompts_on_both_sides_are_counted(glue_folder):
    tsv(glue_folder / "SST-2" / "dev.tsv", *glue_rows("SST-2", 0, 12))
    held_out = {e.prompt for e in one(glue_folder, "sst2").validation}
    shared = sum(e.prompt not in held_out for e in one(glue_folder, "sst2").test)
    assert f"sst2: {shared} of 12 test prompts are also in its train split" in read(glue_folder).notes


def test_a_task_with_a_dev_file_only_is_left_out_or_refused(glue_folder):
    (glue_folder / "QNLI" / "train.tsv").unlink()
    suite = read(glue_folder)
    assert "qnli" not in [t.name for t in suite.tasks]
    assert any(n.startswith("left out: task 'qnli' has no train file: add it, or set") for n in suite.notes)
    with pytest.raises(TaskError, match=r"task 'qnli' has no train file: .* `split_dev: 0.5` .* \(0: score it"):
        read(glue_folder, names="qnli")


def test_a_share_of_dev_can_be_trained_on_and_a_note_says_so(glue_folder):
    (glue_folder / "QNLI" / "train.tsv").unlink()
    suite = read(glue_folder, names="qnli", split_dev=0.5, validation_share=0.2)
    task = suite.tasks[0]
    assert (len(task.train), len(task.validation), len(task.test)) == (5, 1, 6)
    assert len({e.prompt for e in task.train + task.validation + task.test}) == 12
    assert "6 of the 12 examples of the test file are trained on" in suite.notes[1]
    untrained = read(glue_folder, names="qnli", split_dev=0)
    assert (len(untrained.tasks[0].train), len(untrained.tasks[0].test)) == (0, 12)
    assert untrained.notes[1] == "qnli: no train file; it is scored without training"
    assert read(glue_folder, names="rte", split_dev=0.5).tasks == read(glue_folder, names="rte").tasks


def test_limits_choose_by_the_seed_and_only_add(glue_folder):
    whole, few = (one(glue_folder, "rte", train_per_task=n, validation_per_task=2, test_per_task=n) for n in (99, 5))
    assert (len(few.train), len(few.validation), len(few.test)) == (5, 2, 5)
    more = one(glue_folder, "rte", train_per_task=6)
    assert set(few.train) < set(more.train) < set(whole.train)
    assert few.test != one(glue_folder, "rte", test_per_task=5, seed=1).test


def test_nothing_is_held_out_on_request(glue_folder):
    task = one(glue_folder, "rte", validation_share=0)
    assert (len(task.train), len(task.validation)) == (40, 0)


@pytest.mark.parametrize(
    ("folder", "row", "message"),
    [
        (
            "RTE",
            ("0", "a", "b", "maybe"),
            r"RTE/dev.tsv, line 2: label 'maybe' is not one of entailment, not_entailment",
        ),
        ("CoLA", ("x", "2", "", "a"), r"CoLA/dev.tsv, line 1: label '2' is not one of unacceptable, acceptable, 0, 1"),
        ("STS-B", (*"012345678", "5.1"), "score '5.1' is not a number from 0 to 5"),
        ("STS-B", (*"012345678", "nan"), "score 'nan' is not a number from 0 to 5"),
    ],
)
def test_a_label_that_is_none_is_refused_with_its_place(glue_folder, folder, row, message):
    header = glue_rows(folder, 0, 0)
    tsv(glue_folder / folder / "dev.tsv", *header, row)
    with pytest.raises(TaskError, match=message):
        read(glue_folder)


def test_another_layout_is_refused_with_the_columns_there_are(glue_folder):
    tsv(glue_folder / "RTE" / "dev.tsv", ("premise", "label"), ("a", "entailment"))
    with pytest.raises(TaskError, match=r"dev.tsv, line 2: no field 'sentence1'; it has premise, label"):
        read(glue_folder)


def test_a_sentence_of_the_json_form_that_is_no_pair_is_refused(tmp_path):
    listed(tmp_path / "RTE" / "dev.json", {"sentence": "only one", "label": "entailment"})
    with pytest.raises(TaskError, match=r"dev.json, row 1: expected 'sentence 1: …', .* got 'only one'"):
        read(tmp_path, names="rte")


def test_missing_files_and_folders_are_refused(glue_folder, tmp_path):
    with pytest.raises(
        TaskError, match=r"no folder .*nowhere: `path` must be a folder with the files of family 'glue'"
    ):
        read(tmp_path / "nowhere")
    with pytest.raises(TaskError, match=r"task 'cola' has no file CoLA/train.tsv, CoLA/dev.tsv or dev.json in"):
        read(tmp_path, names="cola")
    with pytest.raises(TaskError, match=r"no task of family 'glue' can be read:\nleft out: task 'cola'"):
        read(tmp_path)
    (glue_folder / "CoLA" / "dev.tsv").unlink()
    with pytest.raises(TaskError, match="task 'cola' has no labelled example to score: add its validation file"):
        read(glue_folder, names="cola")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "path is missing: the folder with CoLA/, MNLI/, …; or use source: hub"),
        ({"source": "hub", "path": "x"}, "path x is not read with source: hub"),
        ({"path": "x", "protocol": "paper", "mnli_dev": "mismatched"}, "scores MNLI on the matched dev file"),
        ({"path": "x", "names": "sst-2"}, "unknown task 'sst-2' – did you mean 'sst2'"),
        ({"path": "x", "names": []}, r"names must be one or more different tasks, got \[\]"),
        ({"path": "x", "names": ["rte", "rte"]}, "one or more different tasks"),
        ({"path": "x", "split_dev": 1}, "less than 1"),
        ({"path": "x", "train_per_task": 0}, "greater than or equal to 1"),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        GlueSpec(**options)


def test_an_unknown_option_is_refused_with_near_ones(glue_folder):
    with pytest.raises(ConfigError, match="unknown key 'name' for tasks of family 'glue' – did you mean 'names'"):
        load({"family": "glue", "path": glue_folder, "name": "rte"})


def test_a_spec_survives_being_written_out(glue_folder):
    spec = GlueSpec(path=glue_folder, names="rte", split_dev=0.5)
    assert GlueSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert load(spec.model_dump(mode="json")) == load(spec)


class TestHub:
    def test_the_hub_gives_the_same_examples_as_the_files(self, glue_folder, monkeypatch):
        asked = []

        def load_dataset(path, name, *, split):
            asked.append((path, name, split))
            start, n = (0, 40) if split == "train" else (100, 12)
            if name == "stsb":
                scores = (4.75, 0.0, 3.799999952316284, 2.200000047683716)  # as the hub's 32 bits print
                return [
                    {"sentence1": f"A dog runs {i}.", "sentence2": f"A cat runs {i}.", "label": scores[i % 4], "idx": i}
                    for i in range(start, start + n)
                ]
            return [
                {"premise": f"It rains {i}.", "hypothesis": f"It is wet {i}.", "label": i % 3, "idx": i}
                for i in range(start, start + n)
            ]

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        names = ("mnli", "stsb")
        assert load_suite(GlueSpec(source="hub", names=names)).tasks == read(glue_folder, names=names).tasks
        assert asked[:2] == [("nyu-mll/glue", "mnli", "train"), ("nyu-mll/glue", "mnli", "validation_matched")]
        assert asked[2:] == [("nyu-mll/glue", "stsb", "train"), ("nyu-mll/glue", "stsb", "validation")]

    def test_what_the_hub_says_is_passed_on(self, monkeypatch):
        def load_dataset(path, name, *, split):
            raise ConnectionError("no route to host")

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        with pytest.raises(TaskError, match=r"cannot load nyu-mll/glue 'rte' \(train\): no route to host; give local"):
            load_suite(GlueSpec(source="hub", names="rte"))

    def test_without_the_package_the_way_out_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(TaskError, match="needs the package `datasets`: pip install datasets, or give local files"):
            load_suite(GlueSpec(source="hub"))

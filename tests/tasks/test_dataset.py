# SPDX-License-Identifier: Apache-2.0
"""The dataset family: folders of datasets, parquet and arrow files, class labels, nested columns, splits."""

from __future__ import annotations

import sys

import pytest

from dyads.errors import TaskError
from dyads.tasks import load_suite
from dyads.tasks.dataset import DatasetSpec

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def read(path, **options):
    return load_suite(DatasetSpec(path=str(path), **options))


def rows(n=20, **changes):
    return datasets.Dataset.from_dict(
        {"question": [f"q{i}" for i in range(n)], "answer": [f" a{i}" for i in range(n)], **changes}
    )


COLUMNS = {"input": "question", "output": "answer"}


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream", "folder", "folder of parquet"])
def test_rows_come_from_every_kind_of_file(tmp_path, kind):
    given = rows()
    path = tmp_path / "mine"
    if kind == "parquet":
        given.to_parquet(path := tmp_path / "mine.parquet")
    elif kind == "folder":
        given.save_to_disk(path)
    elif kind == "folder of parquet":
        path.mkdir()
        given.to_parquet(path / "train.parquet")
    else:
        import pyarrow

        path = tmp_path / "mine.arrow"
        new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with new(str(path), given.data.table.schema) as writer:
            writer.write_table(given.data.table)
    (task,) = read(path, columns=COLUMNS).tasks
    assert (task.name, len(task.train), len(task.test)) == ("mine", 16, 2)
    everything = {e.prompt: e.references for s in ("train", "validation", "test") for e in task.split(s)}
    assert everything == {f"q{i}\n": (f" a{i}",) for i in range(20)}
    assert read(path, columns=COLUMNS).tasks == (task,)


def test_splits_are_taken_by_their_names_or_as_chosen(tmp_path):
    whole = datasets.DatasetDict({"train": rows(9), "validation": rows(3), "extra": rows(2)})
    whole.save_to_disk(tmp_path / "set")
    with pytest.raises(TaskError, match="has the splits train, validation, extra: name the one for test, as in `split"):
        read(tmp_path / "set", columns=COLUMNS)
    (task,) = read(tmp_path / "set", columns=COLUMNS, split={"train": "train", "test": "extra"}).tasks
    assert [len(task.split(s)) for s in ("train", "validation", "test")] == [9, 0, 2]
    assert task.test[1].id == "extra-1"
    (task,) = read(tmp_path / "set", columns=COLUMNS, split="train").tasks
    assert (len(task.train), len(task.test)) == (7, 1)
    with pytest.raises(TaskError, match="has no split 'trian' – did you mean 'train'"):
        read(tmp_path / "set", columns=COLUMNS, split="trian")
    whole["test"] = rows(4)
    whole.save_to_disk(tmp_path / "complete")
    (task,) = read(tmp_path / "complete", columns=COLUMNS).tasks
    assert [len(task.split(s)) for s in ("train", "validation", "test")] == [9, 3, 4]


def test_class_labels_are_names_and_the_labels_of_the_task(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    given = datasets.Dataset.from_dict(
        {"text": [f"t{i}" for i in range(12)], "label": [i % 2 for i in range(11)] + [-1]}, features=features
    )
    given.to_parquet(tmp_path / "a.parquet")
    suite = read(tmp_path / "a.parquet", columns={"input": "text", "output": "label"})
    (task,) = suite.tasks
    assert (task.labels, task.metric) == (("no", "yes"), "accuracy")
    assert sum(len(task.split(s)) for s in ("train", "validation", "test")) == 11
    assert suite.notes == (f"left out 1 rows of data set '{tmp_path / 'a.parquet'}' without a label",)
    free = {"input": "text", "output": "label", "labels": None}
    assert read(tmp_path / "a.parquet", columns=free).tasks[0].labels == ()


def test_numbers_nested_columns_and_joined_inputs_are_text(tmp_path):
    given = datasets.Dataset.from_dict(
        {
            "title": [f"T{i}" for i in range(6)],
            "score": [0.5, 1.0, 2.0, 3.0, 4.0, 5.0],
            "year": list(range(6)),
            "answers": [{"text": [f"a{i}", "b"], "start": [1, 2]} for i in range(6)],
            "kind": ["x", "x", "x", "y", "y", "y"],
        }
    )
    given.save_to_disk(tmp_path / "set")
    columns = {"task": "kind", "input": "{title} of {year}", "output": "answers.text"}
    tasks = read(tmp_path / "set", columns=columns).tasks
    assert [t.name for t in tasks] == ["x", "y"]
    found = {e.prompt: e.references for t in tasks for s in ("train", "validation", "test") for e in t.split(s)}
    assert found["T4 of 4\n"] == ("a4", "b")
    assert tasks[0].prompt_of({"title": "T9", "year": 9}) == "T9 of 9\n"
    numbers = read(tmp_path / "set", columns={"input": "title", "output": "score"}).tasks[0]
    assert "0.5" in {e.references[0] for s in ("train", "validation", "test") for e in numbers.split(s)}


def test_conversations_are_read(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    given = datasets.Dataset.from_dict({"messages": [turns] * 4, "source": ["web"] * 4, "split": ["train", "test"] * 2})
    given.save_to_disk(tmp_path / "talk")
    with pytest.raises(TaskError, match=r"data set '.*': unknown column 'source' – known: task, input"):
        read(tmp_path / "talk")
    (task,) = read(tmp_path / "talk", columns={"messages": "messages"}).tasks
    assert (len(task.train), task.train[0].messages, task.train[0].references) == (2, (("user", "Hi"),), ("Hello",))


def test_hub_options_are_passed_on(monkeypatch):
    def load_dataset(path, config, *, split=None, revision=None):
        assert (path, config, revision) == ("org/name", "small", "v2")
        return [rows(7)] if split else datasets.DatasetDict({"train": rows(8), "test": rows(2)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {"path": "org/name", "config": "small", "revision": "v2", "columns": COLUMNS}
    (task,) = load_suite(DatasetSpec(**hub)).tasks
    assert (task.name, len(task.train), task.test[0].id) == ("small", 8, "test-0")
    (task,) = load_suite(DatasetSpec(**hub, split="train[:7]")).tasks
    assert (len(task.train), task.test[0].id[:10]) == (5, "train[:7]-")


def test_one_split_for_two_roles_is_refused(tmp_path):
    datasets.DatasetDict({s: rows(3) for s in ("train", "validation")}).save_to_disk(tmp_path / "set")
    split = {"train": "train", "validation": "validation", "test": "validation"}
    message = (
        r"`split` reads 'validation' as validation and as test, .* leave validation out, or cut 'validation' in two"
    )
    with pytest.raises(TaskError, match=message):
        read(tmp_path / "set", columns=COLUMNS, split=split)
    del split["validation"]
    assert len(read(tmp_path / "set", columns=COLUMNS, split=split).tasks[0].test) == 3


def test_a_row_with_a_split_of_its_own_in_a_split_is_refused(tmp_path):
    datasets.DatasetDict({s: rows(3, split=["train"] * 3) for s in ("train", "test")}).save_to_disk(tmp_path / "set")
    with pytest.raises(
        TaskError, match=r"row 1: the row has a split, 'train', in split 'train' .*columns: {split: null}"
    ):
        read(tmp_path / "set", columns=COLUMNS)
    assert read(tmp_path / "set", columns={**COLUMNS, "split": None}).tasks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "columns 'input' and 'output' are missing; it has question, answer, a row needs input, output .or",
        ),
        ({"columns": {"input": "question", "output": "anser"}}, "column 'anser' .is it 'answer'.. is missing"),
        (
            {"columns": {"inputs": "question"}},
            "unknown column 'inputs' in `columns` of family 'dataset' – did you mean",
        ),
    ],
)
def test_columns_are_checked_before_rows_are_read(tmp_path, options, message):
    rows().to_parquet(tmp_path / "a.parquet")
    with pytest.raises(TaskError, match=message):
        read(tmp_path / "a.parquet", **options)


def test_empty_answers_are_refused_with_their_row(tmp_path):
    rows(3, answer=["a", "", None]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        TaskError, match=r"a\.parquet', row 2: 'answer' is empty|a\.parquet', .*row 2: 'answer' is empty"
    ):
        read(tmp_path / "a.parquet", columns=COLUMNS)


def test_what_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("the hub cannot be reached\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = r"cannot load data set 'nobody/nothing': the hub cannot be reached; give a hub id, a folder"
    with pytest.raises(TaskError, match=message):
        read("nobody/nothing")
    monkeypatch.undo()
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(TaskError, match=r"cannot load data set '.*a\.parquet'"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(TaskError, match=r"a\.csv: family 'dataset' reads \.parquet and \.arrow files; files and chat"):
        read(tmp_path / "a.csv")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        TaskError, match=r"family 'dataset' needs the package datasets: pip install 'dyads\[datasets\]'"
    ):
        read(tmp_path / "a.parquet")

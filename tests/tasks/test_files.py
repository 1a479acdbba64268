# SPDX-License-Identifier: Apache-2.0
"""The files family: tasks from JSONL and CSV, and errors that name file and line."""

from __future__ import annotations

import json

import pytest

from dyads.errors import TaskError
from dyads.tasks import load_suite
from dyads.tasks.files import FilesSpec


def write(path, *rows, newline="\n", start=""):
    text = newline.join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows)
    path.write_bytes((start + text).encode("utf-8"))
    return path


def row(k=0, task="t", split="train", **changes):
    fields = {"task": task, "input": f"question {k}", "output": f"answer {k}", "split": split, **changes}
    return {k: v for k, v in fields.items() if v is not None}


def read(path, **options):
    return load_suite(FilesSpec(path=path, **options))


def test_jsonl_with_splits_and_several_references(tmp_path):
    path = write(
        tmp_path / "a.jsonl", row(0), "", row(1, split="test", output=["x", " y "]), row(2, split="validation")
    )
    (task,) = read(path).tasks
    assert (task.train[0].prompt, task.train[0].references) == ("question 0\n", ("answer 0",))
    assert (task.test[0].id, task.test[0].references) == ("a.jsonl:3", ("x", " y "))
    assert len(task.validation) == 1
    assert task.metrics == ("rouge_l", "exact_match")


def test_csv_with_quotes_line_breaks_and_lists(tmp_path):
    path = write(
        tmp_path / "a.csv",
        "task,split,input,output",
        't,train,"one, two\nthree",[note] plain',
        "",
        't,test,four,"[""a"", ""b""]"',
    )
    (task,) = read(path).tasks
    assert (task.train[0].prompt, task.train[0].references) == ("one, two\nthree\n", ("[note] plain",))
    assert (task.test[0].id, task.test[0].references) == ("a.csv:5", ("a", "b"))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path, suffix):
    rows = [row(0), row(1, split="test")] if suffix == "jsonl" else [
        "task,input,output,split", "t,question 0,answer 0,train", "t,question 1,answer 1,test"
    ]  # fmt: skip
    (task,) = read(write(tmp_path / f"a.{suffix}", *rows, "", newline="\r\n", start="\ufeff")).tasks
    assert (task.name, task.train[0].prompt, task.test[0].references) == ("t", "question 0\n", ("answer 1",))


def test_unicode_line_separators_do_not_end_a_json_line(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0, input="a\u2028b"), row(1, split="test"))
    assert read(path).tasks[0].train[0].prompt == "a\u2028b\n"


def test_without_splits_eight_ninths_train_and_equal_prompts_stay_together(tmp_path):
    path = write(tmp_path / "a.jsonl", *(row(k % 25, split=None, output=str(k)) for k in range(100)))
    (task,) = read(path).tasks
    assert (len(task.train), len(task.validation), len(task.test)) == (84, 8, 8)
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.test + task.validation}
    assert read(path).tasks == read(path).tasks
    assert read(path, seed=1).tasks != read(path).tasks


def test_a_folder_and_a_list_of_files_are_read_in_order(tmp_path):
    write(tmp_path / "b.jsonl", row(0, "second"), row(1, "second", "test"))
    write(tmp_path / "a.csv", "task,input,output,split", "first,x,y,train", "first,z,y,test", "second,q,y,test")
    (tmp_path / "notes.txt").write_text("not a task", encoding="utf-8")
    assert [(t.name, len(t.test)) for t in read(tmp_path).tasks] == [("first", 1), ("second", 2)]
    paths = (tmp_path / "b.jsonl", tmp_path / "a.csv")
    assert [t.name for t in read(paths).tasks] == ["second", "first"]


def test_instructions_come_from_the_recipe_or_a_column(tmp_path):
    path = write(
        tmp_path / "a.jsonl", row(0), row(1, split="test"), row(2, "u", instruction="Do."), row(3, "u", "test")
    )
    by_recipe, by_column = read(path, instructions={"t": " Answer.\n"}).tasks
    assert by_recipe.train[0].prompt == "Answer.\n\nquestion 0\n"
    assert by_column.train[0].prompt == "Do.\n\nquestion 2\n"


def test_a_metric_becomes_the_headline(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0, metric="accuracy"), row(1, split="test"))
    assert read(path).tasks[0].metrics == ("accuracy", "rouge_l", "exact_match")


def test_a_json_text_that_looks_like_a_list_is_one_reference(tmp_path):
    rows = [row(0, output='["a", "b"]'), row(1, split="test", output='["a", b')]
    (task,) = read(write(tmp_path / "a.jsonl", *rows)).tasks
    assert (task.train[0].references, task.test[0].references) == (('["a", "b"]',), ('["a", b',))


def test_texts_are_kept_as_they_are(tmp_path):
    code = "    return x\n\n"
    path = write(tmp_path / "a.jsonl", row(0, input="  f = ", output=code), row(1, split="test", output=["\ty", " "]))
    (task,) = read(path).tasks
    assert (task.train[0].prompt, task.train[0].references) == ("  f = ", (code,))
    assert task.test[0].references == ("\ty",)
    path = write(tmp_path / "a.csv", "task,input,output", *(f't,{k},"  x = {k}"' for k in range(9)))
    assert {e.references[0][:4] for e in read(path).tasks[0].train} == {"  x "}


def test_an_instruction_without_input_is_a_prompt(tmp_path):
    rows = [
        row(0, instruction="Name a colour.", input="", split="train"),
        row(1, instruction="Translate.", input="chat", split="test"),
        row(2, instruction="Name a fruit.", input=None, split="test"),
    ]
    (task,) = read(write(tmp_path / "a.jsonl", *rows)).tasks
    assert task.train[0].prompt == "Name a colour.\n"
    assert [e.prompt for e in task.test] == ["Translate.\n\nchat\n", "Name a fruit.\n"]
    assert task.prompt_of({"instruction": "Name a colour."}) == task.train[0].prompt
    path = write(tmp_path / "a.csv", "task,instruction,input,output,split", "t,Say.,,x,train", "t,Do.,a,x,test")
    assert read(path).tasks[0].train[0].prompt == "Say.\n"


def test_a_task_renders_later_rows_with_the_instruction_that_its_rows_share(tmp_path):
    rows = [row(0, instruction="Opposite?"), row(1, split="test", instruction="Opposite?")]
    (task,) = read(write(tmp_path / "a.jsonl", *rows)).tasks
    assert task.prompt_of({"input": "question 0"}) == task.train[0].prompt
    (task,) = read(write(tmp_path / "a.jsonl", row(0), row(1, split="test")), instructions="Opposite?").tasks
    assert task.prompt_of({"input": "hot"}) == "Opposite?\n\nhot\n"
    rows[1]["instruction"] = "Another?"
    (task,) = read(write(tmp_path / "a.jsonl", *rows)).tasks
    with pytest.raises(TaskError, match="task 't': column 'instruction' is missing"):
        task.prompt_of({"input": "hot"})


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_an_unknown_column_is_refused_with_the_nearest_name(tmp_path, suffix):
    rows = [row(0, split=None, spilt="test")] if suffix == "jsonl" else ["task,input,output,spilt", "t,x,y,test"]
    path = write(tmp_path / f"a.{suffix}", *rows)
    with pytest.raises(TaskError, match=r"line 1: unknown column 'spilt' – did you mean 'split'\?"):
        read(path)
    with pytest.raises(
        TaskError, match=r"column 'spilt' is not read – did you mean 'split'\? .*split: spilt or split: null"
    ):
        read(path, columns={"input": "input"})
    with pytest.raises(TaskError, match="unknown column 'imput' in `columns` of family 'files' – did you mean 'input'"):
        read(path, columns={"imput": "input"})


def test_only_the_first_row_need_not_be_the_misspelt_one(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0), row(1, split="test"), row(2, matric="accuracy"))
    with pytest.raises(TaskError, match=r"line 3: unknown column 'matric' – did you mean 'metric'\?"):
        read(path)
    path = write(tmp_path / "a.jsonl", row(0), row(1, messages=[]))
    with pytest.raises(TaskError, match=r"unknown column 'messages' .*family: chat reads messages"):
        read(path)


def test_columns_are_renamed_joined_and_left_out(tmp_path):
    rows = [
        {"kind": "t", "title": f"T{k}", "text": "{x}", "answer": "yes", "labels": 3, "source": "web", "split": split}
        for k, split in enumerate(("train", "test"))
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    columns = {"task": "kind", "input": "{title}: {text}", "output": "answer", "labels": None}
    suite = read(path, columns=columns)
    assert suite.tasks[0].test[0].prompt == "T1: {x}\n"
    assert suite.tasks[0].prompt_of({"title": "a", "text": "b"}) == "a: b\n"
    assert suite.notes == ("columns that are not read: source",)
    with pytest.raises(TaskError, match=r"line 1: 'labels' must be a list of texts .*`columns: \{labels: null\}`"):
        read(path, columns={k: v for k, v in columns.items() if v})
    with pytest.raises(TaskError, match="column 'name' is missing; it has kind, title"):
        read(path, columns={**columns, "input": "{name}: {text}"})
    with pytest.raises(TaskError, match="double a brace"):
        read(path, columns={**columns, "input": "{title: {text}"})


def test_labels_come_from_a_column_or_for_the_whole_file(tmp_path):
    rows = [row(k, output=("no", "yes ")[k % 2], split=("train", "test")[k > 1]) for k in range(4)]
    for options, given in (({}, [{**r, "labels": ["no", "yes"]} for r in rows]), ({"labels": ["no", "yes"]}, rows)):
        (task,) = read(write(tmp_path / "a.jsonl", *given), **options).tasks
        assert (task.labels, task.metric) == (("no", "yes"), "accuracy")
        assert task.train[1].references == ("yes",)
    lines = [
        "task,input,output,split,labels",
        *(f't,{k},no,{r["split"]},"[""no"", ""yes""]"' for k, r in enumerate(rows)),
    ]
    assert read(write(tmp_path / "a.csv", *lines)).tasks[0].labels == ("no", "yes")
    (task,) = read(write(tmp_path / "a.jsonl", {**rows[0], "labels": ["no", "yes"]}, *rows[1:])).tasks
    assert task.labels == ("no", "yes")  # one row may speak for its task
    assert read(write(tmp_path / "a.jsonl", *rows), labels=["no", "yes "]).tasks[0].labels == ("no", "yes")


def test_contradicting_labels_and_metrics_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0, labels=["a", "b"]), row(1, split="test", labels=["b", "a"]))
    with pytest.raises(
        TaskError, match=r'task \'t\' has two lists of labels: \["a", "b"\] in .*, line 1 and .*, line 2'
    ):
        read(path)
    path = write(tmp_path / "a.jsonl", row(0, labels=["a", "b"], output="a"), row(1, split="test", output="b"))
    with pytest.raises(TaskError, match=r"line 1: 'labels' is .* in the recipe; choose one"):
        read(path, labels={"t": ["b", "a"]})
    path = write(tmp_path / "a.jsonl", row(0, metric="accuracy"), row(1, split="test"))
    with pytest.raises(TaskError, match=r"line 1: 'metric' is 'accuracy', but 'exact_match' in the recipe; choose one"):
        read(path, metric="exact_match")
    with pytest.raises(TaskError, match=r"tasks\.metric: unknown metric 'exact' – did you mean 'exact_match'"):
        read(write(tmp_path / "a.jsonl", row(0), row(1, split="test")), metric="exact")


def test_a_metric_for_the_whole_file_or_by_task(tmp_path):
    rows = [row(0, task), row(1, task, "test")] if (task := "t") else []
    path = write(tmp_path / "a.jsonl", *rows, row(0, "u"), row(1, "u", "test"))
    assert [t.metric for t in read(path, metric="exact_match").tasks] == ["exact_match"] * 2
    assert [t.metric for t in read(path, metric={"u": "accuracy"}).tasks] == ["rouge_l", "accuracy"]
    assert [t.metric for t in read(path, metric={"*": "accuracy", "u": "exact_match"}).tasks] == [
        "accuracy",
        "exact_match",
    ]
    with pytest.raises(TaskError, match="metric for an unknown task 'v'"):
        read(path, metric={"v": "accuracy"})


def test_references_that_the_metric_cannot_score_are_noted(tmp_path):
    rows = [row(0, output="北京"), row(1, split="test", output="北京"), row(2, split="test", output="Paris")]
    path = write(tmp_path / "a.jsonl", *rows)
    (note,) = read(path).notes
    assert note.startswith('t: metric rouge_l cannot score 1 of 2 test references: it does not read "北京"')
    assert read(path, metric="exact_match").notes == (note,)  # reported beside it
    rows = [row(0), row(1, split="test", output="five")]
    assert "numeric_match cannot score 1 of 1" in read(write(path, *rows), metric="numeric_match").notes[0]


def test_a_large_cell_is_read(tmp_path):
    path = write(tmp_path / "a.csv", "task,input,output,split", f"t,{'x' * 300_000},y,train", "t,z,y,test")
    assert len(read(path).tasks[0].train[0].prompt) == 300_001


def test_half_of_a_surrogate_pair_is_refused(tmp_path):
    line = '{"task": "t", "input": "x\\ud83d", "output": "y", "split": "train"}'
    with pytest.raises(TaskError, match=r"a\.jsonl, line 2.*half of a surrogate pair"):
        read(write(tmp_path / "a.jsonl", row(0, split="test"), line))
    whole = line.replace("\\ud83d", "\\ud83d\\ude00")
    assert read(write(tmp_path / "a.jsonl", row(0, split="test"), whole)).tasks[0].train[0].prompt == "x😀\n"


def test_limits_take_a_part_of_every_split(tmp_path):
    path = write(tmp_path / "a.jsonl", *(row(k, split=None) for k in range(100)))
    (task,) = read(path, train_per_task=7, test_per_task=3, validation_per_task=2).tasks
    assert (len(task.train), len(task.validation), len(task.test)) == (7, 2, 3)
    (larger,) = read(path, train_per_task=9).tasks
    assert set(task.train) < set(larger.train)


def test_own_ids_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0, id=7), row(1, split="test", id="x"))
    assert [e.id for s in ("train", "test") for e in read(path).tasks[0].split(s)] == ["7", "x"]


def test_files_of_the_same_name_in_two_folders_do_not_collide(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", row(0, input=name), row(1, split="test"))
    (task,) = read((tmp_path / "one", tmp_path / "two")).tasks
    assert len({e.id for e in task.train + task.test}) == 4


def test_test_prompts_that_were_trained_on_are_noted(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0), row(0, split="test"), row(1, split="test"))
    assert read(path).notes == ("t: 1 of 2 test prompts are also in its train split",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0), '{"task": "t", '], r"a\.jsonl, line 2, column \d+: not valid JSON"),
        (["[1, 2]"], r"a\.jsonl, line 1: expected a JSON object, got \[1, 2\]; write one JSON object per line"),
        (
            [{"task": "t", "question": "x", "output": "y"}],
            r"1: column 'input' is missing; it has task, question, .* needs task, .*; `columns: \{input: NAME\}`",
        ),
        (
            [{"task": "t", "inpt": "x", "answer": "y"}],
            r"columns 'input' \(is it 'inpt'\?\) and 'output' are missing; .* `columns: \{input: inpt, output: NAME\}`",
        ),
        (
            [{"messages": []}],
            "columns 'task' and .* are missing; it has messages, a row .*; family: chat reads messages$",
        ),
        ([row(0), row(1, split="tset")], "line 2: unknown split 'tset' – did you mean 'test'"),
        ([row(0), row(1, split="dev")], "line 2: unknown split 'dev' – known: train, validation, test$"),
        ([row(0, output=3)], "line 1: 'output' must be a text or a list of texts, got 3; put numbers in quotes"),
        ([row(0, output=["a", None])], "'output' must be a text or a list of texts"),
        ([row(0, output=[])], "line 1: 'output' is empty"),
        ([row(0, input=" ")], "line 1: 'input' is empty"),
        ([row(0, input=["a"])], "line 1: 'input' must be text"),
        ([row(0, task="a/b"), row(1, "a/b", "test")], "'a/b' has the character '/'"),
        ([row(0)], "task 't' has no test rows"),
        ([row(0, split="test")], "task 't' has no train rows"),
        ([row(0), row(1, split="test"), row(2, split=None)], "line 3: task 't' has a split in 2 rows and none in 1"),
        ([row(0, split=None), row(1, split=None)], "cannot be divided into 3 splits"),
        ([row(0, id="x"), row(1, split="test", id="x")], "line 2: id 'x' of task 't' is already used in .*, line 1"),
        ([row(0, metric="bleu"), row(1, split="test")], "line 1: unknown metric 'bleu'"),
        ([row(0, metric="accuracy"), row(1, split="test", metric="rouge_l")], "two metrics: 'accuracy' in .*, line 1"),
        ([""], "no rows in"),
    ],
)
def test_bad_rows_are_refused_with_their_place(tmp_path, rows, message):
    with pytest.raises(TaskError, match=message):
        read(write(tmp_path / "a.jsonl", *rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["task,question,output", "t,x,y"],
            r"a\.csv, line 1: column 'input' is missing; it has task, question, output",
        ),
        (["task,input,output", "t,x,y", "t,x,y,z"], "line 3: 4 cells for 3 columns"),
        (["task,input,output", 't,x,"[""a"", b"'], "line 2: output starts like a JSON list but is not valid JSON"),
        (["task,input,output", 't,"x,y'], r"a\.csv, line 2: not valid CSV: unexpected end of data"),
        (["task,input,output,input", "t,x,y,z"], "line 1: a column name is used twice"),
        (["task;input;output", "t;x;y"], "line 1: cells are separated by ';'; save the file with commas$"),
        (["task\tinput\toutput", "t\tx\ty"], r"line 1: cells are separated by '\\t'; save the file with commas$"),
        ([""], "columns 'task' and 'input' and 'output' are missing; it has none, a row needs task, input, output$"),
    ],
)
def test_bad_csv_is_refused_with_its_place(tmp_path, rows, message):
    with pytest.raises(TaskError, match=message):
        read(write(tmp_path / "a.csv", *rows))


def test_a_label_without_rows_and_names_that_differ_in_case_are_noted(tmp_path):
    labels = ["no", "yes", "maybe"]
    rows = [
        row(n, task, "train" if n < 10 else "test", output=["no", "yes"][n % 2], labels=labels)
        for task in ("t", "T")
        for n in range(12)
    ]
    assert read(write(tmp_path / "a.jsonl", *rows)).notes == (
        "tasks 't' and 'T' differ in case alone",
        "t: no row has the label maybe",
        "T: no row has the label maybe",
    )
    rows[0]["output"] = rows[12]["output"] = "maybe"
    rows = [{**r, "task": {"t": "t", "T": "u"}[r["task"]]} for r in rows]
    assert read(write(tmp_path / "a.jsonl", *rows)).notes == ()


def test_a_missing_file_is_named_with_the_folder_that_was_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=rf"^no file or folder mine\.jsonl in {tmp_path}$"):
        read("mine.jsonl")


def test_bad_paths_are_refused(tmp_path):
    with pytest.raises(TaskError, match=r"no file or folder .*nowhere\.jsonl$"):
        read(tmp_path / "nowhere.jsonl")
    (tmp_path / "my-chats.jsonl").touch()
    with pytest.raises(TaskError, match=r"my-chat\.jsonl – did you mean 'my-chats\.jsonl'\?$"):
        read(tmp_path / "my-chat.jsonl")
    (tmp_path / "my-chats.jsonl").unlink()
    with pytest.raises(TaskError, match="no file or folder"):
        read(tmp_path / "a\0b" / "c.jsonl")
    with pytest.raises(TaskError, match=r"no \*.jsonl or \*.csv file in folder"):
        read(tmp_path)
    with pytest.raises(TaskError, match=r"`path` has a file twice: .*c.jsonl; give every file once"):
        read((write(tmp_path / "c.jsonl", row(0)), tmp_path / "c.jsonl"))
    with pytest.raises(TaskError, match=r"cannot read '.txt' files; use .jsonl or .csv"):
        read(write(tmp_path / "a.txt", row(0)))
    (tmp_path / "b.jsonl").write_bytes(b"\xff")
    with pytest.raises(TaskError, match=r"b.jsonl: not UTF-8 text \(byte 0\)"):
        read(tmp_path / "b.jsonl")


def test_instructions_are_checked(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0, instruction="Do."), row(1, split="test"))
    with pytest.raises(TaskError, match=r"instructions for an unknown task 'tt' – (did you mean|known:)"):
        read(path, instructions={"tt": "x"})
    with pytest.raises(TaskError, match=r"line 1: task 't' has an instruction in this row and in `instructions`"):
        read(path, instructions={"t": "x"})


def test_a_task_with_labels_is_a_classification(tmp_path):
    rows = [row(0, output="no", instruction="Is it so?"), row(1, split="test", output="yes")]
    (task,) = read(write(tmp_path / "a.jsonl", *rows), labels={"t": ["no", "yes"]}).tasks
    assert (task.labels, task.metrics, task.description) == (("no", "yes"), ("accuracy", "macro_f1"), "Is it so?")
    assert (task.target(task.test[0]), task.test[0].segments) == (1, (rows[1]["input"],))
    rows[1]["metric"] = "f1"
    (task,) = read(write(tmp_path / "a.jsonl", *rows), labels={"t": ["no", "yes"]}).tasks
    assert task.metrics == ("f1", "accuracy", "macro_f1")


def test_labels_are_checked(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0, output="no"), row(1, split="test", output="maybe"))
    with pytest.raises(TaskError, match=r"labels for an unknown task 'tt' – (did you mean|known:)"):
        read(path, labels={"tt": ["no", "yes"]})
    with pytest.raises(TaskError, match=r"answer 'maybe' of example 'a.jsonl:2' is not one of its labels no, yes"):
        read(path, labels={"t": ["no", "yes"]})

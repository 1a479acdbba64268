# SPDX-License-Identifier: Apache-2.0
"""The chat family: conversations in two forms, instructions, and rows that are refused with their place."""

from __future__ import annotations

import json

import pytest

from dyads.errors import TaskError
from dyads.tasks import load_suite
from dyads.tasks.chat import ChatSpec


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path, **options):
    return load_suite(ChatSpec(path=path, **options))


def conversation(*texts, key="messages", system=None, **changes):
    roles = ("user", "assistant") if key == "messages" else ("human", "gpt")
    names = ("role", "content") if key == "messages" else ("from", "value")
    turns = [dict(zip(names, (roles[i % 2], text), strict=True)) for i, text in enumerate(texts)]
    first = [] if system is None else [dict(zip(names, ("system", system), strict=True))]
    return {key: [*first, *turns], **changes}


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_the_last_answer_is_the_reference_and_the_turns_before_are_the_prompt(tmp_path, key):
    rows = [
        conversation("Hi", "Hello", "Who?", " Me.\n", key=key, system="Be short.", split="test"),
        conversation("Hi", "Hello", key=key, split="train"),
    ]
    (task,) = read(write(tmp_path / "talk.jsonl", *rows)).tasks
    (example,) = task.test
    assert (task.name, example.id, example.references) == ("talk", "talk.jsonl:1", (" Me.\n",))
    assert [tuple(m) for m in example.messages] == [
        ("system", "Be short."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Who?")
    ]  # fmt: skip
    assert example.prompt == "Be short.\n\nUser: Hi\nAssistant: Hello\nUser: Who?\nAssistant: "
    assert (task.train[0].prompt, task.train[0].messages) == ("Hi\n", (("user", "Hi"),))


def test_alpacas_rows_are_read_from_a_list_with_or_without_input(tmp_path):
    rows = [
        {"instruction": "Name a colour.", "input": "", "output": "Red."},
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
    ]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([{**row, "split": s} for s in ("train", "test") for row in rows]))
    (task,) = read(path).tasks
    assert [e.prompt for e in task.train] == ["Name a colour.\n", "Translate.\n\nchat\n"]
    assert [e.messages for e in task.test] == [(("user", "Name a colour."),), (("user", "Translate.\n\nchat"),)]
    assert task.test[0].id == "alpaca.json:3"
    assert task.prompt_of({"instruction": "Name a colour."}) == task.train[0].prompt


def test_tasks_come_from_a_column_and_other_columns_are_chosen(tmp_path):
    rows = [{**conversation("a", "b", task=t, split=s), "n": 1} for t in "xy" for s in ("train", "test")]
    path = write(tmp_path / "a.jsonl", *[{("talk" if k == "messages" else k): v for k, v in r.items()} for r in rows])
    with pytest.raises(
        TaskError, match="line 1: columns 'input' and 'output' are missing; it has talk, task, split, n"
    ):
        read(path)
    suite = read(path, columns={"messages": "talk"})
    assert [t.name for t in suite.tasks] == ["x", "y"]
    assert suite.notes[0] == "columns that are not read: n"


def test_a_system_message_may_be_a_column_and_is_the_default_of_later_questions(tmp_path):
    rows = [conversation("Hi", "Hello", system_="x", split=s) for s in ("train", "test")]
    rows = [{"system": "Be kind.", **{k: v for k, v in row.items() if k != "system_"}} for row in rows]
    (task,) = read(write(tmp_path / "a.jsonl", *rows)).tasks
    assert task.test[0].messages == (("system", "Be kind."), ("user", "Hi"))
    assert task.template.example({"input": "Hi"}).messages == task.test[0].messages
    asked = {"messages": [{"role": "user", "content": "Hi"}]}
    assert task.template.example(asked).messages == task.test[0].messages
    with pytest.raises(TaskError, match=r"the last message must be the user's, got one of the assistant"):
        task.template.example(conversation("Hi", "Hello"))
    rows[0]["messages"].insert(0, {"role": "system", "content": "Other."})
    with pytest.raises(TaskError, match="line 1: a system message is in 'messages' and in 'system'; leave one out"):
        read(write(tmp_path / "a.jsonl", *rows))


def test_turns_after_the_last_answer_are_left_out_with_a_note(tmp_path):
    rows = [conversation("Hi", "Hello", "Bye", split="train"), conversation("Hi", "Hello", split="test")]
    suite = read(write(tmp_path / "a.jsonl", *rows))
    assert suite.tasks[0].train[0].references == ("Hello",)
    assert suite.notes[0] == "1 conversations go on after their last answer; those turns are left out"


def test_conversations_and_instructions_may_share_a_file(tmp_path):
    rows = [conversation("Hi", "Hello", split="train"), {"instruction": "Say hi.", "output": "Hi.", "split": "test"}]
    (task,) = read(write(tmp_path / "a.jsonl", *rows)).tasks
    assert (task.train[0].messages, task.test[0].messages) == ((("user", "Hi"),), (("user", "Say hi."),))


def test_an_empty_cell_is_no_conversation(tmp_path):
    lines = [
        "messages,instruction,output,split",
        '"[{""role"": ""user"", ""content"": ""Hi""}, {""role"": ""assistant"", ""content"": ""Hello""}]",,,train',
        ",Say hi.,Hi.,test",
    ]
    (task,) = read(write(tmp_path / "a.csv", *lines)).tasks
    assert (task.train[0].messages, task.test[0].messages) == ((("user", "Hi"),), (("user", "Say hi."),))
    rows = [
        conversation("Hi", "Hello", split="train"),
        {"messages": [], "input": "Hm", "output": "Hi.", "split": "test"},
    ]
    assert read(write(tmp_path / "a.jsonl", *rows)).tasks[0].test[0].prompt == "Hm\n"


def test_instructions_are_refused_where_conversations_do_not_read_them(tmp_path):
    path = write(tmp_path / "a.jsonl", *(conversation(f"Hi {i}", "Hello") for i in range(10)))
    message = (
        r"line 1: task 'a' has `instructions`, which a conversation does not read: write them as its system message"
    )
    with pytest.raises(TaskError, match=message):
        read(path, instructions="Answer like a pirate.")


def test_text_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]}
    (task,) = read(write(tmp_path / "a.jsonl", {**row, "split": "train"}, {**row, "split": "test"})).tasks
    assert task.train[0].prompt == "a b\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"line 1: messages must be a list of {role, content}, got \[\]"),
        ({"messages": "hi"}, "line 1: the text is not a JSON list of messages"),
        (conversation("Hi"), "line 1: the messages have no answer of the assistant to the user"),
        (conversation("Hi", " "), "line 1: the last answer of the assistant is empty"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "line 1: the messages have no turn of the user"),
        ({"messages": [{"role": "bott", "content": "Hi"}]}, 'line 1, message 1: unknown role "bott"; the roles are'),
        ({"messages": [{"role": "tool", "content": "3"}]}, "calls of tools are not supported"),
        ({"messages": [{"role": "user", "text": "Hi"}]}, "line 1, message 1: 'content' is missing; it has role, text"),
        ({"messages": [{"from": "human", "content": "Hi"}]}, "message 1: 'value' is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: 'content' must be text, got null"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'content' must be text"),
        ({"messages": ["Hi"]}, 'message 1: expected {role, content}, got "Hi"'),
        (
            {"messages": [*conversation("a", "b")["messages"], {"role": "system", "content": "x"}]},
            "line 1, message 3: a system message must be the first",
        ),
        (conversation("Hi", "a", output="b"), "line 1: 'messages' and 'output' are both given; leave one out"),
        (
            {**conversation("Hi", "a"), **conversation("b", "c", key="conversations")},
            "messages and conversations are both",
        ),
        (conversation("Hi", "a", spilt="test"), "unknown column 'spilt' – did you mean 'split'"),
        (
            {"instruction": "x"},
            r"column 'output' is missing; .* a row needs output .or messages.; `columns: {output: NAME}`",
        ),
        ({"instruction": "x", "ouput": "y"}, r"column 'output' \(is it 'ouput'\?\) is missing; it has"),
        ({"instruction": " ", "output": "y"}, "line 1: 'input' is empty"),
        (
            {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]},
            "surrogate pair",
        ),
    ],
)
def test_bad_rows_are_refused_with_their_place(tmp_path, row, message):
    with pytest.raises(TaskError, match=message):
        read(write(tmp_path / "a.jsonl", row))

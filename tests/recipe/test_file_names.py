# SPDX-License-Identifier: Apache-2.0
"""Names of tasks and runs: a task has a file that every system can hold; a run's name that some cannot is refused."""

from __future__ import annotations

import re

import pytest

from dyads.errors import ConfigError, RunError, TaskError, did_you_mean, shortened, similar_name, visible, visible_in
from dyads.recipe.file_names import file_name, name_mistake
from dyads.recipe.load import parse_recipe

TASKS = [
    *("rte", "RTE", "Rte", "qa/hard: ü", "名" * 27, "名" * 28, "名" * 300, "a" * 300, "a" * 299 + "b", "é", "e\u0301"),
    *(
        "con",
        "con.txt",
        "NUL",
        "aux",
        "com1",
        "COM¹",
        "lpt9.a",
        "..",
        ".",
        ".hidden",
        "a.",
        "a ",
        " a",
        " ",
        "",
        "-a",
        "~a",
    ),
    *(
        "a\x1b[31m",
        "a\x00b",
        "a\u202eb",
        "a\nb",
        "a\\b",
        "a*b?",
        "a%62",
        "%",
        "a|b",
        "<a>",
        '"',
        "ab~cd",
        "A~" + "0" * 16,
    ),
]


def test_every_task_has_a_file_of_its_own_that_every_system_can_hold() -> None:
    files = [file_name(task) for task in TASKS]
    assert len({name.lower() for name in files}) == len(TASKS), "macOS and Windows do not distinguish case"
    for task, name in zip(TASKS, files, strict=True):
        assert re.fullmatch(r"[ -~]{1,120}", name), task
        assert not re.search(r'[/\\:*?"<>|]', name), task
        assert name == name.strip(" ."), task
        assert not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name.lower()), task


def test_ordinary_names_stay_readable() -> None:
    assert file_name("task1391_winogrande (easy)") == "task1391_winogrande (easy)"
    assert file_name("qa/hard: ü") == "qa%2Fhard%3A %C3%BC"
    assert re.fullmatch(r"SST-2~[0-9a-f]{16}", file_name("SST-2"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/b", "no /"),
        ("a.", "no . or space at the end"),
        ("-a", "no . or - at the start"),
        ("a\x1b[31mb", "control characters"),
        ("a\u202eb", "direction of text"),
        ("CON", "reserved on Windows"),
        ("nul.txt", "reserved on Windows"),
        ("名" * 61, "183 bytes"),
        ("", "empty"),
    ],
)
def test_a_name_that_is_no_folder_everywhere_is_refused(name: str, reason: str) -> None:
    assert reason in (name_mistake(name) or "")


@pytest.mark.parametrize("name", ["a", "MoRE 16 whole", "mode-16x4", "名前", "con-seed0", "a" * 180, "ü"])
def test_other_names_are_accepted(name: str) -> None:
    assert name_mistake(name) is None


def test_a_recipe_with_such_a_name_is_refused_before_anything_is_trained() -> None:
    text = 'name: "a\\u202eb"\nmodel: {name: tiny}\nmethod: {name: mode}\ntasks: {family: starter}\n'
    with pytest.raises(ConfigError, match=r"x:1: 'name': 'a\\u202eb' cannot name a folder: it has control characters"):
        parse_recipe(text, "x")


# --- text that is safe to print ---------------------------------------------------------------------------------------


def test_messages_show_control_and_bidirectional_characters_and_shorten_long_words() -> None:
    message = str(TaskError("task 'a\x1b[2J\u202eb\ud800\U000e0041\x85' \nnext"))
    assert message == r"task 'a\u001b[2J\u202eb\ud800\udb40\udc41\u0085' " + "\nnext"
    long = str(RunError(f"unknown key '{'k' * 5000}' in 'a.yaml'"))
    assert len(long) < 260
    assert long.startswith("unknown key 'kkk")
    assert long.endswith("kkk' in 'a.yaml'")


def test_values_are_shortened_whatever_they_are() -> None:
    assert shortened("abc") == "abc"
    assert shortened("a b " * 1000, 20) == "a b a b a b a…b a b "
    assert len(shortened({"a" * 999: [list(range(999))] * 999}, 60)) <= 60
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    assert len(shortened(nested)) <= 200
    assert len(shortened(10**5000)) <= 200


def test_suggestions_are_short_and_quick() -> None:
    assert did_you_mean("k" * 100_000, ["name"]) == " – known: name"
    assert len(did_you_mean("x", ["y" * 5000] * 50)) < 1500


def test_every_text_in_a_value_is_made_visible() -> None:
    assert visible_in({"a\x1b": ["b\u2066", ("c", 1)]}) == {r"a\u001b": [r"b\u2066", ("c", 1)]}
    assert visible("a\nb\t", keep="\n") == "a\nb\\u0009"


@pytest.mark.parametrize(
    ("missing", "there", "near"),
    [
        ("mode-seed1", ["mode-seed0", "more-seed0"], "mode-seed0"),
        ("MoDE-4x2-sed0", ["MoDE-4x2-seed0", "MoDE-4x4-seed0"], "MoDE-4x2-seed0"),
        ("lora-9-seed0", ["LoRA-9-seed0"], "LoRA-9-seed0"),
        ("lora 9-seed0", ["lora-9-seed0"], "lora-9-seed0"),
        ("my-task.jsonl", ["my-tasks.jsonl", "other.jsonl"], "my-tasks.jsonl"),
        ("LoRA-9-seed0", ["MoRE-9-seed0", "MoDE-4x2-seed0"], None),
        ("LoRA-16x4-seed1", ["MoRE-16x4-seed1"], None),
        ("mine-seed0", ["base-seed0", "new-seed0", "more-seed0"], None),
        ("lora.yaml", ["more.yaml", "mode.yaml"], None),
        ("x" * 100_000, ["x"], None),
        ("mode", [], None),
    ],
)
def test_a_missing_file_or_folder_names_those_that_differ_by_a_slip(
    missing: str, there: list[str], near: str | None
) -> None:
    assert similar_name(missing, there) == (f" – did you mean '{near}'?" if near else "")

# SPDX-License-Identifier: Apache-2.0
"""Several families in one recipe: ids in the order of the list, and errors with the entry's line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dyads.errors import ConfigError, TaskError
from dyads.recipe.load import load_recipe, parse_recipe, parse_tasks
from dyads.recipe.spec import Recipe
from dyads.recipe.yaml_source import read_text
from dyads.tasks import load
from dyads.training.train import train

FIRST = {"family": "starter", "names": ["last_word", "first_word"], "train_per_task": 4, "test_per_task": 2}
HEAD = "name: x\nmodel: {name: tiny}\nmethod: {name: lora, r: 4}\n"
TASKS = "tasks:\n- family: starter\n  names: [first_word]\n- family: files\n  path: own.jsonl\n"


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    rows = [{"task": t, "input": "river", "output": "stone", "split": s} for t in "ba" for s in ("train", "test")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"family": "files", "path": str(tmp_path / "own.jsonl")}


def test_tasks_are_in_the_order_of_the_entries(own: dict[str, str]) -> None:
    names = [task.name for task in load([FIRST, own])]
    assert names == ["last_word", "first_word", "b", "a"]
    third = {**FIRST, "names": ["initials"]}
    assert [task.name for task in load([FIRST, own, third])][:4] == names  # a new entry moves no id
    assert load([FIRST, own])[:2] == load(FIRST)


def test_a_task_of_two_entries_is_refused(own: dict[str, str]) -> None:
    with pytest.raises(
        TaskError, match="entries 1 and 3 of `tasks` both have a task 'first_word'; rename one or leave"
    ):
        load([FIRST, own, {**FIRST, "names": ["first_word"]}])


def test_a_recipe_with_a_list_is_read_back_equal() -> None:
    recipe = parse_recipe(HEAD + TASKS, "r.yaml")
    assert recipe.tasks.family == "starter + files"
    assert parse_recipe(recipe.resolved_yaml(), "again") == recipe
    assert parse_tasks(read_text(TASKS, "r.yaml"), "r.yaml", lambda key: "") == recipe.tasks


def test_a_list_replaces_the_tasks_of_an_extended_recipe(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(HEAD + "tasks: {family: starter, seed: 3}\n")
    (tmp_path / "r.yaml").write_text("extends: base.yaml\n" + TASKS)
    assert load_recipe(tmp_path / "r.yaml", check=False).tasks == parse_recipe(HEAD + TASKS, "r.yaml").tasks


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("  labels: {t: no}\n", r"^r\.yaml:9: 'tasks\.1\.labels\.t' must be a list, got 'no'$"),
        ("  spath: x\n", r"^r\.yaml:9: unknown key 'spath' for tasks of family 'files' – did you mean 'path'\?$"),
        ("- {family: strter}\n", r"^r\.yaml:\d: unknown task family 'strter' – did you mean 'starter'\?$"),
        ("- {family: sni}\n", r"'tasks\.2\.path' is missing"),
        ("- 3\n", r"'tasks\.2': tasks must be a section such as .*, or a list of such, got 3"),
        ("- {names: x}\n", r"'tasks\.2': tasks needs a key 'family'"),
    ],
)
def test_errors_name_the_entry(more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe(HEAD + TASKS + more, "r.yaml")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="tasks is an empty list; name at least one family"):
        parse_recipe(HEAD + "tasks: []\n", "r.yaml")


def test_a_run_learns_tasks_of_several_families(
    tiny: Callable[..., Recipe], own: dict[str, str], tmp_path: Path
) -> None:
    folder = train(tiny("more", tasks=[{**FIRST, "names": ["first_word"]}, own]), tmp_path / "run")
    assert folder.task_names() == ("first_word", "b", "a")
    assert [row["task"] for row in folder.scores()["scores"] if row["headline"]] == ["first_word", "b", "a"]
    assert list(folder.templates()) == ["first_word", "b", "a"]

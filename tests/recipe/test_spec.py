# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML becomes a typed spec, or an error with the line, the key and the value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainingArguments

from dyads.errors import ConfigError
from dyads.recipe.load import load_recipe, parse_recipe, parse_tasks, recipe_keys
from dyads.recipe.recipe_errors import Key
from dyads.recipe.spec import RESERVED, EvaluateSpec, Recipe, differences
from dyads.recipe.yaml_source import read_text
from dyads.tasks import families

LINES = {
    "name": "a",
    "model": "{name: tiny}",
    "method": "{name: zero-shot}",
    "tasks": "{family: starter}",
}


def text(**changed: str) -> str:
    return "".join(f"{key}: {value}\n" for key, value in {**LINES, **changed}.items() if value != "-")


def test_a_recipe_holds_only_its_difference_and_the_resolved_one_reads_back_equal() -> None:
    recipe = parse_recipe(text(method="{name: mode, r: 4, target_modules: [q_proj]}"), "x.yaml")
    assert recipe.train.steps == 1000
    assert recipe.method.options == {"r": 4, "target_modules": ["q_proj"]}
    assert "num_beams: 1" in recipe.resolved_yaml()
    assert parse_recipe(recipe.resolved_yaml(), "again") == recipe


def test_numbers_are_numbers_in_every_notation() -> None:
    for number in ("2e-3", "2E-3", "0.002", "2.e-3", ".2e-2", "+2e-3"):
        assert parse_recipe(text(train=f"{{learning_rate: {number}}}"), "x").train.learning_rate == 0.002, number


def test_text_that_yaml_could_take_for_something_else_stays_text_when_written_and_read() -> None:
    for name in ("no", "on", "010", "1-30", "2024-01-01", "1e3x", "2e-3", "null", "true", "1_000"):
        recipe = parse_recipe(text(name=f"'{name}'"), "x")
        assert parse_recipe(recipe.resolved_yaml(), "again").name == recipe.name == name
    for name in ("no", "2024-01-01", "1_000"):  # a boolean, a date and a number in YAML 1.1
        assert parse_recipe(text(name=name), "x").name == name


def test_whole_floats_count_as_whole_numbers() -> None:
    assert parse_recipe(text(train="{steps: 2e4}"), "x").train.steps == 20_000


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": "{lerning_rate: 1}"}, "x.yaml:5: unknown key 'train.lerning_rate' – did you mean 'learning_rate'?"),
        ({"learning_rate": "1"}, "x.yaml:5: unknown key 'learning_rate' – did you mean 'train.learning_rate'?"),
        ({"train": "{learning_rate: fast}"}, "x.yaml:5: 'train.learning_rate' must be a number, got 'fast'"),
        ({"train": "{learning_rate: 0}"}, "'train.learning_rate' must be greater than 0, got 0"),
        ({"train": "{learning_rate: .nan}"}, "'train.learning_rate' must be a finite number, got nan"),
        ({"train": "{steps: 0}"}, "'train.steps' must be at least 1, got 0"),
        ({"train": "{steps: 1.5}"}, "'train.steps' must be a whole number, got 1.5"),
        ({"train": "{steps: '10'}"}, "'train.steps' must be a whole number, got '10'"),
        ({"train": "{optimizer: adam}"}, "must be 'adamw' or 'adafactor', got 'adam' – did you mean 'adamw'?"),
        (
            {"train": "{report_to: wandbb}"},
            "'train.report_to' must be 'tensorboard', 'wandb' or 'trackio', got 'wandbb' – did you mean 'wandb'?",
        ),
        ({"train": "{report_to: [wandb, tensorbord]}"}, "'train.report_to.1' must be 'tensorboard', 'wandb' or"),
        ({"tasks": "{family: reasoning_gym, difficulty: hard}"}, "'tasks.difficulty' must be a whole number, got"),
        ({"tasks": "{family: reasoning_gym, difficulty: {lcm: x}}"}, "'tasks.difficulty.lcm' must be a whole number"),
        ({"model": "packaged:smollm2-135m"}, "got 'packaged:smollm2-135m': write model: {name: packaged:smollm2-135m}"),
        (
            {"method": "lora"},
            "'method' must be a section of `key: value` lines, got 'lora': write method: {name: lora}",
        ),
        ({"tasks": "my.jsonl"}, "tasks must be a section such as {family: files, path: my.jsonl}, or a list of such"),
        ({"tasks": "''"}, "tasks must be a section such as"),
        ({"train": "3"}, "'train' must be a section of `key: value` lines, got 3"),
        ({"train": "{batch_size: 16, gradient_accumulation: 3}"}, "batch_size 16 cannot be cut into 3 equal parts"),
        ({"train": "{warmup: 2.5}"}, "warmup 2.5 is neither a share below 1 nor a whole number of steps"),
        ({"train": "{warmup: 50, steps: 10}"}, "warmup 50 is longer than the whole training (10 steps)"),
        ({"train": "{validation_steps: 5}"}, "validation_steps is 5, but validation_limit is null"),
        ({"train": "{trainer: {seed: 3}}"}, "trainer.seed cannot be passed on: set the recipe's 'seed'"),
        ({"model": "{name: 3}"}, "'model.name' must be text (put it in quotes), got 3"),
        ({"model": "-"}, "x.yaml: 'model' is missing (The frozen base model)"),
        ({"model": "{dtype: float32}"}, "'model.name' is missing (A hub id, a folder"),
        ({"method": "{name: majority, r: 4}"}, "majority trains nothing and takes no options, got r"),
        ({"tasks": "{family: strter}"}, "unknown task family 'strter' – did you mean 'starter'?"),
        ({"tasks": "{family: starter, nams: [a]}"}, "unknown key 'nams' for tasks of family 'starter'"),
        ({"tasks": "{family: starter, seed: x}"}, "x.yaml:4: 'tasks.seed' must be a whole number, got 'x'"),
        ({"mixture": "{kind: unifrom}"}, "got 'unifrom' – did you mean 'uniform'?"),
        ({"name": "a/b"}, "'a/b' cannot name a folder"),
        ({"seed": "-1"}, "'seed' must be at least 0, got -1"),
    ],
)
def test_a_mistake_is_named_with_its_line_its_key_and_its_value(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_recipe(text(**changed), "x.yaml")


def test_several_mistakes_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text(train="{stepz: 1, optimizer: sgd}"), "x.yaml")
    assert str(caught.value).splitlines() == [
        "x.yaml: 2 mistakes",
        "  x.yaml:5: 'train.optimizer' must be 'adamw' or 'adafactor', got 'sgd'",
        "  x.yaml:5: unknown key 'train.stepz' – did you mean 'steps'?",
    ]


@pytest.mark.parametrize(
    ("changed", "mistakes"),
    [
        ({"method": "-", "train": "{stepz: 3}"}, ["'method' is missing", "unknown key 'train.stepz'"]),
        ({"method": "{name: moed}", "seed": "-1"}, ["'seed' must be at least 0", "unknown method 'moed'"]),
        (
            {"method": "{name: mode, num_expert: 4, rr: 2}", "train": "{stepz: 3}"},
            ["unknown key 'train.stepz'", "unknown option 'num_expert'", "unknown option 'rr'"],
        ),
        (
            {"method": "{name: mode, r: 0, num_experts: -1, group_size: 3}", "train": "{trainer: {foo: 1, bar: 2}}"},
            ["mode: r must be", "mode: num_experts must be", "'train.trainer.foo'", "'train.trainer.bar'"],
        ),
        (
            {"method": "{name: mode, r: 6, group_size: 4, load_balance: -1}"},
            ["load_balance must not be", "group_size must"],
        ),
        (
            {"train": "{batch_size: 3, gradient_accumulation: 2, warmup: 2.5, trainer: {seed: 1, max_steps: 2}}"},
            ["batch_size 3 cannot be cut", "warmup 2.5 is neither", "trainer.seed cannot", "trainer.max_steps cannot"],
        ),
        (
            {"evaluate": "{num_beams: 2, answer: likelihood, nearest_by: description}"},
            ["num_beams is 2, but", "nearest_by is for unseen: nearest"],
        ),
        (
            {"tasks": "{family: starter, nams: [a], sed: 1, test_per_task: 0}"},
            ["'tasks.test_per_task' must be at least", "unknown key 'nams' for tasks", "unknown key 'sed' for tasks"],
        ),
        (
            {"tasks": "[{family: strter}, {family: glue, files: 1, pth: x}]"},
            ["unknown task family 'strter'", "unknown key 'files' for tasks of family 'glue'", "unknown key 'pth'"],
        ),
        ({"model": "{nam: a}"}, ["'model.name' is missing", "unknown key 'model.nam'"]),
        (  # a contradiction beside a wrong value and an unknown key of its section, and one of another section
            {
                "train": "{learning_rate: fast, stepz: 3, validation_steps: 5, compile: true, "
                "gradient_checkpointing: true}",
                "evaluate": "{length_normalise: true}",
            },
            [
                "'train.learning_rate' must be a number",
                "unknown key 'train.stepz'",
                "length_normalise is for",
                "compile is true, but gradient_checkpointing",
                "validation_steps is 5, but validation_limit is null",
            ],
        ),
        ({"name": "a/b", "train": "{warmup: 2.5}", "seed": "x"}, ["'a/b' cannot", "'seed' must", "warmup 2.5 is"]),
        (
            {"model": "{name: a, quantization: {quant_method: quanto, load_in_4bit: true, quant_type: x}}"},
            ["bitsandbytes needs either", "torchao needs a quant_type"],
        ),
    ],
)
def test_all_mistakes_are_reported_at_once(changed: dict[str, str], mistakes: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text(**changed))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{path}: {len(mistakes)} mistakes"
    for line, mistake in zip(lines, mistakes, strict=True):
        assert mistake in line
        assert re.match(rf"  {re.escape(str(path))}:\d: ", line) or "missing" in mistake


def test_a_contradiction_with_a_wrong_value_waits_until_the_value_is_mended() -> None:
    with pytest.raises(ConfigError, match=r"^x\.yaml:5: 'train\.steps' must be a whole number, got 'ten'$"):
        parse_recipe(text(train="{steps: ten, warmup: 3000}"), "x.yaml")  # the steps may be 3,000 or more


def test_of_many_mistakes_the_first_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text(method="{name: mode, " + ", ".join(f"o{i}: 1" for i in range(3000)) + "}"))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    first, *lines, last = str(caught.value).splitlines()
    assert (first, len(lines), last) == (f"{path}: more than 20 mistakes", 20, "  …")


def test_the_whole_recipe_names_its_mistakes_too(recipe: Callable[..., Recipe]) -> None:
    wrong = recipe("a", method="moed", train={"trainer": {"foo": 1}})
    with pytest.raises(ConfigError, match=r"unknown method 'moed' – .*; unknown key 'train\.trainer\.foo'"):
        wrong.check()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("seed: 1\nseed: 2\n", "x.yaml:2: 'seed' is given twice (first in line 1)"),
        ("train: [\n", "x.yaml:2: not valid YAML"),
        ("- a\n", "x.yaml: a recipe is a list of `key: value` lines, got list"),
        ("a: &a\n  b: *a\n", "an alias that contains itself"),
        ("", "x.yaml: 4 mistakes"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(raw: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_recipe(raw, "x.yaml")


def test_overrides_are_yaml_and_reach_deep(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text(train="{steps: 5, batch_size: 4}"))
    sets = ["train.steps=7", "train.learning_rate=1e-4", "tasks.names=[initials]", "evaluate.limit=null", "name=a=b"]
    recipe = load_recipe(path, sets)
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.learning_rate) == (7, 4, 1e-4)
    assert recipe.resolved()["tasks"]["names"] == ["initials"]
    assert recipe.name == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=7", "--set train.stepz=7: unknown key 'train.stepz' – did you mean 'steps'?"),
        ("train.steps=-7", "--set train.steps=-7: 'train.steps' must be at least 1, got -7"),
        ("train.steps", "--set train.steps: write it as key=value"),
        ("train..steps=1", "write it as key=value"),
        ("name.first=1", "--set name.first=1: 'name' must be text"),
        ("train.steps=[", "--set train.steps=[: not valid YAML"),
    ],
)
def test_an_override_that_is_wrong_is_quoted(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text())
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(path, [override])


def test_a_recipe_extends_another_and_errors_name_the_file_that_said_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(text(train="{steps: 5, learning_rate: 1e-3}"))
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("extends: ../base.yaml\nname: b\ntrain: {learning_rate: 2e-3}\n")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.train.steps, recipe.train.learning_rate) == ("b", 5, 2e-3)
    (tmp_path / "base.yaml").write_text(text(train="{steps: 0}"))
    with pytest.raises(ConfigError, match=r"base\.yaml:5: 'train\.steps' must be at least 1"):
        load_recipe(child)


def test_recipes_that_extend_one_another_share_the_limit_of_size(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n#{'-' * 50_000}\n")
    with pytest.raises(
        ConfigError, match=r"2\.yaml \(extended by .*1\.yaml\): recipes .* more than 131,072 characters"
    ):
        load_recipe(tmp_path / "0.yaml")


def test_recipes_that_extend_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"in a circle: a\.yaml → b\.yaml → a\.yaml"):
        load_recipe(tmp_path / "a.yaml")


def test_a_recipe_without_a_method_says_how_to_add_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nmodel: {name: m}\ntasks: {family: starter}\n")
    added = (
        r"'method' is missing \(.*\): add --set method\.name=lora, or `method: \{name: lora\}`; see `dyads methods`$"
    )
    with pytest.raises(ConfigError, match=added):
        load_recipe(tmp_path / "a.yaml")
    assert load_recipe(tmp_path / "a.yaml", ["method.name=lora"]).method.name == "lora"
    (tmp_path / "a.yaml").write_text("name: a\nmethod: {name: lora}\ntasks: {family: starter}\n")
    with pytest.raises(ConfigError, match=r"'model' is missing \(The frozen base model\)$"):
        load_recipe(tmp_path / "a.yaml")


def test_a_missing_recipe_is_named_with_the_one_that_extends_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no recipe at '.*none\.yaml'$"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    with pytest.raises(ConfigError, match=r"there is no recipe at '.*mine\.yml' – did you mean 'mine\.yaml'\?$"):
        load_recipe(tmp_path / "mine.yml")
    (tmp_path / "a.yaml").write_text("extends: none.yaml\n")
    with pytest.raises(ConfigError, match=r"none\.yaml' \(extended by .*a\.yaml\)"):
        load_recipe(tmp_path / "a.yaml")


def test_another_method_brings_its_own_options_and_the_same_one_adds_to_them(tmp_path: Path) -> None:
    base, other, same = tmp_path / "base.yaml", tmp_path / "other.yaml", tmp_path / "same.yaml"
    base.write_text(text(method="{name: mode, r: 4, num_experts: 16}"))
    other.write_text("extends: base.yaml\nmethod: {name: lora, r: 34}\n")
    same.write_text("extends: base.yaml\nmethod: {r: 2}\n")
    assert load_recipe(other, check=False).method.options == {"r": 34}
    assert load_recipe(same, check=False).method.options == {"r": 2, "num_experts": 16}
    assert load_recipe(base, ["method.name=zero-shot"]).method.options == {}


def test_methods_options_and_passed_on_keys_are_checked_when_a_recipe_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for changed, message in [
        ({"method": "{name: moed}"}, "r.yaml:3: unknown method 'moed' – did you mean"),
        ({"method": "{name: zeroshot}"}, "did you mean 'zero-shot'"),
        ({"method": "{name: mode, num_expert: 4}"}, "'num_expert' of method 'mode' – did you mean 'num_experts'"),
        ({"method": "{name: mode, r: 0}"}, "r must be a whole number, 1 or more, got 0"),
        ({"train": "{trainer: {adam_beta: 1}}"}, "r.yaml:5: unknown key 'train.trainer.adam_beta' – did you mean"),
        ({"train": "{trainer: {foo: 1}}"}, "'train.trainer.foo': it is no field of TrainingArguments"),
    ]:
        path.write_text(text(**changed))
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_recipe(path)
    path.write_text(text(method="{name: more, r: 4}", train="{trainer: {adam_beta1: 0.8}}"))
    assert load_recipe(path).method.peft_config(["rte", "cola"]).tasks == ["rte", "cola"]


def test_a_field_of_training_arguments_that_the_recipe_sets_is_refused_with_the_key_to_use() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    older = {"group_by_length", "warmup_ratio"}  # fields of earlier versions, which recipes may still name
    assert RESERVED.keys() - fields <= older
    for key, reason in RESERVED.items():
        with pytest.raises(
            ConfigError, match=re.escape(f"x.yaml:5: 'train': trainer.{key} cannot be passed on: {reason}")
        ):
            parse_recipe(text(train=f"{{trainer: {{{key}: 1}}}}"), "x.yaml")
        for named in re.findall(r"'([a-z_.]+)'", reason):
            assert named in {key.name for key in recipe_keys()} | {"mixture"}, reason


def test_recipes_cannot_be_changed(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe("a").train.steps = 3


def test_warm_up_is_a_share_below_one_and_steps_above() -> None:
    assert parse_recipe(text(train="{warmup: 0.1, steps: 50}"), "x").train.warmup_steps == 5
    assert parse_recipe(text(train="{warmup: 10, steps: 50}"), "x").train.warmup_steps == 10


def test_a_larger_limit_keeps_the_instances_of_a_smaller_one() -> None:
    small, large = EvaluateSpec(limit=10).pick(100), EvaluateSpec(limit=30).pick(100)
    assert len(small) == 10
    assert set(small) < set(large)
    assert small == sorted(small) != list(range(10))
    assert EvaluateSpec(limit=30).pick(5) == EvaluateSpec().pick(5) == [0, 1, 2, 3, 4]


def test_differences_are_dotted_keys_with_both_values(recipe: Callable[..., Recipe]) -> None:
    a, b = recipe("a", train={"steps": 5}), recipe("a", method="zero-shot", train={"steps": 6})
    found = differences(a.resolved(), b.resolved())
    assert found == {"method.name": ("mode", "zero-shot"), "method.r": (4, None), "train.steps": (5, 6)}


def test_every_key_of_a_recipe_is_explained() -> None:
    keys = list(recipe_keys())
    assert Key("train.steps", "Optimizer steps", "1000") in keys
    assert [key.name for key in keys if not key.help or "\n" in key.help] == []


def test_keys_that_allow_a_few_values_list_them() -> None:
    choices = {key.name: key.choices for key in recipe_keys() if len(key.choices) > 1}
    protocols = [key.choices for key in recipe_keys() if key.name == "tasks.protocol"]
    assert choices["mixture.kind"] == ("proportional", "temperature", "uniform", "balanced", "round_robin")
    assert choices["train.lr_scheduler"] == ("linear", "cosine", "constant")
    assert choices["train.report_to"] == ("tensorboard", "wandb", "trackio")
    assert choices["model.attention"][-1] == "null"  # it may be left out
    assert choices["tasks.family"] == tuple(families())
    assert ("mode", "official") in protocols  # every family has its own keys


def test_extends_is_a_key_of_recipe_files_only(tmp_path: Path) -> None:
    assert "extends" in [key.name for key in recipe_keys()]
    path = tmp_path / "r.yaml"
    path.write_text(text() + "extend: base.yaml\n")
    with pytest.raises(ConfigError, match="unknown key 'extend' – did you mean 'extends'"):
        load_recipe(path)
    path.write_text(text())
    with pytest.raises(ConfigError, match="--set extends=b: unknown key 'extends' – only a recipe file can have it"):
        load_recipe(path, ["extends=b"])


def test_tasks_are_parsed_without_the_rest_of_a_recipe() -> None:
    layer = read_text("name: 3\ntasks: {family: starter, seed: 4}\n", "x.yaml")
    assert parse_tasks(layer, "x.yaml", str).model_dump()["seed"] == 4
    with pytest.raises(ConfigError, match=r"^x\.yaml:1: 'tasks\.path' is missing \(.*\): say path$"):
        parse_tasks(read_text("tasks: {family: sni}\n", "x.yaml"), "x.yaml", lambda key: f"say {key}")
    with pytest.raises(ConfigError, match=r"^x\.yaml: 'tasks' is missing"):
        parse_tasks(read_text("name: a\n", "x.yaml"), "x.yaml", str)

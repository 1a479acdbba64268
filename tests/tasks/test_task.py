# SPDX-License-Identifier: Apache-2.0
"""Tasks and families: ids, splits, fingerprints, scores, the registry, errors."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib import import_module

import pytest
from pydantic import BaseModel

from dyads.errors import ConfigError, TaskError
from dyads.tasks import (
    Example,
    Suite,
    Task,
    TasksSpec,
    families,
    load,
    register_family,
)
from dyads.tasks import family as family_module
from dyads.tasks.starter import StarterSpec


def tiny(**changes):
    fields = {
        "name": "colours",
        "version": 1,
        "train": (Example("a", "sky?", ("blue",)),),
        "validation": (),
        "test": (Example("b", "grass?", ("green", "a green")), Example("c", "snow?", ("white",))),
        "metric": "rouge_l",
        "metrics": ("rouge_l", "exact_match"),
    }
    return Task(**{**fields, **changes})


def labelled(*references, labels=("no", "yes"), **changes):
    examples = tuple(Example(str(i), f"prompt {i}", (r,)) for i, r in enumerate(references))
    fields = {"train": (), "test": examples, "metric": "accuracy", "metrics": ("accuracy",), "labels": labels}
    return tiny(**{**fields, **changes})


def test_a_head_learns_the_class_id_or_the_exact_number():
    task = labelled("yes", "no")
    assert [task.target(e) for e in task.test] == [1, 0]
    task = labelled(labels=(), regression=True, test=(Example("a", "p", ("4.8", "4.75")), Example("b", "p", ("1",))))
    assert [task.target(e) for e in task.test] == [4.75, 1.0]
    with pytest.raises(TaskError, match="task 'colours' has neither labels nor numbers, so no head"):
        tiny().target(tiny().test[0])


def test_choices_are_the_examples_own_or_the_labels():
    few, all_ = Example("a", "p", ("b",), choices=("a", "b")), Example("b", "p", ("c",))
    task = labelled(test=(few, all_), labels=("a", "b", "c"))
    assert (task.choices(few), task.choices(all_)) == (("a", "b"), ("a", "b", "c"))
    assert tiny().choices(tiny().test[0]) == ()


def test_label_metrics_see_the_labels_of_their_task():
    task = labelled("yes", "yes", "no", "no", metric="f1", metrics=("f1", "matthews", "macro_f1", "accuracy"))
    scores = {s.metric: s for s in task.score(["yes", "no", "no", "no"], task.test)}
    assert scores["f1"].value == pytest.approx(200 / 3)
    assert scores["macro_f1"].value == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)
    assert (scores["f1"].values, len(scores["accuracy"].values)) == ((), 4)


def test_the_fingerprint_of_a_task_does_not_change_with_what_heads_read():
    bare = tiny()
    dressed = tiny(
        test=tuple(replace(e, segments=("a", "b"), choices=(*e.references, "no"), group="g") for e in bare.test),
        description="What colour?",
    )
    assert dressed.fingerprint() == bare.fingerprint() == "e420efd0da11"


def test_scores_carry_task_version_metric_and_instances():
    rouge, exact = tiny(version=3).score(["a green", "black"], tiny().test)
    assert (rouge.task, rouge.version, rouge.metric, rouge.value, rouge.n) == ("colours", 3, "rouge_l", 50.0, 2)
    assert (exact.metric, exact.values, exact.higher_is_better) == ("exact_match", (100.0, 0.0), True)


def test_part_of_a_split_can_be_scored():
    assert [s.n for s in tiny().score(["white"], tiny().test[1:])] == [1, 1]


def test_a_fingerprint_follows_the_texts_of_its_split_only():
    assert tiny().fingerprint() == tiny(train=(), name="other").fingerprint("test")
    assert tiny().fingerprint() != tiny(test=tiny().test[:1]).fingerprint()
    assert len(tiny().fingerprint()) == 12
    first, second = (tiny(validation=(Example("d", "sea?", (answer,)),)) for answer in ("blue", "green"))
    assert first.fingerprint("validation") != second.fingerprint("validation")
    assert first.fingerprint() == second.fingerprint()
    with pytest.raises(TaskError, match=r"unknown split 'tset' of task 'colours' – did you mean 'test'\?"):
        tiny().fingerprint("tset")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Example("x", "p", ()), "example 'x' has no reference"),
        (lambda: tiny(name=" "), "a task has an empty name"),
        (lambda: tiny(name="a/b"), "'a/b' has the character '/'"),
        (lambda: tiny(name="..hidden"), "starts with a dot"),
        (lambda: tiny(version=0), "version starts at 1, got 0"),
        (lambda: tiny(metric="rouge"), "headline metric 'rouge' must be the first of"),
        (lambda: tiny(metrics=("rouge_l", "bleu")), "unknown metric 'bleu'"),
        (lambda: tiny(validation=(Example("a", "p", ("r",)),)), r"id 'a' is used twice \(in train and validation\)"),
        (
            lambda: Example("x", "p", ("r",), segments=("a", "b", "c")),
            "example 'x' has 3 segments: an encoder reads one",
        ),
        (lambda: Example("x", "p", ("r",), choices=("r",)), r"needs two or more different choices, got \['r'\]"),
        (lambda: Example("x", "p", ("r",), choices=("r", "r")), "two or more different choices"),
        (lambda: Example("x", "p", ("r",), choices=("a", "b")), "the reference 'r' is not one of its choices a, b"),
        (lambda: labelled("maybe"), "task 'colours': answer 'maybe' of example '0' is not one of its labels no, yes"),
        (lambda: labelled("no", labels=("no",)), r"needs two or more labels that differ .*, got \['no'\]"),
        (lambda: labelled("no", labels=("no", "No ")), "needs two or more labels that differ in more than case"),
        (
            lambda: labelled(test=(Example("a", "p", ("no",), choices=("no", "none")),)),
            "answer 'none' of example 'a' is not one of its labels",
        ),
        (lambda: labelled("no", regression=True), "has both labels and regression: leave out `labels` or `regression`"),
        (
            lambda: labelled("four", labels=(), regression=True),
            "reference 'four' of example '0' is not a number, as regression needs",
        ),
        (lambda: labelled("nan", labels=(), regression=True), "reference 'nan' of example '0' is not a number"),
        (
            lambda: labelled("no", labels=(), metric="f1", metrics=("f1",)),
            "metric 'f1' needs class labels, but the task has none; give it `labels`, or use 'accuracy'",
        ),
        (
            lambda: tiny(metrics=("rouge_l", "group_accuracy")),
            "metric 'group_accuracy' needs groups, but example 'a' has none",
        ),
        (lambda: tiny().split("tests"), "unknown split 'tests' of task 'colours' – did you mean 'test'"),
        (lambda: tiny().score(["x"], tiny().test), "1 predictions for 2 examples"),
        (lambda: tiny().score([], []), "there are no examples to score"),
        (lambda: Suite((tiny(), tiny())), "two tasks have the same name: colours"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(TaskError, match=message):
        make()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "tasks needs a key 'family' – known: "),
        ({"family": "startre"}, "unknown task family 'startre' – did you mean 'starter'"),
        ({"family": "starter", "sed": 1}, "unknown key 'sed' for tasks of family 'starter' – did you mean 'seed'"),
        (
            {"family": "starter", "test_per_task": 0},
            "starter.test_per_task: Input should be greater than or equal to 1",
        ),
    ],
)
def test_a_wrong_spec_is_refused_with_the_way_out(spec, message):
    with pytest.raises(ConfigError, match=message):
        load(spec)


def test_a_recipe_field_picks_the_family_and_survives_being_written_out():
    class Recipe(BaseModel):
        tasks: TasksSpec

    recipe = Recipe.model_validate({"tasks": {"family": "starter", "names": ["initials"], "train_per_task": 3}})
    assert isinstance(recipe.tasks, StarterSpec)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert Recipe(tasks=recipe.tasks) == recipe
    assert [t.name for t in load(recipe.tasks)] == ["initials"]


def test_every_option_of_a_family_has_a_description():
    options = {f"{name}.{key}": field for name, spec in families().items() for key, field in spec.model_fields.items()}
    assert [name for name, field in options.items() if not field.description] == []


def test_the_family_of_the_documentation_is_one_file_that_recipes_find(monkeypatch, tmp_path):
    class Recipe(BaseModel):  # defined, and used, before the family is registered
        tasks: TasksSpec

    assert load(Recipe.model_validate({"tasks": {"family": "starter", "names": ["initials"]}}).tasks)
    monkeypatch.setattr("dyads.tasks.family._FAMILIES", {})
    monkeypatch.syspath_prepend(tmp_path)
    code = family_module.__doc__.partition("changes:\n\n")[2].partition("\n\nRecipes")[0]
    (tmp_path / "parity_family.py").write_text(textwrap.dedent(code) + "\n", encoding="utf-8")
    import_module("parity_family")
    spec = Recipe.model_validate({"tasks": {"family": "parity", "count": 5}}).tasks
    assert (spec.count, type(spec).model_fields["count"].description) == (5, "Number of examples.")
    (task,) = load(spec)
    assert (task.test[0].prompt, task.test[0].references, len(task.train)) == ("Is 0 even? Answer: ", ("yes",), 3)
    with pytest.raises(ConfigError, match=r"tasks: parity\.count: Input should be greater than or equal to 3"):
        load({"family": "parity", "count": 1})


def test_a_name_belongs_to_one_family():
    with pytest.raises(TaskError, match="a task family named 'starter' is already registered: choose another name"):
        register_family(type("Other", (StarterSpec,), {"__annotations__": {}}))


def test_importing_tasks_and_mixture_stays_light():
    heavy = ("torch", "transformers", "datasets", "pandas", "nltk", "scipy", "sklearn")
    code = f"import sys, dyads.tasks, dyads.data.mixture; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

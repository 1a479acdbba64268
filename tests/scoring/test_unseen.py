# SPDX-License-Identifier: Apache-2.0
"""Unseen tasks are refused or get a stand-in, whose answers equal those of the known task; the run is unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch.testing import assert_close

from dyads.cli import main
from dyads.comparing.comparison import compare
from dyads.errors import ConfigError, DyadsError, RoutingError, RunError, TaskError
from dyads.methods import Core
from dyads.models.load import load_model, load_tokenizer
from dyads.recipe.load import parse_recipe
from dyads.recipe.spec import AdaptSpec, EvaluateSpec, Recipe
from dyads.runs.accept import accept
from dyads.runs.folder import RunFolder
from dyads.scoring.answerer import Answerer
from dyads.scoring.evaluate import evaluate, generate
from dyads.scoring.unseen import INPUTS, StandIn, own_tasks
from dyads.tasks import FamilySpec, Suite, Task, load_suite
from dyads.tasks.files import FilesSpec
from dyads.tasks.starter import StarterSpec
from dyads.training.adapt import adapt_recipe
from dyads.training.train import train
from made_runs import write_sni

Tiny = Callable[..., Recipe]
Trained = Callable[..., RunFolder]
KNOWN = ("first_word", "count_words", "has_animal")
OTHERS = StarterSpec(names=("last_word", "no_animal"), test_per_task=4, train_per_task=4)


def files(folder: RunFolder) -> dict[str, bytes]:
    return {str(p.relative_to(folder.path)): p.read_bytes() for p in sorted(folder.path.rglob("*")) if p.is_file()}


def own(folder: RunFolder) -> tuple[Task, ...]:
    return load_suite(folder.recipe().tasks).tasks


def renamed(task: Task) -> Task:
    """The same task by another name; what is scored of it are the training's questions."""
    return replace(task, name=f"new {task.name}", train=task.test, test=task.train)


def answers(folder: RunFolder, task: str) -> list[str]:
    return [row["prediction"] for row in folder.predictions(task)]


# --- policies ---------------------------------------------------------------------------------------------------------


def test_unless_a_policy_is_named_an_unseen_task_is_refused(trained: Trained) -> None:
    folder = trained("more")
    before = files(folder)
    message = (
        r"trained on 3 tasks and does not know 'last_word' – did you mean 'first_word'.*\?; score the tasks that it was"
        r" trained on, or choose a stand-in for others \(evaluate\.unseen: nearest or mean\)$"
    )
    for unseen in (None, "error"):
        with pytest.raises(RunError, match=message):
            evaluate(folder, suite=OTHERS, unseen=unseen, into=folder.path.parent / "new")
    assert files(folder) == before
    assert not (folder.path.parent / "new").exists()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_nearest_answers_as_itself(kind: str, trained: Trained) -> None:
    folder, stand_ins = trained("more", kind), []
    tasks = own(folder)
    evaluate(folder, split="train")
    before = {task.name: answers(folder, task.name) for task in tasks}
    evaluate(
        folder, split="test", suite=Suite(tuple(map(renamed, tasks))), unseen="nearest", on_stand_in=stand_ins.append
    )
    for task, stand_in in zip(tasks, stand_ins, strict=True):
        assert stand_in.task == f"new {task.name}"
        assert stand_in.known == task.name
        assert stand_in.similarity == pytest.approx(1, abs=1e-4)
        assert stand_in.runner_up_similarity < 0.9
        assert answers(folder, stand_in.task) == before[task.name]
    logged = [line for line in folder.log() if line.get("event") == "unseen"]
    assert [line["known"] for line in logged] == [stand_in.known for stand_in in stand_ins]
    assert logged[0].keys() == {"event", "task", "known", "similarity", "runner_up", "runner_up_similarity"}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_similarity_is_of_centred_states_of_the_base_model_alone(kind: str, trained: Trained) -> None:
    folder = trained("more", kind)
    spec = folder.recipe().model
    model, tokenizer = load_model(spec), load_tokenizer(spec.name)
    body = model.get_encoder() if model.config.is_encoder_decoder else model.model

    def vector(texts: list[str]) -> torch.Tensor:
        states = [body(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
        return torch.stack(states).mean(0)

    with torch.no_grad():
        known = torch.stack([vector([e.prompt.strip() for e in task.train[:INPUTS]]) for task in own(folder)])
        unseen = [vector([e.prompt.strip() for e in task.test[:INPUTS]]) for task in OTHERS.load().tasks]
    stand_ins: list[StandIn] = []
    evaluate(folder, suite=OTHERS, limit=2, unseen="nearest", on_stand_in=stand_ins.append)
    for v, stand_in in zip(unseen, stand_ins, strict=True):
        similarities = F.cosine_similarity(v - known.mean(0), known - known.mean(0))
        first, second = similarities.argsort(descending=True)[:2].tolist()
        assert (stand_in.known, stand_in.runner_up) == (KNOWN[first], KNOWN[second])
        assert stand_in.similarity == pytest.approx(float(similarities[first]), abs=1e-4)
        assert stand_in.runner_up_similarity == pytest.approx(float(similarities[second]), abs=1e-4)
    assert str(stand_ins[0]) == (
        f"last_word is unseen: answered as {stand_ins[0].known} (similarity {stand_ins[0].similarity:.2f}; next"
        f" {stand_ins[0].runner_up}, {stand_ins[0].runner_up_similarity:.2f})"
    )


def test_the_nearest_by_description_does_not_depend_on_inputs(trained: Trained) -> None:
    folder, stand_ins = trained("more"), []
    first, count, _ = own(folder)
    new = replace(renamed(first), description=count.description)
    evaluate(folder, suite=Suite((new,)), unseen="nearest", nearest_by="description", on_stand_in=stand_ins.append)
    assert stand_ins[0].known == "count_words"
    assert stand_ins[0].similarity == pytest.approx(1, abs=1e-4)
    message = r"nearest_by 'description' .* but new first_word has none: choose nearest_by: inputs, or unseen: mean$"
    with pytest.raises(TaskError, match=message):
        evaluate(
            folder, suite=Suite((replace(new, description=""),)), unseen="nearest", nearest_by="description", limit=1
        )


def test_mean_is_the_mean_row_for_every_unseen_task(trained: Trained) -> None:
    answerer = Answerer(trained("more"))
    stand_ins = answerer.add_unseen(OTHERS.load().tasks, EvaluateSpec(unseen="mean"))
    assert stand_ins == [StandIn("last_word"), StandIn("no_animal")]
    assert str(stand_ins[0]) == "last_word is unseen: answered with the mean over the known tasks"
    assert answerer.task_names == (*KNOWN, "last_word", "no_animal")
    rows = [p for core in answerer.model.modules() if isinstance(core, Core) for p in core.parameters() if len(p) == 5]
    assert rows
    for row in rows:
        assert_close(row[3], row[:3].mean(0))
        assert torch.equal(row[4], row[3])


def test_known_tasks_beside_unseen_ones_are_answered_as_before(trained: Trained) -> None:
    folder, stand_ins = trained("more"), []
    tasks = own(folder)
    before = {task.name: answers(folder, task.name) for task in tasks}
    evaluate(folder, suite=Suite((renamed(tasks[2]), *tasks)), unseen="mean", on_stand_in=stand_ins.append)
    assert [stand_in.task for stand_in in stand_ins] == ["new has_animal"]
    assert {task.name: answers(folder, task.name) for task in tasks} == before


@pytest.mark.parametrize("method", ["lora", "mode", "majority"])
def test_a_method_that_looks_at_no_task_needs_no_policy(method: str, trained: Trained, tmp_path: Path) -> None:
    folder = trained(method)
    scores = evaluate(folder, suite=OTHERS)
    places = [tmp_path / f"by-{unseen}" for unseen in ("nearest", "mean")]
    for place, unseen in zip(places, ("nearest", "mean"), strict=True):
        again = evaluate(folder, suite=OTHERS, unseen=unseen, into=place, on_stand_in=pytest.fail)
        assert {**again, "seconds": None} == {**scores, "seconds": None}
        assert not any(line.get("event") == "unseen" for line in RunFolder(place).log())


def test_an_encoder_has_no_head_for_an_unseen_task_whatever_the_policy(trained: Trained, pairs: dict[str, Any]) -> None:
    folder = trained("more", "bert")
    task = renamed(load_suite(pairs).tasks[0])
    message = (
        r"has heads for 2 tasks and none for 'new mnli'.*; score the tasks that it was trained on; a head cannot stand"
        r" in for another, but `dyads adapt` learns a new one from a few examples$"
    )
    for unseen in ("error", "nearest", "mean"):
        with pytest.raises(RunError, match=message):
            evaluate(folder, suite=Suite((task,)), unseen=unseen)
        with pytest.raises(ConfigError, match=r"^prompt 1: the run does not know task 'qqp'"):
            generate(folder, ["fox"], ["qqp"], unseen=unseen)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_contradictions_and_unknown_policies_are_refused(trained: Trained, tiny: Tiny, tmp_path: Path) -> None:
    folder = trained("more")
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {"nearest_by": "description"},
            r"cannot evaluate: nearest_by is for unseen: nearest, but unseen is error$",
        ),
        (
            {"nearest_by": "description", "unseen": "mean"},
            r"nearest_by is for unseen: nearest, but unseen is mean$",
        ),
        ({"unseen": "nearst"}, r"cannot evaluate: unseen: Input should be 'error', 'mean' or 'nearest'$"),
    ]
    for how, message in wrong:
        with pytest.raises(ConfigError, match=message):
            evaluate(folder, suite=OTHERS, **how)
    text = tiny("more").resolved_yaml().replace("nearest_by: inputs", "nearest_by: description")
    with pytest.raises(ConfigError, match=r"'evaluate': nearest_by is for unseen: nearest, but unseen is error$"):
        parse_recipe(text, "recipe.yaml")
    with pytest.raises(ConfigError, match="writes a recipe with these tasks: suite must be a FamilySpec, got a Suite"):
        evaluate(folder, suite=OTHERS.load(), into=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_in_hand_names_the_function_that_adds_a_task(trained: Trained) -> None:
    model = Answerer(trained("more")).model
    with pytest.raises(RoutingError, match=r"does not know task 'new'.* \(`dyads\.add_task\(model, 'new'\)` would add"):
        model(input_ids=torch.tensor([[4]]), task="new")


def test_arguments_override_the_policy_of_the_recipe(trained: Trained) -> None:
    folder, stand_ins = trained("more"), []
    config = folder.path / "config.yaml"
    text = config.read_text().replace("unseen: error", "unseen: nearest")
    config.write_text(text.replace("nearest_by: inputs", "nearest_by: description"))
    accept(folder.path)
    for how in ({}, {"unseen": "mean"}):
        evaluate(folder, suite=OTHERS, limit=1, on_stand_in=stand_ins.append, **how)
    assert [stand_in.similarity is None for stand_in in stand_ins] == [False, False, True, True]


def test_without_the_data_of_the_known_tasks_there_is_no_nearest_but_a_mean(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    rows = [
        {"task": task, "input": f"{word} {split}", "output": word, "split": split}
        for task in ("a", "b")
        for word in ("river", "stone")
        for split in ("train", "test")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"family": "files", "path": str(path)}
    folder = train(tiny("more", tasks=tasks, train={"steps": 1}), tmp_path / "run", evaluate=False)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    with pytest.raises(
        RunError, match=r"but the tasks of its recipe lack b: restore their data, or choose unseen: mean$"
    ):
        evaluate(folder, suite=OTHERS, unseen="nearest")
    path.unlink()
    message = rf"which cannot be read: no file or folder {path}; restore their data, or choose unseen: mean$"
    with pytest.raises(RunError, match=message):
        evaluate(folder, suite=OTHERS, unseen="nearest")
    assert evaluate(folder, suite=OTHERS, unseen="mean", limit=1)["scores"]


def test_an_adapted_run_knows_the_tasks_of_the_run_before_it_too(trained: Trained) -> None:
    folder = trained("more")
    adapted = folder.recipe().model_copy(update={"tasks": OTHERS, "adapt": AdaptSpec(run=str(folder.path))})
    assert [task.name for task in own_tasks(adapted)] == [*KNOWN, "last_word", "no_animal"]
    gone = adapted.model_copy(update={"adapt": AdaptSpec(run="no-such-run")})
    with pytest.raises(RunError, match=r"which cannot be read: there is no folder 'no-such-run'; restore their data"):
        own_tasks(gone)


# --- beside the run's own scores --------------------------------------------------------------------------------------


def test_scores_of_other_tasks_stand_beside_the_runs_own_and_can_be_compared(trained: Trained, tmp_path: Path) -> None:
    more, mode = trained("more"), trained("mode")
    before = files(more), files(mode)
    for folder, unseen in ((more, "nearest"), (more, "mean"), (mode, "nearest")):
        scores = evaluate(folder, suite=OTHERS, unseen=unseen, into=tmp_path / "new" / f"{folder.path.name}-{unseen}")
        assert scores["parameters"] == folder.scores()["parameters"]
    assert (files(more), files(mode)) == before
    kept = RunFolder.open(tmp_path / "new" / "more-mean")
    assert sorted(p.name for p in kept.path.iterdir()) == [
        "config.yaml",
        "env.json",
        "log.jsonl",
        "manifest.json",
        "predictions",
        "scores.json",
    ]
    recipe = kept.recipe()
    assert (recipe.name, recipe.tasks, recipe.evaluate.unseen) == ("more-mean", OTHERS, "mean")
    assert kept.task_names() == ("last_word", "no_animal")
    assert {column.label for column in compare([tmp_path / "new"]).columns} == {"more-nearest", "more-mean", "mode"}


def test_scores_without_an_adapter_say_where_it_is_and_are_not_overwritten(trained: Trained, tmp_path: Path) -> None:
    folder, new = trained("mode"), tmp_path / "new"
    evaluate(folder, suite=OTHERS, limit=1, into=new)
    before = files(RunFolder(new))
    elsewhere = RunFolder(Path(os.path.relpath(folder.path)))
    assert evaluate(elsewhere, suite=OTHERS, limit=1, into=new)["scores"], "the same adapter by another path"
    assert files(RunFolder(new)) == before
    with pytest.raises(RunError, match=rf"^'{new}' has scores of the adapter in '{folder.path}' but no adapter: gi"):
        evaluate(RunFolder(new))
    for there in (new, folder.path):  # with another limit than the scores there
        with pytest.raises(RunError, match=rf"^'{there}' already holds a run: choose another --out for these scores$"):
            evaluate(folder, suite=OTHERS, into=there)
    assert evaluate(folder, suite=OTHERS, limit=1, into=new) == RunFolder(new).scores(), "the same command again"
    assert files(RunFolder(new)) == before


def test_another_split_of_the_runs_own_tasks_can_stand_beside_too(trained: Trained, tmp_path: Path) -> None:
    folder = trained("more")
    assert evaluate(folder, split="validation", into=tmp_path / "new")["run"] == "more"
    assert RunFolder(tmp_path / "new").recipe().evaluate.split == "validation"
    assert folder.scores()["split"] == "test"


# --- generating -------------------------------------------------------------------------------------------------------


def test_prompts_of_an_unseen_task_are_answered_as_those_of_the_nearest(trained: Trained) -> None:
    folder, stand_ins = trained("more"), []
    tasks = own(folder)
    prompts = [e.prompt for task in tasks for e in task.train]
    names = [task.name for task in tasks for _ in task.train]
    as_known = generate(folder, prompts, names, max_new_tokens=3)
    as_new = generate(
        folder,
        prompts,
        [f"my {name}" for name in names],
        max_new_tokens=3,
        unseen="nearest",
        on_stand_in=stand_ins.append,
    )
    assert as_new == as_known
    assert [(s.task, s.known) for s in stand_ins] == [(f"my {name}", name) for name in KNOWN]
    assert len({tuple(generate(folder, prompts, [name] * len(prompts), max_new_tokens=3)) for name in KNOWN}) > 1


def test_a_description_or_the_mean_can_stand_for_an_unseen_task(trained: Trained) -> None:
    folder, stand_ins = trained("more"), []
    prompt, short = ["Words: river stone lamp"], {"max_new_tokens": 2}
    for task in own(folder):
        generate(
            folder,
            prompt,
            ["new"],
            **short,
            unseen="nearest",
            description=task.description,
            on_stand_in=stand_ins.append,
        )
    generate(folder, prompt * 2, ["new", "first_word"], **short, unseen="mean", on_stand_in=stand_ins.append)
    assert [stand_in.known for stand_in in stand_ins] == [*KNOWN, None]
    wrong: list[tuple[list[Any], dict[str, Any], str]] = [
        (["new"], {}, r"^prompt 1: the run does not know task 'new'"),
        ([3], {"unseen": "nearest"}, r"^prompt 1: the run does not know task '3'"),
        ([None], {"unseen": "nearest"}, r"^prompt 1 has no task, and the gates of 'more' look at the task"),
        (["new"], {"description": "a"}, r"nearest_by is for unseen: nearest, but unseen is error$"),
        (
            ["new"],
            {"unseen": "nearest", "description": " "},
            r"^the description is empty: describe the task in a sentence",
        ),
        (
            ["new", "newer"],
            {"unseen": "nearest", "description": "a"},
            r"^one description is given, but the prompts are of 2 unseen tasks: new, newer$",
        ),
    ]
    for names, how, message in wrong:
        with pytest.raises(ConfigError, match=message):
            generate(folder, prompt * len(names), names, **how)


def test_where_no_gate_looks_a_policy_lets_any_name_pass(trained: Trained) -> None:
    folder, prompt = trained("lora"), ["Words: river stone lamp"]
    without_task = generate(folder, prompt, [None], max_new_tokens=2)
    assert (
        generate(folder, prompt, ["new"], max_new_tokens=2, unseen="nearest", on_stand_in=pytest.fail) == without_task
    )


def test_a_file_of_ones_own_is_a_suite_of_unseen_tasks(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    rows = [{"task": "new", "input": "river stone", "output": "river", "split": split} for split in ("train", "test")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec: FamilySpec = FilesSpec(path=(path,))
    scores = evaluate(trained("more"), suite=spec, unseen="nearest", into=tmp_path / "new")
    assert [row["task"] for row in scores["scores"] if row["headline"]] == ["new"]
    assert RunFolder(tmp_path / "new").recipe().tasks == spec


# --- tasks of the recipe without training examples --------------------------------------------------------------------


@pytest.fixture
def with_unseen(tmp_path: Path) -> dict[str, Any]:
    """Two tasks to train on, and one that is unseen."""
    return write_sni(tmp_path / "sni")


@pytest.mark.parametrize("policy", ["nearest", "mean"])
@pytest.mark.parametrize("scored", ["all", "unseen"])
def test_a_task_without_training_examples_has_no_row_and_gets_a_stand_in(
    policy: str, scored: str, tiny: Tiny, with_unseen: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tiny(
        "more",
        tasks=with_unseen,
        train={"steps": 1, "validation_limit": 2},
        evaluate={"unseen": policy, "tasks": scored, "limit": 2},
    )
    folder = train(recipe, tmp_path / "run")
    assert folder.task_names() == ("task001_colours", "task002_colours")
    named = [row["task"][:7] for row in folder.scores()["scores"] if row["headline"]]
    assert named == (["task001", "task002", "task003"] if scored == "all" else ["task003"])
    (line,) = [line for line in folder.log() if line.get("event") == "unseen"]
    assert line["task"] == "task003_colours"
    assert line["known"] in (folder.task_names() if policy == "nearest" else (None,))
    (losses,) = [line["tasks"] for line in folder.log() if line.get("event") == "validated"]
    assert set(losses) == set(folder.task_names())
    assert evaluate(folder, suite=OTHERS, unseen=policy, limit=1, into=tmp_path / "more")["scores"]


def test_methods_that_look_at_no_task_answer_an_unseen_one_by_its_name(
    tiny: Tiny, with_unseen: dict[str, Any], tmp_path: Path
) -> None:
    folder = train(
        tiny("mode", tasks=with_unseen, train={"steps": 1}, evaluate={"tasks": "unseen", "limit": 2}), tmp_path / "mode"
    )
    assert {row["task"] for row in folder.scores()["scores"]} == {"task003_colours"}
    assert folder.task_names() == ("task001_colours", "task002_colours", "task003_colours")
    assert len(generate(folder, ["thing"], ["task003_colours"])) == 1
    shown = CliRunner().invoke(main, ["generate", str(folder.path), "--task", "task003_colours", "--input", "thing 7"])
    assert shown.exit_code == 0, shown.output
    assert "no majority" not in str(compare([folder]).notes)


@pytest.mark.parametrize(
    ("method", "how", "message"),
    [
        ("more", {}, r"^task003_colours has no training examples, and the gates of 'more' look at the task: choose a"),
        ("mode", {"split": "validation"}, r"^nothing to score: split 'validation' of task003_colours is empty$"),
        ("majority", {}, r"^there is no majority answer without training examples: task003_colours has none$"),
    ],
)
def test_what_could_not_be_scored_is_refused_before_the_training(
    method: str, how: dict[str, Any], message: str, tiny: Tiny, with_unseen: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tiny(method, tasks=with_unseen, train={"steps": 1}, evaluate={"tasks": "unseen", **how})
    with pytest.raises(DyadsError, match=message):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    if method != "majority":
        assert train(recipe, tmp_path / "run", evaluate=False).has_adapter


def test_scoring_unseen_tasks_alone_needs_one(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("mode", train={"steps": 1}, evaluate={"tasks": "unseen"})
    with pytest.raises(TaskError, match=r"evaluate\.tasks is unseen, but every task has training examples"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(recipe, tmp_path / "run", evaluate=False).has_adapter


def test_a_run_adapts_to_a_suite_with_an_unseen_task(
    trained: Trained, with_unseen: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "new.yaml").write_text(json.dumps({"tasks": with_unseen}))
    overrides = ("train.steps=1", "evaluate.unseen=nearest", "evaluate.limit=1")
    recipe = adapt_recipe(trained("more").path, tmp_path / "new.yaml", {"shots": 4}, overrides)
    folder = train(recipe, tmp_path / "run")
    assert folder.task_names() == (*KNOWN, "task001_colours", "task002_colours")
    assert "task003_colours" not in {task.name for task in own_tasks(recipe)}
    (line,) = [line for line in folder.log() if line.get("event") == "unseen"]
    assert line["task"] == "task003_colours"

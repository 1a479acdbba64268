# SPDX-License-Identifier: Apache-2.0
"""Evaluation of runs: repeatable for any batch size, and refused where adapter, model or tasks do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file, save_file

from dyads.comparing.comparison import compare
from dyads.errors import ConfigError, RunError, TaskError
from dyads.models.packaged import same_model
from dyads.recipe.spec import Recipe
from dyads.runs.accept import accept
from dyads.runs.folder import RunFolder
from dyads.scoring.answerer import Answerer
from dyads.scoring.evaluate import evaluate, generate
from dyads.tasks import Suite, Task, load_suite
from dyads.training.train import train
from dyads.tuner.batch_tasks import BatchTasks

Tiny = Callable[..., Recipe]
Trained = Callable[..., RunFolder]


def files(folder: RunFolder) -> dict[str, bytes]:
    return {str(p.relative_to(folder.path)): p.read_bytes() for p in sorted(folder.path.rglob("*")) if p.is_file()}


def predictions(folder: RunFolder) -> dict[str, list[str]]:
    tasks = [row["task"] for row in folder.scores()["scores"] if row["headline"]]
    return {task: [p["prediction"] for p in folder.predictions(task)] for task in tasks}


def change_model(folder: RunFolder, model: Path) -> None:
    config = folder.path / "config.yaml"
    config.write_text(config.read_text().replace(folder.recipe().model.name, str(model)))
    accept(folder.path)


@pytest.mark.parametrize("method", ["lora", "more", "majority"])
def test_scoring_again_gives_the_same_predictions_and_scores(method: str, trained: Trained) -> None:
    folder = trained(method)
    before, scores = predictions(folder), folder.scores()
    again = evaluate(folder)
    assert predictions(folder) == before
    assert again == folder.scores()
    assert {**again, "seconds": None} == {**scores, "seconds": None}


def test_training_changed_the_answers(trained: Trained) -> None:
    assert len({str(predictions(trained(method))) for method in ("zero-shot", "lora", "mode", "more")}) == 4


@pytest.mark.parametrize("method", ["mode", "more"])
def test_batches_have_no_influence_on_answers(method: str, trained: Trained) -> None:
    folder = trained(method)
    answerer, suite = Answerer(folder), load_suite(folder.recipe().tasks)
    spec, instances = folder.recipe().evaluate, [task.test for task in suite.tasks]
    alone = [[answerer.answer_prompts([e], [task.name], spec, 4)[0] for e in task.test] for task in suite.tasks]
    for size in (1, 3, 99):
        assert answerer.answer(suite.tasks, instances, spec.model_copy(update={"batch_size": size})) == alone
    assert any(len(set(answers)) > 1 for answers in alone), "answers in a wrong order would be seen"


def test_answers_are_those_of_the_models_own_generate(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained("more")
    before, scores = predictions(folder), folder.scores()
    monkeypatch.setattr("dyads.scoring.answerer.refusal", lambda model: "not served")
    evaluate(folder)
    assert predictions(folder) == before
    assert folder.scores()["scores"] == scores["scores"]


def test_beams_are_left_to_the_models_own_generate(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained("more")
    config = folder.path / "config.yaml"
    config.write_text(config.read_text().replace("num_beams: 1", "num_beams: 2"))
    accept(folder.path)
    monkeypatch.setattr("dyads.scoring.answerer.decode", None)
    evaluate(folder)
    assert any(text for texts in predictions(folder).values() for text in texts)


def test_every_task_keeps_its_own_limits(trained: Trained) -> None:
    folder = trained("mode")
    tasks = load_suite(folder.recipe().tasks).tasks
    limited = [replace(task, max_new_tokens=1 + i, max_prompt_tokens=8 + i) for i, task in enumerate(tasks)]
    spec = folder.recipe().evaluate.model_copy(update={"max_new_tokens": None})

    def by_prompts() -> list[list[str]]:
        answerer = Answerer(folder)
        return [answerer.answer_prompts(t.test, [t.name] * 4, spec, 1 + i) for i, t in enumerate(tasks)]

    free = by_prompts()
    folder.write_templates(limited)
    cut = by_prompts()
    assert Answerer(folder).answer(limited, [task.test for task in tasks], spec) == cut
    assert cut != free


def test_a_prompt_is_cut_and_beams_are_searched_as_in_the_evaluation(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained("more")
    tasks = load_suite(folder.recipe().tasks).tasks
    folder.write_templates([replace(task, max_prompt_tokens=5) for task in tasks])
    config = folder.path / "config.yaml"
    config.write_text(config.read_text().replace("num_beams: 1", "num_beams: 2"))
    accept(folder.path)
    read: list[int] = []
    monkeypatch.setattr("dyads.scoring.answerer.decode", None)
    monkeypatch.setattr(
        Answerer, "_write", lambda _, questions, spec, reporter: read.append(spec.num_beams) or questions
    )
    found: Any = generate(folder, tasks[0].test, [tasks[0].name] * 4)
    assert read == [2]
    assert {len(question.prompt) for question in found} == {5}


def test_a_folder_that_holds_something_else_is_refused_before_anything_is_answered(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("buy lamps")
    monkeypatch.setattr("dyads.scoring.evaluate.Answerer", None)
    with pytest.raises(RunError, match="notes' is not empty and holds no run; choose another --out"):
        evaluate(trained("lora"), into=tmp_path / "notes")
    assert (tmp_path / "notes" / "todo.txt").read_text() == "buy lamps"


def test_an_encoder_decoder_is_scored_again_alike(trained: Trained) -> None:
    folder = trained("more", "t5")
    before = predictions(folder)
    evaluate(folder)
    assert predictions(folder) == before
    assert any(text for texts in before.values() for text in texts)


def test_another_split_and_a_limit_replace_the_recipes_own(trained: Trained) -> None:
    folder = trained("mode")
    scores = evaluate(folder, split="validation", limit=2)
    assert scores["split"] == "validation"
    assert {row["n"] for row in scores["scores"]} == {2}
    assert len(folder.predictions("first_word")) == 2
    with pytest.raises(ConfigError, match=r"^cannot evaluate on split 'tset' – did you mean 'test'\?$"):
        evaluate(folder, split="tset")
    with pytest.raises(ConfigError, match=r"^cannot evaluate 0 instances of each task: limit is a whole number"):
        evaluate(folder, limit=0)


def test_an_evaluation_that_is_cut_off_leaves_the_earlier_results(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, score, scored = trained("mode"), Task.score, []
    before = files(folder)

    def cut_off(task: Task, *answers: Any) -> Any:
        scored.append(task.name)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return score(task, *answers)

    monkeypatch.setattr(Task, "score", cut_off)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, split="validation")
    assert files(folder) == before
    monkeypatch.setattr("dyads.scoring.answerer.decode", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, split="validation")
    assert files(folder) == before


def test_other_validation_questions_are_not_compared(tiny: Tiny, tmp_path: Path) -> None:
    splits = ("train", "validation", "test")
    rows = [{"task": "a", "input": f"river {split}", "output": "lamp", "split": split} for split in splits]
    path, runs = tmp_path / "tasks.jsonl", []
    for name, question in (("a", "stone"), ("b", "apple")):
        rows[1]["input"] = question
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = tiny("majority", tasks={"family": "files", "path": str(path)}, evaluate={"split": "validation"})
        runs.append(train(recipe.model_copy(update={"name": name}), tmp_path / name))
    with pytest.raises(RunError, match="task 'a' differs in fingerprint"):
        compare(runs)


def test_micro_is_over_instances_and_macro_over_tasks(tiny: Tiny, tmp_path: Path) -> None:
    rows = [
        *(
            {"task": "a", "input": "apple", "output": "yes", "split": split}
            for split in ("train", "test", "test", "test")
        ),
        *({"task": "b", "input": "apple", "output": "no", "split": split} for split in ("train", "test")),
        {"task": "b", "input": "river", "output": "no", "split": "train"},
    ]
    rows[1]["output"] = rows[2]["output"] = "no"  # majority answers "yes" and is right once in three
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({**row, "id": i}) + "\n" for i, row in enumerate(rows)))
    scores = train(tiny("majority", tasks={"family": "files", "path": str(path)}), tmp_path / "run").scores()
    assert scores["macro"]["headline"] == pytest.approx((100 / 3 + 100) / 2)
    assert scores["micro"]["headline"] == pytest.approx(50.0)


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_gates_get_the_names_of_tasks(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained("more")
    routed: list[Any] = []
    state = BatchTasks.__init__
    monkeypatch.setattr(BatchTasks, "__init__", lambda self, task: routed.append(task) or state(self, task))
    evaluate(folder)
    assert {name for tasks in routed for name in tasks} == set(folder.recipe().tasks.names)


def test_gates_configured_with_num_tasks_know_the_names_too(tiny: Tiny, tmp_path: Path) -> None:
    folder = train(tiny("more", options={"num_tasks": 3}), tmp_path / "run")
    names = Answerer(folder).task_names
    assert names == folder.task_names()
    first, same = (generate(folder, ["Words: river stone"], [task], max_new_tokens=3) for task in (0, names[0]))
    assert first == same
    assert folder.is_scored


def test_tasks_that_the_gates_do_not_know_are_refused_and_the_scores_kept(trained: Trained) -> None:
    folder = trained("more")
    before = files(folder)
    suite = load_suite({"family": "starter", "names": ["first_word", "last_word"], "test_per_task": 2})
    with pytest.raises(RunError, match=r"trained on 3 tasks and does not know 'last_word' – did you mean 'first_word'"):
        evaluate(folder, suite=suite)
    assert files(folder) == before
    evaluate(folder, suite=Suite(suite.tasks[:1]))


def test_a_method_that_looks_at_no_task_answers_any(trained: Trained) -> None:
    folder = trained("mode")
    scores = evaluate(folder, suite=load_suite({"family": "starter", "names": ["last_word"], "test_per_task": 2}))
    assert {row["task"] for row in scores["scores"]} == {"last_word"}


def test_generating_needs_a_task_only_where_gates_look_at_it(trained: Trained) -> None:
    prompts = ["Words: river stone lamp\nHow many words are there?\nAnswer:"] * 2
    first, second = generate(trained("mode"), prompts, [None, None], max_new_tokens=3)
    assert first == second
    more = trained("more")
    with pytest.raises(ConfigError, match=r"prompt 2 has no task, and the gates of 'more' look at the task: name one"):
        generate(more, prompts, ["first_word", None])
    for folder in (more, trained("lora")):
        with pytest.raises(ConfigError, match=r"prompt 2: the run does not know task 'first_wrd' – did you mean 'fir"):
            generate(folder, prompts, ["first_word", "first_wrd"])
        with pytest.raises(ConfigError, match=r"prompt 1: the run does not know task '3' – known: first_word, count"):
            generate(folder, prompts, [3, "first_word"])
    with pytest.raises(ConfigError, match="prompt 2 is empty: there is nothing to answer"):
        generate(more, ["a", "\n"], ["first_word"] * 2)
    with pytest.raises(ConfigError, match="2 prompts, but 1 tasks"):
        generate(more, prompts, ["first_word"])
    mixed = generate(more, prompts, ["first_word", "has_animal"], max_new_tokens=3)
    assert mixed == [generate(more, prompts[:1], [task], max_new_tokens=3)[0] for task in ("first_word", "has_animal")]
    assert mixed == generate(more, prompts, [0, 2], max_new_tokens=3)


# --- adapters and models that do not fit ------------------------------------------------------------------------------


def test_a_run_without_an_adapter_says_how_to_go_on(trained: Trained) -> None:
    folder = trained("mode")
    before = predictions(folder)
    (folder.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(
        RunError, match=r"adapter' has no adapter_model\.safetensors; adapters are read from safetensors"
    ):
        evaluate(folder)
    shutil.rmtree(folder.adapter)
    with pytest.raises(
        RunError, match=r"has no adapter: its training did not end; go on with `dyads train RECIPE --out .* --resume`"
    ):
        evaluate(folder)
    assert predictions(folder) == before


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_truncated_adapter_is_refused(file: str, trained: Trained) -> None:
    folder = trained("mode")
    path = folder.adapter / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RunError, match=rf"adapter' is damaged: {file} has [\d,]+ bytes, not [\d,]+; restore it"):
        evaluate(folder)
    accept(folder.adapter)
    with pytest.raises(RunError, match=r"adapter_config\.json.*: not valid JSON|adapter' is truncated or no adapter"):
        evaluate(folder)


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("lora", {"hidden_size": 48}, "size mismatch"),
        (
            "mode",
            {"num_hidden_layers": 3},
            r"\d+ weights are in one of them only, such as base_model.model.model.layers.2",
        ),
        (
            "mode",
            {"num_hidden_layers": 1},
            r"\d+ weights are in one of them only, such as base_model.model.model.layers.1",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    method: str, changes: dict[str, int], reason: str, trained: Trained, other_llama: Callable[..., Path]
) -> None:
    folder = trained(method)
    change_model(folder, other_llama(**changes))
    before = files(folder)
    with pytest.raises(RunError, match=rf"does not fit model '.*' – it was trained on another one \(.*{reason}"):
        evaluate(folder)
    assert files(folder) == before


def test_an_adapter_of_another_model_of_the_same_shape_is_refused(
    trained: Trained, other_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder, other = trained("lora"), other_llama()
    there = folder.recipe().model.name
    change_model(folder, other)
    before = files(folder)
    with pytest.raises(RunError, match=rf"was trained on '{there}', but config\.yaml names '{other}'; .*base_model_"):
        evaluate(folder)
    assert files(folder) == before
    config = folder.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(there, str(other)))
    accept(folder.path)
    evaluate(folder)  # the way out that the message names
    text = (folder.path / "config.yaml").read_text()
    (folder.path / "config.yaml").write_text(text.replace("revision: null", "revision: v2"))
    accept(folder.path)
    with pytest.raises(RunError, match=rf"on '{other}', but config\.yaml names '{other}' at revision 'v2'"):
        evaluate(folder)


def test_a_model_is_the_same_by_any_path_and_from_a_moved_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "cache/smollm2-135m-1.0"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "cache" / "smollm2-135m-1.0" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert same_model(str(tmp_path / "a"), "a")
    assert not same_model("a", "b")
    assert same_model("org/model", "org/model")
    assert not same_model("org/model", "org/other")
    monkeypatch.setenv("DYADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.0")
    assert same_model("/gone/smollm2-135m-1.0", "packaged:smollm2-135m")
    assert not same_model("/gone/smollm2-135m-0.9", "packaged:smollm2-135m")


def test_an_adapter_of_another_kind_of_model_is_refused(trained: Trained, t5: Path) -> None:
    folder = trained("mode")
    change_model(folder, t5)
    with pytest.raises(RunError, match="does not fit model"):
        evaluate(folder)


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to:UserWarning")
def test_an_adapted_head_fits_its_own_model(tiny: Tiny, tmp_path: Path) -> None:
    for method, key in (("lora", "target_modules"), ("mode", "modules_to_save")):
        options = {key: ["q_proj", "lm_head"] if key == "target_modules" else ["lm_head"]}
        folder = train(tiny(method, options=options), tmp_path / method)
        assert any("lm_head" in name for name in load_file(folder.adapter / "adapter_model.safetensors"))


def test_weights_that_are_lacking_are_named(trained: Trained) -> None:
    folder = trained("more")
    path = folder.adapter / "adapter_model.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if "embedding" in name)
    save_file({name: w for name, w in weights.items() if name != lost}, path, metadata={"format": "pt"})
    accept(folder.adapter)
    with pytest.raises(RunError, match=rf"1 weights are in one of them only, such as {lost}"):
        evaluate(folder)


def test_a_majority_run_generates_nothing(trained: Trained) -> None:
    with pytest.raises(ConfigError, match="gives the majority answer: it has no model to generate with"):
        generate(trained("majority"), ["a"], [None])


def test_the_majority_needs_training_examples(trained: Trained) -> None:
    folder = trained("majority")
    before = files(folder)
    (task,) = load_suite({"family": "starter", "names": ["first_word"], "train_per_task": 1}).tasks
    empty = Suite((type(task)(**{**{f: getattr(task, f) for f in task.__dataclass_fields__}, "train": ()}),))
    with pytest.raises(TaskError, match="no majority answer without training examples: first_word has none"):
        evaluate(folder, suite=empty)
    assert files(folder) == before


def test_an_empty_split_is_refused(trained: Trained) -> None:
    suite = load_suite({"family": "starter", "names": ["first_word"], "validation_per_task": 0})
    with pytest.raises(TaskError, match="nothing to score: split 'validation' of first_word is empty"):
        evaluate(trained("mode"), split="validation", suite=suite)

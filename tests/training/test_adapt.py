# SPDX-License-Identifier: Apache-2.0
"""A trained adapter learns a new task from a few examples, and what it knew stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyads.analysis import interference
from dyads.cli import main
from dyads.comparing.comparison import compare
from dyads.errors import ConfigError, RunError, TaskError
from dyads.recipe.spec import Recipe
from dyads.runs.accept import accept
from dyads.runs.folder import RunFolder
from dyads.scoring.answerer import Answerer
from dyads.scoring.evaluate import evaluate, generate
from dyads.tasks import Example, Suite, Task, load_suite
from dyads.tasks.shots import few_shot
from dyads.training.adapt import adapt_recipe
from dyads.training.train import Training, train
from dyads.training.trainer import TaskTrainer
from made_runs import write_run

Make = Callable[..., Recipe]
Trained = Callable[..., RunFolder]


@pytest.fixture
def new_task(tmp_path: Path) -> Path:
    """Rows of a task that the starter tasks are not: say the last word."""
    path = tmp_path / "last_word.jsonl"
    words = ["fox", "lake", "stone", "river"]
    rows = [
        {"task": "last_word", "input": f"Words: {a} {b}", "output": b, "split": split}
        for split in ("train", "test")
        for a in words
        for b in words
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def new_pairs(tmp_path: Path) -> Path:
    """A recipe with a task for the encoder: two labels, which one word gives."""
    rows = [
        {"task": "sure", "input": f"river {word}", "output": label, "split": split}
        for split in ("train", "test")
        for word, label in (("yes", "sure"), ("maybe", "unsure"), ("stone yes", "sure"), ("fox maybe", "unsure"))
    ]
    (tmp_path / "sure.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "sure.yaml"
    tasks = {"family": "files", "path": str(tmp_path / "sure.jsonl"), "labels": {"sure": ["unsure", "sure"]}}
    path.write_text(json.dumps({"tasks": tasks}))
    return path


def adapt(run: RunFolder, source: Path, out: str, *overrides: str, evaluate: bool = False, **given: Any) -> RunFolder:
    recipe = adapt_recipe(run.path, source, given, ("train.steps=3", *overrides))
    return train(recipe, run.path.with_name(out), evaluate=evaluate)


def weights(folder: RunFolder) -> dict[str, Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")


def parameters(folder: RunFolder) -> int:
    """How many numbers trained, without heads."""
    (line,) = [line for line in folder.log() if line.get("event") == "trained"]
    return int(line["parameters"])


def values(folder: RunFolder, task: str) -> Tensor:
    """What the model makes of one text as `task`, to the last bit: logits, or an encoder's hidden states and heads."""
    answerer = Answerer(folder)
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    gated = {"task": [task]} if answerer.needs_task else {}
    with torch.no_grad():
        output = answerer.model(**ids, **gated)
        if not answerer.heads:
            return output.logits
        number = [head.task for head in answerer.heads].index(task)
        heads = answerer.model.get_base_model().task_heads  # type: ignore[operator,union-attr]
        first = int(heads.first[number])
        rows = heads(output.last_hidden_state, ids["attention_mask"])
        return rows[:, first : first + answerer.heads[number].rows]


# --- which examples ---------------------------------------------------------------------------------------------------


def suite(*labels: str) -> Suite:
    examples = tuple(Example(str(i), f"p{i}", (label,)) for i, label in enumerate(labels))
    test = (Example("t", "q", (labels[0],)),)
    known = tuple(dict.fromkeys(labels))
    return Suite((Task("t", 1, examples, (), test, "accuracy", ("accuracy",), 5, labels=known),))


def test_shots_take_the_labels_in_turn_and_by_the_seed() -> None:
    tasks = suite(*["a"] * 20, *["b"] * 20, "c")
    for seed in range(5):
        (task,) = few_shot(tasks, 7, seed).tasks
        labels = [example.references[0] for example in task.train]
        assert len(labels) == 7
        assert labels.count("c") == 1
        assert {labels.count("a"), labels.count("b")} == {3}
    chosen = {tuple(e.id for e in few_shot(tasks, 7, seed).tasks[0].train) for seed in range(5)}
    assert len(chosen) == 5
    assert few_shot(tasks, 7, 0) == few_shot(tasks, 7, 0)


def test_more_shots_keep_the_fewer() -> None:
    tasks = suite(*["a"] * 20, *["b"] * 20)
    few, more = (({e.id for e in few_shot(tasks, n, 3).tasks[0].train}) for n in (4, 16))
    assert few < more


def test_all_examples_are_taken_where_no_number_is_given_and_too_few_are_refused() -> None:
    tasks = suite("a", "b", "a")
    assert few_shot(tasks, None, 0).tasks[0].train == tasks.tasks[0].train
    with pytest.raises(TaskError, match="task 't' has 3 training examples, fewer than 4 shots"):
        few_shot(tasks, 4, 0)


# --- what changes and what does not -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_known_tasks_stay_bit_identical_when_only_rows_of_new_tasks_train(
    trained: Trained, new_task: Path, new_pairs: Path, kind: str
) -> None:
    run = trained("more", kind)
    source, old, new = (new_pairs, "mnli", "sure") if kind == "bert" else (new_task, "count_words", "last_word")
    folder = adapt(run, source, "new", "train.weight_decay=0.5", "train.learning_rate=0.1", shots=4)
    for task in run.task_names():
        assert torch.equal(values(folder, task), values(run, task))
    before, after = weights(run), weights(folder)
    assert before.keys() == after.keys()
    for name, value in after.items():
        has_new_rows = name.endswith("embedding") or "task_heads" in name
        assert torch.equal(value[: len(before[name])], before[name])
        assert (len(value) > len(before[name])) == has_new_rows
    assert parameters(folder) == sum(v.shape[1] for name, v in after.items() if name.endswith("embedding"))
    assert folder.task_names() == (*run.task_names(), new)
    start = adapt(run, source, "start", "train.learning_rate=1e-30", shots=4)
    assert not torch.equal(values(folder, new), values(start, new))
    assert torch.equal(values(start, old), values(run, old))


@pytest.mark.parametrize("parts", ["task", "all"])
def test_known_tasks_lose_nothing_unless_all_parts_train(
    parts: str, trained: Trained, new_pairs: Path, tmp_path: Path
) -> None:
    run = trained("more", "bert")
    adapted = adapt(run, new_pairs, "new", "train.learning_rate=1.0", parts=parts, shots=4)
    evaluate(adapted, suite=run.recipe().tasks, into=tmp_path / "later")
    found = interference.answer([run.path, tmp_path / "later"])
    assert found.scores.axes["setting"] == ("mixture", "adapted")
    assert (found.scores.at(setting="mixture").values > 0).any()
    lost = found.differences.values[..., 0]
    assert (lost == 0).all() == (parts == "task")
    assert found.mean.values[0, 0] == pytest.approx(lost.mean())


def test_rows_of_known_tasks_get_no_gradient(trained: Trained, new_task: Path) -> None:
    recipe = adapt_recipe(trained("more").path, new_task, {"shots": 4})
    extended = Training(recipe, few_shot(load_suite(recipe.tasks), 4, 0)).extended
    assert extended is not None
    assert extended.frozen_rows
    for parameter, frozen in extended.frozen_rows:
        parameter.sum().backward()
        assert parameter.grad is not None
        assert not parameter.grad[: len(frozen)].any()
        assert parameter.grad[len(frozen) :].all()


@pytest.mark.parametrize("method", ["lora", "more"])
def test_all_parts_may_train(method: str, trained: Trained, new_task: Path) -> None:
    run = trained(method)
    folder = adapt(run, new_task, "all", parts="all", shots=4)
    before, after = weights(run), weights(folder)
    changed = {name for name in before if not torch.equal(after[name][: len(before[name])], before[name])}
    assert {name for name in before if "_A" in name or "_B" in name} <= changed
    assert parameters(folder) == parameters(run) + sum(
        len(after[name][len(value) :].flatten()) for name, value in before.items()
    )


@pytest.mark.parametrize(
    ("method", "kind", "options", "beside"),
    [
        ("lora", "bert", {"bias": "all"}, ".bias"),
        ("lora", "bert", {"modules_to_save": ["LayerNorm"]}, "LayerNorm"),
        ("more", "llama", {"modules_to_save": ["norm"]}, "norm"),
    ],
)
def test_what_trained_beside_the_adapter_trains_again_with_all_parts_and_with_no_others(
    method: str,
    kind: str,
    options: dict[str, Any],
    beside: str,
    trained: Trained,
    new_task: Path,
    new_pairs: Path,
) -> None:
    run, source = trained(method, kind, **options), new_pairs if kind == "bert" else new_task
    before = weights(run)
    others = {name for name in before if beside in name and "task_heads" not in name}
    assert others
    for parts in ("task", "gate", "all") if method == "more" else ("task", "all"):
        folder = adapt(run, source, parts, "train.weight_decay=0.5", parts=parts, shots=4)
        after = weights(folder)
        changed = {name for name in before if not torch.equal(after[name][: len(before[name])], before[name])}
        assert changed & others == (others if parts == "all" else set())
        assert not any("task_heads" in name for name in changed)
    grown = sum(len(after[n][len(v) :].flatten()) for n, v in before.items() if "task_heads" not in n)
    assert parameters(folder) == parameters(run) + grown


@pytest.mark.parametrize("method", ["mode", "more"])
def test_gates_may_train_without_the_ranks(method: str, trained: Trained, new_task: Path) -> None:
    run = trained(method)
    folder = adapt(run, new_task, "gate", "train.learning_rate=0.1", parts="gate", shots=4)
    before, after = weights(run), weights(folder)
    changed = {name for name in before if not torch.equal(after[name][: len(before[name])], before[name])}
    assert changed
    assert all("lora_core" in name for name in changed)


def test_an_encoders_old_heads_stay_whatever_trains(trained: Trained, new_pairs: Path) -> None:
    run = trained("lora", "bert")
    folder = adapt(run, new_pairs, "all", "train.weight_decay=0.5", parts="all", shots=4)
    before, after = weights(run), weights(folder)
    heads = [name for name in before if "task_heads" in name]
    assert len(heads) == 2
    for name in heads:
        assert torch.equal(after[name][: len(before[name])], before[name])
        assert len(after[name]) == len(before[name]) + 2


def test_new_heads_start_the_same_for_every_method_of_a_seed(trained: Trained, new_pairs: Path) -> None:
    runs = {method: trained(method, "bert") for method in ("lora", "more")}

    def rows(method: str, seed: int) -> Tensor:
        given = ("train.learning_rate=1e-30", f"seed={seed}")
        after = weights(adapt(runs[method], new_pairs, f"{method}{seed}", *given, parts="all", shots=4))
        return next(value[-2:] for name, value in after.items() if name.endswith("task_heads.weight"))

    of_more = rows("more", 3)
    assert torch.equal(rows("lora", 3), of_more)
    assert not torch.equal(rows("more", 4), of_more)


# --- where it starts --------------------------------------------------------------------------------------------------


@pytest.fixture
def similar(trained: Trained) -> RunFolder:
    """A run of MoRE with its contrastive loss."""
    return trained("more", contrastive=0.1)


def test_the_most_similar_task_is_reported_and_is_the_start(similar: RunFolder, new_task: Path) -> None:
    folder = adapt(similar, new_task, "new", "train.learning_rate=1e-30", shots=4)
    (line,) = [line for line in folder.log() if line.get("event") == "adapted"]
    assert line["start"] == "nearest"
    scores = line["similarity"]["last_word"]
    assert sorted(scores.values(), reverse=True) == list(scores.values())
    assert set(scores) == set(similar.task_names())
    best = similar.task_names().index(next(iter(scores)))
    tables = {name: value for name, value in weights(folder).items() if name.endswith("embedding")}
    assert len(tables) == 6
    for table in tables.values():
        nearest = (table[:-1] - table[-1]).abs().sum(1)
        assert nearest.argmin() == best
        assert nearest[best] < 1e-6 < nearest.sort().values[1]


@pytest.mark.parametrize(("start", "same"), [("mean", True), ("fresh", False)])
def test_it_may_start_from_the_mean_or_anew(start: str, same: bool, similar: RunFolder, new_task: Path) -> None:
    folder = adapt(similar, new_task, "new", "train.learning_rate=1e-30", start=start, shots=4)
    for name, value in weights(folder).items():
        if name.endswith("embedding"):
            assert torch.allclose(value[-1], value[:-1].mean(0)) == same


def test_without_a_contrastive_loss_it_starts_from_the_mean(trained: Trained, new_task: Path) -> None:
    run = trained("more", contrastive=0)
    folder = adapt(run, new_task, "new", shots=4)
    assert [line["start"] for line in folder.log() if line.get("event") == "adapted"] == ["mean"]
    with pytest.raises(ConfigError, match="was not trained with a contrastive loss"):
        adapt(run, new_task, "nearest", start="nearest", shots=4)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_it_learns_the_new_task(trained: Trained, new_pairs: Path) -> None:
    folder = adapt(
        trained("lora", "bert"),
        new_pairs,
        "new",
        "train.steps=60",
        "train.learning_rate=0.01",
        parts="all",
        evaluate=True,
    )
    (row,) = [row for row in folder.scores()["scores"] if row["headline"]]
    assert (row["task"], row["value"]) == ("sure", 100.0)
    assert generate(folder, ["river yes", "river maybe"], ["sure", "sure"]) == ["sure", "unsure"]
    assert generate(folder, [["river", "stone yes"]], ["mnli"])[0] in ("entailment", "neutral", "contradiction")


def test_an_adapted_run_learns_another_task(trained: Trained, new_task: Path, tmp_path: Path) -> None:
    run = trained("more")
    once = adapt(run, new_task, "once", shots=4)
    other = tmp_path / "other.jsonl"
    other.write_text(new_task.read_text().replace("last_word", "other_word"))
    twice = adapt(once, other, "twice", shots=4)
    assert twice.task_names() == (*run.task_names(), "last_word", "other_word")
    for task in once.task_names():
        assert torch.equal(values(twice, task), values(once, task))


def test_an_interrupted_adaptation_ends_like_an_uninterrupted_one(
    trained: Trained, new_task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("more", lora_dropout=0.1)  # so that resuming has to restore the random number generators
    steps = ("train.steps=6", "train.save_steps=2", "train.weight_decay=0.1")
    whole = adapt(run, new_task, "whole", *steps, shots=4)
    recipe = adapt_recipe(run.path, new_task, {"shots": 4}, steps)
    folder = train(recipe, cut_off(recipe, run.path.with_name("cut"), monkeypatch), resume=True, evaluate=False)
    for name, value in weights(whole).items():
        assert torch.equal(weights(folder)[name], value)


def cut_off(recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train until the fourth step, which fails."""
    steps_run = 0
    plain = TaskTrainer.training_step

    def cut(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps_run
        steps_run += 1
        if steps_run == 4:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "training_step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, out, evaluate=False)
    return out


def test_a_cut_off_adaptation_goes_on_from_no_other_adapter(
    trained: Trained, new_task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("more")
    recipe = adapt_recipe(run.path, new_task, {"shots": 4}, ("train.steps=6", "train.save_steps=2"))
    out = cut_off(recipe, run.path.with_name("cut"), monkeypatch)
    file = run.adapter / "adapter_model.safetensors"
    began = file.read_bytes()
    save_file({name: value + 1 for name, value in weights(run).items()}, file)  # as if it had been trained anew
    accept(run.adapter)
    here = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        RunError,
        match=rf"cannot resume '{out}': the adapter of '{run.path}' has changed since \(SHA-256 [0-9a-f]{{12}}… then, "
        r"[0-9a-f]{12}… now; was that run trained again\?\): restore the earlier adapter, or adapt the new one from "
        "the start with another --out",
    ):
        train(recipe, out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == here
    other = shutil.copytree(out, out.with_name("older"))
    facts = json.loads((other / "env.json").read_text())
    del facts["source_adapter"]
    (other / "env.json").write_text(json.dumps(facts))
    assert train(recipe, other, resume=True, evaluate=False).adapter.is_dir(), "begun before this was kept"
    file.write_bytes(began)
    accept(run.adapter)
    assert train(recipe, out, resume=True, evaluate=False).adapter.is_dir()


def test_an_adaptation_whose_training_ended_is_scored_without_the_run_that_it_adapted(
    trained: Trained, new_task: Path
) -> None:
    run = trained("more")
    recipe = adapt_recipe(run.path, new_task, {"shots": 4}, ("train.steps=2",))
    folder = train(recipe, run.path.with_name("new"), evaluate=False)
    adapter = weights(folder)
    shutil.rmtree(run.path)
    assert train(recipe, folder.path, resume=True).is_scored
    assert folder.environment()["resumed"][-1]["tasks"] == list(folder.task_names())
    assert all(torch.equal(value, adapter[name]) for name, value in weights(folder).items())


def test_the_command_says_which_task_was_nearest_and_what_came_of_it(similar: RunFolder, new_task: Path) -> None:
    command = ["adapt", str(similar.path), "--task", str(new_task), "--shots", "4", "--set", "train.steps=2"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "last_word starts as its most similar task, " in result.output
    assert "last_word: rouge_l " in result.output
    out = similar.path.with_name(f"{similar.path.name}-last_word-4")
    assert RunFolder(out).is_scored
    recipe = RunFolder(out).recipe()
    assert recipe.adapt is not None
    assert (recipe.adapt.shots, recipe.train.batch_size, recipe.train.gradient_accumulation) == (4, 4, 1)
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 2
    assert "already holds a run" in again.output


def test_a_files_recipe_may_set_the_training_but_not_what_the_run_and_the_command_decide(
    trained: Trained, new_task: Path, tmp_path: Path
) -> None:
    run, source = trained("more"), tmp_path / "new.yaml"
    tasks = {"family": "files", "path": str(new_task)}
    source.write_text(json.dumps({"tasks": tasks, "train": {"steps": 7}, "evaluate": {"limit": 2}}))
    recipe = adapt_recipe(run.path, source, {"shots": 4}, seed=5)
    assert (recipe.train.steps, recipe.evaluate.limit, recipe.seed, recipe.adapt.shots) == (7, 2, 5, 4)
    assert recipe.name == "more, new 4-shot"
    for key, value in (("adapt", None), ("seed", 1), ("method", {"name": "lora"})):
        source.write_text(json.dumps({"tasks": tasks, key: value}))
        with pytest.raises(ConfigError, match=f"has '{key}', which comes from the adapted run or the command line"):
            adapt_recipe(run.path, source, {"shots": 4})
    with pytest.raises(ConfigError, match=r"--set adapt.shots=3: use --shots, --parts or --start"):
        adapt_recipe(run.path, new_task, {}, ("adapt.shots=3",))


def test_a_warm_up_in_steps_becomes_their_share(tiny: Make, tmp_path: Path, new_task: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny("more", train={"steps": 40, "warmup": 10}))
    assert adapt_recipe(run.path, new_task, {}, ("train.steps=20",)).train.warmup_steps == 5


def test_adapted_runs_of_one_name_are_one_column_and_the_comparison_notes_how_they_differ(tmp_path: Path) -> None:
    folders = []
    for name, given in (("four", {"shots": 4}), ("all", {"parts": "all"})):
        for seed in (0, 1):
            adapt = {"run": str(tmp_path / f"adapted-{seed}"), **given}
            path = tmp_path / f"{name}-{seed}"
            folders.append(write_run(path, name, {"t": [0.0, 100.0]}, method="more", seed=seed, adapt=adapt).path)
    comparison = compare(folders)
    assert [(column.label, len(column.seeds)) for column in comparison.columns] == [("four", 2), ("all", 2)]
    assert "adapt.parts differs: task (four), all (all)" in comparison.notes
    assert not any("adapt.run" in note for note in comparison.notes)


def test_the_train_split_of_an_adapted_run_is_what_it_was_trained_on(trained: Trained, new_task: Path) -> None:
    folder = adapt(trained("more"), new_task, "new", shots=4, evaluate=True)
    (row, *_) = evaluate(folder, split="train")["scores"]
    assert row["n"] == 4


def test_tasks_of_a_language_model_without_gates_are_known_too(trained: Trained, new_task: Path) -> None:
    run = trained("lora")
    folder = adapt(run, new_task, "new", shots=4, parts="all")
    assert folder.task_names() == (*run.task_names(), "last_word")
    assert len(generate(folder, ["Words: fox", "Words: fox"], ["count_words", "last_word"], max_new_tokens=2)) == 2


def test_several_new_tasks_are_learned_at_once(trained: Trained, new_task: Path, tmp_path: Path) -> None:
    run, both = trained("more"), tmp_path / "both.jsonl"
    both.write_text(new_task.read_text() + new_task.read_text().replace("last_word", "other_word"))
    folder = adapt(run, both, "both", shots=4, evaluate=True)
    assert folder.task_names() == (*run.task_names(), "last_word", "other_word")
    assert {row["task"] for row in folder.scores()["scores"]} == {"last_word", "other_word"}
    for task in run.task_names():
        assert torch.equal(values(folder, task), values(run, task))


def test_an_encoder_decoder_learns_a_new_task(trained: Trained, new_task: Path) -> None:
    run = trained("more", "t5", contrastive=0.1)
    folder = adapt(run, new_task, "new", shots=4, evaluate=True)
    (line,) = [line for line in folder.log() if line.get("event") == "adapted"]
    assert set(line["similarity"]["last_word"]) == set(run.task_names())
    before, after = weights(run), weights(folder)
    assert all(torch.equal(after[name][: len(value)], value) for name, value in before.items())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_adapted_is_refused_before_a_folder_is_made(
    trained: Trained, new_task: Path, tmp_path: Path
) -> None:
    more, mode, lora = trained("more"), trained("mode"), trained("lora")
    known = tmp_path / "known.jsonl"
    known.write_text(new_task.read_text().replace("last_word", "count_words"))
    with pytest.raises(ConfigError, match="already knows task 'count_words': give the new task another name"):
        adapt(more, known, "out", shots=4)
    with pytest.raises(
        ConfigError, match=r"'mode' has no per-task parameters that its gates read, .* adapt with --parts gate or"
    ):
        adapt(mode, new_task, "out", shots=4)
    with pytest.raises(ConfigError, match="'lora' has no gates, so nothing would train: adapt with --parts all"):
        adapt(lora, new_task, "out", parts="gate", shots=4)
    frozen = trained("more", selector="frozen_random")
    with pytest.raises(ConfigError, match="'more' has no per-task parameters that its gates read"):
        adapt(frozen, new_task, "out", shots=4)
    with pytest.raises(ConfigError, match=r"adapt\.start is mean, but 'mode' has no per-task parameters"):
        adapt(mode, new_task, "out", parts="all", start="mean", shots=4)
    with pytest.raises(RunError, match=r"was trained with method.r = 4, and the recipe that adapts it has 2"):
        adapt(more, new_task, "out", "method.r=2", shots=4)
    with pytest.raises(TaskError, match="task 'last_word' has 16 training examples, fewer than 17 shots"):
        adapt(more, new_task, "out", shots=17)
    with pytest.raises(ConfigError, match=r"there is no file '.*missing\.jsonl'"):
        adapt(more, tmp_path / "missing.jsonl", "out")
    (tmp_path / "no.yaml").write_text("train: {steps: 3}\n")
    with pytest.raises(ConfigError, match="has no section `tasks`: name the new task there"):
        adapt(more, tmp_path / "no.yaml", "out")
    assert not (tmp_path / "out").exists()


def test_a_method_that_trains_nothing_adapts_nothing() -> None:
    sections = {"name": "x", "model": {"name": "m"}, "tasks": {"family": "starter"}, "adapt": {"run": "runs/x"}}
    with pytest.raises(ValueError, match="'majority' trains nothing, so it cannot adapt 'runs/x'"):
        Recipe.model_validate({**sections, "method": {"name": "majority"}})

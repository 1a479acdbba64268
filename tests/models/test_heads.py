# SPDX-License-Identifier: Apache-2.0
"""Task heads: an encoder answers each task by its head, which trains, saves and resumes with any adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModel

from dyads.comparing.comparison import compare
from dyads.data.batches import EncodedPair
from dyads.errors import ConfigError, RunError, TaskError
from dyads.export import export
from dyads.methods import build_config
from dyads.models.budget import count
from dyads.models.heads import (
    Head,
    HeadQuestion,
    TaskHeads,
    answer_by_heads,
    attach_heads,
    collator_of,
    head_loss,
    heads_of,
    read_heads,
)
from dyads.models.load import kind_of, load_model, load_tokenizer, model_config
from dyads.recipe.spec import ModelSpec, Recipe
from dyads.runs.accept import accept
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter
from dyads.scoring.answerer import Answerer
from dyads.scoring.evaluate import evaluate, generate
from dyads.tasks import Example, Task, load_suite
from dyads.training import trainer as trainer_module
from dyads.training.train import Training, train

Make = Callable[..., Recipe]

HEADS = (Head("a", ("x", "y", "z")), Head("b", (), 2.5, 0.5), Head("c", ("p", "q")))


@pytest.fixture
def make(tiny: Make, bert: Path, pairs: dict[str, Any]) -> Make:
    """A recipe for the tiny encoder and its two tasks."""

    def recipe(method: str = "lora", **sections: Any) -> Recipe:
        return tiny(
            method,
            bert,
            **{"tasks": pairs, **sections, "evaluate": {"max_new_tokens": None, **sections.get("evaluate", {})}},
        )

    return recipe


@pytest.fixture(scope="module")
def kept() -> dict[str, RunFolder]:
    return {}


@pytest.fixture
def trained(
    make: Make, kept: dict[str, RunFolder], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> Callable[[str], RunFolder]:
    """A copy of a run of a method, which is trained once."""

    def copy(method: str) -> RunFolder:
        if method not in kept:
            recipe = make(method, train={"steps": 80, "learning_rate": 0.02, "validation_limit": 3})
            kept[method] = train(recipe, tmp_path_factory.mktemp("runs") / method)
        shutil.copytree(kept[method].path, tmp_path / method)
        return RunFolder.open(tmp_path / method)

    return copy


def weights(folder: RunFolder) -> dict[str, Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")


def predictions(folder: RunFolder) -> dict[str, list[str]]:
    return {task: [p["prediction"] for p in folder.predictions(task)] for task in ("mnli", "stsb")}


# --- the module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_values_are_a_linear_map_of_the_pooled_hidden_states(pool: str) -> None:
    heads = TaskHeads(5, HEADS, pool)
    hidden, mask = torch.randn(2, 4, 5), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    z = hidden[:, 0] if pool == "first" else torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)])
    assert_close(heads(hidden, mask), z @ heads.weight.T + heads.bias)
    assert heads.weight.shape == (3 + 1 + 2, 5)


def test_the_loss_is_cross_entropy_over_a_tasks_own_rows_or_the_squared_error_of_its_number() -> None:
    heads, values = TaskHeads(5, HEADS, "mean"), torch.randn(4, 6, requires_grad=True)
    task, targets = torch.tensor([2, 0, 1, 0]), torch.tensor([1.0, 0.0, -0.7, 2.0])
    loss = heads.loss(values, task, targets)
    by_hand = (
        -values[0, 4:].log_softmax(-1)[1]
        - values[1, :3].log_softmax(-1)[0]
        + (values[2, 3] + 0.7) ** 2
        - values[3, :3].log_softmax(-1)[2]
    )
    assert_close(loss, by_hand)
    (gradient,) = torch.autograd.grad(loss, values)
    (expected,) = torch.autograd.grad(by_hand, values)
    assert_close(gradient, expected)
    assert gradient[0, :4].abs().max() == 0, "the rows of other tasks learn nothing from a sample"


def test_a_head_answers_its_best_label_the_best_of_the_choices_or_a_number_in_its_unit() -> None:
    assert HEADS[0].text([0.1, 0.9, 0.5]) == "y"
    assert HEADS[0].text([0.1, 0.9, 0.5], ("z", "x")) == "z"
    assert HEADS[0].text([0.5, 0.5, 0.5]) == "x", "the first of equals"
    assert HEADS[1].text([-1.0]) == "2.0000"


def test_numbers_are_standardised_by_the_training_split(make: Make) -> None:
    recipe = make()
    tasks = load_suite(recipe.tasks).tasks
    mnli, stsb = heads_of(tasks)
    numbers = torch.tensor([float(tasks[1].target(e)) for e in tasks[1].train], dtype=torch.float64)
    assert mnli == Head("mnli", ("entailment", "neutral", "contradiction"))
    assert (stsb.labels, stsb.rows) == ((), 1)
    assert (stsb.mean, stsb.deviation) == pytest.approx((numbers.mean().item(), numbers.std(correction=0).item()))
    training = Training(recipe, load_suite(recipe.tasks))
    targets = torch.tensor([training.dataset[1, i].target for i in range(len(tasks[1].train))])  # type: ignore[union-attr]
    assert_close(targets.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(targets.std(correction=0), torch.tensor(1.0))


def test_equal_numbers_are_not_scaled() -> None:
    same = tuple(Example(str(i), "a", ("3",)) for i in range(3))
    task = Task("t", 1, same, (), (), "pearson", ("pearson",), regression=True)
    assert heads_of([task]) == (Head("t", (), 3.0, 1.0),)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "more"])
def test_an_encoder_learns_both_tasks(method: str, trained: Callable[[str], RunFolder]) -> None:
    folder = trained(method)
    losses = [line["loss"] for line in folder.log() if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    scores = {(row["task"], row["metric"]): row["value"] for row in folder.scores()["scores"]}
    assert scores["mnli", "accuracy"] > 70, "the majority would have a third"
    assert scores["stsb", "pearson"] > 70
    answers = predictions(folder)
    assert set(answers["mnli"]) <= {"entailment", "neutral", "contradiction"}
    assert all(-2 < float(number) < 7 for number in answers["stsb"])
    assert [line["validation_loss"] >= 0 for line in folder.log() if line.get("event") == "validated"] == [True]


def test_parameters_of_adapter_and_heads_are_counted_separately(
    trained: Callable[[str], RunFolder], bert: Path, make: Make
) -> None:
    folder = trained("lora")
    (line,) = [line for line in folder.log() if line.get("event") == "trained"]
    kept = {name: w.numel() for name, w in weights(folder).items()}
    in_heads = sum(n for name, n in kept.items() if "task_heads" in name)
    assert line["head_parameters"] == in_heads == (3 + 1) * (32 + 1)
    assert line["parameters"] == folder.scores()["parameters"] == sum(kept.values()) - in_heads
    options = make("lora").method.options
    assert count(str(bert), "lora", options).trainable == line["parameters"], "a budget is the adapter's"


def test_the_heads_start_alike_for_every_method_of_a_seed(make: Make) -> None:
    starts = []
    for method, seed in (("lora", 0), ("more", 0), ("lora", 1)):
        recipe = make(method, seed=seed)
        starts.append(Training(recipe, load_suite(recipe.tasks)).model.get_base_model().task_heads.weight.detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("method", ["lora", "more"])
def test_a_mixed_batch_is_its_tasks_apart(method: str, make: Make) -> None:
    recipe = make(method, options={"init_weights": False} if method == "more" else {})
    training = Training(recipe, load_suite(recipe.tasks))
    training.model.eval()

    def loss(at: list[tuple[int, int]]) -> Tensor:
        batch: dict[str, Any] = dict(training.collator([training.dataset[place] for place in at]))  # type: ignore[arg-type]
        inputs = {k: v for k, v in batch.items() if k != "labels" and (k != "task" or method == "more")}
        total, n, _ = head_loss(training.model, training.model, inputs, batch["task"], batch["labels"])
        assert n == len(at)
        return total

    mixed, tasks = [(0, 0), (1, 3), (0, 4), (1, 1)], {}
    for task, i in mixed:
        tasks.setdefault(task, []).append((task, i))
    assert_close(loss(mixed), sum(loss(at) for at in tasks.values()))
    assert_close(loss(mixed), sum(loss([place]) for place in mixed))


def test_gradient_accumulation_weights_its_parts_by_samples(make: Make, tmp_path: Path) -> None:
    whole, parts = (
        train(make("lora", train={"gradient_accumulation": n}), tmp_path / str(n), evaluate=False) for n in (1, 4)
    )
    first, second = ([line["loss"] for line in f.log() if "loss" in line] for f in (whole, parts))
    # Not equal, because dropout draws other numbers for other parts.
    assert second == pytest.approx(first, rel=0.1)


class _PowerCutError(Exception):
    pass


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make("more", options={"lora_dropout": 0.1}, train={"steps": 5, "save_steps": 2})
    through = train(recipe, tmp_path / "through", evaluate=False)
    calls: list[int] = []

    def cut(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise _PowerCutError
        return head_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "head_loss", cut)
        with pytest.raises(_PowerCutError):
            train(recipe, tmp_path / "cut", evaluate=False)
    resumed = train(recipe, tmp_path / "cut", resume=True, evaluate=False)
    assert_close(weights(resumed), weights(through), rtol=0, atol=0)
    assert read_heads(resumed.heads) == read_heads(through.heads)


def test_checkpointing_trains_the_same_heads(make: Make, tmp_path: Path) -> None:
    plain, again = (
        train(make("more", train={"gradient_checkpointing": on}), tmp_path / str(on), evaluate=False)
        for on in (False, True)
    )
    assert_close(weights(again), weights(plain), rtol=1e-3, atol=1e-5)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_loaded_run_repeats_its_answers(trained: Callable[[str], RunFolder]) -> None:
    folder = trained("more")
    before, scores = predictions(folder), folder.scores()["scores"]
    evaluate(folder)
    assert predictions(folder) == before
    assert folder.scores()["scores"] == scores


def test_an_exported_lora_has_the_heads_beside_it(trained: Callable[[str], RunFolder], tmp_path: Path) -> None:
    folder = trained("more")
    export(SavedAdapter.read(folder.path), tmp_path / "lora", task="mnli")
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert not [key for key in written if "task_heads" in key]
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["modules_to_save"] is None
    heads = load_file(tmp_path / "lora" / "task_heads.safetensors")
    kept = {key.rpartition(".")[2]: value for key, value in weights(folder).items() if "task_heads" in key}
    assert heads.keys() == kept.keys() == {"weight", "bias"}
    assert all(torch.equal(heads[key], kept[key]) for key in kept)
    assert (tmp_path / "lora" / "task_heads.json").read_text() == folder.heads.read_text()


def test_a_task_without_training_examples_is_refused(make: Make) -> None:
    suite = load_suite(make().tasks)
    with pytest.raises(TaskError, match=r"a head that is trained, and stsb has no training examples: give it some"):
        heads_of([suite.tasks[0], replace(suite.tasks[1], train=())])


def test_an_answer_does_not_depend_on_the_rest_of_its_batch(trained: Callable[[str], RunFolder]) -> None:
    folder = trained("more")
    answerer, suite = Answerer(folder), load_suite(folder.recipe().tasks)
    asked, spec = [task.test for task in suite.tasks], folder.recipe().evaluate
    texts = predictions(folder)
    for size in (1, 5, 99):
        labels, numbers = answerer.answer(suite.tasks, asked, spec.model_copy(update={"batch_size": size}))
        assert labels == texts["mnli"]
        # Rounded to four places, so that the last may differ with the size of a product.
        assert [float(n) for n in numbers] == pytest.approx([float(n) for n in texts["stsb"]], abs=2e-4)


def test_a_prompt_is_a_text_or_a_pair_with_its_task(trained: Callable[[str], RunFolder]) -> None:
    folder = trained("lora")
    example = load_suite(folder.recipe().tasks).tasks[0].test[0]
    wanted = predictions(folder)["mnli"][0]
    assert generate(folder, [example.segments], ["mnli"]) == [wanted]
    assert generate(folder, [example.segments], [0]) == [wanted]
    (number,) = generate(folder, ["fox five"], ["stsb"])
    assert float(number)
    with pytest.raises(ConfigError, match="prompt 1 has no task, and every task has its own head: name one"):
        generate(folder, ["fox"], [None])
    with pytest.raises(ConfigError, match="the run does not know task 'sts'"):
        generate(folder, ["fox"], ["sts"])
    with pytest.raises(ConfigError, match="prompt 1 has 3 texts: an encoder reads one or two"):
        generate(folder, [("a", "b", "c")], ["mnli"])
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        generate(folder, [("a", " ")], ["mnli"])


def test_the_majority_of_numbers_is_their_mean(make: Make, tmp_path: Path) -> None:
    folder = train(make("majority"), tmp_path / "run")
    task = load_suite(folder.recipe().tasks).tasks[1]
    mean = sum(float(task.target(e)) for e in task.train) / len(task.train)
    (number,) = {float(n) for n in predictions(folder)["stsb"]}
    assert number == pytest.approx(mean, abs=1e-4)


def test_answers_come_in_the_order_of_the_questions(bert: Path) -> None:
    model = load_model(ModelSpec(name=str(bert), dtype="float32"))
    attach_heads(model, HEADS, "mean")
    spec = ModelSpec(name=str(bert))
    questions = [HeadQuestion(EncodedPair([1, *range(4, 4 + n), 2], [0] * (n + 2), 0.0, 1)) for n in (2, 7, 1, 5)]
    collator = collator_of(model, load_tokenizer(spec.name))
    together = answer_by_heads(model, questions, collator, batch_size=2)
    alone = [answer_by_heads(model, [question], collator, batch_size=1)[0] for question in questions]
    assert [float(x) for x in together] == pytest.approx([float(x) for x in alone], abs=2e-4)
    assert len(set(alone)) == 4


# --- models and refusals ----------------------------------------------------------------------------------------------


def test_an_encoder_is_recognised_and_loaded_without_its_pooler(bert: Path, llama: Path, t5: Path) -> None:
    kinds = {path: kind_of("m", model_config(str(path))) for path in (bert, llama, t5)}
    assert kinds == {bert: "encoder", llama: "causal", t5: "seq2seq"}
    assert load_model(ModelSpec(name=str(bert))).pooler is None
    ids = torch.tensor([[1, 5, 2]])
    plain = AutoModel.from_pretrained(bert).eval()
    ours = load_model(ModelSpec(name=str(bert), dtype="float32"))
    assert_close(ours(input_ids=ids).last_hidden_state, plain(input_ids=ids).last_hidden_state)


def test_the_heads_are_float32_over_a_half_precision_encoder(bert: Path) -> None:
    model = load_model(ModelSpec(name=str(bert), dtype="bfloat16"))
    attach_heads(model, HEADS, "mean")
    adapted = get_peft_model(model, build_config("mode", {"r": 2, "modules_to_save": ["task_heads"]}, None))
    heads = adapted.get_base_model().task_heads
    ids = torch.tensor([[1, 5, 2]])
    assert heads(adapted(input_ids=ids).last_hidden_state, torch.ones_like(ids)).dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (
            "llama",
            "encoder",
            "'encoder' does not fit model .*: llama is a decoder, which answers in text, and has no head",
        ),
        ("t5", "encoder", "t5 is an encoder-decoder, which answers in text, and has no heads; leave model.kind out"),
        ("bert", "causal", "'causal' does not fit model .*: bert is an encoder, which answers by heads, not in text"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    model: str, kind: str, message: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(ModelSpec(name=str(request.getfixturevalue(model)), kind=kind))


def test_free_text_is_refused_before_the_folder_is_touched(make: Make, tmp_path: Path) -> None:
    starter = {"family": "starter", "names": ["first_word", "has_animal"], "train_per_task": 4, "test_per_task": 2}
    with pytest.raises(
        TaskError, match="which needs labels or numbers, and first_word has answers in free text: give its labels"
    ):
        train(make(tasks=starter), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_untrained_encoder_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'zero-shot' cannot answer .*: an encoder answers by heads, which are random"
    ):
        train(make("zero-shot"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_likelihood_does_not_go_with_heads(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'likelihood' does not fit model .*: an encoder answers by its heads"):
        train(make(evaluate={"answer": "likelihood"}), tmp_path / "run")


def test_tasks_that_changed_since_training_are_refused(trained: Callable[[str], RunFolder]) -> None:
    folder = trained("lora")
    rows = json.loads(folder.heads.read_text())
    folder.heads.write_text(json.dumps([{**rows[0], "labels": ["a", "b", "c"]}, rows[1]]))
    accept(folder.adapter)
    with pytest.raises(RunError, match="the head of 'mnli' was trained on labels a, b, c, but the task now has entail"):
        evaluate(folder)
    folder.heads.write_text(json.dumps([{**rows[0], "task": "mnl"}, rows[1]]))
    accept(folder.adapter)
    with pytest.raises(RunError, match="has heads for 2 tasks and none for 'mnli' – did you mean 'mnl'"):
        evaluate(folder)
    folder.heads.write_text("[{")
    accept(folder.adapter)
    with pytest.raises(RunError, match=r"heads.json, line 1, column 3: not valid JSON: .*; train the run again"):
        evaluate(folder)
    folder.heads.write_text('[{"task": 3, "labels": []}]')
    accept(folder.adapter)
    with pytest.raises(RunError, match=r"cannot read the labels of the heads from .*heads.json: .*valid string"):
        evaluate(folder)
    folder.heads.unlink()
    with pytest.raises(RunError, match=r"is damaged: heads.json is missing"):
        evaluate(folder)
    accept(folder.adapter)
    with pytest.raises(RunError, match=r"cannot read the labels of the heads from"):
        evaluate(folder)
    shutil.rmtree(folder.adapter)
    with pytest.raises(RunError, match="has no adapter: its training did not end"):
        evaluate(folder)


def test_runs_with_heads_are_compared(trained: Callable[[str], RunFolder], make: Make, tmp_path: Path) -> None:
    majority = train(make("majority"), tmp_path / "majority")
    comparison = compare([trained("lora").path, trained("more").path, majority.path])
    assert [(task.task, task.metric) for task in comparison.tasks] == [("mnli", "accuracy"), ("stsb", "pearson")]
    assert not any("zero-shot" in note for note in comparison.notes), "heads have none"
    for column in comparison.columns:
        row = next(r for r in RunFolder(column.runs[0]).scores()["scores"] if r["metric"] == "pearson")
        assert column.scores[1].value == pytest.approx(row["value"], abs=1e-6)
        assert column.scores[1].low <= column.scores[1].value <= column.scores[1].high

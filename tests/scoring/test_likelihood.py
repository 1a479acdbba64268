# SPDX-License-Identifier: Apache-2.0
"""Choices are scored by their log-likelihood given the prompt, independently of the rest of the batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from dyads.errors import ConfigError, TaskError
from dyads.methods import build_config
from dyads.recipe.spec import EvaluateSpec, Recipe
from dyads.runs.accept import accept
from dyads.runs.folder import RunFolder
from dyads.scoring import likelihood
from dyads.scoring.evaluate import evaluate
from dyads.scoring.likelihood import ChoiceQuestion, log_likelihoods
from dyads.tasks import load_suite
from dyads.training.train import train
from tiny import batch, tiny_model

Make = Callable[..., Recipe]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "t5": ["q", "wo"]}
YES_NO = {"family": "starter", "names": ["has_animal"], "train_per_task": 8, "test_per_task": 6}


def questions() -> list[ChoiceQuestion]:
    """Prompts and answers of unequal lengths, and unequal numbers of answers."""
    rows = batch("llama", rows=5, width=9)["input_ids"].tolist()
    answers = [[[7, 2], [9, 11, 12, 2]], [[5, 6, 2], [5, 2], [8, 2]], [[2], [3, 2]], [[20, 21, 22, 2], [4, 2]]]
    return [
        ChoiceQuestion(row[: 9 - 2 * i], [f"{i}{k}" for k in range(len(given))], given, i % 2)
        for i, (row, given) in enumerate(zip(rows, answers, strict=False))
    ]


def adapted(kind: str) -> nn.Module:
    """A tiny model with gates that look at the task, and an adapter that changes something."""
    config = build_config("more", {"r": 3, "target_modules": TARGETS[kind], "init_weights": False}, ("a", "b"))
    config.task_type = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    return get_peft_model(tiny_model(kind), config).eval()


def by_hand(model: nn.Module, kind: str, question: ChoiceQuestion, **task: Any) -> list[float]:
    """Each choice alone and token by token: the log-probability of each, given all before it."""
    sums = []
    for answer in question.answers:
        total = 0.0
        for i, token in enumerate(answer):
            before = answer[:i]
            if kind == "t5":
                inputs = {"input_ids": [question.prompt], "decoder_input_ids": [[0, *before]]}
            else:
                inputs = {"input_ids": [question.prompt + before]}
            logits = model(**{k: torch.tensor(v) for k, v in inputs.items()}, use_cache=False, **task).logits
            total += float(logits[0, -1].log_softmax(-1)[token])
        sums.append(total)
    return sums


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "llama without a cache"])
@torch.no_grad()
def test_sums_are_those_of_every_token_after_all_before_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "without" in kind:
        kind = "llama"
        monkeypatch.setattr(likelihood, "refusal", lambda model: "not served")
    model = adapted(kind)
    found = log_likelihoods(model, questions(), batch_size=8, pad=0, tasks=True)
    for question, sums in zip(questions(), found, strict=True):
        assert sums == pytest.approx(by_hand(model, kind, question, task=[question.task]), abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_batch_of_any_size_gives_the_same(kind: str) -> None:
    model, reported = adapted(kind), []
    alone = log_likelihoods(model, questions(), batch_size=1, pad=0, tasks=True)
    for size in (3, 5, 99):
        counts: list[int] = []
        together = log_likelihoods(model, questions(), batch_size=size, pad=0, tasks=True, done=counts.append)
        assert [x for sums in together for x in sums] == pytest.approx([x for sums in alone for x in sums], abs=1e-4)
        reported.append(sum(counts))
    assert reported == [4, 4, 4]


def test_the_padding_token_has_no_influence() -> None:
    model = adapted("llama")
    with_pad, with_other = (log_likelihoods(model, questions(), batch_size=99, pad=p, tasks=True) for p in (0, 33))
    assert [x for s in with_pad for x in s] == pytest.approx([x for s in with_other for x in s], abs=1e-5)


def test_a_prompt_is_read_once_for_all_its_choices() -> None:
    model: PreTrainedModel = tiny_model("llama").eval()
    seen: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    log_likelihoods(model, questions()[:1], batch_size=9, pad=0)
    assert seen == [(1, 9), (2, 3)]


def test_the_best_is_the_highest_sum_or_mean_and_the_first_of_equals() -> None:
    choice = ChoiceQuestion([1], ["long", "short"], [[1, 1, 1, 2], [1, 2]])
    assert choice.best([-4.0, -3.0]) == "short"
    assert choice.best([-4.0, -3.0], length_normalise=True) == "long"
    assert choice.best([-3.0, -3.0]) == "long"
    assert choice.best([-4.0, -2.0], length_normalise=True) == "long"


@pytest.mark.parametrize("method", ["zero-shot", "more"])
def test_a_run_is_scored_by_likelihood(method: str, tiny: Make, tmp_path: Path) -> None:
    recipe = tiny(method, tasks=YES_NO, evaluate={"answer": "likelihood"})
    folder = train(recipe, tmp_path / "run")
    answers = _answers(folder)
    assert set(answers) <= {"no", "yes"}
    config = folder.path / "config.yaml"
    for size in (1, 99):
        changed = re.sub(r"(?m)^(evaluate:.*?batch_size: )\d+", rf"\g<1>{size}", config.read_text(), flags=re.DOTALL)
        assert changed != config.read_text()
        config.write_text(changed)
        accept(folder.path)
        evaluate(folder)
        assert _answers(folder) == answers


def _answers(folder: RunFolder) -> list[str]:
    return [p["prediction"] for p in folder.predictions("has_animal")]


def test_an_encoder_decoder_is_scored_by_likelihood(tiny: Make, t5: Path, tmp_path: Path) -> None:
    recipe = tiny("more", t5, tasks=YES_NO, evaluate={"answer": "likelihood", "length_normalise": True})
    assert set(_answers(train(recipe, tmp_path / "run"))) <= {"no", "yes"}


def test_examples_may_have_choices_of_their_own(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("zero-shot", tasks=YES_NO, evaluate={"answer": "likelihood"})
    suite = load_suite(recipe.tasks)
    task = suite.tasks[0]
    examples = [replace(e, choices=(e.references[0], "fox"), references=e.references[:1]) for e in task.test]
    own = replace(task, labels=(), train=(), validation=(), test=tuple(examples))
    RunFolder.create(tmp_path / "run", recipe)
    evaluate(RunFolder.open(tmp_path / "run"), suite=replace(suite, tasks=(own,)))
    choices = {example.id: example.choices for example in examples}
    found = RunFolder.open(tmp_path / "run").predictions("has_animal")
    assert {p["prediction"] for p in found} >= {"fox"} or len({p["prediction"] for p in found}) == 2
    assert all(p["prediction"] in choices[p["id"]] for p in found)


def test_a_task_of_free_text_is_refused_before_the_folder_is_touched(tiny: Make, tmp_path: Path) -> None:
    recipe = tiny("mode", evaluate={"answer": "likelihood"})
    with pytest.raises(
        TaskError, match=r"task 'first_word' has no labels and its example '.*' no choices: use answer: g"
    ):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_normalise": True}, "length_normalise is for answer: likelihood, but answer is generate"),
        ({"answer": "likelihood", "num_beams": 2}, "num_beams is 2, but answer: likelihood uses no beams"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        EvaluateSpec(**options)


def test_eos_decides_between_a_choice_and_one_that_it_begins() -> None:
    model = tiny_model("llama").eval()
    short, long = [5, 2], [5, 6, 2]
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([[7, 5]])).logits[0, -1].log_softmax(-1)
    ((first, second),) = log_likelihoods(model, [ChoiceQuestion([7], ["a", "ab"], [short, long])], batch_size=2, pad=0)
    with torch.no_grad():
        after = model(torch.tensor([[7, 5, 6]])).logits[0, -1].log_softmax(-1)
    assert second - first == pytest.approx(float(logits[6] + after[2] - logits[2]), abs=1e-4)

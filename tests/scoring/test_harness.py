# SPDX-License-Identifier: Apache-2.0
"""Runs as models of lm-evaluation-harness: each of its tasks is answered as the run's task of that name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dyads.errors import ConfigError
from dyads.runs.folder import RunFolder

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness

from dyads.scoring.harness import HarnessModel  # noqa: E402
from dyads.tuner import use_task  # noqa: E402

WORDS = ["red green blue", "one two three"]


def request(task: str, *arguments: Any, kind: str = "loglikelihood") -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=(task, 0, 1))


def log_likelihood(model: HarnessModel, task: str, context: str, answer: str) -> float:
    """Of the answer's tokens, by a plain forward pass."""
    (context_ids, answer_ids) = model._encode_pair(context, answer)
    ids = torch.tensor([context_ids + answer_ids])
    with torch.no_grad(), use_task(model.model, task):
        logits = model.model(ids).logits.log_softmax(-1)[0, len(context_ids) - 1 : -1]
    return float(logits.gather(1, torch.tensor(answer_ids)[:, None]).sum())


def test_mixed_requests_are_answered_each_as_its_task(trained: Callable[..., RunFolder]) -> None:
    run = trained("more")
    model = HarnessModel(run=str(run.path), batch_size=4)
    texts = [p["prompt"] for p in run.predictions("first_word")[:2]]
    asked = [
        (task, text, f" {texts[0].split()[0]}") for text in texts for task in ("first_word", "has_animal", "first_word")
    ]
    answers = model.loglikelihood([request(*one) for one in asked], disable_tqdm=True)
    expected = [log_likelihood(model, *one) for one in asked]
    assert [answer[0] for answer in answers] == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 3) for value in expected}) == 4, "tasks and texts differ"

    until = {"until": ["</s>"], "max_gen_toks": 3, "do_sample": False}
    both = model.generate_until(
        [request(task, WORDS[0], until, kind="generate_until") for task in TASKS], disable_tqdm=True
    )
    alone = [
        model.generate_until([request(t, WORDS[0], until, kind="generate_until")], disable_tqdm=True) for t in TASKS
    ]
    assert both == [answer for (answer,) in alone]


TASKS = ("first_word", "has_animal")


def test_a_named_task_answers_them_all(trained: Callable[..., RunFolder]) -> None:
    run = str(trained("more").path)
    named, own = HarnessModel(run=run, task="has_animal"), HarnessModel(run=run)
    ((as_named, _),) = named.loglikelihood([request("my_own", WORDS[0], " red")], disable_tqdm=True)
    ((as_own, _),) = own.loglikelihood([request("has_animal", WORDS[0], " red")], disable_tqdm=True)
    assert as_named == as_own
    with pytest.raises(
        ConfigError, match=r"no task with the harness's name 'first_words'.*did you mean 'first_word'.*task=NAME"
    ):
        own.loglikelihood([request("first_words", WORDS[0], " red")], disable_tqdm=True)
    with pytest.raises(ConfigError, match="does not know task 'first_words'"):
        HarnessModel(run=run, task="first_words")


def test_gates_that_do_not_read_the_task_answer_any(trained: Callable[..., RunFolder]) -> None:
    model = HarnessModel(run=str(trained("mode").path))
    answers = model.loglikelihood([request(task, WORDS[0], " red") for task in ("a", "b")], disable_tqdm=True)
    assert answers[0] == answers[1]


def test_an_encoder_is_refused(trained: Callable[..., RunFolder]) -> None:
    with pytest.raises(ConfigError, match=r"answers by the heads of an encoder.*dyads evaluate"):
        HarnessModel(run=str(trained("more", "bert").path))


@pytest.mark.slow
def test_the_harness_finds_the_model_and_scores_a_task(trained: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = trained("more")
    rows = [{"question": p["prompt"], "answer": p["references"][0]} for p in run.predictions("first_word")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "first_word.yaml").write_text(
        "task: first_word\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\ntarget_delimiter: " "\n'
        "generation_kwargs: {until: ['</s>'], max_gen_toks: 4, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    command = [
        sys.executable,
        "-m",
        "dyads.scoring.harness",
        "run",
        "--model",
        "dyads",
        "--model_args",
        f"run={run.path}",
    ]
    more = [
        "--tasks",
        "first_word",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = (tmp_path / "out").rglob("results*.json")
    scores = json.loads(path.read_text())["results"]["first_word"]
    assert scores["exact_match,none"] >= 0

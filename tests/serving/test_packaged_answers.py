# SPDX-License-Identifier: Apache-2.0
"""On SmolLM2-135M in fp32, greedy answers to real prompts are those of `dyads generate`, in a full batch too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from dyads.models.load import load_tokenizer
from dyads.models.packaged import whereabouts
from dyads.recipe.spec import Recipe
from dyads.scoring.evaluate import generate
from dyads.tasks import load_suite
from dyads.training.train import train
from made_servers import served

MODEL = "packaged:smollm2-135m"


@pytest.mark.slow
@pytest.mark.skipif(whereabouts("smollm2-135m")[0] is None, reason="needs the packaged SmolLM2")
def test_answers_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    runs, asked = {}, []
    for method in ({"name": "more", "r": 8, "task_dim": 8}, {"name": "mode", "r": 2, "num_experts": 4}):
        recipe = Recipe.model_validate(
            {
                "name": method["name"],
                "model": {"name": MODEL, "dtype": "float32"},
                "method": {**method, "target_modules": ["q_proj", "v_proj"]},
                "tasks": {"family": "starter", "train_per_task": 8, "validation_per_task": 1, "test_per_task": 2},
                "train": {"steps": 4, "batch_size": 4, "learning_rate": 3e-3, "threads": 1},
            }
        )
        name = str(method["name"])
        runs[name] = train(recipe, tmp_path / name, evaluate=False)
        tasks = load_suite(recipe.tasks).tasks
        asked += [(name, task.name, example.prompt) for task in tasks for example in task.test]
    expected = []
    for name, run in runs.items():
        own = [(task, prompt) for of, task, prompt in asked if of == name]
        prompts, tasks_ = [prompt for _, prompt in own], [task for task, _ in own]
        expected += generate(run, prompts, tasks_, max_new_tokens=16, batch_size=1)
    with served(runs, slots=16) as server, httpx.Client(base_url=server.address, timeout=600) as http:

        def said(name: str, task: str, prompt: str) -> str:
            body = {"model": f"{name}/{task}", "prompt": prompt, "max_tokens": 16}
            text: str = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
            return text

        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(said, *zip(*asked, strict=True)))
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 12}
        chat = http.post("/v1/chat/completions", json=body).json()
    template = load_tokenizer(MODEL).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert chat["usage"]["prompt_tokens"] == len(template)
    assert "4" in chat["choices"][0]["message"]["content"]
    assert len(set(found)) > 12
    assert found == expected

# SPDX-License-Identifier: Apache-2.0
"""How many examples a second are scored, beside a plain loop of `generate` in file order?

Both sides have the same model, prompts, limits and batch size, in one process, taking turns. Their answers are
compared: in fp32 all must be equal; in bf16 a batch's width may change a rounding, so those that differ are counted.

`python -m benchmarks.scoring JOB` answers every line it reads with one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

LABELS = {"dyads": "dyads", "plain": "a plain loop of generate"}


def trained_run(job: dict[str, Any]) -> Path:
    """The run that is scored: the one given, else the demo's MoDE after a few steps, trained once."""
    from dyads.recipe.spec import Recipe
    from dyads.training.train import train

    if job["run"]:
        return Path(job["run"])
    folder = Path(job["out"]) / "models" / f"scored-{job['steps']}"
    if not (folder / "adapter" / "adapter_model.safetensors").is_file():
        recipe = Recipe.model_validate(
            {
                "name": "MoDE 4x2, scored by the benchmark",
                "model": {"name": job["model"], "dtype": job["dtype"], "attention": "eager"},
                "method": {
                    "name": "mode",
                    "num_experts": 4,
                    "r": 2,
                    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
                },
                "tasks": {"family": "starter"},
                "mixture": {"kind": "uniform"},
                "train": {"steps": job["steps"], "batch_size": 16, "learning_rate": 3e-3, "warmup": 0.05},
            }
        )
        shutil.rmtree(folder, ignore_errors=True)
        train(recipe, folder, evaluate=False)
    return folder


def in_dtype(folder: Path, dtype: str, out: Path) -> Path:
    """The run with its base model in another precision: its recipe and adapter in a folder beside."""
    from dyads.runs.folder import RunFolder

    recipe = RunFolder(folder).recipe()
    if recipe.model.dtype == dtype:
        return folder
    changed = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
    other = out / f"{folder.name}-{dtype}"
    shutil.rmtree(other, ignore_errors=True)
    RunFolder.create(other, changed)
    shutil.copytree(folder / "adapter", other / "adapter")
    if (folder / "env.json").is_file():
        shutil.copy(folder / "env.json", other / "env.json")
    return other


class Scoring:
    """A run's answerer and the examples it is asked."""

    def __init__(self, folder: Path, limit: int, batch_size: int, new_tokens: int | None, threads: int) -> None:
        from dyads.data.tokens import PromptTokenizer
        from dyads.recipe.spec import EvaluateSpec
        from dyads.runs.folder import RunFolder
        from dyads.scoring.answerer import Answerer
        from dyads.tasks import load_suite

        run = RunFolder.open(folder)
        recipe = run.recipe()
        self.spec = EvaluateSpec(batch_size=batch_size, limit=limit)
        self.answerer: Any = Answerer(run)
        torch.set_num_threads(threads)
        tasks = load_suite(recipe.tasks).tasks
        asked = [(t.name, t.test[i]) for t in tasks for i in self.spec.pick(len(t.test))]
        self.tasks, self.examples = [name for name, _ in asked], [example for _, example in asked]
        self.new_tokens = new_tokens or max(task.max_new_tokens for task in tasks)
        self.prompt_tokens = recipe.train.max_prompt_tokens
        self.prompt_tokenizer = PromptTokenizer(self.answerer.tokenizer, max_prompt_tokens=self.prompt_tokens)

    def dyads(self) -> list[str]:
        """As `dyads evaluate` asks."""
        return list(self.answerer.answers(self.examples, self.tasks, self.spec, self.new_tokens, self.prompt_tokens))

    @torch.inference_mode()
    def plain(self) -> list[str]:
        """Batches in file order, each until its last answer has ended."""
        from dyads.data.batches import Collator

        tokenizer, model = self.answerer.tokenizer, self.answerer.model
        collator = Collator(tokenizer.pad_token_id, side="left")
        answers: list[str] = []
        for start in range(0, len(self.examples), self.spec.batch_size):
            part = self.examples[start : start + self.spec.batch_size]
            batch = collator.prompts([self.prompt_tokenizer.prompt(e) for e in part], [0] * len(part))
            inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            if self.answerer.needs_task:
                inputs["task"] = self.tasks[start : start + len(part)]
            output = model.generate(
                **inputs,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            answers += [text.strip() for text in texts]
        return answers

    def timed(self, side: str) -> tuple[float, list[str]]:
        """(examples per second, answers) of a side."""
        begin = time.perf_counter()
        answers = getattr(self, side)()
        return len(self.examples) / (time.perf_counter() - begin), answers


def main() -> None:
    """Train the run if there is none, compare answers in fp32, then serve rounds in the run's own precision."""
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(job["threads"])
    folder = trained_run(job)
    common = (job["batch_size"], job["new_tokens"], job["threads"])
    exact = Scoring(in_dtype(folder, "float32", Path(job["out"]) / "models"), job["exact_limit"], *common)
    differing = sum(a != b for a, b in zip(exact.dyads(), exact.plain(), strict=True))
    compared = len(exact.examples)
    del exact
    scoring = Scoring(folder, job["limit"], *common)
    warm = Scoring.timed
    _, ours = warm(scoring, "dyads")
    _, theirs = warm(scoring, "plain")
    facts = {
        "asked": len(scoring.examples),
        "new_tokens": scoring.new_tokens,
        "differing": sum(a != b for a, b in zip(ours, theirs, strict=True)),
        "compared_fp32": compared,
        "differing_fp32": differing,
    }
    print(json.dumps({"facts": facts}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"value": scoring.timed(line.strip())[0]}), file=answers, flush=True)


if __name__ == "__main__":
    main()

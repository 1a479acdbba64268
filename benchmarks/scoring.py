# SPDX-License-Identifier: Apache-2.0
"""Scoring: examples per second of `dyads evaluate`, beside a loop of `generate` in file order.

Both sides have the same model, prompts, limits and batch size, in one process, taking turns; once in a process as users
have it, and once in one where glibc keeps freed memory, as for all other timings. Their predictions are compared: in
fp32 all must be equal; in bf16 a batch's width may change a rounding, so those that differ are counted.

`python -m benchmarks.scoring JOB` writes one line of JSON for every side that it reads.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import Worker, WorkerError, rotated
from benchmarks.training import TARGETS

LABELS = {"dyads": "dyads", "plain": "a plain loop of generate"}
METRICS = {"per_second": False, "per_second_kept": True}
"""Whether glibc keeps freed memory in the process (rounds.KEEP_MEMORY). By default it does not, and each step of
`generate` then takes fresh memory for the keys and values that it copies."""


def job(*, quick: bool, run: Path | None, out: Path) -> dict[str, Any]:
    """What the worker process needs to know."""
    return {
        "model": "packaged:smollm2-135m",
        "dtype": "bfloat16",
        "steps": 2 if quick else 40,
        "run": str(run.absolute()) if run else None,
        "limit": 1 if quick else 8,
        "exact_limit": 1 if quick else 2,
        "batch_size": 4 if quick else 32,
        "new_tokens": 4 if quick else None,
        "threads": 1 if quick else 2,
        "out": str(out),
        "quick": quick,
    }


def measure(job: dict[str, Any], rounds: int, logs: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """{facts, rounds, errors} of both sides, which take turns in one process, for each of METRICS."""
    facts: dict[str, Any] = {}
    results: list[dict[str, Any]] = [{} for _ in range(rounds)]
    for metric, keep_memory in METRICS.items():
        worker = Worker("benchmarks.scoring", job, job["threads"], logs / f"scoring-{metric}.log", keep_memory)
        try:
            facts = worker.read()["facts"]
            for number, result in enumerate(results):
                result[metric] = {side: worker.request(side)["value"] for side in rotated(list(LABELS), number)}
                say(f"{metric}, round {number + 1} of {rounds}")
        except WorkerError as failed:
            say(f"scoring failed: {failed}")
            return {"facts": {}, "rounds": [], "errors": {"dyads": str(failed)}}
        finally:
            worker.close()
    return {"facts": {"dyads": facts}, "rounds": results, "errors": {}}


def trained_run(job: dict[str, Any]) -> Path:
    """Folder of the scored run: the given one, else the demo's MoDE trained for a few steps, once."""
    if job["run"]:
        return Path(job["run"])
    folder = Path(job["out"]) / "models" / f"scored-{job['steps']}"
    train_once(folder, "MoDE 4x2, scored by the benchmark", {"name": "mode", "num_experts": 4, "r": 2}, job)
    return folder


def train_once(folder: Path, name: str, method: dict[str, Any], job: dict[str, Any]) -> None:
    """Train a method on the starter suite for the job's steps, where the folder has no adapter yet."""
    from dyads.recipe.spec import Recipe
    from dyads.training.train import train

    if (folder / "adapter" / "adapter_model.safetensors").is_file():
        return
    recipe = Recipe.model_validate(
        {
            "name": name,
            "model": {"name": job["model"], "dtype": job["dtype"], "attention": "eager"},
            "method": {**method, "target_modules": TARGETS},
            "tasks": {"family": "starter"},
            "mixture": {"kind": "uniform"},
            "train": {"steps": job["steps"], "batch_size": 16, "learning_rate": 3e-3, "warmup": 0.05},
        }
    )
    shutil.rmtree(folder, ignore_errors=True)
    train(recipe, folder, evaluate=False)


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
    """A run's answerer and the examples that it scores."""

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
        scored = [(t.name, t.test[i]) for t in tasks for i in self.spec.pick(len(t.test))]
        self.tasks, self.examples = [name for name, _ in scored], [example for _, example in scored]
        self.new_tokens = new_tokens or max(task.max_new_tokens for task in tasks)
        self.prompt_tokens = recipe.train.max_prompt_tokens
        self.prompt_tokenizer = PromptTokenizer(self.answerer.tokenizer, max_prompt_tokens=self.prompt_tokens)

    def dyads(self) -> list[str]:
        """Predictions as `dyads evaluate` makes them."""
        limits = self.new_tokens, self.prompt_tokens
        return list(self.answerer.answer_prompts(self.examples, self.tasks, self.spec, *limits))

    @torch.inference_mode()
    def plain(self) -> list[str]:
        """Predictions in batches of file order, each generated until its longest has ended."""
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
    """Train the run if there is none, compare predictions in fp32, then time rounds in the run's own precision."""
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
        "examples": len(scoring.examples),
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

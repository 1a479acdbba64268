# SPDX-License-Identifier: Apache-2.0
"""Training: examples per second of a whole run, beside TRL's SFTTrainer with PEFT LoRA.

Both sides read the same texts, each of them once, in batches of the same size, into adapters of the same size on the
same frozen weights, with the prompt masked. Each side keeps its own defaults for the rest: dyads sorts by length and
applies the LM head to label positions only; TRL shuffles and computes as its version does.

`python -m benchmarks.training JOB` runs one side once and writes one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.rounds import Worker, WorkerError, rotated

SNI = Path("../shared/data/sni")

LABELS = {
    "dyads-mode": "dyads, MoDE 16x4",
    "dyads-lora": "dyads, LoRA of the same size",
    "trl": "TRL, LoRA, no checkpointing",
    "trl-eager": "the same, eager attention",
    "trl-default": "TRL, LoRA, all defaults",
}
LORA_R = 66
"""Rank at which LoRA has the size of MoDE 16x4 on q, k, v and o of SmolLM2: 7.60 against 7.65 million parameters."""
GROUPS = {"main": ("dyads-mode", "trl"), "others": ("trl", "dyads-lora", "trl-eager", "trl-default")}
"""Sides that are measured beside each other, round by round; the first group has the bar."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def job(*, quick: bool, sni: Path, attention: str) -> dict[str, Any]:
    """What a worker process needs to know beside its side."""
    return {
        "model": "packaged:smollm2-135m",
        "dtype": "bfloat16",
        "examples": 8 if quick else 64,
        "batch_size": 4 if quick else 16,
        "accumulation": 2,
        "max_prompt_tokens": 64 if quick else 384,
        "threads": 1 if quick else 2,
        "sni": str(sni),
        "attention": attention,  # of the dyads side; eager, as in the shipped recipes
        "quick": quick,
    }


def measure(
    job: dict[str, Any], sides: Sequence[str], rounds: int, logs: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """{facts, rounds, errors} of some sides, each run in a process of its own in every round."""
    facts: dict[str, Any] = {}
    errors: dict[str, str] = {}
    results = []
    for number in range(rounds):
        values: dict[str, dict[str, float]] = {"examples": {}, "seconds": {}, "train_seconds": {}}
        for side in rotated(list(sides), number):
            if side in errors:
                continue
            worker = Worker("benchmarks.training", {**job, "side": side}, job["threads"], logs / f"{side}.log")
            try:
                answer = worker.read()
            except WorkerError as failed:
                errors[side] = str(failed)
                say(f"{side} failed: {failed}")
                continue
            finally:
                worker.close()
            facts[side] = {k: answer[k] for k in ("parameters", "tokens", "family")}
            for metric in ("seconds", "train_seconds"):
                values[metric][side] = answer[metric]
            values["examples"][side] = answer["examples"] / answer["seconds"]
            say(f"{side}: {values['examples'][side]:.2f} examples/s")
        results.append(values)
    return {"facts": facts, "rounds": results, "errors": errors}


def recipe_of(side: str, job: dict[str, Any]) -> Any:
    """The recipe of a dyads run; TRL's side takes its examples from one too."""
    from dyads.recipe.spec import Recipe

    lora = {"name": "lora", "r": LORA_R} if not job["quick"] else {"name": "lora", "r": 4}
    mode = {"name": "mode", "r": 4 if not job["quick"] else 1, "num_experts": 16 if not job["quick"] else 4}
    sni = Path(job["sni"])
    tasks = (
        {"family": "sni", "path": str(sni), "names": "mode-case-study-stand-ins", "protocol": "mode"}
        if sni.is_dir()
        else {"family": "starter"}
    )
    return Recipe.model_validate(
        {
            "name": side,
            "model": {"name": job["model"], "dtype": job["dtype"], "attention": job["attention"]},
            "method": {**(mode if side == "dyads-mode" else lora), "target_modules": TARGETS},
            "tasks": tasks,
            "train": {
                "steps": job["examples"] // job["batch_size"],
                "batch_size": job["batch_size"],
                "gradient_accumulation": job["accumulation"],
                "learning_rate": 1e-3,
                "max_prompt_tokens": job["max_prompt_tokens"],
                "save_steps": None,
                "threads": job["threads"],
            },
        }
    )


def examples_of(recipe: Any, job: dict[str, Any]) -> Any:
    """A suite with `examples` training examples that no side has to cut, equally many of every task."""
    from dyads.data.tokens import PromptTokenizer
    from dyads.models.load import load_tokenizer
    from dyads.tasks import Suite, load_suite

    prompt_tokenizer = PromptTokenizer(load_tokenizer(recipe.model.name))
    tasks = load_suite(recipe.tasks).tasks
    share = -(-job["examples"] // len(tasks))
    kept = []
    for task in tasks:
        fitting = []
        for example in task.train:
            texts = [example.prompt, *example.shorter]
            short = [
                t for t in texts if len(prompt_tokenizer.prompt(replace(example, prompt=t, shorter=()))) <= _room(job)
            ]
            if short and len(prompt_tokenizer.target(example)) <= 128:
                fitting.append(replace(example, prompt=short[0], shorter=()))
            if len(fitting) == share:
                break
        if fitting:
            kept.append(replace(task, train=tuple(fitting)))
    return Suite(tuple(kept))


def _room(job: dict[str, Any]) -> int:
    return int(job["max_prompt_tokens"])


def dyads_side(job: dict[str, Any], recipe: Any, suite: Any, folder: Path) -> dict[str, float]:
    """`dyads train` without its evaluation."""
    from dyads.runs.folder import RunFolder
    from dyads.training.train import Training

    begin = time.perf_counter()
    training = Training(recipe, suite)
    run = RunFolder.create(folder, recipe)
    ready = time.perf_counter()
    training.run(run)
    end = time.perf_counter()
    lengths = [[len(training.dataset[at]) for at in batch] for batch in training.batches]
    return {
        "seconds": end - begin,
        "train_seconds": end - ready,
        "parameters": training.parameters,
        "tokens": sum(map(sum, lengths)),
    }


def trl_side(job: dict[str, Any], recipe: Any, suite: Any, folder: Path) -> dict[str, float]:
    """SFTTrainer on the examples that the dyads side draws, as prompts and completions."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined,unused-ignore]

    from dyads.data.batches import TaskDataset
    from dyads.data.mixture import schedule
    from dyads.data.tokens import PromptTokenizer
    from dyads.models.load import load_model, load_tokenizer

    spec, side = recipe.train, job["side"]
    dataset = TaskDataset(suite.tasks, PromptTokenizer(load_tokenizer(recipe.model.name)))
    drawn = schedule(
        dataset.lengths(),
        spec=recipe.mixture,
        steps=spec.steps,
        batch_size=spec.batch_size,
        seed=recipe.seed,
        window=spec.bucket_window,
    )
    rows = []
    for number, index in (at for batch in drawn for at in batch):
        example = suite.tasks[number].train[index]
        prompt = example.prompt.rstrip(" ")  # dyads moves blanks there too
        rows.append({"prompt": prompt, "completion": example.prompt[len(prompt) :] + example.references[0]})
    begin = time.perf_counter()
    attention = "eager" if side == "trl-eager" else None
    model = load_model(recipe.model.model_copy(update={"attention": attention}))
    choices: dict[str, Any] = {} if side == "trl-default" else {"gradient_checkpointing": False}
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=spec.batch_size // spec.gradient_accumulation,
        gradient_accumulation_steps=spec.gradient_accumulation,
        num_train_epochs=1,
        learning_rate=spec.learning_rate,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        **choices,
    )
    lora = LoraConfig(**recipe.method.options, lora_alpha=recipe.method.options["r"], task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(recipe.model.name),
        peft_config=lora,
    )
    ready = time.perf_counter()
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    end = time.perf_counter()
    assert trainer.state.global_step == spec.steps, f"{trainer.state.global_step} steps instead of {spec.steps}"
    return {
        "seconds": end - begin,
        "train_seconds": end - ready,
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "tokens": sum(len(row["input_ids"]) for row in trainer.train_dataset),
    }


def main() -> None:
    """Run one side once."""
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(job["threads"])
    warnings.simplefilter("ignore")
    recipe = recipe_of(job["side"], job)
    suite = examples_of(recipe, job)
    run = dyads_side if job["side"].startswith("dyads") else trl_side
    with tempfile.TemporaryDirectory() as folder:
        facts = run(job, recipe, suite, Path(folder) / "run")
    drawn = recipe.train.steps * recipe.train.batch_size
    print(json.dumps({**facts, "examples": drawn, "family": recipe.tasks.family}), file=answers, flush=True)


if __name__ == "__main__":
    main()

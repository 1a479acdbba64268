# SPDX-License-Identifier: Apache-2.0
"""What does a run know? Answers are generated for every task's instances, kept, and scored by the task itself."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dyads.data.batches import Encoder, PromptBatch, prompt_batches, restore_order
from dyads.errors import ConfigError, RunError, TaskError, did_you_mean
from dyads.runs.config import EvaluateSpec, Recipe
from dyads.runs.folder import SCHEMA, Prediction, RunFolder, ScoreRow, Scores
from dyads.runs.model import load_model, load_tokenizer, same_model
from dyads.tasks import SPLITS, Example, Suite, Task, load_suite
from dyads.tuner.routing import find_routing

__all__ = ["Answerer", "evaluate", "generate"]


def evaluate(
    folder: RunFolder, *, split: str | None = None, limit: int | None = None, suite: Suite | None = None
) -> Scores:
    """Score a run and keep predictions and scores in its folder. `split` and `limit` replace the recipe's own."""
    if split is not None and split not in SPLITS:
        raise ConfigError(f"cannot evaluate on split '{split}'{did_you_mean(split, SPLITS)}")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"cannot evaluate {limit} instances of each task: limit is a whole number from 1")
    recipe = folder.recipe()
    changes = {k: v for k, v in (("split", split), ("limit", limit)) if v is not None}
    spec = recipe.evaluate.model_copy(update=changes)
    suite = suite or load_suite(recipe.tasks)
    asked = {
        task.name: [task.split(spec.split)[i] for i in spec.pick(len(task.split(spec.split)))] for task in suite.tasks
    }
    if empty := [name for name, examples in asked.items() if not examples]:
        raise TaskError(f"nothing to score: split '{spec.split}' of {', '.join(empty)} is empty")

    if recipe.method.name == "majority":
        answerer: _Majority | Answerer = _Majority()
    else:
        answerer = Answerer(folder)
    answerer.check(suite.tasks)
    answered: dict[str, list[Prediction]] = {}
    rows: list[ScoreRow] = []
    values: dict[str, list[tuple[float, int]]] = {}
    begin = time.perf_counter()
    for number, task in enumerate(tqdm(suite.tasks, desc="scoring", unit="task", disable=None)):
        examples = asked[task.name]
        predictions = answerer.answer(task, number, examples, spec)
        scores = task.score(predictions, examples)
        answered[task.name] = [
            Prediction(
                id=example.id,
                prediction=prediction,
                references=list(example.references),
                scores={score.metric: score.values[i] for score in scores if score.values},
            )
            for i, (example, prediction) in enumerate(zip(examples, predictions, strict=True))
        ]
        fingerprint = task.fingerprint(spec.split)
        for place, score in enumerate(scores):
            rows.append(
                ScoreRow(
                    task=task.name,
                    version=score.version,
                    fingerprint=fingerprint,
                    category=task.category,
                    metric=score.metric,
                    value=score.value,
                    n=score.n,
                    higher_is_better=score.higher_is_better,
                    headline=place == 0,
                )
            )
            for key in (score.metric, *(["headline"] if place == 0 else [])):
                values.setdefault(key, []).append((score.value, score.n))
    trained = [line for line in folder.log() if line.get("event") == "trained"]
    result = Scores(
        schema=SCHEMA,
        run=recipe.name,
        method=recipe.method.name,
        split=spec.split,
        seed=recipe.seed,
        parameters=trained[-1]["parameters"] if trained else 0,
        seconds={
            "train": trained[-1]["seconds"] if trained else 0.0,
            "evaluate": time.perf_counter() - begin,
        },
        steps=trained[-1]["step"] if trained else 0,
        scores=rows,
        micro={key: sum(v * n for v, n in pairs) / sum(n for _, n in pairs) for key, pairs in values.items()},
        macro={key: sum(v for v, _ in pairs) / len(pairs) for key, pairs in values.items()},
    )
    folder.write_results(answered, result)
    return result


def generate(
    folder: RunFolder,
    prompts: Sequence[str],
    tasks: Sequence[str | int | None],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
) -> list[str]:
    """Answers to prompts as they stand; every prompt with the name or id of its task, or None where no gate looks."""
    if len(prompts) != len(tasks):
        raise ConfigError(f"{len(prompts)} prompts, but {len(tasks)} tasks: give one task for every prompt")
    if empty := [i for i, prompt in enumerate(prompts, start=1) if not prompt.strip()]:
        raise ConfigError(f"prompt {empty[0]} is empty: there is nothing to answer")
    answerer = Answerer(folder)
    known = answerer.task_names or folder.task_names()
    for i, task in enumerate(tasks, start=1):
        if task is None and answerer.needs_task:
            raise ConfigError(
                f"prompt {i} has no task, and the gates of '{folder.recipe().method.name}' look at the task:"
                f" name one{did_you_mean('', known)}"
            )
        if known and task is not None and not _is_known(task, known):
            raise ConfigError(f"prompt {i}: the run does not know task '{task}'{did_you_mean(str(task), known)}")
    examples = [Example(id=str(i), prompt=prompt, references=("",)) for i, prompt in enumerate(prompts)]
    spec = EvaluateSpec(batch_size=batch_size, max_new_tokens=max_new_tokens)
    return answerer.answers(examples, tasks, spec, max_new_tokens, None)


def _is_known(task: str | int, known: Sequence[str]) -> bool:
    return task in known if isinstance(task, str) else 0 <= task < len(known)


class _Majority:
    """Always the most frequent answer of the task's training split; the first in the split where several are."""

    def check(self, tasks: Sequence[Task]) -> None:
        if empty := [task.name for task in tasks if not task.train]:
            raise TaskError(f"there is no majority answer without training examples: {', '.join(empty)} has none")

    def answer(self, task: Task, number: int, examples: Sequence[Example], spec: EvaluateSpec) -> list[str]:
        most = Counter(example.references[0] for example in task.train).most_common(1)[0][0]
        return [most] * len(examples)


class Answerer:
    """A run's model, adapter and tokenizer, ready to answer."""

    def __init__(self, folder: RunFolder) -> None:
        recipe = folder.recipe()
        if recipe.method.name == "majority":
            raise ConfigError(f"'{folder.path}' gives the majority answer: it has no model to generate with")
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        self.recipe: Recipe = recipe
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        base = load_model(recipe.model)
        self.model: nn.Module = load_adapter(base, folder) if recipe.method.trains else base
        self.model = self.model.to(self.device).eval()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(recipe.model.name, recipe.model.revision)
        self.encoder = Encoder(
            self.tokenizer,
            max_prompt_tokens=recipe.train.max_prompt_tokens,
            max_target_tokens=recipe.train.max_target_tokens,
            encoder_decoder=bool(base.config.is_encoder_decoder),
        )
        self.routing = find_routing(self.model)

    @property
    def needs_task(self) -> bool:
        """Whether the gates look at the task."""
        return bool(self.routing and self.routing.names)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks that the gates know."""
        return next(iter(self.routing.names.values())) if self.routing and self.routing.names else ()

    def _name(self, task: Task, number: int) -> str:
        nameless = self.task_names == tuple(str(i) for i in range(len(self.task_names)))
        return str(number) if nameless else task.name

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse tasks that the gates do not know."""
        named = [(task.name, self._name(task, number)) for number, task in enumerate(tasks)]
        if self.needs_task and (unknown := [task for task, name in named if name not in self.task_names]):
            raise RunError(
                f"the adapter was trained on {len(self.task_names)} tasks and does not know '{unknown[0]}'"
                f"{did_you_mean(unknown[0], self.task_names)}; score the tasks that it was trained on"
            )

    def answer(self, task: Task, number: int, examples: Sequence[Example], spec: EvaluateSpec) -> list[str]:
        """Answers to a task's examples, in their order. `number` stands for the task where the adapter has no names."""
        limits = [n for n in (task.max_prompt_tokens, self.encoder.max_prompt_tokens) if n is not None]
        name = self._name(task, number)
        most = spec.max_new_tokens or task.max_new_tokens
        return self.answers(examples, [name] * len(examples), spec, most, min(limits) if limits else None)

    @torch.inference_mode()
    def answers(
        self,
        examples: Sequence[Example],
        tasks: Sequence[str | int | None],
        spec: EvaluateSpec,
        max_new_tokens: int,
        max_prompt_tokens: int | None,
    ) -> list[str]:
        """Answers in the order of the examples; batches hold prompts of similar length, and any mix of tasks."""
        if not examples:
            return []
        positions, answers = [], []
        batches = prompt_batches(examples, self.encoder, spec.batch_size, max_prompt_tokens=max_prompt_tokens)
        for at, batch in batches:
            positions.append(at)
            answers.append(self._generate(batch, [tasks[i] for i in at], spec, max_new_tokens))
        return restore_order(positions, answers)

    def _generate(
        self, batch: PromptBatch, tasks: list[str | int | None], spec: EvaluateSpec, max_new_tokens: int
    ) -> list[str]:
        inputs: dict[str, Any] = {k: batch[k].to(self.device) for k in ("input_ids", "attention_mask")}  # type: ignore[literal-required]
        if self.needs_task:
            inputs["task"] = tasks
        output = self.model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=spec.num_beams,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        new = output if self.encoder.encoder_decoder else output[:, batch["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]


def load_adapter(base: nn.Module, folder: RunFolder) -> PeftModel:
    """The run's adapter on its base model; RunError where there is none, or where it was made for another model."""
    path, weights = folder.adapter, folder.adapter / "adapter_model.safetensors"
    if not (path / "adapter_config.json").is_file():
        raise RunError(
            f"'{folder.path}' has no adapter: its training did not end; go on with"
            f" `dyads train RECIPE --out {folder.path} --resume`"
        )
    if not weights.is_file():
        raise RunError(f"'{path}' has no adapter_model.safetensors; adapters are read from safetensors only")
    import dyads.tuner  # noqa: F401  # PEFT has to know the methods

    spec = folder.recipe().model

    def misfit(reason: str) -> RunError:
        return RunError(
            f"the adapter in '{path}' does not fit model '{spec.name}' – it was trained on another one ({reason})"
        )

    try:
        config = PeftConfig.from_pretrained(str(path))
        with safe_open(str(weights), "pt") as file:
            kept = set(file.keys())
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"the adapter in '{path}' is truncated or no adapter: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below, unlike in PEFT
            model = PeftModel.from_pretrained(base, str(path), config=config)
    except (RuntimeError, ValueError) as error:
        shown = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise misfit(shown[min(1, len(shown) - 1)][:200]) from error
    # PEFT takes an adapter of a model with more or fewer layers, as long as those there are of the same size.
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if strange := sorted({key for key in kept - wanted if model.base_model.prefix in key} | (wanted - kept)):
        raise misfit(f"{len(strange)} weights are in one of them only, such as {strange[0]}")
    trained_on = config.base_model_name_or_path
    if trained_on and not (same_model(trained_on, spec.name) and config.revision == spec.revision):
        raise RunError(
            f"the adapter in '{path}' was trained on {_called(trained_on, config.revision)}, but config.yaml names"
            f" {_called(spec.name, spec.revision)}; if that is the same model in another place, write it into"
            " adapter/adapter_config.json too (base_model_name_or_path, revision)"
        )
    return model


def _called(model: str, revision: str | None) -> str:
    return f"'{model}'" + (f" at revision '{revision}'" if revision else "")

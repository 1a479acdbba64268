# SPDX-License-Identifier: Apache-2.0
"""What does a run know? Answers are generated for every task's instances, kept, and scored by the task itself."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dyads.data.batches import Encoder, pad_id_of, prompt_batches
from dyads.errors import ConfigError, RunError, TaskError, did_you_mean
from dyads.runs.config import EvaluateSpec, Recipe
from dyads.runs.decode import Question, decode, refusal
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
    asked = [[task.split(spec.split)[i] for i in spec.pick(len(task.split(spec.split)))] for task in suite.tasks]
    if empty := [task.name for task, examples in zip(suite.tasks, asked, strict=True) if not examples]:
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
    answers = answerer.answer(suite.tasks, asked, spec)
    for task, examples, predictions in zip(suite.tasks, asked, answers, strict=True):
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

    def answer(self, tasks: Sequence[Task], asked: Sequence[Sequence[Example]], spec: EvaluateSpec) -> list[list[str]]:
        most = [Counter(example.references[0] for example in task.train).most_common(1)[0][0] for task in tasks]
        return [[answer] * len(examples) for answer, examples in zip(most, asked, strict=True)]


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

    def answer(self, tasks: Sequence[Task], asked: Sequence[Sequence[Example]], spec: EvaluateSpec) -> list[list[str]]:
        """Answers to the examples asked of every task, in their order. A task's place is its number for the gates."""
        questions = []
        for number, (task, examples) in enumerate(zip(tasks, asked, strict=True)):
            limits = [n for n in (task.max_prompt_tokens, self.encoder.max_prompt_tokens) if n is not None]
            name, most = self._name(task, number), spec.max_new_tokens or task.max_new_tokens
            prompts = (self.encoder.prompt(example, min(limits) if limits else None) for example in examples)
            questions += [Question(prompt, most, name) for prompt in prompts]
        given = iter(self._ask(questions, spec, "scoring"))
        return [[next(given) for _ in examples] for examples in asked]

    def answers(
        self,
        examples: Sequence[Example],
        tasks: Sequence[str | int | None],
        spec: EvaluateSpec,
        max_new_tokens: int,
        max_prompt_tokens: int | None,
    ) -> list[str]:
        """Answers in the order of the examples, whatever their tasks."""
        prompts = [self.encoder.prompt(example, max_prompt_tokens) for example in examples]
        return self._ask([Question(p, max_new_tokens, task) for p, task in zip(prompts, tasks, strict=True)], spec)

    def _ask(self, questions: Sequence[Question], spec: EvaluateSpec, title: str | None = None) -> list[str]:
        """Answers in the order of the questions, with a bar over them where there is a title."""
        held = self.routing.frozen_weights() if self.routing else nullcontext()
        with held, tqdm(total=len(questions), desc=title, unit="instance", disable=None if title else True) as bar:
            if spec.num_beams == 1 and refusal(self.model) is None:
                tokens = decode(
                    self.model,
                    questions,
                    batch_size=spec.batch_size,
                    eos=self.encoder.eos,
                    pad=pad_id_of(self.tokenizer),
                    tasks=self.needs_task,
                    done=bar.update,
                )
            else:
                tokens = self._generate(questions, spec, bar.update)
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.inference_mode()
    def _generate(
        self, questions: Sequence[Question], spec: EvaluateSpec, done: Callable[[int], object]
    ) -> list[list[int]]:
        """What the model's own `generate` answers: for beams, encoder-decoders and whatever `decode` does not serve."""
        answers: list[list[int]] = [[] for _ in questions]
        for limit in dict.fromkeys(question.limit for question in questions):
            numbers = [i for i, question in enumerate(questions) if question.limit == limit]
            prompts = [questions[i].prompt for i in numbers]
            for at, batch in prompt_batches(prompts, self.encoder, spec.batch_size):
                rows = [numbers[i] for i in at]
                task: dict[str, Any] = {"task": [questions[i].task for i in rows]} if self.needs_task else {}
                output = self.model.generate(  # type: ignore[operator]
                    input_ids=batch["input_ids"].to(self.device),
                    attention_mask=batch["attention_mask"].to(self.device),
                    max_new_tokens=limit,
                    do_sample=False,
                    num_beams=spec.num_beams,
                    pad_token_id=self.tokenizer.pad_token_id,
                    eos_token_id=self.tokenizer.eos_token_id,
                    **task,
                )
                new = output if self.encoder.encoder_decoder else output[:, batch["input_ids"].shape[1] :]
                for i, answer in zip(rows, new.tolist(), strict=True):
                    answers[i] = answer
                done(len(rows))
        return answers


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

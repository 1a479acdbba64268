# SPDX-License-Identifier: Apache-2.0
"""Answerers: a run's model with its adapter (by generation, likelihood or heads), and the majority answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from statistics import fmean
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from dyads.console import SILENT, Reporter
from dyads.data.batches import EncodedPair, PairTokenizer, PromptTokenizer, pad_id_of, prompt_batches
from dyads.errors import ConfigError, RunError, TaskError, did_you_mean
from dyads.models.heads import (
    Head,
    HeadQuestion,
    answer_by_heads,
    attach_heads,
    collator_of,
    pair_tokenizer_of,
    read_heads,
)
from dyads.models.load import kind_of, load_model, load_tokenizer
from dyads.models.processes import launched
from dyads.models.prompts import prompt_tokenizer_of
from dyads.recipe.spec import EvaluateSpec, Recipe
from dyads.runs.adapter import check_adapter, load_adapter
from dyads.runs.folder import RunFolder
from dyads.scoring.decode import Question, decode, refusal
from dyads.scoring.likelihood import ChoiceQuestion, log_likelihoods
from dyads.scoring.unseen import INPUTS, StandIn, by_mean, by_nearest, described, own_tasks
from dyads.tasks import Example, Task
from dyads.tasks.template import Template
from dyads.tuner.routing import find_routing

__all__ = ["NO_HEAD", "Answerer", "Majority"]

_RAW = Example("", "", ("",))
_LIMIT = 128
"""Tokens of an answer at most, in a run that keeps no limits."""
NO_HEAD = "; a head cannot stand in for another, but `dyads adapt` learns a new one from a few examples"


class Majority:
    """The most frequent answer of a task's training split, the first of equals; the mean where answers are numbers."""

    def check(self, tasks: Sequence[Task]) -> None:
        if empty := [task.name for task in tasks if not task.train]:
            raise TaskError(f"there is no majority answer without training examples: {', '.join(empty)} has none")

    def answer(
        self,
        tasks: Sequence[Task],
        instances: Sequence[Sequence[Example]],
        spec: EvaluateSpec,
        reporter: Reporter = SILENT,
    ) -> list[list[str]]:
        most = [
            f"{fmean(task.target(example) for example in task.train):.4f}"
            if task.regression
            else Counter(example.references[0] for example in task.train).most_common(1)[0][0]
            for task in tasks
        ]
        return [[answer] * len(examples) for answer, examples in zip(most, instances, strict=True)]


class Answerer:
    """A run's model, adapter and tokenizer, loaded for inference.

    `base` is the run's base model where it is loaded already; the adapter is put into it.
    """

    def __init__(self, folder: RunFolder, base: nn.Module | None = None) -> None:
        recipe = folder.recipe()
        if recipe.method.name == "majority":
            raise ConfigError(f"'{folder.path}' gives the majority answer: it has no model to generate with")
        if recipe.method.trains:
            check_adapter(folder)  # before the base model is loaded
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        self.recipe: Recipe = recipe
        self.device = launched().device
        base = load_model(recipe.model) if base is None else base
        self.heads: tuple[Head, ...] = ()
        kind = kind_of(recipe.model.name, base.config, recipe.model.kind)
        if kind == "encoder":
            self.heads = read_heads(folder.heads)
            attach_heads(base, self.heads, recipe.model.pool)
        self.model: nn.Module = load_adapter(base, folder) if recipe.method.trains else base
        self.model = self.model.to(self.device).eval()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(recipe.model.name, recipe.model.revision)
        self.prompt_tokenizer: PromptTokenizer | PairTokenizer
        if self.heads:
            self.prompt_tokenizer = pair_tokenizer_of(base, self.tokenizer, recipe.train.max_prompt_tokens)
            self.collator = collator_of(base, self.tokenizer)
        else:
            self.prompt_tokenizer = prompt_tokenizer_of(
                base.config, kind, self.tokenizer, recipe, folder.chat_template()
            )
        self.templates, self.run_tasks = folder.templates(), folder.task_names()
        self.routing = find_routing(self.model)

    @property
    def needs_task(self) -> bool:
        """Whether the gates depend on the task."""
        return bool(self.routing and self.routing.names)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks of the heads, else of the gates; empty where there are neither."""
        if self.heads:
            return tuple(head.task for head in self.heads)
        return next(iter(self.routing.names.values())) if self.routing and self.routing.names else ()

    def add_unseen(self, tasks: Sequence[Task], spec: EvaluateSpec) -> list[StandIn]:
        """Add those of the tasks that the gates do not know, by the policy `spec.unseen`.

        Nothing is added with the policy `error`, where no gate depends on the task, and to heads.
        """
        unseen = [task for task in tasks if task.name not in self.task_names]
        if not unseen or spec.unseen == "error" or self.heads or not self.needs_task:
            return []
        if spec.nearest_by == "description":
            return self.add_unseen_texts(described(unseen), spec)
        return self.add_unseen_texts({task.name: task.split(spec.split)[:INPUTS] for task in unseen}, spec)

    def add_unseen_texts(self, unseen: Mapping[str, Sequence[Example]], spec: EvaluateSpec) -> list[StandIn]:
        """As `add_unseen`, for task names that each come with the texts to compare: inputs or a description."""
        assert isinstance(self.model, PeftModel)
        assert isinstance(self.prompt_tokenizer, PromptTokenizer)
        if spec.unseen == "mean":
            return by_mean(self.model, list(unseen))
        own = own_tasks(self.recipe)
        if gone := [name for name in self.task_names if name not in {task.name for task in own}]:
            raise RunError(
                f"unseen 'nearest' compares with all tasks that the adapter knows, but the tasks of its recipe lack"
                f" {', '.join(gone)}: restore their data, or choose unseen: mean"
            )
        texts = described(own) if spec.nearest_by == "description" else {t.name: t.train[:INPUTS] for t in own}
        known = {name: texts[name] for name in self.task_names}
        if without := [name for name, examples in known.items() if not examples]:
            raise RunError(
                "unseen 'nearest' compares with inputs of all tasks that the adapter knows, but"
                f" {', '.join(without[:5])} has no training examples: compare descriptions (nearest_by: description)"
                ", or choose unseen: mean"
            )
        return by_nearest(self.model, self.prompt_tokenizer, unseen, known, batch_size=spec.batch_size)

    def check(self, tasks: Sequence[Task]) -> None:
        """RunError for a task that the gates or the heads do not know, or whose labels have changed."""
        for task in tasks if self.heads else ():
            head = next((head for head in self.heads if head.task == task.name), None)
            if head is None:
                raise RunError(
                    f"the adapter has heads for {len(self.heads)} tasks and none for '{task.name}'"
                    f"{did_you_mean(task.name, [head.task for head in self.heads])}; score the tasks that it was"
                    f" trained on{NO_HEAD}"
                )
            if head.labels != task.labels:
                raise RunError(
                    f"the head of '{task.name}' was trained on labels {', '.join(head.labels) or '(numbers)'}, but the"
                    f" task now has {', '.join(task.labels) or '(numbers)'}: train the run again"
                )
        if self.needs_task and (unknown := [task.name for task in tasks if task.name not in self.task_names]):
            raise RunError(
                f"the adapter was trained on {len(self.task_names)} tasks and does not know '{unknown[0]}'"
                f"{did_you_mean(unknown[0], self.task_names)}; score the tasks that it was trained on, or choose a"
                " stand-in for others (evaluate.unseen: nearest or mean)"
            )

    def answer(
        self,
        tasks: Sequence[Task],
        instances: Sequence[Sequence[Example]],
        spec: EvaluateSpec,
        reporter: Reporter = SILENT,
    ) -> list[list[str]]:
        """Answers to the instances of every task, in their order."""
        places = {head.task: place for place, head in enumerate(self.heads)}
        for_heads: list[HeadQuestion] = []
        choices: list[ChoiceQuestion] = []
        questions: list[Question] = []
        tokenizer = self.prompt_tokenizer
        for task, examples in zip(tasks, instances, strict=True):
            limit = task.max_prompt_tokens
            if isinstance(tokenizer, PairTokenizer):
                for_heads += _head_questions(tokenizer, examples, [places[task.name]] * len(examples), limit)
                continue
            for example in examples:
                prompt = tokenizer.prompt(example, limit)
                if spec.answer == "likelihood":
                    given = task.choices(example)
                    answers = [tokenizer.choice(example, choice) for choice in given]
                    choices.append(ChoiceQuestion(prompt, given, answers, task.name))
                else:
                    most = tokenizer.answer_limit(prompt, spec.max_new_tokens or task.max_new_tokens)
                    strip = task.template is None or task.template.strips_answers
                    questions.append(Question(prompt, most, task.name, example, strip))
        if for_heads:
            texts = self._answer_by_heads(for_heads, spec, reporter)
        elif choices:
            texts = self._choose(choices, spec, reporter)
        else:
            texts = self._write(questions, spec, reporter)
        remaining = iter(texts)
        return [[next(remaining) for _ in examples] for examples in instances]

    def answer_prompts(
        self,
        examples: Sequence[Example],
        tasks: Sequence[str | int | None],
        spec: EvaluateSpec,
        max_new_tokens: int | None,
        reporter: Reporter = SILENT,
    ) -> list[str]:
        """Answers to prompts, each with the name or id of its task, in their order.

        The limits of prompts are those of their tasks, as in the run's evaluation, and so are those of answers where
        `max_new_tokens` is None.
        """
        templates = [self.template(task) for task in tasks]
        limits = [template.max_prompt_tokens if template is not None else None for template in templates]
        if isinstance(self.prompt_tokenizer, PairTokenizer):
            names = [head.task for head in self.heads]
            places = [names.index(task) if isinstance(task, str) else cast(int, task) for task in tasks]
            by_head = [
                question
                for example, place, limit in zip(examples, places, limits, strict=True)
                for question in _head_questions(self.prompt_tokenizer, [example], [place], limit)
            ]
            return self._answer_by_heads(by_head, spec, reporter)
        questions = []
        for example, task, template, limit in zip(examples, tasks, templates, limits, strict=True):
            prompt = self.prompt_tokenizer.prompt(example, limit)
            strip = template is None or template.strips_answers
            most = self.prompt_tokenizer.answer_limit(prompt, max_new_tokens or self.answer_limit(template))
            questions.append(Question(prompt, most, task, example, strip))
        return self._write(questions, spec, reporter)

    def template(self, task: str | int | None) -> Template | None:
        """The template of a task of the run; None for another task."""
        name = self.run_tasks[task] if isinstance(task, int) and 0 <= task < len(self.run_tasks) else task
        return self.templates.get(name) if isinstance(name, str) else None

    def answer_limit(self, template: Template | None) -> int:
        """Tokens of an answer at most, as in the run's evaluation; without a template the most of any task."""
        limits = [t.max_new_tokens for t in ([template] if template is not None else self.templates.values())]
        return self.recipe.evaluate.max_new_tokens or max((n for n in limits if n is not None), default=_LIMIT)

    @contextmanager
    def _progress(self, questions: Sequence[Any], reporter: Reporter) -> Iterator[Callable[[int], object]]:
        """The function that counts answered questions; adapter weights are cached."""
        frozen = self.routing.unchanged_weights() if self.routing else nullcontext()
        with frozen, reporter.track("answering", len(questions), speed="instances/s") as tracker:
            yield tracker.advance

    def _answer_by_heads(self, questions: Sequence[HeadQuestion], spec: EvaluateSpec, reporter: Reporter) -> list[str]:
        with self._progress(questions, reporter) as done:
            return answer_by_heads(
                self.model,
                questions,
                self.collator,
                batch_size=spec.batch_size,
                tasks=self.needs_task,
                done=done,
            )

    def _choose(self, questions: Sequence[ChoiceQuestion], spec: EvaluateSpec, reporter: Reporter) -> list[str]:
        """The most likely choice for every question."""
        with self._progress(questions, reporter) as done:
            found = log_likelihoods(
                self.model,
                questions,
                batch_size=spec.batch_size,
                pad=pad_id_of(self.tokenizer),
                tasks=self.needs_task,
                done=done,
            )
        return [question.best(sums, spec.length_normalise) for question, sums in zip(questions, found, strict=True)]

    def _write(self, questions: Sequence[Question], spec: EvaluateSpec, reporter: Reporter) -> list[str]:
        """Answers in text, by `decode` where it serves the model and by the model's own `generate` elsewhere."""
        assert isinstance(self.prompt_tokenizer, PromptTokenizer)
        with self._progress(questions, reporter) as done:
            if spec.num_beams == 1 and refusal(self.model) is None:
                tokens = decode(
                    self.model,
                    questions,
                    batch_size=spec.batch_size,
                    eos=self.prompt_tokenizer.ends,
                    pad=pad_id_of(self.tokenizer),
                    tasks=self.needs_task,
                    done=done,
                )
            else:
                tokens = self._generate(questions, spec, done)
        found = zip(questions, tokens, strict=True)
        texts = [(self.prompt_tokenizer.answer_text(q.example or _RAW, ids), q.strip) for q, ids in found]
        return [text.strip() if strip else text for text, strip in texts]

    @torch.inference_mode()
    def _generate(
        self, questions: Sequence[Question], spec: EvaluateSpec, done: Callable[[int], object]
    ) -> list[list[int]]:
        """Answers in tokens by the model's own `generate`: for beams, encoder-decoders and models with a `refusal`."""
        assert isinstance(self.prompt_tokenizer, PromptTokenizer)
        encoder_decoder = self.prompt_tokenizer.encoder_decoder
        answers: list[list[int]] = [[] for _ in questions]
        for limit in dict.fromkeys(question.limit for question in questions):
            numbers = [i for i, question in enumerate(questions) if question.limit == limit]
            prompts = [questions[i].prompt for i in numbers]
            for at, batch in prompt_batches(prompts, self.prompt_tokenizer, spec.batch_size):
                rows = [numbers[i] for i in at]
                task: dict[str, Any] = {"task": [questions[i].task for i in rows]} if self.needs_task else {}
                output = self.model.generate(  # type: ignore[operator]
                    input_ids=batch["input_ids"].to(self.device),
                    attention_mask=batch["attention_mask"].to(self.device),
                    max_new_tokens=limit,
                    do_sample=False,
                    num_beams=spec.num_beams,
                    pad_token_id=self.tokenizer.pad_token_id,
                    eos_token_id=list(self.prompt_tokenizer.ends),
                    **task,
                )
                new = output[:, 1 if encoder_decoder else batch["input_ids"].shape[1] :]
                for i, answer in zip(rows, new.tolist(), strict=True):
                    answers[i] = answer
                done(len(rows))
        return answers


def _head_questions(
    tokenizer: PairTokenizer, examples: Sequence[Example], places: Sequence[int], limit: int | None
) -> list[HeadQuestion]:
    """Questions to the heads at `places`, which are positions among the heads."""
    return [
        HeadQuestion(EncodedPair(ids, types, 0.0, place), example.choices)
        for example, place, (ids, types) in zip(examples, places, tokenizer.read(examples, limit), strict=True)
    ]

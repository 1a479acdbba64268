# SPDX-License-Identifier: Apache-2.0
"""What does a run know? Every task's instances are answered, and the answers kept and scored by the task itself.

A language model writes its answers, or chooses among those that there are by their likelihood (`evaluate.answer`); an
encoder answers by its heads. Other tasks than the run's own are answered too, where need be as `evaluate.unseen` says
(runs/unseen.py).
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dyads.data.batches import EncodedPair, Encoder, PairEncoder, pad_id_of, prompt_batches
from dyads.errors import ConfigError, RunError, TaskError, did_you_mean
from dyads.runs.config import EvaluateSpec, Recipe
from dyads.runs.decode import Question, decode, refusal
from dyads.runs.folder import SCHEMA, Prediction, RunFolder, ScoreRow, Scores
from dyads.runs.heads import Head, HeadQuestion, attach, collator_of, encoder_of, heads_of
from dyads.runs.heads import answer as answer_by_heads
from dyads.runs.heads import read as read_heads
from dyads.runs.likelihood import Choice, log_likelihoods
from dyads.runs.model import kind_of, load_model, load_tokenizer, model_config, same_model
from dyads.runs.unseen import INPUTS, StandIn, by_mean, by_nearest, described, own_tasks
from dyads.tasks import SPLITS, Example, FamilySpec, Suite, Task, load_suite
from dyads.tasks.shots import few_shot
from dyads.tuner.routing import find_routing

__all__ = ["Answerer", "check_answers", "evaluate", "generate"]


def evaluate(
    folder: RunFolder,
    *,
    split: str | None = None,
    limit: int | None = None,
    suite: Suite | FamilySpec | None = None,
    unseen: str | None = None,
    nearest_by: str | None = None,
    into: str | Path | None = None,
    told: Callable[[StandIn], object] = lambda stand_in: None,
) -> Scores:
    """Score a run and keep predictions and scores in its folder.

    `split`, `limit`, `unseen` and `nearest_by` replace the recipe's own, `suite` its tasks. With `into` the results go
    to a new run folder, and those of the run stay: it holds a recipe with these tasks, and no adapter. Where something
    stood in for unseen tasks, the run's name there ends with the policy. `told` hears of each before it is scored.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"cannot evaluate on split '{split}'{did_you_mean(split, SPLITS)}")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"cannot evaluate {limit} instances of each task: limit is a whole number from 1")
    if into is not None and isinstance(suite, Suite):
        raise ConfigError(f"'{into}' is to say which tasks were scored: give their family and its options, not a Suite")
    if into is not None and RunFolder(into).is_run:
        raise RunError(f"'{into}' already holds a run: choose another --out for these scores")
    recipe = folder.recipe()
    changes = {"split": split, "limit": limit, "unseen": unseen, "nearest_by": nearest_by}
    spec = _changed(recipe.evaluate, {key: value for key, value in changes.items() if value is not None})
    tasks_spec = suite if isinstance(suite, FamilySpec) else recipe.tasks
    if not isinstance(suite, Suite):
        suite = load_suite(tasks_spec)
        if recipe.adapt is not None and tasks_spec is recipe.tasks:
            suite = few_shot(suite, recipe.adapt.shots, recipe.seed)  # what it trained on is its train split
    check_answers(recipe, suite.tasks)
    asked = [[task.split(spec.split)[i] for i in spec.pick(len(task.split(spec.split)))] for task in suite.tasks]
    if empty := [task.name for task, examples in zip(suite.tasks, asked, strict=True) if not examples]:
        raise TaskError(f"nothing to score: split '{spec.split}' of {', '.join(empty)} is empty")

    stand_ins: list[StandIn] = []
    if recipe.method.name == "majority":
        answerer: _Majority | Answerer = _Majority()
    else:
        answerer = Answerer(folder)
        stand_ins = answerer.let_stand_in(suite.tasks, spec)
    answerer.check(suite.tasks)
    for stand_in in stand_ins:
        told(stand_in)
    begin = time.perf_counter()
    answers = answerer.answer(suite.tasks, asked, spec)
    seconds = time.perf_counter() - begin
    place, name = folder, recipe.name
    if into is not None:
        by = f"{spec.unseen}-by-description" if spec.nearest_by == "description" else spec.unseen
        name = f"{name}-{by}" if stand_ins else name
        # Tasks that others adapted to are not what this recipe would adapt to.
        adapt = recipe.adapt if tasks_spec is recipe.tasks else None
        scored = recipe.model_copy(update={"name": name, "tasks": tasks_spec, "evaluate": spec, "adapt": adapt})
        place = RunFolder.create(into, scored)
        place.write_environment(seed=recipe.seed, tasks=[task.name for task in suite.tasks], adapter=str(folder.path))
    for stand_in in stand_ins:
        place.append_log({"event": "unseen", **asdict(stand_in)})
    answered: dict[str, list[Prediction]] = {}
    rows: list[ScoreRow] = []
    values: dict[str, list[tuple[float, int]]] = {}
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
        for rank, score in enumerate(scores):
            row = ScoreRow(
                task=task.name,
                version=score.version,
                fingerprint=fingerprint,
                category=task.category,
                metric=score.metric,
                value=score.value,
                n=score.n,
                higher_is_better=score.higher_is_better,
                headline=rank == 0,
            )
            if task.labels:
                row["labels"] = list(task.labels)
            rows.append(row)
            for key in (score.metric, *(["headline"] if rank == 0 else [])):
                values.setdefault(key, []).append((score.value, score.n))
    trained = [line for line in folder.log() if line.get("event") == "trained"]
    result = Scores(
        schema=SCHEMA,
        run=name,
        method=recipe.method.name,
        split=spec.split,
        seed=recipe.seed,
        parameters=trained[-1]["parameters"] if trained else 0,
        seconds={
            "train": trained[-1]["seconds"] if trained else 0.0,
            "evaluate": seconds,
        },
        steps=trained[-1]["step"] if trained else 0,
        scores=rows,
        micro={key: sum(v * n for v, n in pairs) / sum(n for _, n in pairs) for key, pairs in values.items()},
        macro={key: sum(v for v, _ in pairs) / len(pairs) for key, pairs in values.items()},
    )
    place.write_results(answered, result)
    return result


def _changed(spec: EvaluateSpec, changes: Mapping[str, Any]) -> EvaluateSpec:
    """The spec with some keys replaced; what `nearest_by` says goes with the policy that it is for."""
    kept = spec.model_dump()
    if changes.get("unseen", "nearest") != "nearest":
        del kept["nearest_by"]
    try:
        return EvaluateSpec.model_validate({**kept, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{step}: " for step in first["loc"])
        raise ConfigError(f"cannot evaluate: {key}{first.get('ctx', {}).get('error', first['msg'])}") from None


def check_answers(recipe: Recipe, tasks: Sequence[Task]) -> None:
    """Refuse tasks that the model cannot answer in the way that the recipe asks for. Loads no weights."""
    if recipe.method.name == "majority":
        return
    spec = recipe.model
    encoder = kind_of(spec.name, model_config(spec.name, spec.revision), spec.kind) == "encoder"
    if encoder and not recipe.method.trains:
        raise ConfigError(
            f"method '{recipe.method.name}' cannot answer with model '{spec.name}': an encoder answers by heads, which"
            " are random until they are trained; compare with method 'majority' instead"
        )
    if encoder and recipe.evaluate.answer == "likelihood":
        raise ConfigError(
            f"evaluate.answer 'likelihood' does not fit model '{spec.name}': an encoder answers by its heads; leave"
            " evaluate.answer out"
        )
    if encoder:
        heads_of(tasks)
    elif recipe.evaluate.answer == "likelihood":
        for task in tasks:
            free = [e for split in SPLITS for e in task.split(split) if not task.choices(e)]
            if free:
                raise TaskError(
                    f"evaluate.answer 'likelihood' chooses among given answers, but task '{task.name}' has no labels"
                    f" and its example '{free[0].id}' no choices: use answer: generate, or leave the task out"
                )


def generate(
    folder: RunFolder,
    prompts: Sequence[str | Sequence[str]],
    tasks: Sequence[str | int | None],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    unseen: str = "error",
    description: str | None = None,
    told: Callable[[StandIn], object] = lambda stand_in: None,
) -> list[str]:
    """Answers to prompts as they stand; every prompt with the name or id of its task, or None where no gate looks.

    A prompt for an encoder with heads, which always needs a task, is a text or a pair of texts. `unseen` says what
    happens with a name that the run does not know, as `evaluate.unseen` does; the nearest task is the one whose inputs
    are like its first prompts, or whose description is like the one given. `told` hears which task stood in.
    """
    if description is not None and not description.strip():
        raise ConfigError("the description is empty: say what the task asks, or leave it out")
    by = {} if description is None else {"nearest_by": "description"}
    spec = _changed(EvaluateSpec(batch_size=batch_size, max_new_tokens=max_new_tokens), {"unseen": unseen, **by})
    if len(prompts) != len(tasks):
        raise ConfigError(f"{len(prompts)} prompts, but {len(tasks)} tasks: give one task for every prompt")
    texts = [(prompt,) if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]
    if empty := [i for i, parts in enumerate(texts, start=1) if not all(part.strip() for part in parts) or not parts]:
        raise ConfigError(f"prompt {empty[0]} is empty: there is nothing to answer")
    answerer = Answerer(folder)
    most = 2 if answerer.heads else 1
    if long := [i for i, parts in enumerate(texts, start=1) if len(parts) > most]:
        raise ConfigError(
            f"prompt {long[0]} has {len(texts[long[0] - 1])} texts: "
            + ("an encoder reads one or two" if answerer.heads else "only an encoder with heads reads a pair of texts")
        )
    examples = [Example(str(i), parts[0], ("",), segments=parts) for i, parts in enumerate(texts)]
    known = answerer.task_names or folder.task_names()
    new: dict[str, list[Example]] = {}
    for i, task in enumerate(tasks, start=1):
        if task is None and (answerer.needs_task or answerer.heads):
            why = "every task has its own head"
            if not answerer.heads:
                why = f"the gates of '{folder.recipe().method.name}' look at the task"
            raise ConfigError(f"prompt {i} has no task, and {why}: name one{did_you_mean('', known)}")
        if known and task is not None and not _is_known(task, known):
            if spec.unseen == "error" or answerer.heads or not isinstance(task, str):
                refusal = f"prompt {i}: the run does not know task '{task}'{did_you_mean(str(task), known)}"
                raise ConfigError(refusal + _ADAPT * (bool(answerer.heads) and spec.unseen != "error"))
            new.setdefault(task, []).append(examples[i - 1])
    if description is not None and len(new) > 1:
        raise ConfigError(f"one description is given, but the prompts are of {len(new)} unseen tasks: {', '.join(new)}")
    if new and answerer.needs_task:
        like = [Example("description", description, ("",))] if description is not None else None
        unseen_texts = {task: like or prompts[:INPUTS] for task, prompts in new.items()}
        for stand_in in answerer.stand_ins(unseen_texts, spec):
            told(stand_in)
    return answerer.answers(examples, tasks, spec, max_new_tokens, None)


def _is_known(task: str | int, known: Sequence[str]) -> bool:
    return task in known if isinstance(task, str) else 0 <= task < len(known)


_ADAPT = "; no head can stand in for another, but `dyads adapt` learns a new one from a few examples"


class _Majority:
    """Always the most frequent answer of the task's training split; the first in the split where several are.

    Of numbers always their mean.
    """

    def check(self, tasks: Sequence[Task]) -> None:
        if empty := [task.name for task in tasks if not task.train]:
            raise TaskError(f"there is no majority answer without training examples: {', '.join(empty)} has none")

    def answer(self, tasks: Sequence[Task], asked: Sequence[Sequence[Example]], spec: EvaluateSpec) -> list[list[str]]:
        most = [
            f"{fmean(task.target(example) for example in task.train):.4f}"
            if task.regression
            else Counter(example.references[0] for example in task.train).most_common(1)[0][0]
            for task in tasks
        ]
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
        self.heads: tuple[Head, ...] = ()
        if kind_of(recipe.model.name, base.config, recipe.model.kind) == "encoder":
            check_adapter(folder)
            self.heads = read_heads(folder.heads)
            attach(base, self.heads, recipe.model.pool)
        self.model: nn.Module = load_adapter(base, folder) if recipe.method.trains else base
        self.model = self.model.to(self.device).eval()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(recipe.model.name, recipe.model.revision)
        limit = recipe.train.max_prompt_tokens
        self.encoder: Encoder | PairEncoder
        if self.heads:
            self.encoder = encoder_of(base, self.tokenizer, limit)
            self.collator = collator_of(base, self.tokenizer)
        else:
            self.encoder = Encoder(
                self.tokenizer,
                max_prompt_tokens=limit,
                max_target_tokens=recipe.train.max_target_tokens,
                encoder_decoder=bool(base.config.is_encoder_decoder),
            )
        self.routing = find_routing(self.model)
        self.trained_on = folder.task_names()
        self.nameless = self.task_names == tuple(str(i) for i in range(len(self.task_names)))

    @property
    def needs_task(self) -> bool:
        """Whether the gates look at the task."""
        return bool(self.routing and self.routing.names)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks that the heads or the gates know."""
        if self.heads:
            return tuple(head.task for head in self.heads)
        return next(iter(self.routing.names.values())) if self.routing and self.routing.names else ()

    def _name(self, task: Task, number: int) -> str:
        """What the gates call the number-th of some tasks. Where they know numbers, those of the training."""
        if not self.nameless:
            return task.name
        if not self.trained_on:
            return str(number)
        return str(self.trained_on.index(task.name)) if task.name in self.trained_on else task.name

    def let_stand_in(self, tasks: Sequence[Task], spec: EvaluateSpec) -> list[StandIn]:
        """Teach the gates the names of tasks that they do not know, as `spec.unseen` says.

        Nothing is done where no gate looks at the task, with the policy `error`, and for heads: they are not made up.
        """
        unseen = [task for number, task in enumerate(tasks) if self._name(task, number) not in self.task_names]
        if not unseen or spec.unseen == "error" or self.heads or not self.needs_task:
            return []
        if spec.nearest_by == "description":
            return self.stand_ins(described(unseen), spec)
        return self.stand_ins({task.name: task.split(spec.split)[:INPUTS] for task in unseen}, spec)

    def stand_ins(self, unseen: Mapping[str, Sequence[Example]], spec: EvaluateSpec) -> list[StandIn]:
        """The same for tasks by name, each with texts to compare: its inputs or its description."""
        assert isinstance(self.model, PeftModel)
        assert isinstance(self.encoder, Encoder)
        if spec.unseen == "mean":
            return by_mean(self.model, list(unseen))
        own = own_tasks(self.recipe)
        called = {self._name(task, number): task for number, task in enumerate(own)}
        if gone := [name for name in self.task_names if name not in called]:
            raise RunError(
                f"unseen 'nearest' compares with all tasks that the adapter knows, but the tasks of its recipe lack"
                f" {', '.join(gone)}: put their data back, or choose mean"
            )
        texts = described(own) if spec.nearest_by == "description" else {t.name: t.train[:INPUTS] for t in own}
        known = {name: texts[called[name].name] for name in self.task_names}
        if without := [name for name, examples in known.items() if not examples]:
            raise RunError(
                f"unseen 'nearest' compares with inputs of all tasks that the adapter knows, but"
                f" {', '.join(without[:5])} has no training examples: compare descriptions (nearest_by: description), or"
                " choose mean"
            )
        return by_nearest(self.model, self.encoder, unseen, known, batch_size=spec.batch_size)

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse tasks that the gates or the heads do not know."""
        for task in tasks if self.heads else ():
            head = next((head for head in self.heads if head.task == task.name), None)
            if head is None:
                raise RunError(
                    f"the adapter has heads for {len(self.heads)} tasks and none for '{task.name}'"
                    f"{did_you_mean(task.name, [head.task for head in self.heads])}; score the tasks that it was"
                    f" trained on{_ADAPT}"
                )
            if head.labels != task.labels:
                raise RunError(
                    f"the head of '{task.name}' was trained on labels {', '.join(head.labels) or '(numbers)'}, but the"
                    f" task now has {', '.join(task.labels) or '(numbers)'}: train the run again"
                )
        named = [(task.name, self._name(task, number)) for number, task in enumerate(tasks)]
        if self.needs_task and (unknown := [task for task, name in named if name not in self.task_names]):
            raise RunError(
                f"the adapter was trained on {len(self.task_names)} tasks and does not know '{unknown[0]}'"
                f"{did_you_mean(unknown[0], self.task_names)}; score the tasks that it was trained on, or say what"
                " stands in for others (evaluate.unseen: nearest or mean)"
            )

    def answer(self, tasks: Sequence[Task], asked: Sequence[Sequence[Example]], spec: EvaluateSpec) -> list[list[str]]:
        """Answers to the examples asked of every task, in their order. A task's place is its number for the gates."""
        places = {head.task: place for place, head in enumerate(self.heads)}
        by_heads: list[HeadQuestion] = []
        choices: list[Choice] = []
        questions: list[Question] = []
        for number, (task, examples) in enumerate(zip(tasks, asked, strict=True)):
            limits = [n for n in (task.max_prompt_tokens, self.encoder.max_prompt_tokens) if n is not None]
            limit, name = min(limits) if limits else None, self._name(task, number)
            if isinstance(self.encoder, PairEncoder):
                by_heads += self._for_heads(self.encoder, examples, [places[task.name]] * len(examples), limit)
                continue
            for example in examples:
                prompt = self.encoder.prompt(example, limit)
                if spec.answer == "likelihood":
                    given = task.choices(example)
                    choices.append(Choice(prompt, given, [self.encoder.choice(example, c) for c in given], name))
                else:
                    questions.append(Question(prompt, spec.max_new_tokens or task.max_new_tokens, name))
        if by_heads:
            texts = self._ask_heads(by_heads, spec, "scoring")
        elif choices:
            texts = self._choose(choices, spec, "scoring")
        else:
            texts = self._ask(questions, spec, "scoring")
        answers = iter(texts)
        return [[next(answers) for _ in examples] for examples in asked]

    def answers(
        self,
        examples: Sequence[Example],
        tasks: Sequence[str | int | None],
        spec: EvaluateSpec,
        max_new_tokens: int,
        max_prompt_tokens: int | None,
    ) -> list[str]:
        """Answers in the order of the examples, whatever their tasks."""
        if isinstance(self.encoder, PairEncoder):
            names = [head.task for head in self.heads]
            places = [names.index(task) if isinstance(task, str) else cast(int, task) for task in tasks]
            return self._ask_heads(self._for_heads(self.encoder, examples, places, max_prompt_tokens), spec)
        prompts = [self.encoder.prompt(example, max_prompt_tokens) for example in examples]
        return self._ask([Question(p, max_new_tokens, task) for p, task in zip(prompts, tasks, strict=True)], spec)

    @contextmanager
    def _working(self, questions: Sequence[Any], title: str | None) -> Iterator[Callable[[int], object]]:
        """Weights are held, and there is a bar over the questions where there is a title; gives its `update`."""
        held = self.routing.frozen_weights() if self.routing else nullcontext()
        with held, tqdm(total=len(questions), desc=title, unit="instance", disable=None if title else True) as bar:
            yield bar.update

    @staticmethod
    def _for_heads(
        encoder: PairEncoder, examples: Sequence[Example], places: Sequence[int], limit: int | None
    ) -> list[HeadQuestion]:
        return [
            HeadQuestion(EncodedPair(ids, types, 0.0, place), example.choices)
            for example, place, (ids, types) in zip(examples, places, encoder.read(examples, limit), strict=True)
        ]

    def _ask_heads(self, questions: Sequence[HeadQuestion], spec: EvaluateSpec, title: str | None = None) -> list[str]:
        """What the heads say, in the order of the questions."""
        with self._working(questions, title) as done:
            return answer_by_heads(
                self.model,
                questions,
                self.collator,
                batch_size=spec.batch_size,
                tasks=self.needs_task,
                done=done,
            )

    def _choose(self, questions: Sequence[Choice], spec: EvaluateSpec, title: str | None = None) -> list[str]:
        """The most likely choices, in the order of the questions."""
        with self._working(questions, title) as done:
            found = log_likelihoods(
                self.model,
                questions,
                batch_size=spec.batch_size,
                pad=pad_id_of(self.tokenizer),
                tasks=self.needs_task,
                done=done,
            )
        return [question.best(sums, spec.length_normalise) for question, sums in zip(questions, found, strict=True)]

    def _ask(self, questions: Sequence[Question], spec: EvaluateSpec, title: str | None = None) -> list[str]:
        """Answers in text, in the order of the questions."""
        assert isinstance(self.encoder, Encoder)
        with self._working(questions, title) as done:
            if spec.num_beams == 1 and refusal(self.model) is None:
                tokens = decode(
                    self.model,
                    questions,
                    batch_size=spec.batch_size,
                    eos=self.encoder.eos,
                    pad=pad_id_of(self.tokenizer),
                    tasks=self.needs_task,
                    done=done,
                )
            else:
                tokens = self._generate(questions, spec, done)
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.inference_mode()
    def _generate(
        self, questions: Sequence[Question], spec: EvaluateSpec, done: Callable[[int], object]
    ) -> list[list[int]]:
        """What the model's own `generate` answers: for beams, encoder-decoders and whatever `decode` does not serve."""
        assert isinstance(self.encoder, Encoder)
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


def check_adapter(folder: RunFolder) -> None:
    """RunError where the run has no adapter yet, or only the scores of another run's."""
    if not (folder.adapter / "adapter_config.json").is_file():
        facts = folder.environment() if folder.task_names() else {}
        if "adapter" in facts:
            raise RunError(
                f"'{folder.path}' holds scores of the adapter in '{facts['adapter']}' and none itself: name that folder"
            )
        raise RunError(
            f"'{folder.path}' has no adapter: its training did not end; go on with"
            f" `dyads train RECIPE --out {folder.path} --resume`"
        )


def load_adapter(base: nn.Module, folder: RunFolder) -> PeftModel:
    """The run's adapter on its base model; RunError where there is none, or where it was made for another model."""
    path, weights = folder.adapter, folder.adapter / "adapter_model.safetensors"
    check_adapter(folder)
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

# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a run: its answers to the instances of tasks, scored by the tasks, and answers to single prompts.

A language model generates its answers or chooses the most likely of given ones (`evaluate.answer`); an encoder answers
by its heads. Tasks that the adapter was not trained on are answered too, with stand-ins where its gates need them
(`evaluate.unseen`, unseen.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from pydantic import ValidationError

from dyads.console import SILENT, Reporter
from dyads.errors import ConfigError, RunError, TaskError, did_you_mean
from dyads.models.heads import heads_of
from dyads.models.load import kind_of, model_config
from dyads.models.processes import launched
from dyads.recipe.spec import EvaluateSpec, Recipe, check_folder_name, differences
from dyads.runs.adapter import fingerprint
from dyads.runs.card import write_card
from dyads.runs.contents import SCHEMA, Prediction, ScoreRow, Scores
from dyads.runs.folder import RunFolder
from dyads.runs.signals import on_sigterm
from dyads.scoring.answerer import NO_HEAD, Answerer, Majority
from dyads.scoring.unseen import INPUTS, StandIn
from dyads.tasks import SPLITS, Example, FamilySpec, Suite, Task, load_suite
from dyads.tasks.shots import few_shot

__all__ = ["check_answers", "check_scored", "evaluate", "generate"]


def evaluate(
    folder: RunFolder,
    *,
    split: str | None = None,
    limit: int | None = None,
    suite: Suite | FamilySpec | None = None,
    unseen: str | None = None,
    nearest_by: str | None = None,
    into: str | Path | None = None,
    on_stand_in: Callable[[StandIn], object] = lambda stand_in: None,
    reporter: Reporter = SILENT,
) -> Scores:
    """Score a run; predictions and scores are written to its folder.

    `split`, `limit`, `unseen` and `nearest_by` override the recipe's section `evaluate`, `suite` its tasks; those of
    another family are all scored. With `into` the results are written to a new run folder, whose recipe has these
    tasks, without an adapter; those of `folder` are unchanged. The new run's name ends with the policy if there are
    stand-ins. `on_stand_in` is called for each of them before scoring; `reporter` shows the progress. In each of
    several processes (torchrun, accelerate launch) this answers a share of the instances, and the main process alone
    writes.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"cannot evaluate on split '{split}'{did_you_mean(split, SPLITS)}")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"cannot evaluate {limit} instances of each task: limit is a whole number from 1")
    if into is not None and isinstance(suite, Suite):
        raise ConfigError(f"into='{into}' writes a recipe with these tasks: suite must be a FamilySpec, got a Suite")
    target = folder if into is None else RunFolder(into)
    processes = launched()
    with target.locked() if processes.is_main_process else nullcontext(), on_sigterm(target.path):
        scores = _evaluate(folder, target, split, limit, suite, unseen, nearest_by, on_stand_in, reporter)
        processes.wait_for_everyone()
    return scores


def _evaluate(
    folder: RunFolder,
    target: RunFolder,
    split: str | None,
    limit: int | None,
    suite: Suite | FamilySpec | None,
    unseen: str | None,
    nearest_by: str | None,
    on_stand_in: Callable[[StandIn], object],
    reporter: Reporter,
) -> Scores:
    beside = target is not folder
    facts = _facts(folder) if beside else {}
    if beside and target.is_run and not _was_interrupted(target, facts):
        raise _other_run(target)
    if beside:
        target.check_free()  # before answering, which takes long
    recipe = folder.recipe()
    changes = {"split": split, "limit": limit, "unseen": unseen, "nearest_by": nearest_by}
    if isinstance(suite, FamilySpec):
        changes["tasks"] = "all"
    spec = _override(recipe.evaluate, {key: value for key, value in changes.items() if value is not None})
    tasks_spec = suite if isinstance(suite, FamilySpec) else recipe.tasks
    if not isinstance(suite, Suite):
        suite = load_suite(tasks_spec)
        if recipe.adapt is not None and tasks_spec is recipe.tasks:
            suite = few_shot(suite, recipe.adapt.shots, recipe.seed)  # the train split that the run was trained on
    tasks = _scored(spec, suite.tasks)
    check_answers(recipe, tasks)
    instances = [[task.split(spec.split)[i] for i in spec.pick(len(task.split(spec.split)))] for task in tasks]

    stand_ins: list[StandIn] = []
    if recipe.method.name == "majority":
        answerer: Majority | Answerer = Majority()
    else:
        answerer = Answerer(folder)
        stand_ins = answerer.add_unseen(tasks, spec)
    answerer.check(tasks)
    for stand_in in stand_ins:
        on_stand_in(stand_in)
    name = recipe.name
    scored = recipe
    if beside:
        if stand_ins:
            policy = f"{spec.unseen}-by-description" if spec.nearest_by == "description" else spec.unseen
            name = check_folder_name(f"{name}-{policy}")  # before answering, which takes long
        adapt = recipe.adapt if tasks_spec is recipe.tasks else None  # `adapt` describes the training on its own tasks
        scored = recipe.model_copy(update={"name": name, "tasks": tasks_spec, "evaluate": spec, "adapt": adapt})
        if target.is_run and differences(target.recipe().resolved(), scored.resolved()):
            raise _other_run(target)
        if target.is_scored and not target.damage():  # the same command was killed when it had finished
            target.clear_ended()
            return target.scores()
    begin = time.perf_counter()
    answers = _answers(answerer, tasks, instances, spec, reporter)
    seconds = time.perf_counter() - begin

    main = launched().is_main_process
    if beside and main:
        target = RunFolder.create(target.path, scored, resume=True)
        target.write_environment(seed=recipe.seed, tasks=[task.name for task in tasks], **facts)
    for stand_in in stand_ins if main else ():
        target.append_log({"event": "unseen", **asdict(stand_in)})
    predictions, rows = _score(tasks, instances, answers, spec.split)
    micro, macro = _means(rows)
    trained = next((line for line in reversed(list(folder.log())) if line.get("event") == "trained"), None)
    result = Scores(
        schema=SCHEMA,
        run=name,
        method=recipe.method.name,
        split=spec.split,
        seed=recipe.seed,
        parameters=trained["parameters"] if trained else 0,
        seconds={"train": trained["seconds"] if trained else 0.0, "evaluate": seconds},
        steps=trained["step"] if trained else 0,
        scores=rows,
        micro=micro,
        macro=macro,
        given_task=recipe.method.reads_task,
    )
    if main and target.has_adapter:
        write_card(target, result)  # before the results, whose manifest ends the evaluation
    if main:
        target.write_results(predictions, result)
    return result


def _answers(
    answerer: Majority | Answerer,
    tasks: Sequence[Task],
    instances: Sequence[Sequence[Example]],
    spec: EvaluateSpec,
    reporter: Reporter,
) -> list[list[str]]:
    """Answers to the instances of every task, in their order; process i of n answers every n-th from the i-th on."""
    processes = launched()
    n, i = processes.num_processes, processes.process_index
    share = [examples[i::n] for examples in instances]
    own = answerer.answer(tasks, share, spec, reporter) if any(share) else [[] for _ in tasks]
    of_processes: list[list[list[str]]] = gather_object([own])
    answers = [[""] * len(examples) for examples in instances]
    for first, found in enumerate(of_processes):
        for texts, of_task in zip(answers, found, strict=True):
            texts[first::n] = of_task
    return answers


def _facts(folder: RunFolder) -> dict[str, str]:
    """Entries of the environment file of scores beside a run: the run, and the fingerprint of its adapter."""
    trains = folder.recipe().method.trains
    return {"adapter": str(folder.path), **({"adapter_sha256": fingerprint(folder)} if trains else {})}


def _was_interrupted(target: RunFolder, facts: Mapping[str, str]) -> bool:
    """Whether `target` holds scores of the same adapter, complete or not, so that their evaluation can be repeated."""
    there = target.environment() if target.has_environment else facts
    same = "adapter_sha256" if "adapter_sha256" in facts else "adapter"  # a folder may be named in another way
    return not (target.has_adapter or target.checkpoints.exists()) and there.get(same) == facts[same]


def _other_run(target: RunFolder) -> RunError:
    return RunError(f"'{target.path}' already holds a run: choose another --out for these scores")


def _score(
    tasks: Sequence[Task], instances: Sequence[Sequence[Example]], answers: Sequence[Sequence[str]], split: str
) -> tuple[dict[str, list[Prediction]], list[ScoreRow]]:
    """Predictions by task, and one row per task and metric; a task's first metric is its headline."""
    predictions: dict[str, list[Prediction]] = {}
    rows: list[ScoreRow] = []
    for task, examples, texts in zip(tasks, instances, answers, strict=True):
        scores = task.score(texts, examples)
        predictions[task.name] = [
            Prediction(
                id=example.id,
                prompt=example.prompt,
                prediction=text,
                references=list(example.references),
                scores={score.metric: score.values[i] for score in scores if score.values},
            )
            for i, (example, text) in enumerate(zip(examples, texts, strict=True))
        ]
        fingerprint = task.fingerprint(split)
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
    return predictions, rows


def _means(rows: Sequence[ScoreRow]) -> tuple[dict[str, float], dict[str, float]]:
    """(means over instances, means over tasks) of every metric, and of all headlines together."""
    values: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        for key in (row["metric"], *["headline"] * row["headline"]):
            values.setdefault(key, []).append((row["value"], row["n"]))
    micro = {key: sum(v * n for v, n in pairs) / sum(n for _, n in pairs) for key, pairs in values.items()}
    macro = {key: sum(v for v, _ in pairs) / len(pairs) for key, pairs in values.items()}
    return micro, macro


def _override(spec: EvaluateSpec, changes: Mapping[str, Any]) -> EvaluateSpec:
    """The spec with some keys replaced; another policy than `nearest` drops the `nearest_by` of the spec."""
    kept = spec.model_dump()
    if changes.get("unseen", "nearest") != "nearest":
        del kept["nearest_by"]
    try:
        return EvaluateSpec.model_validate({**kept, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{step}: " for step in first["loc"])
        raise ConfigError(f"cannot evaluate: {key}{first.get('ctx', {}).get('error', first['msg'])}") from None


def _scored(spec: EvaluateSpec, tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The tasks that are scored, each with instances to score."""
    if not (scored := spec.scored(tasks)):
        raise TaskError("nothing to score: evaluate.tasks is unseen, but every task has training examples")
    if empty := [task.name for task in scored if not task.split(spec.split)]:
        raise TaskError(f"nothing to score: split '{spec.split}' of {', '.join(empty)} is empty")
    return scored


def check_scored(recipe: Recipe, tasks: Sequence[Task]) -> None:
    """Refuse, before the training, what could not be scored after it."""
    scored = _scored(recipe.evaluate, tasks)
    if recipe.method.name == "majority":
        Majority().check(scored)
    unseen = [task.name for task in scored if not task.train]
    if unseen and recipe.method.reads_task and recipe.evaluate.unseen == "error":
        raise ConfigError(
            f"{', '.join(unseen[:5])} {'have' if len(unseen) > 1 else 'has'} no training examples, and the gates of"
            f" '{recipe.method.name}' look at the task: choose a stand-in (evaluate.unseen: nearest or mean), or leave"
            " out what is not trained on"
        )


def check_answers(recipe: Recipe, tasks: Sequence[Task]) -> None:
    """Refuse tasks that the model cannot answer by the recipe's `evaluate.answer`, without loading weights."""
    if recipe.method.name == "majority":
        return
    spec = recipe.model
    encoder = kind_of(spec.name, model_config(spec.name, spec.revision), spec.kind) == "encoder"
    if encoder and not recipe.method.trains:
        raise ConfigError(
            f"method '{recipe.method.name}' cannot answer with model '{spec.name}': an encoder answers by heads, which"
            " are random until they are trained; use method 'majority' as the baseline instead"
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
    prompts: Sequence[str | Sequence[str] | Example],
    tasks: Sequence[str | int | None],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    unseen: str = "error",
    description: str | None = None,
    on_stand_in: Callable[[StandIn], object] = lambda stand_in: None,
    reporter: Reporter = SILENT,
) -> list[str]:
    """Answers to prompts, each with the name or id of its task.

    A text is passed to the model unchanged; an Example, such as `folder.templates()[task].example(row)`, as in
    training. The task may be None where neither gates nor heads depend on it. For an encoder with heads a prompt is a
    text or a pair of texts, or an Example. `unseen` is the policy for task names that the run does not know, as
    `evaluate.unseen`; the nearest task is found from the first prompts with that name, or from `description`.
    `max_new_tokens` limits the answers; None: as in the run's evaluation, as are the limits of prompts and the beams.
    `on_stand_in` is called for every such name, and `reporter` shows the progress.
    """
    if description is not None and not description.strip():
        raise ConfigError("the description is empty: describe the task in a sentence, or leave it out")
    by = {} if description is None else {"nearest_by": "description"}
    beams = folder.recipe().evaluate.num_beams
    given_spec = EvaluateSpec(batch_size=batch_size, max_new_tokens=max_new_tokens, num_beams=beams)
    spec = _override(given_spec, {"unseen": unseen, **by})
    if len(prompts) != len(tasks):
        raise ConfigError(f"{len(prompts)} prompts, but {len(tasks)} tasks: give one task for every prompt")
    texts = [_texts(prompt) for prompt in prompts]
    if empty := [i for i, parts in enumerate(texts, start=1) if not all(part.strip() for part in parts) or not parts]:
        raise ConfigError(f"prompt {empty[0]} is empty: there is nothing to answer")
    given = [(f"prompt {i}", "".join(parts)) for i, parts in enumerate(texts, start=1)]
    for what, text in [*given, ("the description", description or "")]:
        if not _is_unicode(text):
            raise ConfigError(f"{what} is not Unicode text, but has half of a surrogate pair: give it as UTF-8")
    answerer = Answerer(folder)
    most = 2 if answerer.heads else 1
    if long := [i for i, parts in enumerate(texts, start=1) if len(parts) > most]:
        raise ConfigError(
            f"prompt {long[0]} has {len(texts[long[0] - 1])} texts: "
            + ("an encoder reads one or two" if answerer.heads else "only an encoder with heads reads a pair of texts")
        )
    examples = [
        prompt if isinstance(prompt, Example) else Example(str(i), parts[0], ("",), segments=parts)
        for i, (prompt, parts) in enumerate(zip(prompts, texts, strict=True))
    ]
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
                raise ConfigError(refusal + NO_HEAD * (bool(answerer.heads) and spec.unseen != "error"))
            new.setdefault(task, []).append(examples[i - 1])
    if description is not None and len(new) > 1:
        raise ConfigError(f"one description is given, but the prompts are of {len(new)} unseen tasks: {', '.join(new)}")
    if new and answerer.needs_task:
        like = [Example("description", description, ("",))] if description is not None else None
        unseen_texts = {task: like or prompts[:INPUTS] for task, prompts in new.items()}
        for stand_in in answerer.add_unseen_texts(unseen_texts, spec):
            on_stand_in(stand_in)
    return answerer.answer_prompts(examples, tasks, spec, max_new_tokens, reporter)


def _texts(prompt: str | Sequence[str] | Example) -> tuple[str, ...]:
    """The texts that a model reads."""
    if isinstance(prompt, Example):
        return (prompt.prompt,)
    return (prompt,) if isinstance(prompt, str) else tuple(prompt)


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded; bytes of a command line that are not UTF-8 become halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_known(task: str | int, known: Sequence[str]) -> bool:
    return task in known if isinstance(task, str) else 0 <= task < len(known)

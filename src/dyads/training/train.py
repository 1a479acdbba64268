# SPDX-License-Identifier: Apache-2.0
"""How is one adapter trained on many tasks? On transformers' Trainer, with the schedule, batches and loss of dyads.

The Trainer keeps what it is good at: the loop, the optimizer, accelerate, the progress bar, logging, checkpoints and
resuming. Ours are the batches (computed before training, the same for every method of a seed), the task of every
sample, and the loss, for which only label positions go through the LM head. An encoder has a head for every task in the
place of the LM head (models/heads.py), and is trained by the same steps.
"""

from __future__ import annotations

import gc
import inspect
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from dyads.data.batches import (
    IGNORED,
    Collator,
    Encoder,
    PairCollator,
    PairEncoder,
    ScheduledBatches,
    TaskDataset,
    pad_id_of,
)
from dyads.data.mixture import schedule
from dyads.errors import ConfigError, DyadsError, RunError, TaskError
from dyads.models.heads import MODULE, attach, collator_of, encoder_of, head_loss, heads_of
from dyads.models.heads import write as write_heads
from dyads.models.load import Kind, kind_of, load_model, load_tokenizer
from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder
from dyads.scoring.evaluate import check_answers
from dyads.scoring.evaluate import evaluate as evaluate_run
from dyads.tasks import Suite, load_suite
from dyads.tasks.shots import few_shot
from dyads.training.adapt import Adapted, KeepRows, facts_of_source, load_adapted, source_of, start_of
from dyads.tuner.routing import auxiliary_loss, find_routing

__all__ = ["Training", "train"]


def train(recipe: Recipe, out: str | Path, *, resume: bool = False, evaluate: bool = True) -> RunFolder:
    """Train the recipe's method into a run folder and score it there.

    Everything that can be refused is refused before the folder is touched. With `resume` a run that was cut off goes on
    from its last checkpoint, and one that is complete is left as it is.
    """
    folder = RunFolder(out)
    if folder.is_run:
        RunFolder.create(out, recipe, resume=resume)  # refused where it is not this run that goes on
        if folder.is_scored:
            return folder
    _refuse_processes(int(os.environ.get("WORLD_SIZE", "1")), "processes")
    suite = load_suite(recipe.tasks)
    if recipe.adapt is not None:
        suite = few_shot(suite, recipe.adapt.shots, recipe.seed)
    check_answers(recipe, suite.tasks)
    training: Training | None = None
    facts: dict[str, str] = {}
    if recipe.method.trains and not folder.has_adapter:
        if recipe.adapt is not None:
            facts = facts_of_source(recipe, folder)
        training = Training(recipe, suite)
        training.arguments(folder)
    folder = RunFolder.create(out, recipe, resume=resume)
    names = training.names if training is not None else folder.task_names() or [task.name for task in suite.tasks]
    folder.write_environment(seed=recipe.seed, tasks=list(names), **facts)
    if training is not None:
        training.run(folder, resume=resume)
    if evaluate:
        training = None
        gc.collect()  # the trained model makes room for the one that is scored
        evaluate_run(folder, suite=suite)
    return folder


def _refuse_processes(number: int, of_what: str) -> None:
    if number > 1:
        raise ConfigError(
            f"training on {number} {of_what} at once is not supported yet: start one process that sees one device"
            " (`CUDA_VISIBLE_DEVICES=0 dyads train …`, without torchrun or accelerate launch)"
        )


class Training:
    """A model with a fresh adapter, its batches and its Trainer."""

    def __init__(self, recipe: Recipe, suite: Suite) -> None:
        self.recipe, self.suite = recipe, suite
        spec = recipe.train
        if spec.threads:
            torch.set_num_threads(spec.threads)
        set_seed(recipe.seed)
        source = source_of(recipe, suite.tasks) if recipe.adapt is not None else None
        base = load_model(recipe.model)
        kind = kind_of(recipe.model.name, base.config, recipe.model.kind)
        self.encoder_decoder = kind == "seq2seq"
        self.adapted: Adapted | None = None
        self.starts: dict[str, Any] = {}
        self.tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
        self.encoder: Encoder | PairEncoder
        self.collator: Collator | PairCollator
        set_seed(recipe.seed)  # again: the adapter's start must not depend on how the base was loaded
        if source is None:
            self._begin(base, kind)
        else:
            self.adapted = load_adapted(recipe, source, base, suite.tasks)
            self.model, self.names, self.heads = self.adapted.model, self.adapted.names, self.adapted.heads
        places = range(len(self.names))[-len(suite.tasks) :]
        if self.heads:
            by_place = dict(zip(places, suite.tasks, strict=True))
            self.encoder = encoder_of(base, self.tokenizer, spec.max_prompt_tokens, self.heads, by_place)
            self.collator = collator_of(base, self.tokenizer)
        else:
            self.encoder = Encoder(
                self.tokenizer,
                max_prompt_tokens=spec.max_prompt_tokens,
                max_target_tokens=spec.max_target_tokens,
                encoder_decoder=self.encoder_decoder,
            )
            self.collator = Collator(pad_id_of(self.tokenizer), encoder_decoder=self.encoder_decoder)
        self.dataset = TaskDataset(suite.tasks, self.encoder, places=places)
        if self.adapted is not None:
            self._adapt(self.adapted)
        self.batches = schedule(
            self.dataset.lengths(),
            spec=recipe.mixture,
            steps=spec.steps,
            batch_size=spec.batch_size,
            seed=recipe.seed,
            window=spec.bucket_window,
        )
        if spec.validation_limit and (empty := [task.name for task in suite.tasks if not task.validation]):
            raise TaskError(
                f"train.validation_limit is {spec.validation_limit}, but there are no validation instances of"
                f" {', '.join(empty)}: leave it out, or give them some"
            )

    def _begin(self, base: PreTrainedModel, kind: Kind) -> None:
        """A fresh adapter, and with an encoder fresh heads."""
        recipe, tasks = self.recipe, self.suite.tasks
        self.names = tuple(task.name for task in tasks)
        config = recipe.method.peft_config(self.names)
        config.task_type = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}[kind]
        config.revision = recipe.model.revision
        self.heads = heads_of(tasks) if kind == "encoder" else ()
        if self.heads:
            attach(base, self.heads, recipe.model.pool)  # before the adapter: the same start for every method of a seed
            config.modules_to_save = [*(config.modules_to_save or ()), MODULE]
        try:
            self.model = get_peft_model(base, config)
        except DyadsError:
            raise
        except ValueError as error:  # target modules that the model does not have
            raise ConfigError(
                f"method '{recipe.method.name}' does not fit model '{recipe.model.name}': {error}"
            ) from error
        self._check_tasks(self.names)

    def _adapt(self, adapted: Adapted) -> None:
        """Start the new tasks, and let the chosen parts train."""
        assert self.recipe.adapt is not None
        start = start_of(self.recipe, adapted)
        self.starts = {"start": start}
        if start == "nearest":
            self.starts["similarity"] = adapted.start_from_most_similar(
                self.dataset, self.collator, self.encoder_decoder
            )
        adapted.choose(self.recipe.adapt.parts, self.recipe.method.name)

    def _check_tasks(self, names: tuple[str, ...]) -> None:
        routing = find_routing(self.model)
        for adapter, known in (routing.names if routing else {}).items():
            named = getattr(self.model.peft_config[adapter], "tasks", None)
            if len(known) != len(names) or (named and tuple(known) != names):
                raise ConfigError(
                    f"method '{self.recipe.method.name}' is told {len(known)} tasks ({', '.join(known[:4])}, …), but"
                    f" the suite has {len(names)} ({', '.join(names[:4])}, …): leave 'tasks' and 'num_tasks' out, and"
                    " the suite's tasks are taken"
                )

    @property
    def parameters(self) -> int:
        """Trainable parameters of the adapter, with routers, gates and embeddings; heads are counted apart."""
        return self._trainable(self.model) - self.head_parameters

    @property
    def head_parameters(self) -> int:
        """Trainable parameters of an encoder's heads, which every method has; 0 where the model answers in text."""
        heads = getattr(self.model.get_base_model(), MODULE, None)
        return self._trainable(heads) if heads is not None else 0

    def _trainable(self, module: nn.Module) -> int:
        return self.adapted.trainable(module) if self.adapted is not None else _trainable(module)

    def run(self, folder: RunFolder, *, resume: bool = False) -> None:
        """Train to the end and keep the adapter."""
        checkpoint = last_checkpoint(folder) if resume else None
        trainer = _Trainer(self, folder, self.arguments(folder))
        log = _Log(folder, self.parameters, offset=_seconds_at(folder, checkpoint))
        trainer.add_callback(log)
        if self.adapted is not None:
            trainer.add_callback(KeepRows(self.adapted))
            folder.append_log({"event": "adapted", "run": cast(Any, self.recipe.adapt).run, **self.starts})
        if trainer.routed:
            trainer.look_round()
        trainer.train(resume_from_checkpoint=checkpoint)
        folder.append_log(
            {
                "event": "trained",
                "step": trainer.state.global_step,
                "seconds": log.seconds,
                "parameters": self.parameters,
                **({"head_parameters": self.head_parameters} if self.heads else {}),
            }
        )
        # Before anything that may fail; and what the heads mean before the adapter, whose config says all is there.
        if self.heads:
            folder.adapter.mkdir(exist_ok=True)
            write_heads(folder.heads, self.heads)
        self.model.save_pretrained(folder.adapter)
        if self.recipe.train.validation_limit:
            loss = self.validation_loss(trainer, self.recipe.train.validation_limit)
            folder.append_log({"event": "validated", "step": trainer.state.global_step, "validation_loss": loss})

    @torch.no_grad()
    def validation_loss(self, trainer: _Trainer, limit: int) -> float:
        """Mean over tasks of the loss per label, on the first `limit` validation instances of each.

        A label is a token, or with heads an instance.
        """
        self.model.eval()
        dataset = TaskDataset(self.suite.tasks, self.encoder, split="validation", places=self.dataset.places)
        size = trainer.args.per_device_train_batch_size
        losses = []
        for number, task in enumerate(self.suite.tasks):
            examples = [dataset[number, i] for i in range(min(limit, len(task.validation)))]
            total, labels = 0.0, 0
            for start in range(0, len(examples), size):
                batch = cast(Any, trainer.data_collator)(examples[start : start + size])
                loss, count = trainer.label_loss(self.model, {k: v.to(trainer.args.device) for k, v in batch.items()})
                total, labels = total + float(loss), labels + int(count)
            losses.append(total / labels)
        return sum(losses) / len(losses)

    def arguments(self, folder: RunFolder) -> TrainingArguments:
        """What transformers' Trainer is told; ConfigError where it refuses."""
        spec = self.recipe.train
        # transformers 5.23 renames the one to the other, and warns about the old name.
        renamed = "activation_checkpointing" in inspect.signature(TrainingArguments).parameters
        # transformers' "constant" takes no notice of a warm-up.
        warm_constant = spec.lr_scheduler == "constant" and spec.warmup_steps
        ours: dict[str, Any] = {
            "output_dir": str(folder.checkpoints),
            "max_steps": spec.steps,
            "per_device_train_batch_size": spec.batch_size // spec.gradient_accumulation,
            "gradient_accumulation_steps": spec.gradient_accumulation,
            "learning_rate": spec.learning_rate,
            "optim": "adafactor" if spec.optimizer == "adafactor" else "adamw_torch",
            "weight_decay": spec.weight_decay,
            "warmup_steps": spec.warmup_steps,
            "lr_scheduler_type": "constant_with_warmup" if warm_constant else spec.lr_scheduler,
            "max_grad_norm": spec.max_grad_norm,
            "activation_checkpointing" if renamed else "gradient_checkpointing": spec.gradient_checkpointing,
            "logging_steps": spec.logging_steps,
            "save_strategy": "steps" if spec.save_steps else "no",
            "save_steps": spec.save_steps or 500,
            "report_to": list(spec.report_to) or "none",
            "seed": self.recipe.seed,
            "save_total_limit": 2,
            "run_name": f"{self.recipe.name}-seed{self.recipe.seed}",
            "dataloader_pin_memory": torch.cuda.is_available(),
            "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
            "remove_unused_columns": False,  # batches carry their task
        }
        try:
            arguments = TrainingArguments(**{**ours, **spec.trainer})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"transformers refuses the training arguments: {error}; see 'train.trainer'") from error
        _refuse_processes(arguments.world_size, "processes")
        _refuse_processes(arguments.n_gpu, "GPUs")  # the Trainer would use all it sees, by DataParallel
        return arguments


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class _Trainer(Trainer):  # type: ignore[misc]
    def __init__(self, training: Training, folder: RunFolder, arguments: TrainingArguments) -> None:
        self.names: Sequence[str] = training.names
        self.folder = folder
        size = arguments.per_device_train_batch_size
        self.batches = [batch[i : i + size] for batch in training.batches for i in range(0, len(batch), size)]
        self.routed = find_routing(training.model) is not None
        self.encoder_decoder, self.heads = training.encoder_decoder, bool(training.heads)
        self.auxiliary: list[Tensor] = []  # of the parts of batches since the last line of the log
        super().__init__(
            model=training.model,
            args=arguments,
            train_dataset=training.dataset,
            data_collator=training.collator,
            # Never called, as compute_loss below does not: it makes the Trainer count the labels of a whole step.
            compute_loss_func=_unused,
        )
        # The loss below is normalised over the labels of the whole step, all accumulated parts together.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        # The layers of a decoder predict the next token; the Trainer only has to count the labels it will see.
        self._loss_shifts_labels = not self.encoder_decoder and not self.heads

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=ScheduledBatches(self.batches),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return cast("DataLoader[Any]", self.accelerator.prepare(loader))

    def look_round(self) -> None:
        """A forward pass of one example in evaluation, which trains nothing and draws no random numbers.

        Layers that see the same input find out about each other in it, and are computed together from the first step
        on. A run that goes on from a checkpoint does the same, and so takes the very steps of one that was not cut off.
        """
        batch = cast(Any, self.data_collator)([cast(Any, self.train_dataset)[self.batches[0][0]]])
        self.label_loss(self.model.eval(), {name: value.to(self.args.device) for name, value in batch.items()})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, count = self.label_loss(model, inputs)
        loss = loss / (count if num_items_in_batch is None else num_items_in_batch)
        auxiliary = auxiliary_loss(self.accelerator.unwrap_model(model))
        if auxiliary is not None:  # of this part of the batch; all parts have equally many samples
            loss = loss + auxiliary / self.args.gradient_accumulation_steps
            self.auxiliary.append(auxiliary.detach())
        if not torch.isfinite(loss):
            self._stop("loss", inputs["task"])
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; says which part of the loss is not the tasks' own."""
        if "loss" in logs and self.auxiliary:
            logs = {**logs, "auxiliary_loss": torch.stack(self.auxiliary).float().mean().item()}
            self.auxiliary.clear()
        super().log(logs, start_time)

    def label_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(sum of the losses of a batch's labels, their number)."""
        inputs = {k: v for k, v in batch.items() if k != "labels" and (k != "task" or self.routed)}
        unwrapped = self.accelerator.unwrap_model(model)
        if self.heads:
            return head_loss(unwrapped, model, inputs, batch["task"], batch["labels"])
        return label_loss(unwrapped, model, inputs, batch["labels"], self.encoder_decoder)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        # Checked before the update, so that a broken step never reaches the weights that a checkpoint keeps. A gradient
        # scaler (fp16 autocast) does so by itself: it skips the update, and tries a smaller scale.
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if self.accelerator.scaler is None and not torch.isfinite(torch.nn.utils.get_total_norm(grads)):
            self._stop("gradient", inputs["task"])
        return loss

    def _stop(self, what: str, task: Tensor) -> None:
        names = sorted({self.names[int(i)] for i in task.tolist()})
        kept = last_checkpoint(self.folder)
        way_out = f"the last checkpoint is kept ({kept})" if kept else "no checkpoint was saved before it"
        raise RunError(
            f"the {what} is not finite at step {self.state.global_step + 1}, on a batch of {', '.join(names)}; training"
            f" stops, and {way_out}. A lower train.learning_rate, or model.dtype float32, usually helps."
        )


def _unused(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("compute_loss is overridden")


def label_loss(
    unwrapped: PeftModel, model: nn.Module, inputs: dict[str, Any], labels: Tensor, encoder_decoder: bool
) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropies of all labels, their number), in fp32.

    Labels (b t) hold IGNORED where nothing is learned. The LM head, often the largest product of a small model, is
    given the hidden states of label positions only: a hook picks them from its input, so that this works for every
    model whose head is an ordinary linear layer. A head that is adapted or replaced sees all positions, as usual.
    """
    if encoder_decoder:
        keep, targets = labels != IGNORED, labels
        read = unwrapped.prepare_decoder_input_ids_from_labels(labels=labels)
        # Causal attention never looks at padding on the right; the mask tells auxiliary losses which tokens are real.
        inputs = {**inputs, "decoder_input_ids": read, "decoder_attention_mask": keep.long()}
    else:
        keep = F.pad(labels[:, 1:] != IGNORED, (0, 1))  # position i predicts label i + 1
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        inputs = {**inputs, "use_cache": False}

    def pick(head: nn.Module, args: tuple[Any, ...]) -> Any:
        hidden = args[0]
        return (hidden[keep], *args[1:]) if hidden.shape[:-1] == keep.shape else None

    head = unwrapped.get_output_embeddings()
    hook = head.register_forward_pre_hook(pick) if type(head) is nn.Linear else None
    try:
        logits = model(**inputs).logits
    finally:
        if hook is not None:
            hook.remove()
    if logits.ndim == 3:
        logits = logits[keep]
    wanted = targets[keep]
    return F.cross_entropy(logits.float(), wanted, reduction="sum"), torch.tensor(wanted.numel(), device=labels.device)


class _Log(TrainerCallback):  # type: ignore[misc]
    """Copies what the Trainer logs into the run's log, with the seconds that training has taken so far."""

    def __init__(self, folder: RunFolder, parameters: int, offset: float) -> None:
        self.folder, self.parameters = folder, parameters
        self.offset, self.start = offset, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.offset + time.perf_counter() - self.start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self.folder.append_log({"step": state.global_step, **logs, "seconds": round(self.seconds, 3)})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.folder.append_log({"event": "saved", "step": state.global_step, "seconds": round(self.seconds, 3)})


def last_checkpoint(folder: RunFolder) -> str | None:
    """The latest checkpoint that is whole: the Trainer writes its state last."""
    whole = {_step_of(path.parent): path.parent for path in folder.checkpoints.glob("checkpoint-*/trainer_state.json")}
    return str(whole[max(whole)]) if whole else None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _seconds_at(folder: RunFolder, checkpoint: str | None) -> float:
    """Seconds of training that a checkpoint holds; those after it are spent again, and counted then."""
    if checkpoint is None:
        return 0.0
    until = _step_of(Path(checkpoint))
    logged = [line["seconds"] for line in folder.log() if "seconds" in line and line.get("step", until + 1) <= until]
    return float(logged[-1]) if logged else 0.0

# SPDX-License-Identifier: Apache-2.0
"""Subclass of transformers' Trainer: precomputed batches, routing by task, and a loss over label positions only."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.data.data_collator import DataCollator

from dyads.data.batches import IGNORED, ScheduledBatches, TaskDataset
from dyads.errors import RunError
from dyads.methods.core import Core
from dyads.models.heads import head_loss
from dyads.models.loss import loss_in_call
from dyads.models.processes import launched
from dyads.recipe.spec import TrainSpec
from dyads.runs.adapter import sort_sets
from dyads.runs.checkpoints import complete, last_checkpoint, loading, step_of
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import MANIFEST, remove, writing
from dyads.runs.signals import Sigterm, TerminatedError
from dyads.tuner.parameter_groups import parameter_groups
from dyads.tuner.routing import find_routing

__all__ = [
    "LogCallback",
    "StopAtSigterm",
    "TaskTrainer",
    "ValidationCallback",
    "label_loss",
    "seconds_until",
    "validated",
]


class TaskTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that takes its batches from a schedule and stops at a loss or gradient that is not finite.

    `batches` holds (task, example) pairs, one list per optimizer step, and `task_names` the names of the task ids that
    the collator writes into a batch. Checkpoints lie in `folder`. `rates` is that of `parameter_groups`.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: PeftModel,
        arguments: TrainingArguments,
        dataset: TaskDataset,
        collator: DataCollator,
        batches: Sequence[Sequence[tuple[int, int]]],
        *,
        task_names: Sequence[str],
        folder: RunFolder,
        encoder_decoder: bool,
        has_heads: bool,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.rates = dict(rates or {})
        self.task_names, self.folder = task_names, folder
        self.encoder_decoder, self.has_heads = encoder_decoder, has_heads
        size = arguments.per_device_train_batch_size
        # accelerate gives micro-batch i to process i mod n, so that every step has the same examples for any n.
        self.microbatches = [list(batch[i : i + size]) for batch in batches for i in range(0, len(batch), size)]
        self.routed = find_routing(model) is not None
        self.auxiliary: list[Tensor] = []  # of every micro-batch since the last line of the log
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=collator,
            # Given only because the Trainer then counts the labels of a whole step; compute_loss does not call it.
            compute_loss_func=_uncalled,
        )
        # compute_loss divides by the labels of the whole step, so the Trainer must not divide by the micro-batches.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        # For a decoder the first label of a row predicts nothing and is not counted.
        self._loss_shifts_labels = not encoder_decoder and not has_heads

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with a parameter group for every role and its learning rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = self.get_decay_parameter_names(model)
            groups = parameter_groups(
                model,
                self.args.learning_rate,
                rates=self.rates,
                weight_decay=self.args.weight_decay,
                no_decay=[name for name, _ in model.named_parameters() if name not in decayed],
            )
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer(groups, **options)
        return cast(torch.optim.Optimizer, self.optimizer)

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=ScheduledBatches(self.microbatches),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return cast("DataLoader[Any]", self.accelerator.prepare(loader))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, then with a manifest; older checkpoints are removed by their steps, not by file times.

        Every process writes the state of its random numbers, and the main process all else.
        """
        checkpoint = self.folder.checkpoints / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            remove(checkpoint)
        self.accelerator.wait_for_everyone()
        self._add_up_processes()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with writing(checkpoint):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    complete(self.folder, checkpoint, limit)
                self.accelerator.wait_for_everyone()  # a launcher ends the main process when another one has ended
        except BaseException:
            if self.args.should_save and not (checkpoint / MANIFEST).is_file():
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the adapter alone: the Trainer's own adds a pickle of its arguments."""
        assert output_dir is not None
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            model.save_pretrained(output_dir, state_dict=state_dict)
            sort_sets(Path(output_dir), model.peft_config["default"])

    def _add_up_processes(self) -> None:
        for module in self.model.modules():
            if isinstance(module, Core):
                module.add_up_processes()

    def state_to_save(self) -> dict[str, Tensor] | None:
        """The weights of a model that is sharded over processes, on the main process; None for one that is not."""
        self._add_up_processes()
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_sharded else None

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed may have parts of a weight in each process."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_rng_state(checkpoint)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, count, auxiliary = self.label_loss(model, inputs)
        # The labels of the whole step are counted, over all processes, whose gradients are averaged.
        share = count if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        loss = loss / share
        if auxiliary.requires_grad:  # a mean over the micro-batch; all micro-batches of a step are equally large
            loss = loss + auxiliary / self.args.gradient_accumulation_steps
            self.auxiliary.append(auxiliary.detach())
        if not torch.isfinite(loss):
            self._stop("loss", inputs["task"])
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the auxiliary loss that is contained in `loss` as an entry of its own."""
        if "loss" in logs and self.auxiliary:
            mean = torch.stack(self.auxiliary).float().mean()
            logs = {**logs, "auxiliary_loss": self.accelerator.gather(mean).mean().item()}
            self.auxiliary.clear()
        super().log(logs, start_time)

    def label_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of the losses of a batch's labels, their number, the auxiliary loss)."""
        inputs = {k: v for k, v in batch.items() if k != "labels" and (k != "task" or self.routed)}
        unwrapped = self.accelerator.unwrap_model(model)
        if self.has_heads:
            return head_loss(unwrapped, model, inputs, batch["task"], batch["labels"])
        return label_loss(unwrapped, model, inputs, batch["labels"], self.encoder_decoder)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        # Checked before the update, so that no checkpoint contains weights that are not finite. A gradient scaler (fp16
        # autocast) needs no check: it skips such an update and lowers its scale.
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if self.accelerator.scaler is None:
            norm: Any = torch.nn.utils.get_total_norm(grads)
            if not torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm):  # of sharded gradients
                self._stop("gradient", inputs["task"])
        return loss

    def _stop(self, what: str, task: Tensor) -> None:
        names = sorted({self.task_names[int(i)] for i in task.tolist()})
        kept = last_checkpoint(self.folder)
        way_out = f"the last checkpoint is kept ({kept})" if kept else "no checkpoint was saved before it"
        raise RunError(
            f"the {what} is not finite at step {self.state.global_step + 1}, on a batch of {', '.join(names)}; training"
            f" stops, and {way_out}. A lower train.learning_rate, or model.dtype float32, usually helps."
        )


def _uncalled(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("compute_loss is overridden")


def label_loss(
    unwrapped: PeftModel, model: nn.Module, inputs: dict[str, Any], labels: Tensor, encoder_decoder: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the cross-entropies of all labels, their number, the auxiliary loss), in fp32.

    Labels (b t) hold IGNORED at all other positions. Only the hidden states of label positions go through the LM head,
    often the largest product of a small model: a forward pre-hook selects them from the head's input, for every model
    whose head is an ordinary linear layer. A head that is adapted or replaced gets all positions.
    """
    if encoder_decoder:
        keep, targets = labels != IGNORED, labels
        decoder_inputs = unwrapped.prepare_decoder_input_ids_from_labels(labels=labels)
        # Causal attention ignores padding on the right anyway; auxiliary losses need the mask to skip it.
        inputs = {**inputs, "decoder_input_ids": decoder_inputs, "decoder_attention_mask": keep.long()}
    else:
        keep = F.pad(labels[:, 1:] != IGNORED, (0, 1))  # position i predicts label i + 1
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        inputs = {**inputs, "use_cache": False}

    def select(head: nn.Module, args: tuple[Any, ...]) -> Any:
        hidden = args[0]
        return (hidden[keep], *args[1:]) if hidden.shape[:-1] == keep.shape else None

    wanted = targets[keep]

    def cross_entropy(output: Any) -> Tensor:
        logits = output.logits
        return F.cross_entropy((logits[keep] if logits.ndim == 3 else logits).float(), wanted, reduction="sum")

    head = unwrapped.get_output_embeddings()
    hook = head.register_forward_pre_hook(select) if type(head) is nn.Linear else None
    try:
        loss, auxiliary = loss_in_call(unwrapped, model, inputs, cross_entropy)
    finally:
        if hook is not None:
            hook.remove()
    return loss, torch.tensor(wanted.numel(), device=labels.device), auxiliary


class LogCallback(TrainerCallback):  # type: ignore[misc]
    """Copies the Trainer's log into that of the run, with the seconds of training so far, `offset` included."""

    def __init__(self, folder: RunFolder, offset: float) -> None:
        self.folder = folder
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


class ValidationCallback(TrainerCallback):  # type: ignore[misc]
    """Logs the validation loss every `validation_steps`, with the training's random numbers and seconds unchanged.

    A resumed training logs the steps after its checkpoint again, with the same losses.
    """

    def __init__(self, log: LogCallback, spec: TrainSpec, losses: Callable[[int], dict[str, float]]) -> None:
        self.log, self.spec, self.losses = log, spec, losses

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.spec.validation_steps
        if every and state.global_step % every == 0:
            self.validate(state.global_step)

    def validate(self, step: int) -> None:
        """Log the losses of the validation instances at this step."""
        start = time.perf_counter()
        with torch.random.fork_rng():
            losses = self.losses(cast(int, self.spec.validation_limit))
        if launched().is_main_process:
            self.log.folder.append_log(validated(step, losses))
        self.log.start += time.perf_counter() - start


def validated(step: int, losses: Mapping[str, float]) -> dict[str, Any]:
    """The line of the log with the validation losses of all tasks, and their mean."""
    mean = sum(losses.values()) / len(losses)
    return {"event": "validated", "step": step, "validation_loss": mean, "tasks": dict(losses)}


class StopAtSigterm(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint and stops after the step in which SIGTERM or SIGHUP came, to any of the processes."""

    def __init__(self, sigterm: Sigterm, folder: RunFolder) -> None:
        self.sigterm, self.folder = sigterm, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sigterm.waits = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            came = [signum for signum in gather_object([self.sigterm.came]) if signum is not None]
            self.sigterm.came = came[0] if came else self.sigterm.came
        if self.sigterm.came:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sigterm.waits = False
        if self.sigterm.came:
            kept = last_checkpoint(self.folder)
            goes_on = f"goes on from step {step_of(kept)}" if kept else "starts again (train.save_steps is null)"
            name = signal.Signals(self.sigterm.came).name
            raise TerminatedError(
                f"'{self.folder.path}' was stopped by {name} at step {state.global_step} of {state.max_steps};"
                f" --resume {goes_on}",
                self.sigterm.came,
            )


def seconds_until(checkpoint: Path | None, folder: RunFolder) -> float:
    """Seconds of training up to a checkpoint, from the log; 0 without one. Later steps are trained and timed again."""
    if checkpoint is None:
        return 0.0
    until = step_of(checkpoint)
    logged = [line["seconds"] for line in folder.log() if line.get("seconds") and line.get("step", until + 1) <= until]
    return float(logged[-1]) if logged else 0.0

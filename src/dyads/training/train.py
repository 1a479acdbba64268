# SPDX-License-Identifier: Apache-2.0
"""Training of one adapter on many tasks, from a recipe to a run folder with an adapter and scores.

transformers' Trainer contributes the loop, optimizer, devices, progress bar, checkpoints and resuming; trainer.py has
the steps. `Training` builds what it trains: the base model with a fresh adapter (or with that of another run, see
adapt.py), the examples, and a schedule of batches that is the same for every method of a seed. An encoder gets a head
per task in place of the LM head (models/heads.py).
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate.utils import gather_object
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerState, TrainingArguments, set_seed
from transformers import ProgressCallback as TrainerProgressCallback

from dyads.console import SILENT, Reporter
from dyads.data.batches import Collator, PairCollator, PairTokenizer, PromptTokenizer, TaskDataset, pad_id_of
from dyads.data.mixture import padding_share, schedule
from dyads.errors import ConfigError, DyadsError, RunError, TaskError, listed, notice
from dyads.models.heads import MODULE, attach_heads, collator_of, heads_of, pair_tokenizer_of
from dyads.models.load import Kind, kind_of, load_model, load_tokenizer, model_config
from dyads.models.processes import launched, on_cpus
from dyads.models.prompts import chat_template_of, prompt_tokenizer_of
from dyads.models.quantization import quantization_config
from dyads.recipe.spec import Recipe, sample
from dyads.runs.adapter import check_adapter, save_adapter
from dyads.runs.checkpoints import checkpoint_to_resume, loading, rotate, step_of
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import writing
from dyads.runs.signals import Sigterm, on_sigterm
from dyads.scoring.evaluate import check_answers, check_scored
from dyads.scoring.evaluate import evaluate as evaluate_run
from dyads.tasks import Suite, load_suite
from dyads.tasks.shots import few_shot
from dyads.training.adapt import (
    ExtendedAdapter,
    RestoreFrozenRows,
    choose_start,
    load_extended,
    source_facts,
    source_run,
)
from dyads.training.collapse import CollapseCallback
from dyads.training.progress import ProgressCallback, memory_of, show_summary
from dyads.training.trainer import LogCallback, StopAtSigterm, TaskTrainer, ValidationCallback, seconds_until, validated
from dyads.tuner.routing import find_routing

__all__ = ["Training", "train", "training_arguments"]

_DATA = "train_data"
_MUCH_PADDING = 1 / 3
"""Share of padding from which a note names the option that reduces it."""


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool | Literal["auto"] = False,
    evaluate: bool = True,
    reporter: Reporter = SILENT,
) -> RunFolder:
    """Train the recipe's method into a run folder and score it there.

    In each of several processes (torchrun, accelerate launch) this trains and scores a share of every batch, and the
    main process alone writes into the folder.

    All refusals come before the folder is created. With `resume` an interrupted run continues from its last checkpoint,
    and a complete run is left unchanged; a folder without a run is refused. "auto" resumes the run where there is one
    and starts it otherwise. `reporter` shows the opening summary and the progress.
    """
    folder = RunFolder(out)
    if resume is True and not folder.is_run and not folder.was_interrupted:
        raise _nothing_to_resume(folder)
    _refuse_missing(recipe.train.report_to)
    if recipe.model.quantization is not None:
        quantization_config(recipe.model.quantization)
    if recipe.method.trains:
        training_arguments(recipe, folder)  # connects the processes
    main = launched().is_main_process
    with folder.locked() if main else nullcontext(), on_sigterm(folder.path) as sigterm:
        _train(recipe, folder, bool(resume), evaluate, reporter, sigterm)
    return folder


def _train(
    recipe: Recipe, folder: RunFolder, resume: bool, evaluate: bool, reporter: Reporter, sigterm: Sigterm
) -> None:
    out, processes = folder.path, launched()
    main = processes.is_main_process
    with processes.main_process_first():  # it clears away what a killed process left
        if folder.is_run:
            if main:
                RunFolder.create(out, recipe, resume=resume)  # refuses another recipe, and a run without `resume`
            if folder.has_adapter:
                check_adapter(folder)
            if folder.is_scored and not (damage := folder.damage()):
                return
            if folder.is_scored and main:
                notice(f"'{out}' is damaged: {damage}; it is scored again")
    suite = load_suite(recipe.tasks)
    if recipe.adapt is not None:
        suite = few_shot(suite, recipe.adapt.shots, recipe.seed)
    check_answers(recipe, suite.tasks)
    if evaluate:
        check_scored(recipe, suite.tasks)
    training: Training | None = None
    chat_template = _chat_template(recipe, suite, folder)
    facts: dict[str, Any] = {}
    ended = folder.has_adapter
    if recipe.method.trains and not (ended and _is_validated(recipe, folder)):
        facts = _data_facts(suite, folder)
        if recipe.adapt is not None:
            facts |= source_facts(recipe, folder)
        training = Training(recipe, suite, chat_template)
    if main:
        folder = RunFolder.create(out, recipe, resume=resume)
        if training is not None:
            task_names = training.task_names
            if not recipe.method.reads_task:  # those that no training saw can be named too
                task_names = tuple(dict.fromkeys((*task_names, *(task.name for task in suite.tasks))))
        else:
            task_names = folder.task_names() or tuple(task.name for task in suite.tasks)
        facts["processes"] = processes.num_processes
        folder.write_environment(seed=recipe.seed, tasks=list(task_names), **facts)
        folder.write_templates(suite.tasks, RunFolder(recipe.adapt.run) if recipe.adapt is not None else None)
        folder.write_chat_template(chat_template)
    processes.wait_for_everyone()
    if training is not None:
        training.summary(folder, reporter)
    else:
        show_summary(reporter, recipe, suite, folder)
    if training is not None:
        with _logging_to(folder):
            if ended:
                training.load(folder)
            else:
                training.run(folder, resume=resume, reporter=reporter, sigterm=sigterm)
            training.validate(folder)
    if evaluate:
        training = None
        gc.collect()  # frees the trained model before evaluation loads its own
        evaluate_run(folder, suite=suite, reporter=reporter)


def _data_facts(suite: Suite, folder: RunFolder) -> dict[str, Any]:
    """Entries of the environment file of the run in `folder`: a hash of every task's training examples.

    RunError where the run started with others: its checkpoint would go on with examples that it did not begin with.
    """
    now = {task.name: task.fingerprint("train") for task in suite.tasks}
    then = folder.environment().get(_DATA, now) if folder.has_environment else now
    if isinstance(then, Mapping) and (changed := [name for name in now if then.get(name) != now[name]]):
        raise RunError(
            f"cannot resume '{folder.path}': the training examples of {listed(changed)} have changed since it started:"
            " restore them, or start again with another --out"
        )
    return {_DATA: now}


def _is_validated(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether the log has the validation loss that the recipe wants after training."""
    last = {"event": "validated", "step": recipe.train.steps}
    return not recipe.train.validation_limit or any(last.items() <= line.items() for line in folder.log())


def _nothing_to_resume(folder: RunFolder) -> RunError:
    try:
        RunFolder.open(folder.path)
    except RunError as error:
        end = " To" if str(error).endswith("?") else "; to"
        return RunError(f"nothing to resume: {error}{end} start the run, leave --resume out")
    raise AssertionError("a folder that opens is a run")


@contextmanager
def _logging_to(folder: RunFolder) -> Iterator[None]:
    """TensorBoard and W&B write into the run's folder, unless the environment names another."""
    places = {"TENSORBOARD_LOGGING_DIR": folder.tensorboard, "WANDB_DIR": folder.path}
    added = {name: str(path.absolute()) for name, path in places.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _refuse_missing(packages: Sequence[str]) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"train.report_to is {package}, which is not installed: run `pip install {package}`, or leave it out"
            )


def _chat_template(recipe: Recipe, suite: Suite, folder: RunFolder) -> str | None:
    """The chat template of the run, or of the run that it adapts; otherwise that of the recipe's model."""
    if recipe.method.name == "majority":
        return None
    runs = [folder, *([RunFolder(recipe.adapt.run)] if recipe.adapt is not None else [])]
    if recorded := next((template for run in runs if (template := run.chat_template()) is not None), None):
        return recorded
    spec = recipe.model
    kind = kind_of(spec.name, model_config(spec.name, spec.revision), spec.kind)
    return chat_template_of(spec, kind, load_tokenizer(spec.name, spec.revision), suite.tasks)


def training_arguments(recipe: Recipe, folder: RunFolder) -> TrainingArguments:
    """Arguments for transformers' Trainer; ConfigError where it refuses them, or for another number of processes."""
    spec = recipe.train
    # transformers 5.23 renames the one to the other, and warns about the old name.
    renamed = "activation_checkpointing" in inspect.signature(TrainingArguments).parameters
    # transformers' "constant" ignores a warm-up.
    warm_constant = spec.lr_scheduler == "constant" and spec.warmup_steps
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parts = spec.gradient_accumulation * processes
    if spec.batch_size % parts:
        raise ConfigError(
            f"train.batch_size {spec.batch_size} cannot be cut into {spec.gradient_accumulation} equal parts"
            f" (gradient_accumulation) on each of {processes} processes: choose a multiple of {parts}"
        )
    from_recipe: dict[str, Any] = {
        "output_dir": str(folder.checkpoints),
        "max_steps": spec.steps,
        "per_device_train_batch_size": spec.batch_size // parts,
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
        "seed": recipe.seed,
        "save_total_limit": 2,
        "run_name": f"{recipe.name}-seed{recipe.seed}",
        "dataloader_pin_memory": torch.cuda.is_available(),
        **({"use_cpu": True} if on_cpus() else {}),
        "ddp_broadcast_buffers": False,  # buffers change in smora alone, which adds its counts up over all processes
        "logging_nan_inf_filter": False,  # log a loss that is not finite as it is
        "remove_unused_columns": False,  # keep a batch's `task`, which the base model's forward does not name
    }
    try:
        arguments = TrainingArguments(**{**from_recipe, **spec.trainer})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"transformers refuses the training arguments: {error}; see 'train.trainer'") from error
    if arguments.n_gpu > 1:  # the Trainer would use DataParallel
        raise ConfigError(
            f"one process sees {arguments.n_gpu} GPUs: start one process for each (`torchrun --nproc-per-node"
            f" {arguments.n_gpu} -m dyads train …`), or show it one (`CUDA_VISIBLE_DEVICES=0 dyads train …`)"
        )
    if arguments.world_size != processes:
        raise ConfigError(
            f"the environment names {processes} processes (WORLD_SIZE), but {arguments.world_size} are connected: start"
            " them with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    sharded = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # by accelerate launch
    if not arguments.fsdp and not arguments.deepspeed and all(os.environ.get(k, "false") != "true" for k in sharded):
        return arguments
    if recipe.method.name == "smora" and recipe.method.options.get("bias_rate") != 0:
        raise ConfigError(
            "smora updates its bias after each change of its router, which sharding hides: leave fsdp and deepspeed out"
            " of train.trainer, or set method.bias_rate: 0"
        )
    if recipe.adapt is not None:
        raise ConfigError(
            "an adaptation trains some rows of a weight, which must not be sharded: leave fsdp and deepspeed out of"
            " train.trainer"
        )
    return arguments


def _compile_blocks(model: nn.Module) -> None:
    """Compile the blocks that a model repeats, in place: all of them share the code that is compiled for the first."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(block) for block in child}) == 1:
            for block in child:
                block.compile()
        else:
            _compile_blocks(child)


class Training:
    """A base model with an adapter to train, its examples and its schedule of batches."""

    def __init__(self, recipe: Recipe, suite: Suite, chat_template: str | None = None) -> None:
        self.recipe, self.suite = recipe, suite
        self.tasks = tuple(task for task in suite.tasks if task.train) or suite.tasks
        """Those with training examples. The others are unseen: they have no rows in gates, and are scored alone."""
        spec = recipe.train
        if spec.threads:
            torch.set_num_threads(spec.threads)
        set_seed(recipe.seed)
        source = source_run(recipe, self.tasks) if recipe.adapt is not None else None
        base = load_model(recipe.model)
        kind = kind_of(recipe.model.name, base.config, recipe.model.kind)
        self.encoder_decoder = kind == "seq2seq"
        self.extended: ExtendedAdapter | None = None
        self.start: dict[str, Any] = {}
        """How the new tasks of an adaptation start, for the log."""
        self.tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
        self.prompt_tokenizer: PromptTokenizer | PairTokenizer
        self.collator: Collator | PairCollator
        set_seed(recipe.seed)  # again: loading the base model may draw random numbers, and the adapter comes next
        if source is None:
            self._add_adapter(base, kind)
        else:
            self.extended = load_extended(recipe, source, base, self.tasks)
            self.model, self.heads = self.extended.model, self.extended.heads
            self.task_names = self.extended.task_names
        places = range(len(self.task_names))[-len(self.tasks) :]
        if self.heads:
            by_place = dict(zip(places, self.tasks, strict=True))
            self.prompt_tokenizer = pair_tokenizer_of(
                base, self.tokenizer, spec.max_prompt_tokens, self.heads, by_place
            )
            self.collator = collator_of(base, self.tokenizer)
        else:
            self.prompt_tokenizer = prompt_tokenizer_of(base.config, kind, self.tokenizer, recipe, chat_template)
            self.collator = Collator(pad_id_of(self.tokenizer), encoder_decoder=self.encoder_decoder)
        self.dataset = TaskDataset(self.tasks, self.prompt_tokenizer, places=places)
        if self.extended is not None:
            self._start_new_tasks(self.extended)
        lengths = self.dataset.lengths()
        self.batches = schedule(
            lengths,
            spec=recipe.mixture,
            steps=spec.steps,
            batch_size=spec.batch_size,
            seed=recipe.seed,
            window=spec.bucket_window,
        )
        self.tokens = [sum(lengths[task][i] for task, i in batch) for batch in self.batches]
        """Input tokens of every step."""
        at_once = spec.batch_size // spec.gradient_accumulation // launched().num_processes
        self.padding = padding_share(self.batches, lengths, max(at_once, 1))
        if spec.validation_limit and (empty := [task.name for task in self.tasks if not task.validation]):
            raise TaskError(
                f"train.validation_limit is {spec.validation_limit}, but there are no validation instances of"
                f" {', '.join(empty)}: leave it out, or give them some"
            )
        if spec.compile:
            _compile_blocks(self.model)

    def _add_adapter(self, base: PreTrainedModel, kind: Kind) -> None:
        """Add a fresh adapter, and to an encoder fresh heads."""
        recipe, tasks = self.recipe, self.tasks
        self.task_names = tuple(task.name for task in tasks)
        config = recipe.method.peft_config(self.task_names)
        config.task_type = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}[kind]
        config.revision = recipe.model.revision
        self.heads = heads_of(tasks) if kind == "encoder" else ()
        if self.heads:
            # Before the adapter draws random numbers: the heads start the same for every method of a seed.
            attach_heads(base, self.heads, recipe.model.pool)
            config.modules_to_save = [*(config.modules_to_save or ()), MODULE]
        try:
            self.model = get_peft_model(base, config)
        except DyadsError:
            raise
        except ValueError as error:  # PEFT found none of the target modules
            raise ConfigError(
                f"method '{recipe.method.name}' does not fit model '{recipe.model.name}': {error}"
            ) from error
        self._check_tasks()

    def _start_new_tasks(self, extended: ExtendedAdapter) -> None:
        """Initialise the rows of the new tasks, and unfreeze the chosen parts."""
        assert self.recipe.adapt is not None
        start = choose_start(self.recipe, extended)
        self.start = {"start": start}
        if start == "nearest":
            self.start["similarity"] = extended.start_from_most_similar(
                self.dataset, self.collator, self.encoder_decoder
            )
        extended.unfreeze(self.recipe.adapt.parts, self.recipe.method.name)

    def _check_tasks(self) -> None:
        """Refuse a method whose own `tasks` or `num_tasks` differ from the suite's tasks."""
        names, routing = self.task_names, find_routing(self.model)
        for adapter, configured in (routing.names if routing else {}).items():
            named = getattr(self.model.peft_config[adapter], "tasks", None)
            if len(configured) != len(names) or (named and tuple(configured) != names):
                raise ConfigError(
                    f"method '{self.recipe.method.name}' is configured for {len(configured)} tasks"
                    f" ({', '.join(configured[:4])}, …), but the suite has {len(names)} ({', '.join(names[:4])}, …):"
                    " leave 'tasks' and 'num_tasks' out, and the suite's tasks are taken"
                )

    @property
    def parameters(self) -> int:
        """Trainable parameters of the adapter, with routers, gates and embeddings, without an encoder's heads."""
        return self._trainable(self.model) - self.head_parameters

    @property
    def head_parameters(self) -> int:
        """Trainable parameters of an encoder's heads, which are the same for every method; 0 for a language model."""
        heads = getattr(self.model.get_base_model(), MODULE, None)
        return self._trainable(heads) if heads is not None else 0

    def _trainable(self, module: nn.Module) -> int:
        if self.extended is not None:
            return self.extended.trainable(module)
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    def summary(self, folder: RunFolder, reporter: Reporter) -> None:
        """Show what will be trained."""
        show_summary(
            reporter,
            self.recipe,
            self.suite,
            folder,
            device=launched().device,
            base=sum(p.numel() for p in self.model.parameters()) - self.parameters - self.head_parameters,
            trained=self.parameters,
            heads=self.head_parameters,
            tokens=self.tokens,
        )
        if self.padding > _MUCH_PADDING:
            option = f"--set train.bucket_window={4 * self.recipe.train.bucket_window}"
            text = f"  · {100 * self.padding:.0f} % of the batches is padding; {option} lessens it"
            reporter.note("padding", text, share=self.padding)

    def trainer(self, folder: RunFolder) -> TaskTrainer:
        """The Trainer of the run in `folder`."""
        trainer = TaskTrainer(
            self.model,
            training_arguments(self.recipe, folder),
            self.dataset,
            self.collator,
            self.batches,
            task_names=self.task_names,
            folder=folder,
            encoder_decoder=self.encoder_decoder,
            has_heads=bool(self.heads),
            rates=self.recipe.train.rates.model_dump(),
        )
        for callback in (TrainerProgressCallback, PrinterCallback):  # they would print every line of the log
            trainer.remove_callback(callback)
        return trainer

    def run(
        self,
        folder: RunFolder,
        *,
        resume: bool = False,
        reporter: Reporter = SILENT,
        sigterm: Sigterm | None = None,
    ) -> None:
        """Train all steps and save the adapter; TerminatedError where SIGTERM came, after a checkpoint."""
        processes = launched()
        with processes.main_process_first():  # it removes checkpoints that cannot be used
            checkpoint = checkpoint_to_resume(folder) if resume else None
        trainer = self.trainer(folder)
        if checkpoint is not None:
            if processes.is_main_process:
                rotate(folder, trainer.args.save_total_limit)  # a kill may have come before this one's rotation
            reporter.note("resumed", f"  resume  after step {step_of(checkpoint):,}", step=step_of(checkpoint))
        log = LogCallback(folder, offset=seconds_until(checkpoint, folder))
        trainer.add_callback(log)
        spec = self.recipe.train
        mixed = self.recipe.mixture.batches == "mixed" or len(self.task_names) == 1
        if processes.is_main_process and not trainer.is_sharded:  # it reads weights as they are between the steps
            trainer.add_callback(CollapseCallback(folder, spec.steps, mixed=mixed))
        validation = ValidationCallback(log, spec, lambda limit: self.validation_losses(trainer, limit))
        trainer.add_callback(validation)
        if self.extended is not None:
            trainer.add_callback(RestoreFrozenRows(self.extended))
            if processes.is_main_process:
                folder.append_log({"event": "adapted", "run": cast(Any, self.recipe.adapt).run, **self.start})
        if sigterm is not None:
            trainer.add_callback(StopAtSigterm(sigterm, folder))
        with reporter.track("training", self.recipe.train.steps, speed="tokens/s") as tracker:
            trainer.add_callback(ProgressCallback(reporter, tracker, self.tokens))
            if checkpoint is not None:
                with loading(checkpoint):
                    TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        state = trainer.state_to_save()
        if processes.is_main_process:
            folder.append_log(
                {
                    "event": "trained",
                    "step": trainer.state.global_step,
                    "seconds": log.seconds,
                    "parameters": self.parameters,
                    "peak_memory": memory_of(trainer.args.device),
                    **({"head_parameters": self.head_parameters} if self.heads else {}),
                }
            )
            with writing(folder.adapter):
                save_adapter(self.model, folder, self.heads, state)  # before the last validation, which may fail
        processes.wait_for_everyone()

    def load(self, folder: RunFolder) -> None:
        """Load the adapter of a run whose training ended into this model."""
        check_adapter(folder)
        self.model.load_adapter(str(folder.adapter), "default", is_trainable=True)

    def validate(self, folder: RunFolder) -> None:
        """Log the validation loss of the trained adapter, where the recipe wants it and the log lacks it."""
        if not _is_validated(self.recipe, folder):
            losses = self.validation_losses(self.trainer(folder), cast(int, self.recipe.train.validation_limit))
            if launched().is_main_process:
                folder.append_log(validated(self.recipe.train.steps, losses))

    @torch.no_grad()
    def validation_losses(self, trainer: TaskTrainer, limit: int) -> dict[str, float]:
        """By task, the loss per label on a fixed sample of `limit` validation instances.

        A label is a token, or with heads an instance.
        """
        training = self.model.training
        self.model.eval()
        dataset = TaskDataset(self.tasks, self.prompt_tokenizer, split="validation", places=self.dataset.places)
        size, processes = self.recipe.train.batch_size // self.recipe.train.gradient_accumulation, launched()
        batches = [
            [(number, i) for i in chosen[start : start + size]]
            for number, chosen in enumerate(sample(len(task.validation), limit) for task in self.tasks)
            for start in range(0, len(chosen), size)
        ]
        found: list[tuple[int, float, int]] = []
        for first in range(0, len(batches), processes.num_processes):
            # At the end a process without a batch repeats the last: a sharded model is computed by all at once.
            at = first + processes.process_index
            examples = [dataset[place] for place in batches[min(at, len(batches) - 1)]]
            batch = {k: v.to(trainer.args.device) for k, v in cast(Any, trainer.data_collator)(examples).items()}
            loss, labels, _ = trainer.label_loss(self.model, batch)
            if at < len(batches):
                found.append((batches[at][0][0], float(loss), int(labels)))
        self.model.train(training)
        found = gather_object(found)
        losses: dict[str, float] = {}
        for number, task in enumerate(self.tasks):
            of_task = [(loss, labels) for at, loss, labels in found if at == number]
            losses[task.name] = sum(loss for loss, _ in of_task) / sum(labels for _, labels in of_task)
        return losses

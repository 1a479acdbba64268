# SPDX-License-Identifier: Apache-2.0
"""Doors of TRL. tests/tuner/test_trainers.py looks at the tasks and losses in them."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from doors import Case, door
from doors.of_transformers import tokenizer
from dyads import with_tasks
from tiny import TASKS

QUIET: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
}  # fmt: skip


def rows(**columns: str) -> Dataset:
    return Dataset.from_list([{"prompt": f"w{3 + n} w5", "task": TASKS[n % 3], **columns} for n in range(6)])


def trains(model: PeftModel, trainer: Any) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(model.get_parameter(n), p) for n, p in before.items())


@door("TRL", "`with_tasks(SFTTrainer)`")
def sft(case: Case) -> None:
    model = case.model()
    arguments = SFTConfig(str(case.folder), **QUIET)
    data = rows(completion=" w9")
    trains(model, with_tasks(SFTTrainer)(model, arguments, train_dataset=data, processing_class=tokenizer()))


@door("TRL", "`with_tasks(DPOTrainer)`, with its reference adapter")
def dpo(case: Case) -> None:
    model = case.model()
    arguments = DPOConfig(str(case.folder), **QUIET)
    data = rows(chosen=" w9", rejected=" w8")
    trainer = with_tasks(DPOTrainer)(model, args=arguments, train_dataset=data, processing_class=tokenizer())
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            assert torch.equal(model.get_parameter(name.replace(".default.", ".ref.")), parameter)
    trains(model, trainer)


@door("TRL", "`with_tasks(GRPOTrainer)`, which generates")
def grpo(case: Case) -> None:
    model, lengths = case.model(), iter(range(1000))
    arguments = GRPOConfig(str(case.folder), num_generations=2, max_completion_length=3, **QUIET)

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float(next(lengths)) for _ in completions]  # so that completions differ in it

    trainer = with_tasks(GRPOTrainer)(
        model, reward_funcs=reward, args=arguments, train_dataset=rows(), processing_class=tokenizer()
    )
    trains(model, trainer)

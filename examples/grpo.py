# SPDX-License-Identifier: Apache-2.0
"""TRL's GRPOTrainer with an adapter that knows tasks: `python examples/grpo.py MODEL ROWS.jsonl OUT`.

A row has the columns `prompt`, `answer` and `task`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from dyads import MoREConfig, with_tasks


def contains_the_answer(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """The reward: 1 for a completion that contains the answer."""
    return [float(right in completion) for completion, right in zip(completions, answer, strict=True)]


model_name, rows_file, out = sys.argv[1:]
rows = load_dataset("json", data_files=rows_file, split="train")

config = MoREConfig(tasks=sorted(set(rows["task"])), target_modules="all-linear")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_name), config)
arguments = GRPOConfig(
    out, learning_rate=1e-4, max_completion_length=32, report_to="none", bf16=torch.cuda.is_available()
)
trainer = with_tasks(GRPOTrainer)(model, contains_the_answer, args=arguments, train_dataset=rows)
trainer.train()
trainer.save_model()

# SPDX-License-Identifier: Apache-2.0
"""TRL's DPOTrainer with an adapter that knows tasks: `python examples/dpo.py MODEL ROWS.jsonl OUT`.

A row has the columns `prompt`, `chosen`, `rejected` and `task`.
"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from dyads import MoREConfig, with_tasks

model_name, rows_file, out = sys.argv[1:]
rows = load_dataset("json", data_files=rows_file, split="train")

config = MoREConfig(tasks=sorted(set(rows["task"])), target_modules="all-linear")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_name), config)
trainer = with_tasks(DPOTrainer)(
    model, args=DPOConfig(out, learning_rate=1e-4, report_to="none", bf16=torch.cuda.is_available()), train_dataset=rows
)
trainer.train()
trainer.save_model()

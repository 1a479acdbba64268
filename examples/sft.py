# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer with an adapter that knows tasks: `python examples/sft.py MODEL ROWS.jsonl OUT`.

A row has the columns `prompt`, `completion` and `task`. Sequences are not padded (padding_free) where the attention
keeps them apart, as FlashAttention does; TRL's `packing` would drop the column `task`.
"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from dyads import MoREConfig, with_tasks

model_name, rows_file, out = sys.argv[1:]
rows = load_dataset("json", data_files=rows_file, split="train")

config = MoREConfig(tasks=sorted(set(rows["task"])), target_modules="all-linear", contrastive=0.1)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_name), config)
trainer = with_tasks(SFTTrainer)(
    model, SFTConfig(out, learning_rate=1e-3, report_to="none", bf16=torch.cuda.is_available()), train_dataset=rows
)
trainer.train()
trainer.save_model()

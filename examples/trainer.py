# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with an adapter that knows tasks: `python examples/trainer.py MODEL ROWS.jsonl OUT`.

A row has the columns `text` and `task`.
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from dyads import MoREConfig, with_tasks

model_name, rows_file, out = sys.argv[1:]
rows = load_dataset("json", data_files=rows_file, split="train")
tokenizer = AutoTokenizer.from_pretrained(model_name)
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns="text")

config = MoREConfig(tasks=sorted(set(rows["task"])), target_modules="all-linear", contrastive=0.1)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_name), config)
trainer = with_tasks(Trainer)(
    model,
    TrainingArguments(out, learning_rate=1e-3, report_to="none"),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.save_model()

# SPDX-License-Identifier: Apache-2.0
"""Train with TRL, export a LoRA per task, answer with vLLM: `python examples/serve_vllm.py MODEL ROWS.jsonl OUT`.

A row has the columns `prompt`, `completion` and `task`. Requests for different tasks share a batch. vLLM's part has not
been run: it needs a GPU, and follows the documentation of vLLM 0.11; the tests replace vLLM and run the rest. The card
`OUT/loras/README.md` has the commands for a server instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from dyads import MoREConfig, with_tasks
from dyads.export import export_all
from dyads.runs.saved import SavedAdapter

model_name, rows_file, out = sys.argv[1:]
rows = load_dataset("json", data_files=rows_file, split="train")

config = MoREConfig(r=8, tasks=sorted(set(rows["task"])), target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_name), config)
trainer = with_tasks(SFTTrainer)(
    model, SFTConfig(out, learning_rate=1e-3, report_to="none", bf16=torch.cuda.is_available()), train_dataset=rows
)
trainer.train()
trainer.save_model()
del trainer, model
torch.cuda.empty_cache()

loras = export_all(SavedAdapter.read(out), Path(out, "loras"))
requests = {lora.task: LoRARequest(str(lora.task), number, str(lora.path)) for number, lora in enumerate(loras, 1)}
engine = LLM(model=model_name, enable_lora=True, max_lora_rank=config.r, max_loras=len(loras))
greedy = SamplingParams(temperature=0, max_tokens=32)
answers = engine.generate(list(rows["prompt"]), greedy, lora_request=[requests[task] for task in rows["task"]])
for row, answer in zip(rows, answers, strict=True):
    print(f"{row['task']}: {row['prompt']} → {answer.outputs[0].text}")

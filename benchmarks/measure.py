# SPDX-License-Identifier: Apache-2.0
"""Worker process of one contender: builds it, warms up, and measures one metric per request.

`python -m benchmarks.measure JOB` reads names of metrics from standard input, one a line, and writes one line of JSON
for each. Between requests it blocks and uses no processor. The first line that it writes holds the facts that do not
change from round to round: parameters, bytes kept for backward, peak memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import SETTINGS, TASKS, Contender, Setting, build


class Bench:
    """A contender's model with its batch, prompts and optimizer."""

    def __init__(self, setting: Setting, contender: Contender, out: Path) -> None:
        self.setting, self.contender = setting, contender
        self.model = build(setting, contender, out)
        generator = torch.Generator().manual_seed(2)
        vocabulary = self.model.config.vocab_size
        ids = torch.randint(3, vocabulary, (setting.batch, setting.width), generator=generator)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.routed = self._tasks()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # The Trainer's default on every side; its states have the dtype of the parameters.
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True) if "step" in contender.metrics else None

    def _tasks(self) -> dict[str, Tensor]:
        if self.contender.tasks == "none" or self.contender.options.get("merged"):
            return {}
        rows = torch.arange(self.setting.batch) % TASKS
        tasks = rows if self.contender.tasks == "mixed" else torch.zeros_like(rows)
        return {"task_ids" if self.contender.builder == "peft-poly" else "task": tasks}

    def loss(self) -> Tensor:
        """The model's own loss, for every contender alike."""
        loss: Tensor = self.model(**self.inputs, labels=self.inputs["input_ids"], use_cache=False, **self.routed).loss
        return loss

    def step(self) -> float:
        """Seconds of forward, backward and an optimizer step over the trainable parameters."""
        assert self.optimizer is not None
        self.model.train()
        begin = time.perf_counter()
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begin

    @torch.no_grad()
    def forward(self) -> float:
        """Seconds of a forward pass with its loss, in evaluation."""
        self.model.eval()
        begin = time.perf_counter()
        self.loss()
        return time.perf_counter() - begin

    @torch.no_grad()
    def decode(self) -> float:
        """Greedily generated tokens per second, prompts included."""
        self.model.eval()
        prompt, new = self.setting.prompt, self.setting.new_tokens
        inputs = {name: value[:, :prompt] for name, value in self.inputs.items()}
        begin = time.perf_counter()
        output = self.model.generate(**inputs, **self.routed, max_new_tokens=new, do_sample=False)
        seconds = time.perf_counter() - begin
        assert output.shape == (self.setting.batch, prompt + new), f"generated {tuple(output.shape)}"
        return self.setting.batch * new / seconds

    def saved_bytes(self) -> int:
        """Bytes that one forward pass keeps for backward, storages counted once, parameters not at all."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, Any] = {}  # holds the storages, so that no address is used twice meanwhile

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        self.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        total = sum(int(storage.nbytes()) for storage in kept.values())
        del loss
        return total

    def warm_up(self) -> dict[str, Any]:
        """Run every metric once or twice, untimed; returns the facts, which are measured only once."""
        facts: dict[str, Any] = {"label": self.contender.label, "options": self.contender.options}
        trains = "step" in self.contender.metrics
        facts["parameters"] = sum(p.numel() for p in self.trained) if trains else 0
        if trains:
            self.step()
            self.step()
        else:
            self.forward()
        facts["peak"] = peak_bytes()
        if trains:
            facts["saved"] = self.saved_bytes()
        if "forward" in self.contender.metrics:
            self.forward()
        if "decode" in self.contender.metrics:
            self.decode()
        return facts

    def measured(self, metric: str) -> float:
        """One measurement."""
        return {"step": self.step, "forward": self.forward, "decode": self.decode}[metric]()


def peak_bytes() -> int:
    """Peak resident memory of this process; of this program alone, where the system reports it."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss may still hold the size of the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    """Measure until standard input ends."""
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of libraries go to the log

    def answer(**line: Any) -> None:
        print(json.dumps(line), file=answers, flush=True)

    setting = SETTINGS[job["setting"]]
    if job.get("attention"):
        setting = Setting(**{**vars(setting), "attention": job["attention"]})
    torch.set_num_threads(setting.threads)
    contender = Contender(**{**job["contender"], "metrics": tuple(job["contender"]["metrics"])})
    bench = Bench(setting, contender, Path(job["out"]))
    answer(facts=bench.warm_up())
    for line in sys.stdin:
        answer(value=bench.measured(line.strip()))


if __name__ == "__main__":
    main()

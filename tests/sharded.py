# SPDX-License-Identifier: Apache-2.0
"""Adapters sharded by FSDP2 in two processes: `torchrun tests/sharded.py FILE` trains, saves and reloads each variant.

accelerate uses no FSDP on CPUs, so PyTorch's own `fully_shard` does it here. Per variant the file gets how far the
sharded adapter is from one that is trained whole, and its reloaded logits from that one's; or the error.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dyads.methods import Core
from tiny import TARGETS, TASKS, VARIANTS, Variant, batch, task_of, tiny_model

STEPS, ROWS = 3, 4
LOSSES = [
    Variant("more", (("contrastive", 0.1), ("embedding", "shared"), ("task_dim", 5))),
    Variant("hmora", (("divergence", 0.1), ("router_groups", (("q_proj", "v_proj"),)))),
]
CASES = [*(Variant("smora", (("bias_rate", 0.0),)) if v.key == "smora" else v for v in VARIANTS), *LOSSES]
"""SMoRA's bias moves when its core sees the router change, which FSDP hides from it."""


def _adapted(variant: Variant) -> PeftModel:
    torch.manual_seed(0)
    options = variant.config(target_modules=TARGETS["llama"], init_weights=False, lora_dropout=0.0)
    return get_peft_model(tiny_model("llama"), options).train()


def _inputs(variant: Variant, step: int, rows: slice) -> dict[str, Any]:
    inputs = {key: value[rows] for key, value in batch("llama", rows=ROWS, seed=step).items()}
    tasks = [TASKS[i % len(TASKS)] for i in range(ROWS)][rows]
    return {**inputs, "labels": inputs["input_ids"], **task_of(variant.config(), *tasks)}


def _train(model: nn.Module, variant: Variant, halves: list[slice]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        for rows in halves:
            (model(**_inputs(variant, step, rows)).loss / len(halves)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _logits(model: PeftModel, variant: Variant) -> Tensor:
    inputs = _inputs(variant, 0, slice(ROWS))
    with torch.no_grad():
        return model.eval()(**inputs).logits


def _case(variant: Variant, folder: Path) -> dict[str, Any]:
    halves, rank = [slice(0, ROWS // 2), slice(ROWS // 2, ROWS)], dist.get_rank()
    whole = _adapted(variant)
    sharded = copy.deepcopy(whole)
    _train(whole, variant, halves)

    blocks = sharded.base_model.model.model.layers
    if dict(variant.options).get("embedding") == "shared":
        for core in [m for m in sharded.modules() if isinstance(m, Core) and "embedding" in m._parameters]:
            fully_shard(core, reshard_after_forward=False)  # all blocks read it, and its own would free it
    for block in blocks:
        fully_shard(block)
    fully_shard(sharded)
    trained = [p for p in sharded.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in trained)
    _train(sharded, variant, [halves[rank]])
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        sharded.save_pretrained(folder, state_dict=state)
    dist.barrier()
    expected = get_peft_model_state_dict(whole)
    found = {"weights": 0.0, "logits": 0.0}
    if rank == 0:
        reloaded = PeftModel.from_pretrained(tiny_model("llama"), folder)
        ours = get_peft_model_state_dict(reloaded)
        assert ours.keys() == expected.keys()
        weights = [k for k in ours if not k.endswith(("lora_core.chosen", "lora_core.bias_steps"))]
        found["weights"] = max(float((ours[k].double() - expected[k].double()).abs().max()) for k in weights)
        found["logits"] = float((_logits(reloaded, variant) - _logits(whole, variant)).abs().max())
    return found


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"rank{dist.get_rank()}-") as folder:
        for number, variant in enumerate(CASES):
            try:
                results[variant.id] = _case(variant, Path(folder) / str(number))
            except Exception:  # noqa: PERF203 – the other variants go on
                results[variant.id] = {"error": traceback.format_exc()}
    if dist.get_rank() == 0:
        path.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(Path(sys.argv[1]))

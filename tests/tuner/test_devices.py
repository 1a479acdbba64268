# SPDX-License-Identifier: Apache-2.0
"""Accelerators, simulated: no operation mixes devices, reads a value, or makes the host wait.

Two kinds of tensors without values serve: those of the meta device, and fake tensors on a device that PyTorch knows and
has no kernels for. With the latter an operation that mixes devices is an error, as on a GPU, and so is one that needs a
value (`.item()`, `.tolist()`, `nonzero`, a boolean index), which would wait for a GPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dyads
from dyads.tuner import DyadsLinear
from tiny import MLP, PLACED, TARGETS, TASKS, Variant, batch, task_of, tiny_model

OURS = str(Path(dyads.__file__).parent)
ACCELERATOR = torch.device("lazy:0")
LOSSY = [
    (Variant("more", (("contrastive", 0.1), ("contrastive_pool", "last"))), "gpt2"),
    (Variant("more", (("contrastive", 0.1), ("embedding", "shared"), ("task_dim", 5))), "t5"),
    (Variant("mode", (("load_balance", 0.1), ("score", "cosine"))), "llama"),
    (Variant("task_mode", (("contrastive", 0.1), ("load_balance", 0.1))), "bert"),
]


class Waits(TorchDispatchMode):
    """Copies between the host and an accelerator in dyads' code for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            source, target = args[0].device, out.device
            to_host = target.type == "cpu"
            if source != target and (to_host or not kwargs.get("non_blocking", False)):
                self._note(f"{source} to {target}")
        elif func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            self._note(f"{args[1].device} to {args[0].device}")
        return out

    def _note(self, copy: str) -> None:
        ours = [frame.name for frame in traceback.extract_stack() if OURS in frame.filename]
        if ours:  # transformers copies too
            self.found.append(f"{copy} in {ours[-1]}")


def move(model: nn.Module, place: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer; shared ones stay shared."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(place(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = place(buffer)


@contextmanager
def accelerator(model: nn.Module, device: torch.device) -> Iterator[Waits]:
    """Within this context the model is on the device, and new tensors have no values."""
    waits = Waits()
    with FakeTensorMode() if device.type != "meta" else torch.device("meta"), waits:
        move(model, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device))
        yield waits


def on(device: torch.device, kind: str) -> dict[str, Tensor]:
    shapes = {name: value.shape for name, value in batch(kind).items()}
    if device.type == "meta":
        del shapes["attention_mask"]  # whose values transformers reads
    return {name: torch.zeros(shape, dtype=torch.long, device=device) for name, shape in shapes.items()}


def labels(inputs: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    if kind == "bert":
        return {"labels": inputs["input_ids"][:, 0]}
    return {"labels": inputs["decoder_input_ids"] if kind == "t5" else inputs["input_ids"]}


def adapted(variant: Variant, kind: str) -> PeftModel:
    config = variant.config(target_modules=TARGETS[kind], init_weights=False, lora_dropout=0.0)
    return get_peft_model(tiny_model(kind, blocks=1), config)


@pytest.mark.parametrize(
    ("variant", "kind", "device"),
    [
        *((variant, kind, ACCELERATOR) for variant, kind in (*PLACED, *LOSSY)),
        # Not GPT-2, whose model in transformers reads values when it decodes.
        *((v, kind, torch.device("meta")) for v, kind in (*PLACED[:6], *LOSSY[2:]) if kind != "gpt2"),
    ],
    ids=lambda v: getattr(v, "id", str(v)),
)
def test_training_and_decoding_stay_on_the_device(variant: Variant, kind: str, device: torch.device) -> None:
    model = adapted(variant, kind)
    looks = variant.config().task_names is not None
    with accelerator(model, device) as waits:
        inputs = on(device, kind)
        ids = {"task": torch.zeros(3, dtype=torch.long, device=device)} if looks else {}
        for task in [ids, {"task": list(TASKS)}] if looks else [ids]:
            loss = model.train()(**inputs, **labels(inputs, kind), **task).loss
            assert loss.device == device
            if task is ids:
                loss.backward()
                gradients = [p.grad for p in model.parameters() if p.requires_grad]
                assert all(g is not None and g.device == device for g in gradients)
            if (variant, kind) in LOSSY:
                model(**inputs, **task)  # without labels the loss is not taken
            assert dyads.auxiliary_loss(model).device.type in (device.type, "cpu")
        if kind in ("llama", "gpt2"):
            with torch.no_grad(), model.eval().base_model.routing.unchanged_weights():
                first = model(**inputs, **ids, use_cache=True)
                one = {name: torch.zeros(3, 1, dtype=torch.long, device=device) for name in inputs}
                if "attention_mask" in one:
                    one["attention_mask"] = torch.ones(3, 8, dtype=torch.long, device=device)
                for _ in range(2):
                    model(**one, past_key_values=first.past_key_values, **ids)
    assert waits.found == []


@pytest.mark.parametrize("variant", [Variant("mtl_lora"), LOSSY[0][0]], ids=lambda v: v.id)
@pytest.mark.parametrize("ends", [False, True], ids=["position_ids", "cu_seq_lens_q"])
def test_packed_sequences_stay_on_the_device(variant: Variant, ends: bool) -> None:
    model = adapted(variant, "llama")
    with accelerator(model, ACCELERATOR) as waits:
        ids = torch.zeros(1, 12, dtype=torch.long, device=ACCELERATOR)
        inputs = {"input_ids": ids, "position_ids": ids, "max_length_q": 5}  # without the last, a loss on samples reads
        if ends:
            inputs["cu_seq_lens_q"] = torch.zeros(4, dtype=torch.int32, device=ACCELERATOR)
        for task in (list(TASKS), torch.zeros(3, dtype=torch.long, device=ACCELERATOR)):
            logits = model.train()(**inputs, task=task).logits
            (logits.sum() + dyads.auxiliary_loss(model)).backward()
    assert waits.found == []


def mlp_on_accelerator(variant: Variant, task: Any) -> None:
    model = get_peft_model(MLP(), variant.config(target_modules=["lin0", "lin1"]))
    with accelerator(model, ACCELERATOR) as waits:
        model(torch.zeros(3, 6, device=ACCELERATOR), task=task).sum().backward()
    assert waits.found == []


@pytest.mark.parametrize("fault", ["mixes", "reads", "indexes", "finds", "copies", "returns"])
def test_the_simulation_notices_what_a_gpu_would_not_do_or_wait_for(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant("more")
    mlp_on_accelerator(variant, list(TASKS))
    core = type(variant.config().core(6))
    inner = core.task_scores

    def faulty(self: Any, task: Tensor) -> Tensor:
        scores = inner(self, task)
        if fault == "mixes":
            return scores + torch.zeros(3, 1, device="cpu")
        if fault == "reads":
            return scores * task[0].item()
        if fault == "indexes":
            return scores[task > 0]
        if fault == "finds":
            return scores[(task > 0).nonzero()[:, 0]]
        if fault == "copies":
            return scores + torch.zeros(3, 1, device="cpu").to(scores.device)
        return scores.cpu().to(scores.device, non_blocking=True)

    monkeypatch.setattr(core, "task_scores", faulty)
    with pytest.raises((RuntimeError, AssertionError)):
        mlp_on_accelerator(variant, list(TASKS))


def test_layers_on_several_devices_keep_the_ids_of_each() -> None:
    """As device_map places a large model: ids are kept for every device, and are not moved to and fro."""
    other = torch.device("lazy:1")
    model = get_peft_model(MLP(), Variant("more").config(target_modules=["lin0", "lin1"]))
    layers = [m for m in model.modules() if isinstance(m, DyadsLinear)]
    with accelerator(model, ACCELERATOR) as waits:
        move(layers[1], lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=other))
        with dyads.use_task(model, list(TASKS)):
            for _ in range(2):
                for layer, device in zip(layers, (ACCELERATOR, other), strict=True):
                    layer(torch.zeros(3, layer.in_features, device=device))
            tasks = model.base_model.routing.tasks()
            assert tasks is not None
            assert {device for _, device in tasks._ids} == {ACCELERATOR, other}
    assert waits.found == []


def test_one_task_and_tasks_of_a_shared_batch_need_no_copy() -> None:
    for variant in (Variant("moelora"), Variant("mtl_lora")):
        mlp_on_accelerator(variant, "rte")
        mlp_on_accelerator(variant, task_of(variant.config(), *TASKS)["task"])

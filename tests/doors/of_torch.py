# SPDX-License-Identifier: Apache-2.0
"""Doors of PyTorch and accelerate."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from doors import Case, Cell, door, refused
from dyads import auxiliary_loss, use_task
from tiny import MLP, TASKS, task_of, tiny_model

PLACES = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}


def mlp(case: Case) -> torch.nn.Module:
    torch.manual_seed(0)
    return get_peft_model(MLP(), case.config(target_modules=["lin0", "lin1"])).double()


@door("PyTorch", "`copy.deepcopy`, `pickle`")
def copied(case: Case) -> None:
    model = case.model()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.logits(twin), case.logits(model))


@door("PyTorch", "threads with different tasks in one model, `forward` and `generate`")
def threads(case: Case) -> None:
    model = case.model()

    def answer(task: str) -> torch.Tensor:
        given = {**case.inputs, **task_of(case.variant.config(), task)}
        return model.generate(**given, max_new_tokens=4, do_sample=False)

    expected = [answer(task) for task in TASKS]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(answer, TASKS), expected, strict=True))


@door("PyTorch", "autocast, `inference_mode`")
def autocast(case: Case) -> None:
    model, expected = case.model(), case.logits(case.model())
    with torch.inference_mode():
        model(**case.inputs, **case.task)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(**case.inputs, **case.task).logits.float().sum().backward()
    assert expected.isfinite().all()


@door("PyTorch", "gradients of gradients, forward-mode differentiation, `torch.func`")
def differentiated(case: Case) -> None:
    model, x = mlp(case), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(model(x, **case.task).square().sum(), x, create_graph=True)[0]
    first.square().sum().backward()
    assert x.grad.abs().max() > 0
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = model(forward_ad.make_dual(x.detach(), tangent), **case.task)
        ours = forward_ad.unpack_dual(dual).tangent
    step = 1e-6
    numeric = (model(x + step * tangent, **case.task) - model(x - step * tangent, **case.task)) / (2 * step)
    if case.variant.key != "smora":  # whose choice of ranks has jumps
        assert_close(ours, numeric, atol=1e-4, rtol=1e-4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    assert_close(functional_call(model, parameters, (x,), case.task), model(x, **case.task))


@door("PyTorch", "the meta device: shapes without memory")
def meta(case: Case) -> None:
    model = mlp(case).to("meta")
    assert model(torch.empty(3, 6, device="meta", dtype=torch.float64), **case.task).shape == (3, 2)


@door("PyTorch", "`torch.compile(fullgraph=True)` in training and evaluation, tasks as a tensor")
def compiled(case: Case) -> Cell | None:
    model, x = mlp(case), torch.randn(3, 6, dtype=torch.float64)
    task = {"task": torch.tensor([0, 1, 2])} if case.task else {}
    moves_bias = case.variant.key == "smora"
    for training in (False, True):
        torch._dynamo.reset()
        whole = torch.compile(model.train(training), fullgraph=True, backend="eager")
        if training and moves_bias:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="_move_bias"):
                whole(x, **task)
            return refused("in training its bias moves outside the graph: leave `fullgraph` out, or set `bias_rate=0`")
        assert_close(whole(x, **task), model(x, **task))
    return None


@door("PyTorch", "`torch.compile` in training, in a model whose graph breaks")
def broken_graph(case: Case) -> None:
    torch._dynamo.reset()
    x, found = torch.randn(3, 6, dtype=torch.float64), []
    for compiles in (False, True):
        model = mlp(case)
        model.base_model.model.lin1.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        call = torch.compile(model, backend="eager") if compiles else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            torch.manual_seed(0)
            loss = call(x, **case.task).pow(2).sum() + auxiliary_loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((loss, model.state_dict()))
    assert_close(found[1], found[0])


@door("PyTorch", "`torch.export` in evaluation, tasks as a tensor")
def exported(case: Case) -> None:
    model, x = mlp(case).eval(), torch.randn(3, 6, dtype=torch.float64)
    task, others = ({"task": torch.tensor(ids)} if case.task else {} for ids in ([0, 1, 2], [2, 2, 0]))
    program = torch.export.export(model, (x,), task).module()
    y = torch.randn_like(x)
    assert_close(program(y, **others), model(y, **others))


@door("PyTorch", "`torch.jit.trace`, without a task or within `use_task`")
def traced(case: Case) -> None:
    model, x = mlp(case).eval(), torch.randn(3, 6, dtype=torch.float64)
    with use_task(model, "cola") if case.task else nullcontext():
        program = torch.jit.trace(model, x, check_trace=False)
        y = torch.randn_like(x)
        assert_close(program(y), model(y))


@door("accelerate", "a base model that is partly on disk (`device_map`)")
def on_disk(case: Case) -> None:
    tiny_model("llama").save_pretrained(case.folder / "base")
    model = case.model()
    model.save_pretrained(case.folder / "adapter")
    places = PLACES | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(
        case.folder / "base", device_map=places, offload_folder=case.folder / "o"
    )
    offloaded = PeftModel.from_pretrained(
        base, case.folder / "adapter", offload_folder=case.folder / "a",
        device_map={f"base_model.model.{name}": place for name, place in places.items()},
    )  # fmt: skip
    assert any(p.is_meta for p in offloaded.parameters())
    assert torch.equal(case.logits(offloaded), case.logits(model))


@door("accelerate", "`cpu_offload`: weights that come for every call")
def on_cpu(case: Case) -> None:
    model = case.model()
    expected = case.logits(model)
    assert torch.equal(case.logits(cpu_offload(model, execution_device=torch.device("cpu"))), expected)

# SPDX-License-Identifier: Apache-2.0
"""Forward passes at the same time: threads, coroutines and replicas, each with tasks of its own."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

import dyads
from dyads import use_task
from dyads.errors import ConfigError, RoutingError
from dyads.tuner import DyadsLinear
from tiny import MLP, TARGETS, TASKS, Variant, batch, task_of, tiny_model

THREADS = 4


def adapted(variant: Variant, **options: Any) -> PeftModel:
    config = variant.config(target_modules=TARGETS["llama"], init_weights=False, **options)
    model = get_peft_model(tiny_model("llama"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_core" in name and name.endswith(("embedding", "logits")):
                parameter.normal_(std=3)  # tasks far apart, so that their gates differ
            if "lora_B" in name:
                parameter.mul_(20)  # tokens that depend on the gates
    return model


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of calls that start together, each in a thread of its own."""
    barrier = Barrier(len(calls))

    def start(call: Callable[[], Any]) -> Any:
        barrier.wait(timeout=60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(start, call) for call in calls]]


def calls(model: PeftModel, variant: Variant, *, generate: bool) -> list[Callable[[], Tensor]]:
    made: list[Callable[[], Tensor]] = []
    for i in range(THREADS):
        given = {**batch("llama", rows=1 + i % 2, seed=i), **task_of(variant.config(), TASKS[i % 3])}

        def call(given: dict[str, Any] = given) -> Tensor:
            with torch.no_grad():
                if generate:
                    return model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=2)
                return torch.stack([model(**given).logits for _ in range(8)])

        made.append(call)
    return made


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
def test_threads_with_different_tasks_get_the_answers_of_one_after_the_other(unlike: Variant, generate: bool) -> None:
    model = adapted(unlike)
    work = calls(model, unlike, generate=generate)
    expected = [call() for call in work]
    for _ in range(3):
        for ours, theirs in zip(at_once(work), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert model.base_model.routing.cache is None
    assert model.base_model.routing._caches == []


def test_tasks_of_use_task_belong_to_their_thread() -> None:
    model, inputs = adapted(Variant("more")), batch("llama")

    def under(task: str) -> Tensor:
        with use_task(model, task), torch.no_grad():
            return torch.stack([model(**inputs).logits for _ in range(8)])

    with torch.no_grad():
        expected = [model(**inputs, task=task).logits for task in TASKS]
    for ours, theirs in zip(at_once([lambda t=t: under(t) for t in TASKS]), expected, strict=True):
        assert all(torch.equal(one, theirs) for one in ours)
    errors: list[Exception] = []

    def without() -> None:
        try:
            model(**inputs)
        except RoutingError as error:
            errors.append(error)

    with use_task(model, "rte"):
        other = Thread(target=without)
        other.start()
        other.join()
    assert len(errors) == 1


def test_tasks_of_use_task_hold_across_awaits_and_in_threads_of_the_context() -> None:
    model, inputs = adapted(Variant("more")), batch("llama")

    async def answer(task: str) -> list[Tensor]:
        with use_task(model, task):
            await asyncio.sleep(0)
            here = model(**inputs).logits
            await asyncio.sleep(0)
            return [here, await asyncio.to_thread(lambda: model(**inputs).logits)]

    async def together() -> list[list[Tensor]]:
        return await asyncio.gather(*(answer(task) for task in TASKS))

    found = asyncio.run(together())
    for task, ours in zip(TASKS, found, strict=True):
        assert all(torch.equal(one, model(**inputs, task=task).logits) for one in ours)
    with pytest.raises(RoutingError, match="needs a task"):
        model(**inputs)


def test_compiled_code_refuses_tasks_of_interleaved_coroutines_rather_than_mixing_them() -> None:
    torch._dynamo.reset()
    config = Variant("more").config(target_modules=["lin0"], init_weights=False)
    model = get_peft_model(MLP(), config).eval()
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 6)

    async def answer(used: str, **given: Any) -> Tensor:
        with use_task(model, used):
            await asyncio.sleep(0)
            return compiled(x, **given)

    async def together(*answers: Any) -> Any:
        return await asyncio.gather(*answers, return_exceptions=True)

    with torch.no_grad():
        refused = asyncio.run(together(answer("rte"), answer("cola")))
        assert all("needs task=" in str(error) for error in refused)
        for task, found in zip(TASKS, asyncio.run(together(*(answer("rte", task=t) for t in TASKS))), strict=True):
            assert_close(found, model(x, task=task))
        assert_close(asyncio.run(answer("cola")), model(x, task="cola"))


def test_training_in_threads_gives_each_its_own_auxiliary_loss() -> None:
    variant = Variant("more", (("contrastive", 0.1),))
    model = adapted(variant).train()

    def loss(i: int) -> Tensor:
        model(**batch("llama", seed=i), task=TASKS[i])
        return dyads.auxiliary_loss(model).detach()

    expected = [loss(i) for i in range(3)]
    assert at_once([lambda i=i: loss(i) for i in range(3)]) == expected
    assert len(set(map(float, expected))) == 3


def replica_of(model: nn.Module) -> nn.Module:
    """As nn.DataParallel makes them, which it does for accelerators only: weights are tensors, and hooks are shared."""
    copies: dict[nn.Module, nn.Module] = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(twin, name, copies[child])
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter * 1)
    return copies[model]


def test_replicas_of_data_parallel_get_the_tasks_of_their_rows_and_gradients(unlike: Variant) -> None:
    torch.manual_seed(0)
    model = get_peft_model(MLP(), unlike.config(target_modules=["lin0", "lin1"], init_weights=False))
    x = torch.randn(6, 6)
    task = torch.tensor([0, 1, 2, 2, 1, 0]) if unlike.config().task_names else None

    def forward(part: nn.Module, rows: slice) -> Tensor:
        return part(x[rows], **({} if task is None else {"task": task[rows]}))

    if unlike.key == "smora":
        with pytest.raises(ConfigError, match="smora cannot train"):
            forward(replica_of(model), slice(None))
        model.eval()
    whole = forward(model, slice(None))
    whole.square().sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    replicas = [replica_of(model) for _ in range(2)]
    parts = at_once([lambda i=i: forward(replicas[i], slice(3 * i, 3 * i + 3)) for i in range(2)])
    assert_close(torch.cat(parts), whole)
    torch.cat(parts).square().sum().backward()
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    with torch.no_grad(), model.base_model.routing.unchanged_weights():
        for layer in replica_of(model.eval()).modules():
            if isinstance(layer, DyadsLinear):
                assert layer._cache(x) is None


def test_a_copy_has_passes_of_its_own() -> None:
    model, inputs = adapted(Variant("more")), batch("llama")
    with torch.no_grad(), use_task(model, "rte"):
        model(**inputs)
        with pytest.raises(RoutingError, match="needs a task"):
            copy.deepcopy(model)(**inputs)

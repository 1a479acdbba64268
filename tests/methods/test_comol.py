# SPDX-License-Identifier: Apache-2.0
"""CoMoL: the public code's layer written out, the methods it meets, the paper's parameter counts, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from dyads import MoLoRAConfig
from dyads.errors import ConfigError, MergeError
from dyads.export import export
from dyads.methods.comol import CoMoL, CoMoLConfig
from dyads.ops import dyadic, fused
from dyads.runs.saved import SavedAdapter
from tiny import TARGETS, adapted_layers, batch, tiny_model


def core_of(config: CoMoLConfig, d: int = 6) -> CoMoL:
    core = config.core(d).double()
    core.reset_parameters()
    return core


def data(p: int, d: int = 6, o: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 4, d).double(), torch.randn(p, d).double(), torch.randn(o, p).double()


@pytest.mark.parametrize("score", ["h", "x"])
def test_comol_is_the_layer_of_the_public_code(score: str) -> None:
    # There a row of coefficients is multiplied by the merged core, so its cores are the transposes of ours.
    core = core_of(CoMoLConfig(r=4, num_experts=3, score=score))
    x, A, B = data(4)
    expected = torch.empty(3, 4, 5).double()
    for sample in range(3):
        for token in range(4):
            row = x[sample, token] @ A.T
            weights = torch.softmax((row if score == "h" else x[sample, token]) @ core.router.T, 0)
            merged = sum((weights[i] * core.cores[i].T for i in range(3)), torch.zeros(4, 4).double())
            expected[sample, token] = (row @ merged) @ B.T
    for operator in (dyadic, fused):
        assert_close(operator(x, A, B, core), expected)


def test_comol_is_molora_sd_with_up_projections_through_the_cores() -> None:
    core = core_of(CoMoLConfig(r=4, num_experts=3))
    x, A, B = data(4)
    shared: Any = MoLoRAConfig(r=4, num_experts=3, shared_down=True, score="h").core(6).double()
    shared.router = core.router
    # Columns of MoLORA-SD's B go rank by rank, then by expert: expert i has B M_i.
    ups = torch.stack([B @ matrix for matrix in core.cores], dim=-1).flatten(1)
    assert_close(fused(x, A, B, core), fused(x, A, ups, shared))


def test_equal_cores_leave_nothing_to_choose_and_the_identity_is_lora() -> None:
    core = core_of(CoMoLConfig(r=4, num_experts=3))
    x, A, B = data(4)
    with torch.no_grad():
        core.cores.copy_(core.cores[:1].clone().expand(3, 4, 4))
    assert_close(fused(x, A, B, core), x @ (B @ core.cores[0] @ A).T)
    with torch.no_grad():
        core.cores.copy_(torch.eye(4).expand(3, 4, 4))
    assert_close(fused(x, A, B, core), x @ (B @ A).T)


def test_gates_are_the_merged_core_of_every_token() -> None:
    core = core_of(CoMoLConfig(r=4, num_experts=3))
    x, A, _ = data(4)
    h = x @ A.T
    weights = (h @ core.router.T).softmax(-1)
    G = core.matrix(core.route(h, x, None))
    assert_close(G, torch.einsum("btn,njk->btjk", weights, core.cores))


def in_a_model(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = CoMoLConfig(r=4, lora_dropout=0.0, target_modules=TARGETS["llama"], init_weights=False, **options)
    return get_peft_model(tiny_model("llama"), config)


def test_one_core_merges_exactly_and_exports_as_a_lora(tmp_path: Path) -> None:
    model = in_a_model(num_experts=1).eval()
    with torch.no_grad():
        expected = model(**batch("llama")).logits
        merged = copy.deepcopy(model).merge_and_unload()
        assert_close(merged(**batch("llama")).logits, expected, atol=1e-5, rtol=1e-5)
        model.save_pretrained(str(tmp_path / "comol"))
        export(SavedAdapter.read(tmp_path / "comol"), tmp_path / "lora")
        lora = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "lora"))
        assert_close(lora(**batch("llama")).logits, expected, atol=1e-5, rtol=1e-5)


def test_several_cores_are_neither_merged_nor_exported(tmp_path: Path) -> None:
    model = in_a_model(num_experts=3)
    with pytest.raises(
        MergeError, match=r"cannot merge adapter 'default' \(comol\): its gates look at the layer's inp"
    ):
        model.merge_and_unload()
    model.save_pretrained(str(tmp_path / "comol"))
    with pytest.raises(MergeError, match=r"\(comol\): its gates look at the layer's input, so no ordinary LoRA equals"):
        export(SavedAdapter.read(tmp_path / "comol"), tmp_path / "lora")


@pytest.mark.parametrize("score", ["h", "x"])
def test_every_parameter_trains(score: str) -> None:
    model = in_a_model(num_experts=3, score=score)
    model(**batch("llama"), labels=batch("llama")["input_ids"]).loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * len(adapted_layers(model))  # A, B, cores, router
    assert all(grad is not None and bool(grad.any()) for grad in trained.values())


def test_cores_start_as_the_codes_and_a_fresh_adapter_changes_nothing() -> None:
    core = CoMoLConfig(r=64, num_experts=9).core(6)
    core.reset_parameters()
    for values, bound in ((core.cores, 64**-0.5), (core.router, 64**-0.5)):  # Kaiming-uniform, as nn.Linear
        assert 0.98 * bound < float(values.detach().abs().max()) <= bound
    x, A, B = torch.randn(2, 6), torch.randn(64, 6), torch.zeros(5, 64)
    assert torch.equal(dyadic(x, A, B, core), torch.zeros(2, 5))


# (width, layers, key and value width, MLP's width), experts, score, parameters that the paper prints, in millions.
QWEN3_8B, QWEN3_14B = (4096, 36, 1024, 12288), (5120, 40, 1024, 17408)


@pytest.mark.parametrize(
    ("sizes", "experts", "score", "printed"),
    [
        (QWEN3_8B, 8, "h", 25.16),
        (QWEN3_8B, 64, "h", 27.91),
        (QWEN3_8B, 8, "x", 33.40),  # the paper cuts 33.399 off to 33.39
        (QWEN3_14B, 8, "h", 35.82),
    ],
)
def test_parameters_are_the_papers(sizes: tuple[int, ...], experts: int, score: str, printed: float) -> None:
    d, layers, kv, inner = sizes
    config, total = CoMoLConfig(num_experts=experts, score=score), 0
    with torch.device("meta"):
        for inputs, outputs in ((d, d), (d, kv), (d, kv), (d, d), (inner, d)):  # q, k, v, o, down
            core = config.core(inputs)
            own = sum(p.numel() for p in core.parameters())
            assert own == experts * (16 * 16 + (16 if score == "h" else inputs))
            total += layers * (core.p * inputs + core.q * outputs + own)
    assert round(total / 1e6, 2) == printed


def test_a_saved_adapter_loads_on_the_meta_device_with_its_cores(tmp_path: Path) -> None:
    model = in_a_model(num_experts=3).eval()
    nn.init.normal_(adapted_layers(model)[0].core("default").cores)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path), low_cpu_mem_usage=True).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch("llama")).logits, model(**batch("llama")).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "task"}, r"comol: score must be h \(A x\) or x \(the token\), got 'task'"),
        ({"num_experts": 0}, "comol: num_experts must be a whole number, 1 or more, got 0"),
    ],
)
def test_comol_refuses_what_it_does_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CoMoLConfig(**options)

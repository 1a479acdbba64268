# SPDX-License-Identifier: Apache-2.0
"""Relatives of MoDE: their papers' formulas, and identities where two papers meet."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PolyConfig as PeftPolyConfig
from peft import get_peft_model
from peft.tuners.poly.layer import Linear as PeftPolyLinear
from torch import Tensor, nn
from torch.testing import assert_close

from dyads import MoDEConfig, MoLoRAConfig
from dyads.errors import ConfigError
from dyads.methods import DyadsConfig
from dyads.methods.hydralora import HydraLoRAConfig
from dyads.methods.moelora import MOELoRAConfig
from dyads.methods.mtl_lora import MTLLoRAConfig
from dyads.methods.poly import PolyConfig
from dyads.methods.smora import SMoRAConfig
from dyads.ops import dyadic, fused
from dyads.tuner import DyadsLinear
from tiny import MLP, TASKS, batch, tiny_model

TASK = torch.tensor([2, 0, 2])


def core_of(config: DyadsConfig, d: int = 6) -> Any:
    core = config.core(d).double().eval()
    core.reset_parameters()
    return core


def data(p: int, q: int, d: int = 6, o: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 4, d).double(), torch.randn(p, d).double(), torch.randn(q, o).double()


def in_a_model(config: DyadsConfig) -> Any:
    config.target_modules, config.init_weights = {"q_proj", "down_proj"}, False
    return get_peft_model(tiny_model("llama"), config).eval()


def cores(model: nn.Module) -> list[Any]:
    return [m.core("default") for m in model.modules() if isinstance(m, DyadsLinear)]


def assert_merges_for_every_task(model: Any) -> None:
    for task in TASKS:
        with torch.no_grad():
            expected = model(**batch("llama"), task=task).logits
            merged = copy.deepcopy(model).merge_and_unload(task=task)
            assert_close(merged(**batch("llama")).logits, expected, atol=1e-5, rtol=1e-5)


# --- HydraLoRA --------------------------------------------------------------------------------------------------------


def test_hydralora_is_molora_sd_and_mode_with_one_group() -> None:
    x, A, B = data(4, 12)
    router = nn.Parameter(torch.randn(3, 6).double())
    results = []
    for config in (
        HydraLoRAConfig(r=4, num_experts=3),
        MoLoRAConfig(r=4, num_experts=3, shared_down=True),
        MoDEConfig(r=4, num_experts=3, group_size=4),
    ):
        core = core_of(config)
        core.router = router
        results.append(fused(x, A, B.T, core))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_hydralora_has_the_defaults_of_its_code() -> None:
    config = HydraLoRAConfig()
    assert (config.r, config.scaling, config.lora_dropout, config.num_experts) == (4, 8.0, 0.05, 4)
    core = core_of(config, d=1000)
    assert core.router.abs().max() <= 1000**-0.5  # Kaiming-uniform, as nn.Linear
    assert core.router.abs().max() > 0.99 * 1000**-0.5


# --- MOELoRA ----------------------------------------------------------------------------------------------------------


def test_moelora_is_the_papers_sum_over_experts_of_rank_r_over_n() -> None:
    core = core_of(MOELoRAConfig(r=6, num_experts=3, tasks=list(TASKS)))
    x, A, B = data(6, 6)
    assert core.embedding.shape == (3, 64)
    weights = (core.embedding[TASK] @ core.task_router.T).softmax(-1)
    by_hand = sum(weights[:, i].view(3, 1, 1) * (x @ A[2 * i : 2 * i + 2].T @ B[2 * i : 2 * i + 2]) for i in range(3))
    assert_close(fused(x, A, B.T, core, TASK), by_hand)


def test_moelora_merges_for_every_task_exactly() -> None:
    model = in_a_model(MOELoRAConfig(r=4, num_experts=2, tasks=list(TASKS)))
    assert_merges_for_every_task(model)


# --- MTL-LoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [False, True])
def test_mtl_lora_is_the_papers_formula(diagonal: bool) -> None:
    core = core_of(MTLLoRAConfig(r=4, num_experts=3, tasks=list(TASKS), diagonal=diagonal))
    nn.init.normal_(core.transform)
    x, A, B = data(4, 12)
    for row, task in enumerate(TASK):
        turn = torch.diag(core.transform[task]) if diagonal else core.transform[task]
        weights = (core.weights[task] / 0.1).softmax(-1)
        up = sum(weights[i] * B[i::3] for i in range(3))
        assert_close(dyadic(x, A, B.T, core, TASK)[row], x[row] @ A.T @ turn.T @ up)


@pytest.mark.parametrize("diagonal", [False, True])
def test_mtl_lora_starts_as_a_mixture_of_up_projections_and_with_one_as_lora(diagonal: bool) -> None:
    x, A, B = data(4, 4)
    one = core_of(MTLLoRAConfig(r=4, num_experts=1, tasks=list(TASKS), diagonal=diagonal))
    assert_close(fused(x, A, B.T, one, TASK), x @ A.T @ B)  # Λ = I
    B = torch.randn(12, 5).double()
    core = core_of(MTLLoRAConfig(r=4, num_experts=3, tasks=list(TASKS), diagonal=diagonal, temperature=0.5))
    shared = core_of(MoLoRAConfig(r=4, num_experts=3, shared_down=True, score="task", num_tasks=3, task_dim=3))
    with torch.no_grad():  # the same scores: embeddings that name the task, and its weights as the router
        shared.embedding.copy_(torch.eye(3))
        shared.task_router.copy_(core.weights.T / 0.5)
    assert_close(fused(x, A, B.T, core, TASK), fused(x, A, B.T, shared, TASK))


@pytest.mark.parametrize("diagonal", [False, True])
def test_mtl_lora_merges_for_every_task_exactly(diagonal: bool) -> None:
    model = in_a_model(MTLLoRAConfig(r=4, tasks=list(TASKS), diagonal=diagonal))
    for core in cores(model):
        nn.init.normal_(core.transform)
    assert_merges_for_every_task(model)


# --- SMoRA ------------------------------------------------------------------------------------------------------------


def test_smora_is_the_papers_formula() -> None:
    core = core_of(SMoRAConfig(r=6, top_k=2, bias_rate=0.1))
    core.bias_steps.copy_(torch.tensor([3, 0, 0, -2, 0, 1]))
    x, A, B = data(6, 6)
    s = (x @ core.router.T).sigmoid() + torch.tensor([0.3, 0, 0, -0.2, 0, 0.1], dtype=torch.float64)
    top, index = s.topk(2, -1)
    g = torch.zeros_like(s).scatter(-1, index, 2 * top / top.sum(-1, keepdim=True))
    assert_close(fused(x, A, B.T, core), ((x @ A.T) * g) @ B)
    assert SMoRAConfig(r=6, top_k=2).scaling == 16 / 2


def test_smora_with_all_ranks_is_dense_and_with_equal_scores_lora() -> None:
    core = core_of(SMoRAConfig(r=4, top_k=4))
    x, A, B = data(4, 4)
    s = (x @ core.router.T).sigmoid()
    assert_close(fused(x, A, B.T, core), ((x @ A.T) * 4 * s / s.sum(-1, keepdim=True)) @ B)
    nn.init.zeros_(core.router)
    assert_close(fused(x, A, B.T, core), x @ A.T @ B)
    one = SMoRAConfig(r=1, top_k=1).core(6).double()
    assert list(one.parameters()) == []
    assert_close(fused(x, A[:1], B[:1].T, one), x @ A[:1].T @ B[:1])


def steps_of(model: nn.Module) -> list[list[int]]:
    return [core.bias_steps.tolist() for core in cores(model)]


def smora_run(
    *,
    accumulate: int = 1,
    checkpointing: bool | None = None,
    compiles: bool = False,
    fused: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Two steps of training on the same six samples, in one batch or in several."""
    config = SMoRAConfig(r=8, top_k=2, target_modules=["q_proj", "down_proj"], init_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama", dtype), config).train()
    if compiles:
        torch._dynamo.reset()
        model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").compile(backend="eager")
    if checkpointing is not None:
        model.base_model.model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=fused)
    inputs = batch("llama", rows=6)
    for _ in range(2):
        for part in range(accumulate):
            rows = {k: v[part * 6 // accumulate : (part + 1) * 6 // accumulate] for k, v in inputs.items()}
            model(**rows).logits.pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, inputs


def test_smora_moves_its_bias_once_per_step_towards_the_ranks_that_are_left_out() -> None:
    model, inputs = smora_run()
    chosen = [core.chosen.clone() for core in cores(model)]
    assert all(int(c.sum()) == 2 * 6 * 7 for c in chosen)  # k ranks for every token of the second step
    before = steps_of(model)
    assert all(any(steps) for steps in before)  # the first step has moved it
    model.eval()
    model(**inputs)
    assert steps_of(model) == before  # not in evaluation
    assert [core.chosen.tolist() for core in cores(model)] == [c.tolist() for c in chosen]
    model.train()
    model(**inputs)
    model(**inputs)  # no step of the optimizer in between
    for core, was, counts in zip(cores(model), before, chosen, strict=True):
        moved = core.bias_steps - torch.tensor(was)
        assert moved.tolist() == torch.sign(counts.double().mean() - counts).long().tolist()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of the tracer
@pytest.mark.parametrize(
    "changed",
    [{"accumulate": 3}, {"checkpointing": True}, {"checkpointing": False}, {"compiles": True}, {"fused": True}],
)
def test_smora_counts_the_same_under_checkpointing_accumulation_compilation_and_fused_steps(
    changed: dict[str, Any],
) -> None:
    (plain, _), (other, _) = smora_run(), smora_run(**changed)
    assert steps_of(other) == steps_of(plain)
    assert [core.chosen.tolist() for core in cores(other)] == [core.chosen.tolist() for core in cores(plain)]


def test_smora_without_a_bias_counts_nothing_and_compiles_whole() -> None:
    model = get_peft_model(MLP(), SMoRAConfig(r=4, top_k=2, bias_rate=0, target_modules=["lin0"])).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    torch._dynamo.reset()
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    assert not any(core.chosen.any() for core in cores(model))


def test_smora_bias_survives_half_precision_and_saving(tmp_path: Any) -> None:
    model, _ = smora_run(dtype=torch.bfloat16)
    assert all(core.bias_steps.dtype == torch.long for core in cores(model))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tiny_model("llama"), str(tmp_path))
    assert steps_of(again) == steps_of(model)
    assert any(map(any, steps_of(model)))


# --- Poly and MHR -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2], ids=["poly", "mhr"])
def test_poly_and_mhr_agree_with_pefts_given_the_same_weights(splits: int) -> None:
    skills, r, d, o = 3, 2, 8, 6
    theirs = PeftPolyLinear(
        nn.Linear(d, o, bias=False),
        "default",
        PeftPolyConfig(r=r, n_tasks=3, n_skills=skills, n_splits=splits, init_weights=False),
    ).eval()
    options = {"num_experts": skills, "num_splits": splits, "tasks": list(TASKS), "target_modules": ["0"]}
    config = PolyConfig.paper(r=r, **options)
    model = get_peft_model(nn.Sequential(nn.Linear(d, o, bias=False)), config).eval()
    (layer,) = (m for m in model.modules() if isinstance(m, DyadsLinear))
    with torch.no_grad():
        nn.init.normal_(theirs.poly_router["default"].module_logits)
        layer.base_layer.weight.copy_(theirs.base_layer.weight)
        layer.core("default").logits.copy_(theirs.poly_router["default"].module_logits)
        # Theirs are (S n d/S r) and (S n r o/S); ours have a row of A, and a column of B, per part, skill and rank.
        layer.lora_A["default"].weight.copy_(theirs.poly_lora_A["default"].transpose(-1, -2).reshape(-1, d // splits))
        layer.lora_B["default"].weight.copy_(theirs.poly_lora_B["default"].reshape(-1, o // splits).T)
    x = torch.randn(3, 4, d)
    with torch.no_grad():
        expected = theirs(x, task_ids=TASK)
        assert_close(model(x, task=TASK), expected)
        of_theirs = sum(p.numel() for n, p in theirs.named_parameters() if "poly_" in n)
        assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == of_theirs
        for row, task in enumerate(TASK.tolist()):
            merged = copy.deepcopy(model).merge_and_unload(task=task)
            assert_close(merged(x[row]), expected[row])


def test_poly_averages_before_it_multiplies() -> None:
    core = core_of(PolyConfig(r=2, num_experts=3, tasks=list(TASKS)))
    nn.init.normal_(core.logits)
    x, A, B = data(6, 6)
    shares = core.logits.sigmoid() / core.logits.sigmoid().sum(-1, keepdim=True)
    for row, task in enumerate(TASK):
        a, b = (torch.einsum("n,nrf->rf", shares[task], rows.view(3, 2, -1)) for rows in (A, B))
        assert_close(fused(x, A, B.T, core, TASK)[row], x[row] @ a.T @ b)


def test_poly_with_one_skill_is_lora() -> None:
    x, A, B = data(4, 4)
    core = core_of(PolyConfig(r=4, num_experts=1, tasks=list(TASKS)))
    assert list(core.parameters()) == []
    assert_close(fused(x, A, B.T, core, TASK), x @ A.T @ B)


def test_mhr_works_in_a_model_trains_and_merges() -> None:
    model = in_a_model(PolyConfig(r=2, num_experts=2, num_splits=2, tasks=list(TASKS)))
    assert_merges_for_every_task(model)
    model(**batch("llama"), task=list(TASKS)).logits.pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HydraLoRAConfig(num_experts=0), "hydralora: num_experts must be a whole number, 1 or more, got 0"),
        (
            lambda: MOELoRAConfig(r=4, num_experts=3, num_tasks=2),
            r"num_experts must divide r = 4, the rank of all experts together, that is be one of \[1, 2, 4\], got 3",
        ),
        (lambda: MOELoRAConfig(), "moelora: tasks are missing: give their names"),
        (lambda: MOELoRAConfig(num_tasks=2, task_dim=0), "task_dim must be a whole number, 1 or more, got 0"),
        (lambda: MTLLoRAConfig(num_tasks=2, temperature=0), "mtl_lora: temperature must be a number above 0, got 0"),
        (lambda: MTLLoRAConfig(num_tasks=2, diagonal="no"), "diagonal must be true or false, got 'no'"),
        (lambda: SMoRAConfig(r=4), "smora: top_k must be at most r = 4, got 8"),
        (lambda: SMoRAConfig(top_k=1), "top_k of 1 makes every gate 1, and the router learns nothing"),
        (lambda: SMoRAConfig(bias_rate=-1), "bias_rate must be a number, 0 or more, got -1"),
        (lambda: PolyConfig(num_tasks=2, num_splits=0), "poly: num_splits must be a whole number, 1 or more, got 0"),
        (
            lambda: PolyConfig(num_tasks=2, num_splits=4).core(6),
            "num_splits = 4 does not divide a layer's 6 input feat",
        ),
    ],
)
def test_relatives_refuse_contradictions(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_features_that_cannot_be_cut_are_refused_with_the_way_out() -> None:
    config = PolyConfig(num_tasks=2, num_splits=2, target_modules=["0"])
    with pytest.raises(
        ConfigError, match=r"a layer with 5 features cannot be cut into 2 equal blocks: .*exclude_modules"
    ):
        get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)

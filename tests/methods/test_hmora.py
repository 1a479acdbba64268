# SPDX-License-Identifier: Apache-2.0
"""HMoRA: the public code's routing and loss written out, depth, routers that modules share, and refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

import dyads
from dyads import MoLoRAConfig
from dyads.errors import ConfigError, MergeError
from dyads.export import export
from dyads.methods.hmora import HMoRA, HMoRAConfig, divergence
from dyads.methods.moelora import MOELoRAConfig
from dyads.ops import dyadic, fused
from dyads.runs.saved import SavedAdapter
from tiny import TASKS, adapted_layers, batch, tiny_model

TASK = torch.tensor([2, 0, 2])
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
GROUPS = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def core_of(**options: Any) -> Any:
    options = {"r": 2, "num_experts": 3, "task_dim": 4, "tasks": list(TASKS), **options}
    core = HMoRAConfig(**options).core(6).double().eval()
    core.reset_parameters()
    return core


def data(p: int, q: int, d: int = 6, o: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 4, d).double(), torch.randn(p, d).double(), torch.randn(q, o).double()


def in_a_model(kind: str = "llama", **options: Any) -> Any:
    options = {"r": 2, "num_experts": 3, "top_k": 2, "task_dim": 4, "lora_dropout": 0.0, **options}
    options = {"tasks": list(TASKS), "target_modules": TARGETS, "init_weights": False, **options}
    torch.manual_seed(0)
    return get_peft_model(tiny_model(kind), HMoRAConfig(**options))


# --- the public code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 2, 3])
@pytest.mark.parametrize("shared_down", [False, True])
def test_hmora_is_the_layer_of_the_public_code(shared_down: bool, top_k: int | None) -> None:
    core = core_of(shared_down=shared_down, top_k=top_k)
    core.set_depth(0.75)
    x, A, B = data(2 if shared_down else 6, 6)
    alpha = torch.sigmoid(torch.tensor(-2 + 4 * 0.75).double())
    expected = torch.zeros(3, 4, 5).double()
    for sample, task in enumerate(TASK):
        of_task = torch.softmax(core.task_router @ core.embedding[task] + core.task_router_bias, 0)
        for token in range(4):
            seen = x[sample, token]
            weights = (1 - alpha) * torch.softmax(core.router @ seen + core.router_bias, 0) + alpha * of_task
            if top_k is not None:
                values, kept = weights.topk(top_k)
                weights = torch.full_like(weights, torch.finfo(weights.dtype).min).scatter(0, kept, values).softmax(0)
            for i in range(3):
                down = A if shared_down else A[2 * i : 2 * i + 2]
                # With one A for all, columns of B are ordered rank by rank, then by expert.
                up = B[i::3] if shared_down else B[2 * i : 2 * i + 2]
                expected[sample, token] += weights[i] * (down @ seen @ up)
    for operator in (dyadic, fused):
        assert_close(operator(x, A, B.T, core, TASK), expected)
    assert HMoRAConfig(r=4, lora_alpha=16, num_tasks=2).scaling == 16 / 4**0.5


def loss_of_the_public_code(p: Tensor, certain: float, balance: float, real: Tensor) -> Tensor:
    """Gates (b t n) and a mask (b t)."""
    largest = math.log(p.shape[-1])
    p, count = p * real.unsqueeze(-1), real.sum()
    mean = p.flatten(0, 1).sum(0) / count
    of_mean = (-(mean * (mean + 1e-9).log()).sum()).clamp(max=balance * largest)
    of_each = (-(p * (p + 1e-9).log()).sum(-1)).clamp(min=certain * largest) * real
    return torch.relu((balance - certain) * largest - (of_mean - of_each.sum() / count)) / largest


@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_the_divergence_of_the_public_code_over_real_tokens_and_over_tasks(masked: bool) -> None:
    core = core_of(divergence=0.02, certainty=0.4, evenness=0.9)
    with torch.no_grad():
        core.router.mul_(4)
    x = torch.randn(3, 4, 6).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]]) if masked else None
    real = torch.ones(3, 4).double() if mask is None else mask.double()
    of_tokens = (x @ core.router.T + core.router_bias).softmax(-1)
    of_tasks = (core.embedding @ core.task_router.T + core.task_router_bias).softmax(-1).unsqueeze(0)
    expected = loss_of_the_public_code(of_tokens, 0.4, 0.9, real)
    expected = expected + loss_of_the_public_code(of_tasks, 0.4, 0.9, torch.ones(1, 3).double())
    assert_close(core.auxiliary_loss(x, TASK, mask), 0.02 * expected)
    assert core_of(divergence=0.0).auxiliary_loss(x, TASK, mask) is None


def test_divergence_is_zero_for_certain_and_even_gates_and_grows_where_one_is_missing() -> None:
    certain = torch.eye(4)
    assert divergence(certain, 0.5, 0.98) < 1e-6  # rounding
    even = torch.full((5, 4), 0.25)
    assert_close(divergence(even, 0.5, 0.98), torch.tensor(0.5))  # no gate is certain: 1 − γ_c
    assert_close(divergence(certain[:1].expand(5, 4), 0.5, 0.98), torch.tensor(0.98))  # one expert serves all: γ_b
    gates = torch.cat([certain, even])
    counts = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 0])
    assert divergence(gates, 0.5, 0.98, counts) < 1e-6
    assert divergence(gates, 0.5, 0.98) > 0.1


def test_loss_teaches_certain_gates_and_even_use() -> None:
    core = core_of(divergence=1.0, certainty=0.1, evenness=0.98).float()
    x, optimizer = torch.randn(8, 4, 6), torch.optim.Adam(core.parameters(), lr=0.05)
    losses = []
    for _ in range(80):
        loss = core.auxiliary_loss(x, torch.zeros(8, dtype=torch.long), None)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    gates = (x @ core.router.T + core.router_bias).softmax(-1).flatten(0, 1)
    assert gates.max(-1).values.mean() > 0.7
    assert gates.mean(0).min() > 0.1


# --- depth ------------------------------------------------------------------------------------------------------------


def test_the_share_of_the_task_at_its_limits_is_molora_and_moelora() -> None:
    core = core_of(top_k=None)
    x, A, B = data(6, 6)
    nn.init.zeros_(core.router_bias)
    nn.init.zeros_(core.task_router_bias)
    molora: Any = MoLoRAConfig(r=2, num_experts=3).core(6).double()
    moelora: Any = MOELoRAConfig(r=6, num_experts=3, task_dim=4, tasks=list(TASKS)).core(6).double()
    molora.router, moelora.embedding, moelora.task_router = core.router, core.embedding, core.task_router
    for share, other in ((-80.0, molora), (80.0, moelora)):
        nn.init.constant_(core.share_logit, share)
        assert_close(fused(x, A, B.T, core, TASK), fused(x, A, B.T, other, TASK))


def test_shares_start_by_depth_from_the_first_block_to_the_last() -> None:
    model = in_a_model(depth_slope=1.5, depth_offset=0.25)
    shares = {name: float(p.detach()) for name, p in model.named_parameters() if name.endswith("share_logit")}
    assert len(shares) == 2 * len(TARGETS)
    assert {v for n, v in shares.items() if ".layers.0." in n} == {-1.25}
    assert {v for n, v in shares.items() if ".layers.1." in n} == {1.75}
    of_t5 = in_a_model("t5", target_modules=["q", "wo"])
    ends = {(".block.0." in n, float(p.detach())) for n, p in of_t5.named_parameters() if n.endswith("share_logit")}
    assert ends == {(True, -2.0), (False, 2.0)}
    of_first = in_a_model("t5", target_modules=["q", "wo"], layers_to_transform=[0])
    assert {float(p.detach()) for n, p in of_first.named_parameters() if n.endswith("share_logit")} == {-2.0}
    alone = get_peft_model(nn.Sequential(nn.Linear(6, 5)), HMoRAConfig(num_tasks=2, target_modules=["0"]))
    assert adapted_layers(alone)[0].core("default").share_logit.tolist() == [0.0]  # one block is first and last


def test_a_learned_share_is_kept_when_the_adapter_is_loaded(tmp_path: Path) -> None:
    model = in_a_model().eval()
    for layer in adapted_layers(model):
        nn.init.normal_(layer.core("default").share_logit)
    model.save_pretrained(str(tmp_path))
    for low in (False, True):
        again = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path), low_cpu_mem_usage=low).eval()
        with torch.no_grad():
            ours, theirs = (m(**batch("llama"), task=list(TASKS)).logits for m in (again, model))
        assert torch.equal(ours, theirs)


# --- routers that modules share ---------------------------------------------------------------------------------------


def test_modules_of_a_group_have_one_router_that_is_counted_saved_and_trained_once(tmp_path: Path) -> None:
    model, apart = in_a_model(router_groups=GROUPS), in_a_model()
    own = sum(p.numel() for p in adapted_layers(model)[0].core("default").parameters())
    assert own == 3 * (32 + 1) + 3 * (4 + 1) + 3 * 4 + 1
    owners = [n for n, p in model.named_parameters() if n.endswith("lora_core.default.router")]
    assert [n.split(".")[-4] for n in owners] == ["q_proj", "gate_proj", "down_proj"] * 2  # the first of each group
    assert model.num_parameters(only_trainable=True) == apart.num_parameters(only_trainable=True) - 2 * 3 * own

    # With equal routers in a group, the gradient of the one is the sum of those of its modules.
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in apart.named_parameters():
            path = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
            if value.requires_grad:
                value.copy_(values[name if name in values else path])
    for m in (model, apart):
        m.eval()
        m(**batch("llama"), task=list(TASKS), labels=batch("llama")["input_ids"]).loss.backward()
    grads = {n: p.grad for n, p in apart.named_parameters() if p.grad is not None}
    for owner in owners:
        place = owner.rsplit(".", 4)
        names = next((group for group in GROUPS if place[1] in group), [place[1]])
        assert_close(values[owner].grad, sum(grads[".".join([place[0], n, *place[2:]])] for n in names))

    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)).eval()
    saved = SavedAdapter.read(tmp_path)
    assert saved.parameters == model.num_parameters(only_trainable=True)
    with torch.no_grad():
        expected = model(**batch("llama"), task=list(TASKS)).logits
        assert torch.equal(again(**batch("llama"), task=list(TASKS)).logits, expected)
        assert torch.equal(copy.deepcopy(model)(**batch("llama"), task=list(TASKS)).logits, expected)
    x, layers = torch.randn(2, 3, 32), {layer.module: layer for layer in saved.layers}
    for name, module in model.base_model.model.named_modules():
        if name.endswith("v_proj"):  # it reads the routers of its block's q_proj, also in the file
            h, core = torch.randn(2, 3, 6), layers[name].core
            assert core is not None
            ours, theirs = (c.route(h, x, torch.tensor([0, 1])) for c in (core, module.core("default")))
            assert_close(ours, theirs)


def test_a_group_has_one_loss_and_grows_with_a_task(tmp_path: Path) -> None:
    model = in_a_model(router_groups=GROUPS, divergence=0.1).train()
    seen: list[Tensor] = []
    for layer in adapted_layers(model):
        core = layer.core("default")
        layer.register_forward_pre_hook(
            lambda _, args, core=core: seen.append(core.auxiliary_loss(args[0], TASK, None))
        )
    inputs = batch("llama")
    inputs.pop("attention_mask")
    loss = model(**inputs, task=TASK, labels=inputs["input_ids"]).loss
    model.eval()
    own = model(**inputs, task=TASK, labels=inputs["input_ids"]).loss
    first = seen[: len(adapted_layers(model))]
    assert [term is not None for term in first] == [True, False, False, True, False, True] * 2
    assert_close(loss - own, torch.stack([term for term in first if term is not None]).mean())

    with torch.no_grad():
        before = model(**batch("llama"), task=list(TASKS)).logits
        assert len(dyads.add_task(model, "mnli", start="cola")) == 6  # an embedding for every group
        assert torch.equal(model(**batch("llama"), task=list(TASKS)).logits, before)
        like_cola = model(**batch("llama"), task="cola").logits
        assert torch.equal(model(**batch("llama"), task="mnli").logits, like_cola)
        shares = [n for n, p in model.named_parameters() if n.endswith("share_logit") and p.abs() == 2]
        assert len(dyads.add_task(model, "qnli", start="fresh")) == len(shares) == 6  # kept beside the new rows
        assert torch.equal(model(**batch("llama"), task=list(TASKS)).logits, before)


def test_router_groups_join_modules_of_one_block_with_one_width() -> None:
    message = r"modules of one router group have 32 and 44 input features; router_groups joins modules with the same"
    with pytest.raises(ConfigError, match=message):
        in_a_model(router_groups=[["gate_proj", "down_proj"]])
    message = "router_groups names 'q_prj', and no adapted module has that name – did you mean 'q_proj'"
    with pytest.raises(ConfigError, match=message):
        in_a_model(router_groups=[["q_prj", "k_proj"]])


# --- what it cannot do ------------------------------------------------------------------------------------------------


def test_merging_and_exporting_are_refused_also_for_a_task(tmp_path: Path) -> None:
    model = in_a_model()
    with pytest.raises(
        MergeError, match=r"cannot merge adapter 'default' \(hmora\): its gates look at the layer's inp"
    ):
        model.merge_and_unload(task="cola")
    model.save_pretrained(str(tmp_path / "hmora"))
    with pytest.raises(MergeError, match=r"\(hmora\): its gates look at the layer's input, so no ordinary LoRA equals"):
        export(SavedAdapter.read(tmp_path / "hmora"), tmp_path / "lora", task="cola")


@pytest.mark.parametrize("shared_down", [False, True])
def test_one_expert_is_lora_and_merges(shared_down: bool) -> None:
    model = in_a_model(num_experts=1, top_k=2, shared_down=shared_down, divergence=0.1, router_groups=GROUPS).train()
    assert all(not list(layer.core("default").parameters()) for layer in adapted_layers(model))
    with torch.no_grad():
        expected = model(**batch("llama")).logits
        assert_close(model.merge_and_unload()(**batch("llama")).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 1}, "hmora: top_k of 1 makes every gate 1, and the routers learn nothing, got 1"),
        ({"top_k": 9}, "hmora: top_k must be at most num_experts = 8, got 9"),
        ({"tasks": None}, "hmora: tasks are missing: give their names"),
        ({"certainty": -0.1}, "certainty must be from 0 to 1, got -0.1"),
        ({"evenness": 0.5}, "evenness must be above certainty = 0.5 and at most 1, got 0.5"),
        ({"divergence": -1}, r"divergence must not be negative \(0 leaves the loss out\), got -1"),
        ({"depth_slope": "steep"}, "depth_slope must be a number, got 'steep'"),
        ({"router_groups": ["q_proj"]}, "router_groups must be a list of lists of two names or more"),
        ({"router_groups": [["q_proj"]]}, "router_groups must be a list of lists of two names or more"),
        ({"router_groups": [["q", "k"], ["k", "v"]]}, r"router_groups must name a module once \(k is there twice\)"),
    ],
)
def test_hmora_refuses_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HMoRAConfig(**{"tasks": list(TASKS), **options})


def test_parameters_are_those_of_the_code_with_an_embedding_per_task() -> None:
    core: HMoRA = HMoRAConfig(num_experts=8, task_dim=64, num_tasks=5).core(100)
    of_code = 8 * (100 + 1) + 8 * (64 + 1) + 1  # the token router, the task router, and alpha
    assert sum(p.numel() for p in core.parameters()) == of_code + 5 * 64
    assert (core.p, core.q) == (64, 64)
    assert (HMoRAConfig(num_tasks=5, shared_down=True).core(100).p) == 8

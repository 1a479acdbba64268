# SPDX-License-Identifier: Apache-2.0
"""Identities: methods that are the same at their edges, and the papers' sums written out."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from dyads import MoDEConfig, MoLoRAConfig, MoREConfig
from dyads.methods import DyadsConfig
from dyads.ops import dyadic
from tiny import TASKS, batch, tiny_model


def run(config: DyadsConfig, x: Tensor, A: Tensor, B: Tensor, router: Tensor | None = None) -> Tensor:
    core = config.core(x.shape[-1]).double()
    core.reset_parameters()
    if router is not None:
        core.router = nn.Parameter(router)
    return dyadic(x, A, B.T, core, torch.arange(x.shape[0]) % len(TASKS))


def data(p: int, q: int, d: int = 6, o: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 4, d).double(), torch.randn(p, d).double(), torch.randn(q, o).double()


def test_one_expert_is_lora() -> None:
    x, A, B = data(4, 4)
    lora = x @ A.T @ B
    for config in (
        *(MoDEConfig(r=4, num_experts=1, group_size=p) for p in (1, 2, 4)),
        MoLoRAConfig(r=4, num_experts=1),
        MoLoRAConfig(r=4, num_experts=1, shared_down=True),
    ):
        assert_close(run(config, x, A, B), lora)


def test_mode_with_one_group_is_molora_sd() -> None:
    x, A, B = data(4, 12)
    router = torch.randn(3, 6).double()
    mode = run(MoDEConfig(r=4, num_experts=3, group_size=4), x, A, B, router)
    shared = run(MoLoRAConfig(r=4, num_experts=3, shared_down=True), x, A, B, router)
    assert_close(mode, shared)
    # And both are the paper's sum over experts, written out: B_i holds the up-vectors of expert i, rank by rank.
    gates = (x @ router.T).softmax(-1)
    by_hand = sum(gates[..., i : i + 1] * (x @ A.T @ B[i::3]) for i in range(3))
    assert_close(shared, by_hand)


def test_molora_is_the_papers_sum_over_experts() -> None:
    x, A, B = data(6, 6)
    router = torch.randn(3, 6).double()
    gates = (x @ router.T).softmax(-1)
    by_hand = sum(gates[..., i : i + 1] * (x @ A[2 * i : 2 * i + 2].T @ B[2 * i : 2 * i + 2]) for i in range(3))
    assert_close(run(MoLoRAConfig(r=2, num_experts=3), x, A, B, router), by_hand)


def test_mode_is_the_papers_double_sum_with_one_softmax_per_rank() -> None:
    x, A, B = data(2, 6)
    router = torch.randn(6, 6).double()
    by_hand = torch.zeros(3, 4, 5).double()
    for j in range(2):  # ranks
        gates = (x @ router[3 * j : 3 * j + 3].T).softmax(-1)
        for i in range(3):  # experts
            by_hand += (gates[..., i] * (x @ A[j])).unsqueeze(-1) * B[3 * j + i]
    assert_close(run(MoDEConfig(r=2, num_experts=3), x, A, B, router), by_hand)


def test_molora_with_equal_downs_is_molora_sd() -> None:
    x, A, B = data(2, 6)
    router = torch.randn(3, 6).double()
    shared = run(MoLoRAConfig(r=2, num_experts=3, shared_down=True), x, A, B, router)
    by_expert = torch.stack([B[0], B[3], B[1], B[4], B[2], B[5]])  # rank by rank → expert by expert
    assert_close(run(MoLoRAConfig(r=2, num_experts=3), x, A.repeat(3, 1), by_expert, router), shared)


def test_more_at_full_rank_is_lora_and_below_it_a_prefix() -> None:
    x, A, B = data(4, 4)
    core = MoREConfig.paper(r=4, tasks=list(TASKS), linear_scaling="none").core(6).double()
    core.reset_parameters()
    for rank in range(1, 5):
        nn.init.zeros_(core.gate_weight)
        with torch.no_grad():
            core.gate_bias.copy_(torch.eye(4)[rank - 1] * 9)
        assert core.ranks().tolist() == [rank] * 3
        out = dyadic(x, A, B.T, core, torch.tensor([0, 1, 2]))
        assert_close(out, x @ A[:rank].T @ B[:rank])


def test_mode_with_one_expert_equals_pefts_lora_in_a_model_and_in_training() -> None:
    targets = ["q_proj", "v_proj"]
    ours = get_peft_model(tiny_model("llama"), MoDEConfig(r=4, num_experts=1, lora_alpha=6, target_modules=targets))
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    with torch.no_grad():
        for name, module in ours.named_modules():
            if hasattr(module, "lora_core"):
                twin = lora.get_submodule(name)
                nn.init.normal_(module.lora_B["default"].weight)
                twin.lora_A["default"].weight.copy_(module.lora_A["default"].weight)
                twin.lora_B["default"].weight.copy_(module.lora_B["default"].weight)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, lora)]
    for step in range(3):
        inputs = batch("llama", seed=step)
        losses = [m(**inputs, labels=inputs["input_ids"]).loss for m in (ours, lora)]
        assert_close(losses[0], losses[1])
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_more_can_learn_another_rank() -> None:
    core = MoREConfig.paper(r=4, tasks=["a"]).core(6)
    core.reset_parameters()
    nn.init.zeros_(core.gate_weight)
    with torch.no_grad():
        core.gate_bias.copy_(torch.tensor([0.2, 0.0, 0.1, 0.0]))
    assert core.ranks().tolist() == [1]
    x, A, B = torch.randn(2, 3, 6), torch.randn(4, 6), torch.randn(5, 4)
    optimizer = torch.optim.SGD(core.parameters(), lr=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        dyadic(x, A, B, core, torch.tensor([0, 0])).pow(2).sum().backward()  # the smaller the update, the better
        optimizer.step()
        if core.ranks().tolist() != [1]:
            break
    assert core.ranks().tolist() != [1]

# SPDX-License-Identifier: Apache-2.0
"""Switches of MoRE against their formulas, and what the task's loss trains."""

from __future__ import annotations

import math
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from dyads.errors import ConfigError
from dyads.methods import MoDEConfig, MoREConfig
from dyads.methods.contrastive import contrastive_loss
from dyads.methods.more import EMBEDDINGS, SCALINGS, SELECTORS, MoRE
from dyads.ops import dyadic
from tiny import TASKS

LEARNED = [s for s in SELECTORS if s != "frozen_random"]


def core(d: int = 6, *, std: float | None = 1.0, **options: Any) -> MoRE:
    """One layer's core in float64, with scores far enough apart that tasks differ."""
    if options.get("embedding") == "shared":
        options = {"task_dim": 5, **options}
    made = MoREConfig.paper(**{"r": 4, "tasks": list(TASKS), "contrastive": 0.0, **options}).core(d).double()
    made.reset_parameters()
    if std is not None:
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=std)
    return made


def scores(made: MoRE) -> Tensor:
    """(T r), in the paper's words."""
    if made.selector == "frozen_random":
        return made.fixed_choice
    if made.embeds == "none":
        return made.logits
    return made.embedding @ made.gate_weight.T + made.gate_bias


@pytest.mark.parametrize(
    ("embedding", "scaling", "selector"),
    [(e, *rest) for e, rest in zip(cycle(EMBEDDINGS), product(SCALINGS, SELECTORS), strict=False)],
)
def test_gates_of_every_switch_are_those_written_out(embedding: str, scaling: str, selector: str) -> None:
    made = core(embedding=embedding, linear_scaling=scaling, selector=selector)
    gates = made.task_scores(torch.arange(3))
    for t, z in enumerate(scores(made).tolist()):
        p = torch.tensor(z).double().softmax(-1).tolist()

        def prefix(k: int) -> list[float]:
            factor = k / 3 if scaling == "update" else 1.0
            return [factor * (((i / 4) ** 2) if scaling == "ranks" else 1.0) * (i <= k) for i in range(1, 5)]

        if selector == "soft":  # the mean over prefixes
            expected = [sum(p[k - 1] * prefix(k)[i] for k in range(1, 5)) for i in range(4)]
        elif selector == "subset":
            on = [float(v > 0) for v in z]
            by = sum(on) / 3 if scaling == "update" else 1.0
            expected = [by * on[i] * (((i + 1) / 4) ** 2 if scaling == "ranks" else 1.0) for i in range(4)]
        else:
            expected = prefix(1 + max(range(4), key=z.__getitem__))
        assert_close(gates[t], torch.tensor(expected).double())


@pytest.mark.parametrize("selector", SELECTORS)
def test_scaling_of_ranks_is_i_over_r_on_rows_of_both_factors_and_never_above_one(selector: str) -> None:
    scaled, plain = core(selector=selector), core(selector=selector, linear_scaling="none")
    plain.load_state_dict(scaled.state_dict())
    x, A, B, task = (*(torch.randn(s).double() for s in ((3, 2, 6), (4, 6), (5, 4))), torch.tensor([0, 1, 2]))
    c = (torch.arange(1, 5) / 4).double().unsqueeze(-1)
    assert_close(dyadic(x, A, B, scaled, task), dyadic(x, c * A, B * c.T, plain, task))
    assert (scaled.task_scores(task) <= 1).all()


def test_scaling_of_the_update_is_k_over_the_number_of_tasks_and_can_exceed_one() -> None:
    made = core(linear_scaling="update")
    gates, ranks = made.task_scores(torch.arange(3)), made.ranks()
    assert_close(gates.amax(-1), (ranks / 3).double())
    with torch.no_grad():
        made.gate_weight.zero_()
        made.gate_bias.copy_(torch.eye(4)[3])
    assert_close(made.task_scores(torch.tensor([0])), torch.full((1, 4), 4 / 3).double())


@pytest.mark.parametrize(
    ("scaling", "selector", "embedding"),
    [(s, *rest) for s, rest in zip(cycle((*SCALINGS, SCALINGS[0])), product(LEARNED, EMBEDDINGS), strict=False)],
)
def test_the_tasks_loss_trains_what_chooses_the_ranks(embedding: str, selector: str, scaling: str) -> None:
    # In the public release of MoRE it reaches neither gate nor embeddings.
    made = core(std=None, embedding=embedding, selector=selector, linear_scaling=scaling)
    x, A, B = torch.randn(3, 4, 6).double(), torch.randn(4, 6).double(), torch.randn(5, 4).double()
    dyadic(x, A, B, made, torch.tensor([0, 2, 2])).pow(2).sum().backward()
    table = made.logits if embedding == "none" else made.embedding
    assert table.grad is not None
    assert table.grad[0].abs().max() > 0
    assert table.grad[1].abs().max() == 0  # no sample of this task was there
    assert table.grad[2].abs().max() > 0
    if embedding != "none":
        assert made.gate_weight.grad.abs().max() > 0
        assert made.gate_bias.grad.abs().max() > 0


def test_frozen_random_ranks_are_a_random_gates_and_nothing_trains_them() -> None:
    assert list(core(selector="frozen_random").parameters()) == []
    made = core(std=None, selector="frozen_random", contrastive=0.1)
    assert [n for n, _ in made.named_parameters()] == ["embedding"]  # which the contrastive loss trains
    before = made.ranks()
    assert torch.equal(made.fixed_choice.argmax(-1) + 1, before)
    dyadic(torch.randn(3, 6).double(), torch.randn(4, 6).double(), torch.randn(5, 4).double(), made, torch.arange(3))
    loss = made.auxiliary_loss(torch.randn(3, 6).double(), torch.arange(3), None)
    assert loss is not None
    loss.backward()
    assert made.embedding.grad.abs().max() > 0
    nn.init.normal_(made.embedding, std=30)
    assert torch.equal(made.ranks(), before)
    again = core(std=None, selector="frozen_random", contrastive=0.1)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.ranks(), before)
    drawn = {int(k) for _ in range(40) for k in core(std=None, selector="frozen_random").ranks()}
    assert drawn == {1, 2, 3, 4}


def test_ranks_are_readable_for_every_selector() -> None:
    for selector in ("straight_through", "frozen_random"):
        made = core(selector=selector, linear_scaling="none")
        assert torch.equal(made.ranks(), made.task_scores(torch.arange(3)).sum(-1).long())
    made = core(selector="subset")
    assert torch.equal(made.ranks(), scores(made).gt(0).sum(-1))
    made = core(selector="soft", linear_scaling="none")
    assert_close(made.ranks(), made.task_scores(torch.arange(3)).sum(-1).detach())


def test_a_subset_may_leave_out_low_ranks_and_learn_to_take_them_back() -> None:
    made = core(embedding="none", selector="subset", linear_scaling="none", tasks=["a"])
    with torch.no_grad():
        made.logits.copy_(torch.tensor([[-0.1, -1.0, 1.0, -1.0]]))
    assert made.task_scores(torch.tensor([0])).tolist() == [[0, 0, 1, 0]]
    (-made.task_scores(torch.tensor([0])).sum()).backward()  # the more ranks, the better
    assert (made.logits.grad < 0).all()


def test_embeddings_start_as_the_code_or_as_the_paper_says() -> None:
    for embedding, name in (("layer", "embedding"), ("none", "logits")):
        shape = {"r": 400, "num_tasks": 50, "tasks": None}
        normal = getattr(core(400, std=None, embedding=embedding, **shape), name)
        assert abs(float(normal.detach().std()) - 0.01) < 0.001
        kaiming = getattr(core(400, std=None, embedding=embedding, embedding_init="kaiming", **shape), name)
        assert float(kaiming.detach().abs().max()) <= math.sqrt(6 / 400)
        assert abs(float(kaiming.detach().std()) - math.sqrt(2 / 400)) < 0.005


def test_contrastive_loss_of_a_layer_is_weighted_and_compares_in_the_embeddings_dimension() -> None:
    x, task = torch.randn(3, 4, 6).double(), torch.tensor([0, 2, 1])
    made = core(contrastive=0.3, contrastive_temperature=0.2)
    assert made.projection is None
    expected = 0.3 * contrastive_loss(x.mean(1), made.embedding, task, 0.2)
    assert_close(made.auxiliary_loss(x, task, None), expected)
    made = core(contrastive=0.3, task_dim=5, contrastive_pool="last")
    assert made.projection.shape == (5, 6)
    expected = 0.3 * contrastive_loss(x[:, -1] @ made.projection.T, made.embedding, task, 0.05)
    assert_close(made.auxiliary_loss(x, task, torch.ones(3, 4)), expected)
    made = core(task_dim=5)
    assert made.projection is None
    assert not made.has_auxiliary_loss
    assert made.auxiliary_loss(x, task, None) is None


def test_one_table_serves_two_layers_of_different_width() -> None:
    first, second = core(6, embedding="shared"), core(9, embedding="shared")
    second.share_with(first)
    assert second.table() is first.embedding
    assert "embedding" not in dict(second.named_parameters())
    first.share_with(first)
    assert first.table() is first.embedding
    apart = core(9)
    apart.share_with(core(9))
    assert "embedding" in dict(apart.named_parameters())


def test_parameters_of_a_layer_are_the_papers() -> None:
    def count(**options: Any) -> int:
        made = MoREConfig.paper(**{"r": 8, "num_tasks": 8, **options}).core(768)
        return sum(p.numel() for p in made.parameters())

    assert count() == 8 * 768 + 8 * 768 + 8  # embeddings, gate, its bias
    assert count(task_dim=64) == 8 * 64 + 8 * 64 + 8 + 64 * 768
    assert count(task_dim=64, contrastive=0.0) == 8 * 64 + 8 * 64 + 8
    assert count(embedding="none") == 8 * 8
    assert count(selector="frozen_random") == 8 * 768


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"embedding": "layers"},
            r"embedding must be one of layer, shared, none – did you mean 'layer'\?, got 'layers'",
        ),
        ({"embedding_init": "zeros"}, r"embedding_init must be one of kaiming, normal.*got 'zeros'"),
        ({"linear_scaling": "rank"}, r"linear_scaling must be one of none, update, ranks – did you mean 'ranks'\?"),
        ({"selector": "softmax"}, r"selector must be one of soft, straight_through, subset, frozen_random.*'softmax'"),
        ({"contrastive": -0.1}, r"contrastive must not be negative \(0 leaves the loss out\), got -0.1"),
        ({"contrastive": "0.1"}, r"contrastive must be a number, got '0.1'"),
        ({"contrastive_temperature": 0}, r"contrastive_temperature must be above 0, got 0"),
        ({"contrastive_pool": "cls"}, r"contrastive_pool must be one of mean, first, last.*got 'cls'"),
        (
            {"embedding": "none", "contrastive": 0.1},
            r"contrastive compares samples with embeddings, and with embedding:",
        ),
        (
            {"embedding": "shared", "task_dim": None},
            r"task_dim must be set with embedding: shared, as layers differ in their input",
        ),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"more: {message}"):
        MoREConfig(num_tasks=2, **options)


def test_by_default_a_soft_gate_without_scaling_has_twice_loras_alpha() -> None:
    config = MoREConfig(r=8, num_tasks=2)
    assert (config.embedding, config.embedding_init, config.task_dim) == ("layer", "kaiming", 16)
    assert (config.selector, config.linear_scaling, config.contrastive) == ("soft", "none", 0.0)
    assert config.scaling == 2 * MoDEConfig(r=8).scaling == 4.0


def test_the_papers_form_is_a_preset_and_every_ablation_is_one_switch() -> None:
    config = MoREConfig.paper(num_tasks=2)
    assert (config.embedding, config.embedding_init, config.linear_scaling) == ("layer", "normal", "ranks")
    assert (config.lora_alpha, config.lora_dropout, config.task_dim) == (32, 0.1, None)
    assert (config.selector, config.contrastive, config.contrastive_temperature) == ("straight_through", 0.1, 0.05)
    assert config.contrastive_pool == "mean"
    for ablation in (
        {"linear_scaling": "none"},
        {"embedding": "none"},
        {"contrastive": 0.0},
        {"selector": "soft"},
        {"selector": "subset"},
        {"selector": "frozen_random"},
    ):
        MoREConfig.paper(num_tasks=2, **ablation).core(6)
    assert MoREConfig.paper(num_tasks=2, embedding="none").contrastive == 0

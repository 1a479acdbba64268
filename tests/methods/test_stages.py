# SPDX-License-Identifier: Apache-2.0
"""Stages of a gate: score, select and the losses on them, alone and at their edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from dyads import MoDEConfig, MoLoRAConfig
from dyads.errors import ConfigError, MergeError
from dyads.methods import DyadsConfig, build_config
from dyads.methods.contrastive import contrastive_loss, pool
from dyads.methods.gates import balance, score_cosine, select_one, select_sigmoid, select_softmax, select_top_k
from dyads.methods.stages import SELECTS, StagedCore
from dyads.methods.task_mode import TaskMoDEConfig
from dyads.ops import fused
from tiny import TASKS, batch, tiny_model

KINDS = pytest.mark.parametrize(
    "make",
    [
        lambda **options: MoDEConfig(r=4, num_experts=3, group_size=2, **options),
        lambda **options: MoLoRAConfig(r=4, num_experts=3, **options),
    ],
    ids=["mode", "molora"],
)


def core_of(config: DyadsConfig, d: int = 6, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    core = config.core(d).double()
    core.reset_parameters()
    for parameter in core.parameters():
        nn.init.normal_(parameter)
    return core


def gates(core: Any, x: Tensor, task: Tensor | None = None) -> Tensor:
    return core.route(x[..., :1].expand(*x.shape[:-1], core.p), x, task)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 6).double()


@KINDS
def test_top_k_of_all_experts_and_temperature_one_are_the_default(make: Any, x: Tensor) -> None:
    plain = gates(core_of(make()), x)
    for renormalise in (True, False):
        assert_close(gates(core_of(make(select="top_k", top_k=3, renormalise=renormalise)), x), plain)
    assert torch.equal(gates(core_of(make(temperature=1.0)), x), plain)


@KINDS
def test_top_k_keeps_the_largest_gates_and_renormalises_on_request(make: Any, x: Tensor) -> None:
    plain = gates(core_of(make()), x)
    smallest = plain == plain.amin(-1, keepdim=True)
    kept = plain.masked_fill(smallest, 0)
    assert_close(gates(core_of(make(select="top_k", top_k=2, renormalise=False)), x), kept)
    assert_close(gates(core_of(make(select="top_k", top_k=2)), x), kept / kept.sum(-1, keepdim=True))


@KINDS
def test_straight_through_is_one_hot_with_the_gradient_of_the_softmax(make: Any, x: Tensor) -> None:
    hard, soft = core_of(make(select="straight_through")), core_of(make())
    g, p = gates(hard, x), gates(soft, x)
    assert torch.equal(g, nn.functional.one_hot(p.argmax(-1), 3).double())
    weight = torch.randn_like(g)
    (ours,) = torch.autograd.grad((g * weight).sum(), hard.router)
    (theirs,) = torch.autograd.grad((p * weight).sum(), soft.router)
    assert_close(ours, theirs)


@KINDS
def test_uniform_gates_are_one_over_the_number_of_experts_and_train_nothing(make: Any, x: Tensor) -> None:
    core = core_of(make(score="uniform"))
    assert list(core.parameters()) == []
    assert torch.equal(gates(core, x).unique(), torch.tensor([1 / 3], dtype=torch.float64))


def test_uniform_molora_is_lora_over_the_number_of_experts(x: Tensor) -> None:
    core = core_of(MoLoRAConfig(r=2, num_experts=3, score="uniform"))
    A, B = torch.randn(6, 6).double(), torch.randn(5, 6).double()
    assert_close(fused(x, A, B, core), x @ A.T @ B.T / 3)


@KINDS
def test_random_gates_are_drawn_once_train_nothing_and_are_saved(make: Any, x: Tensor) -> None:
    core, other = core_of(make(score="random")), core_of(make(score="random"), seed=1)
    assert list(core.parameters()) == []
    assert torch.equal(gates(core, x), gates(core, torch.randn_like(x)))
    assert not torch.equal(gates(core, x), gates(other, x))
    other.load_state_dict(core.state_dict())
    assert torch.equal(gates(core, x), gates(other, x))


@KINDS
def test_temperature_divides_the_scores(make: Any, x: Tensor) -> None:
    for select in SELECTS:
        options = {"select": select, **({"top_k": 2} if select == "top_k" else {})}
        sharp, plain = core_of(make(temperature=0.5, **options)), core_of(make(**options))
        assert_close(gates(sharp, x), gates(plain, 2 * x))


@KINDS
def test_scores_of_h_read_the_inner_coefficients(make: Any) -> None:
    core = core_of(make(score="h"))
    assert core.router.shape[-1] == core.p
    h = torch.randn(3, 4, core.p).double()
    first = core.route(h, torch.randn(3, 4, 6).double(), None)
    assert torch.equal(first, core.route(h, torch.randn(3, 4, 6).double(), None))
    assert_close(first.flatten(-2) if core.gate_axes == 2 else first, _softmax(h @ core.router.T, core))


@KINDS
def test_scores_of_h_and_of_the_task_add_up(make: Any) -> None:
    core, task = core_of(make(score="h+task", tasks=list(TASKS), task_dim=5)), torch.tensor([2, 0, 2])
    h = torch.randn(3, 4, core.p).double()
    scores = h @ core.router.T + (core.embedding[task] @ core.task_router.T).unsqueeze(1)
    g = core.route(h, torch.randn(3, 4, 6).double(), task)
    assert_close(g.flatten(-2) if core.gate_axes == 2 else g, _softmax(scores, core))


@KINDS
def test_cosine_scores_forget_lengths_and_take_a_temperature(make: Any, x: Tensor) -> None:
    core = core_of(make(score="cosine", temperature=0.1))
    g = gates(core, x)
    assert_close(gates(core, 7 * x), g)
    by_hand = nn.functional.cosine_similarity(x.unsqueeze(-2), core.router, dim=-1) / 0.1
    assert_close(g.flatten(-2) if core.gate_axes == 2 else g, _softmax(by_hand, core))
    assert torch.isfinite(gates(core, torch.zeros_like(x))).all()
    learned = core_of(make(score="cosine", temperature=0.1, learn_temperature=True))
    nn.init.zeros_(learned.log_scale)  # where it starts
    assert_close(gates(learned, x), g)
    with torch.no_grad():
        learned.log_scale.fill_(-torch.tensor(2.0).log())
    assert_close(gates(learned, x), gates(core_of(make(score="cosine", temperature=0.2)), x))


def _softmax(scores: Tensor, core: StagedCore) -> Tensor:
    return scores.unflatten(-1, core.gate_shape).softmax(-1).flatten(-len(core.gate_shape))


@KINDS
def test_scores_of_the_task_are_the_same_for_all_its_tokens(make: Any, x: Tensor) -> None:
    core, task = core_of(make(score="task", tasks=list(TASKS), task_dim=5)), torch.tensor([2, 0, 2])
    assert core.embedding.shape == (3, 5)
    g = gates(core, x, task).expand(3, 4, *core.gate_shape)
    assert torch.equal(g[0], g[2])
    assert torch.equal(g, g[:, :1].expand_as(g))
    assert_close(g[1, 0].flatten(), _softmax(core.task_router @ core.embedding[0], core))


@KINDS
def test_scores_of_token_and_task_add_up(make: Any, x: Tensor) -> None:
    core, task = core_of(make(score="x+task", tasks=list(TASKS))), torch.tensor([2, 0, 2])
    scores = x @ core.router.T + (core.embedding[task] @ core.task_router.T).unsqueeze(1)
    g = gates(core, x, task)
    assert_close(g.flatten(-2) if core.gate_axes == 2 else g, _softmax(scores, core))
    with torch.no_grad():
        core.embedding.zero_()
    only_x = core_of(make())
    only_x.router = core.router
    assert_close(gates(core, x, task), gates(only_x, x))


def test_task_mode_is_mode_with_a_router_on_token_and_embedding_joined(x: Tensor) -> None:
    core, task = core_of(TaskMoDEConfig(r=4, num_experts=3, tasks=list(TASKS), task_dim=5)), torch.tensor([1, 0, 2])
    joined = core_of(MoDEConfig(r=4, num_experts=3), d=11)
    joined.router = nn.Parameter(torch.cat([core.router, core.task_router], dim=-1))
    e = core.embedding[task].unsqueeze(1).expand(3, 4, 5)
    assert_close(gates(core, x, task), gates(joined, torch.cat([x, e], dim=-1)))


def test_selects_agree_with_their_definitions() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 3.0]])
    assert_close(select_softmax(scores), scores.softmax(-1))
    assert_close(select_sigmoid(scores), 1 / (1 + torch.exp(-scores)))
    assert select_top_k(scores, 1).tolist()[0] == [0, 1, 0]
    assert (select_top_k(scores, 2) > 0).sum(-1).tolist() == [2, 2]  # of equal ones, too
    assert_close(select_top_k(scores, 2, renormalise=False).sum(-1)[1], torch.tensor(2 / 3))
    assert select_one(scores).sum(-1).tolist() == [1, 1]
    assert_close(score_cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 9.0]])), torch.tensor([[0.8]]))


# --- the balancing loss -----------------------------------------------------------------------------------------------


def test_balance_is_one_for_an_even_spread_and_n_for_a_single_expert() -> None:
    one_each = 50 * torch.eye(4)
    assert_close(balance(one_each), torch.tensor(1.0))
    assert_close(balance(one_each[:1].expand(7, 4)), torch.tensor(4.0))
    assert_close(balance(torch.stack([one_each, one_each[[0, 0, 0, 0]]], dim=1)), torch.tensor(2.5))  # mean of groups
    weight = torch.tensor([1, 0, 0, 0])
    assert_close(balance(one_each, weight=weight), torch.tensor(4.0))
    assert torch.isfinite(balance(one_each, weight=0 * weight))


@KINDS
def test_balancing_loss_sees_real_tokens_only_and_trains_the_router(make: Any, x: Tensor) -> None:
    core = core_of(make(load_balance=0.5))
    assert core.has_auxiliary_loss
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    loss = core.auxiliary_loss(x, None, mask)
    assert loss.ndim == 0
    assert_close(core.auxiliary_loss(torch.where(mask.bool().unsqueeze(-1), x, 99.0), None, mask), loss)
    assert_close(core.auxiliary_loss(x.flatten(0, 1), None, mask), loss)  # the tokens of all samples, as rows
    assert_close(core.auxiliary_loss(x[mask.bool()], None, None), loss)
    assert core.auxiliary_loss(x[:, 0], None, mask).isfinite()  # a mask of another size does not apply
    scores = (x @ core.router.T).unflatten(-1, core.gate_shape)[mask.bool()]
    assert_close(loss, 0.5 * balance(scores))
    (gradient,) = torch.autograd.grad(loss, core.router)
    assert gradient.abs().max() > 0
    off = make().core(6)
    assert not off.has_auxiliary_loss
    assert off.auxiliary_loss(x.float(), None, mask) is None


def test_balancing_loss_counts_the_kept_experts_and_sees_the_task(x: Tensor) -> None:
    options = {"r": 4, "num_experts": 3, "num_tasks": 3, "load_balance": 1.0}
    core = core_of(MoLoRAConfig(score="x+task", select="top_k", top_k=2, **options))
    task = torch.tensor([1, 0, 2])
    scores = x @ core.router.T + (core.embedding[task] @ core.task_router.T).unsqueeze(1)
    assert_close(core.auxiliary_loss(x, task, None), balance(scores.flatten(0, 1), 2))
    only_task = core_of(MoLoRAConfig(score="task", **options))
    scores = (only_task.embedding[task] @ only_task.task_router.T).repeat_interleave(4, 0)
    assert_close(only_task.auxiliary_loss(x, task, None), balance(scores))


@pytest.mark.parametrize("task_dim", [None, 5])
def test_contrastive_loss_is_mores_on_the_embeddings_of_task_mode(task_dim: int | None, x: Tensor) -> None:
    core = core_of(TaskMoDEConfig(r=4, num_experts=3, tasks=list(TASKS), task_dim=task_dim, contrastive=0.3))
    task, mask = torch.tensor([1, 0, 2]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    loss = core.auxiliary_loss(x, task, mask)
    h, _ = pool(x, task, mask)
    assert hasattr(core, "projection") == (task_dim == 5)  # samples and embeddings of one size are compared as they are
    h = h @ core.projection.T if task_dim else h
    assert_close(loss, 0.3 * contrastive_loss(h, core.embedding, task, 0.05))
    assert torch.autograd.grad(loss, core.embedding)[0].abs().max() > 0
    assert TaskMoDEConfig(num_tasks=2).contrastive == 0.0
    assert TaskMoDEConfig.paper(num_tasks=2).contrastive == 0.1
    both = core_of(TaskMoDEConfig(r=4, num_experts=3, num_tasks=3, task_dim=None, contrastive=0.3, load_balance=0.2))
    parts = [
        core_of(TaskMoDEConfig(r=4, num_experts=3, num_tasks=3, task_dim=None, contrastive=c, load_balance=b))
        for c, b in ((0.3, 0), (0, 0.2))
    ]
    assert_close(both.auxiliary_loss(x, task, mask), sum(c.auxiliary_loss(x, task, mask) for c in parts))


# --- in a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        MoDEConfig(r=4, num_experts=3, score="uniform", init_weights=False, target_modules=["q_proj"]),
        MoLoRAConfig(r=4, num_experts=3, score="random", init_weights=False, target_modules=["q_proj"]),
        MoDEConfig(r=4, num_experts=3, score="task", tasks=["a", "b"], init_weights=False, target_modules=["q_proj"]),
    ],
    ids=["uniform", "random", "task"],
)
def test_gates_that_look_at_no_token_merge_exactly(config: DyadsConfig) -> None:
    model = get_peft_model(tiny_model("llama"), config).eval()
    task = {} if config.task_names is None else {"task": "b"}
    with torch.no_grad():
        expected = model(**batch("llama"), **task).logits
        assert_close(model.merge_and_unload(**task)(**batch("llama")).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", ["h", "h+task"])
def test_gates_of_h_train_in_every_step_and_are_not_merged(score: str) -> None:
    config = TaskMoDEConfig if "task" in score else MoDEConfig
    tasks = {"tasks": list(TASKS)} if "task" in score else {}
    model = get_peft_model(
        tiny_model("llama"), config(r=4, num_experts=3, score=score, target_modules=["q_proj"], **tasks)
    )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split("lora_core.default.")[1] for n in trained if "core" in n} == (
        {"router", "embedding", "task_router"} if tasks else {"router"}
    )
    optimizer = torch.optim.Adam(trained.values(), lr=0.1)
    task = {"task": list(TASKS)} if tasks else {}
    for step in range(2):
        before = {n: p.detach().clone() for n, p in trained.items()}
        model(**batch("llama"), labels=batch("llama")["input_ids"], **task).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = {n for n, p in trained.items() if not torch.equal(p, before[n])}
        # B = 0 at first: nothing else changes the loss yet, but for MoRE's loss on the embeddings.
        assert changed >= ({n for n in trained if "lora_B" in n} if step == 0 else trained.keys())
    with pytest.raises(MergeError, match=r"cannot merge adapter 'default' .*gates look at the layer's input"):
        model.merge_and_unload(**({"task": "rte"} if tasks else {}))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"score": "token"},
            r"mode: score must be one of x, h, task, x\+task, h\+task, cosine, uniform, random.*got 'token'",
        ),
        ({"select": "softmx"}, r"select must be one of softmax, .* did you mean 'softmax'.*got 'softmx'"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"learn_temperature": True}, "learn_temperature only counts with score: cosine"),
        ({"learn_temperature": 1, "score": "cosine"}, "learn_temperature must be true or false, got 1"),
        ({"top_k": 2}, "top_k only counts with select: top_k, got 2"),
        ({"renormalise": False}, "renormalise only counts with select: top_k, got False"),
        ({"select": "top_k"}, "top_k must say how many experts select: top_k keeps, got None"),
        ({"select": "top_k", "top_k": 0}, "top_k must be a whole number, 1 or more, got 0"),
        ({"select": "top_k", "top_k": 5}, "top_k must be at most num_experts = 4, got 5"),
        (
            {"select": "top_k", "top_k": 1},
            "top_k of 1 makes every gate 1 once renormalised, and the router learns nothing: set renormalise: false",
        ),
        ({"score": "task"}, r"mode: tasks are missing: give their names .* or their number"),
        (
            {"task_dim": 8},
            r"task_dim only counts where the score reads the task: choose score: task, x\+task or h\+task",
        ),
        ({"task_dim": 0, "score": "task", "num_tasks": 2}, "task_dim must be a whole number, 1 or more, got 0"),
        ({"tasks": "rte"}, "tasks must be a list of names"),
        ({"score": "uniform", "select": "sigmoid"}, "select changes nothing with score: uniform"),
        ({"score": "uniform", "temperature": 2.0}, "temperature changes nothing with score: uniform"),
        ({"load_balance": -1}, r"load_balance must not be negative \(0 leaves the loss out\), got -1"),
        ({"contrastive": -1, "score": "task", "num_tasks": 2}, "contrastive must not be negative"),
        (
            {"contrastive": 0.1},
            "contrastive compares samples with embeddings of tasks, and score: x has none: choose score",
        ),
        ({"contrastive_temperature": 0}, "contrastive_temperature must be above 0, got 0"),
        ({"load_balance": 0.1, "score": "random"}, "load_balance needs a router that reads .*, not score: random"),
        (
            {"load_balance": 0.1, "score": "h+task", "num_tasks": 2},
            r"load_balance needs a router that reads the layer's input or the task, not score: h\+task",
        ),
        ({"load_balance": 0.1, "select": "sigmoid"}, "balances a choice, and sigmoid gates do not compete"),
    ],
)
def test_stages_refuse_what_means_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoDEConfig(r=4, num_experts=4, **options)


def test_stages_learn_the_tasks_of_a_suite_only_where_they_look_at_them() -> None:
    tasks = ("a", "b")
    assert build_config("mode", {"score": "task"}, tasks).task_names == tasks
    assert build_config("task_mode", {}, tasks).task_names == tasks
    assert build_config("molora", {"score": "x"}, tasks).tasks is None
    # Told all the same, they change nothing: so a recipe can swap the score alone.
    assert build_config("mode", {"score": "uniform", "tasks": ["a"]}).task_names is None
    assert build_config("task_mode", {"num_experts": 1}, tasks).task_names is None


def test_task_mode_without_the_task_is_refused_as_mode() -> None:
    with pytest.raises(
        ConfigError, match="task_mode: score must be x\\+task, h\\+task or task: others are method mode, got 'x'"
    ):
        TaskMoDEConfig(score="x")

# SPDX-License-Identifier: Apache-2.0
"""Do layers that see the same input, computed at once, give what each gives by itself, and never another's?"""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from dyads import MoDEConfig, use_task
from dyads.ops import plain, unshared
from dyads.tuner import DyadsLayer
from dyads.tuner import layer as of_layer
from tiny import Variant, batch, task_of, tiny_model

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "bert": ["query", "key", "value", "dense"],
}
# How many layers of one block see the same input: q, k, v; gate and up; k and v of T5's cross-attention.
TOGETHER: dict[str, set[int]] = {"llama": {3, 2}, "gpt2": set(), "t5": {3, 2}, "bert": {3}}


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers were computed at once, every time that it happened."""
    seen: list[int] = []
    inner = of_layer.fused_all

    def watched(x: Tensor, layers: Any) -> Any:
        seen.append(len(layers))
        return inner(x, layers)

    monkeypatch.setattr(of_layer, "fused_all", watched)
    return seen


def training(variant: Variant, kind: str = "llama") -> PeftModel:
    config = variant.config(target_modules=TARGETS[kind], init_weights=False, lora_dropout=0.0)
    return get_peft_model(tiny_model(kind, torch.float64), config).double().train()


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Output, and the gradients of all that is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    logits = model(**inputs).logits
    found = torch.autograd.grad(logits.square().sum(), trained, allow_unused=True)
    return [logits.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True))]


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("kind", TARGETS)
def test_models_train_alike_with_layers_computed_at_once_and_one_by_one(
    variant: Variant, kind: str, groups: list[int]
) -> None:
    model, config = training(variant, kind), variant.config()
    without_dropout(model)
    inputs = {**batch(kind), **task_of(config, "sst2", "rte", "cola")}
    torch.manual_seed(3)
    with unshared():
        alone = run(model, inputs)
    assert not groups
    for _ in range(2):
        torch.manual_seed(3)
        assert_close(run(model, inputs), alone, atol=1e-10, rtol=1e-9)
    core = next(m for m in model.modules() if isinstance(m, DyadsLayer)).core("default")
    assert set(groups) == (TOGETHER[kind] if core.splits and core.heads == 1 else set())
    with plain():
        torch.manual_seed(3)
        assert_close(run(model, inputs), alone, atol=1e-10, rtol=1e-9)


class Block(nn.Module):
    """Three layers that see x, unless they are told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 5), nn.Linear(6, 3, bias=False), nn.Linear(6, 3)
        self.between: Callable[[Tensor], Tensor] = lambda x: x
        self.passes_over = False

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        x = self.between(x)
        k = q.new_zeros(()) if self.passes_over else self.k(x)
        return torch.cat([q, (k + self.v(x)).tanh()], -1)


def block(**options: Any) -> tuple[PeftModel, Block]:
    torch.manual_seed(0)
    config = MoDEConfig(
        **{"r": 2, "num_experts": 3, "target_modules": ["q", "k", "v"], "init_weights": False, **options}
    )
    model = get_peft_model(Block(), config).double().train()
    return model, model.get_base_model()


def step(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Output, and the gradients of x and all that is trained."""
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    y = model(x * 1)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), trained, allow_unused=True)]


def inputs() -> Tensor:
    return torch.randn(2, 7, 6).double().requires_grad_()


def agree(model: nn.Module, times: int = 2) -> None:
    for _ in range(times):
        x = inputs()
        ours = step(model, x)
        with unshared():
            theirs = step(model, x)
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_close(one, other, atol=1e-11, rtol=1e-9)


def test_the_first_pass_learns_and_the_second_uses_it(groups: list[int]) -> None:
    model, _ = block()
    step(model, inputs())
    assert not groups
    agree(model)
    assert groups == [3, 3]


def test_a_pass_without_gradients_learns_and_uses_nothing(groups: list[int]) -> None:
    model, _ = block()
    x = inputs()
    with torch.no_grad():
        outputs = [model(x), model(x), model.eval()(x), model.eval()(x)]
    for output in outputs:
        assert_close(output, outputs[0], atol=0, rtol=0)
    step(model.train(), x)
    assert not groups
    step(model, x)
    assert groups == [3]


def test_a_pass_in_evaluation_learns_and_uses_nothing(groups: list[int]) -> None:
    model, _ = block()
    model.eval()
    outputs = [model(torch.ones(1, 6).double()) for _ in range(3)]
    for output in outputs:
        assert_close(output, outputs[0], atol=0, rtol=0)
    assert not groups
    step(model.train(), inputs())
    assert groups == [3]


@pytest.mark.parametrize("change", ["another tensor", "in place"])
def test_who_sees_another_input_is_no_sibling(change: str, groups: list[int]) -> None:
    model, base = block()
    agree(model, 1)
    base.between = torch.exp if change == "another tensor" else lambda x: x.mul_(2)
    for _ in range(3):
        x = inputs() * 1  # no leaf, so that it may be changed
        twin = x.detach().requires_grad_() * 1
        with unshared():
            wanted = model(twin)
        assert_close(model(x), wanted, atol=1e-12, rtol=1e-12)
    # What q computed for the others in vain it does not compute again; they share among each other.
    assert groups == [3, 2, 2, 2]


def test_a_layer_that_is_passed_over_costs_one_product_and_gets_no_gradient(groups: list[int]) -> None:
    model, base = block()
    agree(model, 2)
    base.passes_over = True
    agree(model, 3)
    assert groups == [3, 3, 2, 2]
    base.passes_over = False
    agree(model, 2)
    assert groups[-1] == 3


def test_an_output_that_is_not_used_gives_no_gradient() -> None:
    model, base = block()
    agree(model, 1)
    taken: dict[str, Tensor] = {}
    base.v.register_forward_hook(lambda module, args, output: taken.update(v=output))
    model(inputs() * 1)
    taken["v"].sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all((grad is not None) == (".v." in name) for name, grad in grads.items())


@pytest.mark.parametrize("what", ["hook", "frozen", "disabled", "merged", "another adapter"])
def test_a_layer_that_must_be_called_is_left_out(what: str, groups: list[int]) -> None:
    options = {"score": "uniform"} if what == "merged" else {}
    model, base = block(**options)
    agree(model, 2)
    seen: list[Tensor] = []
    if what == "hook":
        base.k.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    elif what == "frozen":
        base.k.base_layer.weight.requires_grad_()
    elif what == "disabled":
        base.k.enable_adapters(False)
    elif what == "merged":
        base.k.merge()
    else:
        model.add_adapter("other", MoDEConfig(r=2, target_modules=["k"], init_weights=False))
        base.k.double().set_adapter("other")
    groups.clear()
    agree(model, 2)
    assert set(groups) == {2}
    assert len(seen) == (4 if what == "hook" else 0)


def test_two_adapters_are_added_up(groups: list[int]) -> None:
    model, _ = block()
    model.add_adapter("other", MoDEConfig(r=3, target_modules=["q", "k", "v"], init_weights=False))
    model.double().base_model.set_adapter(["default", "other"])
    agree(model, 3)
    assert set(groups) == {3}
    model.delete_adapter("default")
    agree(model, 2)


def test_a_pass_that_fails_leaves_nothing_behind(groups: list[int]) -> None:
    model, base = block()
    agree(model, 2)

    def fail(x: Tensor) -> Tensor:
        raise ValueError("in between")

    base.between = fail
    x = inputs() * 1
    with pytest.raises(ValueError, match="in between"):
        model(x)
    there = weakref.ref(x)
    del x
    gc.collect()
    assert there() is None
    base.between = lambda x: x
    agree(model, 1)
    assert groups == [3, 3, 3]  # and they are siblings as before


def test_a_pass_that_succeeds_leaves_nothing_behind() -> None:
    model, _ = block()
    agree(model, 2)
    x = inputs() * 1
    there = weakref.ref(x)
    model(x)
    del x
    gc.collect()
    assert there() is None


def test_layers_are_not_kept_alive_by_their_siblings() -> None:
    model, base = block()
    agree(model, 2)
    there = [weakref.ref(layer) for layer in (base.q, base.k, base.v)]
    model.unload()
    gc.disable()
    try:
        del model, base
        assert [layer() for layer in there] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copy_learns_by_itself(how: str, groups: list[int]) -> None:
    model, base = block()
    base.between = nn.Identity()
    agree(model, 2)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    groups.clear()
    x = inputs()
    assert_close(step(other, x), step(model, x), atol=1e-11, rtol=1e-9)
    assert groups == [3]
    agree(other, 1)


def test_where_saved_tensors_are_watched_every_layer_computes_by_itself(groups: list[int]) -> None:
    model, _ = block()
    agree(model, 2)
    groups.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        agree(model, 1)
    with torch.autocast("cpu", torch.bfloat16):
        model.float()(torch.randn(2, 7, 6).requires_grad_() * 1)
    assert not groups


def test_inputs_that_come_from_no_operation_leave_layers_their_own_graphs(groups: list[int]) -> None:
    model, base = block()
    taken: dict[str, Tensor] = {}
    for name in ("q", "v"):
        layer = getattr(base, name)
        layer.register_forward_hook(lambda module, args, output, name=name: taken.update({name: output}))
    for x in (inputs(), inputs().detach(), inputs()):
        model(x)
        for output in taken.values():
            output.sum().backward()  # one after the other, without retain_graph
    assert not groups


@pytest.mark.parametrize(
    "what", ["called alone", "hooked", "no gradients", "autocast", "saved elsewhere", "another task"]
)
def test_what_was_computed_for_a_layer_serves_only_where_it_would_have_been_computed_so(
    what: str, groups: list[int]
) -> None:
    model, base = block()
    agree(model, 2)
    k, x = base.k, inputs() * 1
    contexts: dict[str, Any] = {
        "no gradients": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "saved elsewhere": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        "another task": lambda: use_task(model, "other"),
    }
    with unshared():
        alone = k(x)
    groups.clear()
    if what == "called alone":
        assert_close(base.q(x).shape, (2, 7, 5))
        with torch.no_grad():
            k.dyads_B["default"].mul_(2)
        with unshared():
            alone = k(x)
        assert_close(k(x), alone, atol=0, rtol=0)
        assert not groups
        return
    if what == "hooked":

        def doubles(module: DyadsLayer, args: Any) -> None:
            module.dyads_B["default"].data.mul_(2)

        k.register_forward_pre_hook(doubles)
        model(x)
        assert groups == [2]
        return
    seen: list[Tensor] = []
    inner, base.k = k, nn.Identity()

    class Within(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with contexts[what]():
                seen.append(inner(x))
            return seen[-1].to(x.dtype)

    base.k = Within()
    model(x)
    assert groups == [3]
    with contexts[what](), unshared():
        alone = inner(x)
    assert (seen[0].dtype, seen[0].requires_grad) == (alone.dtype, alone.requires_grad)
    assert_close(seen[0], alone, atol=0, rtol=0)


def nodes(tensor: Tensor) -> Iterator[Any]:
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def kept(model: nn.Module, x: Tensor, task: dict[str, Any]) -> int:
    """Bytes that the operators keep for backward beside their input and the weights."""
    own = {p.untyped_storage().data_ptr() for p in [x, *model.parameters()]}
    y = model(x, **task)
    saved = [t for node in nodes(y) if "Fused" in node.name() for t in node.saved_tensors if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize(
    "variant_", [Variant("mode"), Variant("more"), Variant("mode", (("select", "top_k"), ("top_k", 2)))]
)
def test_nothing_more_is_kept_for_backward(variant_: Variant) -> None:
    torch.manual_seed(0)
    config = variant_.config(target_modules=["q", "k", "v"], init_weights=False, lora_dropout=0.0)
    model = get_peft_model(Block(), config).train()
    x, task = torch.randn(2, 700, 6).requires_grad_() * 1, task_of(config, "sst2", "rte")
    model(x, **task)
    shared = kept(model, x, task)
    with unshared():
        assert kept(model, x, task) == shared > 0


def test_a_step_in_half_precision_agrees_too(groups: list[int]) -> None:
    results = []
    for alone in (False, True):
        torch.manual_seed(0)
        config = MoDEConfig(r=4, num_experts=3, target_modules=TARGETS["llama"], init_weights=False)
        model = get_peft_model(tiny_model("llama", torch.bfloat16), config).train()
        with unshared() if alone else nullcontext():
            run(model, batch("llama"))
            results.append(run(model, batch("llama")))
    assert set(groups) == {2, 3}
    for one, other in zip(*results, strict=True):
        assert_close(one, other, atol=0.1 * float(other.abs().max()), rtol=0)

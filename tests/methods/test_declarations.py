# SPDX-License-Identifier: Apache-2.0
"""Cores written outside of the library: what they declare is used, and refused where it does not hold."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from torch.testing import assert_close

from dyads import MoDEConfig
from dyads.errors import ConfigError
from dyads.methods import Core, DyadsConfig, method, method_names, methods
from dyads.methods.declarations import check_declarations
from dyads.methods.mode import MoDE
from dyads.ops import CachedOperator, dyadic, fused
from dyads.ops import operator as of_operator
from dyads.tuner import register_methods
from tiny import TARGETS, TASKS, Variant, adapted_layers, batch, task_of, tiny_model

Q = ["q_proj", "v_proj"]


class Undeclared(Core):
    """Gates of a token for r ranks, with a learned temperature that `select` reads."""

    looks_at = frozenset({"x"})

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.p = self.q = r
        self.router = nn.Parameter(torch.empty(r, d))
        self.temperature = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.router)
        nn.init.ones_(self.temperature)

    def router_weight(self) -> Tensor | None:
        return self.router

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        assert scores is not None
        return (scores / self.temperature.to(scores.dtype)).softmax(-1)

    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return h * g


class Declared(Undeclared):
    """Scores that are linear: R is the router over the temperature."""

    linear_scores = True

    def router_weight(self) -> Tensor | None:
        return self.router / self.temperature

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        assert scores is not None
        return scores.softmax(-1)


class ClosedForm(Declared):
    """And the derivative of its gates."""

    closed_form = True

    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        dg = h * du
        return g * du, g * (dg - (g * dg).sum(-1, keepdim=True))


class ReadsInSelect(Undeclared):
    linear_scores = True


class ReadsInMix(Declared):
    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return h * g * self.temperature.to(h.dtype)


class OwnRoute(Declared):
    def route(self, h: Tensor, x: Tensor, task: Tensor | None) -> Tensor:
        return (x @ self.router.to(x.dtype).t()).sigmoid()


class OwnScore(Declared):
    def score(self, h: Tensor, x: Tensor) -> Tensor | None:
        return (x / x.norm(dim=-1, keepdim=True)) @ self.router.to(x.dtype).t()


class BiasFromZero(Declared):
    """A bias that is added to the scores, zero at the start."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__(d, r)
        self.bias = nn.Parameter(torch.zeros(r))

    def score(self, h: Tensor, x: Tensor) -> Tensor | None:
        scores = super().score(h, x)
        assert scores is not None
        return scores + self.bias.to(x.dtype)


class OtherColumns(Declared):
    def mix_columns(self, z: Tensor) -> Tensor | None:
        return z[: self.p] * z[self.p :].sigmoid()


class LooksAway(Undeclared):
    """Reads the token and declares nothing, by which it would be merged."""

    looks_at = frozenset()


class LooksAtH(Undeclared):
    """Reads A x beside the token."""

    def route(self, h: Tensor, x: Tensor, task: Tensor | None) -> Tensor:
        return super().route(h, x, task) * h.sigmoid()


class ReadsInTraining(Declared):
    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return h * g * self.temperature.to(h.dtype) if self.training else h * g


class OwnRouteOfTokens(Declared):
    def route(self, h: Tensor, x: Tensor, task: Tensor | None) -> Tensor:
        return super().route(h, x, task) * (2 if x.ndim > 2 else 1)


class WrongGradient(ClosedForm):
    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        dh, ds = super().gradients(h, g, du)
        return dh, -ds


class SharpMoDE(MoDE):
    """Inherits the derivative of other gates."""

    def select(self, h: Tensor, scores: Tensor | None, task_scores: Tensor | None) -> Tensor:
        assert scores is not None
        return super().select(h, 2 * scores, task_scores)


class DoubledMoDE(MoDE):
    def mix(self, h: Tensor, g: Tensor) -> Tensor:
        return 2 * super().mix(h, g)


class DoubledMoDEWithGradients(DoubledMoDE):
    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        return super().gradients(h, g, 2 * du)


class DoubledMoDEByAutograd(DoubledMoDE):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.closed_form = False


Adapt = Callable[[Callable[[int], Core]], PeftModel]


@pytest.fixture
def adapt(monkeypatch: pytest.MonkeyPatch) -> Adapt:
    """A tiny model with an adapter of a method 'toy' that has the given core, and is registered for this test only."""
    registry: Any = sys.modules[method.__module__]
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        monkeypatch.setitem(mapping, "DYADS_TOY", None)

    def make(core: Callable[[int], Core]) -> PeftModel:
        @registry.register("toy", "a method written outside")
        @dataclass
        class ToyConfig(DyadsConfig):
            def core(self, d: int) -> Core:
                return core(d)

        register_methods()
        return get_peft_model(tiny_model("llama"), ToyConfig(target_modules=Q, init_weights=False))

    return make


def mode_of(kind: type[MoDE]) -> Callable[[int], Core]:
    return lambda d: kind(d, 4, 3, 1)


RIGHT: dict[str, Callable[[int], Core]] = {
    "undeclared": lambda d: Undeclared(d, 4),
    "declared": lambda d: Declared(d, 4),
    "closed form": lambda d: ClosedForm(d, 4),
    "mode with its own gradients": mode_of(DoubledMoDEWithGradients),
    "mode by autograd": mode_of(DoubledMoDEByAutograd),
}

READS = "declares linear_scores, but its select or mix reads a parameter, which would get no gradient"
DIFFERS = r"declares linear_scores, but its route differs from select\(h, R x, task_scores\(task\)\)"
DERIVES = "declares closed_form, but its gradients are not the derivative of its select and mix"
FUSED = {
    "comol", "hmora", "hydralora", "mode", "moelora", "molora", "more", "mtl_lora", "poly", "smora", "task_mode",
}  # fmt: skip
"""Methods that declare linear scores; one that is added may leave it."""
WRONG: dict[str, tuple[Callable[[int], Core], str]] = {
    "parameter in select": (lambda d: ReadsInSelect(d, 4), f"ReadsInSelect {READS}"),
    "parameter in mix": (lambda d: ReadsInMix(d, 4), f"ReadsInMix {READS}"),
    "own route": (lambda d: OwnRoute(d, 4), f"OwnRoute {DIFFERS}"),
    "own score": (lambda d: OwnScore(d, 4), f"OwnScore {DIFFERS}"),
    "zero bias": (lambda d: BiasFromZero(d, 4), f"BiasFromZero {DIFFERS}"),
    "other columns": (lambda d: OtherColumns(d, 4), "OtherColumns has a mix_columns that differs from its mix"),
    "looks away": (lambda d: LooksAway(d, 4), r"LooksAway declares looks_at = \[\], but its gates change with x"),
    "looks at h": (lambda d: LooksAtH(d, 4), r"LooksAtH declares looks_at = \['x'\], but its gates change with h"),
    "in training": (lambda d: ReadsInTraining(d, 4), f"ReadsInTraining {READS}"),
    "of several tokens": (lambda d: OwnRouteOfTokens(d, 4), f"OwnRouteOfTokens {DIFFERS}"),
    "wrong gradient": (lambda d: WrongGradient(d, 4), f"WrongGradient {DERIVES}"),
    "select of mode": (mode_of(SharpMoDE), f"SharpMoDE {DERIVES}"),
    "mix of mode": (mode_of(DoubledMoDE), f"DoubledMoDE {DERIVES}"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_every_parameter_of_a_core_is_trained(name: str, adapt: Adapt) -> None:
    core = RIGHT[name](6).double()
    core.reset_parameters()
    x, A, B = (torch.randn(*s).double() for s in ((2, 3, 6), (core.p, 6), (5, core.q)))
    leaves = [t.requires_grad_() for t in (x, A, B, *core.parameters())]
    grads = []
    for operator in (fused, dyadic):
        y = operator(x, A, B, core, scale=0.7)
        assert ("_Fused" in type(y.grad_fn).__name__) == (operator is fused and name != "undeclared")
        grads.append(torch.autograd.grad(y.square().sum(), leaves))
    assert_close(*grads)
    with torch.no_grad():
        assert_close(CachedOperator(A, B, core, 0.7)(x), dyadic(x, A, B, core, scale=0.7))

    model = adapt(RIGHT[name])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum("lora_core.default" in n for n in trained) == 4 * len(list(core.parameters()))
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model(**batch("llama"), labels=batch("llama")["input_ids"]).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in trained.items())


@pytest.mark.parametrize("name", WRONG)
def test_wrong_declarations_are_refused(name: str, adapt: Adapt) -> None:
    core, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        adapt(core)
    if "reads a parameter" in message:  # which shows without values, as PEFT loads with low_cpu_mem_usage
        with torch.device("meta"), pytest.raises(ConfigError, match=message):
            check_declarations(core(6), 6, 0)
    for d in (64, 4096):  # also where scores of a wide layer would saturate the gates, and for a frozen adapter
        with pytest.raises(ConfigError, match=message):
            check_declarations(core(d).requires_grad_(False), d, 0)


def test_a_method_from_outside_is_known_while_it_is_registered(adapt: Adapt) -> None:
    assert "toy" not in method_names()
    model = adapt(RIGHT["undeclared"])
    assert method_names()[-1] == "toy"
    assert model.peft_config["default"].peft_type == "DYADS_TOY"


def test_a_check_leaves_the_core_and_the_random_numbers_as_they_were() -> None:
    core = Variant("smora").config().core(6).train()
    core.reset_parameters()
    before, state = {n: t.clone() for n, t in core.state_dict().items()}, torch.random.get_rng_state()
    check_declarations(core, 6, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert core.training
    assert all(torch.equal(t, before[n]) for n, t in core.state_dict().items())


@pytest.mark.parametrize("variant", [*(Variant(m.key) for m in methods()), Variant("mode", (("score", "h"),)),
                                     Variant("mode", (("score", "cosine"),))], ids=lambda v: v.id)  # fmt: skip
def test_layers_use_the_fused_operator_wherever_scores_are_linear(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = variant.config(target_modules=TARGETS["llama"], init_weights=False)
    model, calls = get_peft_model(tiny_model("llama"), config), []
    apply = of_operator._Fused.apply
    monkeypatch.setattr(of_operator._Fused, "apply", lambda *args: calls.append(len(args)) or apply(*args))
    model(**batch("llama"), **task_of(config, *TASKS))
    layers = adapted_layers(model)
    assert len(calls) == (len(layers) if layers[0].core("default").linear_scores else 0)
    assert calls or "cosine" in variant.id or variant.key not in FUSED


@pytest.mark.parametrize("key", ["mode", "molora"])
def test_a_core_of_the_library_is_its_papers_closed_form_only_for_softmax_of_a_router(key: str) -> None:
    for score in ("x", "h", "x+task", "h+task", "task", "uniform", "random", "cosine"):
        for select in ("softmax", "sigmoid", "straight_through"):
            if score == "uniform" and select != "softmax":
                continue
            core = Variant(key, (("score", score), ("select", select), ("num_experts", 3))).config().core(6)
            assert core.closed_form == (select == "softmax" and score in ("x", "h", "x+task", "h+task"))
            assert core.linear_scores == (score != "cosine")
            assert core.router_input == ("h" if "h" in score.split("+") else "x")
    assert MoDEConfig(r=2, num_experts=1).core(6).closed_form is False


def test_a_core_without_parameters_is_verified_whatever_the_default_device() -> None:
    core = Variant("mode", (("num_experts", 1),)).config().core(6)
    assert not list(core.parameters())
    with torch.device("meta"):
        check_declarations(core, 6, 0)

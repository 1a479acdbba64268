# SPDX-License-Identifier: Apache-2.0
"""Correctness gate: outputs and gradients of every measured method of dyads, compared before anything is measured.

The reference is the double sum over rank-one terms (`dyadic_sum`) in float64. Compared with it are the operators, over
shapes with ones and primes; one adapted layer at the setting's own width and dtype; and a whole small model, also
without gradients and in `generate`. MoDE with one expert is compared with PEFT's LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import dyads.tuner  # noqa: F401  # PEFT has to know the methods
from benchmarks.contenders import TASKS, Contender
from dyads.methods import Core, build_config, methods
from dyads.ops import dyadic, dyadic_sum, fused
from dyads.tuner.layer import DyadsLinear

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest difference, as a share of the largest entry: bf16 keeps 8 bits, and a gradient passes several roundings."""

OPERATORS: dict[str, Callable[..., Tensor]] = {"dyadic": dyadic, "fused": fused}
"""Operators of one signature: the plain one, and the one that layers call."""

SHAPES = [(1, 1, 3, 2), (2, 7, 12, 5), (3, 2, 1, 1)]


class GateError(Exception):
    """A result differs from its reference."""


def check(contenders: dict[str, Contender], *, dtype: str, width: int, say: Callable[[str], None]) -> None:
    """GateError at the first difference. `contenders` have their resolved sizes; those of PEFT are skipped."""
    family = {method.key for method in methods()}
    ours = {name: c for name, c in contenders.items() if c.builder in family}
    seen: set[str] = set()
    for name, contender in ours.items():
        options = dict(contender.options)
        merged, in_fp32 = options.pop("merged", False), options.pop("autocast_adapter_dtype", True)
        here = getattr(torch, dtype), width
        if merged:
            _merged(f"{name}, merged", contender.builder, options, *here)
        for tokens in (1, 80):  # the operator may choose its path by the size of a product
            _layer(f"{name}, one layer", contender.builder, options, *here, tokens, in_fp32)
        if (key := f"{contender.builder} {sorted(options.items())}") in seen:
            continue
        seen.add(key)
        for shape in SHAPES:
            _operator(name, contender.builder, options, *shape)
        _model(f"{name}, whole model", contender.builder, options)
        say(f"{name}: operator, layer and model agree with the double sum, outputs and gradients")
    _one_expert_is_lora()
    say("MoDE with one expert agrees with PEFT's LoRA")


def _agree(what: str, ours: Iterable[Tensor], wanted: Iterable[Tensor | None], dtype: torch.dtype) -> None:
    """Compare tensor by tensor: a difference may be a share of the tensor's largest entry, or of a hundredth of the
    largest entry of all, as a gradient that is small because large numbers cancel has their rounding."""
    pairs = [
        (mine.detach().double(), (torch.zeros_like(mine) if theirs is None else theirs.detach()).double())
        for mine, theirs in zip(ours, wanted, strict=True)
    ]
    least = max(float(theirs.abs().max()) for _, theirs in pairs) / 100
    for number, (mine, reference) in enumerate(pairs):
        difference = (mine - reference).abs().max()
        scale = reference.abs().max().clamp_min(max(least, 1e-6))
        if not difference <= TOLERANCE[dtype] * scale:  # also true for NaN
            part = "the output" if number == 0 else f"gradient {number}"
            raise GateError(f"{what}: {part} differs by {difference / scale:.1e} of its size, in {dtype}")


def _random(core: nn.Module) -> None:
    for parameter in core.parameters():
        nn.init.normal_(parameter, std=0.5)


def _operator(name: str, method: str, options: dict[str, Any], b: int, t: int, d: int, o: int) -> None:
    torch.manual_seed(3)
    core: Core = build_config(method, options).core(d).double()
    _random(core)
    task = torch.arange(b) % TASKS
    x, A, B = (torch.randn(*s).double().requires_grad_() for s in ((b, t, d), (core.p, d), (o, core.q)))
    leaves = [x, A, B, *core.parameters()]
    slow = dyadic_sum(x, A, B, core.matrix(core.route(x @ A.T, x, task)), scale=0.7)
    weight = torch.randn_like(slow)
    wanted = [slow, *_gradients(slow, weight, leaves)]
    for dtype in (torch.float64, torch.float32):
        core = core.to(dtype)
        x, A, B = (t.detach().to(dtype).requires_grad_() for t in (x, A, B))
        leaves = [x, A, B, *core.parameters()]
        for called, operator in OPERATORS.items():
            what = f"{name}, {called} of shape {(b, t, d, o)}"
            fast = operator(x, A, B, core, task, scale=0.7)
            _agree(what, [fast, *_gradients(fast, weight, leaves)], wanted, dtype)
            with torch.no_grad():
                _agree(f"{what} without gradients", [operator(x, A, B, core, task, scale=0.7)], [slow], dtype)


def _gradients(output: Tensor, weight: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    loss = (output * weight.to(output.dtype)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def _weights(layer: DyadsLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """A (p d) and B (o q) of a layer."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[return-value]


def _core(layer: DyadsLinear) -> Core:
    return layer.core("default")


class _ByTheSum(nn.Module):
    """Reference of an adapted layer: the base layer plus the double sum, in float64."""

    def __init__(self, layer: DyadsLinear) -> None:
        super().__init__()
        self.base = copy.deepcopy(layer.get_base_layer()).double()
        self.A, self.B = (nn.Parameter(weight.detach().double()) for weight in _weights(layer))
        self.core: Any = copy.deepcopy(_core(layer)).double()
        self.scale = layer.scaling["default"]
        self.task: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        g = self.core.route(x @ self.A.T, x, self.task)
        out: Tensor = self.base(x) + dyadic_sum(x, self.A, self.B, self.core.matrix(g), scale=self.scale)
        return out

    def leaves(self) -> list[Tensor]:
        return [self.A, self.B, *self.core.parameters()]


def _leaves(layer: DyadsLinear) -> list[Tensor]:
    return [*_weights(layer), *_core(layer).parameters()]


class _One(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin(x)
        return out


def _start(layers: Iterable[DyadsLinear]) -> None:
    """Draw all parameters at random: at their usual start, B = 0 and even gates would hide differences."""
    for layer in layers:
        A, B = _weights(layer)
        nn.init.normal_(A, std=A.shape[-1] ** -0.5)
        nn.init.normal_(B, std=B.shape[1] ** -0.5)
        for parameter in _core(layer).parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def _one(
    method: str, options: dict[str, Any], dtype: torch.dtype, width: int, in_fp32: bool = True
) -> tuple[Any, DyadsLinear, _ByTheSum]:
    """A model of one layer, that layer, and its reference."""
    torch.manual_seed(4)
    config = build_config(method, {**options, "target_modules": ["lin"]})
    model = get_peft_model(_One(width).to(dtype), config, autocast_adapter_dtype=in_fp32)
    layer = next(m for m in model.modules() if isinstance(m, DyadsLinear))
    _start([layer])
    return model, layer, _ByTheSum(layer)


def _merged(what: str, method: str, options: dict[str, Any], dtype: torch.dtype, width: int) -> None:
    """Compare the layer that remains after a task's update was merged into its weights."""
    model, _, slow = _one(method, options, dtype, width)
    x = torch.randn(2, 5, width).to(dtype)
    slow.task = torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        _agree(what, [model.merge_and_unload(task=0)(x)], [slow(x.double())], dtype)


def _layer(
    what: str, method: str, options: dict[str, Any], dtype: torch.dtype, width: int, tokens: int, in_fp32: bool
) -> None:
    """Compare one layer as it is measured: base in the setting's dtype, adapter in fp32 or the same."""
    model, layer, slow = _one(method, options, dtype, width, in_fp32)
    x = torch.randn(2, tokens, width).to(dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    task = torch.tensor([0, TASKS - 1])
    slow.task = task
    y = model(x, task=task)
    y64 = slow(x64)
    weight = torch.randn(y.shape)
    mine = _gradients(y, weight, [x, *_leaves(layer)])
    _agree(what, [y, *mine], [y64, *_gradients(y64, weight.double(), [x64, *slow.leaves()])], dtype)
    with torch.no_grad():
        _agree(f"{what} without gradients", [model(x, task=task)], [y64], dtype)
        with layer.routing.unchanged_weights():  # as in generate
            for _ in range(2):
                _agree(f"{what} with unchanged weights", [model(x, task=task)], [y64], dtype)


def _tiny_llama() -> nn.Module:
    torch.manual_seed(5)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(vocab_size=31, num_key_value_heads=1, max_position_embeddings=32, **sizes)
    )
    return model


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _model(what: str, method: str, options: dict[str, Any]) -> None:
    """Compare logits, gradients and generated tokens of a whole model."""
    model = get_peft_model(_tiny_llama(), build_config(method, {**options, "target_modules": TARGETS})).double()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, DyadsLinear)}
    _start(layers.values())
    plain: Any = _tiny_llama().double().requires_grad_(False)
    written = {name: _ByTheSum(layer) for name, layer in layers.items()}
    task = torch.tensor([1, 3, 0])
    for name, by_the_sum in written.items():
        by_the_sum.task = task
        plain.set_submodule(name.removeprefix("base_model.model."), by_the_sum)
    ids = torch.randint(3, 31, (3, 4), generator=torch.Generator().manual_seed(6))
    slow = plain(input_ids=ids).logits
    weight = torch.randn(slow.shape).double()
    theirs = _gradients(slow, weight, [leaf for layer in written.values() for leaf in layer.leaves()])
    fast = model(input_ids=ids, task=task).logits
    mine = _gradients(fast, weight, [leaf for layer in layers.values() for leaf in _leaves(layer)])
    _agree(what, [fast, *mine], [slow, *theirs], torch.float64)
    with torch.no_grad():
        _agree(f"{what} without gradients", [model(input_ids=ids, task=task).logits], [slow], torch.float64)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    if not torch.equal(model.generate(input_ids=ids, task=task, **options), plain.generate(ids, **options)):
        raise GateError(f"{what}: other tokens are generated")


def _one_expert_is_lora() -> None:
    same = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS}
    ours = get_peft_model(_tiny_llama(), build_config("mode", {**same, "num_experts": 1}))
    lora = get_peft_model(_tiny_llama(), LoraConfig(**same))
    ours, lora = ours.double(), lora.double()
    mine: list[Tensor] = []
    theirs: list[Tensor] = []
    for name, layer in ours.named_modules():
        if isinstance(layer, DyadsLinear):
            _start([layer])
            twin = lora.get_submodule(name)
            A, B = twin.lora_A["default"].weight, twin.lora_B["default"].weight
            ours_A, ours_B = _weights(layer)
            with torch.no_grad():
                A.copy_(ours_A)
                B.copy_(ours_B)
            mine += [ours_A, ours_B]
            theirs += [A, B]
    ids = torch.randint(3, 31, (3, 4), generator=torch.Generator().manual_seed(6))
    fast, slow = ours(input_ids=ids).logits, lora(input_ids=ids).logits
    weight = torch.randn(fast.shape).double()
    wanted = _gradients(slow, weight, theirs)
    what = "MoDE with one expert against PEFT's LoRA"
    _agree(what, [fast, *_gradients(fast, weight, mine)], [slow, *wanted], torch.float64)

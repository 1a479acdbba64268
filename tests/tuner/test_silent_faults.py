# SPDX-License-Identifier: Apache-2.0
"""Trainings and merges that would go wrong without an error: each is refused, or the user is warned once."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import dyads
from dyads import MoDEConfig, MoREConfig, use_task
from dyads.errors import ConfigError, MergeError, RoutingError
from dyads.tuner.base_layer import is_plain
from tiny import TARGETS, TASKS, Variant, adapted_layers, batch, task_of, tiny_model

LOSSY = [Variant("more", (("contrastive", 0.1),)), Variant("mode", (("load_balance", 0.1),))]
lossy_variants = pytest.mark.parametrize("lossy", LOSSY, ids=lambda v: v.id)


def training(variant: Variant, **options: Any) -> PeftModel:
    options = {"target_modules": TARGETS["llama"], "init_weights": False, **options}
    return get_peft_model(tiny_model("llama"), variant.config(**options)).train()


def own_loss(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())


# --- auxiliary losses that trainers drop ------------------------------------------------------------------------------


@lossy_variants
@pytest.mark.parametrize("with_labels", [False, True], ids=["logits", "labels and logits"])
def test_a_loss_from_logits_that_drops_the_auxiliary_loss_warns_once(lossy: Variant, with_labels: bool) -> None:
    model, inputs = training(lossy), batch("llama")
    given = {**inputs, **task_of(lossy.config(), *TASKS), **({"labels": inputs["input_ids"]} if with_labels else {})}
    with pytest.warns(UserWarning, match=r"auxiliary loss .* does not contain it.*dyads.auxiliary_loss\(model\)"):
        own_loss(model(**given).logits, inputs).backward()
    own_loss(model(**given).logits, inputs).backward()  # warnings are errors in these tests


@lossy_variants
@pytest.mark.parametrize("how", ["the model's", "one's own", "in two parts", "checkpointed", "evaluated"])
def test_a_loss_with_the_auxiliary_loss_warns_nobody(lossy: Variant, how: str) -> None:
    model, inputs = training(lossy), batch("llama")
    given = {**inputs, **task_of(lossy.config(), *TASKS)}
    if how == "checkpointed":
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    if how in ("the model's", "checkpointed"):
        model(**given, labels=inputs["input_ids"]).loss.backward()
    elif how == "evaluated":
        own_loss(model.eval()(**given).logits, inputs).backward()
    else:
        own = own_loss(model(**given).logits, inputs)
        if how == "in two parts":
            first = dyads.auxiliary_loss(model)
            own = own + own_loss(model(**given).logits, inputs) + first
        (own + dyads.auxiliary_loss(model)).backward()


# --- adapters without a gradient --------------------------------------------------------------------------------------


class _TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.uncalled = (nn.Linear(6, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.used(x)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_called_adapter_without_a_gradient_is_reported_once(unlike: Variant, checkpointing: bool) -> None:
    config = unlike.config(target_modules=["used", "unused", "uncalled"])
    model = get_peft_model(_TwoBranches(), config)
    x = torch.randn(3, 6, requires_grad=True)

    def loss() -> Tensor:
        return checkpoint(model, x, use_reentrant=False).sum() if checkpointing else model(x).sum()

    with use_task(model, "rte") if config.task_names else nullcontext():
        with pytest.warns(UserWarning, match=r"got no gradient, so they do not train: unused\. .*exclude_modules"):
            loss().backward()
        loss().backward()
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_pass_without_backward_leaves_no_hooks_behind(unlike: Variant) -> None:
    model, inputs = training(unlike), {**batch("llama"), **task_of(unlike.config(), *TASKS)}
    for _ in range(3):
        out = model(**inputs).logits
    counted = [len(p._backward_hooks or ()) for p in model.parameters()]
    assert max(counted) <= 1
    torch.autograd.grad(out.sum(), [adapted_layers(model)[0].lora_A["default"].weight])  # of one parameter: no verdict
    model(**inputs).logits.sum().backward()
    assert not any(p._backward_hooks for p in model.parameters())
    assert model.base_model.routing.checked


class _Blocks(nn.Module):
    """Blocks with a layer whose output is unused, and one that another module reads the weight of."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_TwoBranches() for _ in range(2))
        self.read = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [block(x) for block in self.blocks]
        return F.linear(torch.stack(outputs).sum(0), self.read.weight)


@pytest.mark.parametrize("part", ["whole", "blocks", "one of two blocks"])
def test_adapters_without_a_gradient_in_compiled_code_are_reported_once(part: str) -> None:
    torch._dynamo.reset()
    model = get_peft_model(_Blocks(), MoDEConfig(r=2, target_modules=["used", "unused"])).train()
    if part == "whole":
        model = get_peft_model(_Blocks(), MoDEConfig(r=2, target_modules=["used", "unused", "read"])).train()
    call: Any = model
    options = {"backend": "aot_eager", "fullgraph": True}
    if part == "whole":
        call = torch.compile(model, **options)
    else:
        for block in list(model.base_model.model.blocks)[: 2 if part == "blocks" else 1]:
            block.compile(**options)
    x = torch.randn(3, 6)
    with pytest.warns(UserWarning, match="got no gradient") as found:
        call(x).sum().backward()
    messages = [str(warning.message) for warning in found]
    compiled = [m for m in messages if "in compiled code: " in m]
    assert len(compiled) == 1
    assert "blocks.0.unused" in compiled[0]
    assert ("read" in compiled[0].partition(". If")[0]) == (part == "whole")
    if part == "one of two blocks":
        assert any("called in the first training step" in m and "blocks.1.unused" in m for m in messages)
        assert "blocks.1.unused" not in compiled[0]
    call(x).sum().backward()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of the tracer
@pytest.mark.parametrize("key", ["mode", "more"])
def test_blocks_compile_as_one_graph_each_in_training(key: str) -> None:
    torch._dynamo.reset()
    variant = Variant(key)
    model, inputs = training(variant, target_modules=["q_proj"]), batch("llama")
    compiled = copy.deepcopy(model)
    for block in compiled.base_model.model.model.layers:
        block.compile(backend="eager", fullgraph=True)
    for each in (model, compiled.train()):
        each(**inputs, **task_of(variant.config(), *TASKS), use_cache=False).logits.sum().backward()
        assert each.base_model.routing.checked
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close({name: p.grad for name, p in compiled.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_a_part_by_itself_are_no_verdict(training: bool) -> None:
    model = get_peft_model(_Blocks(), MoDEConfig(r=2, target_modules=["used", "unused"])).train(training)
    x = torch.randn(3, 6)
    model.base_model.model.blocks[0](x).sum().backward()  # a part of the model, in no forward pass of its own
    assert all(p.grad is None for p in model.base_model.model.blocks[1].parameters())
    with pytest.warns(UserWarning, match=r"called in the first training step .*: blocks\.0\.unused, blocks\.1\.unused"):
        model.train()(x).sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@lossy_variants
def test_compiled_blocks_do_not_hide_a_dropped_auxiliary_loss(lossy: Variant) -> None:
    torch._dynamo.reset()
    model, inputs = training(lossy, target_modules=["v_proj"]), batch("llama")
    for block in model.base_model.model.model.layers:
        block.compile(backend="eager")
    given = {**inputs, **task_of(lossy.config(), *TASKS), "use_cache": False}
    with pytest.warns(UserWarning, match=r"auxiliary loss .* does not contain it"):
        own_loss(model(**given).logits, inputs).backward()


# --- layers whose weight another module reads -------------------------------------------------------------------------


class _Reads(nn.Module):
    """Multiplies by the weight of `inner`, in one of several ways, or reads what is harmless."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(6, 6).requires_grad_(False), how

    def forward(self, x: Tensor) -> Tensor:
        w, how = self.inner.weight, self.how
        if how == "harmless":
            assert (w.dtype, w.device, tuple(w.shape), w.ndim) == (x.dtype, x.device, (6, 6), 2)
            assert isinstance(w, Tensor)
            assert w.size(0) == len(w) == 6
            x = x.to(w.dtype).type_as(w) + w.new_zeros(6) + torch.zeros_like(w)[:1].to(w)
            return self.inner(x)
        if how == "linear":
            return F.linear(x, w, self.inner.bias)
        if how == "matmul":
            return x @ w.T
        if how == "data":
            return x @ w.data
        if how == "einsum":
            return torch.einsum("bd,od->bo", x, w)
        if how == "numpy":
            return x @ torch.from_numpy(w.numpy().T)
        if how == "list":
            return x @ torch.tensor(w.tolist()).T
        return torch.stack([w, w]).sum(0)[:1] + x


@pytest.mark.parametrize("how", ["linear", "matmul", "data", "einsum", "stack", "numpy", "list"])
def test_a_weight_that_another_module_multiplies_by_is_refused(how: str) -> None:
    base = _Reads(how)
    x = torch.randn(3, 6)
    expected = base(x)
    model = get_peft_model(base, MoDEConfig(r=2, target_modules=["inner"], init_weights=False))
    for mode in (True, False):
        with pytest.raises(ConfigError, match=r"reads the weight of 'inner' itself .*exclude_modules"):
            model.train(mode)(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model.base_model.model.inner.weight @ torch.eye(6), base.inner.base_layer.weight)


def test_a_module_that_reads_only_the_dtype_of_a_weight_is_served() -> None:
    base, x = _Reads("harmless"), torch.randn(3, 6)
    expected = base(x)
    model = get_peft_model(base, MoDEConfig(r=2, target_modules=["inner"]))
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    torch._dynamo.reset()
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


def test_mamba_is_adapted_where_its_layers_are_called() -> None:
    config = MambaConfig(
        vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1, intermediate_size=32, time_step_rank=4
    )
    ids = batch("llama")["input_ids"]
    adapted = get_peft_model(MambaForCausalLM(config), MoDEConfig(r=2, target_modules=["in_proj", "x_proj"]))
    adapted(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ConfigError, match="'out_proj' is incompatible with Mamba-based models"):
        get_peft_model(MambaForCausalLM(config), MoDEConfig(r=2, target_modules=["in_proj", "out_proj"]))
    reads = get_peft_model(MambaForCausalLM(config), MoDEConfig(r=2, target_modules=["dt_proj"]))
    with pytest.raises(ConfigError, match=r"weight of 'backbone\.layers\.0\.mixer\.dt_proj' itself"):
        reads(input_ids=ids)


class _Twice(nn.Module):
    """One weight in two places: the same module, the same parameter in another layer, or in a module of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(6, 6), nn.Linear(6, 6), how
        if how == "module":
            self.second = self.first
        elif how == "layers":
            self.second.weight = self.first.weight
        else:
            self.held = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.held.T if self.how == "held" else self.second(self.first(x))


@pytest.mark.parametrize(("how", "other"), [("module", "'second'"), ("layers", "'second'"), ("held", "the model")])
def test_a_weight_that_another_module_holds_is_reported_and_not_merged_into(how: str, other: str) -> None:
    with pytest.warns(UserWarning, match=f"weight of 'first' is also that of {other}, where it has no adapter"):
        model = get_peft_model(_Twice(how), LORA.config(target_modules=["first"], init_weights=False)).eval()
    x = torch.randn(3, 6)
    before = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"'first': its weight is shared \(tied\) with another module"):
            merge()
    assert torch.equal(model(x), before)


def test_layers_that_share_a_weight_may_each_have_an_adapter() -> None:
    model = get_peft_model(_Twice("layers"), LORA.config(target_modules=["first", "second"], init_weights=False))
    assert len(adapted_layers(model)) == 2
    with pytest.raises(MergeError, match="is shared"):
        model.merge_adapter()


@pytest.mark.parametrize("variant", [Variant("more"), Variant("moelora")], ids=lambda v: v.key)
def test_an_adapter_with_trained_tokens_is_merged_and_unloaded_as_pefts_lora_is(variant: Variant) -> None:
    inputs, task = batch("llama"), task_of(variant.config(), "cola")
    tokens = inputs["input_ids"][0, :2].tolist()

    def made() -> PeftModel:
        torch.manual_seed(0)
        config = variant.config(target_modules=["q_proj"], init_weights=False, trainable_token_indices=tokens)
        model = get_peft_model(tiny_model("llama"), config).eval()
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.data.add_(3.0)
        return model

    with torch.no_grad():
        expected, bare = made()(**inputs, **task).logits, tiny_model("llama").eval()(**inputs).logits
        assert_close(made().merge_and_unload(**task)(**inputs).logits, expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(made().unload()(**inputs).logits, bare)
    with pytest.raises(ConfigError, match=r"trains tokens \(trainable_token_indices\), which have no sum"):
        made().base_model.add_weighted_adapter(["default"], [1.0], "sum", **task)


def test_a_block_under_two_names_is_merged() -> None:
    base = nn.Module()
    base.block = base.again = nn.Sequential(nn.Linear(6, 6))
    base.forward = lambda x: base.again(x)
    expected = get_peft_model(base, LORA.config(target_modules=["0"], init_weights=False)).eval()
    x = torch.randn(3, 6)
    before = expected(x)
    assert_close(expected.merge_and_unload()(x), before)


def test_checkpointing_outside_transformers_names_the_way_out() -> None:
    model, inputs = training(Variant("more")), {**batch("llama"), "task": list(TASKS), "use_cache": False}
    layers = model.base_model.model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    with pytest.raises(RoutingError, match=r"runs again in backward.*dyads\.use_task.*gradient_checkpointing_enable"):
        model(**inputs).logits.sum().backward()
    with use_task(model, inputs.pop("task")):
        model(**inputs).logits.sum().backward()


# --- packed experts ---------------------------------------------------------------------------------------------------


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=61, num_key_value_heads=2, num_local_experts=3, **sizes))


def qwen_moe() -> nn.Module:
    """A dense layer, whose projections have the old names of experts, and a layer of experts."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=61, num_key_value_heads=2, head_dim=8, **sizes, **experts))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # PEFT's own keys
def test_experts_that_only_lora_adapts_are_refused_or_warned_about() -> None:
    lora = get_peft_model(mixtral(), LoraConfig(target_modules="all-linear"))
    assert any("experts" in name for name, p in lora.named_parameters() if p.requires_grad)
    with pytest.warns(UserWarning, match=r"covers fewer weights .* than for LoRA.*down_proj, gate.*gate_up_proj"):
        get_peft_model(mixtral(), MoDEConfig(r=2, target_modules="all-linear"))
    for names in (["w1"], ["w1", "w3"], ["q_proj", "w2"]):
        with pytest.raises(
            ConfigError, match=r"target_modules .*w\d.*packs its experts into parameters .*Leave them out"
        ):
            get_peft_model(mixtral(), MoDEConfig(r=2, target_modules=names))
    with pytest.warns(UserWarning, match="covers fewer weights"):  # the dense layer's are linear layers
        get_peft_model(qwen_moe(), MoDEConfig(r=2, target_modules=["gate_proj", "up_proj"]))
    get_peft_model(mixtral(), MoDEConfig(r=2, target_modules=["q_proj", "o_proj"]))
    get_peft_model(mixtral(), MoDEConfig(r=2))
    with pytest.raises(ConfigError, match="target_parameters"):
        MoDEConfig(r=2, target_parameters=["experts.gate_up_proj"])


# --- merging into something else than a weight ------------------------------------------------------------------------


class _Subclass(Tensor):
    """A tensor subclass, as torchao's and quanto's quantised weights are."""


class _Rounding(nn.Linear):
    """As a quanto layer before it is frozen: the weight is a float, and rounded in every call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * 4).round() / 4, self.bias)


class _Casting(nn.Linear):
    """A linear layer with a harmless forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class _Packed(nn.Module):
    """As GPTQ's or HQQ's: features and a forward, and no floating-point weight."""

    def __init__(self, d: int, o: int, names: tuple[str, str] = ("in_features", "out_features")) -> None:
        super().__init__()
        setattr(self, names[0], d)
        setattr(self, names[1], o)
        self.register_buffer("qweight", torch.randint(-8, 8, (o, d)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * 0.1).to(x).T


LORA = Variant("mode", (("num_experts", 1),))
COMPUTED = {
    "spectral_norm": spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}
"""Layers whose weight is computed from other tensors in every call."""


@pytest.mark.parametrize("kind", [*COMPUTED, "int8", "subclass", "rounding", "packed", "old names"])
def test_only_a_floating_point_weight_is_merged_into(kind: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 4))
    if kind == "int8":
        base[0].weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    elif kind == "subclass":
        base[0].weight = nn.Parameter(base[0].weight.detach().as_subclass(_Subclass), requires_grad=False)
    elif kind == "rounding":
        base = nn.Sequential(_Rounding(6, 4))
    elif kind in COMPUTED:
        COMPUTED[kind](base[0])
    elif kind == "packed":
        base = nn.Sequential(_Packed(6, 4))
    else:
        base = nn.Sequential(_Packed(6, 4, ("infeatures", "outfeatures")))
    model = get_peft_model(base, LORA.config(target_modules=["0"], init_weights=False)).eval()
    x = torch.randn(3, 6)
    before = model(x) if kind != "int8" else None
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"cannot merge adapter 'default' into a .*dequantize=True.*unquantised"):
            merge()
    if before is not None:
        assert torch.equal(model(x), before)  # the adapter is still there
        model.train()(x).square().sum().backward()
        assert adapted_layers(model)[0].lora_A["default"].weight.grad.abs().max() > 0


def test_a_weight_that_is_computed_in_every_call_is_not_plain() -> None:
    assert is_plain(nn.Linear(6, 4))
    assert not is_plain(parametrizations.weight_norm(nn.Linear(6, 4)))


class _Described(_Packed):
    """As GPTQModel's: the codes have the name `qweight`, and `weight` is a description of them and no tensor."""

    @property
    def weight(self) -> SimpleNamespace:
        return SimpleNamespace(shape=self.qweight.shape, dtype=torch.float32, device=self.qweight.device)


class _Half(_Packed):
    """A quantised layer with a bias, whose products are in bfloat16."""

    def __init__(self, d: int, o: int) -> None:
        super().__init__(d, o)
        self.bias = nn.Parameter(torch.randn(o) * 10, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x.to(torch.bfloat16)) + self.bias.to(torch.bfloat16)).to(x.dtype)


class _Dynamic(_Packed):
    """Rounds its input too, as int8 layers with dynamic activations do."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 3
        return super().forward((x / scale).round() * scale)


MAKES = [
    lambda: _Packed(6, 4),
    lambda: _Described(6, 4),
    lambda: _Rounding(6, 4),
    lambda: _Half(6, 4),
    lambda: COMPUTED["pruned"](nn.Linear(6, 4)),
]


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("variant", [LORA, Variant("more")], ids=lambda v: v.id)
def test_a_quantised_layer_merges_as_the_floating_point_layer_that_it_equals(make: Any, variant: Variant) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(make(), nn.Linear(4, 4))
    model = get_peft_model(base, variant.config(target_modules=["0", "1"], init_weights=False)).eval()
    x, task = torch.randn(5, 6), task_of(variant.config(), "cola")
    expected = model(x, **task)
    merged = model.merge_and_unload(dequantize=True, **task)
    assert [type(layer) for layer in merged] == [nn.Linear, nn.Linear]
    tolerance = 2e-2 if isinstance(make(), _Half) else 1e-5
    assert_close(merged(x), expected, atol=tolerance * float(expected.detach().abs().max()), rtol=0)


def test_a_quantised_layer_that_rounds_its_input_does_not_merge() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(_Packed(6, 6), _Dynamic(6, 4))
    model = get_peft_model(base, LORA.config(target_modules=["0", "1"], init_weights=False)).eval()
    x = torch.randn(3, 6)
    before = model(x)
    with pytest.raises(MergeError, match=r"'1' \(_Dynamic\) rounds its input as well as its weight"):
        model.merge_and_unload(dequantize=True)
    assert torch.equal(model(x), before)
    other = get_peft_model(nn.Sequential(_Packed(6, 6)), MoDEConfig(r=2, target_modules=["0"]))
    with pytest.raises(MergeError, match="its gates look at the layer's input"):
        other.merge_and_unload(dequantize=True)


def test_what_needs_no_weight_works_over_quantised_layers() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(_Packed(6, 4)), LORA.config(target_modules=["0"], init_weights=False)).eval()
    delta = adapted_layers(model)[0].get_delta_weight("default")
    x = torch.randn(3, 6)
    with model.disable_adapter():
        base = model(x)
    assert_close(model(x), base + x @ delta.T)
    model.add_weighted_adapter(["default"], [2.0], "twice")
    assert_close(adapted_layers(model)[0].get_delta_weight("twice"), 2 * delta)


class _Router(nn.Linear):
    """As Llama 4's and Phi-MoE's: a linear layer that returns more than its product."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return scores.softmax(-1), scores


def test_a_linear_layer_that_returns_no_tensor_is_refused() -> None:
    model = get_peft_model(nn.Sequential(_Router(6, 4)), MoDEConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match=r"'0' \(_Router\) returns a tuple .*exclude_modules"):
        model(torch.randn(3, 6))
    with model.disable_adapter():
        assert len(model(torch.randn(3, 6))) == 2


def test_a_layer_with_a_harmless_forward_of_its_own_merges() -> None:
    model = get_peft_model(nn.Sequential(_Casting(6, 4)), LORA.config(target_modules=["0"], init_weights=False)).eval()
    x = torch.randn(3, 6)
    expected = model(x)
    assert_close(model.merge_and_unload()(x), expected)


# --- keywords of the model itself -------------------------------------------------------------------------------------


def whisper() -> WhisperForConditionalGeneration:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 4}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    lengths = {"max_source_positions": 10, "max_target_positions": 12, "suppress_tokens": None}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **tokens, **lengths))
    generation = model.generation_config
    generation.is_multilingual = True
    generation.lang_to_id, generation.task_to_id = {"<|en|>": 10}, {"transcribe": 11, "translate": 12}
    generation.no_timestamps_token_id, generation.begin_suppress_tokens = 13, None
    return model


@pytest.mark.filterwarnings("ignore:.*forced_decoder_ids.*")
def test_whispers_own_task_reaches_whisper() -> None:
    features = torch.randn(2, 4, 20)
    options = {"language": "en", "max_new_tokens": 2, "return_timestamps": False, "do_sample": False}

    def prompts(model: Any, **more: Any) -> list[Any]:
        seen: list[Any] = []
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        hook = inner.model.decoder.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
        )
        model.generate(input_features=features, **options, **more)
        hook.remove()
        return seen[0]

    expected = {task: prompts(whisper(), task=task) for task in ("transcribe", "translate")}
    assert expected["transcribe"] != expected["translate"]
    free = get_peft_model(whisper(), MoDEConfig(r=2, target_modules=["q_proj"])).eval()
    routed = get_peft_model(whisper(), MoREConfig(r=2, tasks=list(TASKS), target_modules=["q_proj"])).eval()
    for task, wanted in expected.items():
        assert prompts(free, task=task) == wanted
        with use_task(routed, "rte"):
            assert prompts(routed, task=task) == wanted
    with pytest.raises(RoutingError, match="use_task"):
        routed.generate(input_features=features, **options, task="translate")


class _Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor, task: str = "transcribe") -> Tensor:
        return self.lin(x) if task == "transcribe" else -self.lin(x)


class _Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Translator()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.inner(x, **kwargs)


def test_a_scripted_module_inside_does_not_hinder_an_adapter() -> None:
    for variant in (Variant("mode"), Variant("more")):
        base, x = _Passing(), torch.randn(3, 6)
        base.scripted = torch.jit.script(nn.Linear(6, 6))
        expected = base(x)
        model = get_peft_model(base, variant.config(target_modules=["inner.lin"])).eval()
        with use_task(model, list(TASKS)) if variant.key == "more" else nullcontext():
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("base", [_Translator, _Passing])
def test_a_task_that_a_module_inside_takes_reaches_it(base: type[nn.Module]) -> None:
    for variant in (Variant("mode"), Variant("more")):
        model = get_peft_model(base(), variant.config(target_modules=["lin"], init_weights=False)).eval()
        x = torch.randn(3, 6)
        with use_task(model, list(TASKS)) if variant.key == "more" else nullcontext():
            assert torch.equal(model(x, task="translate"), -model(x))


def test_continuous_batching_refuses_requests_without_a_task() -> None:
    model = get_peft_model(tiny_model("llama"), MoREConfig(r=2, tasks=list(TASKS), target_modules=["q_proj"]))
    for given, message in (
        ({}, "generate_batch needs a task: pass task=…"),
        ({"task": ["rte", "rte"]}, "task has 2 entries for 1 requests"),
        ({"task": ["rtee"]}, "does not know task 'rtee'"),
        ({"task": "rte", "persistent_manager": True}, "persistent_manager=True .*leave it out"),
    ):
        with pytest.raises(RoutingError, match=message):
            model.generate_batch([[3, 4, 5]], **given)
    with pytest.raises(RoutingError, match="needs a task for every request"):
        model.init_continuous_batching()

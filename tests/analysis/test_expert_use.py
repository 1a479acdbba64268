# SPDX-License-Identifier: Apache-2.0
"""Routing of hand-made adapters, and of trained ones against a computation of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from dyads.analysis.gates import Reader, gates_of
from dyads.analysis.named_array import NamedArray, arrays_of
from dyads.analysis.routing import routing
from dyads.errors import ConfigError, RunError
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter
from made_adapters import choose_experts, orthonormal, save_adapter
from tiny import TASKS, VARIANTS, Variant, tiny_model

MOELORA = Variant("moelora", (("r", 6), ("num_experts", 3), ("task_dim", 5)))


def test_a_router_that_always_picks_expert_0_has_entropy_0_and_a_dominant_expert(tmp_path: Path) -> None:
    found = routing(save_adapter(tmp_path, MOELORA, choose_experts(0, 0, 0)))
    assert found.weights.names == ("task", "layer", "choice", "expert")
    assert found.weights.axes["task"] == TASKS
    assert np.allclose(found.weights.values, [1, 0, 0])
    assert np.allclose(found.entropy.values, 0)
    assert np.allclose(found.usage_entropy.values, 0)
    assert (found.dominant.values == [1, 0, 0]).all()
    assert (found.dead.values == [0, 1, 1]).all()
    assert "collapsed routers in 6 of 6 layers" in found.notes[-1]


def test_tasks_with_experts_of_their_own_are_certain_and_use_all_evenly(tmp_path: Path) -> None:
    found = routing(save_adapter(tmp_path, MOELORA, choose_experts(2, 0, 1)))
    assert np.allclose(found.weights.mean("layer", "choice").values, np.eye(3)[[2, 0, 1]])
    assert np.allclose(found.entropy.values, 0)
    assert np.allclose(found.usage_entropy.values, 1)
    assert not found.dead.values.any()
    assert not found.dominant.values.any()
    assert found.notes == ()
    assert found.tables[1].rows[0] == (TASKS[0], "0.00", "2", "100 %")


def test_equal_weights_have_entropy_1(tmp_path: Path) -> None:
    def even(core: Any, A: Tensor, B: Tensor) -> None:
        core.task_router.zero_()

    found = routing(save_adapter(tmp_path, MOELORA, even))
    assert np.allclose(found.entropy.values, 1)
    assert np.allclose(found.usage_entropy.values, 1)
    assert found.tables[0].rows[0][1:] == ("2", "1.00", "1.00", "0 of 6", "0 of 2")


def test_gates_of_tokens_are_the_softmax_of_their_router(trained: Callable[..., RunFolder]) -> None:
    folder = trained("mode")
    found = gates_of(folder.path, instances=2)
    reader = Reader(folder)
    layers = {n: m for n, m in reader.model.named_modules() if hasattr(m, "lora_core")}
    task = reader.tasks[1]
    by_layer: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda m, args, out, n=n: by_layer.setdefault(n, []).append(args[0][0]))
        for n, layer in layers.items()
    ]
    tokens = sum(reader.read(task, example) for example in reader.examples(task)[:2])
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        x = torch.cat(by_layer[name])
        assert len(x) == tokens
        router = layer.lora_core["default"].router  # type: ignore[union-attr,index]
        p = (x @ router.T).view(len(x), 4, 3).softmax(-1).double()
        path = name.removeprefix("base_model.model.")
        assert np.allclose(found.weights.at(task=task.name, layer=path).values, p.mean(0).detach(), atol=1e-5)
        spread = -(p * p.log()).sum(-1).mean(0) / np.log(3)
        assert np.allclose(found.entropy.at(task=task.name, layer=path).values, spread.detach(), atol=1e-5)
        G = found.matrices[found.weights.axes["layer"].index(path)][1]
        written = torch.zeros(12, 4, dtype=torch.float64)
        for j in range(4):
            written[3 * j : 3 * j + 3, j] = p.mean(0)[j]
        assert torch.allclose(G, written, atol=1e-5)
    assert found.tokens > tokens
    assert f"means over {found.tokens:,} tokens of {len(reader.tasks)} tasks" in found.notes[0]


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_encoders_and_encoder_decoders_are_read_too(kind: str, trained: Callable[..., RunFolder]) -> None:
    found = routing(trained("molora", kind), instances=1)
    assert np.allclose(found.weights.values.sum(-1), 1)
    assert (found.entropy.values > 0).all()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.id)
def test_every_method_says_how_its_experts_are_weighed(variant: Variant) -> None:
    core = variant.config().core(8).eval()
    core.reset_parameters()
    task = torch.arange(3) if "task" in core.looks_at else None
    x = torch.randn(3, 5, 8)
    h = torch.randn(3, 5, core.p)
    with torch.no_grad():
        weights, g = core.choices(h, x, task), core.route(h, x, task)
        assert (weights >= 0).all()
        n = weights.shape[-1]
        alone = torch.stack([core.matrix(core.gates_of_expert(e, g)) for e in range(n)])
    G = alone.flatten(1, -3)[:, 0] if alone.ndim > 3 else alone
    assert G.shape == (n, core.q, core.p)
    assert (G.flatten(1).abs().sum(1) > 0).all()
    if variant.key not in ("comol", "mtl_lora"):  # whose experts share the directions of A and B
        used = (G != 0).double()
        assert (used.sum(0) <= 1).all(), "no entry of G belongs to two experts"


def test_the_experts_of_a_gate_are_its_parts(tmp_path: Path) -> None:
    """G of any gates is the weighted sum of the experts' own, for methods whose gates act linearly."""
    for variant in (MOELORA, Variant("mtl_lora"), Variant("mode"), Variant("more")):
        core = variant.config().core(8).eval()
        core.reset_parameters()
        task = torch.tensor([1]) if "task" in core.looks_at else None
        h, x = torch.zeros(1, core.p), torch.randn(1, 8)
        with torch.no_grad():
            weights, g = core.choices(h, x, task), core.route(h, x, task)
            parts = [core.matrix(core.gates_of_expert(e, g))[0] for e in range(weights.shape[-1])]
            for k in range(weights.shape[-2]):
                if weights.shape[-2] == 1:
                    total = sum(weights[0, k, e] * part for e, part in enumerate(parts))
                    assert torch.allclose(total, core.matrix(g)[0], atol=1e-6), variant.id  # type: ignore[arg-type]


def test_refusals_name_what_is_missing(tmp_path: Path) -> None:
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(RunError, match="is PEFT's own LoRA, which has no gates"):
        routing(tmp_path / "lora")
    save_adapter(tmp_path / "mode", Variant("mode"), orthonormal)
    with pytest.raises(RunError, match="depend on the layer's input, so the run's model and tasks are needed"):
        routing(tmp_path / "mode")
    save_adapter(tmp_path / "one", Variant("mode", (("num_experts", 1),)), orthonormal)
    with pytest.raises(RunError, match="has one expert, so there is no routing"):
        routing(tmp_path / "one")
    save_adapter(tmp_path / "more", Variant("more"), orthonormal, rank_pattern={"v_proj": 2})
    with pytest.raises(
        RunError, match=r"gates of unequal sizes \(rank_pattern\): 1×4 in '.*down_proj' and 1×2 in '.*v_proj'"
    ):
        routing(tmp_path / "more")


def test_named_arrays_pick_and_average_by_name() -> None:
    array = NamedArray.of([[1, 2, 3], [5, np.nan, 7]], task=["a", "b"], layer=["x", "y", "z"])
    assert array.at(task="b", layer="z").item() == 7
    assert array.mean("task").values.tolist() == [3, 2, 5]
    assert array.mean("layer").values.tolist() == [2, 6]
    assert array.mean().item() == pytest.approx(18 / 5)
    assert list(array.rows())[1] == (("a", "y"), 2.0)
    assert array.as_json() == {
        "axes": {"task": ["a", "b"], "layer": ["x", "y", "z"]},
        "values": [[1.0, 2.0, 3.0], [5.0, None, 7.0]],
    }
    with pytest.raises(ConfigError, match="there is no axis 'tasks' – did you mean 'task'"):
        array.at(tasks="a")
    with pytest.raises(ConfigError, match="axis 'task' has no 'c'"):
        array.at(task="c")
    with pytest.raises(ConfigError, match=r"shape \(2,\) cannot have axes"):
        NamedArray.of([1, 2], task=["a"])


def test_all_results_are_arrays_with_named_axes(tmp_path: Path) -> None:
    save_adapter(tmp_path, MOELORA, choose_experts(0, 1, 2))
    assert SavedAdapter.read(tmp_path).task_names == TASKS
    assert set(arrays_of(routing(tmp_path))) == {"weights", "entropy", "usage_entropy", "dead", "dominant"}

# SPDX-License-Identifier: Apache-2.0
"""Approximate export: fitted layer by layer, exact where gates are constant, the best of three, and honest about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import dyads.export.activations as activations
from dyads.cli import main
from dyads.console import Reporter
from dyads.errors import RoutingError, RunError
from dyads.export.activations import (
    groups_of,
    inner,
    mean_matrices,
    moments,
    outer_factor,
    replaced,
    watched,
)
from dyads.export.approximate import Candidate, Price, approximate, candidates_of, fit_layers, tasks_of
from dyads.export.lora import Lora
from dyads.models.heads import read_heads
from dyads.runs.folder import RunFolder
from dyads.tasks.files import FilesSpec
from dyads.tuner.layer import adapted_layers
from tiny import TARGETS, Variant, batch, tiny_model


def adapted(variant: Variant, kind: str = "llama", **options: Any) -> Any:
    """A tiny model in double precision with an adapter whose update is not small."""
    config = variant.config(target_modules=TARGETS[kind], init_weights=False, lora_alpha=8, **options)
    return get_peft_model(tiny_model(kind), config).eval()


def batches(count: int = 3, kind: str = "llama") -> list[dict[str, Tensor]]:
    return [{**batch(kind, rows=2, width=9, seed=seed)} for seed in range(count)]


def update_of(lora: Lora, module: str) -> Tensor:
    return lora.ups[module] @ lora.downs[module]


@torch.no_grad()
def seen(model: Any, module: str, data: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """(x, y) of a layer over all tokens: its inputs, and what the adapter adds, by a call of the layer itself."""
    layer, inputs = adapted_layers(model)[module], []
    with watched({module: layer}, lambda _, x: inputs.append(x)):
        for one in data:
            model(**one)
    x = torch.cat([x.flatten(0, 1) for x in inputs])
    return x, type(layer).forward(layer, x) - layer.base_layer(x)


@pytest.mark.parametrize(
    "variant",
    [Variant("mode"), Variant("molora"), Variant("smora", (("top_k", 2),)), Variant("comol")],
    ids=lambda v: v.key,
)
def test_inner_and_outer_give_what_the_layer_adds(variant: Variant) -> None:
    model = adapted(variant)
    layers = adapted_layers(model)
    name = next(iter(layers))
    x, y = seen(model, name, batches(1))
    assert_close(inner(layers[name], x)[0] @ outer_factor(layers[name]).T, y, atol=2e-5, rtol=1e-4)  # fp32


def test_layers_are_fitted_in_order_with_those_before_already_replaced() -> None:
    model, data = adapted(Variant("mode", (("router_std", 1.0),))), batches()
    layers = adapted_layers(model)
    groups = groups_of(model, layers, data[0])
    path = "model.layers.{}.{}"
    attention, down = ("self_attn.q_proj", "self_attn.v_proj"), "mlp.down_proj"
    assert groups == [
        ([path.format(i, name) for name in names], len(names)) for i in range(2) for names in (attention, (down,))
    ]
    means = mean_matrices(model, layers, data)
    lora = fit_layers(model, layers, means, data, rank=3)
    assert list(lora.downs) == list(layers)
    last = path.format(1, down)
    before = Lora({n: d for n, d in lora.downs.items() if n != last}, {n: u for n, u in lora.ups.items() if n != last})

    def best(sets: tuple[Tensor, Tensor]) -> Tensor:
        """The best update of rank 3 from dense matrices, by an SVD in the metric of the inputs."""
        x, y = (t.double() for t in sets)
        C, energy = x.T @ x, x.square().sum(0)
        penalty = 1e-2 * energy + 1e-6 * energy.mean()
        B, prior = outer_factor(layers[last]).double(), means[last] @ layers[last].lora_A["default"].weight.double()
        D = (y.T @ x + B @ prior * penalty) @ torch.linalg.inv(C + penalty.diag())
        values, vectors = torch.linalg.eigh(C + penalty.diag())
        root = vectors * values.sqrt() @ vectors.T
        U, S, V = torch.linalg.svd(D @ root, full_matrices=False)
        return (U[:, :3] * S[:3] @ V[:3] @ torch.linalg.inv(root)).float()

    with replaced(layers, before):
        wanted = best(seen(model, last, data))
    assert_close(update_of(lora, last), wanted, atol=1e-4, rtol=1e-3)
    other = best(seen(model, last, data))  # from the inputs that the adapter itself gives
    assert (other - wanted).norm() > 20 * (update_of(lora, last) - wanted).norm()


def test_a_pass_for_moments_ends_at_its_layer_and_sums_over_all_tokens() -> None:
    model, data = adapted(Variant("mode")), batches()
    layers = adapted_layers(model)
    group = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    later: list[str] = []
    with watched({name: layers[name] for name in layers if name not in group}, lambda name, _: later.append(name)):
        sums = moments(model, layers, group, 2, data)
    x, _ = seen(model, group[0], data)
    assert (later, sums.tokens, list(sums.ux)) == ([], 3 * 2 * 9, group)
    assert_close(sums.xx, x.double().T @ x.double(), check_dtype=False)
    assert len({value.data_ptr() for value in sums.ux.values()}) == 2


def test_the_mean_of_the_gates_is_over_tokens_and_formed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = adapted(Variant("mode", (("router_std", 1.0),))), batches()
    layers = adapted_layers(model)
    name = "model.layers.1.self_attn.q_proj"
    x, _ = seen(model, name, data)
    core = layers[name].core("default")
    wanted = core.matrix(inner(layers[name], x)[1]).mean(0)
    for most in (2**24, 1):
        monkeypatch.setattr(activations, "_MOST", most)
        assert_close(mean_matrices(model, layers, data)[name].float(), wanted)


@pytest.mark.parametrize(
    "variant",
    [Variant("mode", (("num_experts", 1),)), Variant("mode"), Variant("molora", (("shared_down", True),))],
    ids=lambda v: v.id,
)
def test_constant_gates_are_recovered_exactly_by_every_candidate(variant: Variant) -> None:
    model, data = adapted(variant), batches()
    for layer in adapted_layers(model).values():
        for parameter in layer.core("default").parameters():
            torch.nn.init.zeros_(parameter)  # a softmax of zeros: every expert has the same gate everywhere
    layers = adapted_layers(model)
    with torch.no_grad():
        other = batch("llama", rows=3, width=5, seed=77)
        wanted = model(**other).logits
        for name, lora in candidates_of(model, layers, data, rank=4).items():
            with replaced(layers, lora):
                assert_close(model(**other).logits, wanted, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(model(**other).logits, wanted)  # nothing stays replaced


# --- on a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"task": task, "input": " ".join(words), "output": words[0], "metric": "exact_match"}
        for task in ("first_word", "has_animal")
        for i in range(14)
        for words in [[("river", "stone", "lamp", "fox", "tree")[(i * k + k) % 5] for k in range(1, 3 + i % 3)]]
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({**row, "id": str(i)}) + "\n" for i, row in enumerate(rows)))
    return path


def export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.mark.usefixtures("reload_in_fork")
def test_a_run_is_exported_with_its_price_and_verified(
    trained: Callable[..., RunFolder], data: Path, tmp_path: Path
) -> None:
    run = trained("mode")
    result = export(run.path, "--approximate", data, "--rank", "3", "--out", tmp_path / "lora")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.fullmatch(
        r"all tasks: rank 3, fitted on \d+ instances \([\d,]+ tokens\), measured on \d+ held out", lines[0]
    )
    assert lines[1].split() == ["relative", "error", "exact_match"]
    assert lines[2].split()[0] == "adapter"
    errors = {
        line.replace("(exported)", "").rsplit(None, 2)[0].strip(): float(line.rsplit(None, 2)[1]) for line in lines[3:6]
    }
    exported = [line for line in lines[3:6] if "(exported)" in line]
    assert len(exported) == 1
    assert float(exported[0].rsplit(None, 2)[1]) == min(errors.values())
    assert set(errors) == {"regression", "mean gates", "mean update"}
    layers = [line for line in lines if line.startswith("model.layers.")]
    assert len(layers) == 6
    assert any(line.endswith("rank 3 in 6 modules") for line in lines)
    assert lines[-1].startswith("verified: PEFT reloads it without dyads")
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert (config.r, config.lora_alpha, config.rank_pattern) == (3, 3, {})
    assert {min(t.shape) for t in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()} == {3}
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "approximates a `mode` adapter" in card
    assert "## What it loses" in card


def test_every_task_of_the_data_gets_its_own_lora(
    trained: Callable[..., RunFolder], data: Path, tmp_path: Path
) -> None:
    run = trained("mode")
    arguments: dict[str, Any] = {"rank": 2, "verifies": False}
    written, prices, verification = approximate(run, data, tmp_path / "all", all_tasks=True, **arguments)
    assert ([one.task for one in written], verification) == (["first_word", "has_animal"], None)
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["README.md", "first_word", "has_animal"]
    one, (price,), _ = approximate(run, data, tmp_path / "one", task="has_animal", **arguments)
    assert price.task == "has_animal"
    assert price.fitted + price.held_out == 14
    assert one[0].path == tmp_path / "one"
    alike, different = (
        load_file(tmp_path / "all" / name / "adapter_model.safetensors") for name in ("has_animal", "first_word")
    )
    again = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], alike[key]) for key in again)
    assert not all(torch.equal(again[key], different[key]) for key in again)
    assert prices[1].chosen.error == price.chosen.error


def test_inputs_are_put_into_the_form_that_the_task_had_in_training(
    trained: Callable[..., RunFolder], data: Path
) -> None:
    run = trained("mode")
    form = run.templates()["first_word"]
    task = tasks_of(run, data)[0]
    example = (*task.train, *task.validation, *task.test)[0]
    assert form.fits(example.prompt)
    assert task.template == form
    row = next(r for r in map(json.loads, data.read_text().splitlines()) if r["id"] == example.id)
    assert example.prompt == form.prompt({form.input_column: row["input"]})
    assert example.references == (row["output"],)


@pytest.mark.usefixtures("reload_in_fork")
def test_gates_that_look_at_the_task_too_need_one_and_merge_for_it(
    trained: Callable[..., RunFolder], data: Path, tmp_path: Path
) -> None:
    run = trained("task_mode", r=2, num_experts=2)
    with pytest.raises(
        RoutingError, match=r"\(task_mode\) for all tasks at once: its gates look at the task; name one"
    ):
        approximate(run, data, tmp_path / "out")
    written, (price,), verification = approximate(
        run, data, tmp_path / "out", rank=4, task="has_animal", merges=True, reporter=Reporter()
    )
    assert verification is not None
    assert verification.difference < 1e-4
    assert written[0].dtype == "float32"
    module = "model.layers.1.self_attn.v_proj"
    merged, base = (
        AutoModelForCausalLM.from_pretrained(path).get_submodule(module).weight
        for path in (tmp_path / "out", run.recipe().model.name)
    )
    assert_close(merged - base, update_of(price.chosen.lora, module), atol=1e-6, rtol=1e-3)
    assert price.chosen.error < 0.5


def test_an_encoder_with_heads_is_approximated_too(trained: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = trained("mode", "bert")
    labels = list(read_heads(run.heads)[0].labels)
    rows = [
        {"task": "mnli", "input": f"{first} {word}", "output": label, "labels": labels}
        for first in ("river", "stone", "lamp", "fox")
        for word, label in zip(("yes", "no", "maybe"), labels, strict=True)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    written, (price,), _ = approximate(run, path, tmp_path / "out", rank=8, verifies=False)
    assert written[0].rank == 8
    assert price.metric == "accuracy"
    assert (tmp_path / "out" / "task_heads.safetensors").is_file()
    assert 0 < price.chosen.error < 0.5


def test_the_candidate_with_the_smallest_error_is_chosen() -> None:
    lora = Lora({"a": torch.zeros(1, 2)}, {"a": torch.zeros(2, 1)})
    candidates = tuple(
        Candidate(name, lora, error, {"a": error}, score)
        for name, error, score in (("regression", 0.5, 90.0), ("mean gates", 0.2, 10.0), ("mean update", 0.3, 95.0))
    )
    price = Price("t", 1, 10, 100, 5, "accuracy", 96.0, candidates)
    assert price.chosen.name == "mean gates"
    assert price.text.splitlines() == [
        "t: rank 1, fitted on 10 instances (100 tokens), measured on 5 held out",
        "                       relative error  accuracy",
        "adapter                             –      96.0",
        "regression                      0.500      90.0",
        "mean gates (exported)           0.200      10.0",
        "mean update                     0.300      95.0",
        "relative error in layer  regression  mean gates  mean update",
        "a                             0.500       0.200        0.300",
    ]
    assert "| mean gates (exported) | 0.200 | 10.0 |" in price.markdown


def test_refusals_name_what_mends_them(trained: Callable[..., RunFolder], data: Path, tmp_path: Path) -> None:
    run, out = trained("mode"), tmp_path / "out"
    refused = export(run.path, "--out", out)
    assert refused.exit_code == 2
    assert "no ordinary LoRA equals it" in refused.output
    assert "--approximate DATA.jsonl" in refused.output
    rank = export(run.path, "--rank", "4", "--out", out)
    assert (rank.exit_code, "--rank is for --approximate" in rank.output) == (2, True)
    trim = export(run.path, "--approximate", data, "--trim", "--out", out)
    assert (trim.exit_code, "--approximate gives all layers one rank" in trim.output) == (2, True)
    unknown = export(run.path, "--approximate", data, "--task", "has_animals", "--out", out)
    assert "has no rows of task 'has_animals' – did you mean 'has_animal'" in unknown.output
    alone = export(run.adapter, "--approximate", data, "--out", out)
    assert "give the folder of the run" in alone.output
    assert not out.exists()
    lora = trained("lora")
    with pytest.raises(RunError, match=r"\(lora\): it is an ordinary LoRA already"):
        approximate(lora, data, out)
    for full in (lora.path, run.path.parent):
        with pytest.raises(RunError, match="is not empty; choose another --out"):
            approximate(run, data, full)


def test_an_export_is_refused_before_anything_is_fitted(
    trained: Callable[..., RunFolder], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = trained("mode"), tmp_path / "out"
    approximate(run, data, out, rank=2, verifies=False)
    monkeypatch.setattr("dyads.export.approximate.Answerer", None)  # which the fit begins with
    for rank in (2, 3):
        with pytest.raises(RunError, match="is not empty; choose another --out"):
            approximate(run, data, out, rank=rank, verifies=False)


def test_labels_and_metrics_of_the_runs_recipe_hold_for_its_tasks(tmp_path: Path) -> None:
    rows = [
        {"task": t, "input": f"word {i}", "output": ("no", "yes")[i % 2]} for t in ("mood", "new") for i in range(8)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"mood": ["no", "yes"], "gone": ["a", "b"]}
    spec = FilesSpec(path=(data,), labels=given, metric={"mood": "exact_match"})
    recipe = SimpleNamespace(tasks=spec)
    run = SimpleNamespace(recipe=lambda: recipe, templates=dict)
    mood, new = tasks_of(run, data)  # type: ignore[arg-type]
    assert (mood.labels, mood.metric) == (("no", "yes"), "exact_match")
    assert (new.labels, new.metric) == ((), "rouge_l")

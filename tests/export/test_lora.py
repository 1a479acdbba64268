# SPDX-License-Identifier: Apache-2.0
"""An exported LoRA, loaded in a process that cannot import dyads, equals the adapter for its task."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import forked
from dyads.errors import MergeError, RoutingError, RunError
from dyads.export import export, export_all, factors
from dyads.export.card import serve_commands
from dyads.methods.more import MoRE
from dyads.runs.saved import SavedAdapter
from tiny import TARGETS, VARIANTS, Variant, batch, task_of, tiny_model

AUTO: dict[str, Any] = {
    "llama": (AutoModelForCausalLM, "CAUSAL_LM"),
    "gpt2": (AutoModelForCausalLM, "CAUSAL_LM"),
    "t5": (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "bert": (AutoModelForSequenceClassification, "SEQ_CLS"),
}
MORE = Variant("more", (("r", 6), ("lora_alpha", 9)))
EXACT = [v for v in VARIANTS if v.looks_at <= {"task"}]
CASES = [(v, "llama", torch.float64) for v in (MORE, *EXACT)] + [
    (MORE, "llama", torch.float32),
    (MORE, "gpt2", torch.float64),
    (MORE, "t5", torch.float64),
    (MORE, "bert", torch.float64),
]
IDS = [f"{variant.id}-{kind}-{str(dtype)[6:]}" for variant, kind, dtype in CASES]

# A process in which dyads cannot be imported and a warning of PEFT's, such as one about Conv1D, is an error.
STRANGER = """
import json, sys, warnings
sys.modules["dyads"] = None
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
cases = json.load(open(path))
for case in cases:
    base = getattr(transformers, case["auto"]).from_pretrained(case["base"], dtype=getattr(torch, case["dtype"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, case["lora"]).eval()
    with torch.no_grad():
        logits = model(**load_file(case["inputs"])).logits
    save_file({"logits": logits.contiguous()}, case["logits"])
"""


def spread_ranks(model: torch.nn.Module) -> None:
    """Embeddings so large that tasks choose different ranks."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, MoRE) and "embedding" in module._parameters:
            with torch.no_grad():
                module.embedding.copy_(3 * torch.randn(module.embedding.shape, generator=generator))


def trained(
    folder: Path, variant: Variant, kind: str, dtype: torch.dtype = torch.float64, **extra: Any
) -> tuple[PeftModel, SavedAdapter]:
    """An adapter with random weights on a tiny model that lies in a folder, and the same as it was saved."""
    tiny_model(kind).save_pretrained(folder / "base")
    auto, task_type = AUTO[kind]
    base = auto.from_pretrained(folder / "base", dtype=dtype).eval()
    config = variant.config(target_modules=TARGETS[kind], task_type=task_type, init_weights=False, **extra)
    model = get_peft_model(base, config).eval()
    spread_ranks(model)
    model.save_pretrained(folder / "adapter")
    return model, SavedAdapter.read(folder / "adapter")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """For every case the logits of the adapter and of its LoRA, padded and trimmed."""
    folder = tmp_path_factory.mktemp("lora")
    cases, expected = [], {}
    for name, (variant, kind, dtype) in zip(IDS, CASES, strict=True):
        place = folder / name
        torch.manual_seed(1)
        model, adapter = trained(place, variant, kind, dtype)
        inputs = batch(kind)
        save_file(inputs, place / "inputs")
        with torch.no_grad():
            expected[name] = {"adapter": model(**inputs, **task_of(variant.config(), "cola")).logits}
        task = "cola" if adapter.task_names else None
        for form in ("padded", "trimmed"):
            export(adapter, place / form, task=task, trim=form == "trimmed")
            auto = AUTO[kind][0].__name__
            paths = {"base": "base", "lora": form, "inputs": "inputs", "logits": f"{form}.logits"}
            whole = {key: str(place / path) for key, path in paths.items()}
            cases.append({"auto": auto, "dtype": str(dtype)[6:], **whole})
    (folder / "cases.json").write_text(json.dumps(cases))
    done = forked.run(lambda: exec(STRANGER, {"path": folder / "cases.json"}))
    assert done.returncode == 0, done.stderr
    for name, logits in expected.items():
        for form in ("padded", "trimmed"):
            logits[form] = load_file(folder / name / f"{form}.logits")["logits"]
    return expected


@pytest.mark.parametrize("name", IDS)
def test_a_lora_loaded_without_dyads_answers_as_the_adapter_does_for_its_task(
    name: str, answers: dict[str, dict[str, Tensor]]
) -> None:
    logits = answers[name]
    # fp32: the same products in another order.
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if "float64" in name else {"atol": 2e-6, "rtol": 1e-5}
    assert_close(logits["padded"], logits["adapter"], **tolerance)
    assert_close(logits["trimmed"], logits["padded"], **tolerance)


def test_a_lora_has_only_the_ranks_that_its_task_uses(tmp_path: Path) -> None:
    model, adapter = trained(tmp_path, MORE, "llama")
    chosen = {n: m.ranks() for n, m in model.named_modules() if isinstance(m, MoRE)}
    assert len({tuple(r.tolist()) for r in chosen.values()}) > 1
    for task, name in enumerate(adapter.task_names):
        ranks = {n.removeprefix("base_model.model.").split(".lora_core")[0]: int(r[task]) for n, r in chosen.items()}
        lora = export(adapter, tmp_path / name, task=name)
        assert (lora.ranks, lora.rank) == (ranks, max(ranks.values()))
        trimmed = export(adapter, tmp_path / f"{name}-trimmed", task=name, trim=True)
        config = LoraConfig.from_pretrained(trimmed.path)
        assert (config.r, config.lora_alpha) == (lora.rank, lora.rank)
        assert config.rank_pattern == config.alpha_pattern
        weights = load_file(trimmed.path / "adapter_model.safetensors")
        for module, rank in ranks.items():
            assert len(weights[f"base_model.model.{module}.lora_A.weight"]) == rank
        padded = load_file(lora.path / "adapter_model.safetensors")
        assert {len(value) for key, value in padded.items() if "lora_A" in key} == {lora.rank}


def test_the_config_of_a_lora_is_the_adapters_where_both_have_a_field(tmp_path: Path) -> None:
    _, adapter = trained(tmp_path, MORE, "gpt2", layers_to_transform=[1], layers_pattern="h")
    config = LoraConfig.from_pretrained(export(adapter, tmp_path / "out", task="rte").path)
    assert config.base_model_name_or_path == str(tmp_path / "base")
    assert config.target_modules == set(TARGETS["gpt2"])
    assert (config.layers_to_transform, config.layers_pattern, config.task_type) == ([1], "h", "CAUSAL_LM")
    assert config.fan_in_fan_out
    assert {layer.module.split(".")[2] for layer in adapter.layers} == {"1"}


def test_heads_saved_beside_the_adapter_come_along(tmp_path: Path) -> None:
    model, adapter = trained(tmp_path, MORE, "bert", modules_to_save=["classifier"])
    lora = export(adapter, tmp_path / "out", task="sst2")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float64)
    with torch.no_grad():
        base.classifier.weight.zero_()
        again = PeftModel.from_pretrained(base, lora.path).eval()
        assert_close(again(**batch("bert")).logits, model(**batch("bert"), task="sst2").logits)


@pytest.mark.parametrize("tokens", [[3, 4], {"embed_tokens": [3, 4]}])
def test_tokens_trained_beside_the_adapter_come_along(tokens: Any, tmp_path: Path) -> None:
    model, _ = trained(tmp_path, MORE, "llama", trainable_token_indices=tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(3.0)
    model.save_pretrained(tmp_path / "adapter")
    lora = export(SavedAdapter.read(tmp_path / "adapter"), tmp_path / "out", task="sst2")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    ids = torch.tensor([[3, 4, 7, 8]])
    with torch.no_grad():
        again = PeftModel.from_pretrained(base, lora.path).eval()(input_ids=ids).logits
        expected = model(input_ids=ids, task="sst2").logits
    assert_close(again, expected, atol=1e-6, rtol=1e-6)


def test_a_model_that_is_not_from_transformers_exports_too(tmp_path: Path, mlp: Callable[[], Any]) -> None:
    model = get_peft_model(mlp(), MORE.config(target_modules=["lin0", "lin1"], init_weights=False)).eval()
    spread_ranks(model)
    model.save_pretrained(tmp_path / "adapter")
    export(SavedAdapter.read(tmp_path / "adapter"), tmp_path / "out", task="rte", trim=True)
    x = torch.randn(5, 6)
    assert_close(PeftModel.from_pretrained(mlp(), tmp_path / "out").eval()(x), model(x, task="rte"))


def test_all_tasks_go_into_folders_of_their_names(tmp_path: Path) -> None:
    names = ["rte", "a/b: c?", "..", "ü"]
    _, adapter = trained(tmp_path, MORE, "llama", tasks=names)
    loras = export_all(adapter, tmp_path / "all")
    assert [lora.task for lora in loras] == names
    written = sorted(p.name for p in (tmp_path / "all").iterdir())
    assert written == ["%C3%BC", "README.md", "a%2Fb%3A c%3F", "rte", "~" + sha256(b"..").hexdigest()[:16]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "all", "base"]
    assert all((lora.path / "adapter_config.json").is_file() for lora in loras)


def test_the_loras_of_all_tasks_have_one_rank_and_no_patterns_unless_trimmed(tmp_path: Path) -> None:
    one = {"layers_to_transform": [0], "exclude_modules": ["v_proj", "down_proj"]}
    model, adapter = trained(tmp_path, MORE, "llama", **one)
    chosen = [m.ranks() for m in model.modules() if isinstance(m, MoRE)]
    largest = {task: max(int(r[i]) for r in chosen) for i, task in enumerate(adapter.task_names)}
    assert len(set(largest.values())) > 1
    for lora in export_all(adapter, tmp_path / "all"):
        config = LoraConfig.from_pretrained(lora.path)
        assert (config.r, config.lora_alpha, config.rank_pattern) == (*[max(largest.values())] * 2, {})
        weights = load_file(lora.path / "adapter_model.safetensors")
        assert {min(value.shape) for value in weights.values()} == {config.r}
    trimmed = export_all(adapter, tmp_path / "trimmed", trim=True)
    assert {lora.task: lora.rank for lora in trimmed} == largest


def test_target_modules_given_as_a_regular_expression_become_a_list_of_names(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = MORE.config(target_modules=r".*layers\.1\..*\.q_proj", task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    lora = export(SavedAdapter.read(tmp_path / "adapter"), tmp_path / "out", task="rte")
    assert LoraConfig.from_pretrained(lora.path).target_modules == {"model.layers.1.self_attn.q_proj"}
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora.path)
    assert [n for n, _ in again.named_modules() if n.endswith("lora_A")] == [
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A"
    ]


def test_what_a_check_refuses_is_not_written(tmp_path: Path) -> None:
    _, adapter = trained(tmp_path, MORE, "llama")
    seen: list[Any] = []

    def refuse(folders: Any) -> None:
        seen.append({task: sorted(p.name for p in folder.iterdir()) for task, folder in folders.items()})
        raise RunError("no")

    for write in (
        lambda: export(adapter, tmp_path / "out", task="rte", check=refuse),
        lambda: export_all(adapter, tmp_path / "out", check=refuse),
    ):
        with pytest.raises(RunError, match="no"):
            write()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    assert [list(folders) for folders in seen] == [["rte"], ["rte", "cola", "sst2"]]
    assert all("adapter_model.safetensors" in files for folders in seen for files in folders.values())


def test_the_card_says_where_a_lora_comes_from_and_needs_no_dyads(tmp_path: Path) -> None:
    _, adapter = trained(tmp_path, MORE, "llama")
    card = (export(adapter, tmp_path / "out", task="cola").path / "README.md").read_text()
    assert "base_model:" not in card, "a folder is no model of the hub"
    assert "| base model | `base`, a folder that is not on the hub |" in card
    assert "LoRA of a more adapter for task `cola`" in card
    assert f"| adapter | {tmp_path / 'adapter'} |" in card
    assert "import dyads" not in card


def commands(card: str) -> list[list[str]]:
    """The serve commands of a card, as a shell splits them."""
    return [shlex.split(line) for line in card.split("```sh\n")[1].split("```")[0].splitlines()]


def test_the_cards_serve_one_lora_or_all_from_their_folder(tmp_path: Path) -> None:
    _, adapter = trained(tmp_path, MORE, "llama", tasks=["rte", "a=b, c", "two words"])
    loras = export_all(adapter, tmp_path / "all")
    assert loras[0].rank <= 8
    vllm, sglang = commands((tmp_path / "all" / "README.md").read_text())
    base = "path/to/base"  # a folder, which has another place elsewhere
    assert vllm[:-3] == ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", "8", "--lora-modules"]
    assert vllm[-3:] == ["rte=rte", '{"name": "a=b, c", "path": "a=b, c"}', "two words=two words"]
    start = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora", "--lora-paths"]
    assert sglang == [*start, "rte=rte", '{"lora_name": "a=b, c", "lora_path": "a=b, c"}', "two words=two words"]
    assert all((tmp_path / "all" / name).is_dir() for name in ("rte", "a=b, c", "two words"))
    vllm, _ = commands((loras[2].path / "README.md").read_text())
    assert vllm[-1] == "two words=."


def test_a_card_has_no_serve_command_for_what_the_engines_refuse(tmp_path: Path) -> None:
    for kind, options in (
        ("bert", {}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"trainable_token_indices": [3]}),
    ):
        place = tmp_path / "-".join((kind, *options))
        _, adapter = trained(place, MORE, kind, **options)
        card = (export(adapter, place / "out", task="rte").path / "README.md").read_text()
        assert "vllm" not in card
    _, adapter = trained(tmp_path / "trim", MORE, "llama")
    assert "vllm" not in (export_all(adapter, tmp_path / "all", trim=True)[0].path.parent / "README.md").read_text()
    assert (
        serve_commands(LoraConfig(r=513, task_type="CAUSAL_LM", base_model_name_or_path="x"), {"a": "."})[0][0]
        == "SGLang"
    )


# --- factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("G", "k"),
    [
        (torch.diag(torch.tensor([1.0, 1, 0, 0, 0])), 2),
        (torch.zeros(3, 4), 0),
        (torch.arange(1.0, 13).view(3, 4).pow(2), 3),
        (torch.arange(1.0, 13).view(4, 3).pow(2), 3),
        (torch.ones(5, 5), 1),
        (torch.kron(torch.tensor([[0.1, 0.7]]).T @ torch.tensor([[0.1, 0.7]]), torch.eye(3)), 3),  # Poly's
        (torch.tensor([[0.0, 2, 0], [0, 3, 0]]), 1),
    ],
)
def test_factors_multiply_to_the_matrix_at_its_rank(G: Tensor, k: int) -> None:
    U, V = factors(G)
    assert (U.shape, V.shape) == ((len(G), k), (k, G.shape[1]))
    assert_close(U @ V, G)


def test_factors_of_gates_that_select_are_exact() -> None:
    G = torch.diag(torch.tensor([0.3, 0, 0.7]))
    U, V = factors(G)
    assert torch.equal(U @ V, G)
    tiny = torch.diag(torch.arange(1.0, 2001).div(2000).square())  # MoRE's linear scaling, below the rounding of fp32
    assert factors(tiny)[0].shape == (2000, 2000)
    assert set(V.unique().tolist()) == {0.0, 1.0}


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_gates_that_look_at_the_token_are_refused_with_the_reason_and_a_way_out(tmp_path: Path) -> None:
    _, adapter = trained(tmp_path, Variant("mode"), "llama")
    with pytest.raises(
        MergeError, match=r"\(mode\): its gates look at the layer's input, so no ordinary LoRA equals it"
    ):
        export(adapter, tmp_path / "out")
    with pytest.raises(MergeError, match=r"Load it with dyads .* or train a method whose gates look at"):
        export_all(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_unknown_or_needless_task_is_refused(tmp_path: Path) -> None:
    _, adapter = trained(tmp_path / "more", MORE, "llama")
    with pytest.raises(RoutingError, match=r"without a task: .* name one \(--task\), or use --all-tasks – known: rte"):
        export(adapter, tmp_path / "out")
    with pytest.raises(RoutingError, match="for task 'colla', which it does not know – did you mean 'cola'"):
        export(adapter, tmp_path / "out", task="colla")
    _, gateless = trained(tmp_path / "mode", Variant("mode", (("num_experts", 1),)), "llama")
    for refused in (
        lambda: export(gateless, tmp_path / "out", task="rte"),
        lambda: export_all(gateless, tmp_path / "out"),
    ):
        with pytest.raises(
            RoutingError, match="its gates do not look at it, and one LoRA is for all tasks; leave --task and --all"
        ):
            refused()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    _, adapter = trained(tmp_path, MORE, "llama")
    with pytest.raises(RunError, match=r"base' is not empty; choose another --out"):
        export(adapter, tmp_path / "base", task="rte")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file' is a file; choose another --out"):
        export(adapter, tmp_path / "file", task="rte")
    (tmp_path / "empty").mkdir()
    export(adapter, tmp_path / "empty", task="rte")
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]


def test_the_same_export_again_changes_nothing_and_another_is_refused(tmp_path: Path) -> None:
    _, adapter = trained(tmp_path, MORE, "llama")
    for again in (False, True):
        export(adapter, tmp_path / "out", task="rte")
        if not again:
            (tmp_path / "out" / "README.md").write_text("edited")
    assert (tmp_path / "out" / "README.md").read_text() == "edited"
    export_all(adapter, tmp_path / "all")
    export_all(adapter, tmp_path / "all")
    for refused in (
        lambda: export(adapter, tmp_path / "out", task="cola"),
        lambda: export(adapter, tmp_path / "all", task="rte"),
        lambda: export_all(adapter, tmp_path / "out"),
    ):
        with pytest.raises(RunError, match="is not empty; choose another --out"):
            refused()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_pefts_own_lora_is_refused(tmp_path: Path, mlp: Callable[[], Any]) -> None:
    get_peft_model(mlp(), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(RunError, match="it is already an ordinary PEFT LoRA; use that folder itself"):
        export(SavedAdapter.read(tmp_path / "lora"), tmp_path / "out")

# SPDX-License-Identifier: Apache-2.0
"""Does the benchmark measure, refuse wrong results, and say what it found?"""

from __future__ import annotations

import json
import platform
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from benchmarks.__main__ import environment, main
from benchmarks.bars import BARS, TRIED, Bar
from benchmarks.contenders import SETTINGS, TINY
from benchmarks.gate import OPERATORS, GateError, check
from benchmarks.measure import Bench
from benchmarks.rounds import ROOT, Worker, WorkerError, child_environment, measure_group, rotated
from click.testing import CliRunner

from benchmarks import page, profile, startup
from dyads.methods import methods
from dyads.tuner.layer import DyadsLayer

MODE = {"mode-16x4": TINY.contenders["mode-16x4"]}


def silent(text: str) -> None:
    pass


def result(part: str, facts: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    settings: dict[str, Any] = {"attention": None}
    return {
        "part": part,
        "group": "main",
        "settings": settings,
        "facts": facts,
        "rounds": rounds,
        "errors": {},
        "environment": environment(),
    }


def test_right_results_pass_the_gate() -> None:
    check(MODE, dtype="bfloat16", width=16, say=silent)


@pytest.mark.parametrize("factor", [1.1, float("nan")])
@pytest.mark.parametrize("name", ["dyadic", "fused"])
def test_the_gate_refuses_a_wrong_operator(monkeypatch: pytest.MonkeyPatch, name: str, factor: float) -> None:
    right = OPERATORS[name]
    monkeypatch.setitem(OPERATORS, name, lambda *args, **kwargs: right(*args, **kwargs) * factor)
    with pytest.raises(GateError, match=rf"mode-16x4, {name} of shape .*: the output differs by"):
        check(MODE, dtype="float32", width=16, say=silent)


class Doubled(torch.autograd.Function):
    """The right value, twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


def test_a_wrong_gradient_in_a_layer_leaves_no_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = DyadsLayer.forward
    monkeypatch.setattr(DyadsLayer, "forward", lambda self, x: Doubled.apply(right(self, x)))
    done = CliRunner().invoke(main, ["--quick", "--setting", "tiny", "--only", "mode-16x4", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "nothing is measured, because a result is wrong – mode-16x4, one layer: gradient" in done.output
    assert {path.name for path in tmp_path.rglob("*.json")} <= {"config.json"}


def test_a_wrong_path_of_decoding_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DyadsLayer.forward

    def broken(self: DyadsLayer, x: torch.Tensor) -> torch.Tensor:
        return right(self, x) if torch.is_grad_enabled() else right(self, x).flip(0)

    monkeypatch.setattr(DyadsLayer, "forward", broken)
    with pytest.raises(GateError, match="without gradients"):
        check(MODE, dtype="float32", width=16, say=silent)


def test_how_an_adapter_is_loaded_is_no_option_of_its_method() -> None:
    loaded = replace(MODE["mode-16x4"], options={**MODE["mode-16x4"].options, "autocast_adapter_dtype": False})
    said: list[str] = []
    check({**MODE, "in bf16": loaded}, dtype="bfloat16", width=16, say=said.append)
    assert [line.partition(":")[0] for line in said[:-1]] == ["mode-16x4"]  # the same sizes are looked at once


def test_adapters_in_half_precision_and_merged_weights_are_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = replace(MODE["mode-16x4"], options={**MODE["mode-16x4"].options, "autocast_adapter_dtype": False})
    right = DyadsLayer.forward

    def wrong(self: DyadsLayer, x: torch.Tensor) -> torch.Tensor:
        y = right(self, x)
        return y * 1.2 if self.dyads_A["default"].dtype == torch.bfloat16 else y

    monkeypatch.setattr(DyadsLayer, "forward", wrong)
    check(MODE, dtype="bfloat16", width=16, say=silent)
    with pytest.raises(GateError, match="in bf16, one layer: the output differs"):
        check({**MODE, "in bf16": loaded}, dtype="bfloat16", width=16, say=silent)
    monkeypatch.undo()
    delta = DyadsLayer.get_delta_weight
    merged = {"more-merged": replace(TINY.contenders["more-merged"], options={"num_tasks": 8, "r": 4, "merged": True})}
    check(merged, dtype="float32", width=16, say=silent)
    monkeypatch.setattr(DyadsLayer, "get_delta_weight", lambda self, adapter: delta(self, adapter) * 1.1)
    with pytest.raises(GateError, match="more-merged, merged: the output differs"):
        check(merged, dtype="float32", width=16, say=silent)


def test_contenders_and_bars_name_each_other() -> None:
    for setting in SETTINGS.values():
        named = {name for names in setting.groups.values() for name in names}
        assert named == set(setting.contenders)
        for names in setting.groups.values():
            assert names[0] == setting.reference
            assert len(names) <= 6, "more processes than memory"
    for bar in BARS:
        if bar.part in SETTINGS:
            sides = {bar.top, bar.bottom}
            assert any(sides <= set(names) for names in SETTINGS[bar.part].groups.values()), bar.what


def test_every_method_is_measured() -> None:
    built = {contender.builder for setting in SETTINGS.values() for contender in setting.contenders.values()}
    # HydraLoRA is a preset of MoLORA-SD, which is there.
    assert {method.key for method in methods()} - built == {"hydralora"}


def test_kept_bytes_are_counted_once_and_without_parameters(tmp_path: Path) -> None:
    bench = Bench(TINY, MODE["mode-16x4"], tmp_path)
    whole = bench.saved_bytes()
    assert whole == bench.saved_bytes()
    weights = [torch.randn(4, 3, requires_grad=True), torch.randn(4, 4)]
    x = torch.randn(5, 4)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(weights[0].detach())

    bench.model = Model()
    bench.loss = lambda: ((x.t() @ (x @ bench.model.weight)) ** 2).sum()  # type: ignore[method-assign]
    # x once although two products keep it, the squared result, and not the weight
    assert bench.saved_bytes() == 4 * (x.numel() + 4 * 3)


def test_every_contender_is_asked_in_a_rotating_order() -> None:
    assert [rotated("abc", i) for i in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


@pytest.mark.slow
def test_a_quick_run_through_real_processes(tmp_path: Path) -> None:
    arguments = ["--quick", "--setting", "tiny", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, [*arguments, "--write-docs"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / "quick").glob("*.json")}
    assert set(written) == {"tiny-main.json", "tiny-rivals.json"}
    for name, group in written.items():
        assert group["errors"] == {}, name
        names = TINY.groups[group["group"]]
        assert set(group["facts"]) == set(names)
        for contender in names:
            asked = TINY.contenders[contender].questions
            assert all(group["rounds"][0][question][contender] > 0 for question in asked)
            assert group["facts"][contender]["peak"] > 1e7
    assert "| MoDE 4×2 |" not in (tmp_path / "quick" / "benchmarks.md").read_text()  # nobody should quote it
    again = CliRunner().invoke(main, [*arguments, "--resume"], catch_exceptions=False)
    assert "tiny, group main: kept" in again.output


@pytest.mark.slow
def test_a_contender_that_fails_is_told_and_does_not_stop_the_others(tmp_path: Path) -> None:
    contenders = {"frozen": TINY.contenders["frozen"], "lora": TINY.contenders["lora"]}  # lora has no size yet
    found = measure_group("tiny", TINY, contenders, rounds=1, out=tmp_path, logs=tmp_path, attention=None, say=silent)
    assert "KeyError: 'r'" in found["errors"]["lora"]
    assert found["rounds"][0]["forward"]["frozen"] > 0


def test_contenders_keep_their_memory_and_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = child_environment(2)
    assert found["MALLOC_TRIM_THRESHOLD_"] == "17179869184"
    assert found["OMP_NUM_THREADS"] == "2"
    assert found["HF_HUB_OFFLINE"] == "1"


class Echo:
    """In the place of a process: says what it was asked, and counts."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, module: str, job: dict[str, Any], threads: int, log: Path) -> None:
        self.name = log.stem

    def read(self) -> dict[str, Any]:
        return {"facts": {"parameters": 1}}

    def ask(self, question: str) -> dict[str, Any]:
        self.asked.append((question, self.name))
        return {"value": 1.0}

    def close(self) -> None:
        pass


def test_contenders_take_turns_and_long_questions_come_less_often(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.rounds.Worker", Echo)
    monkeypatch.setattr(Echo, "asked", [])
    setting = replace(TINY, every={"step": 1, "forward": 2})
    contenders = {name: TINY.contenders[name] for name in ("lora", "poly", "frozen")}  # no step of a frozen model
    found = measure_group(
        "tiny", setting, contenders, rounds=3, out=tmp_path, logs=tmp_path, attention=None, say=silent
    )
    assert [sorted(r) for r in found["rounds"]] == [["forward", "step"], ["step"], ["forward", "step"]]
    turns = {question: [name for asked, name in Echo.asked if asked == question] for question in ("step", "forward")}
    assert turns["step"] == ["lora", "poly", "poly", "lora", "lora", "poly"]
    assert turns["forward"] == ["lora", "poly", "frozen", "poly", "frozen", "lora"]
    assert [asked for asked, _ in Echo.asked] == ["step"] * 2 + ["forward"] * 3 + ["step"] * 4 + ["forward"] * 3
    written = page.asked([{"part": "tiny", "group": "main", **found}], "tiny")
    assert written == "rounds of steps 3, of forward passes 2, of decoding 0"


def test_processes_are_started_anew_but_for_those_that_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[str] = []
    alive: set[Mortal] = set()

    class Mortal(Echo):
        def __init__(self, module: str, job: dict[str, Any], threads: int, log: Path) -> None:
            super().__init__(module, job, threads, log)
            started.append(self.name)
            alive.add(self)

        def ask(self, question: str) -> dict[str, Any]:
            if self.name == "poly" and started.count("poly") == 2:
                raise WorkerError("tired")
            return super().ask(question)

        def close(self) -> None:
            alive.remove(self)

    monkeypatch.setattr("benchmarks.rounds.Worker", Mortal)
    setting = replace(TINY, every={"step": 1}, lives=2)
    contenders = {name: TINY.contenders[name] for name in ("lora", "poly")}
    found = measure_group(
        "tiny", setting, contenders, rounds=5, out=tmp_path, logs=tmp_path, attention=None, say=silent
    )
    assert started == ["lora", "poly", "lora", "poly", "lora"]
    assert not alive
    assert [sorted(r["step"]) for r in found["rounds"]] == [["lora", "poly"]] * 2 + [["lora"]] * 3
    assert found["errors"] == {"poly": "tired"}
    assert set(found["facts"]) == {"lora", "poly"}


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [{"step": {"mode-16x4": 1.0 * slow, "lora": 2.0 * slow}} for slow in (1, 5, 9)]
    facts = {"mode-16x4": {"saved": 30}, "lora": {"saved": 40}}
    found = [result("smollm2", facts, rounds)]
    assert page.spread(found, "smollm2", "step", "mode-16x4", "lora") == page.Spread(0.5, 0.5, 0.5, 3)
    assert page.spread(found, "smollm2", "saved", "mode-16x4", "lora") == page.Spread(0.75, 0.75, 0.75, 1)
    assert page.spread(found, "smollm2", "step", "poly", "lora") is None
    assert page.verdict(Bar("", "smollm2", "step", "mode-16x4", "lora", 0.5), found)[1] == "met"
    assert page.verdict(Bar("", "smollm2", "step", "mode-16x4", "lora", 0.4), found)[1] == "not met"
    assert page.verdict(Bar("", "smollm2", "step", "mode-16x4", "lora", 0.6, False), found)[1] == "not met"
    assert page.verdict(BARS[-1], found)[1] == "not measured"


def test_the_page_has_tables_and_verdicts_and_names_no_machine() -> None:
    facts = {n: {"label": n, "options": {}, "parameters": 9, "saved": 8, "peak": 10**9} for n in ("lora", "mode-16x4")}
    rounds = [{"step": {"lora": 2.0, "mode-16x4": 1.8}, "decode": {"lora": 100.0, "mode-16x4": 90.0}}]
    text = page.to_markdown([result("smollm2", facts, rounds)])
    assert "| training step: MoDE 16×4 ÷ PEFT LoRA, fp32 adapters | ≤ 0.95 | 0.90 | met |" in text
    assert "| decoding: MoDE 16×4 ÷ PEFT LoRA, tokens/s | ≥ 0.95 | 0.90 | not met |" in text
    assert "| MoDE 16×4 | 9 | 0.90 | – | 0.90 | 1.00 | – |" in text
    assert "1.00 is PEFT LoRA, equal parameters (r=66): 2.000 s a step, 100 tokens/s" in text
    assert "rounds of steps 1, of forward passes 0, of decoding 1" in text
    assert f"*{BARS[13].what}.* {TRIED['decode', 'lora']}" in text
    assert TRIED["step", "poly"] not in text  # it was not measured
    assert platform.node() not in text


def test_what_was_tried_stands_where_a_bar_is_not_met_and_only_there() -> None:
    assert set(TRIED) <= {(bar.question, bar.bottom) for bar in BARS}
    log = " ".join((ROOT / "LOG.md").read_text(encoding="utf-8").split())
    for text in TRIED.values():
        gone = [number for number in re.findall(r"\d+(?:[.,]\d+)+|\d{3,}", text) if number not in log]
        assert not gone, text
    slow = [{"step": {"molora-8x8": 1.2, "mode": 1.1, "poly": 1.0, "lora": 1.3}}]
    facts = {n: {"label": n, "options": {}, "parameters": 9, "saved": 8, "peak": 1} for n in slow[0]["step"]}
    (both,) = page.tried([result("llama", facts, slow)])
    assert both == (
        "training step: MoLORA 8×8 ÷ PEFT Poly; training step: MoDE ÷ PEFT Poly",
        TRIED["step", "poly"],
    )
    slow[0]["step"]["poly"] = 2.0
    assert page.tried([result("llama", facts, slow)]) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_contender_that_the_system_ends_does_not_blame_its_last_warning(tmp_path: Path) -> None:
    worker = Worker("benchmarks.measure", {}, 1, tmp_path / "log")
    worker.process.kill()
    (tmp_path / "log").write_text("warnings.warn(\n")
    with pytest.raises(WorkerError, match=r"^the system ended it \(signal 9\), as it does where memory runs out$"):
        worker.read()
    worker.close()


class Event:
    def __init__(self, key: str, microseconds: float) -> None:
        self.key, self.self_cpu_time_total = key, microseconds


def test_a_profile_counts_all_work_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["aten::mm", "aten::addmm_", "aten::_softmax", "aten::copy_", "aten::mul", "_FusedBackward"]
    names += ["aten::_scaled_dot_product_flash_attention_for_cpu"]

    class Seen:
        def __init__(self, **options: Any) -> None:
            pass

        def __enter__(self) -> Seen:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def key_averages(self) -> list[Event]:
            return [Event(name, 2000.0 * 2**i) for i, name in enumerate(names)]

    monkeypatch.setattr(profile, "profile", Seen)
    ran: list[int] = []
    found = profile.split(lambda: ran.append(1) or 0.0, repeats=2)
    assert len(ran) == 2
    assert found == {
        "matrix products": 3.0,
        "softmax": 4.0,
        "copies and casts": 8.0,
        "element by element": 16.0,
        "Python and autograd": 32.0,
        "attention": 64.0,
    }
    # Two steps in 400 ms are 200 ms each; the 127 ms above that operations do not account for are Python's.
    clock = iter([1.0, 1.4])
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(clock))
    found = profile.split(lambda: 0.0, repeats=2)
    assert found["Python and autograd"] == pytest.approx(32.0 + 200 - 127)
    assert sum(found.values()) == pytest.approx(200)


def test_the_floor_counts_the_products_that_an_adapter_cannot_do_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = Bench(TINY, MODE["mode-16x4"], tmp_path)
    core = next(m for m in bench.model.modules() if isinstance(m, DyadsLayer)).core("default")
    W = core.router_rows()
    assert W is not None
    rows = (core.p + len(W), core.q)
    # Two layers of q (32 → 32) and v (32 → 16); what comes into the first ones wants no gradient.
    assert profile.shapes(bench) == {(32, o, *rows, wanted): 1 for o in (32, 16) for wanted in (False, True)}
    monkeypatch.setattr(profile, "_seconds", lambda product: 1.0)
    assert profile.products(bench, 16, torch.float32) == 2 * 5 + 2 * 6
    assert profile.products(bench, 16, torch.float32, backward=False) == 4 * 2
    # The prompts at once, then a token at a time: the last one that is generated is never read.
    assert profile.products_of_decoding(bench) == 8 + (TINY.new_tokens - 1) * 8
    frozen = Bench(TINY, TINY.contenders["frozen"], tmp_path)
    assert profile.products(frozen, 16, torch.float32) is None


def test_the_frozen_step_has_gradients_just_as_far_down_as_adapters(tmp_path: Path) -> None:
    step = profile.FrozenStep(TINY, tmp_path)
    asked: dict[str, bool] = {}
    for name, module in step.bench.model.named_modules():
        if name.endswith(("q_proj", "v_proj", "input_layernorm")):
            module.register_forward_pre_hook(
                lambda module, args, name=name: asked.update({name: args[0].requires_grad})
            )
    assert step() > 0
    assert asked == {
        f"model.layers.{i}.{part}": i > 0
        for i in (0, 1)
        for part in ("input_layernorm", "self_attn.q_proj", "self_attn.v_proj")
    }


def test_the_floor_of_an_adapter_is_taken_within_a_round() -> None:
    facts = {
        n: {"label": n, "split": dict.fromkeys(profile.KINDS, 1.0), "products": 0.5} for n in ("lora-bf16", "mode-16x4")
    }
    facts["frozen"] = {"label": "frozen", "split": dict.fromkeys(profile.KINDS, 1.0)}
    rounds = [{"step": {"lora-bf16": 2.0 * s, "mode-16x4": 3.0 * s, "frozen": 1.5 * s}} for s in (1.0, 1.0)]
    rows = page.profiles([{"part": "profile", "group": "smollm2", "facts": facts, "rounds": rounds, "errors": {}}])
    assert rows["smollm2"][1][:5] == ("mode-16x4", "3,000", "1.50 (1.50–1.50)", "500", "1.00 (1.00–1.00)")
    assert rows["smollm2"][2][3:5] == ("–", "–")


def test_startup_is_measured_in_fresh_processes() -> None:
    found = startup.measure(1)
    assert set(found["rounds"][0]["seconds"]) == {"help", "import"}
    assert found["facts"]["import"]["heavy"] == 0

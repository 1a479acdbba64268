# SPDX-License-Identifier: Apache-2.0
"""Tests of the benchmark: its gate, its measurements, its plan and its page."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from benchmarks.__main__ import DOCS, RESULTS, main
from benchmarks.bars import BARS, Bar
from benchmarks.contenders import SETTINGS, TINY
from benchmarks.counted import COUNTED
from benchmarks.environment import MEASURED, commit, cpu, environment
from benchmarks.gate import OPERATORS, GateError, check
from benchmarks.measure import Bench
from benchmarks.plan import Job, estimate, groups_with_bars, plan
from benchmarks.rounds import ROOT, Worker, WorkerError, child_environment, measure_group, metrics_of, rotated
from click.testing import CliRunner

from benchmarks import on_gpu, page, profile, startup
from dyads.methods import methods
from dyads.tuner.layer import DyadsLinear

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
    right = DyadsLinear.forward
    monkeypatch.setattr(DyadsLinear, "forward", lambda self, x: Doubled.apply(right(self, x)))
    done = CliRunner().invoke(main, ["--quick", "--setting", "tiny", "--only", "mode-16x4", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "nothing is measured, because a result is wrong – mode-16x4, one layer: gradient" in done.output
    assert {path.name for path in tmp_path.rglob("*.json")} <= {"config.json"}


def test_a_wrong_path_of_decoding_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DyadsLinear.forward

    def broken(self: DyadsLinear, x: torch.Tensor) -> torch.Tensor:
        return right(self, x) if torch.is_grad_enabled() else right(self, x).flip(0)

    monkeypatch.setattr(DyadsLinear, "forward", broken)
    with pytest.raises(GateError, match="without gradients"):
        check(MODE, dtype="float32", width=16, say=silent)


def test_a_contender_with_the_same_options_is_compared_in_its_own_dtype_only() -> None:
    loaded = replace(MODE["mode-16x4"], options={**MODE["mode-16x4"].options, "autocast_adapter_dtype": False})
    said: list[str] = []
    check({**MODE, "in bf16": loaded}, dtype="bfloat16", width=16, say=said.append)
    assert [line.partition(":")[0] for line in said[:-1]] == ["mode-16x4"]


def test_adapters_in_half_precision_and_merged_weights_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = replace(MODE["mode-16x4"], options={**MODE["mode-16x4"].options, "autocast_adapter_dtype": False})
    right = DyadsLinear.forward

    def wrong(self: DyadsLinear, x: torch.Tensor) -> torch.Tensor:
        y = right(self, x)
        trained = next(parameter for parameter in self.parameters() if parameter.requires_grad)
        return y * 1.2 if trained.dtype == torch.bfloat16 else y

    monkeypatch.setattr(DyadsLinear, "forward", wrong)
    check(MODE, dtype="bfloat16", width=16, say=silent)
    with pytest.raises(GateError, match="in bf16, one layer: the output differs"):
        check({**MODE, "in bf16": loaded}, dtype="bfloat16", width=16, say=silent)
    monkeypatch.undo()
    delta = DyadsLinear.get_delta_weight
    merged = {"more-merged": replace(TINY.contenders["more-merged"], options={"num_tasks": 8, "r": 4, "merged": True})}
    check(merged, dtype="float32", width=16, say=silent)
    monkeypatch.setattr(DyadsLinear, "get_delta_weight", lambda self, adapter: delta(self, adapter) * 1.1)
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
    missing = {method.key for method in methods()} - built - {"hydralora"}  # a preset of MoLORA-SD, which is there
    assert not missing, f"no contender has the method {missing}: add one to benchmarks/contenders.py"


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


def test_contenders_take_turns_in_a_rotating_order() -> None:
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
            metrics = metrics_of(contender, TINY, {n: TINY.contenders[n] for n in names})
            assert all(group["rounds"][0][metric][contender] > 0 for metric in metrics)
            assert group["facts"][contender]["peak"] > 1e7
    assert "| MoDE 4x2 |" not in (tmp_path / "quick" / "benchmarks.md").read_text()  # its numbers mean nothing
    again = CliRunner().invoke(main, [*arguments, "--resume"], catch_exceptions=False)
    assert "tiny, group main: kept" in again.output


@pytest.mark.slow
def test_a_contender_that_fails_is_reported_and_does_not_stop_the_others(tmp_path: Path) -> None:
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
    """A stand-in for a process, which records its requests."""

    requests: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, module: str, job: dict[str, Any], threads: int, log: Path) -> None:
        self.name = log.stem

    def read(self) -> dict[str, Any]:
        return {"facts": {"parameters": 1}}

    def request(self, line: str) -> dict[str, Any]:
        self.requests.append((line, self.name))
        return {"value": 1.0}

    def close(self) -> None:
        pass


def test_every_metric_is_measured_once_a_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.rounds.Worker", Echo)
    monkeypatch.setattr(Echo, "requests", [])
    contenders = {name: TINY.contenders[name] for name in ("lora", "poly", "frozen")}  # no step of a frozen model
    contenders["poly"] = replace(contenders["poly"], metrics=("step", "forward"))
    contenders["frozen"] = replace(contenders["frozen"], metrics=("forward",))
    found = measure_group("tiny", TINY, contenders, rounds=3, out=tmp_path, logs=tmp_path, attention=None, say=silent)
    assert [sorted(r) for r in found["rounds"]] == [["forward", "step"]] * 3  # lora's decoding has no counterpart
    turns = {metric: [name for line, name in Echo.requests if line == metric] for metric in ("step", "forward")}
    assert turns["step"] == ["lora", "poly", "poly", "lora", "lora", "poly"]
    assert turns["forward"] == ["lora", "poly", "frozen", "poly", "frozen", "lora", "frozen", "lora", "poly"]
    assert page.rounds_of([{"part": "tiny", "group": "main", **found}], "tiny") == "rounds: 3 (main)"


def test_processes_are_started_anew_but_for_those_that_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[str] = []
    alive: set[Mortal] = set()

    class Mortal(Echo):
        def __init__(self, module: str, job: dict[str, Any], threads: int, log: Path) -> None:
            super().__init__(module, job, threads, log)
            started.append(self.name)
            alive.add(self)

        def request(self, line: str) -> dict[str, Any]:
            if self.name == "poly" and started.count("poly") == 2:
                raise WorkerError("out of memory")
            return super().request(line)

        def close(self) -> None:
            alive.remove(self)

    monkeypatch.setattr("benchmarks.rounds.Worker", Mortal)
    setting = replace(TINY, lives=2)
    contenders = {name: replace(TINY.contenders[name], metrics=("step",)) for name in ("lora", "poly")}
    found = measure_group(
        "tiny", setting, contenders, rounds=5, out=tmp_path, logs=tmp_path, attention=None, say=silent
    )
    assert started == ["lora", "poly", "lora", "poly", "lora"]
    assert not alive
    assert [sorted(r["step"]) for r in found["rounds"]] == [["lora", "poly"]] * 2 + [["lora"]] * 3
    assert found["errors"] == {"poly": "out of memory"}
    assert set(found["facts"]) == {"lora", "poly"}


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [{"step": {"mode-16x4": 1.0 * slow, "lora": 2.0 * slow}} for slow in (1, 5, 9)]
    facts = {"mode-16x4": {"saved": 30}, "lora": {"saved": 40}}
    found = [result("smollm2", facts, rounds)]
    step = page.spread(found, "smollm2", "step", "mode-16x4", "lora")
    assert step == page.Spread(0.5, 0.5, 0.5, 3, is_ratio=True)
    assert page.spread(found, "smollm2", "saved", "mode-16x4", "lora") == page.Spread.of_fact(0.75)
    assert page.spread(found, "smollm2", "step", "poly", "lora") is None
    assert page.verdict(Bar("", "smollm2", "step", "mode-16x4", "lora", 0.5), found)[1] == "met"
    assert page.verdict(Bar("", "smollm2", "step", "mode-16x4", "lora", 0.4), found)[1] == "not met"
    assert page.verdict(Bar("", "smollm2", "step", "mode-16x4", "lora", 0.6, False), found)[1] == "not met"
    assert page.verdict(BARS[-1], found)[1] == "not measured"


def test_a_ratio_with_wide_quartiles_is_not_settled() -> None:
    def of(*ratios: float) -> page.Spread:
        rounds = [{"step": {"mode-16x4": ratio, "lora": 1.0}} for ratio in ratios]
        found = page.spread([result("smollm2", {}, rounds)], "smollm2", "step", "mode-16x4", "lora")
        assert found is not None
        return found

    assert of(0.875, 0.875, 1.0, 1.125, 1.125).text() == "1.00 (0.88–1.12)"  # exactly a quarter
    assert of(0.87, 0.87, 1.0, 1.125, 1.125).text() == "not settled"
    assert of(3.5, 5.8, 8.2).text() == "not settled"
    assert of(1.0, 1.0).text() == "not settled"  # two rounds have no quartiles to speak of
    wide = [result("smollm2", {}, [{"step": {"mode-16x4": r, "lora": 1.0}} for r in (0.1, 0.5, 0.9)])]
    found, said = page.verdict(Bar("", "smollm2", "step", "mode-16x4", "lora", 9.0), wide)
    assert (said, found and found.text()) == ("not settled", "not settled")
    # A value that is no ratio may spread: it is a time, not a claim. Nor has a ratio of facts any rounds.
    assert page.Spread.of([1.0, 2.0, 9.0]).text() == "2.00 (1.50–5.50)"
    assert page.Spread.of_fact(0.75).text() == "0.75"


def test_a_bar_may_have_another_limit_on_a_processor_with_amx() -> None:
    (bar,) = [bar for bar in BARS if bar.limit_with_amx is not None]
    found = [result("smollm2", {}, [{"step": {"mode-16x4": 1.0, "lora": 1.0}}] * 3)]
    for processor, bound, verdict in (("AMD (avx512f)", "≤ 1.05", "met"), ("Intel (amx_bf16)", "≤ 0.95", "not met")):
        found[0]["environment"]["cpu"] = processor
        assert (bar.what, bound, "1.00 (1.00–1.00)", verdict) in page.bars(found)


def test_the_page_has_tables_and_verdicts_and_names_commit_and_processor_but_no_machine() -> None:
    facts = {n: {"label": n, "options": {}, "parameters": 9, "saved": 8, "peak": 10**9} for n in ("lora", "mode-16x4")}
    rounds = [{"step": {"lora": 2.0, "mode-16x4": 1.8}, "decode": {"lora": 100.0, "mode-16x4": 80.0}}] * 3
    text = page.to_markdown([result("smollm2", facts, rounds)])
    bound = "0.95" if "amx" in cpu() else "1.05"
    assert f"| step: MoDE 16x4 ÷ PEFT LoRA, fp32 adapters | ≤ {bound} | 0.90 (0.90–0.90) | met |" in text
    assert "| decoding: MoDE 16x4 ÷ PEFT LoRA, tokens/s | ≥ 0.9 | 0.80 (0.80–0.80) | not met |" in text
    assert "| MoDE 16x4 | 9 | 0.90 (0.90–0.90) | – | 0.80 (0.80–0.80) | 1.00 | – |" in text
    assert "1.00 is PEFT LoRA, equal parameters (r=66): 2.000 s a step, 100 tokens/s" in text
    assert "rounds: 3 (main)" in text
    assert f"at commit {commit()} on {cpu()}" in text
    assert platform.node() not in text


def test_the_page_is_the_one_of_its_results_file() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert DOCS.read_text(encoding="utf-8") == page.to_markdown(results)
    assert page.to_json(results) == RESULTS.read_text(encoding="utf-8")


def test_the_results_file_names_no_folder() -> None:
    one = result("smollm2", {}, [])
    one["settings"]["out"] = "/a/folder"
    assert "/a/folder" not in page.to_json([one])
    assert json.loads(page.to_json([one, one])) == [{**one, "settings": {"attention": None}}] * 2


def test_a_bar_that_was_not_measured_is_not_on_the_page() -> None:
    text = page.to_markdown([result("startup", {}, [{"seconds": {"help": 0.1, "import": 0.1}}])])
    assert "| dyads --help, seconds | ≤ 0.5 | 0.10 | met |" in text
    assert "scoring" not in text.partition("## Bars")[2]


def test_results_of_two_commits_or_two_machines_are_not_mixed(tmp_path: Path) -> None:
    one, other = result("smollm2", {}, []), result("llama", {}, [])
    page.check_one_source([one, other])
    other["environment"]["commit"] = "0123abc"
    with pytest.raises(page.MixedError, match=r"commit 0123abc on .*Measure again with --resume"):
        page.to_markdown([one, other])
    other["environment"] = {**one["environment"], "cpu": "another one"}
    with pytest.raises(page.MixedError, match=r"llama-main\.json: commit .* on another one"):
        page.check_one_source([one, other])
    folder = tmp_path / commit()
    folder.mkdir()
    for found in (one, other):
        (folder / f"{found['part']}-main.json").write_text(json.dumps(found))
    done = CliRunner().invoke(main, ["--tables", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "results of different commits or machines do not go into one table" in " ".join(done.output.split())


def test_only_results_of_the_same_commit_and_settings_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[int] = []

    def startup_of(rounds: int) -> dict[str, Any]:
        measured.append(rounds)
        return {"facts": {"help": {"label": "help"}}, "rounds": [{"seconds": {"help": 0.1}}] * rounds, "errors": {}}

    monkeypatch.setattr(startup, "measure", startup_of)

    def run(rounds: int = 2) -> str:
        arguments = ["--setting", "startup", "--rounds", str(rounds), "--resume", "--out", str(tmp_path)]
        return CliRunner().invoke(main, arguments, catch_exceptions=False).output

    run()
    assert "startup, group all: kept" in run()
    assert measured == [2]
    run(rounds=3)
    assert measured == [2, 3]
    for module in ("__main__", "environment"):
        monkeypatch.setattr(f"benchmarks.{module}.commit", lambda: "0123abc")
    run(rounds=3)
    assert measured == [2, 3, 3]
    assert (tmp_path / "0123abc" / "startup-all.json").is_file()


def test_only_code_that_measures_makes_another_commit() -> None:
    listed = subprocess.run(["git", "ls-files", "--", *MEASURED], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    files = set(listed.stdout.split())
    assert {"benchmarks/measure.py", "src/dyads/__init__.py"} <= files
    assert not files & {"benchmarks/page.py", "benchmarks/bars.py", "docs/benchmarks.md"}


def test_the_page_is_not_written_from_uncommitted_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.__main__.is_committed", lambda: False)
    done = CliRunner().invoke(main, ["--tables", "--write-docs", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "commit the changes in src/dyads and benchmarks first" in " ".join(done.output.replace("│", "").split())


def test_groups_with_bars_come_first_and_get_more_rounds() -> None:
    assert groups_with_bars("smollm2") == {"main", "growth"}
    assert groups_with_bars("llama") == {"main"}
    jobs = plan(("llama", "startup", "training"), rounds=12, other_rounds=3, profiles=())
    assert [(job.part, job.group, job.rounds) for job in jobs] == [
        ("llama", "main", 12),
        ("startup", "all", 12),
        ("training", "main", 12),
        ("llama", "family", 3),
        ("llama", "rivals", 3),
        ("llama", "relatives", 3),
        ("llama", "newer", 3),
        ("training", "others", 3),
    ]
    whole = plan(tuple(SETTINGS), rounds=12, other_rounds=3, profiles=())
    assert {(job.part, job.group) for job in whole} == {(p, g) for p, s in SETTINGS.items() for g in s.groups}


def test_an_estimate_has_every_start_and_every_round() -> None:
    seconds = {"start": 10, "step": 1, "forward": 0, "decode": 0}
    setting = replace(TINY, lives=8, seconds=seconds)
    contenders = {name: setting.contenders[name] for name in ("lora", "xlora")}  # one that is five times as slow
    # The gate for one; two starts of each, with two rounds to warm up; twelve rounds.
    assert estimate(setting, contenders, 12) == 4 + 2 * (10 + 2) + 2 * (10 + 2 * 5) + 12 * (1 + 5)


def test_the_reference_is_measured_only_where_there_is_something_to_compare() -> None:
    contenders = {name: SETTINGS["smollm2"].contenders[name] for name in ("lora", "mode-4x4")}
    assert metrics_of("lora", SETTINGS["smollm2"], contenders) == ("step",)
    assert metrics_of("lora", SETTINGS["smollm2"], {"lora": contenders["lora"]}) == ("step", "forward", "decode")


def test_the_plan_is_shown_first_and_groups_that_do_not_fit_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[str] = []
    monkeypatch.setattr("benchmarks.__main__.Measurement.__call__", lambda self, job, names: measured.append(job.group))
    jobs = [Job("startup", "short", 1, True, 30.0), Job("startup", "long", 1, False, 90.0)]
    monkeypatch.setattr("benchmarks.__main__.plan", lambda parts, **options: jobs)
    done = CliRunner().invoke(main, ["--minutes", "1", "--out", str(tmp_path)], catch_exceptions=False)
    assert measured == ["short"]
    assert "2 minutes, 0 of them for groups with a bar" in " ".join(done.output.split())
    assert "startup, group long: left out, as it would end after 1 minutes" in " ".join(done.output.split())
    measured.clear()
    CliRunner().invoke(main, ["--plan", "--out", str(tmp_path)], catch_exceptions=False)
    assert measured == []


def test_counted_rows_have_ratios_to_lora_of_the_same_dtype() -> None:
    counts = {"lora": (18, 3e9), "lora-bf16": (13, 1.5e9), "mode-8x4": (27, 0.9e9), "mode-8x4-bf16": (26, 0.75e9)}
    facts = {n: {"label": n, "parameters": 9, "launches": k, "bytes": b} for n, (k, b) in counts.items()}
    facts["lora"]["compiled"], facts["mode-8x4"]["compiled"] = 12, 15
    found = [result("counted", facts, [])]
    assert page.counted_rows(found) == [
        ("lora", "9", "18 (1.00)", "3.00 (1.00)", "12 (1.00)", "13 (1.00)", "1.50 (1.00)", "–"),
        ("mode-8x4", "9", "27 (1.50)", "0.90 (0.30)", "15 (1.25)", "26 (2.00)", "0.75 (0.50)", "–"),
    ]
    assert "| launches: MoDE 8x4 ÷ PEFT LoRA, fp32 adapters | ≤ 1.3 | 1.500 | not met |" in page.to_markdown(found)
    assert "Counted, not timed" in page.to_markdown(found)


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
    core = next(m for m in bench.model.modules() if isinstance(m, DyadsLinear)).core("default")
    W = core.router_weight()
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
    wants_gradient: dict[str, bool] = {}
    for name, module in step.bench.model.named_modules():
        if name.endswith(("q_proj", "v_proj", "input_layernorm")):
            module.register_forward_pre_hook(
                lambda module, args, name=name: wants_gradient.update({name: args[0].requires_grad})
            )
    assert step() > 0
    assert wants_gradient == {
        f"model.layers.{i}.{part}": i > 0
        for i in (0, 1)
        for part in ("input_layernorm", "self_attn.q_proj", "self_attn.v_proj")
    }


def test_the_floor_of_an_adapter_is_taken_within_a_round() -> None:
    facts = {
        n: {"label": n, "split": dict.fromkeys(profile.KINDS, 1.0), "products": 0.5} for n in ("lora-bf16", "mode-16x4")
    }
    facts["frozen"] = {"label": "frozen", "split": dict.fromkeys(profile.KINDS, 1.0)}
    rounds = [{"step": {"lora-bf16": 2.0 * s, "mode-16x4": 3.0 * s, "frozen": 1.5 * s}} for s in (1.0, 1.0, 1.0)]
    rows = page.profiles([{"part": "profile", "group": "smollm2", "facts": facts, "rounds": rounds, "errors": {}}])
    assert rows["smollm2"][1][:5] == ("mode-16x4", "3,000", "1.50 (1.50–1.50)", "500", "1.00 (1.00–1.00)")
    assert rows["smollm2"][2][3:5] == ("–", "–")


def test_startup_is_measured_in_fresh_processes() -> None:
    found = startup.measure(1)
    assert set(found["rounds"][0]["seconds"]) == {"help", "import"}
    assert found["facts"]["import"]["heavy"] == 0


def test_the_layers_that_a_gpu_would_time_run_on_a_cpu() -> None:
    result = CliRunner().invoke(on_gpu.main, ["--device=cpu", "--width=64", "--length=2", "--seconds=0.001"])
    assert result.exit_code == 0, result.output
    assert result.output.count("| bf16 |") == result.output.count("| fp32 |") == len(COUNTED)
    assert "| PEFT LoRA, equal parameters | fp32 |" in result.output

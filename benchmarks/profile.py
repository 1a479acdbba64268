# SPDX-License-Identifier: Apache-2.0
"""Profile: the time of a training step or of decoding by kind of work, beside a floor that no adapter can be below.

The *floor* of an adapter is the step of the frozen model, with gradients down to the first adapted layers, plus the
matrix products of an adapter of these shapes: two forward, four backward, timed alone. Above it lie gates, sums,
casts, copies, the optimizer and Python. Decoding has the forward products only.

`python -m benchmarks.profile JOB` measures the contenders of a setting interleaved in one process, and writes one line
of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import SETTINGS, Contender, Setting, resolved
from benchmarks.measure import Bench
from benchmarks.rounds import Worker, WorkerError


@dataclass(frozen=True)
class Profiled:
    """Contenders of a setting that are profiled at one metric, step or decode; ratios are taken to the first."""

    setting: str
    metric: str
    contenders: tuple[str, ...]


PROFILED = {
    "llama": Profiled("llama", "step", ("lora", "poly", "molora-8x8", "mode")),
    "smollm2": Profiled("smollm2", "step", ("lora-bf16", "mode-16x4")),
    "decoding": Profiled("smollm2", "decode", ("lora", "mode-16x4")),
}
NEW_TOKENS = 8  # where decoding is profiled: the profiler takes minutes for many small operations

KINDS = ("matrix products", "attention", "softmax", "copies and casts", "element by element", "Python and autograd")


def kind_of(operation: str) -> str:
    """The kind of work of an operation that the profiler names."""
    name = operation.removeprefix("aten::")
    if name == operation:
        return "Python and autograd"
    if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "addmv"):
        return "matrix products"
    if "scaled_dot_product" in name:
        return "attention"
    if "softmax" in name:
        return "softmax"
    return "copies and casts" if name in ("copy_", "cat", "fill_", "zero_", "clone") else "element by element"


def split(step: Callable[[], float], repeats: int = 2) -> dict[str, float]:
    """Milliseconds of a step by kind of work, as the profiler sees them (it slows small operations down).

    Time outside all operations counts as Python's; the profiler's own is in it.
    """
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        wall = (time.perf_counter() - begin) * 1e3 / repeats
    total = dict.fromkeys(KINDS, 0.0)
    for event in seen.key_averages():
        total[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / repeats
    total["Python and autograd"] += max(0.0, wall - sum(total.values()))
    return total


class FrozenStep:
    """Forward and backward of the frozen model, with gradients as far down as any adapter needs them.

    They begin at the outputs of the first adapted layers: their inputs need none.
    """

    def __init__(self, setting: Setting, out: Path) -> None:
        self.bench = Bench(setting, setting.contenders["frozen"], out)
        for name, module in self.bench.model.named_modules():
            if name.rpartition(".")[2] in setting.targets:
                module.register_forward_hook(
                    lambda module, args, out: out if out.requires_grad else out.requires_grad_()
                )

    def __call__(self) -> float:
        self.bench.model.train()
        begin = time.perf_counter()
        self.bench.loss().backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - begin


def shapes(bench: Bench) -> Counter[tuple[int, int, int, int, bool]]:
    """(d_in, d_out, rows of the product down, rows of the product up, whether the input wants a gradient) of every
    adapted layer, and how often."""
    from peft.tuners.lora import LoraLayer

    from dyads.tuner import DyadsLinear

    found: Counter[tuple[int, int, int, int, bool]] = Counter()

    def count(module: Any, args: tuple[Any, ...]) -> None:
        wanted = bool(args[0].requires_grad)
        if isinstance(module, DyadsLinear):
            core = module.core("default")
            R = core.router_weight()
            down = core.p + (0 if R is None or core.router_input == "h" else len(R))
            found[module.in_features, module.out_features, down, core.q, wanted] += 1
        else:
            r = module.r["default"]
            found[module.in_features, module.out_features, r, r, wanted] += 1

    adapted = [m for m in bench.model.modules() if isinstance(m, DyadsLinear | LoraLayer)]
    hooks = [module.register_forward_pre_hook(count) for module in adapted]
    bench.model.train()
    bench.loss()
    for hook in hooks:
        hook.remove()
    return found


def products(bench: Bench, tokens: int, dtype: torch.dtype, *, backward: bool = True) -> float | None:
    """Seconds of the products of every adapted layer, each timed alone; None for a model without such layers.

    They are two forward and four backward, or three where the input wants no gradient.
    """
    found = shapes(bench)
    if not found:
        return None
    total = 0.0
    for (d, o, p, q, wanted), times in found.items():
        x, dy = torch.randn(tokens, d, dtype=dtype), torch.randn(tokens, o, dtype=dtype)
        down, up = torch.randn(p, d, dtype=dtype), torch.randn(q, o, dtype=dtype)
        z, u = torch.randn(p, tokens, dtype=dtype), torch.randn(q, tokens, dtype=dtype)
        coefficients = torch.randn(tokens, q, dtype=dtype)
        six: list[Callable[[], Tensor]] = [
            lambda x=x, down=down: x @ down.t(),  # type: ignore[misc]
            lambda u=coefficients, up=up: u @ up,  # type: ignore[misc]
            lambda dy=dy, up=up: dy @ up.t(),  # type: ignore[misc]
            lambda u=u, dy=dy: u @ dy,  # type: ignore[misc]
            lambda z=z, x=x: z @ x,  # type: ignore[misc]
            lambda z=z, down=down: z.t() @ down,  # type: ignore[misc]
        ]
        needed = 2 if not backward else 6 if wanted else 5
        total += times * sum(_seconds(product) for product in six[:needed])
    return total


def products_of_decoding(bench: Bench) -> float | None:
    """Seconds of the forward products while one batch is answered: the prompts at once, then a token at a time.

    Few rows are multiplied in fp32, which a CPU does faster than half precision.
    """
    setting = bench.setting
    prompts = products(bench, setting.batch * setting.prompt, getattr(torch, setting.dtype), backward=False)
    token = products(bench, setting.batch, torch.float32, backward=False)
    return None if prompts is None or token is None else prompts + (setting.new_tokens - 1) * token


def _seconds(work: Callable[[], Any], repeats: int = 15) -> float:
    work()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def measure(name: str, rounds: int, out: Path) -> dict[str, Any]:
    """{facts, rounds}: split and products of every contender, and the seconds of every round."""
    profiled = PROFILED[name]
    setting = replace(SETTINGS[profiled.setting], new_tokens=NEW_TOKENS)
    found: dict[str, Contender] = resolved(setting, out, profiled.contenders)
    benches = {n: Bench(setting, contender, out) for n, contender in found.items()}
    decodes = profiled.metric == "decode"
    steps: dict[str, Callable[[], float]] = {n: _answer(b) if decodes else b.step for n, b in benches.items()}
    steps["frozen"] = (
        _answer(Bench(setting, setting.contenders["frozen"], out)) if decodes else FrozenStep(setting, out)
    )
    for step in steps.values():
        step()
        step()
    results = []
    for number in range(rounds):
        order = list(steps) if number % 2 else list(steps)[::-1]
        results.append({profiled.metric: {n: steps[n]() for n in order}})
    facts: dict[str, dict[str, Any]] = {
        n: {"split": split(step), "label": _label(setting, n, decodes)} for n, step in steps.items()
    }
    for n, bench in benches.items():
        tokens, dtype = setting.batch * setting.width, getattr(torch, setting.dtype)
        facts[n]["products"] = products_of_decoding(bench) if decodes else products(bench, tokens, dtype)
    return {"facts": facts, "rounds": results, "errors": {}}


def measure_apart(name: str, rounds: int, out: Path, logs: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """`measure` in a process of its own; {facts, rounds, errors}."""
    threads = SETTINGS[PROFILED[name].setting].threads
    job = {"name": name, "rounds": rounds, "out": str(out)}
    worker = Worker("benchmarks.profile", job, threads, logs / f"profile-{name}.log")
    try:
        return worker.read()
    except WorkerError as failed:
        say(f"profile of {name} failed: {failed}")
        return {"facts": {}, "rounds": [], "errors": {name: str(failed)}}
    finally:
        worker.close()


def _answer(bench: Bench) -> Callable[[], float]:
    """Seconds of answering one batch of prompts."""
    return lambda: bench.setting.batch * bench.setting.new_tokens / bench.decode()


def _label(setting: Setting, name: str, decodes: bool) -> str:
    with_gradients = name == "frozen" and not decodes
    return "frozen model, gradients to its first layers" if with_gradients else setting.contenders[name].label


def main() -> None:
    """Measure one profile."""
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(SETTINGS[PROFILED[job["name"]].setting].threads)
    print(json.dumps(measure(job["name"], job["rounds"], Path(job["out"]))), file=answers, flush=True)


if __name__ == "__main__":
    main()

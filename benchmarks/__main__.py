# SPDX-License-Identifier: Apache-2.0
"""What is measured, and where do the numbers go? The command line."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import counted, page, startup
from benchmarks.contenders import SETTINGS, Contender, Setting, resolved
from benchmarks.profile import PROFILED
from benchmarks.rounds import ROOT, Worker, WorkerError, measure_group, rotated
from benchmarks.scoring import LABELS as SCORING_LABELS
from benchmarks.training import LABELS as TRAINING_LABELS
from benchmarks.training import SNI

PARTS = ("counted", "smollm2", "llama", "profile", "training", "scoring", "startup", "tiny")
DOCS = ROOT / "docs" / "benchmarks.md"
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  python -m benchmarks --write-docs                  everything, and the page
  python -m benchmarks --setting llama --rounds 3
  python -m benchmarks --setting smollm2 --only mode-16x4,xlora
  python -m benchmarks --resume --write-docs         go on with what was cut off
  python -m benchmarks --tables --write-docs         only read what is there
  python -m benchmarks --quick                       does it run at all?""",
)
@click.option("--setting", "parts", multiple=True, type=click.Choice(PARTS), help="Default: all but tiny.")
@click.option("--rounds", type=click.IntRange(min=1), default=14, show_default=True)
@click.option("--run-rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Of training and scoring.")
@click.option("--only", metavar="NAMES", help="Contenders, comma-separated; results go to OUT/only.")
@click.option("--attention", type=click.Choice(["eager", "sdpa"]), help="Default: the setting's own, for all alike.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench"), show_default=True)
@click.option("--resume", is_flag=True, help="Keep groups measured with the same settings and code.")
@click.option("--quick", is_flag=True, help="A tiny model and one round; numbers mean nothing.")
@click.option("--tables", is_flag=True, help="Measure nothing; show what OUT holds.")
@click.option("--write-docs", is_flag=True, help=f"Write {DOCS.relative_to(ROOT)}.")
@click.option("--run", "scored", type=click.Path(exists=True, path_type=Path), help="The run that is scored.")
@click.option("--sni", type=click.Path(path_type=Path), default=SNI, show_default=True, help="Examples to train on.")
def main(
    parts: tuple[str, ...],
    rounds: int,
    run_rounds: int,
    only: str | None,
    attention: str | None,
    out: Path,
    resume: bool,
    quick: bool,
    tables: bool,
    write_docs: bool,
    scored: Path | None,
    sni: Path,
) -> None:
    """Measure dyads beside its rivals: PEFT's LoRA, Poly, MHR, X-LoRA and Arrow, and TRL's SFTTrainer.

    Step time, forward time, greedy decoding, bytes kept for backward, peak memory and trainable parameters; where a
    step's time goes; then whole training runs, scoring and start-up. TRL is needed for the part `training` only (`pip
    install trl`).
    """
    console = Console(width=None if os.isatty(1) else 100)

    def say(text: str) -> None:
        console.print(text, style="dim", markup=False, highlight=False)

    if only and write_docs:
        raise click.UsageError("--only measures a part of a table: it cannot be written to the docs")
    if quick:
        rounds, run_rounds = 1, 1
        out = out / "quick"
    chosen = parts or (("tiny", "startup") if quick else PARTS[:-1])
    if only:
        chosen, out = tuple(part for part in chosen if part in SETTINGS), out / "only"
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    keep = _Keeper(out, resume, say)
    if not tables:
        for part in chosen:
            if part in SETTINGS:
                _setting(part, keep, only=only, rounds=rounds, attention=attention, say=say)
            elif part == "counted":
                keep("counted", "all", {}, counted.measure)
            elif part == "profile":
                _profile(keep, rounds=rounds, say=say)
            elif part == "training":
                _gate({"mode-16x4": SETTINGS["smollm2"].contenders["mode-16x4"]}, dtype="bfloat16", width=576, say=say)
                _training(keep, rounds=run_rounds, quick=quick, sni=sni, attention=attention or "eager", say=say)
            elif part == "scoring":
                _scoring(keep, rounds=run_rounds, quick=quick, scored=scored, say=say)
            else:
                keep("startup", "all", {"rounds": rounds}, lambda: startup.measure(rounds))
    results = page.load(out)
    page.to_terminal(results, console)
    if write_docs and results:
        target = DOCS if not quick else out / DOCS.name
        target.write_text(page.to_markdown(results), encoding="utf-8")
        say(f"wrote {target}")


class _Keeper:
    """Keeps every group in a file of its own, and measures none twice where that was asked."""

    def __init__(self, out: Path, resume: bool, say: Callable[[str], None]) -> None:
        self.out, self.resume, self.say = out, resume, say

    def __call__(self, part: str, group: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        path = self.out / f"{part}-{group}.json"
        here = environment()
        facts = {name: here[name] for name in ("versions", "cpu", "compiler", "tiles")}
        settings = {**settings, "source": source(), **facts}
        settings = json.loads(json.dumps(settings))
        if self.resume and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == settings and not found["errors"]:
                self.say(f"{part}, group {group}: kept")
                return
        self.say(f"{part}, group {group}")
        begin = time.perf_counter()
        result = {
            "part": part,
            "group": group,
            "settings": settings,
            **measure(),
            "seconds": time.perf_counter() - begin,
            "environment": environment(),
        }
        partial = path.with_suffix(".unfinished")
        partial.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        partial.replace(path)


def _setting(
    part: str,
    keep: _Keeper,
    *,
    only: str | None,
    rounds: int,
    attention: str | None,
    say: Callable[[str], None],
) -> None:
    setting = SETTINGS[part]
    groups = dict(setting.groups)
    if only:
        given = [name.strip() for name in only.split(",")]
        if unknown := [name for name in given if name not in setting.contenders]:
            raise click.UsageError(f"{part} has no '{unknown[0]}'; there are {', '.join(setting.contenders)}")
        groups = {"only": tuple(dict.fromkeys((setting.reference, *given)))}
    wanted = list(dict.fromkeys(name for names in groups.values() for name in names))
    found = _checked(setting, keep, wanted, say)
    for group, names in groups.items():
        contenders = {name: found[name] for name in names}
        settings = {"rounds": rounds, "attention": attention, "contenders": {n: asdict(found[n]) for n in names}}

        def measure(contenders: Any = contenders, group: str = group) -> dict[str, Any]:
            logs = keep.out / "logs" / f"{part}-{group}"
            return measure_group(
                part, setting, contenders, rounds=rounds, out=keep.out, logs=logs, attention=attention, say=say
            )

        keep(part, group, settings, measure)


def _checked(setting: Setting, keep: _Keeper, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Contender]:
    """Contenders of a setting with their sizes, whose results are right."""
    found = resolved(setting, keep.out, names)
    _gate(found, dtype=setting.dtype, width=setting.config.get("hidden_size", 576), say=say)
    return found


def _gate(contenders: dict[str, Contender], *, dtype: str, width: int, say: Callable[[str], None]) -> None:
    """No numbers before the results are right."""
    from benchmarks.gate import GateError, check

    try:
        check(contenders, dtype=dtype, width=width, say=say)
    except GateError as error:
        raise click.ClickException(f"nothing is measured, because a result is wrong – {error}") from error


def _profile(keep: _Keeper, *, rounds: int, say: Callable[[str], None]) -> None:
    for name, profiled in PROFILED.items():
        setting = SETTINGS[profiled.setting]
        _checked(setting, keep, profiled.contenders, say)

        def measure(name: str = name, threads: int = setting.threads) -> dict[str, Any]:
            job = {"name": name, "rounds": rounds, "out": str(keep.out)}
            worker = Worker("benchmarks.profile", job, threads, _log(keep, f"profile-{name}"))
            try:
                return worker.read()
            except WorkerError as failed:
                say(f"profile of {name} failed: {failed}")
                return {"facts": {}, "rounds": [], "errors": {name: str(failed)}}
            finally:
                worker.close()

        keep("profile", name, {"rounds": rounds}, measure)


def _training(
    keep: _Keeper, *, rounds: int, quick: bool, sni: Path, attention: str, say: Callable[[str], None]
) -> None:
    job: dict[str, Any] = {
        "model": "packaged:smollm2-135m",
        "dtype": "bfloat16",
        "examples": 8 if quick else 64,
        "batch_size": 4 if quick else 16,
        "accumulation": 2,
        "max_prompt_tokens": 64 if quick else 384,
        "threads": 1 if quick else 2,
        "sni": str(sni),
        "attention": attention,  # of the dyads side; eager, as in the shipped recipes
        "quick": quick,
    }

    def measure() -> dict[str, Any]:
        facts: dict[str, Any] = {}
        errors: dict[str, str] = {}
        results = []
        for number in range(rounds):
            answers: dict[str, dict[str, float]] = {"examples": {}, "seconds": {}, "train_seconds": {}}
            for side in rotated(list(TRAINING_LABELS), number):
                if side in errors:
                    continue
                worker = Worker("benchmarks.training", {**job, "side": side}, job["threads"], _log(keep, side))
                try:
                    answer = worker.read()
                except WorkerError as failed:
                    errors[side] = str(failed)
                    say(f"{side} failed: {failed}")
                    continue
                finally:
                    worker.close()
                facts[side] = {k: answer[k] for k in ("parameters", "tokens", "family")}
                for question in ("seconds", "train_seconds"):
                    answers[question][side] = answer[question]
                answers["examples"][side] = answer["examples"] / answer["seconds"]
                say(f"{side}: {answers['examples'][side]:.2f} examples/s")
            results.append(answers)
        return {"facts": facts, "rounds": results, "errors": errors}

    keep("training", "all", {**job, "rounds": rounds}, measure)


def _scoring(keep: _Keeper, *, rounds: int, quick: bool, scored: Path | None, say: Callable[[str], None]) -> None:
    job: dict[str, Any] = {
        "model": "packaged:smollm2-135m",
        "dtype": "bfloat16",
        "steps": 2 if quick else 40,
        "run": str(scored.absolute()) if scored else None,
        "limit": 1 if quick else 8,
        "exact_limit": 1 if quick else 2,
        "batch_size": 4 if quick else 32,
        "new_tokens": 4 if quick else None,
        "threads": 1 if quick else 2,
        "out": str(keep.out),
        "quick": quick,
    }

    def measure() -> dict[str, Any]:
        worker = Worker("benchmarks.scoring", job, job["threads"], _log(keep, "scoring"))
        try:
            facts = worker.read()["facts"]
            results = []
            for number in range(rounds):
                order = rotated(list(SCORING_LABELS), number)
                results.append({"examples": {side: worker.ask(side)["value"] for side in order}})
                say(f"round {number + 1} of {rounds}")
        except WorkerError as failed:
            say(f"scoring failed: {failed}")
            return {"facts": {}, "rounds": [], "errors": {"dyads": str(failed)}}
        finally:
            worker.close()
        return {"facts": {"dyads": facts}, "rounds": results, "errors": {}}

    keep("scoring", "all", {**job, "rounds": rounds}, measure)


def _log(keep: _Keeper, name: str) -> Path:
    return keep.out / "logs" / f"{name}.log"


def source() -> str:
    """A short hash of the code that is measured and that measures: results of other code are never kept."""
    digest = hashlib.sha256()
    for folder in (ROOT / "src" / "dyads", ROOT / "benchmarks"):
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.c")]):
            if path.name not in ("page.py", "bars.py"):  # they only read results
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, Any]:
    """What the numbers depend on. No names of machines or people."""
    import dyads

    installed = {name: metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    versions = {"dyads": dyads.__version__, **installed}
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "git": revision.stdout.strip() or None,
        "cpu": _cpu(),
        "compiler": _compiler(),
        "tiles": _has_tiles(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _compiler() -> str | None:
    """What compiles dyads' gates; None where PyTorch's operations serve."""
    import torch

    from dyads.ops import Choice, kernel

    found = kernel(torch.zeros(1, 2), Choice(1, 1, 1))
    if found is None:
        return None
    said = subprocess.run([*found.compiler, "--version"], capture_output=True, text=True)
    return " ".join([*said.stdout.splitlines()[:1], *found.flags])


def _has_tiles() -> bool:
    """Whether the processor's unit for bf16 computes dyads' products in fp32."""
    import torch

    from dyads.ops.tiles import tiles_for

    return tiles_for(torch.zeros(96, 64)) is not None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        pairs = [line.partition(":") for line in info.read_text().splitlines()]
        facts = {key.strip(): value.strip() for key, _, value in pairs}
        flags = set(facts.get("flags", "").split())
        special = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags]
        name = facts.get("model name", platform.machine())
        return f"{name} ({', '.join(special)})" if special else name
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")

# SPDX-License-Identifier: Apache-2.0
"""Command line of the benchmark: plans what is measured, keeps the results, and writes the page."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import counted, page, scoring, serving, startup, training
from benchmarks.contenders import SETTINGS, Contender, resolved
from benchmarks.environment import commit, environment, is_committed, machine
from benchmarks.plan import BY_NAME, PARTS, Job, estimate, plan
from benchmarks.profile import PROFILED
from benchmarks.profile import measure_apart as measure_profile
from benchmarks.rounds import ROOT, measure_group

DOCS = ROOT / "docs" / "benchmarks.md"
RESULTS = DOCS.with_suffix(".json")

Say = Callable[[str], None]


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  python -m benchmarks --resume --write-docs         everything with a bar 12 times, the rest 3 times, and the page
  python -m benchmarks --plan                        what that measures, and how long it takes
  python -m benchmarks --setting counted             launches and bytes of a layer, without a GPU
  python -m benchmarks --setting llama --rounds 3
  python -m benchmarks --setting smollm2 --only mode-16x4,xlora
  python -m benchmarks --tables --write-docs         measure nothing, write the page again
  python -m benchmarks --quick                       does it run at all?""",
)
@click.option(
    "--setting", "parts", multiple=True, type=click.Choice(PARTS), help=f"Default: all but {' and '.join(BY_NAME)}."
)
@click.option("--rounds", type=click.IntRange(min=1), default=12, show_default=True, help="Of groups with a bar.")
@click.option("--other-rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Of all other groups.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Leave out groups that would end after this time.")
@click.option("--plan", "only_plan", is_flag=True, help="Measure nothing; show the groups and their estimated time.")
@click.option("--only", metavar="NAMES", help="Contenders, comma-separated; results go to a folder `only`.")
@click.option("--attention", type=click.Choice(["eager", "sdpa"]), help="Default: the setting's own, for all alike.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/bench"), show_default=True, help="A folder per commit."
)
@click.option("--resume", is_flag=True, help="Keep groups measured at this commit with the same settings and machine.")
@click.option("--quick", is_flag=True, help="A tiny model and one round; numbers mean nothing.")
@click.option("--tables", is_flag=True, help="Measure nothing; show what was measured at this commit.")
@click.option("--write-docs", is_flag=True, help=f"Write {DOCS.relative_to(ROOT)} and {RESULTS.name}.")
@click.option("--run", "scored", type=click.Path(exists=True, path_type=Path), help="The run that is scored.")
@click.option(
    "--sni", type=click.Path(path_type=Path), default=training.SNI, show_default=True, help="Examples to train on."
)
def main(
    parts: tuple[str, ...],
    rounds: int,
    other_rounds: int,
    minutes: float | None,
    only_plan: bool,
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

    Step time, forward time, greedy decoding, bytes kept for backward, peak memory and trainable parameters; whole
    training runs, scoring, serving and start-up; and, counted instead of timed, the operations and bytes of one layer
    in bf16.
    TRL is needed for the part `training` only (`pip install 'dyads[trl]'`).
    """
    console = Console(width=None if os.isatty(1) else 100)

    def say(text: str) -> None:
        console.print(text, style="dim", markup=False, highlight=False)

    if only and write_docs:
        raise click.UsageError("--only measures a part of a table: it cannot be written to the docs")
    if write_docs and not (quick or only_plan or is_committed()):
        raise click.UsageError(
            "the page names the commit that it was measured at: commit the changes in src/dyads and benchmarks first"
        )
    if quick:
        rounds = other_rounds = 1
    chosen = parts or (("tiny", "startup") if quick else tuple(part for part in PARTS if part not in BY_NAME))
    if only:
        chosen = tuple(part for part in chosen if part in SETTINGS)
    out = (out / ("quick" if quick else commit()) / ("only" if only else "")).absolute()
    jobs = plan(chosen, rounds=rounds, other_rounds=other_rounds, profiles=tuple(PROFILED))
    if only:
        jobs = [_only(part, only, rounds) for part in chosen]
    if not tables:
        page.plan_to_terminal(jobs, console)
    if only_plan:
        return
    out.mkdir(parents=True, exist_ok=True)
    if not tables:
        measured = Measurement(out, resume, quick, attention, scored, sni, say)
        begin = time.perf_counter()
        for job in jobs:
            elapsed = time.perf_counter() - begin
            if minutes is not None and elapsed + job.seconds > minutes * 60:
                say(f"{job.part}, group {job.group}: left out, as it would end after {minutes:g} minutes")
                continue
            names = tuple(dict.fromkeys((SETTINGS[job.part].reference, *_names(only)))) if only else None
            measured(job, names)
    results = page.load(out)
    try:
        page.check_one_source(results)
    except page.MixedError as error:
        raise click.ClickException(str(error)) from error
    page.to_terminal(results, console)
    if write_docs and results:
        target = DOCS if not quick else out / DOCS.name
        target.write_text(page.to_markdown(results), encoding="utf-8")
        if not quick:
            RESULTS.write_text(page.to_json(results), encoding="utf-8")
        say(f"wrote {target}")


def _names(only: str) -> list[str]:
    return [name.strip() for name in only.split(",")]


def _only(part: str, only: str, rounds: int) -> Job:
    """One group of the named contenders and the reference."""
    setting = SETTINGS[part]
    if unknown := [name for name in _names(only) if name not in setting.contenders]:
        raise click.UsageError(f"{part} has no '{unknown[0]}'; there are {', '.join(setting.contenders)}")
    names = dict.fromkeys((setting.reference, *_names(only)))
    return Job(part, "only", rounds, False, estimate(setting, {n: setting.contenders[n] for n in names}, rounds))


class Measurement:
    """Runner of jobs: checks results, measures, and writes a file per job; with `resume`, existing files are kept."""

    def __init__(
        self, out: Path, resume: bool, quick: bool, attention: str | None, scored: Path | None, sni: Path, say: Say
    ) -> None:
        self.out, self.resume, self.quick, self.attention, self.say = out, resume, quick, attention, say
        self.scored, self.sni = scored, sni
        self.logs = out / "logs"
        self.checked: set[str] = set()

    def __call__(self, job: Job, names: tuple[str, ...] | None = None) -> None:
        """Measure a job; `names` are the contenders of a group that the setting does not have."""
        if job.part in SETTINGS:
            self._setting(job, names or SETTINGS[job.part].groups[job.group])
        elif job.part == "profile":
            profiled = PROFILED[job.group]

            def profile() -> dict[str, Any]:
                self._gate(profiled.setting, profiled.contenders)
                return measure_profile(job.group, job.rounds, self.out, self.logs, self.say)

            self._keep(job, {"rounds": job.rounds}, profile)
        elif job.part == "training":
            options = training.job(quick=self.quick, sni=self.sni, attention=self.attention or "eager")

            def train() -> dict[str, Any]:
                self._gate("smollm2", ("mode-16x4",))
                return training.measure(options, training.GROUPS[job.group], job.rounds, self.logs, self.say)

            self._keep(job, {**options, "rounds": job.rounds}, train)
        elif job.part == "scoring":
            options = scoring.job(quick=self.quick, run=self.scored, out=self.out)
            settings = {**options, "rounds": job.rounds}
            self._keep(job, settings, lambda: scoring.measure(options, job.rounds, self.logs, self.say))
        elif job.part == "serving":
            served = serving.job(quick=self.quick, out=self.out)
            settings = {**served, "rounds": job.rounds}
            self._keep(job, settings, lambda: serving.measure(served, job.rounds, self.logs, self.say))
        elif job.part == "counted":
            self._keep(job, {}, counted.measure)
        else:
            self._keep(job, {"rounds": job.rounds}, lambda: startup.measure(job.rounds))

    def _setting(self, job: Job, names: tuple[str, ...]) -> None:
        setting = SETTINGS[job.part]
        contenders = resolved(setting, self.out, names)
        settings = {
            "rounds": job.rounds,
            "attention": self.attention,
            "contenders": {name: asdict(contender) for name, contender in contenders.items()},
        }

        def measure() -> dict[str, Any]:
            self._gate(job.part, names, contenders)
            return measure_group(
                job.part,
                setting,
                contenders,
                rounds=job.rounds,
                out=self.out,
                logs=self.logs / f"{job.part}-{job.group}",
                attention=self.attention,
                say=self.say,
            )

        self._keep(job, settings, measure)

    def _gate(self, part: str, names: tuple[str, ...], contenders: dict[str, Contender] | None = None) -> None:
        """Compare the results of contenders that were not compared before; nothing is measured where one is wrong."""
        from benchmarks.gate import GateError, check

        setting = SETTINGS[part]
        found = contenders or resolved(setting, self.out, names)
        new = {name: one for name, one in found.items() if f"{part} {name}" not in self.checked}
        try:
            check(new, dtype=setting.dtype, width=setting.config.get("hidden_size", 576), say=self.say)
        except GateError as error:
            raise click.ClickException(f"nothing is measured, because a result is wrong – {error}") from error
        self.checked |= {f"{part} {name}" for name in new}

    def _keep(self, job: Job, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        path, here = self.out / f"{job.part}-{job.group}.json", environment()
        settings = json.loads(json.dumps({**settings, "commit": here["commit"], "machine": machine(here)}))
        if self.resume and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == settings and not found["errors"]:
                self.say(f"{job.part}, group {job.group}: kept")
                return
        self.say(f"{job.part}, group {job.group}")
        begin = time.perf_counter()
        result = {
            "part": job.part,
            "group": job.group,
            "settings": settings,
            **measure(),
            "seconds": time.perf_counter() - begin,
            "environment": here,
        }
        partial = path.with_suffix(".unfinished")
        partial.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        partial.replace(path)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")

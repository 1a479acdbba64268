# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 – libraries read the environment when they are imported
"""Kill harness: a run is killed at the n-th call that changes files in its folder, repeated, and compared.

    python tests/kills.py                      # every call of every scenario, with SIGKILL and with a full disk
    python tests/kills.py --spread 20          # twenty kills, spread over the scenarios
    python tests/kills.py train --at 17        # one

Every trial runs in a fork of a process that has imported everything, with a shim around Python's file functions: it
counts the calls that create, write, rename or remove files below the folder, and at the n-th ends the process with
SIGKILL, after half of the data where the call writes. With `--fault full`, that call and all later ones that need
space fail with ENOSPC instead. safetensors and torch.save write outside Python; they are stopped at their Python
function, with half of the file written. Then the same command is given again, and files and results must equal those of
a run that was not disturbed. The last line is a JSON object with the counts.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import gc
import hashlib
import io
import json
import logging
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}
warnings.simplefilter("ignore")

import safetensors.torch
import torch

from dyads.cli import main as main_command
from dyads.errors import RunError
from dyads.export import export, export_all
from dyads.recipe.yaml_source import to_yaml
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter
from dyads.scoring.evaluate import evaluate
from dyads.studies import jobs
from dyads.training.adapt import adapt_recipe
from dyads.training.train import train
from made_runs import save_bert, save_llama, tiny_recipe, word_tokenizer, write_pairs
from made_studies import LORA, InProcess, content_of

HANG = 60.0
"""Seconds after which a command counts as hanging; a tiny run takes about one."""


# --- shim -------------------------------------------------------------------------------------------------------------


class Shim:
    """Counts the calls that change files below `root`, and stops the process at one of them."""

    def __init__(self, root: Path, stop: int | None = None, fault: str = "kill") -> None:
        self.root, self.stop, self.fault = str(root), stop, fault
        self.calls: list[str] = []
        self.inside = False  # a call of the shim's own

    def counts(self, path: Any, folder: Any = None) -> bool:
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            elif isinstance(folder, int) and folder >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))
            return os.path.abspath(os.fsdecode(path)).startswith(self.root)
        except (OSError, TypeError, ValueError):
            return False

    def call(self, kind: str, path: Any, half: Callable[[], object] | None = None, needs_space: bool = True) -> None:
        """Count a call; at the one to stop at, write half of its data and end the process, or let it fail."""
        self.calls.append(f"{kind} {path}")
        number = len(self.calls)
        if self.stop is None or number < self.stop:
            return
        if self.fault == "kill":
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        if needs_space:
            if half is not None and number == self.stop:
                half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def install(self) -> None:
        sys.addaudithook(self.audit)
        for module in (builtins, io):
            module.open = self.opener(io.open)  # type: ignore[attr-defined]
        sync = os.fsync
        os.fsync = lambda handle: (self.counts(handle) and self.call("fsync", handle), sync(handle))[1]  # type: ignore[assignment,func-returns-value]
        save, serialize = torch.save, safetensors.torch.serialize_file
        torch.save = self.writer("torch.save", save, 1, RuntimeError)  # type: ignore[assignment]
        safetensors.torch.serialize_file = self.writer("safetensors", serialize, 1, safetensors.SafetensorError)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside:
            return
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if changes and not isinstance(path, int) and self.counts(path):
                self.call("open", path)
        elif event == "os.rename" and self.counts(arguments[1], arguments[3]):
            self.call("rename", arguments[1], needs_space=False)
        elif event in ("os.remove", "os.rmdir") and self.counts(*arguments[:2]):
            self.call(event, arguments[0], needs_space=False)
        elif event == "os.mkdir" and self.counts(arguments[0], arguments[2]):
            self.call("mkdir", arguments[0])

    def opener(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, *arguments: Any, **options: Any) -> Any:
            stream = original(file, *arguments, **options)
            return Watched(stream, file, self) if stream.writable() and self.counts(file) else stream

        return opened

    def writer(self, kind: str, original: Callable[..., Any], place: int, error: type[Exception]) -> Callable[..., Any]:
        """A function that writes a file outside Python, at argument `place`."""

        def write(*arguments: Any, **options: Any) -> Any:
            path = arguments[place]

            def half() -> None:
                self.inside = True
                original(*arguments, **options)
                os.truncate(path, os.path.getsize(path) // 2)
                self.inside = False

            if self.counts(path):
                try:
                    self.call(kind, path, half)
                except OSError as full:
                    raise error(f"I/O error: {full.strerror} (os error {full.errno})") from full
            self.inside = True
            try:
                return original(*arguments, **options)
            finally:
                self.inside = False

        return write


class Watched:
    """A file whose writes the shim counts."""

    def __init__(self, stream: Any, path: Any, shim: Shim) -> None:
        self.stream, self.path, self.shim = stream, path, shim

    def write(self, data: Any) -> Any:
        self.shim.call("write", self.path, lambda: (self.stream.write(data[: len(data) // 2]), self.stream.flush()))
        return self.stream.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream)


# --- scenarios --------------------------------------------------------------------------------------------------------


@dataclass
class Made:
    """Models and trained runs that the scenarios start from, made once."""

    path: Path
    llama: Path
    bert: Path
    pairs: dict[str, Any]
    runs: dict[str, RunFolder] = field(default_factory=dict)

    @classmethod
    def make(cls, path: Path) -> Made:
        (path / "pairs").mkdir()
        made = cls(
            path, save_llama(path / "llama", word_tokenizer()), save_bert(path / "bert"), write_pairs(path / "pairs")
        )
        rows = [
            {"task": "new", "input": f"{w} river", "output": w, "split": split}
            for split, words in (("train", ("fox", "tree")), ("test", ("lamp",)))
            for w in words
        ]
        (path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.runs["more"] = train(made.recipe("more"), path / "more")
        study = content_of(made.llama)
        study["recipe"]["train"] |= {"steps": 2, "save_steps": 1, "validation_steps": 1}
        study |= {"vary": {"method": {"LoRA 4": LORA}, "seed": [0, 1]}, "claims": []}
        (path / "study.yaml").write_text(to_yaml(study))
        return made

    def recipe(self, method: str, *, heads: bool = False) -> Any:
        tasks = {"family": "starter", "names": ("first_word", "has_animal"), "train_per_task": 6}
        sections: dict[str, Any] = {
            "tasks": self.pairs if heads else {**tasks, "validation_per_task": 2, "test_per_task": 2},
            "train": {"steps": 3, "batch_size": 4, "save_steps": 1, "validation_limit": 2},
            "evaluate": {"limit": 2, "max_new_tokens": None if heads else 2},
            "options": {"lora_dropout": 0.1} if method != "lora" else {},
        }
        return tiny_recipe(method, self.bert if heads else self.llama, **sections)


Command = Callable[[Made, Path], object]


def _train(method: str, **options: Any) -> Command:
    return lambda made, place: _resumed(made.recipe(method, **options), place / "run")


def _resumed(recipe: Any, out: Path) -> None:
    """Train as a user would: with --resume wherever a run was begun."""
    folder = RunFolder(out)
    train(recipe, out, resume=folder.is_run or folder.was_interrupted)


def _adapt(made: Made, place: Path) -> None:
    sets = ("train.steps=2", "train.save_steps=1", "train.batch_size=2")
    recipe = adapt_recipe(made.runs["more"].path, made.path / "new.jsonl", {"shots": 2}, sets)
    _resumed(recipe, place / "run")


def _evaluate(made: Made, place: Path) -> None:
    evaluate(RunFolder.open(place / "run"), split="validation")


def _evaluate_into(made: Made, place: Path) -> None:
    if not RunFolder(place / "out").is_run or not RunFolder(place / "out").is_scored:
        evaluate(made.runs["more"], into=place / "out")


def _export(made: Made, place: Path) -> None:
    if not (place / "out").exists():
        export(SavedAdapter.read(made.runs["more"].path), place / "out", task="has_animal")


def _export_all(made: Made, place: Path) -> None:
    if not (place / "out").exists():
        export_all(SavedAdapter.read(made.runs["more"].path), place / "out", trim=True)


def _study(made: Made, place: Path) -> None:
    jobs.ENGINES["local"] = InProcess  # its jobs are commands of their own, which the shim would not reach
    if main_command(["study", str(made.path / "study.yaml"), "--out", str(place / "out")], standalone_mode=False):
        raise RunError("a run of the study failed")


SCENARIOS: dict[str, Command] = {
    "train": _train("mode"),
    "train-heads": _train("lora", heads=True),
    "train-contrastive": _train("more"),
    "adapt": _adapt,
    "evaluate": _evaluate,
    "evaluate-out": _evaluate_into,
    "export": _export,
    "export-all": _export_all,
    "study": _study,
}


def prepare(name: str, made: Made, place: Path) -> None:
    place.mkdir()
    if name == "evaluate":
        shutil.copytree(made.runs["more"].path, place / "run")


def result(place: Path) -> dict[str, str]:
    """The files below a folder, with a hash of those whose content must repeat."""
    found = {}
    for path in sorted(p for p in place.rglob("*") if p.is_file()):
        name, content = path.relative_to(place).as_posix(), path.read_bytes()
        if path.name == "scores.json":  # without the wall times
            content = json.dumps({k: v for k, v in json.loads(content).items() if k != "seconds"}).encode()
        varies = (
            path.name in ("env.json", "log.jsonl", "manifest.json", "verdict.md")
            or "checkpoints/" in name
            or "/logs/" in name
        )
        found[name] = "" if varies else hashlib.sha256(content.replace(str(place).encode(), b"")).hexdigest()
        if path.name == "log.jsonl":
            lines = RunFolder(path.parent).log()
            for event in ("trained", "validated"):
                last = [line for line in lines if line.get("event") == event][-1:]
                kept = [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory")} for line in last]
                found[f"{name}: {event}"] = str(kept)
    return found


# --- trials -----------------------------------------------------------------------------------------------------------


@dataclass
class End:
    """How a forked process ended."""

    status: int | None
    """None where it hung and was killed."""
    said: dict[str, Any]


def forked(work: Callable[[], dict[str, Any]], kill_after: float | None = None) -> End:
    """Run `work` in a fork, which returns a JSON object; `kill_after` seconds it gets SIGKILL."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            said = work()
        except BaseException as error:
            said = {"error": type(error).__name__, "module": type(error).__module__, "text": str(error)}
            said["traceback"] = traceback.format_exc()
        with os.fdopen(writer, "w") as stream:
            json.dump(said, stream)
        os._exit(0)
    os.close(writer)
    parts, end = [], time.monotonic() + (HANG if kill_after is None else kill_after)
    while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(reader, 2**16)
        if not part:
            break
        parts.append(part)
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    text = b"".join(parts)
    hung = os.WIFSIGNALED(status) and time.monotonic() >= end and kill_after is None
    return End(None if hung else status, json.loads(text) if text else {})


def silent(place: Path) -> None:
    """Send what the libraries print, and the library's own notices, to a file outside the folder."""
    handle = os.open(f"{place}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    logging.basicConfig(stream=sys.stderr, force=True)


def run(command: Command, made: Made, place: Path, stop: int | None, fault: str) -> dict[str, Any]:
    silent(place)
    shim = Shim(place, stop, fault)
    if fault != "time":
        shim.install()
    command(made, place)
    return {"calls": shim.calls}


def again(command: Command, made: Made, place: Path) -> dict[str, Any]:
    silent(place)
    command(made, place)
    return {"result": result(place)}


@dataclass
class Counts:
    """What the trials of a scenario found."""

    calls: int = 0
    kills: int = 0
    full: int = 0
    not_resumable: int = 0
    different: int = 0
    foreign: int = 0
    hangs: int = 0
    failures: list[str] = field(default_factory=list)


def trial(name: str, made: Made, counts: Counts, expected: dict[str, str], stop: int, fault: str, after: float) -> None:
    """One disturbed run and its repetition."""
    command = SCENARIOS[name]

    def fail(what: str, why: object) -> None:
        setattr(counts, what, getattr(counts, what) + 1)
        counts.failures.append(f"{name} {fault} {stop or round(after, 3)}: {what}: {why}")

    with tempfile.TemporaryDirectory(dir=made.path) as folder:
        place = Path(folder) / "place"
        prepare(name, made, place)
        end = forked(lambda: run(command, made, place, stop, fault), after if fault == "time" else None)
        if end.status is None:
            return fail("hangs", "the disturbed run")
        counts.full += fault == "full"
        counts.kills += fault != "full"
        if "error" in end.said and not (end.said["module"].startswith("dyads") or end.said["error"] == "OSError"):
            fail("foreign", end.said["traceback"])
        end = forked(lambda: again(command, made, place))
        if end.status is None:
            return fail("hangs", "its repetition")
        if "result" not in end.said:
            return fail("not_resumable", end.said.get("traceback", f"status {end.status}"))
        found = end.said["result"]
        if unlike := {
            k: (expected.get(k), found.get(k)) for k in {*expected, *found} if expected.get(k) != found.get(k)
        }:
            fail("different", unlike)
    return None


@contextmanager
def prepared() -> Iterator[Made]:
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        made = Made.make(Path(folder).resolve())
        gc.collect()
        gc.freeze()  # forks need not copy what the collector would touch
        yield made


def reference(name: str, made: Made) -> tuple[list[str], dict[str, str], float]:
    """The calls of an undisturbed run, its result, and its seconds."""
    with tempfile.TemporaryDirectory(dir=made.path) as folder:
        place = Path(folder) / "place"
        prepare(name, made, place)
        start = time.monotonic()
        end = forked(lambda: run(SCENARIOS[name], made, place, None, "kill"))
        seconds = time.monotonic() - start
        if "calls" not in end.said:
            raise SystemExit(f"{name}: the undisturbed run failed:\n{end.said.get('traceback')}")
        return end.said["calls"], result(place), seconds


def main(arguments: list[str] | None = None) -> dict[str, Counts]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"default: all of {', '.join(SCENARIOS)}")
    parser.add_argument("--fault", choices=["kill", "full", "time"], action="append", help="default: kill and full")
    parser.add_argument("--spread", type=int, help="this many trials, spread over scenarios and calls")
    parser.add_argument("--random", type=int, default=100, help="kills at random times, with --fault time")
    parser.add_argument("--at", type=int, help="one call only")
    parser.add_argument("--list", action="store_true", help="print the calls of the undisturbed runs")
    given = parser.parse_args(arguments)
    names, faults = given.scenarios or list(SCENARIOS), given.fault or ["kill", "full"]
    found: dict[str, Counts] = {}
    generator = random.Random(0)
    with prepared() as made:
        for place, name in enumerate(names):
            calls, expected, seconds = reference(name, made)
            counts = found[name] = Counts(calls=len(calls))
            if given.list:
                print(*(f"{name} {n} {call}" for n, call in enumerate(calls, start=1)), sep="\n")
                continue
            for fault in faults:
                stops = list(range(1, len(calls) + 1))
                if given.spread is not None:
                    share = given.spread * (place + 1) // len(names) - given.spread * place // len(names)
                    stops = sorted({1 + (2 * i + 1) * len(calls) // (2 * share) for i in range(share)}) if share else []
                if given.at is not None:
                    stops = [given.at]
                times = [generator.uniform(0, seconds) for _ in range(given.random)] if fault == "time" else []
                for stop, after in [(0, t) for t in times] if fault == "time" else [(n, 0.0) for n in stops]:
                    trial(name, made, counts, expected, stop, fault, after)
            print(name, json.dumps({**vars(counts), "failures": len(counts.failures)}), flush=True)
            for failure in counts.failures:
                print(failure, flush=True)
    total = {key: sum(getattr(c, key) for c in found.values()) for key in vars(Counts()) if key != "failures"}
    print(json.dumps(total))
    return found


if __name__ == "__main__":
    sys.exit(any(counts.failures for counts in main().values()))

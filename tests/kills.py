# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 – libraries read the environment when they are imported
"""Kill harness: a command is killed at the n-th call that changes files in its folder, repeated, and compared.

    python tests/kills.py                         # every call of every scenario
    python tests/kills.py --count 2000            # the same, and kills at random times until there are 2,000
    python tests/kills.py --fault full --spread 20      # a full disk from a call on, at 20 calls over all scenarios
    python tests/kills.py train --at 17           # one

Scenarios run in forks of a process that has imported everything, with a shim around Python's file functions that
counts the calls which create, write, rename or remove files below the folder. The faults:

    kill    the folder as SIGKILL leaves it at the n-th call, with half of the data where the call writes. All these
            states are copied in a single run; with --real each is made by a process that ends with SIGKILL at the call
    time    SIGKILL at a random time
    full    the n-th call and all later ones that need space fail with ENOSPC
    denied  the n-th call and all later ones fail with EACCES

safetensors and torch.save write outside Python; they are stopped at their Python function. Then the same command is
given again, and files and results must equal those of a run that was not disturbed. With --results, a line a trial is
appended to a file, and trials that passed before are not repeated. The last line is a JSON object with the counts.
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
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
from dyads.runs import folder as folder_module
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
FAULTS = ("kill", "time", "full", "denied")
ERRORS = {"full": errno.ENOSPC, "denied": errno.EACCES}


# --- shim -------------------------------------------------------------------------------------------------------------


class Shim:
    """Counts the calls that change files below `root`; stops the process at one of them, or keeps what each leaves.

    `keep` is a folder for copies of `root`, named by the numbers of the calls, and `kept` are the calls to copy at.
    """

    def __init__(
        self,
        root: Path,
        stop: int | None = None,
        fault: str = "kill",
        keep: Path | None = None,
        kept: frozenset[int] = frozenset(),
    ) -> None:
        self.root, self.stop, self.fault = str(root), stop, fault
        self.keep, self.kept = keep, kept
        self.calls: list[str] = []
        self.inside = False  # a call of the shim's own

    def counts(self, path: Any, folder: Any = None) -> bool:
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            elif isinstance(folder, int) and folder >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))
            return os.path.abspath(os.fsdecode(path)).startswith(self.root + os.sep)
        except (OSError, TypeError, ValueError):
            return False

    def call(self, kind: str, path: Any, half: Callable[[str], object] | None = None, needs_space: bool = True) -> None:
        """Count a call. At the one to stop at, write half of its data and end the process, or let it fail.

        `half` writes half of the data to a path: that of the call, or its copy.
        """
        self.calls.append(f"{kind} {path}")
        number = len(self.calls)
        if self.keep is not None and number in self.kept:
            self._copy(self.keep / str(number), path, half)
        if self.stop is None or number < self.stop:
            return
        if self.fault == "kill":
            if half is not None:
                half(str(path))
            os.kill(os.getpid(), signal.SIGKILL)
        if needs_space or self.fault == "denied":
            if half is not None and number == self.stop:
                half(str(path))
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]), str(path))

    def _copy(self, place: Path, path: Any, half: Callable[[str], object] | None) -> None:
        """Copy the root as it is now, with half of the data of the call."""
        self.inside = True
        shutil.copytree(self.root, place, symlinks=True)
        if half is not None:
            half(os.path.join(place, os.path.relpath(path, self.root)))
        self.inside = False

    def install(self) -> None:
        sys.addaudithook(self.audit)
        for module in (builtins, io):
            module.open = self.opener(io.open)  # type: ignore[attr-defined]
        sync = os.fsync
        os.fsync = lambda handle: (self.counts(handle) and self.call("fsync", handle), sync(handle))[1]  # type: ignore[assignment,func-returns-value]
        save, serialize = torch.save, safetensors.torch.serialize_file
        torch.save = self.writer("torch.save", save, RuntimeError)  # type: ignore[assignment]
        safetensors.torch.serialize_file = self.writer("safetensors", serialize, safetensors.SafetensorError)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside:
            return
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            new = self.calls[-1:] != [f"open {path}"]  # an opener causes the event twice
            if changes and new and not isinstance(path, int) and self.counts(path):
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
            counted = not self.inside and stream.writable() and self.counts(file)
            return Watched(stream, file, self) if counted else stream

        return opened

    def writer(self, kind: str, original: Callable[..., Any], error: type[Exception]) -> Callable[..., Any]:
        """A function that writes a file outside Python, at its second argument."""

        def write(data: Any, path: Any, *arguments: Any, **options: Any) -> Any:
            def half(target: str) -> None:
                inside, self.inside = self.inside, True
                original(data, target, *arguments, **options)
                os.truncate(target, os.path.getsize(target) // 2)
                self.inside = inside

            if self.counts(path):
                try:
                    self.call(kind, path, half)
                except OSError as full:
                    raise error(f"I/O error: {full.strerror} (os error {full.errno})") from full
            self.inside = True
            try:
                return original(data, path, *arguments, **options)
            finally:
                self.inside = False

        return write


class Watched:
    """A file whose writes the shim counts."""

    def __init__(self, stream: Any, path: Any, shim: Shim) -> None:
        self.stream, self.path, self.shim = stream, path, shim

    def write(self, data: Any) -> Any:
        self.stream.flush()
        self.shim.call("write", self.path, lambda target: self._half(data, target))
        return self.stream.write(data)

    def _half(self, data: Any, target: str) -> None:
        part = data[: len(data) // 2]
        inside, self.shim.inside = self.shim.inside, True
        handle = os.open(target, os.O_WRONLY | os.O_APPEND)
        os.write(handle, part.encode(self.stream.encoding) if isinstance(part, str) else bytes(part))
        os.close(handle)
        self.shim.inside = inside

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
    evaluate(made.runs["more"], into=place / "out")


def _export(made: Made, place: Path) -> None:
    export(SavedAdapter.read(made.runs["more"].path), place / "out", task="has_animal")


def _export_all(made: Made, place: Path) -> None:
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


def readable(folder: RunFolder) -> dict[str, Any]:
    """Read the results of a run, those before an evaluation or those after it; the dictionary names what is damaged."""
    for row in folder.scores()["scores"]:
        folder.predictions(row["task"])
    return {"damage": folder.damage()}


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
            ours = isinstance(error, OSError) or type(error).__module__.startswith("dyads")
            said = {"error": type(error).__name__, "ours": ours, "text": str(error)}
            said["traceback"] = traceback.format_exc()
        with os.fdopen(writer, "w") as stream:
            json.dump(said, stream)
        os._exit(0)
    os.close(writer)
    parts, left = [], HANG if kill_after is None else kill_after
    while left > 0:
        pause = min(left, 1.0)  # in short pauses: a machine that was suspended is no command that hangs
        if not select.select([reader], [], [], pause)[0]:
            left -= pause
        elif part := os.read(reader, 2**16):
            parts.append(part)
        else:
            break
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    text = b"".join(parts)
    hung = left <= 0 and kill_after is None
    return End(None if hung else status, json.loads(text) if text and left > 0 else {})


def silent(place: Path) -> None:
    """Send what the libraries print, and the library's own notices, to a file outside the folder."""
    handle = os.open(f"{place}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    logging.basicConfig(stream=sys.stderr, force=True)


def run(command: Command, made: Made, place: Path, shim: Shim | None) -> dict[str, Any]:
    silent(place)
    if shim is not None:
        shim.install()
    command(made, place)
    return {"calls": shim.calls if shim is not None else []}


def again(command: Command, made: Made, place: Path) -> dict[str, Any]:
    silent(place)
    command(made, place)
    return {"result": result(place)}


@dataclass(frozen=True)
class Trial:
    """One disturbed run; `number` is that of the call, or of the random time."""

    scenario: str
    fault: str
    number: int


@dataclass
class Outcome:
    """What went wrong in a trial, by kind; empty: the repetition gave the same."""

    found: dict[str, str] = field(default_factory=dict)


KINDS = ("not_resumable", "different", "foreign", "hangs", "lost")


class Scenario:
    """A command in a folder, what an undisturbed run of it writes, and the folders that kills leave."""

    def __init__(self, name: str, made: Made) -> None:
        self.name, self.made, self.command = name, made, SCENARIOS[name]
        self.folder = made.path / f"of-{name}"
        self.folder.mkdir()
        self.place, self.keep = self.folder / "place", self.folder / "kept"
        self.calls: list[str] = []
        self.expected: dict[str, str] = {}
        self.seconds = 0.0

    def reference(self, kept: frozenset[int] = frozenset()) -> None:
        """Run the command undisturbed, with copies of what kills at some calls would leave."""
        self.keep.mkdir(exist_ok=True)
        self.prepare()
        start = time.monotonic()
        shim = Shim(self.place, keep=self.keep, kept=kept)
        end = forked(lambda: run(self.command, self.made, self.place, shim))
        self.seconds = self.seconds or time.monotonic() - start
        if "calls" not in end.said:
            raise SystemExit(f"{self.name}: the undisturbed run failed:\n{end.said.get('traceback')}")
        self.calls, self.expected = end.said["calls"], result(self.place)

    def prepare(self) -> None:
        """The folder as it is before the command."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if self.name == "evaluate":
            shutil.copytree(self.made.runs["more"].path, self.place / "run")

    def disturb(self, trial: Trial, real: bool) -> Outcome:
        """The disturbed run and its repetition."""
        outcome = Outcome()
        kept = self.keep / str(trial.number)
        if trial.fault == "kill" and not real and kept.is_dir():
            shutil.rmtree(self.place, ignore_errors=True)
            kept.rename(self.place)
        else:
            self.prepare()
            shim = None if trial.fault == "time" else Shim(self.place, trial.number, trial.fault)
            share = random.Random(f"{trial.scenario}/{trial.number}").random()
            after = share * self.seconds if trial.fault == "time" else None
            end = forked(lambda: run(self.command, self.made, self.place, shim), after)
            if end.status is None:
                outcome.found["hangs"] = "the disturbed run"
                return outcome
            if not end.said.get("ours", True):
                outcome.found["foreign"] = end.said["traceback"]
        if self.name == "evaluate":
            end = forked(lambda: readable(RunFolder(self.place / "run")))
            if "damage" not in end.said or end.said["damage"]:
                outcome.found["lost"] = end.said.get("damage", end.said.get("traceback", "the results"))
        end = forked(lambda: again(self.command, self.made, self.place))
        if end.status is None:
            outcome.found["hangs"] = "its repetition"
        elif "result" not in end.said:
            outcome.found["not_resumable"] = end.said.get("traceback", f"status {end.status}")
        elif unlike := {
            key: (self.expected.get(key), end.said["result"].get(key))
            for key in {*self.expected, *end.said["result"]}
            if self.expected.get(key) != end.said["result"].get(key)
        }:
            outcome.found["different"] = str(unlike)
        return outcome


@contextmanager
def prepared() -> Iterator[Made]:
    folder_module._git_hash = lambda: None  # type: ignore[attr-defined,assignment]  # three processes a run
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        made = Made.make(Path(folder).resolve())
        gc.collect()
        gc.freeze()  # forks need not copy what the collector would touch
        yield made


def spread(trials: Sequence[Trial], count: int) -> list[Trial]:
    """As many trials, at equal distances."""
    return [trials[(2 * i + 1) * len(trials) // (2 * count)] for i in range(min(count, len(trials)))]


class Results:
    """The trials so far, a JSON object a line; those that passed are not repeated."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[Trial, dict[str, str]] = {}
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        for line in lines:
            content = json.loads(line)
            self.found[Trial(*(content[key] for key in ("scenario", "fault", "number")))] = content["found"]

    def lacks(self, trial: Trial) -> bool:
        return self.found.get(trial) != {}

    def add(self, trial: Trial, outcome: Outcome, commit: str) -> None:
        self.found[trial] = outcome.found
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({**asdict(trial), "found": outcome.found, "commit": commit}) + "\n")

    def counts(self, trials: Sequence[Trial]) -> dict[str, int]:
        """The numbers of trials by fault, and of those that failed by kind."""
        done = [trial for trial in trials if trial in self.found]
        faults = Counter(trial.fault for trial in done)
        kinds = Counter(kind for trial in done for kind in self.found[trial])
        kills = {"kills": faults["kill"] + faults["time"]}
        return {**kills, **{fault: faults[fault] for fault in FAULTS}, **{kind: kinds[kind] for kind in KINDS}}


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"default: all of {', '.join(SCENARIOS)}")
    parser.add_argument("--fault", choices=FAULTS, action="append", help="default: kill")
    parser.add_argument("--count", type=int, help="kills in all: at every call, and at random times for the rest")
    parser.add_argument("--spread", type=int, help="this many trials of every fault, spread over scenarios and calls")
    parser.add_argument("--at", type=int, help="one call only")
    parser.add_argument("--real", action="store_true", help="a process ends with SIGKILL at each call")
    parser.add_argument("--results", type=Path, help="file of results, to which trials are appended")
    parser.add_argument("--list", action="store_true", help="print the calls of the undisturbed runs")
    given = parser.parse_args(arguments)
    names, faults = given.scenarios or list(SCENARIOS), given.fault or ["kill"]
    results, commit = Results(given.results), _commit()
    with prepared() as made:
        scenarios = {name: Scenario(name, made) for name in names}
        for scenario in scenarios.values():
            scenario.reference()
        at_calls = {
            fault: [Trial(s.name, fault, n) for s in scenarios.values() for n in range(1, len(s.calls) + 1)]
            for fault in (*faults, "kill")
        }
        if given.list:
            for scenario in scenarios.values():
                print(*(f"{scenario.name} {n} {call}" for n, call in enumerate(scenario.calls, start=1)), sep="\n")
        calls = at_calls["kill"]
        if given.count is not None and "kill" in faults:
            at_calls["kill"] = spread(calls, given.count)
        kills = max(0, (given.count or 0) - len(calls)) if "time" not in faults else given.count or 100
        times = [Trial(names[i % len(names)], "time", i) for i in range(kills)]
        trials = [t for fault in faults if fault != "time" for t in _chosen(at_calls[fault], given.spread, given.at)]
        trials = sorted([*trials, *times], key=lambda t: (names.index(t.scenario), FAULTS.index(t.fault), t.number))
        left = [trial for trial in trials if results.lacks(trial)] if not given.list else []
        for name, scenario in scenarios.items():
            own = [trial for trial in left if trial.scenario == name]
            kept = frozenset(t.number for t in own if t.fault == "kill" and not given.real)
            if kept:
                scenario.reference(kept)
            for trial in own:
                outcome = scenario.disturb(trial, given.real)
                results.add(trial, outcome, commit)
                for kind, why in outcome.found.items():
                    print(f"{trial}: {kind}: {why}", flush=True)
            shutil.rmtree(scenario.folder)
            if own:
                print(f"{name}: {len(scenario.calls)} calls, {len(own)} trials", flush=True)
    counts = results.counts(trials)
    print(json.dumps(counts))
    return counts


def _chosen(trials: list[Trial], count: int | None, at: int | None) -> list[Trial]:
    if at is not None:
        return [trial for trial in trials if trial.number == at]
    return trials if count is None else spread(trials, count)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    found = main()
    sys.exit(any(found[kind] for kind in KINDS))

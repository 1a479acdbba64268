# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: a training saves its step and says how to go on; anything else ends at once, with its state intact."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder
from dyads.runs.signals import TerminatedError, ends_by_signal, on_sigterm
from dyads.training import trainer as trainer_module
from dyads.training.train import train

Tiny = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _default_handler() -> Iterator[None]:
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def terminated_at(monkeypatch: pytest.MonkeyPatch, *calls: int, number: int = signal.SIGTERM) -> None:
    """The loss sends a signal to its process at these calls."""
    count, loss = 0, trainer_module.label_loss

    def sent(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            os.kill(os.getpid(), number)
        return loss(*args)

    monkeypatch.setattr(trainer_module, "label_loss", sent)


def test_a_training_saves_its_step_and_goes_on_from_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("mode", options={"lora_dropout": 0.1}, train={"steps": 5, "save_steps": 4})
    through = train(recipe, tmp_path / "through", evaluate=False)
    with monkeypatch.context() as patch:
        terminated_at(patch, 2)
        with pytest.raises(
            TerminatedError, match=r"stopped by SIGTERM at step 2 of 5; --resume goes on from step 2$"
        ) as end:
            train(recipe, tmp_path / "cut", evaluate=False)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert end.value.exit_code == 143
    cut = train(recipe, tmp_path / "cut", resume=True, evaluate=False)
    assert [line["step"] for line in cut.log() if "loss" in line] == [1, 2, 3, 4, 5]
    ours, theirs = (load_file(f.adapter / "adapter_model.safetensors") for f in (cut, through))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(("calls", "message"), [((2,), r"--resume starts again \(train"), ((1, 2), "the same command")])
def test_without_checkpoints_and_at_a_second_signal_it_says_so(
    calls: tuple[int, ...], message: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminated_at(monkeypatch, *calls)
    accumulation = len(calls)
    with pytest.raises(TerminatedError, match=message):
        train(tiny("lora", train={"gradient_accumulation": accumulation}), tmp_path / "a", evaluate=False)
    assert not RunFolder(tmp_path / "a").has_adapter


def test_other_threads_and_handlers_keep_theirs(tmp_path: Path) -> None:
    with pytest.raises(TerminatedError, match="was stopped by SIGTERM; the same command goes on"), on_sigterm(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    with on_sigterm(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]

    def enter() -> None:
        with on_sigterm(tmp_path):
            pass

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_ends_a_training_as_sigterm_does(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminated_at(monkeypatch, 2, number=signal.SIGHUP)
    with pytest.raises(
        TerminatedError, match=r"stopped by SIGHUP at step 2 of 3; --resume goes on from step 2$"
    ) as end:
        train(tiny("mode", train={"save_steps": 1}), tmp_path / "a", evaluate=False)
    assert end.value.exit_code == 128 + signal.SIGHUP


def test_a_signal_ends_other_commands_too_and_no_library_swallows_it(tmp_path: Path) -> None:
    def stubborn() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("a library swallowed it")

    with pytest.raises(TerminatedError, match=r"^stopped by SIGTERM; the same command starts again$"), ends_by_signal():
        stubborn()
    with (
        pytest.raises(TerminatedError, match=rf"^'{tmp_path}' was stopped by SIGTERM; the same command goes on"),
        ends_by_signal(),
        on_sigterm(tmp_path),
    ):
        stubborn()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_command_says_that_it_was_stopped_and_leaves_nothing_half(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom dyads.cli import main\n"
        "from dyads.runs.manifest import unfinished\n"
        "def half(*_, **__):\n"
        f"    with unfinished(Path({str(tmp_path)!r}) / 'out') as folder:\n"
        "        (folder / 'half').touch(); os.kill(os.getpid(), signal.SIGTERM)\n"
        "main.get_command(None, 'export').callback = half\n"
        "main(['export', 'run', '--out', 'out'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (143, "Error: stopped by SIGTERM; the same command starts again\n")
    assert list(tmp_path.iterdir()) == []

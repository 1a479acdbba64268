# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: a training saves its step and says how to go on; anything else ends at once, with its state intact."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder
from dyads.runs.signals import TerminatedError, on_sigterm
from dyads.training import trainer as trainer_module
from dyads.training.train import train

Tiny = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def terminated_at(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """The loss sends SIGTERM to its process at these calls."""
    count, loss = 0, trainer_module.label_loss

    def sent(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)

    monkeypatch.setattr(trainer_module, "label_loss", sent)


def test_a_training_saves_its_step_and_goes_on_from_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("mode", options={"lora_dropout": 0.1}, train={"steps": 5, "save_steps": 4})
    through = train(recipe, tmp_path / "through", evaluate=False)
    with monkeypatch.context() as patch:
        terminated_at(patch, 2)
        with pytest.raises(TerminatedError, match=r"stopped by SIGTERM at step 2 of 5; --resume goes on from step 2$"):
            train(recipe, tmp_path / "cut", evaluate=False)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert TerminatedError.exit_code == 143
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

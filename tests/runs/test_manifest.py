# SPDX-License-Identifier: Apache-2.0
"""A thing is complete once its manifest says so; what a killed process left is cleared away, and damage is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dyads.errors import RunError
from dyads.export import export
from dyads.recipe.spec import Recipe
from dyads.runs.accept import accept
from dyads.runs.adapter import fingerprint
from dyads.runs.checkpoints import checkpoint_to_resume, complete, last_checkpoint, rotate
from dyads.runs.folder import RunFolder
from dyads.runs.lock import LockedError
from dyads.runs.manifest import MANIFEST, Manifest, seal, unfinished, write_text
from dyads.runs.saved import SavedAdapter
from dyads.runs.weights import read_config
from dyads.scoring.evaluate import evaluate, generate

Make = Callable[..., Recipe]
Trained = Callable[..., RunFolder]


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


# --- manifests --------------------------------------------------------------------------------------------------------


def test_a_manifest_names_the_first_file_that_differs(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b", "README.md"):
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    manifest = Manifest.of(tmp_path)
    assert manifest is not None
    assert list(manifest.files) == ["a", "inner/b"]
    assert manifest.damage(exact=True) is None
    (tmp_path / "README.md").write_text("edited by its owner")
    assert manifest.damage(exact=True) is None
    (tmp_path / "more.bin").touch()
    assert manifest.damage() is None
    assert manifest.damage(exact=True) == "more.bin is not listed in manifest.json"
    (tmp_path / "inner/b").write_text("inner/c")
    assert manifest.damage() == "the SHA-256 of inner/b is not that of manifest.json"
    (tmp_path / "inner/b").write_text("")
    assert manifest.damage(["inner/b"]) == "inner/b has 0 bytes, not 7"
    (tmp_path / "a").unlink()
    assert manifest.damage() == "a is missing"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": 2, "files": {}}',
        '{"schema": 1, "files": []}',
        '{"schema": 1, "files": {"a": {"size": "1", "sha256": ""}}}',
        '{"schema": 1, "files": {"../a": {"size": 1, "sha256": ""}}}',
        '{"schema": 1, "files": {"/etc/passwd": {"size": 1, "sha256": ""}}}',
    ],
)
def test_a_damaged_manifest_is_refused_with_the_command_that_writes_it_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(RunError, match=rf"manifest\.json.*`python -m dyads\.runs\.accept {tmp_path}`"):
        Manifest.of(tmp_path)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a", "after")
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "before")


def test_an_unfinished_folder_is_removed_by_the_next_attempt(tmp_path: Path) -> None:
    left = tmp_path / ".out.unfinished"
    left.mkdir()
    (left / "half").touch()
    with unfinished(tmp_path / "out") as folder:
        assert names(folder) == [".lock"]
        (folder / "whole").touch()
    assert names(tmp_path) == ["out", "out/whole"]
    with pytest.raises(FileNotFoundError), unfinished(tmp_path / "other") as folder:
        (folder / "half" / "file").touch()
    assert names(tmp_path) == ["out", "out/whole"]


# --- the start of a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left", [[".lock"], [".config.yaml.unfinished"], ["config.yaml"], ["config.yaml", ".manifest.json.unfinished"]]
)
def test_an_interrupted_start_is_cleared_away_and_started_again(
    left: list[str], tmp_path: Path, recipe: Make, caplog: pytest.LogCaptureFixture
) -> None:
    for name in left:
        (tmp_path / name).write_text("name: ha")
    folder = RunFolder(tmp_path)
    assert (folder.is_run, folder.was_interrupted) == (False, True)
    assert RunFolder.create(tmp_path, recipe("a"), resume=True).recipe() == recipe("a")
    assert [name for name in names(tmp_path) if name != ".lock"] == ["config.yaml", MANIFEST]
    assert ("the start of a run was interrupted; removed" in caplog.text) == (left != [".lock"])


def test_a_run_of_an_earlier_version_is_refused_with_the_command_that_accepts_it(tmp_path: Path, recipe: Make) -> None:
    folder = RunFolder.create(tmp_path / "a", recipe("a"))
    folder.write_environment(seed=0)
    (folder.path / MANIFEST).unlink()
    for open_it in (
        RunFolder.open,
        lambda path: RunFolder(path).recipe(),
        lambda path: RunFolder.create(path, recipe("a")),
    ):
        with pytest.raises(RunError, match=rf"but no manifest\.json.*`python -m dyads\.runs\.accept {folder.path}`"):
            open_it(folder.path)
    command = [sys.executable, "-m", "dyads.runs.accept", str(folder.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"manifest of {folder.path} written\n"), done.stderr
    assert RunFolder.open(folder.path).recipe() == recipe("a")
    with pytest.raises(RunError, match="holds neither a run"):
        accept(tmp_path)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(folder: RunFolder, step: int, *, whole: bool = True) -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_text(f"optimizer {step}")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    if whole:
        seal(path)
    return path


@pytest.mark.parametrize("damage", ["manifest", "half", "missing", "flip", "extra", "manifest flip", "subfolder"])
def test_a_damaged_checkpoint_is_not_resumed_but_the_one_before(
    damage: str, tmp_path: Path, recipe: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder.create(tmp_path / "a", recipe("a"))
    kept, broken = checkpoint(folder, 9), checkpoint(folder, 10)
    file = broken / "optimizer.pt"
    if damage == "manifest":
        (broken / MANIFEST).unlink()
    elif damage == "half":
        file.write_text(file.read_text()[:5])
    elif damage == "missing":
        file.unlink()
    elif damage == "flip":
        content = bytearray(file.read_bytes())
        content[3] ^= 1
        file.write_bytes(content)
    elif damage == "extra":
        (broken / "pytorch_model.bin").write_bytes(b"a pickle of somebody else")
    elif damage == "subfolder":
        (broken / "evil").symlink_to(kept)
    else:
        (broken / MANIFEST).write_text((broken / MANIFEST).read_text().replace('"size"', '"sise"'))
    assert checkpoint_to_resume(folder) == kept
    assert names(folder.checkpoints) == sorted(["checkpoint-9", *(f"checkpoint-9/{name}" for name in names(kept))])
    assert "checkpoint-10' is not used: it" in caplog.text
    assert "the training goes on from step 9" in caplog.text


def test_without_a_whole_checkpoint_training_starts_again(
    tmp_path: Path, recipe: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder.create(tmp_path / "a", recipe("a"))
    assert checkpoint_to_resume(folder) is None
    assert caplog.text == ""
    checkpoint(folder, 3, whole=False)
    assert checkpoint_to_resume(folder) is None
    assert (
        "checkpoint-3' is not used: it is incomplete; removed, and the training goes on from the beginning"
        in caplog.text
    )


def test_checkpoints_are_rotated_by_their_steps_whatever_the_clock_says(tmp_path: Path, recipe: Make) -> None:
    folder = RunFolder.create(tmp_path / "a", recipe("a"))
    for step in (8, 9, 10, 11):
        path = checkpoint(folder, step, whole=False)
        complete(folder, path, 2)
        os.utime(path, (0, 1_000_000 - step))  # every one older than the one before
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    assert last_checkpoint(folder) == folder.checkpoints / "checkpoint-11"
    checkpoint(folder, 12)  # the process was killed between its manifest and the rotation
    rotate(folder, 2)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["checkpoint-11", "checkpoint-12"]


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_of_an_adapter_is_noticed_by_every_command(trained: Trained, tmp_path: Path) -> None:
    folder = trained("more")
    weights = folder.adapter / "adapter_model.safetensors"
    kept = weights.read_bytes()
    for at in range(0, len(kept), len(kept) // 7):
        content = bytearray(kept)
        content[at] ^= 1
        weights.write_bytes(content)
        for command in (
            lambda: generate(folder, ["a"], ["first_word"]),
            lambda: evaluate(folder),
            lambda: export(SavedAdapter.read(folder.path), tmp_path / "out", task="first_word"),
            lambda: SavedAdapter.read(folder.adapter),
            lambda: fingerprint(folder),
        ):
            with pytest.raises(RunError, match=r"is damaged: the SHA-256 of adapter_model\.safetensors"):
                command()
    weights.write_bytes(kept)
    assert evaluate(folder)["scores"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_their_name(trained: Trained, value: float) -> None:
    folder = trained("mode")
    weights = load_file(folder.adapter / "adapter_model.safetensors")
    name = sorted(weights)[3]
    weights[name].view(-1)[-1] = value
    save_file(weights, folder.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    accept(folder.adapter)
    for command in (lambda: evaluate(folder), lambda: SavedAdapter.read(folder.adapter)):
        with pytest.raises(RunError, match=rf"has NaN or infinite numbers in '{name}'"):
            command()


def test_a_pickle_in_place_of_the_weights_is_not_read(trained: Trained) -> None:
    folder = trained("lora")
    weights = folder.adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), folder.adapter / "adapter_model.bin")
    weights.unlink()
    accept(folder.adapter)
    for command in (lambda: evaluate(folder), lambda: SavedAdapter.read(folder.path)):
        with pytest.raises(
            RunError, match=r"has no adapter_model\.safetensors; adapters are read from safetensors only"
        ):
            command()


def test_an_adapter_of_another_method_than_the_runs_is_refused(trained: Trained) -> None:
    folder, other = trained("mode"), trained("lora")
    shutil.rmtree(folder.adapter)
    shutil.copytree(other.adapter, folder.adapter)
    with pytest.raises(RunError, match="is one of method 'lora', but config\\.yaml names 'mode'"):
        evaluate(folder)


def test_lists_that_are_sets_in_the_config_are_sorted(trained: Trained) -> None:
    for method in ("lora", "mode"):
        modules = json.loads((trained(method).adapter / "adapter_config.json").read_text())["target_modules"]
        assert modules == ["down_proj", "q_proj", "v_proj"]


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path, llama: Path) -> None:
    code = (
        "from pathlib import Path; import sys; from made_runs import tiny_recipe; from dyads.training import train;"
        "train.train(tiny_recipe('lora', Path(sys.argv[1]), train={'steps': 1}), sys.argv[2], evaluate=False)"
    )
    written = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-W", "ignore", "-c", code, str(llama), str(tmp_path / seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        written.append({p.name: p.read_bytes() for p in (tmp_path / seed / "adapter").iterdir()})
    assert written[0] == written[1]


# --- the lock ---------------------------------------------------------------------------------------------------------

REFUSED = """
import sys
from dyads.runs.folder import RunFolder
from dyads.runs.lock import LockedError
for path in sys.argv[1:]:
    try:
        with RunFolder(path).locked():
            sys.exit(f"{path} was not locked")
    except LockedError as error:
        print(error)
"""
HOLDER = """
import sys, time
from dyads.runs.folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_says_who_holds_the_lock_and_takes_over_that_of_a_dead_one(
    tmp_path: Path, recipe: Make
) -> None:
    folder = RunFolder.create(tmp_path / "a", recipe("a"))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(LockedError, match=rf"a' is in use by process {holder.pid} on .* since 20.*: wait for it"),
            folder.locked(),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert (folder.path / ".lock").is_file()
    with folder.locked(), folder.locked():
        assert json.loads((folder.path / ".lock").read_text())["pid"] == os.getpid()
    assert names(folder.path) == ["config.yaml", MANIFEST]


def test_a_lock_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "a").locked():
        _ = 1 / 0
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file' is a file"), RunFolder(tmp_path / "file").locked():
        pass


@pytest.mark.parametrize("changes", [{"r": 10**9}, {"r": 10**5}, {"num_experts": 10**5}, {"num_experts": 2**60}])
@pytest.mark.parametrize("method", ["mode", "lora"])
def test_a_config_larger_than_its_weights_is_refused_before_an_adapter_of_its_size_is_built(
    trained: Trained, method: str, changes: dict[str, int]
) -> None:
    if method == "lora" and "r" not in changes:
        changes = {"rank_pattern": {"q_proj": 10**5}}  # type: ignore[dict-item]
    folder = trained(method)
    path = folder.adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    accept(folder.adapter)
    for command in (lambda: evaluate(folder), lambda: SavedAdapter.read(folder.path)):
        with pytest.raises(RunError, match=r"numbers up to 1,000,000 are read|do not fit its adapter_config\.json"):
            command()


@pytest.mark.parametrize("method", ["mode", "lora"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"a": {"b": 1}}}, r"'rank_pattern': .* valid integer, got \{'a': \{'b': 1\}\}"),
        ({"alpha_pattern": {"a": [2]}}, r"'alpha_pattern': .* valid number, got \{'a': \[2\]\}"),
    ],
)
def test_patterns_with_values_that_are_no_numbers_are_refused(
    trained: Trained, method: str, changes: dict[str, Any], message: str
) -> None:
    path = trained(method).adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(RunError, match=message):
        read_config(path.parent)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"pid": os.getpid(), "host": "here", "since": "1999", "command": "another command"}).encode(),
        json.dumps({"pid": 1, "host": "another host", "since": "2999", "command": "dyads train"}).encode(),
        b"",
        b"\xff\x00{",
        b'{"pid": ' + b"9" * 5000 + b"}",
    ],
    ids=["this process", "another host", "empty", "bytes", "digits"],
)
def test_a_lock_file_alone_locks_nothing_whatever_it_says(content: bytes, tmp_path: Path, recipe: Make) -> None:
    folder = RunFolder.create(tmp_path / "a", recipe("a"))
    (folder.path / ".lock").write_bytes(content)
    with folder.locked():
        assert json.loads((folder.path / ".lock").read_text())["pid"] == os.getpid()
    assert names(folder.path) == ["config.yaml", MANIFEST]


def test_the_holder_of_a_lock_is_named_without_control_characters(tmp_path: Path, recipe: Make) -> None:
    contents = (b'{"pid": 1, "host": "\\u001b[2J", "since": "", "command": ""}', b"\xff", b"[]", b'{"pid": [1]}')
    folders = [RunFolder.create(tmp_path / f"{number}a", recipe("a")) for number in range(len(contents))]
    with ExitStack() as stack:
        for folder, content in zip(folders, contents, strict=True):
            stack.enter_context(folder.locked())
            (folder.path / ".lock").write_bytes(content)
        command = [sys.executable, "-c", REFUSED, *(str(folder.path) for folder in folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("a' is in use by ") == len(contents)
    assert "\x1b" not in done.stdout

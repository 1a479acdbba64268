# SPDX-License-Identifier: Apache-2.0
"""Trainings in two processes, started by torchrun and by accelerate launch, are the same as in one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from dyads.errors import ConfigError
from dyads.methods import methods
from dyads.recipe.load import load_recipe
from dyads.recipe.spec import AdaptSpec, Recipe
from dyads.runs.folder import RunFolder
from dyads.training.train import train, training_arguments
from launched import environment, launch, torchrun

Tiny = Callable[..., Recipe]
ROOT = Path(__file__).parents[2]

# Adam divides by the square root of the squared gradient: without eps it makes whole steps of rounding errors.
STEADY = {"trainer": {"adam_epsilon": 1e-2, "disable_tqdm": True}}
CLOSE = {"rtol": 0.0, "atol": 1e-6}
TARGETS = ["q_proj", "v_proj", "down_proj"]
LOSSES: dict[str, dict[str, Any]] = {
    "hmora": {"divergence": 0.1, "r": 4, "num_experts": 3, "task_dim": 5, "lora_dropout": 0.0},
    "mode": {"load_balance": 0.1},
    "more": {"embedding": "shared", "task_dim": 5, "contrastive": 0.1},
}
"""Auxiliary losses over all of a micro-batch's tokens, and a table that all layers share."""


def adapter_of(folder: RunFolder) -> dict[str, Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")


def predictions(folder: RunFolder) -> dict[str, list[str]]:
    return {name: [p["prediction"] for p in folder.predictions(name)] for name in folder.task_names()}


def job(recipe: Recipe, out: Path, **how: Any) -> dict[str, Any]:
    return {"recipe": recipe.resolved_yaml(), "out": str(out), **how}


def in_parts(recipe: Recipe, parts: int) -> Recipe:
    """The recipe in which one process computes these parts of a batch, one after another."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_accumulation": parts})})


def losses(folder: RunFolder, name: str = "loss") -> list[float]:
    return [line[name] for line in folder.log() if "loss" in line]


def test_two_processes_give_the_adapter_the_log_and_the_answers_of_one(
    tiny: Tiny, t5: Path, bert: Path, pairs: dict[str, Any], tmp_path: Path
) -> None:
    checked = {"validation_limit": 3, "validation_steps": 2, "save_steps": 2, **STEADY}
    recipes = {
        "mode": tiny("mode", train=checked),
        "smora": tiny("smora", options={"r": 4, "top_k": 2, "bias_rate": 0.1, "target_modules": TARGETS}, train=STEADY),
        "more": tiny("more", train=STEADY),
        "shared": tiny("more", options=LOSSES["more"], train=STEADY),
        "t5": tiny("more", t5, train=STEADY),
        "heads": tiny(
            "more", bert, tasks=pairs, train={"validation_limit": 2, **STEADY}, evaluate={"max_new_tokens": None}
        ),
    }
    jobs = [job(recipe, tmp_path / name, evaluate=name in ("mode", "heads")) for name, recipe in recipes.items()]
    changed = launch(jobs, tmp_path)
    for name, recipe in recipes.items():
        both = RunFolder.open(tmp_path / name)
        scored = name in ("mode", "heads")
        # SMoRA counts padding too, so its parts are padded alike: those of the two processes, one after another.
        alike = in_parts(recipe, 2) if name == "smora" else recipe
        one = train(alike, tmp_path / f"{name}-one", evaluate=scored)
        if name == "heads":
            continue  # dropout draws other numbers in another process
        assert_close(adapter_of(both), adapter_of(one), **CLOSE)
        assert losses(both) == pytest.approx(losses(one), rel=1e-4)
        assert both.environment()["processes"] == 2
        if name in ("more", "shared", "t5"):
            assert losses(both, "auxiliary_loss") == pytest.approx(losses(one, "auxiliary_loss"), rel=1e-4)
        if scored:
            assert predictions(both) == predictions(one)
            assert both.scores()["scores"] == one.scores()["scores"]
        curves = [
            [line["validation_loss"] for line in f.log() if line.get("event") == "validated"] for f in (both, one)
        ]
        assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert RunFolder.open(tmp_path / "heads").is_scored
    others = [
        name for name in changed[1] if not re.fullmatch(r"\w+/checkpoints/checkpoint-\d(/rng_state_1.pth)?", name)
    ]
    assert others == [], "the main process alone writes"
    assert "mode/scores.json" in " ".join(changed[0])


@pytest.mark.slow
def test_an_interrupted_training_goes_on_in_two_processes_and_in_one(tiny: Tiny, tmp_path: Path) -> None:
    spec = {"steps": 5, "save_steps": 2, "gradient_accumulation": 2, **STEADY}
    dropped, plain = tiny("more", options={"lora_dropout": 0.1}, train=spec), tiny("mode", train=spec)
    cut = 2 * 3 + 2  # in the middle of step 4, of two parts each
    launch(
        [
            job(dropped, tmp_path / "through"),
            job(dropped, tmp_path / "cut", cut=cut),
            job(dropped, tmp_path / "cut", resume=True),
            job(plain, tmp_path / "to-one", cut=cut),
        ],
        tmp_path,
    )
    through, resumed = (RunFolder.open(tmp_path / name) for name in ("through", "cut"))
    assert_close(adapter_of(resumed), adapter_of(through), rtol=0.0, atol=0.0)
    assert losses(resumed) == [*losses(through)[:3], *losses(through)[2:]], "step 3 is trained again"
    assert len(list((tmp_path / "cut" / "checkpoints" / "checkpoint-4").glob("rng_state_*.pth"))) == 2
    alone = train(plain, tmp_path / "to-one", resume=True, evaluate=False)
    assert_close(adapter_of(alone), adapter_of(train(plain, tmp_path / "one", evaluate=False)), **CLOSE)


@pytest.mark.slow
def test_every_method_trains_in_two_processes_as_in_one(tiny: Tiny, tmp_path: Path) -> None:
    recipes: dict[str, Recipe] = {}
    small: dict[str, dict[str, Any]] = {"smora": {"top_k": 2}, "hmora": {"task_dim": 5}, "moelora": {"num_experts": 2}}
    for name in ["lora", *(method.key for method in methods())]:
        options = {
            "r": 4,
            "target_modules": TARGETS,
            "lora_dropout": 0.0,
            **small.get(name, {}),
            **LOSSES.get(name, {}),
        }
        recipe = tiny("lora", train={"gradient_accumulation": 2, **STEADY}).resolved()
        recipes[name] = Recipe.model_validate(
            {**recipe, "name": name, "method": {"name": name, **options}}, strict=False
        )
    launch([job(recipe, tmp_path / name) for name, recipe in recipes.items()], tmp_path)
    for name, recipe in recipes.items():
        one = train(in_parts(recipe, 4), tmp_path / f"{name}-one", evaluate=False)
        assert_close(
            adapter_of(RunFolder.open(tmp_path / name)), adapter_of(one), **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert "auxiliary_loss" in RunFolder.open(tmp_path / "hmora").log()[0]


def _command(recipe: Recipe, folder: Path) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(recipe.resolved_yaml())
    return ["-m", "dyads.cli", "train", str(path), "--out", str(folder / "run")]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_the_command_prints_one_result_and_scores_together(launcher: str, tiny: Tiny, tmp_path: Path) -> None:
    command = _command(tiny("mode", train=STEADY), tmp_path)
    if launcher == "torchrun":
        done = torchrun(command)
    else:
        start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
        port = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
        done = subprocess.run([*start, *port, *command], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("micro") == 1
    run = RunFolder.open(tmp_path / "run")
    assert run.environment()["processes"] == 2
    before = run.scores()["scores"]
    again = torchrun(["-m", "dyads.cli", "evaluate", str(run.path)])
    assert again.returncode == 0, again.stderr[-4000:]
    assert again.stdout.count("micro") == 1
    assert run.scores()["scores"] == before
    assert not (run.path / ".lock").exists()


@pytest.mark.slow
def test_sigterm_to_one_process_saves_a_checkpoint_of_all(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("mode", train={"steps": 20_000, "save_steps": 100_000, **STEADY})
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    running = subprocess.Popen(
        [*start, *_command(recipe, tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    run, deadline = RunFolder(tmp_path / "run"), time.monotonic() + 120
    try:
        while len(losses(run)) < 3:
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        other = [pid for pid in workers if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
        os.kill(int(other[0]), signal.SIGTERM)
        output = running.communicate(timeout=180)[0].decode()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)  # a worker that hangs would run on
    assert running.returncode != 0
    assert re.search(r"was stopped by SIGTERM at step \d+ of 20000; --resume goes on from step \d+", output)
    assert len(list((run.checkpoints).glob("*/manifest.json"))) == 1
    assert not (run.path / ".lock").exists()


@pytest.mark.parametrize(
    ("environment", "train_spec", "message"),
    [
        (
            {"WORLD_SIZE": "3"},
            {"gradient_accumulation": 2},
            "batch_size 8 cannot be cut into 2 equal parts .* each of 3",
        ),
        ({"WORLD_SIZE": "2"}, {}, "names 2 processes .WORLD_SIZE., but 1 are connected: start them with torchrun"),
    ],
)
def test_processes_that_do_not_fit_are_refused_before_the_folder_is_touched(
    environment: dict[str, str],
    train_spec: dict[str, Any],
    message: str,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train(tiny("lora", train=train_spec), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_shipped_sharding_recipe_extends_any_recipe(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"extends: {ROOT / 'recipes/scale-out/fsdp2.yaml'}\n" + tiny("mode").resolved_yaml()
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.train.trainer["fsdp"] is True
    arguments = training_arguments(recipe, RunFolder(tmp_path / "run"))
    assert arguments.fsdp_plugin_args["fsdp_version"] == 2
    assert arguments.fsdp_plugin_args["state_dict_type"] == "FULL_STATE_DICT"
    adapted = recipe.model_copy(update={"adapt": AdaptSpec(run="runs/a")})
    with pytest.raises(ConfigError, match="must not be sharded: leave fsdp"):
        training_arguments(adapted, RunFolder(tmp_path / "run"))


@pytest.mark.parametrize("stage", [2, 3])
def test_the_shipped_deepspeed_configurations_take_the_sizes_of_the_recipe(stage: int) -> None:
    config = json.loads((ROOT / f"recipes/scale-out/zero{stage}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {config[name] for name in sizes} == {"auto"}

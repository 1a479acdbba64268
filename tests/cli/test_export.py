# SPDX-License-Identifier: Apache-2.0
"""`dyads export` writes one LoRA or one per task, and prints the ranks that they need."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from peft import LoraConfig, get_peft_model

from dyads.cli import main
from dyads.runs.folder import RunFolder
from tiny import MLP, TASKS, Variant


def export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = get_peft_model(MLP(), Variant("more").config(target_modules=["lin0", "lin1"], init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_task_becomes_a_folder(adapter: Path, tmp_path: Path) -> None:
    result = export(adapter, "--task", "cola", "--out", tmp_path / "lora" / "cola", "--trim")
    assert result.exit_code == 0, result.output
    written, verified = result.output.splitlines()
    assert re.fullmatch(rf"{tmp_path}/lora/cola: ranks? \d( to \d)? in 2 modules", written)
    assert re.fullmatch(r"not verified: the adapter in '.*' names no base model \(base_model_name_or_path\)", verified)
    assert LoraConfig.from_pretrained(tmp_path / "lora" / "cola").peft_type == "LORA"


def test_all_tasks_become_a_folder_each(adapter: Path, tmp_path: Path) -> None:
    result = export(adapter, "--all-tasks", "--out", tmp_path / "loras")
    assert [line.split(":")[0] for line in result.output.splitlines()[:-1]] == [
        str(tmp_path / "loras" / t) for t in TASKS
    ]
    assert sorted(p.name for p in (tmp_path / "loras").iterdir()) == sorted(["README.md", *TASKS])


@pytest.mark.usefixtures("reload_in_fork")
def test_the_export_of_a_run_is_verified_on_its_prompts(trained: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = trained("more")
    result = export(run.path, "--all-tasks", "--out", tmp_path / "loras")
    assert result.exit_code == 0, result.output
    last = result.output.splitlines()[-1]
    assert re.fullmatch(
        r"verified: PEFT reloads it without dyads; on 12 prompts logits agree to [\d.]+e-0[6-9]",
        last,
    ), last
    result = export(run.path, "--task", "has_animal", "--out", tmp_path / "quick", "--no-verify")
    assert result.output.splitlines()[-1] == "not verified (--no-verify)"


@pytest.mark.usefixtures("reload_in_fork")
def test_merged_runs_are_checkpoints_that_answer_alike(trained: Callable[..., RunFolder], tmp_path: Path) -> None:
    run = trained("more")
    result = export(run.path, "--merge", "--task", "has_animal", "--out", tmp_path / "model")
    assert result.exit_code == 0, result.output
    written, verified = result.output.splitlines()
    assert re.fullmatch(rf"{tmp_path}/model: merged, [\d,]+ parameters in float32", written)
    assert "verified: PEFT reloads it without dyads; on 4 prompts" in verified


def test_contradictions_and_refusals_name_the_options_that_mend_them(adapter: Path, tmp_path: Path) -> None:
    both = export(adapter, "--task", "cola", "--all-tasks", "--out", tmp_path / "x")
    assert (both.exit_code, "give either --task or --all-tasks" in both.output) == (2, True)
    trim = export(adapter, "--merge", "--trim", "--task", "cola", "--out", tmp_path / "x")
    assert (trim.exit_code, "--trim is for LoRAs, and --merge writes none" in trim.output) == (2, True)
    none = export(adapter, "--out", tmp_path / "x")
    assert none.output == (
        f"Error: cannot export the adapter in '{adapter}' (more) without a task: every task has its own update; name"
        " one (--task), or use --all-tasks – known: rte, cola, sst2\n"
    )
    assert not (tmp_path / "x").exists()

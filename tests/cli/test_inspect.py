# SPDX-License-Identifier: Apache-2.0
"""`dyads inspect` shows an adapter in a terminal of 80 columns, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import get_peft_model
from torch import Tensor, nn

from dyads.cli import main
from dyads.methods.more import MoRE
from dyads.recipe.load import parse_recipe
from dyads.runs.accept import accept
from dyads.runs.folder import RunFolder
from tiny import Variant

RECIPE = "name: a\nmodel: {name: tiny}\nmethod: {name: METHOD}\ntasks: {family: starter}\n"
NAMES = [f"task{i:03}_with_a_name_that_is_long_enough_to_be_cut_{i}" for i in range(23)]


class Tall(nn.Module):
    """Layers with three kinds of modules each."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        names = ("q_proj", "v_proj", "down_proj")
        blocks = (nn.ModuleDict({name: nn.Linear(6, 6) for name in names}) for _ in range(layers))
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        return x


def inspect(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, ["inspect", *map(str, arguments)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of MoRE on 14 layers, 23 tasks and ranks to 16."""
    folder = RunFolder.create(tmp_path / "run", parse_recipe(RECIPE.replace("METHOD", "more"), "x"))
    config = Variant("more", (("r", 16), ("tasks", NAMES))).config(target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(Tall(14), config)
    for module in model.modules():
        if isinstance(module, MoRE):
            with torch.no_grad():
                module.embedding.mul_(300)
    model.save_pretrained(folder.adapter)
    accept(folder.adapter)
    return folder.path


def test_many_tasks_and_layers_fit_80_columns(run: Path) -> None:
    result = inspect(run, "--layers")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    # A path is not cut, so it may be longer than a line.
    assert max(len(line) for line in lines if "/" not in line) <= 80
    assert lines[0].startswith("more adapter in ")
    for title in ("Modules", "Ranks by task, of 16: ", "Ranks in every layer: q_proj", "Which tasks choose alike"):
        assert any(line.startswith(title) for line in lines), title
    assert sum(line.startswith("22 task022_with_a_name") for line in lines) >= 6
    assert "Ranks in every layer" not in inspect(run).output


def test_the_folder_of_an_adapter_gives_the_same_as_that_of_its_run(run: Path) -> None:
    assert inspect(run / "adapter").output == inspect(run).output


def test_the_table_says_mean_and_range_by_kind_of_module(run: Path) -> None:
    shown = json.loads(inspect(run, "--format", "json").output)
    ranks = [m["ranks"][NAMES[0]] for m in shown["modules"] if m["kind"] == "q_proj"]
    assert len(ranks) == 14
    text = inspect(run).output
    assert f"{sum(ranks) / 14:.1f} {f'{min(ranks)}–{max(ranks)}':>5}" in text
    every = [m["ranks"][NAMES[0]] for m in shown["modules"]]
    row = next(line for line in text.splitlines() if line.startswith(" 0 task000"))
    assert f"{100 * sum(every) / (16 * 42):.0f} %" in row


def test_csv_has_a_line_for_every_module_and_task(run: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(inspect(run, "--format", "csv").output)))
    shown = json.loads(inspect(run, "--format", "json").output)
    assert len(rows) == 42 * 23
    assert {(r["module"], r["task"], int(r["rank"])) for r in rows} == {
        (m["name"], task, rank) for m in shown["modules"] for task, rank in m["ranks"].items()
    }
    assert {(r["in_features"], r["largest_rank"]) for r in rows} == {("6", "16")}
    assert len(shown["agreement"]) == 23 * 22 / 2


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_a_method_whose_gates_look_at_the_token_shows_what_there_is(form: str, tmp_path: Path) -> None:
    model = get_peft_model(Tall(2), Variant("mode").config(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    output = inspect(tmp_path, "--format", form, "--layers").output
    expected: dict[str, Any] = {
        "text": "cannot be read without inputs",
        "json": '"looks_at": [\n  "x"\n ]',
        "csv": "layers.1.q_proj,q_proj,6,6,168,12,,\n",
    }
    assert expected[form] in (" ".join(output.split()) if form == "text" else output)


def test_a_run_that_trains_nothing_or_did_not_end_is_refused(tmp_path: Path) -> None:
    for method, message in (
        ("zero-shot", "is a run of zero-shot, which trains nothing: it has no adapter"),
        ("more", "has no adapter: its training did not end; go on with `dyads train RECIPE --out"),
    ):
        RunFolder.create(tmp_path / method, parse_recipe(RECIPE.replace("METHOD", method), "x"))
        result = inspect(tmp_path / method)
        assert result.exit_code == 2
        assert result.output.startswith(f"Error: '{tmp_path / method}' {message}")


# --- questions --------------------------------------------------------------------------------------------------------


def test_the_tokens_of_an_instance_are_shown(trained: Any) -> None:
    folder = trained("mode").path
    text = inspect(folder, "--what", "tokens", "--task", "count_words")
    assert text.exit_code == 0, text.output
    assert "Most used expert by token: count_words" in " ".join(text.output.split())
    content = json.loads(inspect(folder, "--what", "tokens", "--task", "count_words", "--format", "json").output)
    assert content["task"] == "count_words"
    assert len(content["texts"]) == len(content["arrays"]["weights"]["values"])


def test_options_of_another_question_are_refused(run: Path) -> None:
    for arguments, message in [
        (("--task", "a"), "--task is for --what tokens"),
        (("--what", "cost", "--instances", "2"), "--instances is for --what ranks, routing or tasks"),
        (("--what", "routing", "--layers"), "--layers is for the summary"),
        (("--what", "rooting"), "'rooting' is not one of"),
    ]:
        result = inspect(run, *arguments)
        assert result.exit_code == 2
        assert message in result.output
    result = inspect(run, "--what", "tokens")
    assert "all tokens use the same experts" in result.output


def test_the_summary_is_what_there_was_without_a_question(run: Path) -> None:
    assert inspect(run, "--what", "summary", "--layers").output == inspect(run, "--layers").output

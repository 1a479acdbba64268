# SPDX-License-Identifier: Apache-2.0
"""Every file of `dyads.analysis` that is a question: found by the verb, with tables, JSON and CSV, and on its page."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from importlib import import_module, reload
from inspect import cleandoc, signature
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, get_peft_model

import dyads.analysis
from dyads.analysis import questions
from dyads.cli import inspect as verb
from dyads.cli import main
from dyads.runs.folder import RunFolder
from made_adapters import save_adapter
from tiny import Variant, tiny_model

QUESTIONS = questions()
PAGE = (Path(__file__).parents[2] / "docs/analysis.md").read_text(encoding="utf-8")


def inspect(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, ["inspect", *map(str, arguments)])


@pytest.fixture
def folders(what: str, tmp_path: Path, trained: Callable[..., RunFolder], run: Callable[..., Path]) -> list[Path]:
    """Two LoRAs for a question about several, a run of MoDE for one about an instance, else an adapter of MoRE."""
    if what == "interference":
        return [run("all", {"a": [40, 60], "b": [10, 20]}), run("b", {"b": [10, 30]})]
    takes = signature(import_module(f"dyads.analysis.{what}").answer).parameters
    if "runs" in takes:
        found = []
        for seed in range(2):
            torch.manual_seed(seed)
            config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            found.append(tmp_path / f"task{seed}")
            get_peft_model(tiny_model("llama"), config).save_pretrained(found[-1])
        return found
    if "instance" in takes:
        return [trained("mode").path]
    return [save_adapter(tmp_path / "more", Variant("more"), lambda core, A, B: None)]


@pytest.mark.parametrize("what", QUESTIONS)
def test_every_question_has_a_table_json_and_csv(what: str, folders: list[Path]) -> None:
    text = inspect(*folders, "--what", what)
    assert text.exit_code == 0, text.output
    lines = text.output.splitlines()
    assert lines[0].startswith(f"{what} of ")
    assert max(len(line) for line in lines if "/" not in line) <= 80
    content = json.loads(inspect(*folders, "--what", what, "--format", "json").output)
    assert (content["schema"], content["what"]) == (1, what)
    rows = list(csv.DictReader(io.StringIO(inspect(*folders, "--what", what, "--format", "csv").output)))
    assert content["arrays"]
    for name, array in content["arrays"].items():
        axes, values = array["axes"], array["values"]
        own = [row for row in rows if row["array"] == name]
        sizes = [len(places) for places in axes.values()]
        assert len(own) == torch.Size(sizes).numel()
        for row in (own[0], own[-1]):
            number = values
            for axis, places in axes.items():
                number = number[places.index(row[axis])]
            assert row["value"] == ("" if number is None else f"{number:.6g}")


@pytest.mark.parametrize("what", QUESTIONS)
def test_every_question_is_in_the_help_and_on_its_page(what: str) -> None:
    assert re.search(rf"^  {what} +{re.escape(QUESTIONS[what])}$", inspect("--help").output, re.MULTILINE)
    assert f"| `{what}` |" in PAGE, f"docs/analysis.md has no row for {what}"


@pytest.mark.parametrize("what", QUESTIONS)
def test_a_question_takes_options_that_the_verb_has(what: str) -> None:
    first, *others = signature(import_module(f"dyads.analysis.{what}").answer).parameters.values()
    assert first.name in ("run", "runs")
    assert {one.name for one in others} <= {"instances", "task", "instance"}
    assert all(one.default is not one.empty for one in others)


def test_the_file_of_the_docstring_is_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its imports are those of the files beside it."""
    shown = re.search(
        r"^    '''Size.*?^        return Size.*?\n", dyads.analysis.__doc__ or "", re.MULTILINE | re.DOTALL
    )
    assert shown is not None
    heads = ["from __future__ import annotations", "from dataclasses import dataclass", "from pathlib import Path"]
    heads += ["from dyads.analysis.named_array import NamedArray, Table", "from dyads.runs.saved import SavedAdapter"]
    code = cleandoc(shown[0])
    title, _, rest = code.partition("\n")
    (tmp_path / "size.py").write_text("\n".join([title, *heads, rest]), encoding="utf-8")
    adapter = save_adapter(tmp_path / "adapter", Variant("mode"), lambda core, A, B: None)
    with monkeypatch.context() as patch:
        patch.setattr(dyads.analysis, "__path__", [*dyads.analysis.__path__, str(tmp_path)])
        reload(verb)
        assert re.search(r"^  size +trained parameters by layer$", inspect("--help").output, re.MULTILINE)
        shown_table = inspect(adapter, "--what", "size").output
        refused = inspect(adapter, "--what", "size", "--instances", "2")
    sys.modules.pop("dyads.analysis.size")
    reload(verb)
    assert "Trained parameters" in shown_table
    assert "--instances is for --what ranks, routing or tasks" in " ".join(refused.output.split())
    assert "size" not in questions()

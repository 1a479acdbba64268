# SPDX-License-Identifier: Apache-2.0
"""Tests of README and docs: code blocks run, the table of methods is current, links resolve, shipped recipes load."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dyads.cli import main
from dyads.cli.methods import command as methods_command
from dyads.methods import methods
from dyads.models.packaged import whereabouts
from dyads.recipe.load import load_recipe, parse_recipe
from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder
from dyads.tasks import families, load, metric_names
from dyads.tasks.own_rows import CHAT_COLUMNS
from dyads.training.adapt import adapt_recipe
from dyads.training.train import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CHANGELOG.md", "LOG.md", *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md")))]


def block(language: str) -> str:
    return next(iter(re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)))


def test_table_of_methods_is_current() -> None:
    table = CliRunner().invoke(methods_command, ["--format", "markdown"], catch_exceptions=False).output
    formula = (ROOT / "docs/formula.md").read_text(encoding="utf-8")
    shown = re.search(r"-->\n\n(\| method .*?)\n<!-- end -->", formula, re.DOTALL)
    assert shown is not None
    assert shown[1] == table, (
        "The table of methods in docs/formula.md is not current: replace it by the output of"
        " `dyads methods --format markdown`"
    )


def test_every_method_has_an_entry_among_the_papers() -> None:
    papers = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^ *name: (\w+)", papers, re.MULTILINE)) | set(re.findall(r"\w+Config\b", papers))
    without = [m.key for m in methods() if not {m.key, m.config.__name__} & named]
    assert not without, (
        f"docs/papers.md has no entry for {', '.join(without)}: add a section with the paper and its configuration as"
        " ours (a snippet with the config class, or a recipe with `name: …`)"
    )


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\((?!https?:)([\w./-]*)(?:#([\w-]+))?\)", text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {path}, which is not there"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {path or page} has no #{anchor}"


@pytest.mark.parametrize("study", ["demo", "sni15", "glue-minilm", "glue-ablations"])
def test_shipped_recipes_load_and_resolve_to_themselves(study: str) -> None:
    paths = [p for p in sorted((ROOT / "recipes" / study).glob("*.yaml")) if not p.name.startswith("study")]
    assert paths
    for path in paths:
        recipe = load_recipe(path)
        assert parse_recipe(recipe.resolved_yaml(), path.name) == recipe


@pytest.mark.parametrize(
    ("task", "family"), [("scitail", "scitail"), ("cb", "superglue"), ("boolq", "superglue")], ids=lambda value: value
)
def test_shipped_new_tasks_can_be_adapted_to(task: str, family: str, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", load_recipe(ROOT / "recipes/glue-ablations/more.yaml"))
    recipe = adapt_recipe(run.path, ROOT / f"recipes/glue-transfer/{task}.yaml", {"shots": 4})
    assert (recipe.tasks.family, recipe.train.steps, recipe.method.name) == (family, 60, "more")


# --- blocks and commands of the README --------------------------------------------------------------------------------


@pytest.fixture
def small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama in place of every model, with a real tokenizer: SmolLM2's where it is installed."""
    folder = tmp_path / "model"
    installed, there = whereabouts("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(installed) if installed is not None and there else byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr("dyads.models.packaged._folder_of", lambda key, packaged: folder)
    for auto in (AutoTokenizer, AutoModelForCausalLM):
        original = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda name, *a, o=original, **how: o(folder, *a, **how))
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and the chat template of SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[0], eos_token=special[2], pad_token=special[2]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


def test_the_python_example_runs_as_printed(small_model: Path) -> None:
    names: dict[str, Any] = {}
    exec(block("python"), names)
    mask = names["batch"]["attention_mask"]
    assert int(mask.sum(1).max()) > int(mask.sum(1).min()), "rows of unequal length, so that padding matters"
    assert not mask[:, -1].eq(0).any(), "padding is on the left, before what is generated"
    assert names["labels"][mask == 0].eq(-100).all()
    assert type(names["merged"]).__name__ == "LlamaForCausalLM"


def shell_lines(markdown: str) -> list[str]:
    """The lines of blocks without a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
    return [line for language, text in blocks if not language for line in text.splitlines()]


def commands(heading: str) -> list[list[str]]:
    """The commands in the blocks below a heading of the README."""
    _, _, section = README.partition(f"\n## {heading}\n")
    lines = [line for line in shell_lines(section.partition("\n## ")[0]) if line.startswith("dyads ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.slow
def test_the_commands_for_own_data_run_as_printed(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in block("json").splitlines()]
    with (tmp_path / "my-tasks.jsonl").open("w", encoding="utf-8") as file:
        for number in range(12):
            for row in rows:
                file.write(json.dumps({**row, "input": f"{row['input']} {number}"}) + "\n")
    (tmp_path / "mine.yaml").write_text(block("yaml"), encoding="utf-8")

    def short(recipe: Recipe, out: Path, **how: Any) -> RunFolder:
        steps = recipe.train.model_copy(update={"steps": 2, "batch_size": 4, "save_steps": None})
        scored = recipe.evaluate.model_copy(update={"limit": 1, "max_new_tokens": 3})
        return train(recipe.model_copy(update={"train": steps, "evaluate": scored}), out, **how)

    monkeypatch.setattr("dyads.training.train.train", short)
    given = commands("Your own data")
    assert [arguments[0] for arguments in given] == ["train", "train", "train", "compare", "show", "generate"]
    outputs = []
    for arguments in given:
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        outputs.append(result.stdout)
    assert "3 runs of packaged:smollm2-135m" in outputs[3]
    assert outputs[4].startswith("capital: exact_match")
    assert "Warning" not in outputs[5]


def test_every_command_of_the_readme_has_the_options_that_it_is_shown_with() -> None:
    group, context = main, click.Context(main)
    shown = [
        *re.findall(r"`dyads ([a-z]+)([^`\n]*)`", README),
        *re.findall(r"^dyads ([a-z]+)(.*)$", "\n".join(shell_lines(README)), re.MULTILINE),
    ]
    for verb, rest in shown:
        command = group.get_command(context, verb)
        assert command is not None, f"there is no verb '{verb}'"
        known = {name for parameter in command.params for name in parameter.opts}
        for option in re.findall(r"--[a-z-]+", rest.partition("#")[0]):
            assert option in known, f"dyads {verb} has no {option}"
    assert set(group.list_commands(context)) <= {verb for verb, _ in shown}, "a verb without a line"


def test_the_commands_of_the_makefile_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_numbers_of_the_readme_are_those_of_their_tables() -> None:
    """A row of a table in docs/results.md or docs/benchmarks.md for every score and ratio in the section on LoRA."""
    results, benchmarks = ((ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("results", "benchmarks"))
    _, _, section = README.partition("## Why rather than LoRA")
    section = " ".join(section.partition("\n## ")[0].split())
    for text, page, row in (
        ("MoDE 8x4 has 30.6", results, r"\| MoDE 8x4 \| 30\.6 \|"),
        ("LoRA 34 has 29.8", results, r"\| LoRA 34 \| 29\.8 \|"),
        ("difference +0.8, 95 % interval −1.3 to 3.0", results, r"\| MoDE 8x4 − LoRA 34 \| \+0\.8 \| -1\.3 to 3\.0 \|"),
        ("MoLORA 4x4 has 54.6", results, r"\| MoLORA 4x4 \|.* 54\.6 \|"),
        ("LoRA 18 has 54.5", results, r"\| LoRA 18 \|.* 54\.5 \|"),
        ("MoDE 16x4 takes 0.87 times", benchmarks, r"\| MoDE 16[×x]4 \| [\d,]+ \| 0\.87 "),
        ("decodes 0.91 of the tokens", benchmarks, r"decoding: MoDE 16[×x]4 ÷ PEFT LoRA, tokens/s \| ≥ 0\.9 \| 0\.91 "),
    ):
        assert text in section, f"the README no longer says {text!r}: change this test with it"
        assert re.search(row, page), f"no table says {text!r}"


def test_the_picture_is_drawn_from_the_results() -> None:
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs/picture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = (ROOT / "docs/sni15.svg").read_text(encoding="utf-8")
    assert module.rows((ROOT / "docs/results.md").read_text(encoding="utf-8"))[0][:2] == ("MoDE 8x4", 30.6)
    assert drawn == module.picture(), "python docs/picture.py draws it again"


# --- docs/tasks.md ----------------------------------------------------------------------------------------------------

TASKS = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")


def test_every_family_metric_and_column_of_own_rows_is_on_the_page_of_tasks() -> None:
    for name in (*families(), *metric_names(), *CHAT_COLUMNS):
        assert f"`{name}`" in TASKS, f"docs/tasks.md does not mention {name}"


@pytest.mark.parametrize(
    "text", re.findall(r"```yaml\n(.*?)```", TASKS, re.DOTALL), ids=lambda text: text.split("\n")[0]
)
def test_examples_on_the_page_of_tasks_are_valid(text: str) -> None:
    recipe = parse_recipe(f"name: a\nmodel: {{name: a}}\nmethod: {{name: lora}}\n{text}", "docs/tasks.md")
    assert recipe.tasks.family


def test_rows_on_the_page_of_tasks_are_read(tmp_path: Path) -> None:
    for number, text in enumerate(re.findall(r"```json\n(.*?)```", TASKS, re.DOTALL)):
        rows = [json.loads(line) for line in text.splitlines()]
        path = tmp_path / f"{number}.jsonl"
        splits = ("train", "test")
        path.write_text("".join(json.dumps({**r, "split": s}) + "\n" for r in rows for s in splits), encoding="utf-8")
        family = "chat" if any(key in row for row in rows for key in ("messages", "conversations")) else "files"
        assert load({"family": family, "path": path})

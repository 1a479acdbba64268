# SPDX-License-Identifier: Apache-2.0
"""Tests of README and docs: code blocks run, the table of methods is current, links resolve, shipped recipes load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

from dyads.cli.methods import command as methods_command
from dyads.methods import methods
from dyads.recipe.load import load_recipe, parse_recipe
from dyads.runs.folder import RunFolder
from dyads.training.adapt import adapt_recipe
from tiny import tiny_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CHANGELOG.md", "LOG.md", *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md")))]


def block(language: str) -> str:
    return next(iter(re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)))


def test_python_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenizer(texts: list[str], **options: Any) -> BatchEncoding:
        ids = torch.tensor([[3 + len(word) for word in text.split()] for text in texts])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: tiny_model("llama"))
    names: dict[str, Any] = {}
    exec(block("python"), names)
    assert type(names["merged"]).__name__ == "LlamaForCausalLM"


def test_recipe_example_is_a_recipe() -> None:
    recipe = parse_recipe(block("yaml"), "README.md")
    assert recipe.method.options == {"r": 4, "num_experts": 16}
    assert recipe.tasks.family == "files"


def test_table_of_methods_in_the_readme_is_current() -> None:
    table = CliRunner().invoke(methods_command, ["--format", "markdown"], catch_exceptions=False).output
    shown = re.search(r"-->\n\n(\| method .*?)\n<!-- end -->", README, re.DOTALL)
    assert shown is not None
    assert shown[1] == table, (
        "The README's table of methods is not current: replace it by the output of `dyads methods --format markdown`"
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

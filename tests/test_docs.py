# SPDX-License-Identifier: Apache-2.0
"""Tests of docs and the site: code and commands of every page, navigation, links, generated reference, formulas."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
import yaml
from peft import get_peft_model

import dyads
from dyads.cli import main
from dyads.methods import DyadsConfig, methods
from dyads.recipe.load import parse_recipe, recipe_keys
from dyads.studies.spec import study_keys
from tiny import TASKS, batch, tiny_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}


def blocks(*languages: str) -> list[Any]:
    """The fenced blocks in these languages on all pages, with page and line as the test's name."""
    found = []
    for page, text in TEXTS.items():
        for block in re.finditer(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
            if block[2] in languages:
                code = re.sub(f"^{block[1]}", "", block[3], flags=re.MULTILINE)
                found.append(pytest.param(code, id=f"{page}:{text[: block.start()].count(chr(10)) + 1}"))
    return found


# --- Python -----------------------------------------------------------------------------------------------------------


def free_names(tree: ast.Module) -> set[str]:
    """Names that a block reads and does not make: it continues other code."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
    return {node.id for node in names} - made


def runs_alone(code: str) -> bool:
    """Is the block run here? The others continue code, or load a model, data or a run, and have tests of their own."""
    return not free_names(ast.parse(code)) and not re.search(r"from_pretrained|load_dataset|Trainer\(|runs/", code)


def numbers(value: Any) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", str(value))]


@pytest.mark.parametrize("code", [param for param in blocks("python") if "/tutorials/" not in param.id])
def test_python_of_a_page_runs_and_prints_what_its_comments_say(code: str) -> None:
    """Blocks that stand alone are run; of the others, imports and names of dyads exist."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dyads":
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dyads":
            assert hasattr(dyads, node.attr), f"dyads has no {node.attr}"
    if not runs_alone(code):
        return
    printed: list[Any] = []
    exec(code, {"print": lambda *values: printed.extend([torch.Size([])] if not values else [values])})
    said = [line.partition("#")[2] for line in code.splitlines() if line.lstrip().startswith("print(")]
    assert len(said) == len(printed)
    for comment, values in zip(said, printed, strict=True):
        if "[" in comment:
            seen = [float(n) for v in values for n in torch.as_tensor(v).flatten()]
            assert seen == pytest.approx(numbers(comment), abs=5e-3)


def test_most_blocks_of_python_run_alone() -> None:
    alone = [param.id for param in blocks("python") if runs_alone(param.values[0])]
    assert {"docs/formula.md", "docs/papers.md"} <= {one.partition(":")[0] for one in alone}


@pytest.mark.parametrize("page", [page for page in TEXTS if "/tutorials/" in page])
def test_a_tutorial_prints_the_outputs_that_it_shows(page: str, tmp_path: Path) -> None:
    """Its blocks of Python run in turn in a process of their own; `text` after a block is all that it prints."""
    parts = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", TEXTS[page], re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"^```text$", TEXTS[page], re.MULTILINE)) == sum(bool(shown) for _, shown in parts) > 0
    script = "print('\\0', end='')\n".join(code for code, _ in parts)
    (tmp_path / "tutorial.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "tutorial.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\0") == [shown for _, shown in parts]


def test_a_task_is_added_and_trained_as_on_the_page_of_transfer() -> None:
    first, second = (param.values[0] for param in blocks("python") if param.id.startswith("docs/transfer.md"))
    config = dyads.MoREConfig(r=4, tasks=list(TASKS), target_modules=["q_proj"], task_dim=5)
    model = get_peft_model(tiny_model("llama"), config)
    names: dict[str, Any] = {"dyads": dyads, "torch": torch, "model": model, "batch": batch("llama")}
    exec(first, names)
    exec(second, names)
    model(**names["batch"], task="new").logits.sum().backward()
    for row in names["rows"]:
        assert row.grad is not None
        assert not row.grad[:-1].any()


# --- recipes ----------------------------------------------------------------------------------------------------------

RECIPE_KEYS = {key.name.split(".")[0] for key in recipe_keys()}


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_recipe_on_a_page_is_valid(text: str) -> None:
    """A block whose sections are all those of a recipe. What it leaves out is filled in."""
    given = yaml.safe_load(text)
    if not isinstance(given, dict) or not given.keys() <= RECIPE_KEYS - {"extends"}:
        return  # a study, or another program's file
    if "name" not in given.get("method", {"name"}):
        return  # values of a study
    missing = {"name": "page", "model": {"name": "a"}, "method": {"name": "lora"}, "tasks": {"family": "starter"}}
    filled = {key: value for key, value in missing.items() if key not in given}
    whole = text + (yaml.safe_dump(filled) if filled else "")
    assert parse_recipe(whole, "page").method.name == given.get("method", missing["method"])["name"]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands() -> Iterator[Any]:
    for page, text in TEXTS.items():  # in sentences; "…" leaves something out
        for line in re.findall(r"`(dyads [a-z][^`]*|make [a-z-]+)`", text):
            if "…" not in line and "|" not in line:
                yield pytest.param(" ".join(line.split()), id=f"{page}: {line[:60]}")
    for param in blocks("", "console", "sh", "bash", "shell"):
        text = param.values[0].replace("\\\n", " ")
        for line in text.splitlines():
            words = re.match(r"(?:\$ )?((?:[A-Z_]+=\S* )*(?:dyads|make|python) .*)", line)
            if words:
                yield pytest.param(words[1], id=f"{param.id}: {words[1][:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_on_a_page_has_the_options_that_it_is_shown_with(line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    for stop in ("&&", "|", ">", ";"):
        words = words[: words.index(stop)] if stop in words else words
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert [word for word in arguments if "=" not in word and word not in targets] == []
        return
    for word in arguments:
        if re.match(r"(recipes|docs|tests|src)/[\w/.-]+$", word):
            assert (ROOT / word).exists(), f"{word} is not there"
    if program == "python":
        if "-m" in arguments:
            module = arguments[arguments.index("-m") + 1].split(".")
            places = [folder.joinpath(*module) for folder in (ROOT, ROOT / "src", ROOT / "tests")]
            ours = module[0] in ("dyads", "benchmarks")  # others are programs that need not be installed here
            assert not ours or any(p.is_dir() or p.with_suffix(".py").exists() for p in places), ".".join(module)
        return
    arguments = [a for a in arguments if a not in ("--debug",)]
    if arguments[0].startswith("-") or arguments[0].isupper():  # `dyads --help`, `dyads VERB --help`
        return
    group = click.Context(main, info_name="dyads")
    command = main.get_command(group, arguments[0])
    assert command is not None, f"there is no verb '{arguments[0]}'"
    context = click.Context(command, info_name=arguments[0], parent=group)
    if arguments[-1].startswith("--"):  # an option that is mentioned without its value
        flags = {
            name for parameter in command.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)
        }
        assert arguments.pop() in flags
    values, _, _ = command.make_parser(context).parse_args(arguments[1:])
    for parameter in command.params:
        if isinstance(parameter.type, click.Choice) and isinstance(values.get(parameter.name or ""), str):
            parameter.type.convert(values[parameter.name or ""], parameter, context)


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> ModuleType:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("dyads_site", ROOT / "docs/site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def navigation() -> list[str]:
    """The pages in mkdocs.yml, in order."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    entries = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    pages: list[str] = []
    while entries:
        ((_, target),) = entries.pop(0).items()
        if isinstance(target, list):
            entries = target + entries
        else:
            pages.append(target)
    return pages


def test_every_page_is_in_the_navigation_once(site: ModuleType) -> None:
    listed = navigation()
    assert len(listed) == len(set(listed))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    missing = sorted((pages | site.ROOT_PAGES.keys() | site.REFERENCE.keys()) - set(listed))
    assert not missing, f"add {', '.join(missing)} to nav in mkdocs.yml"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "[a](formula.md#not-there)",
            "contains a link 'formula.md#not-there', but the doc 'formula.md' does not contain",
        ),
        ("[a](gone.md)", "contains a link 'gone.md', but the target is not found"),
        ("", 'pages exist in the docs directory, but are not included in the "nav"'),
    ],
)
def test_a_fault_in_a_page_ends_make_docs(fault: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    (build,) = re.findall(r"-m (mkdocs build.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LOG.md",
        "SECURITY.md",
        "mkdocs.yml",
        "src",
        "recipes",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    if fault:
        with (tmp_path / "docs/questions.md").open("a", encoding="utf-8") as file:
            file.write(f"\n{fault}\n")
    else:
        (tmp_path / "docs/unlisted.md").write_text("# Unlisted\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(build)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert message in " ".join(done.stderr.split())


def test_an_entry_without_a_page_is_left_out(site: ModuleType) -> None:
    class Config:
        nav = [{"A": "formula.md"}, {"B": [{"C": "not-there.md"}]}, {"D": "reference/python.md"}, {"E": "index.md"}]  # noqa: RUF012

    assert site.on_config(Config).nav == [{"A": "formula.md"}, {"D": "reference/python.md"}, {"E": "index.md"}]


@pytest.mark.parametrize(
    ("page", "written", "on_the_site"),
    [
        ("index.md", "[formula](docs/formula.md#letters)", "[formula](formula.md#letters)"),
        ("index.md", "![scores](docs/scores.svg)", "![scores](scores.svg)"),
        ("index.md", "[`LOG.md`](LOG.md), [log](LOG.md)", "[`LOG.md`](log.md), [log](log.md)"),
        ("studies.md", "[recipes](../README.md#on-the-command-line)", "[recipes](index.md#on-the-command-line)"),
        ("studies.md", "[glue](../recipes/glue-minilm/study.yaml)", "glue"),
        ("studies.md", "[papers](papers.md)", "[papers](papers.md)"),
        ("studies.md", "[gone](gone.md)", "[gone](gone.md)"),
        ("studies.md", "[gone](../gone.md)", "[gone](../gone.md)"),
        ("studies.md", "[here](#claims) [there](https://a.b/c.md)", "[here](#claims) [there](https://a.b/c.md)"),
        ("index.md", "`[text](docs/formula.md)`", "`[text](docs/formula.md)`"),
        ("index.md", "```\n[text](docs/formula.md)\n```", "```\n[text](docs/formula.md)\n```"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(
    site: ModuleType, page: str, written: str, on_the_site: str
) -> None:
    assert site.site_links(written, page) == on_the_site


def test_a_notebook_has_the_code_and_the_outputs_of_its_tutorial(site: ModuleType) -> None:
    text = TEXTS["docs/tutorials/add-a-method.md"]
    cells = json.loads(site.notebook(text))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["source"] for cell in code] == re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert code[2]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": "True\nTrue\n"}]
    prose = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    assert prose.startswith("# Add a method in one file")
    assert prose.count("$$") == 2
    assert "](" not in prose
    assert "```" not in prose


def test_formulas_become_mathml(site: ModuleType) -> None:
    made = site.formulas(
        '<p>a <span class="arithmatex">\\(h &lt; A\\)</span></p><div class="arithmatex">\\[x^2\\]</div>'
    )
    assert "arithmatex" not in made
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">' in made
    assert "&lt;" in made or "&#x0003C;" in made
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in made


def test_the_reference_has_every_verb_and_option(site: ModuleType) -> None:
    page = site.command_page()
    group = click.Context(main, info_name="dyads")
    for name in main.list_commands(group):
        _, _, section = page.partition(f"\n## dyads {name}\n")
        section = section.partition("\n## dyads ")[0]
        command = main.get_command(group, name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.opts[-1] in section, f"{name} {parameter.opts}"


def test_the_reference_has_every_key(site: ModuleType) -> None:
    for page, keys in ((site.key_page(), recipe_keys()), (site.study_page(), study_keys())):
        for key in keys:
            line = next((line for line in page.splitlines() if line.startswith(f"| `{key.name}` |")), None)
            assert line is not None, f"no line for {key.name}"
        assert "\n\n\n|" not in page


def test_the_reference_has_every_option_of_every_method(site: ModuleType) -> None:
    page = site.method_page()
    for method in methods():
        _, _, section = page.partition(f"\n## {method.key}\n")
        section = section.partition("\n## ")[0] + page.partition("\n## Options of all methods")[2]
        for field in fields(method.config):
            if field.name in {f.name for f in fields(DyadsConfig)} | set(method.config.__annotations__):
                hidden = field.name not in section
                assert not hidden or field.name in site.PEFT_FIELDS, f"{method.key}: {field.name}"


def test_the_reference_has_every_public_name(site: ModuleType) -> None:
    page = site.python_page()
    for name in dyads.__all__:
        assert name.startswith("__") or re.search(rf"^::: dyads\.[\w.]+\.{name}$", page, re.MULTILINE)
    assert "- VersionError" in page
    assert all(f".{method.config.__name__}\n" in site.method_page() for method in methods())

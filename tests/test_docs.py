# SPDX-License-Identifier: Apache-2.0
"""Tests of docs and the site: commands in sentences, navigation, links, generated reference, formulas."""

from __future__ import annotations

import contextlib
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
import yaml

import dyads
from dyads.cli import main
from dyads.methods import DyadsConfig, methods
from dyads.recipe.load import recipe_keys
from dyads.studies.spec import study_keys

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}


# --- commands ---------------------------------------------------------------------------------------------------------


INLINE = {
    page: re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))
    for page, text in TEXTS.items()
}
"""Code in sentences; blocks are run (tests/docs)."""
PROGRAMS = {"python -m benchmarks": "benchmarks/__main__.py", "python tests/kills.py": "tests/kills.py"}
"""Other programs of ours, with the files that have their options."""
LM_EVAL_OPTIONS = {"--apply_chat_template"}


def commands() -> Iterator[Any]:
    """Commands in sentences; also of `python -m dyads`, and of torchrun and accelerate, which start it."""
    for page, code in INLINE.items():
        for line in (" ".join(part.split()) for part in code):
            line = re.sub(r"^(?:python|torchrun|accelerate launch)\b.* -m dyads(?:\.cli)? ", "dyads ", line)
            if re.match(r"(?:dyads|make) [a-z-]|" + "|".join(PROGRAMS), line):
                yield pytest.param(line, id=f"{page}: {line[:60]}")


def click_commands() -> dict[str, tuple[click.Command, click.Context]]:
    """Every verb, with a context to parse in."""
    group = click.Context(main, info_name="dyads")
    found = {name: main.get_command(group, name) for name in main.list_commands(group)}
    return {name: (verb, click.Context(verb, info_name=name, parent=group)) for name, verb in found.items() if verb}


VERBS = click_commands()


def parse(verb: str, arguments: list[str]) -> None:
    """click.UsageError for an option that the verb lacks, or for a value that is none of its choices.

    `…` is a value that a page leaves out, and so is all after an option at the end; A|B are both checked.
    """
    command, context = VERBS[verb]
    if arguments and arguments[-1].startswith("--"):
        flags = [name for one in command.get_params(context) for name in (*one.opts, *one.secondary_opts)]
        if arguments[-1] not in flags:
            raise click.NoSuchOption(arguments[-1], ctx=context)
        arguments = arguments[:-1]
    values, _, _ = command.make_parser(context).parse_args(list(arguments))
    for parameter in command.params:
        given = values.get(parameter.name or "")
        if isinstance(parameter.type, click.Choice) and isinstance(given, str) and given != "…":
            for one in given.split("|"):
                parameter.type.convert(one, parameter, context)


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
        (file,) = [file for start, file in PROGRAMS.items() if line.startswith(start)]
        text = (ROOT / file).read_text(encoding="utf-8")
        assert [
            word for word in arguments if word.startswith("--") and word != "--help" and f'"{word}"' not in text
        ] == []
        return
    verb, *arguments = [a for a in arguments if a not in ("--debug",)]
    if not verb.startswith("-") and not verb.isupper() and verb != "…":  # `dyads --help`, `dyads VERB --help`
        assert verb in VERBS, f"there is no verb '{verb}'"
        parse(verb, arguments)


@pytest.mark.parametrize(
    "option", sorted({" ".join(part.split()) for code in INLINE.values() for part in code if part.startswith("--")})
)
def test_an_option_on_a_page_is_one_of_a_verb(option: str) -> None:
    """Also its value, where it has choices; or it is an option of another program of ours, or of lm-eval."""
    words = shlex.split(option)

    def parses(verb: str) -> bool:
        with contextlib.suppress(click.UsageError):
            parse(verb, words)
            return True
        return False

    texts = [(ROOT / file).read_text(encoding="utf-8") for file in PROGRAMS.values()]
    others = words[0] in LM_EVAL_OPTIONS or any(f'"{words[0]}"' in text for text in texts)
    assert others or any(map(parses, VERBS)), f"no verb has {option}"


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("train", ["RECIPE", "--resum"]),
        ("train", ["RECIPE", "--step", "3"]),
        ("study", ["FILE", "--engine", "rey"]),
        ("inspect", ["RUN", "--what", "routing|task"]),
    ],
)
def test_a_misspelt_option_or_choice_is_noticed(verb: str, arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        parse(verb, arguments)


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


def test_the_questions_of_a_new_user_are_headings() -> None:
    headings = re.findall(r"^## (.*)", TEXTS["docs/questions.md"], re.MULTILINE)
    for words in (
        "own chat data",
        "two GPUs",
        "Which method",
        "without dyads",
        "resume",
        "interval",
        "add a metric",
        "memory",
        "serve",
        "cite",
    ):
        assert any(words in heading for heading in headings), f"no question about {words!r}"


def test_the_citation_is_the_same_on_the_page_and_in_its_file() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == dyads.__version__
    shown = dict(re.findall(r"^  (\w+) = \{+(.*?)\}+,?$", TEXTS["docs/questions.md"], re.MULTILINE))
    assert shown == {
        "title": cited["title"],
        "author": cited["authors"][0]["name"],
        "version": cited["version"],
        "license": cited["license"],
    }


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
        ("studies.md", "[glue](../recipes/evidence/study-glue.yaml)", "glue"),
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


def test_files_and_commands_of_a_tutorial_are_cells(site: ModuleType) -> None:
    text = '# A\n\n```yaml title="a.yaml"\nx: 1\n```\n\nRun:\n\n'
    text += "```\npip install b\ndyads c \\\n    --d  # e\ndyads f\n```\n\n```text\nout\n```\n"
    text += "\n```json\n{}\n```\n\n```text\na drawing\n```\n"
    first, file, _, run, last = json.loads(site.notebook(text))["cells"]
    assert first["source"] == "# A"
    assert file["source"] == "%%writefile a.yaml\nx: 1\n"
    assert run["source"] == "%pip install b\n!dyads c \\\n    --d  # e\n!dyads f\n"
    assert run["outputs"] == [{"name": "stdout", "output_type": "stream", "text": "out\n"}]
    assert last["source"] == "```json\n{}\n```\n\n```text\na drawing\n```"


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

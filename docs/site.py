# SPDX-License-Identifier: Apache-2.0
"""Hooks of the site (mkdocs.yml): pages of the repository's root, generated reference, links, formulas.

The pages are read in the repository and on the site. Links are written for the repository, and rewritten here. The
pages on the command line, recipe keys and methods are made from click, pydantic and the configs at each build.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from peft import PeftConfig

import dyads
from dyads.cli import main
from dyads.cli.methods import _default as default_of
from dyads.methods import DyadsConfig, methods
from dyads.recipe.load import recipe_keys
from dyads.recipe.recipe_errors import Key
from dyads.studies.spec import study_keys

ROOT = Path(__file__).parent.parent
ROOT_PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "log.md": "LOG.md",
    "security.md": "SECURITY.md",
}
"""Pages of the site that are files of the repository's root."""
PEFT_FIELDS = {f.name for f in fields(PeftConfig)}
"""Fields that PEFT itself sets or reads, as in every config of PEFT."""

SEARCH_WEIGHT = {"questions.md": 4, "log.md": 0.1, "changelog.md": 0.2, "decisions.md": 0.5}
"""Of pages in the site's search, where it is not 1."""


# --- reference --------------------------------------------------------------------------------------------------------


BAR = re.compile(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)")
"""A bar outside inline code, where it would end a table's cell."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a cell keeps its lines together."""
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(BAR.sub(r"\\|", " ".join(cell.split())) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    """Inline code; empty for an empty text."""
    return f"`{text}`" if text else ""


def prose(text: str) -> str:
    """A help text in Markdown, where angle brackets are text."""
    return text.replace("<", "&lt;").replace("*", "\\*")


def command_page() -> str:
    """Every verb with its arguments and options."""
    group = click.Context(main, info_name="dyads")
    parts = ["# Command line\n", "Every verb of `dyads`, as `dyads VERB --help` prints it.\n"]
    for name in main.list_commands(group):
        command = main.get_command(group, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=group)
        parts.append(f"## dyads {name}\n\n{prose(cleandoc(command.help or ''))}\n")
        parts.append(f"```\n{' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```\n")
        options = (param for param in command.get_params(context) if isinstance(param, click.Option))
        records = [record for option in options if (record := option.get_help_record(context))]
        parts.append(table(["option", "meaning"], ((code(option), prose(text)) for option, text in records)))
        if command.epilog:
            parts.append("```\n" + command.epilog.replace("\b\n", "").strip("\n") + "\n```\n")
    return "\n".join(parts)


def key_tables(keys: Iterable[Key]) -> Iterator[str]:
    """Keys of a recipe or a study: a heading and a table for each section, and for each variant of a section."""
    head, rows = "", []
    for key in keys:
        section = key.name.split(".")[0] if "." in key.name else "Top level"
        variant = f"{section}: {key.choices[0]}" if len(key.choices) == 1 else None
        if variant or section != head.split(":")[0]:
            if rows:
                yield f"## {head}\n\n" + table(["key", "default", "meaning"], rows)
            head, rows = variant or section, []
        allowed = f" One of: {', '.join(key.choices)}." if len(key.choices) > 1 else ""
        default = key.choices[0] if variant else key.default
        rows.append((code(key.name), code(default), prose(key.help.rstrip(".") + "." + allowed)))
    if rows:
        yield f"## {head}\n\n" + table(["key", "default", "meaning"], rows)


def key_page() -> str:
    """Every key of a recipe."""
    intro = """# Recipe keys

A recipe is a YAML file that holds its differences from these defaults. A key without a default is required.
`dyads train --keys` prints the same list; an unknown key is refused with the nearest name.
"""
    return "\n".join([intro, *key_tables(recipe_keys())])


def study_page() -> str:
    """Every key of a study."""
    intro = "# Study keys\n\nKeys of a file for `dyads study`. `dyads study --keys` prints the same list.\n"
    return "\n".join([intro, *key_tables(study_keys())])


def option_table(options: Iterable[Any]) -> str:
    """Options of a config with their defaults."""
    return table(
        ["option", "default", "meaning"],
        ((code(f.name), code(default_of(f)), prose(str(f.metadata.get("help", "")))) for f in options),
    )


def method_page() -> str:
    """Every method with its own options, then the options that all share."""
    intro = """# Methods and their options

Options of a recipe's section `method`, and arguments of the config in Python. `lora` is PEFT's LoRA, with the fields
of `peft.LoraConfig`. [How it works](../formula.md) derives the methods, and [papers](../papers.md) has their sources.
"""
    parts = [intro]
    for method in methods():
        own = [
            f for f in fields(method.config) if f.name in method.config.__annotations__ and f.name not in PEFT_FIELDS
        ]
        config = f"{method.config.__module__}.{method.config.__name__}"
        parts.append(f"## {method.key}\n\n{prose(method.summary)}\n")
        parts.append(f"::: {config}\n    options:\n      members: [paper]\n")
        parts.append(option_table(own))
    parts.append("## Options of all methods\n\nA method's own table above has these where its default differs.\n")
    parts.append(option_table(f for f in fields(DyadsConfig) if f.name not in PEFT_FIELDS))
    return "\n".join(parts)


def python_page() -> str:
    """The public functions, and the exceptions."""
    functions = [
        f"::: {getattr(dyads, name).__module__}.{name}\n" for name in dyads.__all__ if not name.startswith("__")
    ]
    errors = [name for name in vars(dyads.errors) if name.endswith("Error")]
    intro = """# Python

The public names of `dyads` are these functions and the config of each method ([methods](methods.md)). All else in
a model with an adapter is PEFT's.
"""
    exceptions = "## Exceptions\n\n::: dyads.errors\n    options:\n      members:"
    return "\n".join([intro, *functions, exceptions + "".join(f"\n        - {name}" for name in errors) + "\n"])


REFERENCE = {
    "reference/command-line.md": command_page,
    "reference/recipe.md": key_page,
    "reference/study.md": study_page,
    "reference/methods.md": method_page,
    "reference/python.md": python_page,
}


# --- links and formulas -----------------------------------------------------------------------------------------------

LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<path>[^()\s#]+)(?P<anchor>#[\w-]*)?\)")
CODE = re.compile(r"(^ *```.*?^ *```[^\n]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def site_links(markdown: str, page: str) -> str:
    """The page's links between files of the repository as links between pages of the site.

    A file that is no page, such as a recipe, loses its link. A link to nothing stays, for mkdocs to refuse.
    """
    source = ROOT_PAGES.get(page, f"docs/{page}")
    pages = {file: name for name, file in ROOT_PAGES.items()}

    def rewritten(link: re.Match[str]) -> str:
        path = link["path"]
        if ":" in path or page in REFERENCE:
            return link[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        to = pages.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if to is None:
            return link["text"] if (ROOT / target).exists() else link[0]
        relative = posixpath.relpath(to, posixpath.dirname(page) or ".")
        return f"{link['image']}[{link['text']}]({relative}{link['anchor'] or ''})"

    parts = CODE.split(markdown)  # code at odd places; a link's text may hold inline code, which is put back first
    held: list[str] = []

    def hold(part: str) -> str:
        held.append(part)
        return f"\x00{len(held) - 1}\x00"

    text = "".join(hold(part) if i % 2 else part for i, part in enumerate(parts))
    return re.sub("\x00(\\d+)\x00", lambda found: held[int(found[1])], LINK.sub(rewritten, text))


def formulas(content: str) -> str:
    """LaTeX that arithmatex found, as MathML."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[3]), display=display)

    return FORMULA.sub(mathml, content)


# --- notebooks --------------------------------------------------------------------------------------------------------

FENCE = re.compile(r'^```([\w-]*)(?: title="([^"\n]+)")?\n(.*?)^```\n', re.MULTILINE | re.DOTALL)


def cell_code(language: str, title: str | None, content: str) -> str | None:
    """A block as the source of a code cell: Python, a file that is written, or commands; None for any other block."""
    if language == "python":
        return content
    if title is not None:
        return f"%%writefile {title}\n{content}"
    if language in ("", "sh"):
        starts = re.sub(r"^(?=\S)(?<!\\\n)", "!", content, flags=re.MULTILINE)
        return re.sub(r"^!pip ", "%pip ", starts, flags=re.MULTILINE)
    return None


def notebook(markdown: str) -> str:
    """A tutorial as a notebook: blocks of code, files and commands are its cells, `text` after one is its output."""
    cells: list[dict[str, Any]] = []
    text = ""

    def close() -> None:
        nonlocal text
        if text.strip():
            plain = LINK.sub(lambda link: link["text"], text.strip())  # its links are between pages of the site
            cells.append({"cell_type": "markdown", "metadata": {}, "source": plain})
        text = ""

    parts = FENCE.split(markdown)
    for before, language, title, content in zip(
        parts[::4], [*parts[1::4], "end"], [*parts[2::4], None], [*parts[3::4], ""], strict=True
    ):
        text += before
        code = cell_code(language, title, content)
        if code is not None:
            close()
            cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": code}
            cells.append(cell)
        elif language == "text" and not text.strip():
            cells[-1]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": content}]
        elif language == "math":
            text += f"$${content}$$\n"
        elif language != "end":
            text += f"```{language}\n{content}```\n"
    close()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


# --- hooks ------------------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out entries of the navigation whose page is not there; mkdocs refuses pages without an entry."""

    def there(entry: dict[str, Any]) -> dict[str, Any] | None:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept = [found for one in target if (found := there(one))]
            return {title: kept} if kept else None
        exists = target in REFERENCE or target in ROOT_PAGES or (ROOT / "docs" / target).exists()
        return entry if exists else None

    config.nav = [found for entry in config.nav or [] if (found := there(entry))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root, the reference, and the tutorials as notebooks."""
    for page, source in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, made in REFERENCE.items():
        files.append(File.generated(config, page, content=made()))
    for tutorial in sorted((ROOT / "docs/tutorials").glob("*.md")):
        content = notebook(tutorial.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"tutorials/{tutorial.stem}.ipynb", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links for the site, a tutorial's notebook, and the page's weight in the search."""
    if page.file.src_uri.startswith("tutorials/"):
        markdown = markdown.replace("\n", f"\n\n[The same as a notebook]({Path(page.file.src_uri).stem}.ipynb)\n", 1)
    page.meta["search"] = {"boost": SEARCH_WEIGHT.get(page.file.src_uri, 1)}
    return site_links(markdown, page.file.src_uri)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML."""
    return formulas(content)

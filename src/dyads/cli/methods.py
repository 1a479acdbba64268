# SPDX-License-Identifier: Apache-2.0
"""`dyads methods`: list of the methods with their options, also as a table."""

from __future__ import annotations

from dataclasses import MISSING, Field
from typing import Any

import click

LORA = "PEFT's LoRA, the baseline; its lora_alpha is 16 unless set"


@click.command(
    short_help="List the methods and their options.",
    epilog="""\b
Examples:
  dyads methods
  dyads methods mode          # its options, and those that all methods share
  dyads methods --format markdown
  dyads budget --help         # how many parameters they train""",
)
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["terminal", "markdown"]),
    default="terminal",
    show_default=True,
    help="markdown: one table row for each method that is trained, without options.",
)
def command(names: tuple[str, ...], form: str) -> None:
    """List the methods with their own options and defaults; with NAME also the options that all methods share."""
    from dataclasses import fields

    from peft import LoraConfig, PeftConfig

    from dyads.errors import ConfigError, did_you_mean
    from dyads.methods import DyadsConfig, methods
    from dyads.recipe.spec import UNTRAINED

    family = {m.key: m for m in methods()}
    known = ("lora", *family, *UNTRAINED)
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown method '{name}'{did_you_mean(name, known)}")
    if form == "markdown":
        click.echo("| method | config | what it is |\n|---|---|---|")
        for name in names or ("lora", *sorted(family)):
            if name == "lora":
                click.echo(f"| `lora` | PEFT's `LoraConfig` | {LORA} |")
            elif name in family:
                click.echo(f"| `{name}` | `{family[name].config.__name__}` | {family[name].summary} |")
        return
    hidden = {f.name for f in fields(PeftConfig)}
    shared = [f for f in fields(DyadsConfig) if f.name not in hidden and "help" in f.metadata]
    width = max(map(len, known)) + 2
    for name in names or known:
        if name in family:
            method = family[name]
            usual = {f.name for f in fields(DyadsConfig)}
            # Its own options are those that it declares, which may be shared ones with another default.
            declared = method.config.__annotations__
            own = [f for f in fields(method.config) if f.name in declared or f.name not in hidden | usual]
            own.sort(key=lambda f: f.name in usual and f.name != "r")
            _head(name, method.summary, width)
            _options([*own, *(f for f in shared if names and f.name not in {o.name for o in own})], width)
        elif name == "lora":
            _head(name, LORA, width)
            if names:
                has = {f.name for f in fields(LoraConfig)}
                _options([f for f in shared if f.name in has], width)
                click.echo(" " * width + "… and every other field of peft.LoraConfig")
        else:
            what = {"zero-shot": "the bare model", "majority": "always the most frequent answer of the training split"}
            _head(name, f"trains nothing: {what[name]}", width)
    if not names:
        click.echo("\nOptions that all trained methods share (`dyads methods NAME` explains them):")
        click.echo(
            click.wrap_text(
                ", ".join(f"{f.name}={_default(f)}" for f in shared), initial_indent="  ", subsequent_indent="  "
            )
        )


def _head(name: str, text: str, width: int) -> None:
    indented = click.wrap_text(text, initial_indent=" " * width, subsequent_indent=" " * width)
    click.echo(click.style(name, bold=True) + indented[len(name) :])


def _options(options: list[Field[Any]], width: int) -> None:
    for option in options:
        text = str(option.metadata.get("help", "")).split("\n")[0]
        head = f"{option.name} = {_default(option)}"
        click.echo(" " * width + head)
        if text:
            pad = " " * (width + 4)
            click.echo(click.wrap_text(text, initial_indent=pad, subsequent_indent=pad))


def _default(option: Field[Any]) -> str:
    value = option.default_factory() if option.default_factory is not MISSING else option.default
    if value is MISSING:
        return "(required)"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

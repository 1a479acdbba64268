# SPDX-License-Identifier: Apache-2.0
"""`dyads budget`: parameter counts of methods, and the r or num_experts that meets a budget."""

from __future__ import annotations

import math
import re
from typing import Any

import click

_WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


@click.command(
    short_help="Count a method's parameters, or meet a budget.",
    epilog="""\b
Examples:
  model=packaged:smollm2-135m
  dyads budget --model $model --method lora --option r=34
  dyads budget --model $model --method mode --option r=4 --parameters 2e6
  dyads budget --model $model --method mode --option r=4 --like lora:r=34
  dyads budget --model $model --method more --option num_tasks=12 \\
               --like lora:r=16 --solve r""",
)
@click.option("--model", required=True, help="A hub id, a folder, or packaged:smollm2-135m. No weights are loaded.")
@click.option("--method", required=True, help="As `dyads methods` lists them.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of the method; repeatable.")
@click.option("--parameters", type=float, metavar="N", help="The budget; 2e6 is a number.")
@click.option(
    "--like",
    metavar="METHOD:KEY=VALUE,...",
    help="The budget is this method's count, on the same modules unless it names others.",
)
@click.option(
    "--solve", type=click.Choice(["r", "num_experts"]), help="The option to choose. Default: the one not given."
)
def command(
    model: str, method: str, options: tuple[str, ...], parameters: float | None, like: str | None, solve: str | None
) -> None:
    """Count the parameters that a method trains on a model; or find the r or num_experts that meets a budget."""
    from dyads.errors import ConfigError
    from dyads.recipe.yaml_source import read_overrides

    if parameters is not None and like is not None:
        raise click.UsageError("give either --parameters or --like")
    if parameters is not None and not (math.isfinite(parameters) and parameters >= 1 and parameters.is_integer()):
        raise ConfigError(f"--parameters must be a whole number from 1, got {parameters:g}")
    if solve is not None and parameters is None and like is None:
        raise click.UsageError(f"--solve {solve} needs a budget: --parameters or --like")
    given = read_overrides(options, "--option").data
    if solve in given:
        raise ConfigError(f"--solve {solve} chooses {solve}: remove --option {solve}={given[solve]}")
    free: Any = solve or ("num_experts" if "r" in given else "r")
    if free in given and (parameters is not None or like is not None):
        raise ConfigError("r and num_experts are both given, so neither can be chosen to meet the budget: remove one")
    from dyads.models import budget

    if parameters is None and like is None:
        count = budget.count(model, method, given, ())
        _show(model, method, given, count)
        return
    if like is not None:
        name, there = _parsed(like)
        there = {**{key: given[key] for key in _WHERE if key in given}, **there}
        reference = budget.count(model, name, there, ())
        _show(model, name, there, reference)
        target = reference.trainable
    else:
        assert parameters is not None
        target = int(parameters)
    value, count = budget.solve(model, method, given, free=free, parameters=target, task_names=())
    _show(model, method, {**given, free: value}, count)
    click.echo(f"  {100 * (count.trainable - target) / target:+.1f} % of the budget {target:,}")


def _show(model: str, method: str, options: dict[str, Any], count: Any) -> None:
    named = f"{method} ({', '.join(f'{k}={v}' for k, v in options.items())})" if options else method
    click.echo(click.wrap_text(f"{named} on {model}", subsequent_indent="    "))
    click.echo(f"  {count.trainable:,} parameters, {count.percent:.2f} % of the model's {count.base:,}")


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """`lora:r=34,target_modules=[q_proj,v_proj]`: commas in brackets belong to the value."""
    from dyads.recipe.yaml_source import read_overrides

    method, _, rest = text.partition(":")
    parts = re.split(r",(?![^\[{]*[\]}])", rest) if rest else []
    return method.strip(), read_overrides(parts, f"--like {method}:").data

# SPDX-License-Identifier: Apache-2.0
"""`dyads budget`: parameters of a method, the sizes that meet a budget, and memory and time of a training step."""

from __future__ import annotations

import math
import re
from typing import Any

import click

from dyads.console import printable, rounded, size


@click.command(
    short_help="Count parameters, meet a budget, estimate memory and time.",
    epilog="""\b
Examples:
  model=packaged:smollm2-135m
  dyads budget --model $model --method lora --option r=34
  dyads budget --model $model --method mode --option r=4 --parameters 2e6
  dyads budget --model $model --method mode --option r=4 --like lora:r=34
  dyads budget --model $model --method more --option num_tasks=12 \\
               --like lora:r=16 --solve r
  dyads budget --model $model --method lora --gpu 24 --tokens 1024
\b
--gpu takes a size in GB or one of T4, L4, RTX3090, RTX4090, L40S, A100-40,
A100-80, H100, H200. How good its estimates are: docs/step-cost.md.""",
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
@click.option("--gpu", metavar="GB|NAME", help="Estimate memory and time of a training step on such a GPU.")
@click.option("--examples", type=click.IntRange(min=1), default=16, show_default=True, help="Of the step.")
@click.option("--tokens", type=click.IntRange(min=2), default=512, show_default=True, help="Of an example, in all.")
@click.option("--labels", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens of an answer.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--attention", help="eager, grouped or sdpa. Default: sdpa.")
@click.option("--gradient-checkpointing", "checkpointing", is_flag=True, help="As train.gradient_checkpointing.")
def command(
    model: str,
    method: str,
    options: tuple[str, ...],
    parameters: float | None,
    like: str | None,
    solve: str | None,
    gpu: str | None,
    **step: Any,
) -> None:
    """Count the parameters that a method trains on a model; or find the r or num_experts that meets a budget.

    With --gpu, also estimate the memory and the time of a training step.
    """
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

    if gpu is not None:
        from dyads.models.step_cost import gpu_of

        gpu_of(gpu)  # an unknown one is refused before anything is counted
    if parameters is None and like is None:
        count = budget.count(model, method, given, ())
        _show(model, method, given, count)
        if gpu is not None:
            _show_step(model, method, given, gpu, step)
        return
    if like is not None:
        name, there = _parsed(like)
        there = {**{key: given[key] for key in budget.WHERE if key in given}, **there}
        reference = budget.count(model, name, there, ())
        _show(model, name, there, reference)
        target = reference.trainable
    else:
        assert parameters is not None
        target = int(parameters)
    value, count = budget.solve(model, method, given, free=free, parameters=target, task_names=())
    _show(model, method, {**given, free: value}, count)
    click.echo(f"  {_percent(count.trainable, target)} of the budget {target:,}")
    if abs(count.trainable - target) > budget.NEAR * target:
        click.echo(f"  No other {free} comes closer.")
        pairs = budget.alternatives(model, method, given, free=free, parameters=target, task_names=())
        closer = [p for p in pairs if abs(p[1].trainable - target) < abs(count.trainable - target)]
        if closer:
            click.echo("  Closer with another pair:")
        for pair, exact in closer:
            chosen = " ".join(f"--option {key}={pair[key]}" for key in ("r", "num_experts"))
            click.echo(f"    {chosen:36} {exact.trainable:>14,}  {_percent(exact.trainable, target)}")
    if gpu is not None:
        _show_step(model, method, {**given, free: value}, gpu, step)


def _show_step(model: str, method: str, options: dict[str, Any], named: str, step: dict[str, Any]) -> None:
    from functools import partial

    from dyads.models.step_cost import OWN_MEMORY, gpu_of, most_examples, step_cost

    gpu, like = gpu_of(named)
    cost_of = partial(step_cost, model, method, options, **{k: v for k, v in step.items() if k != "examples"})
    examples = step["examples"]
    cost = cost_of(examples=examples)
    most = most_examples(lambda n: cost_of(examples=n), gpu)
    parts = {
        "model": cost.weights,
        "adapter and optimizer": cost.state,
        "activations and gradients": cost.peak,
        "libraries": OWN_MEMORY,
    }
    seconds = cost.seconds(gpu)
    less = "" if step["checkpointing"] else "; --gradient-checkpointing takes less"
    click.echo(f"  A step of {examples} × {step['tokens']} tokens on {gpu.name}{like}, estimated:")
    click.echo(f"    memory  {size(cost.memory + OWN_MEMORY)} of {size(gpu.memory)}")
    for name, number in parts.items():
        click.echo(f"            {size(number):>7}  {name}")
    time = f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
    click.echo(f"    time    {time}, {rounded(cost.tokens / seconds)} tokens/s")
    if most >= examples:
        click.echo(f"    fits    up to {most:,} examples at once")
    elif most:
        split = next(n for n in range(1, examples + 1) if examples % n == 0 and examples // n <= most)
        click.echo(f"    fits    {most} examples at once: train.gradient_accumulation={split}{less}")
    else:
        click.echo(f"    fits    not one example{less}")


def _percent(number: int, target: int) -> str:
    return f"{100 * (number - target) / target:+.1f} %"


def _show(model: str, method: str, options: dict[str, Any], count: Any) -> None:
    named = f"{method} ({', '.join(f'{k}={v}' for k, v in options.items())})" if options else method
    click.echo(printable(click.wrap_text(f"{named} on {model}", subsequent_indent="    ")))
    click.echo(f"  {count.trainable:,} parameters, {count.percent:.2f} % of the model's {count.base:,}")


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """`lora:r=34,target_modules=[q_proj,v_proj]`: commas in brackets belong to the value."""
    from dyads.recipe.yaml_source import read_overrides

    method, _, rest = text.partition(":")
    parts = re.split(r",(?![^\[{]*[\]}])", rest) if rest else []
    return method.strip(), read_overrides(parts, f"--like {method}:").data

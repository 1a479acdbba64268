# SPDX-License-Identifier: Apache-2.0
"""Timer of one adapted layer on a GPU: the layers that counted.py counts, forward and backward.

It was written without a GPU. first_gpu_run.sh runs it after the checks of tests/test_cuda.py.
"""

from __future__ import annotations

from typing import Any

import click
import torch
from torch.utils.benchmark import Timer

from benchmarks.counted import BATCH, BUDGET, COUNTED, LENGTH, WIDTH, build, inputs_of, resolved, trained


def milliseconds(model: Any, x: torch.Tensor, inputs: dict[str, Any], seconds: float) -> float:
    """The median time of a forward and a backward pass."""
    gradient = torch.ones_like(x)

    def step() -> None:
        model.base_model(x, **inputs).backward(gradient)

    step()
    return 1000 * Timer("step()", globals={"step": step}).blocked_autorange(min_run_time=seconds).median


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--width", default=WIDTH, show_default=True)
@click.option("--length", default=LENGTH, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="Of each measurement.")
def main(device: str, width: int, length: int, seconds: float) -> None:
    """Time one frozen bf16 linear layer and its adapter, in fp32 and in bf16, and print a Markdown table."""
    budget = trained(build(COUNTED[BUDGET], width=width))
    x = torch.randn(BATCH, length, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    click.echo("| contender | adapter | ms | ÷ PEFT LoRA |\n| --- | --- | ---: | ---: |")
    for in_fp32 in (True, False):
        reference = None
        for contender in COUNTED.values():
            chosen = resolved(contender, budget, width)
            model = build(chosen, width=width, in_fp32=in_fp32, device=device)
            inputs = inputs_of(chosen, device)
            found = milliseconds(model, x, inputs, seconds)
            reference = reference or found
            dtype = "fp32" if in_fp32 else "bf16"
            click.echo(f"| {contender.label} | {dtype} | {found:.3f} | {found / reference:.2f} |")


if __name__ == "__main__":
    main()

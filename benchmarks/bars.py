# SPDX-License-Identifier: Apache-2.0
"""Bars: the limits that measured values and ratios must keep. Data and nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """A limit of a value, or of the ratio of two contenders in the same round."""

    what: str
    part: str
    """Where it is measured: a setting, training, scoring, serving, startup or counted."""
    metric: str
    top: str
    bottom: str | None
    limit: float
    at_most: bool = True
    limit_with_amx: float | None = None
    """The limit on a processor with AMX, where it is another one."""

    def limit_on(self, cpu: str) -> float:
        """The limit on a processor, whose description names AMX if it has it."""
        return self.limit_with_amx if self.limit_with_amx is not None and "amx_bf16" in cpu else self.limit


BARS = (
    Bar(
        "step: MoDE 16x4 ÷ PEFT LoRA, fp32 adapters", "smollm2", "step", "mode-16x4", "lora", 1.05, limit_with_amx=0.95
    ),
    Bar("step: MoDE 16x4 ÷ PEFT LoRA, bf16 adapters", "smollm2", "step", "mode-16x4", "lora-bf16", 1.10),
    Bar("step: MoLORA 8x8 ÷ PEFT LoRA r=64", "llama", "step", "molora-8x8", "lora", 1.05),
    Bar("step: MoDE ÷ PEFT LoRA r=64", "llama", "step", "mode", "lora", 1.05),
    Bar("kept for backward: MoDE 16x4 ÷ PEFT LoRA", "smollm2", "saved", "mode-16x4", "lora", 1.05),
    Bar("kept for backward: MoLORA 8x8 ÷ PEFT LoRA r=64", "llama", "saved", "molora-8x8", "lora", 1.05),
    Bar("kept for backward: MoDE ÷ PEFT LoRA r=64", "llama", "saved", "mode", "lora", 1.05),
    Bar("step: MoDE r=4, 64 experts ÷ 4 experts", "smollm2", "step", "mode-64x4", "mode-4x4", 1.4),
    Bar("decoding: MoDE 16x4 ÷ PEFT LoRA, tokens/s", "smollm2", "decode", "mode-16x4", "lora", 0.90, False),
    Bar("training run: dyads ÷ TRL, examples/s", "training", "examples", "dyads-mode", "trl", 2.0, False),
    Bar("scoring: dyads ÷ a loop of generate, examples/s", "scoring", "per_second", "dyads", "plain", 3.0, False),
    Bar("scoring in fp32: answers that differ", "scoring", "differing_fp32", "dyads", None, 0),
    Bar(
        "serving: 32 clients at once ÷ one request after the other, tokens/s",
        "serving",
        "per_second",
        "dyads",
        "sequential",
        3.0,
        False,
    ),
    Bar("serving: MoDE ÷ plain LoRA, tokens/s of 32 clients", "serving", "per_second", "dyads", "lora", 1.0, False),
    Bar("launches: MoDE 8x4 ÷ PEFT LoRA, fp32 adapters", "counted", "launches", "mode-8x4", "lora", 1.3),
    Bar("launches: MoDE 8x4 ÷ PEFT LoRA, bf16 adapters", "counted", "launches", "mode-8x4-bf16", "lora-bf16", 1.5),
    Bar("bytes moved: MoDE 8x4 ÷ PEFT LoRA, fp32 adapters", "counted", "bytes", "mode-8x4", "lora", 0.305),
    Bar("bytes moved: MoDE 8x4 ÷ PEFT LoRA, bf16 adapters", "counted", "bytes", "mode-8x4-bf16", "lora-bf16", 0.665),
    Bar("dyads --help, seconds", "startup", "seconds", "help", None, 0.5),
    Bar("import dyads, seconds", "startup", "seconds", "import", None, 0.5),
    Bar("heavy modules loaded by them", "startup", "heavy", "import", None, 0),
)
"""Heavy modules: datasets, matplotlib, trl, pandas."""

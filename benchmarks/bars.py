# SPDX-License-Identifier: Apache-2.0
"""What must be reached? The bars, as data, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """A value, or the ratio of two contenders in the same round, and its limit."""

    what: str
    part: str
    """Where it is measured: a setting, training, scoring or startup."""
    question: str
    top: str
    bottom: str | None
    limit: float
    at_most: bool = True


BARS = (
    Bar("training step: MoDE 16×4 ÷ PEFT LoRA, fp32 adapters", "smollm2", "step", "mode-16x4", "lora", 0.95),
    Bar("training step: MoDE 16×4 ÷ PEFT LoRA, bf16 adapters", "smollm2", "step", "mode-16x4", "lora-bf16", 1.05),
    Bar("training step: MoLORA 8×8 ÷ PEFT LoRA r=64", "llama", "step", "molora-8x8", "lora", 1.05),
    Bar("training step: MoDE ÷ PEFT LoRA r=64", "llama", "step", "mode", "lora", 1.05),
    Bar("training step: MoLORA 8×8 ÷ PEFT Poly", "llama", "step", "molora-8x8", "poly", 1.0),
    Bar("training step: MoDE ÷ PEFT Poly", "llama", "step", "mode", "poly", 1.0),
    Bar("training step: MoLORA 8×8 ÷ PEFT X-LoRA", "llama", "step", "molora-8x8", "xlora", 0.5),
    Bar("training step: MoDE ÷ PEFT X-LoRA", "llama", "step", "mode", "xlora", 0.5),
    Bar("kept for backward: MoDE 16×4 ÷ PEFT LoRA", "smollm2", "saved", "mode-16x4", "lora", 1.05),
    Bar("kept for backward: MoLORA 8×8 ÷ PEFT LoRA r=64", "llama", "saved", "molora-8x8", "lora", 1.05),
    Bar("kept for backward: MoDE ÷ PEFT LoRA r=64", "llama", "saved", "mode", "lora", 1.05),
    Bar("training step: MoDE r=4, 64 experts ÷ 4 experts", "smollm2", "step", "mode-64x4", "mode-4x4", 1.4),
    Bar("training step: MoRE, 8 tasks ÷ 1 task in a batch", "smollm2", "step", "more-mixed", "more", 1.03),
    Bar("decoding: MoDE 16×4 ÷ PEFT LoRA, tokens/s", "smollm2", "decode", "mode-16x4", "lora", 0.95, False),
    Bar("decoding: MoRE merged ÷ frozen model, tokens/s", "smollm2", "decode", "more-merged", "frozen", 0.99, False),
    Bar("whole training: dyads ÷ TRL, examples/s", "training", "examples", "dyads-mode", "trl", 1.3, False),
    Bar("scoring: dyads ÷ a loop of generate, examples/s", "scoring", "examples", "dyads", "plain", 2.0, False),
    Bar("scoring in fp32: answers that differ", "scoring", "differing_fp32", "dyads", None, 0),
    Bar("dyads --help, seconds", "startup", "seconds", "help", None, 0.5),
    Bar("import dyads, seconds", "startup", "seconds", "import", None, 0.5),
    Bar("heavy modules loaded by them", "startup", "heavy", "import", None, 0),
)
"""Heavy modules: datasets, matplotlib, trl, pandas."""

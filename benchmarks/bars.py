# SPDX-License-Identifier: Apache-2.0
"""What must be reached, and what was tried where it is hard? Bars and texts, as data, and nothing else."""

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

TRIED = {
    ("step", "poly"): (
        "Poly mixes its eight skills once for every example and then multiplies by rank 8; gates that look at every"
        " token leave rank 64 to multiply by, before and after them. The profile of the Llama-shaped setting has the"
        " floor of such an adapter: what the frozen model takes and the six products alone, which leaves a few per"
        " cent of Poly's step for gates, sums, copies, the optimizer and Python. Kept, as they gained: one product"
        " for [A; W], tokens innermost in the gates (softmax 907 to 145 µs a layer) and in their gradients (472 to"
        " 264 µs), the base layer's output and its gradient written over rather than added to. Not kept: q, k and v"
        " in one product (0.7 % of a step at most, as the skinny products already run at the base layer's rate)."
        " Looked at without a gain: page faults (1,900 a step, 4 ms of system time). Backward in place, line by"
        " line: the products run at the machine's rate, gates and their gradients take 12 ms of a step and Python's"
        " other lines about as much (LOG.md)."
    ),
    ("step", "lora-bf16"): (
        "An adapter that is itself in bf16 needs no casts; one in fp32 casts its weights once in a step and their"
        " gradients back. Kept, as they gained: casts held for backward, the sums of the gates' gradients along the"
        " memory (733 to 396 µs a layer), the base layer's output and its gradient written over (0.956 of the step"
        " before, quartiles 0.919 to 0.991). Not kept: passive waiting of threads, which costs whoever has many"
        " small operations. MoDE with bf16 adapters is a row of the table: the difference between the two is what"
        " the casts cost (LOG.md)."
    ),
    ("decode", "lora"): (
        "A decoding step multiplies a handful of rows, so it is calls that cost, not products. Kept, as they"
        " gained: weights joined and cast once for a whole generation, products of few rows in fp32 on a CPU (49 to"
        " 7 µs), gates of a task computed once, q, k and v sharing one product and one call of the gates (76 to 49"
        " calls into PyTorch a layer for MoDE, 130 to 54 for MoRE; LoRA has 24). The last gained for MoRE (0.92 to"
        " 0.98 of LoRA) and nothing for MoDE (LOG.md)."
    ),
}
"""By (question, rival): what stands on the page where a bar is not met. Every number in it has its entry in LOG.md."""

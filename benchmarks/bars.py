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
        " floor of such an adapter. Within a step its products run at the machine's rate (70 to 105 GFLOP/s); gates,"
        " their gradients and all other lines of backward take some 24 of 1,038 ms. Kept, as the operations gained,"
        " though no difference of a whole step could be shown in fp32: tokens innermost in the gates (softmax 907 to"
        " 145 µs) and in their gradients (472 to 264 µs); the base layer's output and its gradient written over (1.006"
        " of the step before, quartiles 0.945 to 1.050). Looked at and not built: q, k and v in one product (some"
        " 0.7 % of a step). Looked at without a gain: page faults. torch.compile: 0.86 of PEFT LoRA where MoDE without"
        " it had 0.98, for a step of fixed shape, after two minutes of compiling (LOG.md)."
    ),
    ("step", "lora-bf16"): (
        "An adapter that is itself in bf16 needs no casts, and its optimizer reads and writes half the bytes; one in"
        " fp32 casts its weights once in a step and their gradients back. Kept, as they gained: casts held for"
        " backward and the sums of the gates' gradients along the memory (733 to 396 µs), and the base layer's output"
        " and its gradient written over (six layers, one thread: 0.956 of the step before, quartiles 0.919 to 0.991)."
        " Memory decides more than any of these: with glibc's own settings, where every step gives a gigabyte back,"
        " MoDE took 1.22 of this step (quartiles 1.20 to 1.26), and all contenders were slower. The ratio does not"
        " settle on this machine: 1.08 in 20 rounds, 1.07 in 24, 0.99 in the five of the profile, whose floor is 0.82,"
        " since products in bf16 run at two speeds here, a factor of three apart. By the profiler's count both sides"
        " spend the same on products, and what MoDE spends more is copies, gates and calls (LOG.md)."
    ),
    ("decode", "lora"): (
        "A decoding step multiplies a handful of rows. Kept, as they gained: weights joined and cast once for a whole"
        " generation, products of few rows in fp32 on a CPU (4 rows 50 to 7 µs, 32 rows 49 to 37), and fewer steps of"
        " Python in every layer (above the frozen layer 334 to 253 µs, where LoRA takes 198 to 233). Kept, without a"
        " gain of its own for MoDE: q, k and v sharing one product and one call of the gates. The profile of decoding"
        " has the floor. With glibc's own settings MoDE had 0.97 of LoRA (0.95 to 0.98), and both were slower (LOG.md)."
    ),
    ("decode", "frozen"): (
        "A merged adapter leaves no module of dyads behind: both sides run the same modules, with other numbers in some"
        " weights. Two runs gave 0.99 (quartiles 0.96 to 1.10) and 0.96 (0.91 to 1.00). Not looked into: whether it"
        " matters where the weights lie, the frozen model's in pages of the file, which all contenders share, those"
        " that were merged in memory of their own (LOG.md)."
    ),
}
"""By (question, rival): what stands on the page where a bar is not met. Every number in it has its entry in LOG.md."""

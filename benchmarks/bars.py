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
    Bar("launches of a layer: MoDE 8×4 ÷ PEFT LoRA, fp32 adapters", "counted", "launches", "mode-8x4", "lora", 1.3),
    Bar(
        "launches of a layer: MoDE 8×4 ÷ PEFT LoRA, bf16 adapters",
        "counted",
        "launches",
        "mode-8x4-bf16",
        "lora-bf16",
        1.5,
    ),
    Bar("bytes of a layer: MoDE 8×4 ÷ PEFT LoRA, fp32 adapters", "counted", "bytes", "mode-8x4", "lora", 0.305),
    Bar(
        "bytes of a layer: MoDE 8×4 ÷ PEFT LoRA, bf16 adapters", "counted", "bytes", "mode-8x4-bf16", "lora-bf16", 0.665
    ),
    Bar("dyads --help, seconds", "startup", "seconds", "help", None, 0.5),
    Bar("import dyads, seconds", "startup", "seconds", "import", None, 0.5),
    Bar("heavy modules loaded by them", "startup", "heavy", "import", None, 0),
)
"""Heavy modules: datasets, matplotlib, trl, pandas."""

TRIED = {
    ("step", "poly"): (
        "Poly mixes its eight skills once for every example and then multiplies by rank 8; gates that look at every"
        " token leave rank 64 to multiply by, before and after them. The profile of the Llama-shaped setting has the"
        " floor of such an adapter. Added one after the other inside a step, base layers take 0.74 of it, the six"
        " products of the adapter bring it to 0.95, gates to 1.00; Poly took 0.94. Kept: gates and their gradients as"
        " compiled code (0.971 of the step before, quartiles 0.964 to 0.981), operands turned the way each product is"
        " fastest (10 to 30 % of a product), the base layer's output and its gradient written over, layers that see"
        " the same input computed at once (1.030 of Poly before, 1.018 with it, in one process), products in fp32 by"
        " the processor's unit for bf16 where it has one (1.03 of Poly without, 0.88 with it, in one process). Without"
        " it, what is left above the products' own time is memory: the six products of the adapter read and write what"
        " has left the cache (75 ms of 373; at the base layers' rate 51). Tried and left: weights packed once (1.025"
        " of Poly before, 1.002 with it, for a gigabyte), narrow products of our own in AVX-512 (no faster than MKL's"
        " with cold operands), oneDNN for the narrow products (11.3 to 12.9 ms of a step and 11.6 to 13.7), the small"
        " product before the large one that it is added to (108 to 111 ms), blocks of tokens that stay in a core's"
        " cache (1.05 and more). torch.compile: gates alone were no faster than PyTorch's operations (131 to 192 µs,"
        " and 92 to 115); the whole model took 0.86 of PEFT LoRA where MoDE without it had 0.98, for a step of fixed"
        " shape, after two minutes of compiling (LOG.md)."
    ),
    ("step", "lora-bf16"): (
        "An adapter that is itself in bf16 needs no casts, and its optimizer reads and writes half the bytes; one in"
        " fp32 casts its weights once in a step and their gradients back. Kept, as they gained: gates and their"
        " gradients as compiled code (0.955 of the step before, quartiles 0.883 to 0.992), casts held for backward, and"
        " the base layer's output and its gradient written over (six layers, one thread: 0.956 of the step before,"
        " quartiles 0.919 to 0.991). Memory decides as much: with glibc's own settings, where every step gives a"
        " gigabyte back, MoDE took 1.22 of this step (quartiles 1.20 to 1.26), and all contenders were slower. Products"
        " in bf16 run at two speeds on this machine, a factor of three apart, so the ratio moves from run to run"
        " (LOG.md)."
    ),
    ("decode", "lora"): (
        "A decoding step multiplies a handful of rows. Kept, as they gained: weights joined and cast once for a whole"
        " generation, products of few rows in fp32 on a CPU (4 rows 50 to 7 µs, 32 rows 49 to 37), fewer steps of"
        " Python in every layer (above the frozen layer 334 to 253 µs, where LoRA takes 198 to 233), and two compiled"
        " calls of a layer (1.045 of LoRA's time before, 1.013 with them). Kept, without a"
        " gain of its own for MoDE: q, k and v sharing one product and one call of the gates. The profile of decoding"
        " has the floor. With glibc's own settings MoDE had 0.97 of LoRA (0.95 to 0.98), and both were slower (LOG.md)."
    ),
    ("decode", "frozen"): (
        "A merged adapter leaves no module of dyads behind: both sides run the same modules, with other numbers in some"
        " weights. In one process a second copy of the frozen model decoded at 0.97 of the first (quartiles 0.84 to"
        " 1.06), one with its weights in memory of their own at 1.00, a merged MoRE at 1.01 (0.88 to 1.08): what is"
        " left is the noise of a model against itself (LOG.md)."
    ),
}
"""By (question, rival): what stands on the page where a bar is not met. Every number in it has its entry in LOG.md."""

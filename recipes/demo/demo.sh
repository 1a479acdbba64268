#!/bin/sh
# The demo: one adapter for twelve tasks, with LoRA, MoDE and MTL-LoRA at equal parameters, and the comparison.
#   sh recipes/demo/demo.sh [FOLDER]          (default: runs/demo)
# Can be started again after an interruption: complete runs are kept.
set -eu
out=${1:-runs/demo}
here=$(dirname "$0")
for method in majority zero-shot lora mode mtl-lora; do
  dyads train "$here/$method.yaml" --out "$out/$method" --auto-resume
done
dyads compare "$out/majority" "$out/zero-shot" "$out/lora" "$out/mode" "$out/mtl-lora" --baseline "LoRA 9"
cat <<'END'
What the table says: a row is an adapter of a million parameters for all twelve tasks, a difference is in points of exact
match to LoRA, and its interval covers the choice of the 240 instances. MTL-LoRA is given the task of each instance, the
others read it in the prompt. This is one training of 80 steps each: it shows how to compare, and decides nothing about
the methods. docs/results.md has the studies that do.
END

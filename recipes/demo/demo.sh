#!/bin/sh
# The demo: one adapter for twelve tasks, with LoRA and with MoDE at equal parameters, and the comparison.
#   sh recipes/demo/demo.sh [FOLDER]          (default: runs/demo)
# Can be started again after an interruption: complete runs are kept.
set -eu
out=${1:-runs/demo}
here=$(dirname "$0")
for method in majority zero-shot lora mode; do
  dyads train "$here/$method.yaml" --out "$out/$method" --auto-resume
done
dyads compare "$out/majority" "$out/zero-shot" "$out/lora" "$out/mode" --baseline "LoRA 9"

#!/bin/sh
# The demo: one adapter for twelve tasks, with LoRA and with MoDE at equal parameters, and the comparison.
# Runs are kept in the folder (default: runs/demo); started again, what is done is not done twice.
set -eu
out=${1:-runs/demo}
here=$(dirname "$0")
for method in majority zero-shot lora mode; do
  dyads train "$here/$method.yaml" --out "$out/$method" --resume
done
dyads compare "$out/majority" "$out/zero-shot" "$out/lora" "$out/mode" --baseline "LoRA 9"

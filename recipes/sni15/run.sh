#!/bin/sh
# The SNI study: every method on fifteen tasks, for the seeds in $SEEDS (default: 0), and the comparison.
#   sh recipes/sni15/run.sh [FOLDER]          (default: runs/sni15)
# Can be started again after an interruption: complete runs are kept, and an unfinished one continues.
set -u
out=${1:-runs/sni15}
here=$(dirname "$0")
methods=${METHODS:-majority zero-shot lora molora molora-sd mode mode-grouped more more-whole task-mode}
for seed in ${SEEDS:-0}; do
  for method in $methods; do
    dyads train "$here/$method.yaml" --set seed=$seed --out "$out/$method-seed$seed" --auto-resume || exit 1
  done
done
dyads compare "$out" --baseline "LoRA 34"

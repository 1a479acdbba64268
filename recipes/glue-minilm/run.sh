#!/bin/sh
# The study: every method on the eight tasks, for the seeds in $SEEDS (default: 0 1 2), and the comparison.
#   sh recipes/glue-minilm/run.sh [FOLDER]          (default: runs/glue-minilm)
# $METHODS chooses among the methods; $SET gives overrides, such as SET="train.steps=3000 train.threads=2".
# Runs that are complete are kept, and one that was cut off goes on: start it again after an interruption.
set -u
out=${1:-runs/glue-minilm}
here=$(dirname "$0")
methods=${METHODS:-majority lora molora moelora more mode task-mode}
settings=
for setting in ${SET:-}; do settings="$settings --set $setting"; done
for seed in ${SEEDS:-0 1 2}; do
  for method in $methods; do
    # shellcheck disable=SC2086  # settings are words on purpose
    dyads train "$here/$method.yaml" --set seed=$seed $settings --out "$out/$method-seed$seed" --resume || exit 1
  done
done
case " $methods " in
  *" lora "*) dyads compare "$out" --baseline "LoRA 18" ;;
  *) dyads compare "$out" ;;
esac

#!/bin/sh
# The GLUE study: every method on eight tasks, for the seeds in $SEEDS (default: 0 1 2), and the comparison.
#   sh recipes/glue-minilm/run.sh [FOLDER]          (default: runs/glue-minilm)
# $METHODS selects methods; $SET gives overrides, such as SET="train.steps=3000 train.threads=2".
# Can be started again after an interruption: complete runs are kept, and an unfinished one continues.
set -u
out=${1:-runs/glue-minilm}
here=$(dirname "$0")
methods=${METHODS:-majority lora molora moelora more mode task-mode}
settings=
for setting in ${SET:-}; do settings="$settings --set $setting"; done
for seed in ${SEEDS:-0 1 2}; do
  for method in $methods; do
    # shellcheck disable=SC2086  # settings are words on purpose
    dyads train "$here/$method.yaml" --set seed=$seed $settings --out "$out/$method-seed$seed" --auto-resume || exit 1
  done
done
case " $methods " in
  *" lora "*) dyads compare "$out" --baseline "LoRA 18" ;;
  *) dyads compare "$out" ;;
esac

#!/bin/sh
# Chooses each method's learning rate: short trainings, compared by their loss on validation instances that are never
# scored. Finished runs are kept, so that the script can be started again after an interruption.
#   sh recipes/sni15/sweep.sh [FOLDER]        (default: runs/sni15-sweep)
set -u
out=${1:-runs/sni15-sweep}
here=$(dirname "$0")
methods=${METHODS:-lora molora molora-sd mode mode-grouped more}
for method in $methods; do
  for rate in 1e-3 3e-3 1e-2; do
    dyads train "$here/$method.yaml" --out "$out/$method-$rate" --resume --no-evaluate \
      --set train.learning_rate=$rate --set train.steps=30 --set train.batch_size=8 --set train.save_steps=null \
      --set train.validation_limit=16 || exit 1
  done
done
echo "method learning_rate validation_loss"
for method in $methods; do
  for rate in 1e-3 3e-3 1e-2; do
    printf '%s %s ' "$method" "$rate"
    sed -n 's/.*"validation_loss": \([0-9.]*\).*/\1/p' "$out/$method-$rate/log.jsonl" | tail -1
  done
done

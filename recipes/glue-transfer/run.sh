#!/bin/sh
# Transfer to three new tasks from 4, 16 and 32 examples, starting from the runs that recipes/glue-minilm/run.sh made:
# LoRA, MoDE and MoRE with all parameters training, MoRE also with the new task's own parameters alone, and the most
# frequent answer.
#   sh recipes/glue-transfer/run.sh [FOLDER [FOLDER OF THE GLUE RUNS]]
#   (default: runs/glue-transfer runs/glue-minilm)
# $SEEDS (default: 0 1 2) selects the runs and their examples, $ROWS the pairs "method:parts", $TASKS the tasks, $SHOTS
# the numbers of examples; $SET gives overrides. Can be started again after an interruption: complete runs are kept.
set -u
out=${1:-runs/glue-transfer}
glue=${2:-runs/glue-minilm}
here=$(dirname "$0")
settings=
for setting in ${SET:-}; do settings="$settings --set $setting"; done
tasks=${TASKS:-scitail cb boolq}
shots=${SHOTS:-4 16 32}
for task in $tasks; do
  dyads train "$here/$task.yaml" --set name=majority --set method.name=majority --set model.name=packaged:minilm-l6 \
    --out "$out/majority/$task" --auto-resume || exit 1
done
for seed in ${SEEDS:-0 1 2}; do
  for task in $tasks; do
    for k in $shots; do
      for row in ${ROWS:-lora:all mode:all more:all more:task}; do
        method=${row%%:*} parts=${row##*:}
        # shellcheck disable=SC2086  # settings are words on purpose
        dyads adapt "$glue/$method-seed$seed" --task "$here/$task.yaml" --shots "$k" --parts "$parts" \
          --seed "$seed" --set name="$method $parts" $settings \
          --out "$out/$task-$k/$method-$parts-seed$seed" --auto-resume || exit 1
      done
    done
  done
done
for task in $tasks; do
  for k in $shots; do
    echo "$task, $k examples"
    dyads compare "$out/$task-$k" "$out/majority/$task" --baseline "lora all"
  done
done

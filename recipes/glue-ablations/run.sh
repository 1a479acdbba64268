#!/bin/sh
# The ablations: MoRE's parts and MoDE's routing stages, one at a time, for the seeds in $SEEDS (default: 0 1 2), with a
# comparison of MoRE's rows to MoRE and one of MoDE's rows to MoDE.
#   sh recipes/glue-ablations/run.sh [FOLDER]          (default: runs/glue-ablations)
# $ROWS selects recipes; $SET gives overrides, such as SET="train.steps=1000 train.threads=2".
# Can be started again after an interruption: complete runs are kept, and an unfinished one continues.
set -u
out=${1:-runs/glue-ablations}
here=$(dirname "$0")
rows=${ROWS:-$(cd "$here" && ls -- *.yaml | sed 's/\.yaml$//')}
settings=
for setting in ${SET:-}; do settings="$settings --set $setting"; done
dyads train "$here/../glue-minilm/majority.yaml" --out "$out/majority" --auto-resume || exit 1
for seed in ${SEEDS:-0 1 2}; do
  for row in $rows; do
    # shellcheck disable=SC2086  # settings are words on purpose
    dyads train "$here/$row.yaml" --set seed=$seed $settings --out "$out/$row-seed$seed" --auto-resume || exit 1
  done
done
for whole in more mode; do
  set -- "$out/$whole"-*seed*
  if [ -e "$1" ] && [ $# -gt 1 ]; then
    [ $whole = more ] && name=MoRE || name=MoDE
    dyads compare "$out/majority" "$@" --baseline $name
  fi
done

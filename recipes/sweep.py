# SPDX-License-Identifier: Apache-2.0
"""Learning-rate sweep for a study: the best rate of each method on validation instances, which are never scored.

    python recipes/sweep.py recipes/glue-minilm [--out runs/glue-minilm-sweep] [--set KEY=VALUE …] [method …]

The study's folder has a recipe for every method, and sweep.json with the methods, the two rates to start at, and the
settings of a short training. From the two rates each method steps in half-decades towards the lower validation loss,
until it rises: the best rate has a worse one on either side. All methods read the same examples. Finished trainings are
kept, so the script can be started again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RATES = ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1"]


def loss(recipe: Path, rate: str, out: Path, settings: list[str]) -> float:
    """Validation loss of a short training, which runs unless its folder is complete; infinity for a diverged one."""
    folder = out / f"{recipe.stem}-{rate}"
    parts = [part for s in (f"train.learning_rate={rate}", *settings) for part in ("--set", s)]
    command = ["dyads", "train", str(recipe), "--out", str(folder), "--auto-resume", "--no-evaluate", *parts]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    print(done.stderr, end="", file=sys.stderr)
    if done.returncode:
        if "is not finite" in done.stderr:
            return float("inf")
        raise SystemExit(f"stopped: {' '.join(command)} failed (its last lines are above)")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [line["validation_loss"] for line in lines if line.get("event") == "validated"]
    if not found:  # interrupted between training and validation
        raise SystemExit(f"stopped: {folder} was interrupted before its validation; delete it and start again")
    return float("inf") if found[-1] is None else float(found[-1])


def walk(recipe: Path, start: list[str], out: Path, settings: list[str]) -> tuple[dict[str, float], str]:
    """Losses by rate, and the best rate, of one method."""
    losses = {rate: loss(recipe, rate, out, settings) for rate in start}
    step = 1 if losses[start[1]] < losses[start[0]] else -1
    best = start[step == 1]
    while 0 <= (i := RATES.index(best) + step) < len(RATES):
        losses[RATES[i]] = loss(recipe, RATES[i], out, settings)
        if losses[RATES[i]] >= losses[best]:
            break
        best = RATES[i]
    return {rate: losses[rate] for rate in RATES if rate in losses}, best


def main() -> None:
    """Sweep the given methods, or all of the study, and print a line for every training."""
    parser = argparse.ArgumentParser(description="Choose learning rates on validation data.")
    parser.add_argument("study", type=Path, help="The folder of the study's recipes.")
    parser.add_argument("methods", nargs="*", metavar="method")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    arguments = parser.parse_intermixed_args()  # methods may stand after --set too
    study = json.loads((arguments.study / "sweep.json").read_text())
    out = arguments.out or Path("runs") / f"{arguments.study.name}-sweep"
    print(f"{'method':14}{'rate':>8}{'val. loss':>10}")
    for method in arguments.methods or study["methods"]:
        recipe = arguments.study / f"{method}.yaml"
        losses, best = walk(recipe, study["rates"], out, [*study["set"], *arguments.settings])
        for rate, value in losses.items():
            print(f"{method:14}{rate:>8}{value:>10.4f}{'  best' * (rate == best)}", flush=True)


if __name__ == "__main__":
    main()

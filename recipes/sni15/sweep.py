# SPDX-License-Identifier: Apache-2.0
"""Chooses each method's learning rate for this study, on validation instances that are never scored.

    python recipes/sni15/sweep.py [--out runs/sni15-sweep] [method …]

Every method starts at 3e-3 and 1e-2 and walks on, in half-decades, towards the lower validation loss until it rises:
the best rate has a worse one on either side. Trainings are short (30 steps of 8) and all read the same examples.
Finished ones are kept, so that the script can be started again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

METHODS = ["lora", "molora", "molora-sd", "mode", "mode-grouped", "more", "more-whole", "task-mode"]
RATES = ["1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1"]
SHORT = ["train.steps=30", "train.batch_size=8", "train.save_steps=null", "train.validation_limit=16"]


def loss(method: str, rate: str, out: Path) -> float:
    """The validation loss of a short training, run now if it was not run yet."""
    folder = out / f"{method}-{rate}"
    recipe = Path(__file__).with_name(f"{method}.yaml")
    settings = [part for s in (f"train.learning_rate={rate}", *SHORT) for part in ("--set", s)]
    command = ["dyads", "train", str(recipe), "--out", str(folder), "--resume", "--no-evaluate", *settings]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    print(done.stderr, end="", file=sys.stderr)
    if done.returncode:
        if "is not finite" in done.stderr:
            return float("inf")  # training broke down at this rate
        raise SystemExit(f"stopped: {' '.join(command)} failed (its last lines are above)")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [line["validation_loss"] for line in lines if line.get("event") == "validated"]
    if not found:  # it was cut off after its training: the adapter is there, its validation loss is not
        raise SystemExit(f"stopped: {folder} was cut off before its validation; delete it and start again")
    return float(found[-1])


def main() -> None:
    """Sweep the methods named, or all, and print a line for every training."""
    parser = argparse.ArgumentParser(description="Choose learning rates on validation data.")
    parser.add_argument("methods", nargs="*", metavar="method", default=METHODS)
    parser.add_argument("--out", type=Path, default=Path("runs/sni15-sweep"))
    arguments = parser.parse_args()
    table: list[str] = []
    for method in arguments.methods:
        low, high = RATES.index("3e-3"), RATES.index("1e-2")
        losses = {i: loss(method, RATES[i], arguments.out) for i in (low, high)}
        step = 1 if losses[high] < losses[low] else -1
        best = high if step == 1 else low
        while 0 <= best + step < len(RATES):
            losses[best + step] = loss(method, RATES[best + step], arguments.out)
            if losses[best + step] >= losses[best]:
                break
            best += step
        table += [f"{method:14}{RATES[i]:>8}{losses[i]:>10.4f}{'  best' * (i == best)}" for i in sorted(losses)]
    print("\n".join([f"{'method':14}{'rate':>8}{'val. loss':>10}", *table]))


if __name__ == "__main__":
    main()

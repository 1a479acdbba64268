# SPDX-License-Identifier: Apache-2.0
"""Regret of a shared learning rate on language: the two parametrisations that toy.py leaves, on two suites.

    python recipes/parametrisation/confirm.py --suite starter --suite glue [--out runs/parametrisation]
    python recipes/parametrisation/confirm.py --table

`alpha` scales by 16 / r, r being the rank that a token passes through, and trains everything at one rate. `width`
scales by √2 · √(8 m / r), and trains routers that read h or a task's embedding, f numbers in the place of the layer's
d, at √(d / f) times the rate. For methods whose routers read the token the two are the same curves at rates that differ
by a factor of 0.7 to 0.75, so only the others are trained under both.

All methods have the parameters of LoRA 9 (starter) or LoRA 18 (glue) within 3 %. Each cell is an ordinary run folder
without scores; its loss is the mean over tasks of the validation loss after training. Start again to continue.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dyads.recipe.load import load_recipe
from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder
from dyads.training.train import train

HERE = Path(__file__).parent
SUITES: dict[str, dict[str, Any]] = {
    "starter": {
        "recipe": HERE.parent / "demo" / "base.yaml",
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "width": 576,
        "train": {"steps": 80, "save_steps": None, "validation_limit": 24, "threads": 1},
        "rates": [1e-3, 2e-3, 4e-3, 8e-3],
    },
    "glue": {
        "recipe": HERE.parent / "glue-minilm" / "base.yaml",
        "targets": ["query", "key", "value", "dense"],
        "width": 384,
        "train": {"steps": 300, "save_steps": None, "validation_limit": 64, "threads": 1},
        "rates": [5e-4, 1e-3, 2e-3, 4e-3],
    },
}
SOFT = {"selector": "soft", "linear_scaling": "none", "contrastive": 0.0, "embedding_init": "kaiming", "task_dim": 8}
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, int], dict[str, int]]] = {
    # name: method, options, and what differs on starter and on glue
    "LoRA": ("lora", {}, {"r": 9}, {"r": 18}),
    "MoLORA": ("molora", {}, {"num_experts": 2, "r": 4}, {"num_experts": 4, "r": 4}),
    "MoLORA-SD": ("molora", {"shared_down": True}, {"num_experts": 4, "r": 3}, {"num_experts": 5, "r": 5}),
    "MoDE": ("mode", {}, {"num_experts": 4, "r": 2}, {"num_experts": 4, "r": 4}),
    "MoDE h": ("mode", {"score": "h"}, {"num_experts": 4, "r": 4}, {"num_experts": 4, "r": 7}),
    "TaskMoDE h": (
        "task_mode",
        {"score": "h+task", "contrastive": 0.0, "task_dim": 8},
        {"num_experts": 4, "r": 4},
        {"num_experts": 4, "r": 7},
    ),
    "MoRE": ("more", SOFT, {"r": 9}, {"r": 18}),
    "MTL-LoRA": ("mtl_lora", {"num_experts": 4}, {"r": 4}, {"r": 7}),
}
BOTH = ("MoDE h", "TaskMoDE h", "MoRE")
"""Forms whose curves the two parametrisations change."""


def cells(suite: str) -> list[tuple[str, str, float]]:
    """(parametrisation, form, rate), the middle rates of every form first."""
    first, second, third, fourth = SUITES[suite]["rates"]
    found = []
    for rates in ((second, third), (first, fourth)):
        found += [("alpha", form, rate) for form, rate in product(FORMS, rates)]
        found += [("width", form, rate) for form, rate in product(BOTH, rates)]
    return found


def recipe_of(suite: str, rule: str, form: str, rate: float) -> Recipe:
    """The recipe of a cell."""
    given = SUITES[suite]
    method, options, *sizes = FORMS[form]
    options = {**options, **sizes[list(SUITES).index(suite)], "target_modules": given["targets"]}
    if method != "lora":
        options["init_std"] = None
    r, m = options["r"], options.get("num_experts", 1)
    passed = r / 2 if method == "more" else r
    scale = 16 / passed if rule == "alpha" else 2**0.5 * (8 * m / passed) ** 0.5
    rates = {}
    if rule == "width":
        inputs = r if form == "MoDE h" else options["task_dim"]
        rates = {"router": (given["width"] / inputs) ** 0.5}
    base = load_recipe(given["recipe"]).resolved()
    return Recipe.model_validate(
        {
            **base,
            "name": f"{form} {rule}",
            "method": {"name": method, **options, "lora_alpha": scale * r},
            "train": {**base["train"], **given["train"], "learning_rate": rate, "rates": rates},
        }
    )


def folder_of(out: Path, suite: str, rule: str, form: str, rate: float) -> Path:
    """The run folder of a cell."""
    return out / suite / f"{form}-{rule}-{rate:g}".replace(" ", "_")


def loss_of(path: Path) -> float | None:
    """The validation loss of a finished cell."""
    if not (path / "log.jsonl").is_file():
        return None
    found = [line["validation_loss"] for line in RunFolder(path).log() if "validation_loss" in line]
    return found[-1] if found else None


def table(out: Path, suite: str, console: Console) -> None:
    """Losses of all finished cells, and the regret at each rate."""
    rates = SUITES[suite]["rates"]
    shown = Table(title=f"{suite}: validation loss (regret in % of the best)", title_justify="left")
    for column in ("form", "rule", *(f"{rate:g}" for rate in rates)):
        shown.add_column(column)
    worst: dict[tuple[str, float], float] = {}
    for rule, form in [*product(["alpha"], FORMS), *product(["width"], BOTH)]:
        losses = {rate: loss_of(folder_of(out, suite, rule, form, rate)) for rate in rates}
        done = [loss for loss in losses.values() if loss is not None]
        row = []
        for rate, loss in losses.items():
            if loss is None:
                row.append("")
                continue
            regret = 100 * (loss / min(done) - 1)
            worst[rule, rate] = max(worst.get((rule, rate), 0.0), regret)
            row.append(f"{loss:.4f} ({regret:.1f})")
        shown.add_row(form, rule, *row)
    for rule in ("alpha", "width"):
        shown.add_row("worst", rule, *(f"{worst[rule, rate]:.1f} %" if (rule, rate) in worst else "" for rate in rates))
    console.print(shown)


def main() -> None:
    """Train what is left of the suites, and show their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=list(SUITES), default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/parametrisation"))
    parser.add_argument("--table", action="store_true", help="train nothing; show what there is")
    given = parser.parse_args()
    console = Console()
    suites = given.suite or list(SUITES)
    for suite in [] if given.table else suites:
        for rule, form, rate in cells(suite):
            path = folder_of(given.out, suite, rule, form, rate)
            if loss_of(path) is None:
                train(recipe_of(suite, rule, form, rate), path, resume=path.exists(), evaluate=False)
                console.print(f"{path}: {loss_of(path)}")
    for suite in suites:
        table(given.out, suite, console)


if __name__ == "__main__":
    main()

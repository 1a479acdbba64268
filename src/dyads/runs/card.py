# SPDX-License-Identifier: Apache-2.0
"""Model card: README.md beside an adapter, with the base model, how to load it, tasks, scores, licence and command.

Base models have names that others can use: an id of the hub, or `packaged:…` beside it, never a path of this machine.
A card is written after a training and again after every evaluation of the run. It is not part of the manifest.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCardData

import dyads
from dyads.errors import visible
from dyads.markdown import markdown_table
from dyads.models.load import kind_of, model_config
from dyads.models.packaged import PACKAGED, PREFIX, hub_id, key_of
from dyads.recipe.spec import Recipe
from dyads.runs.contents import Scores
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import MANIFEST, write_text
from dyads.runs.weights import CONFIG

__all__ = ["CARD", "base_model", "card", "front_matter", "prompts", "write_card", "write_shared"]

CARD = "README.md"
"""Name of a card's file."""
_HERE = "path/to/this/folder"
_ENTRY_POINTS = (("dyads", "__main__.py"), ("cli", "__main__.py"), ("cli", "__init__.py"))
"""Ends of the path of the program where it is the command `dyads`."""


def write_card(folder: RunFolder, scores: Scores | None = None) -> None:
    """Write the card of the run's adapter beside it, with these scores; None: those of the folder."""
    write_text(folder.adapter / CARD, card(folder, scores=scores))


def write_shared(folder: RunFolder, out: Path, repository: str, licence: str | None = None) -> None:
    """Copy what a run shares into an empty folder: its adapter, the form of its prompts, and a card.

    The adapter must be a checked one (runs/adapter.py). Its config names the base model by its id on the hub; a
    base model without one is left out.
    """
    for path in sorted(folder.adapter.iterdir()):
        if path.is_file() and path.name not in (CARD, CONFIG, MANIFEST):
            shutil.copyfile(path, out / path.name)
    for path in folder.forms():
        shutil.copyfile(path, out / path.name)
    config = json.loads((folder.adapter / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = hub_id(folder.recipe().model.name)
    write_text(out / CONFIG, json.dumps(config, indent=2, sort_keys=True))
    write_text(out / CARD, card(folder, repository, licence))


def card(folder: RunFolder, place: str = _HERE, licence: str | None = None, scores: Scores | None = None) -> str:
    """The card of the run's adapter, which others load from `place`; `licence` is the adapter's own."""
    scores = folder.scores() if scores is None and folder.is_scored else scores
    recipe = folder.recipe()
    tasks = folder.task_names()
    name, method = recipe.model.name, recipe.method
    head = front_matter(name, ["dyads", method.name], licence or _licence(name))
    title = f"{recipe.name}: {method.name} adapter of {_short(name)}"
    many = f"One adapter for {len(tasks)} tasks" if len(tasks) > 1 else "An adapter for one task"
    return visible(
        "\n".join(
            [
                head,
                f"# {title}",
                "",
                f"{many}, trained with dyads {dyads.__version__} ({method.name}).",
                "",
                "```python",
                *_loading(recipe, tasks, place),
                "```",
                "",
                *prompts(folder, tasks),
                *_scores(scores, tasks),
                "## Training",
                "",
                *markdown_table(("", ""), _facts(folder, recipe)),
                "",
            ]
        ),
        keep="\n",
    )


def front_matter(model: str | None, tags: Sequence[str], licence: str | None = None, library: str = "peft") -> str:
    """The metadata that the hub reads at the start of a card."""
    data = ModelCardData(
        base_model=hub_id(model) if model else None,
        library_name=library,
        license=licence.lower() if licence else None,
        tags=list(tags),
    )
    return f"---\n{data.to_yaml()}\n---"


def base_model(name: str | None, revision: str | None = None) -> str:
    """A base model in words, by a name that others can use."""
    if not name:
        return "not named by the adapter"
    at = f" at revision {revision}" if revision else ""
    if (key := key_of(name)) is not None:
        packaged = PACKAGED[key]
        note = f", {packaged.note}" if packaged.note else ""
        return f"{packaged.hub_id} (`{PREFIX}{key}`{note})"
    if (known := hub_id(name)) is not None:
        return known + at
    return f"`{PurePath(name).name}`, a folder that is not on the hub"


def _short(name: str) -> str:
    return (hub_id(name) or PurePath(name).name).rpartition("/")[2]


def _licence(name: str) -> str | None:
    key = key_of(name)
    return PACKAGED[key].licence if key is not None else None


def _loading(recipe: Recipe, tasks: Sequence[str], place: str) -> list[str]:
    """Lines of Python that load the adapter."""
    spec = recipe.model
    known = hub_id(spec.name) or "path/to/" + PurePath(spec.name).name
    kind = kind_of(spec.name, model_config(spec.name, spec.revision), spec.kind)
    if kind == "encoder":
        return [
            "from pathlib import Path",
            "",
            "from dyads.models.heads import attach_heads, read_heads",
            "from dyads.models.load import load_model",
            "from dyads.recipe.spec import ModelSpec",
            "from peft import PeftModel",
            "",
            f'folder = Path("{place}")  # downloaded; heads.json has the labels of each task',
            f'base = load_model(ModelSpec(name="{known}", dtype="{spec.dtype}"))',
            f'attach_heads(base, read_heads(folder / "heads.json"), "{spec.pool}")',
            "model = PeftModel.from_pretrained(base, str(folder))",
        ]
    auto = "AutoModelForSeq2SeqLM" if kind == "seq2seq" else "AutoModelForCausalLM"
    revision = f', revision="{spec.revision}"' if spec.revision else ""
    lines = [
        *(["import dyads  # registers the method with PEFT"] if recipe.method.name != "lora" else []),
        "from peft import PeftModel",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'name = "{known}"',
        f'base = {auto}.from_pretrained(name, dtype="{spec.dtype}"{revision})',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f'model = PeftModel.from_pretrained(base, "{place}")',
    ]
    if tasks and recipe.method.reads_task:
        lines.append(
            f"# model.generate(**batch, task={json.dumps(tasks[0], ensure_ascii=False)}): the gates read the task"
        )
    return lines


def prompts(folder: RunFolder, tasks: Sequence[str], exported: bool = False) -> list[str]:
    """The section on prompts: the form of the first task's, and the file with those of all unless it was exported."""
    templates = folder.templates()
    first = next((name for name in tasks if name in templates), None)
    if first is None:
        return []
    template = templates[first]
    chat = ", as a user's message of the chat template" * (template.chat and folder.chat_template() is not None)
    forms = "`templates.json` of the run has the form of every task's prompts. That of"
    indented = [f"    {line}".rstrip() for line in template.form.split("\n")]
    return [
        "## Prompts",
        "",
        f"{'The form of the prompts in training, for' if exported else forms} {json.dumps(first)}{chat}:",
        "",
        *indented,
        "",
    ]


def _scores(scores: Scores | None, tasks: Sequence[str]) -> list[str]:
    """The tasks with their scores, or alone where the run is not scored."""
    if scores is None:
        return ["## Tasks", "", "Not scored.", "", *(f"- {task}" for task in tasks), ""]
    means = f"{scores['micro']['headline']:.1f}, over tasks {scores['macro']['headline']:.1f}"
    rows = [
        [row["task"], row["metric"], f"{row['value']:.1f}", str(row["n"])]
        for row in scores["scores"]
        if row["headline"]
    ]
    return [
        "## Tasks",
        "",
        f"Scores on the {scores['split']} split, 0 to 100; mean over instances {means}.",
        "",
        *markdown_table(("task", "metric", "score", "instances"), rows),
        "",
    ]


def _facts(folder: RunFolder, recipe: Recipe) -> list[list[str]]:
    spec, method = recipe.train, recipe.method
    environment = folder.environment() if folder.has_environment else {}
    trained: dict[str, Any] = next((line for line in reversed(folder.log()) if line.get("event") == "trained"), {})
    options = ", ".join(f"{key}={value}" for key, value in method.options.items())
    licence = _licence(recipe.model.name)
    rows = [
        ["base model", base_model(recipe.model.name, recipe.model.revision)],
        ["its licence", licence or "see the page of the base model"],
        ["method", f"{method.name} ({options})" if options else method.name],
        ["trained parameters", f"{trained['parameters']:,}" if "parameters" in trained else "unknown"],
        [
            "steps",
            f"{spec.steps:,} of {spec.batch_size} examples, learning rate {spec.learning_rate:g}, seed {recipe.seed}",
        ],
        ["command", _command(environment.get("command"))],
    ]
    versions = environment.get("versions")
    if isinstance(versions, dict):
        shown = ("torch", "transformers", "peft")
        rows.append(["versions", ", ".join(f"{name} {versions[name]}" for name in shown if name in versions)])
    return rows


def _command(arguments: Any) -> str:
    """The command that made the run; a script's own arguments are not shown."""
    if not isinstance(arguments, list) or not arguments or not all(isinstance(a, str) for a in arguments):
        return "unknown"
    program = PurePath(arguments[0])
    if program.stem == "dyads" or program.parts[-2:] in _ENTRY_POINTS:
        return f"`{shlex.join(['dyads', *arguments[1:]])}`"
    return "a Python program"

# SPDX-License-Identifier: Apache-2.0
"""Worker process of the family `reasoning_gym`: generates entries and scores answers, one JSON line for each.

A process of its own has three reasons. Several generators iterate over sets of texts, so their entries depend on
Python's hash seed, which is fixed only at the start of a process. A scorer may take an answer such as 9**9**9**9 and
never return: the process is then killed. And some scorers evaluate an answer as Python; here they read literals,
arithmetic and formulas only.

    {"do": "generate", "tasks": [{"name", "seed", "level", "options", "sizes": {split: n}}, …]}   a line for each task
    {"do": "score", "answers": [{"name", "level", "options", "entry", "answer"}, …]}     {"at": i} and {"score": x} each

{"done": true} ends the lines of a request.
"""

from __future__ import annotations

import ast
import base64
import builtins
import hashlib
import importlib
import inspect
import json
import math
import os
import pickle
import re
import sys
from dataclasses import fields
from typing import Any, TextIO

from dyads.errors import did_you_mean

__all__ = ["NEEDS_LINE", "main"]

NEEDS_LINE = "reasoning_gym is not installed"
MOST_ROUNDS = 10
"""Datasets that are generated for a split before it counts as having no further questions."""


def main() -> None:
    """Read requests from standard input, a line for each, and write their lines to standard output."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # some generators print
    for line in sys.stdin:
        _fulfil(json.loads(line), out)
        _write(out, {"done": True})


def _fulfil(request: dict[str, Any], out: TextIO) -> None:
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        _write(out, {"error": f"{NEEDS_LINE} ({error})"})
        return
    if request["do"] == "generate":
        try:
            for task in request["tasks"]:
                _write(out, _generate(gym, **task))
        except _RefusedError as error:
            _write(out, {"error": str(error)})
    else:
        _refuse_code()
        for number, answer in enumerate(request["answers"]):
            _write(out, {"at": number})
            _write(out, {"score": _score(gym, **answer)})


def _write(out: TextIO, line: dict[str, Any]) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()


class _RefusedError(Exception):
    """A task or option that reasoning_gym does not have, or cannot generate."""


def _generate(
    gym: Any, name: str, seed: int, level: int | None, options: dict[str, Any], sizes: dict[str, int]
) -> dict[str, Any]:
    """The entries of a task in splits without a common question, the first split first."""
    config, notes = _config(gym, name, level, options)
    seen: set[str] = set()
    splits: dict[str, list[dict[str, str]]] = {}
    dataset = None
    for split, size in sizes.items():
        found: list[dict[str, str]] = []
        for round_ in range(MOST_ROUNDS):
            if len(found) == size:
                break
            own_seed = (
                int.from_bytes(hashlib.sha256(f"{seed}/{name}/{split}/{round_}".encode()).digest()[:4], "big") >> 1
            )
            try:
                dataset = gym.create_dataset(name, **{**config, "seed": own_seed, "size": size})
                entries = [dataset[index] for index in range(size)]
            except Exception as error:  # generators and configs raise many kinds of errors
                raise _RefusedError(
                    f"task '{name}': reasoning_gym cannot generate it: {error}; change its options"
                ) from error
            for entry in entries:
                if not isinstance(entry["answer"], str):
                    raise _RefusedError(f"task '{name}' has no reference answers in reasoning_gym; leave it out")
                if entry["question"] not in seen and len(found) < size:
                    seen.add(entry["question"])
                    pickled = base64.b64encode(pickle.dumps(entry)).decode()
                    found.append({"question": entry["question"], "answer": entry["answer"], "entry": pickled})
        if not found and size:
            raise _RefusedError(
                f"task '{name}' has no question left for its {split} split; ask for fewer, or other options"
            )
        if len(found) < size:
            notes.append(f"{name}: found {len(found)} different questions for {split}, not {size}")
        splits[split] = found
    described = (inspect.getdoc(type(dataset)) or "").strip().split("\n")[0]
    return {
        "name": name,
        "category": getattr(dataset, "category", ""),
        "about": described,
        "notes": notes,
        "splits": splits,
    }


def _config(gym: Any, name: str, level: int | None, options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of the task's config that differ from its defaults, and notes."""
    factory = importlib.import_module("reasoning_gym.factory")
    known = [key for key in factory.DATASETS if key != "composite"]
    if name not in known:
        raise _RefusedError(f"unknown task '{name}' of reasoning_gym {gym_version()}{did_you_mean(name, known)}")
    config_class = factory.DATASETS[name][1]
    names = [field.name for field in fields(config_class) if field.name not in ("seed", "size")]
    for key in options:
        if key not in names:
            raise _RefusedError(f"unknown option '{key}' of task '{name}'{did_you_mean(key, names)}")
    notes: list[str] = []
    config: dict[str, Any] = {}
    if level is not None and not factory.has_curriculum(name):
        notes.append(f"{name}: reasoning_gym has no levels of difficulty for it; its defaults are used")
    elif level is not None:
        curriculum = factory.create_curriculum(name)
        highest = max((len(attribute.levels) - 1 for attribute in curriculum.attributes.values()), default=0)
        if level > highest:
            notes.append(f"{name}: its highest level of difficulty is {highest}, which is used in place of {level}")
        curriculum.set_global_level(min(level, highest))
        made = curriculum.generate_configuration({"seed": 0, "size": 1})
        config = {field.name: getattr(made, field.name) for field in fields(made)}
    return {**config, **options}, notes


def gym_version() -> str:
    """The installed version of reasoning_gym."""
    from importlib import metadata

    return metadata.version("reasoning-gym")


# ----- scoring


def _score(gym: Any, name: str, level: int | None, options: dict[str, Any], entry: str, answer: str) -> float:
    """The task's own score of an answer, from 0 to 1; 0 where its scorer fails."""
    key = json.dumps([name, level, options])
    if key not in _DATASETS:
        config, _ = _config(gym, name, level, options)
        _DATASETS[key] = gym.create_dataset(name, **{**config, "seed": 0, "size": 1})
    try:
        score = float(_DATASETS[key].score_answer(answer, pickle.loads(base64.b64decode(entry))))
    except Exception:  # a scorer that cannot read the answer
        return 0.0
    return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0


_DATASETS: dict[str, Any] = {}


def _refuse_code() -> None:
    """Let the scorers evaluate literals, arithmetic and formulas, but no other code, of an answer."""
    parser = importlib.import_module("sympy.parsing.sympy_parser")
    original: Any = parser.parse_expr

    def parse_expr(text: str, *arguments: Any, **options: Any) -> Any:
        if not _is_formula(text):
            raise ValueError("not a formula")
        return original(text, *arguments, **options)

    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] not in ("reasoning_gym", "sympy") or module is parser:
            continue
        if getattr(module, "parse_expr", None) is original:
            setattr(module, "parse_expr", parse_expr)  # noqa: B010 – mypy knows no such attribute of a module
        if module_name.startswith("reasoning_gym"):
            setattr(module, "eval", _evaluate)  # noqa: B010 – hides the built-in function in that module


_FUNCTIONS = "sin cos tan sec csc cot asin acos atan sinh cosh tanh exp log ln sqrt Abs abs pi oo Integral"


def _is_formula(text: str) -> bool:
    """True for a text of numbers, operators, variables of one letter and known functions."""
    names = re.findall(r"[^\W\d]\w*", text)
    formula = re.fullmatch(r"[\w\s+\-*/^().,=!]*", text) is not None and re.search(r"\.\s*[^\W\d]|__", text) is None
    return formula and len(text) <= 2000 and all(len(name) == 1 or name in _FUNCTIONS.split() for name in names)


def _evaluate(text: str, *scopes: Any) -> Any:
    """The value of a literal, or of arithmetic on numbers."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if re.fullmatch(r"[\s0-9a-fA-FxX+\-*/%&|^~<>().]*", text) is None:
            raise
        return builtins.eval(text, {"__builtins__": {}})

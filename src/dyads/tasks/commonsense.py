# SPDX-License-Identifier: Apache-2.0
"""Family `commonsense`: seven commonsense data sets as multiple choice (form of Hu et al., 2023, arXiv 2304.01933).

ARC-Challenge, ARC-Easy, BoolQ (without its passages), OpenBookQA, PIQA, SIQA and WinoGrande. The prompt is the
instruction of the file, a line break and "the correct answer is "; with the answer it ends in the file's `output`. The
choices are those of the instruction's last line, "Answer format: answer1/answer2/…": some questions of ARC have three
or five. The metric is accuracy; class ids follow the numbers of the answers, and false comes before true.

Files, in each folder of `path`: `<set>/train.json`, `test.json`, lists of {instruction, input, output, answer}, in
folders named ARC-Challenge, ARC-Easy, boolq, openbookqa, piqa, social_i_qa, winogrande. The test file is the one that
publications score; for several sets it is the public validation data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from dyads.tasks.family import register_family
from dyads.tasks.labelled import Form, LabelledSpec, NotAtHandError, Parts, verbalizer
from dyads.tasks.rows import Row, first_file, read_json
from dyads.tasks.task import Example

__all__ = ["COMMONSENSE_TASKS", "CommonsenseSpec"]

VERSION = 1
_ANSWER_FORMAT = re.compile(r"Answer format: (\S+)\s*\Z")


def _form(description: str, *labels: str) -> Form:
    return Form(description=description, prompt="{question}\nthe correct answer is ", labels=labels)


def _numbered(word: str, n: int) -> tuple[str, ...]:
    return tuple(f"{word}{i}" for i in range(1, n + 1))


_FORMS = {
    "arc_c": _form("Which answer to a hard question of school science is right?", *_numbered("answer", 5)),
    "arc_e": _form("Which answer to an easy question of school science is right?", *_numbered("answer", 5)),
    "boolq": _form("Is the answer to the question yes?", "false", "true"),
    "obqa": _form("Which answer follows from elementary science and common sense?", *_numbered("answer", 4)),
    "piqa": _form("Which of two ways reaches a practical goal?", *_numbered("solution", 2)),
    "siqa": _form("Which answer fits how people feel and act?", *_numbered("answer", 3)),
    "winogrande": _form("Which of two names fills the blank of the sentence?", *_numbered("option", 2)),
}
COMMONSENSE_TASKS = tuple(_FORMS)

_FOLDERS = {
    "arc_c": "ARC-Challenge",
    "arc_e": "ARC-Easy",
    "boolq": "boolq",
    "obqa": "openbookqa",
    "piqa": "piqa",
    "siqa": "social_i_qa",
    "winogrande": "winogrande",
}


@register_family
class CommonsenseSpec(LabelledSpec):
    """ARC, BoolQ, OpenBookQA, PIQA, SIQA and WinoGrande as multiple choice, from local files."""

    forms: ClassVar[Mapping[str, Form]] = _FORMS
    version: ClassVar[int] = VERSION

    family: Literal["commonsense"] = "commonsense"
    """ARC, BoolQ, OpenBookQA, PIQA, SIQA and WinoGrande as multiple choice, from local files."""

    def parts(self, name: str) -> Parts:
        for root in self.path:
            folder = root.expanduser() / _FOLDERS[name]
            train, test = first_file(folder, ["train.json"]), first_file(folder, ["test.json"])
            if train or test:
                break
        else:
            raise NotAtHandError(
                f"task '{name}' has no file {_FOLDERS[name]}/train.json or test.json in "
                f"{', '.join(map(str, self.path))}"
            )
        form, found = self.forms[name], [path for path in (train, test) if path]
        return Parts(
            _read(form, "train", train), _read(form, "test", test), notes=[f"read from {', '.join(map(str, found))}"]
        )


def _read(form: Form, split: str, path: Path | None) -> list[Example]:
    return [] if path is None else [_example(form, split, row) for row in read_json(path)]


def _example(form: Form, split: str, row: Row) -> Example:
    more = str(row.fields.get("input") or "").strip()
    question = row.text("instruction") + (f"\n{more}" if more else "")
    listed = _ANSWER_FORMAT.search(row.text("instruction"))
    choices = tuple(listed[1].split("/")) if listed else ()
    label = verbalizer(row, row.text("answer"), choices or form.labels)
    own = choices if choices != form.labels and set(choices) != set(form.labels) else ()
    return form.example(f"{split}-{row.number}", {"question": question}, [label], choices=own)

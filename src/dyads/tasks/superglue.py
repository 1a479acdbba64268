# SPDX-License-Identifier: Apache-2.0
"""Family `superglue`: seven SuperGLUE tasks as text (Wang et al., 2019, arXiv 1905.00537)

    boolq question: … passage: …                                      false / true
    cb hypothesis: … premise: …                                       entailment / contradiction / neutral
    copa choice1: … choice2: … premise: … question: cause|effect      choice1 / choice2
    rte sentence1: … sentence2: …                                     entailment / not_entailment (as in GLUE)
    wic word: … sentence1: … sentence2: …                             false / true
    wsc pronoun: … noun: … text: … *it* …                             false / true
    multirc question: … answer: … paragraph: …                        false / true, one example for every answer

The prompts are ours, in the form of MoRE's for GLUE; labels are in the order of their class ids on the hub.

Files, in each folder of `path`: `<task>/train.jsonl`, `val.jsonl` in SuperGLUE's format, and `dev32.jsonl`, the
validation file of few-shot collections (without it a share of train is held out); or `<task>/train.json`, `dev.json`,
lists of {sentence, label} (CB, COPA, WiC). The test split is the whole public validation file, since the public test
files have no labels.

Metrics `official`: accuracy and macro F1 (CB), F1 over all answers and the share of questions with every answer
correct (MultiRC), else accuracy. Metrics `paper`: accuracy. WSC's pronoun is put between asterisks; where it occurs
several times, the occurrence nearest to its word index.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dyads.errors import TaskError
from dyads.tasks.family import register_family
from dyads.tasks.glue import RTE
from dyads.tasks.labelled import Form, LabelledSpec, NotAtHandError, Parts, is_unlabelled, merge_notes, verbalizer
from dyads.tasks.rows import Row, first_file, read_json, read_jsonl
from dyads.tasks.task import Example

__all__ = ["SUPERGLUE_TASKS", "SuperGlueSpec"]

VERSION = 1
_BOOLEAN = ("false", "true")

_FORMS = {
    "boolq": Form(
        description="Is the answer to the question yes, according to the passage?",
        prompt="boolq question: {question} passage: {passage}",
        segments=("{question}", "{passage}"),
        labels=_BOOLEAN,
    ),
    "cb": Form(
        description="Does the premise entail the hypothesis, contradict it, or neither?",
        prompt="cb hypothesis: {hypothesis} premise: {premise}",
        segments=("{premise}", "{hypothesis}"),
        labels=("entailment", "contradiction", "neutral"),
        metrics=("accuracy", "macro_f1"),
    ),
    "copa": Form(
        description="Which of the two choices is the cause or the effect of the premise?",
        prompt="copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
        segments=("{premise} What was the {question}?", "choice1: {choice1} choice2: {choice2}"),
        labels=("choice1", "choice2"),
    ),
    "rte": RTE,
    "wic": Form(
        description="Has the word the same meaning in both sentences?",
        prompt="wic word: {word} sentence1: {sentence1} sentence2: {sentence2}",
        segments=("{word}: {sentence1}", "{sentence2}"),
        labels=_BOOLEAN,
    ),
    "wsc": Form(
        description="Does the marked pronoun of the text refer to the noun?",
        prompt="wsc pronoun: {pronoun} noun: {noun} text: {text}",
        segments=("{text}", "{noun}"),
        labels=_BOOLEAN,
    ),
    "multirc": Form(
        description="Is the answer to the question right, according to the paragraph?",
        prompt="multirc question: {question} answer: {answer} paragraph: {paragraph}",
        segments=("{question} {answer}", "{paragraph}"),
        labels=_BOOLEAN,
        metrics=("f1", "group_accuracy", "accuracy"),
    ),
}
SUPERGLUE_TASKS = tuple(_FORMS)

_FOLDERS = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
    "multirc": "MultiRC",
}
_ALIASES = {"True": "true", "False": "false", "A": "choice1", "B": "choice2"}


@dataclass(frozen=True, slots=True)
class _Parsed:
    """The texts and the raw label of one example, with the row that holds them."""

    row: Row
    texts: Mapping[str, str]
    label: str
    part: str = ""
    """Suffix of the id where one row holds several examples."""
    group: str = ""


@register_family
class SuperGlueSpec(LabelledSpec):
    """SuperGLUE's BoolQ, CB, COPA, RTE, WiC, WSC and MultiRC, from local files."""

    forms: ClassVar[Mapping[str, Form]] = _FORMS
    version: ClassVar[int] = VERSION

    family: Literal["superglue"] = "superglue"
    """SuperGLUE's BoolQ, CB, COPA, RTE, WiC, WSC and MultiRC, from local files."""
    metrics: Literal["official", "paper"] = "official"
    """SuperGLUE's metrics, or accuracy for all tasks."""

    def metrics_of(self, form: Form) -> tuple[str, ...]:
        return form.metrics if self.metrics == "official" else ("accuracy",)

    def parts(self, name: str) -> Parts:
        for root in self.path:
            folder = root.expanduser() / _FOLDERS[name]
            files = {
                "train": first_file(folder, ["train.jsonl", "train.json"]),
                "dev32": first_file(folder, ["dev32.jsonl"]),
                "val": first_file(folder, ["val.jsonl", "dev.json"]),
            }
            if files["train"] or files["val"]:
                break
        else:
            raise NotAtHandError(
                f"task '{name}' has no file {_FOLDERS[name]}/train.jsonl, {_FOLDERS[name]}/val.jsonl (or train.json, "
                f"dev.json) in {', '.join(map(str, self.path))}"
            )
        found: dict[str, list[Example]] = {split: [] for split in files}
        notes = [f"read from {', '.join(str(path) for path in files.values() if path)}"]
        for split, path in files.items():
            if path is not None:
                found[split], unlabelled = self._read(name, split, path)
                notes += merge_notes([(unlabelled, f"of {path.name} without a label")])
        return Parts(found["train"], found["val"], found["dev32"] if files["dev32"] else None, notes)

    def _read(self, name: str, split: str, path: Path) -> tuple[list[Example], int]:
        form, examples, unlabelled = self.forms[name], [], 0
        if path.suffix == ".jsonl":
            parsed = (one for row in read_jsonl(path) for one in _LINES[name](row))
        elif name in _JOINED:
            parsed = (_Parsed(row, _parted(name, row), row.text("label")) for row in read_json(path))
        else:
            raise TaskError(f"{path}: the JSON form of task '{name}' is not supported; use train.jsonl and val.jsonl")
        for one in parsed:
            if is_unlabelled(one.label):
                unlabelled += 1
                continue
            label = verbalizer(one.row, one.label, form.labels, _ALIASES)
            group = f"{split}-{one.group}" if one.group else ""
            examples.append(form.example(f"{split}-{one.row.number}{one.part}", one.texts, [label], group=group))
        return examples, unlabelled


# ----- rows of SuperGLUE's JSON lines


def _fields(**names: str) -> Callable[[Row], Iterator[_Parsed]]:
    """A reader of rows whose texts are fields; keywords map the name of a text to that of its field."""

    def read(row: Row) -> Iterator[_Parsed]:
        texts = {ours: row.text(theirs) for ours, theirs in names.items()}
        yield _Parsed(row, texts, row.text("label") if "label" in row.fields else "")

    return read


def _wsc(row: Row) -> Iterator[_Parsed]:
    target, words = row["target"], row.text("text").split()
    try:
        pronoun, noun, at = str(target["span2_text"]), str(target["span1_text"]), int(target["span2_index"])
    except (KeyError, TypeError, ValueError):
        raise TaskError(f"{row.place}: 'target' needs span1_text, span2_text and span2_index") from None
    # The pronoun may occur several times, its word may have punctuation, and a few indices are off by one.
    if places := [i for i, word in enumerate(words) if word.strip(string.punctuation) == pronoun]:
        marked = min(places, key=lambda i: abs(i - at))
        words[marked] = words[marked].replace(pronoun, f"*{pronoun}*", 1)
    texts = {"pronoun": pronoun, "noun": noun, "text": " ".join(words)}
    yield _Parsed(row, texts, row.text("label") if "label" in row.fields else "")


def _multirc(row: Row) -> Iterator[_Parsed]:
    passage: Any = row["passage"]
    try:
        for q, question in enumerate(passage["questions"]):
            for a, answer in enumerate(question["answers"]):
                texts = {
                    "paragraph": str(passage["text"]).strip(),
                    "question": str(question["question"]).strip(),
                    "answer": str(answer["text"]).strip(),
                }
                yield _Parsed(row, texts, str(answer.get("label", "")), f"-{q}-{a}", f"{row.number}-{q}")
    except (KeyError, TypeError, AttributeError):
        raise TaskError(
            f"{row.place}: 'passage' needs a text and questions with question and answers (text, label)"
        ) from None


_LINES: dict[str, Callable[[Row], Iterator[_Parsed]]] = {
    "boolq": _fields(question="question", passage="passage"),
    "cb": _fields(premise="premise", hypothesis="hypothesis"),
    "copa": _fields(premise="premise", choice1="choice1", choice2="choice2", question="question"),
    "rte": _fields(sentence1="premise", sentence2="hypothesis"),
    "wic": _fields(word="word", sentence1="sentence1", sentence2="sentence2"),
    "wsc": _wsc,
    "multirc": _multirc,
}

# ----- rows {sentence, label} of the JSON form, where `sentence` joins the texts

_JOINED = {
    "cb": re.compile(r"sentence 1: (?P<premise>.*)\nsentence 2: (?P<hypothesis>.*)", re.DOTALL),
    "copa": re.compile(
        r'Which sentence is the (?P<question>cause|effect) of "(?P<premise>.*)"\? Choose one between A and B\.\n'
        r"A: (?P<choice1>.*)\nB: (?P<choice2>.*)"
    ),
    "wic": re.compile(r"word: (?P<word>.*)\n(?P<sentence1>.*)\n(?P<sentence2>.*)"),
}


def _parted(name: str, row: Row) -> dict[str, str]:
    whole = row.text("sentence")
    found = _JOINED[name].fullmatch(whole)
    if found is None:
        raise TaskError(
            f"{row.place}: 'sentence' is not in the form of task '{name}': {whole[:60]!r}; restore the file"
        )
    return {key: text.strip() for key, text in found.groupdict().items()}

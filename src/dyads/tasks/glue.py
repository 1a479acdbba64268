# SPDX-License-Identifier: Apache-2.0
"""Family `glue`: the nine GLUE tasks as text (Wang et al., 2018, arXiv 1804.07461; prompts of MoRE, arXiv 2505.22694)

    cola sentence: …                        unacceptable / acceptable
    mnli hypothesis: … premise: …           entailment / neutral / contradiction
    mrpc sentence1: … sentence2: …          not_equivalent / equivalent
    qnli question: … sentence: …            entailment / not_entailment
    qqp question1: … question2: …           not_duplicate / duplicate
    rte sentence1: … sentence2: …           entailment / not_entailment
    sst2 sentence: …                        negative / positive
    stsb sentence1: … sentence2: …          0.0 … 5.0, rounded to the nearest 0.2
    wnli sentence1: … sentence2: …          not_entailment / entailment

Tasks and their ids are in MoRE's order; WNLI, which MoRE leaves out, is last. Labels are in the order of their class
ids on the hub.

Files, in each folder of `path`: `<task>/train.tsv`, `dev.tsv` (MNLI: `dev_matched.tsv`, `dev_mismatched.tsv`) in GLUE's
format, or `<task>/train.json`, `dev.json`, lists of {sentence, label} with a pair written as "sentence 1: …", line
break, "sentence 2: …". Test files have no labels and are not read. Texts are kept unchanged, with stray quotation
marks.

Protocol `full`: the dev file is the test split and a tenth of train is held out for validation. Protocol `paper`: for
mrpc, rte, cola and stsb, dev is permuted with seed 1189, its first half is validation and its second half the test
split; for the other tasks all of dev is the test split. We differ: on those the paper chooses its model by the scores
that it reports, while we hold out a share of train. That the permutation is torch's is our interpretation.

Metrics `official`: Matthews (CoLA), accuracy and F1 (MRPC, QQP), Pearson and Spearman with the exact scores (STS-B),
else accuracy. Metrics `paper`, those of MoRE's scorer: Matthews (CoLA), Pearson with the rounded scores (STS-B), else
accuracy. They compare case; for Matthews every text that is not a label is a separate class, and for Pearson a
prediction with a sign or an exponent is 0.

The paper's SST-2 prompts end in a space, like the sentences of that file. It is removed here, as T5's tokenizer does
too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dyads.errors import TaskError
from dyads.tasks.divide import halve
from dyads.tasks.family import register_family
from dyads.tasks.labelled import Form, LabelledSpec, NotAtHandError, Parts, is_unlabelled, merge_notes, verbalizer
from dyads.tasks.rows import Row, first_file, read_json, read_tsv
from dyads.tasks.task import Example

__all__ = ["GLUE_TASKS", "RTE", "GlueSpec"]

VERSION = 1
HUB = "nyu-mll/glue"
HALVED = ("mrpc", "rte", "cola", "stsb")
PAPER_SEED = 1189
PAPER_PROMPT_TOKENS = 128

_PAIR = ("{sentence1}", "{sentence2}")

RTE = Form(
    description="Does the first text entail the second?",
    prompt="rte sentence1: {sentence1} sentence2: {sentence2}",
    segments=_PAIR,
    labels=("entailment", "not_entailment"),
)

_FORMS = {
    "cola": Form(
        description="Is the sentence acceptable English?",
        prompt="cola sentence: {sentence}",
        segments=("{sentence}",),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews",),
    ),
    "mnli": Form(
        description="Does the premise entail the hypothesis, contradict it, or neither?",
        prompt="mnli hypothesis: {hypothesis} premise: {premise}",
        segments=("{premise}", "{hypothesis}"),
        labels=("entailment", "neutral", "contradiction"),
    ),
    "mrpc": Form(
        description="Do the two sentences from the news say the same?",
        prompt="mrpc sentence1: {sentence1} sentence2: {sentence2}",
        segments=_PAIR,
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
    ),
    "qnli": Form(
        description="Does the sentence contain the answer to the question?",
        prompt="qnli question: {question} sentence: {sentence}",
        segments=("{question}", "{sentence}"),
        labels=("entailment", "not_entailment"),
    ),
    "qqp": Form(
        description="Do the two questions ask the same?",
        prompt="qqp question1: {question1} question2: {question2}",
        segments=("{question1}", "{question2}"),
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
    ),
    "rte": RTE,
    "sst2": Form(
        description="Is the phrase from a film review negative or positive?",
        prompt="sst2 sentence: {sentence}",
        segments=("{sentence}",),
        labels=("negative", "positive"),
    ),
    "stsb": Form(
        description="How similar in meaning are the two sentences, from 0 to 5?",
        prompt="stsb sentence1: {sentence1} sentence2: {sentence2}",
        segments=_PAIR,
        metrics=("pearson", "spearman"),
    ),
    "wnli": Form(
        description="Does the second sentence, which replaces a pronoun of the first, follow from it?",
        prompt="wnli sentence1: {sentence1} sentence2: {sentence2}",
        segments=_PAIR,
        labels=("not_entailment", "entailment"),
    ),
}
GLUE_TASKS = tuple(_FORMS)
_PAPER_METRICS = {"accuracy": "accuracy_exact", "matthews": "matthews_exact", "pearson": "pearson_digits"}


@dataclass(frozen=True, slots=True)
class _Layout:
    """Columns of a task in the official files."""

    folder: str
    texts: dict[str, str]
    """Column of every text, by the name of the text here and on the hub."""
    label: str = "label"
    header: tuple[str, ...] | None = None
    """Column names of a file without a header line."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Labels of the JSON form that differ from ours."""


_SENTENCES = {"sentence1": "sentence1", "sentence2": "sentence2"}
_LAYOUTS = {
    "cola": _Layout("CoLA", {"sentence": "sentence"}, header=("source", "label", "mark", "sentence")),
    "mnli": _Layout("MNLI", {"premise": "sentence1", "hypothesis": "sentence2"}, "gold_label"),
    "mrpc": _Layout("MRPC", {"sentence1": "#1 String", "sentence2": "#2 String"}, "Quality"),
    "qnli": _Layout("QNLI", {"question": "question", "sentence": "sentence"}),
    "qqp": _Layout(
        "QQP",
        {"question1": "question1", "question2": "question2"},
        "is_duplicate",
        aliases={"True": "duplicate", "False": "not_duplicate"},
    ),
    "rte": _Layout("RTE", _SENTENCES),
    "sst2": _Layout("SST-2", {"sentence": "sentence"}),
    "stsb": _Layout("STS-B", _SENTENCES, "score"),
    "wnli": _Layout("WNLI", _SENTENCES),
}

_JOINED_PAIR = re.compile(r"(?:sentence 1|first sentence): (.*)\n(?:sentence 2|second sentence): (.*)", re.DOTALL)


@register_family
class GlueSpec(LabelledSpec):
    """GLUE, from local files or from the hub."""

    forms: ClassVar[Mapping[str, Form]] = _FORMS
    version: ClassVar[int] = VERSION

    family: Literal["glue"] = "glue"
    """GLUE, from local files or from the hub."""
    source: Literal["files", "hub"] = "files"
    """The folders in `path`, or the data set on the hub (needs the package `datasets`)."""
    path: tuple[Path, ...] = Field(default=())
    """One or more folders with `CoLA/`, `MNLI/`, …; a task is read from the first that has it."""
    protocol: Literal["full", "paper"] = "full"
    """Score all of dev; or MoRE's: half of dev of the four small tasks, with the other half as validation."""
    metrics: Literal["official", "paper"] = "official"
    """GLUE's metrics, or MoRE's."""
    mnli_dev: Literal["matched", "mismatched"] = "matched"
    """The dev file of MNLI that is scored."""

    @model_validator(mode="after")
    def _source_and_path_agree(self) -> GlueSpec:
        if self.source == "files" and not self.path:
            raise ValueError("path is missing: the folder with CoLA/, MNLI/, …; or use source: hub")
        if self.source == "hub" and self.path:
            raise ValueError(f"path {self.path[0]} is not read with source: hub; drop one of them")
        if self.protocol == "paper" and self.mnli_dev == "mismatched":
            raise ValueError("protocol: paper scores MNLI on the matched dev file; drop mnli_dev or the protocol")
        return self

    def metrics_of(self, form: Form) -> tuple[str, ...]:
        return form.metrics if self.metrics == "official" else (_PAPER_METRICS[form.metrics[0]],)

    def parts(self, name: str) -> Parts:
        parts = self._from_hub(name) if self.source == "hub" else self._from_files(name)
        if self.protocol == "paper":
            parts.max_prompt_tokens = PAPER_PROMPT_TOKENS
            if name in HALVED:
                parts.validation, parts.test = halve(parts.test, seed=PAPER_SEED)
        return parts

    def _from_files(self, name: str) -> Parts:
        layout = _LAYOUTS[name]
        if name == "mnli":
            scored = ["dev_matched.tsv", "dev.json"] if self.mnli_dev == "matched" else ["dev_mismatched.tsv"]
        else:
            scored = ["dev.tsv", "dev.json"]
        for root in self.path:
            folder = root.expanduser() / layout.folder
            files = {"train": first_file(folder, ["train.tsv", "train.json"]), "dev": first_file(folder, scored)}
            if any(files.values()):
                break
        else:
            raise NotAtHandError(
                f"task '{name}' has no file {layout.folder}/train.tsv, {layout.folder}/{' or '.join(scored)} in "
                f"{', '.join(map(str, self.path))}"
            )
        found: dict[str, list[Example]] = {"train": [], "dev": []}
        notes = [f"read from {', '.join(str(path) for path in files.values() if path)}"]
        for split, path in files.items():
            if path is not None:
                found[split], dropped = self._read(name, split, path)
                notes += [f"{path.name}: {note}" for note in dropped]
        return Parts(found["train"], found["dev"], notes=notes)

    def _read(self, name: str, split: str, path: Path) -> tuple[list[Example], list[str]]:
        layout = _LAYOUTS[name]
        if path.suffix == ".tsv":
            rows, misshapen = read_tsv(path, layout.header)
            texts = [({ours: row.text(theirs) for ours, theirs in layout.texts.items()}, row) for row in rows]
            examples, unlabelled = self._examples(name, split, texts, layout.label)
        else:
            misshapen, rows = 0, read_json(path)
            texts = [(_parted(tuple(layout.texts), row), row) for row in rows]
            examples, unlabelled = self._examples(name, split, texts, "label")
        return examples, merge_notes([(misshapen, "with too few or too many cells"), (unlabelled, "without a label")])

    def _from_hub(self, name: str) -> Parts:
        layout = _LAYOUTS[name]
        scored = f"validation_{self.mnli_dev}" if name == "mnli" else "validation"
        found, notes = {}, [f"read from the hub's {HUB}, {name}"]
        for split, theirs in (("train", "train"), ("dev", scored)):
            rows = [
                Row(f"{HUB} {name} {theirs}, row {i}", i, fields) for i, fields in enumerate(_hub_rows(name, theirs))
            ]
            texts = [({ours: row.text(ours) for ours in layout.texts}, row) for row in rows]
            found[split], unlabelled = self._examples(name, split, texts, "label")
            notes += merge_notes([(unlabelled, f"of {theirs} without a label")])
        return Parts(found["train"], found["dev"], notes=notes)

    def _examples(
        self, name: str, split: str, texts: list[tuple[dict[str, str], Row]], label: str
    ) -> tuple[list[Example], int]:
        """The examples, and the number of rows without a label."""
        form, examples = self.forms[name], []
        for given, row in texts:
            raw = row.text(label)
            if is_unlabelled(raw):
                continue
            if form.labels:
                references: tuple[str, ...] = (verbalizer(row, raw, form.labels, _LAYOUTS[name].aliases),)
            else:
                references = _similarity(row, raw, exact=self.metrics == "official")
            examples.append(form.example(f"{split}-{row.number}", given, references))
        return examples, len(texts) - len(examples)


def _parted(names: tuple[str, ...], row: Row) -> dict[str, str]:
    """The texts of a row of the JSON form, which joins a pair in one string."""
    whole = row.text("sentence")
    if len(names) == 1:
        return {names[0]: whole}
    pair = _JOINED_PAIR.fullmatch(whole)
    if pair is None:
        raise TaskError(f"{row.place}: expected 'sentence 1: …', a line break and 'sentence 2: …', got {whole[:60]!r}")
    return dict(zip(names, (text.strip() for text in pair.groups()), strict=True))


def _similarity(row: Row, raw: str, *, exact: bool) -> tuple[str, ...]:
    """The score rounded to the nearest 0.2, the training target as text; and the exact one where it differs."""
    try:
        score = round(float(raw), 3)  # the hub stores float32: 3.8 becomes 3.799999952…
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise TaskError(f"{row.place}: score '{raw}' is not a number from 0 to 5")
    rounded = f"{round(score * 5) / 5:.1f}"
    return (rounded,) if not exact or float(rounded) == score else (rounded, f"{score:g}")


def _hub_rows(name: str, split: str) -> Iterable[Mapping[str, object]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise TaskError("source: hub needs the package `datasets`: pip install datasets, or give local files") from None
    try:
        rows: Iterable[Mapping[str, object]] = load_dataset(HUB, name, split=split)
    except Exception as error:
        raise TaskError(f"cannot load {HUB} '{name}' ({split}): {error}; give local files with `path`") from error
    return rows

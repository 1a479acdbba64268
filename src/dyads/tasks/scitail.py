# SPDX-License-Identifier: Apache-2.0
"""Family `scitail`: sentences from the web that entail a fact of school science, or do not (Khot et al., 2018)

    scitail hypothesis: … premise: …        entails / neutral

The prompt is ours, in the form of MoRE's for MNLI; labels are in the order of their class ids.

Files, in each folder of `path` or its `tsv_format`, `snli_format`, `predictor_format`: the official
`scitail_1.0_<split>.tsv` (premise, hypothesis, label; no header), `scitail_1.0_<split>.txt` or
`scitail_1.0_structure_<split>.jsonl` (sentence1, sentence2, gold_label), with dev as validation and test as
test. Or a checkout of natural-instructions: its tasks 1529 and 1554 are samples of SciTail without splits. 40 % of them
are the test split (about the size of the official one) and a share of the rest is validation; such scores are not
comparable with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from dyads.errors import TaskError
from dyads.tasks.divide import divide
from dyads.tasks.family import register_family
from dyads.tasks.labelled import Form, LabelledSpec, NotAtHandError, Parts, is_unlabelled, merge_notes, verbalizer
from dyads.tasks.rows import Row, first_file, read_jsonl, read_tsv
from dyads.tasks.sni_folder import read_task
from dyads.tasks.task import Example

__all__ = ["SciTailSpec"]

VERSION = 1
SNI_SCORED = 0.4

_FORM = Form(
    description="Does the premise entail the hypothesis, a fact of school science?",
    prompt="scitail hypothesis: {hypothesis} premise: {premise}",
    segments=("{premise}", "{hypothesis}"),
    labels=("entails", "neutral"),
)
_FOLDERS = ("", "tsv_format", "snli_format", "predictor_format")
_FILES = ("scitail_1.0_{}.tsv", "scitail_1.0_{}.txt", "scitail_1.0_structure_{}.jsonl")
_SNI_FORMS = {
    "1529": re.compile(r"Premise: (?P<premise>.*)\n\s*Hypothesis: (?P<hypothesis>.*)", re.DOTALL),
    "1554": re.compile(r"Sentence 1: (?P<hypothesis>.*?)\sSentence 2: (?P<premise>.*)", re.DOTALL),
}


@register_family
class SciTailSpec(LabelledSpec):
    """SciTail, from its official files or from a checkout of natural-instructions."""

    forms: ClassVar[Mapping[str, Form]] = {"scitail": _FORM}
    version: ClassVar[int] = VERSION

    family: Literal["scitail"] = "scitail"
    """SciTail, from its official files or from a checkout of natural-instructions."""
    sni_task: Literal["1529", "1554"] = "1529"
    """The sample to read from a checkout of natural-instructions."""

    def parts(self, name: str) -> Parts:
        for root in (path.expanduser() for path in self.path):
            for folder in (root / inside for inside in _FOLDERS):
                files = {
                    split: first_file(folder, [pattern.format(split) for pattern in _FILES])
                    for split in ("train", "dev", "test")
                }
                if any(files.values()):
                    return self._official(files)
            if found := sorted((root / "tasks").glob(f"task{self.sni_task}_*.json")):
                return self._sni(found[0])
        raise NotAtHandError(
            f"task '{name}' has no file scitail_1.0_train.tsv, … or tasks/task{self.sni_task}_*.json in "
            f"{', '.join(map(str, self.path))}"
        )

    def _official(self, files: Mapping[str, Path | None]) -> Parts:
        found: dict[str, list[Example]] = {split: [] for split in files}
        notes = [f"read from {', '.join(str(path) for path in files.values() if path)}"]
        for split, path in files.items():
            if path is None:
                continue
            if path.suffix == ".tsv":
                rows, misshapen = read_tsv(path, ("sentence1", "sentence2", "gold_label"))
            else:
                rows, misshapen = read_jsonl(path), 0
            labelled = [row for row in rows if not is_unlabelled(row.text("gold_label"))]
            found[split] = [_example(split, row) for row in labelled]
            counts = [(misshapen, "with too few or too many cells"), (len(rows) - len(labelled), "without a label")]
            notes += [f"{path.name}: {note}" for note in merge_notes(counts)]
        return Parts(found["train"], found["test"], found["dev"] if files["dev"] else None, notes)

    def _sni(self, path: Path) -> Parts:
        examples = []
        for number, instance in enumerate(read_task(path).instances):
            texts = _SNI_FORMS[self.sni_task].fullmatch(instance.input.strip())
            row = Row(f"{path}, instance {number + 1}", number, {})
            if texts is None or not instance.output:
                raise TaskError(
                    f"{row.place}: not in the form of task {self.sni_task}: {instance.input[:60]!r}; restore the file"
                )
            label = verbalizer(row, instance.output[0].strip(), _FORM.labels)
            pair = {key: text.strip() for key, text in texts.groupdict().items()}
            examples.append(_FORM.example(f"{self.sni_task}-{number}", pair, [label]))
        size = max(1, round(SNI_SCORED * len(examples)))
        train, test = divide(examples, [size], salt=f"{self.family}/{self.seed}/sni", task="scitail")
        note = f"read from {path}, which has no official splits: {len(test)} of {len(examples)} examples are scored"
        return Parts(train, test, notes=[note])


def _example(split: str, row: Row) -> Example:
    label = verbalizer(row, row.text("gold_label"), _FORM.labels, {"entailment": "entails"})
    texts = {"premise": row.text("sentence1"), "hypothesis": row.text("sentence2")}
    return _FORM.example(f"{split}-{row.number}", texts, [label])

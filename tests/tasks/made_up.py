# SPDX-License-Identifier: Apache-2.0
"""Writers of small benchmark files: the public layouts with made-up contents."""

from __future__ import annotations

import json


def tsv(path, *rows, bom=False):
    """Cells with tabs between them, as they stand: no quoting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join("\t".join(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")


def jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def listed(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


# Header, then a row of number i and class k, in GLUE's own layout.
GLUE_LAYOUTS = {
    "CoLA": (None, lambda i, k: ("gj04", str(k), "*" if k == 0 else "", f"The bell {i} rang."), "01"),
    "MNLI": (
        "index promptID pairID genre s1_binary s2_binary s1_parse s2_parse sentence1 sentence2 label1 gold_label",
        lambda i, k: (str(i), "7", "7n", "fiction", "(", "(", "(", "(", f"It rains {i}.", f"It is wet {i}.", k, k),
        ("entailment", "neutral", "contradiction"),
    ),
    "MRPC": (
        "Quality,#1 ID,#2 ID,#1 String,#2 String",
        lambda i, k: (k, "1", "2", f'He said " no {i} .', f'" No {i} , " he said .'),
        "01",
    ),
    "QNLI": (
        "index question sentence label",
        lambda i, k: (str(i), f"Who came in {i}?", f'The "cook" came in {i}.', k),
        ("entailment", "not_entailment"),
    ),
    "QQP": (
        "id qid1 qid2 question1 question2 is_duplicate",
        lambda i, k: (str(i), "1", "2", f"How far is {i}?", f'"What is {i} ""far"" from?"', k),
        "01",
    ),
    "RTE": (
        "index sentence1 sentence2 label",
        lambda i, k: (str(i), f"All {i} ships sank.", f"A ship sank {i}.", k),
        ("entailment", "not_entailment"),
    ),
    "SST-2": ("sentence label", lambda i, k: (f"a {i} minute joy ", k), "01"),
    "STS-B": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        lambda i, k: (str(i), "news", "x", "2012", "1", "none", "none", f"A dog runs {i}.", f"A cat runs {i}.", k),
        ("4.750", "0.000", "3.8", "2.200"),
    ),
    "WNLI": ("index sentence1 sentence2 label", lambda i, k: (str(i), f"The cup {i} fell. It broke.", "It.", k), "01"),
}


def glue_rows(folder, start, n):
    header, row, classes = GLUE_LAYOUTS[folder]
    rows = [tuple(map(str, row(i, classes[i % len(classes)]))) for i in range(start, start + n)]
    divider = "," if folder == "MRPC" else " "
    return [tuple(header.split(divider)), *rows] if header else rows


def superglue_rows(folder, start, n):
    for i in range(start, start + n):
        yield {
            "BoolQ": {"question": f"is {i} even", "passage": f"Number {i} -- It may be.", "label": i % 2 == 0},
            "CB": {
                "premise": f"``Is it {i}?'' Perhaps.",
                "hypothesis": f"it is {i}",
                "label": ("entailment", "contradiction", "neutral")[i % 3],
            },
            "COPA": {
                "premise": f"The pot {i} boiled over.",
                "choice1": "The stove was hot.",
                "choice2": "The stove was cold.",
                "question": ("cause", "effect")[i % 2],
                "label": i % 2,
            },
            "RTE": {
                "premise": f"All {i} ships sank.",
                "hypothesis": f"A ship sank {i}.",
                "label": ("entailment", "not_entailment")[i % 2],
            },
            "WiC": {
                "word": "bank",
                "sentence1": f"The bank closed at {i}.",
                "sentence2": "They sat on the bank.",
                "label": i % 2 == 0,
                "start1": 4,
                "end1": 8,
                "version": 1.1,
            },
            "WSC": {
                "text": f"It rained, so Ann {i} gave Eve a coat, and it was warm.",
                "target": {"span1_text": "a coat", "span1_index": 7, "span2_text": "it", "span2_index": 10},
                "label": i % 2 == 0,
            },
            "MultiRC": {
                "version": 1.1,
                "passage": {
                    "text": f"Tom had {i} apples and a pear. ",
                    "questions": [
                        {
                            "question": "What had Tom?",
                            "answers": [{"text": f"{i} apples", "label": 1}, {"text": "a plum", "label": 0}],
                            "idx": 0,
                        },
                        {"question": "Who had a pear?", "answers": [{"text": "Tom", "label": 1}], "idx": 1},
                    ],
                },
            },
        }[folder] | {"idx": i}

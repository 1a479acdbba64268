# SPDX-License-Identifier: Apache-2.0
"""Metrics of predictions, in a registry by name.

An *instance metric* compares one prediction with its references (0..1); the score of a task is the mean, times 100. The
other kinds take all predictions of a task and have no values of instances: the input of a *corpus metric* (Pearson, …)
are texts, that of a *label metric* (Matthews, F1, …) class ids, that of a *group metric* whether each prediction is
correct and the group of its example. A *detail metric* is a task's own scorer: it compares predictions with the details
of their examples, and has values of instances.

    rouge_l       max over references of F(P, R) = 2PR / (P + R),  P = lcs / |prediction|,  R = lcs / |reference|
    rouge_l_words the same over whitespace-separated words, for languages whose letters the English tokenizer drops
    exact_match   1 if the prediction equals a reference, both normalised (NFC, widths, white space); case counts
    sni_exact_match  the official natural-instructions form of it: lower case, ASCII punctuation removed
    numeric_match 1 if the last number of the prediction equals that of a reference: 1,200.50 and 1200.5 do
    accuracy      1 if the prediction is a reference up to case and surrounding white space
    accuracy_exact  1 if the prediction is a reference up to surrounding white space; case counts
    pearson       correlation of predicted and exact numbers; -1..1
    pearson_digits  the same, where a prediction other than digits with at most one point counts as 0: -1 and 1e0 do
    spearman      the same of their ranks, ties sharing the mean rank
    matthews      correlation of predicted and expected classes, -1..1; k classes: Gorodkin's R_k
    matthews_exact  the same with every different text as a separate class; case counts
    f1            2PR / (P + R) of the second label
    macro_f1      mean of the F1 of every label that is expected or predicted
    group_accuracy  share of groups in which `accuracy` is 1 for every prediction

A prediction is matched with the labels up to case and surrounding white space. Predictions that match no label are
wrong: together they are one more class for Matthews, they lower the recall in F1, and they add no F1 to the macro mean.
In correlations a text that is not a number counts as 0, as in MoRE's release. A correlation that is 0/0, because all
predictions or all references are equal, is 0. `accuracy_exact`, `pearson_digits` and `matthews_exact` are the metrics
of MoRE's release (arXiv 2505.22694).
"""

from __future__ import annotations

import re
import string
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from functools import lru_cache
from typing import TYPE_CHECKING

from dyads.errors import TaskError, did_you_mean

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

__all__ = [
    "NO_LABEL",
    "Metric",
    "accuracy",
    "accuracy_exact",
    "class_ids",
    "corpus_metric",
    "detail_metric",
    "exact_match",
    "f1",
    "group_accuracy",
    "group_metric",
    "instance_metric",
    "label_metric",
    "macro_f1",
    "matthews",
    "matthews_exact",
    "metric",
    "metric_names",
    "numeric_match",
    "pearson",
    "pearson_digits",
    "rouge_l",
    "rouge_l_words",
    "sni_exact_match",
    "spearman",
    "to_digits",
    "to_number",
]

NO_LABEL = -1
"""Class id of a prediction that matches no label."""

InstanceMetric = Callable[[str, Sequence[str]], float]
CorpusMetric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]
LabelMetric = Callable[[Sequence[int], Sequence[int]], float]
GroupMetric = Callable[[Sequence[bool], Sequence[str]], float]
DetailMetric = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """A registered metric. Exactly one of the five functions is set."""

    name: str
    per_instance: InstanceMetric | None = None
    over_corpus: CorpusMetric | None = None
    over_labels: LabelMetric | None = None
    over_groups: GroupMetric | None = None
    over_details: DetailMetric | None = None
    higher_is_better: bool = True
    unread: Callable[[str], str] | None = None
    """The part of a reference that the metric cannot compare, empty where it can; None: it compares every text."""

    def measure(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        *,
        labels: Sequence[str] = (),
        groups: Sequence[str] = (),
        details: Sequence[str] = (),
    ) -> tuple[float, tuple[float, ...]]:
        """(score, values of the instances), times 100; the values are empty for corpus, label and group metrics.

        A label metric needs the task's labels in the order of their class ids, a group or detail metric one group, or
        details, per prediction.
        """
        if self.over_details is not None:
            values = tuple(100.0 * value for value in self.over_details(predictions, details))
            return sum(values) / len(values), values
        if self.per_instance is not None:
            values = tuple(100.0 * self.per_instance(p, r) for p, r in zip(predictions, references, strict=True))
            return sum(values) / len(values), values
        if self.over_corpus is not None:
            return 100.0 * self.over_corpus(predictions, references), ()
        if self.over_labels is not None:
            return 100.0 * self.over_labels(*class_ids(self.name, predictions, references, labels)), ()
        assert self.over_groups is not None
        correct = [accuracy(p, r) == 1.0 for p, r in zip(predictions, references, strict=True)]
        return 100.0 * self.over_groups(correct, groups), ()


def class_ids(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], labels: Sequence[str]
) -> tuple[list[int], list[int]]:
    """(predicted, expected) class ids; expected is the predicted class if a reference has it, else the first."""
    ids = {_folded(label): i for i, label in enumerate(labels)}
    predicted = [ids.get(_folded(p), NO_LABEL) for p in predictions]
    expected = []
    for prediction, correct in zip(predicted, references, strict=True):
        if unlisted := [r for r in correct if _folded(r) not in ids]:
            raise TaskError(
                f"metric '{name}': reference '{unlisted[0]}' is not one of the labels "
                f"{', '.join(labels) or '(none given)'}"
            )
        classes = [ids[_folded(r)] for r in correct]
        expected.append(prediction if prediction in classes else classes[0])
    return predicted, expected


def _folded(text: str) -> str:
    return text.strip().casefold()


_METRICS: dict[str, Metric] = {}


def _add(new: Metric) -> None:
    if new.name in _METRICS:
        raise TaskError(f"a metric named '{new.name}' is already registered: choose another name")
    _METRICS[new.name] = new


def instance_metric(
    name: str, *, higher_is_better: bool = True, unread: Callable[[str], str] | None = None
) -> Callable[[InstanceMetric], InstanceMetric]:
    """Register a function (prediction, references) -> 0..1 under `name`; `unread` is as in `Metric`."""

    def register(function: InstanceMetric) -> InstanceMetric:
        _add(Metric(name, per_instance=function, higher_is_better=higher_is_better, unread=unread))
        return function

    return register


def corpus_metric(name: str, *, higher_is_better: bool = True) -> Callable[[CorpusMetric], CorpusMetric]:
    """Register a function (predictions, references of each) -> score (1 is best) under `name`."""

    def register(function: CorpusMetric) -> CorpusMetric:
        _add(Metric(name, over_corpus=function, higher_is_better=higher_is_better))
        return function

    return register


def label_metric(name: str, *, higher_is_better: bool = True) -> Callable[[LabelMetric], LabelMetric]:
    """Register a function (predicted class ids or `NO_LABEL`, expected class ids) -> score (1 is best) under `name`."""

    def register(function: LabelMetric) -> LabelMetric:
        _add(Metric(name, over_labels=function, higher_is_better=higher_is_better))
        return function

    return register


def group_metric(name: str, *, higher_is_better: bool = True) -> Callable[[GroupMetric], GroupMetric]:
    """Register a function (correct or not, group of each) -> score (1 is best) under `name`."""

    def register(function: GroupMetric) -> GroupMetric:
        _add(Metric(name, over_groups=function, higher_is_better=higher_is_better))
        return function

    return register


def detail_metric(name: str, *, higher_is_better: bool = True) -> Callable[[DetailMetric], DetailMetric]:
    """Register a function (predictions, details of each) -> 0..1 of each under `name`."""

    def register(function: DetailMetric) -> DetailMetric:
        _add(Metric(name, over_details=function, higher_is_better=higher_is_better))
        return function

    return register


def metric(name: str) -> Metric:
    """The metric registered under `name`; TaskError for an unknown name."""
    try:
        return _METRICS[name]
    except KeyError:
        raise TaskError(f"unknown metric '{name}'{did_you_mean(name, _METRICS)}") from None


def metric_names() -> list[str]:
    """The names of all registered metrics, in order of registration."""
    return list(_METRICS)


class _CachedTokenizer:
    """The tokenizer of rouge-score with a cache: the same labels and references recur thousands of times."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import (
            DefaultTokenizer,
        )  # imported late: it loads nltk, and `import dyads.tasks` must stay light

        self.tokenize = lru_cache(maxsize=1 << 16)(DefaultTokenizer(use_stemmer=True).tokenize)


class _WordTokenizer:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


@lru_cache(maxsize=2)
def _scorer(words: bool) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_WordTokenizer() if words else _CachedTokenizer())


def _best_rouge(words: bool, prediction: str, references: Sequence[str]) -> float:
    scorer = _scorer(words)
    return max(float(scorer.score(target=r, prediction=prediction)["rougeL"].fmeasure) for r in references)


def _unread_by_rouge(reference: str) -> str:
    """The letters other than Latin ones, or all of a text without any of a-z and 0-9."""
    if reference.isascii():
        return "" if re.search("[A-Za-z0-9]", reference) else reference
    text = unicodedata.normalize("NFKD", reference)
    foreign = [c for c in text if c.isalpha() and not c.isascii() and "LATIN" not in unicodedata.name(c, "LATIN")]
    return "".join(foreign) or ("" if re.search("[A-Za-z0-9]", text) else reference)


@instance_metric("rouge_l", unread=_unread_by_rouge)
def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L of the official Super-NaturalInstructions scorer: F-measure, Porter stemmer, best reference.

    Only a-z and 0-9 count as word characters, so text in other scripts always scores 0: see `rouge_l_words`.
    """
    return _best_rouge(False, prediction, references)


@instance_metric("rouge_l_words")
def rouge_l_words(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L over unchanged whitespace-separated words (no lower case, no stemmer), best reference."""
    return _best_rouge(True, prediction, references)


def _normalised(text: str) -> str:
    """NFC, with full-width and half-width forms in their usual width and white space folded to single spaces."""
    if not text.isascii():
        text = "".join(unicodedata.normalize("NFKC", c) if _has_width(c) else c for c in text)
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def _has_width(character: str) -> bool:
    return unicodedata.decomposition(character).startswith(("<wide>", "<narrow>"))


@instance_metric("exact_match")
def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is a reference up to the form of its characters and white space.

    Composed and decomposed accents are equal, and so are the full-width and usual forms of a character. Case, accents,
    signs and punctuation count.
    """
    answer = _normalised(prediction)
    return float(any(answer == _normalised(r) for r in references))


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _without_punctuation(text: str) -> str:
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


@instance_metric("sni_exact_match")
def sni_exact_match(prediction: str, references: Sequence[str]) -> float:
    """Exact match of the official natural-instructions scorer. Unlike SQuAD's it keeps articles; accents count.

    It removes signs too: -5 is 5, and C++ is C#.
    """
    answer = _without_punctuation(prediction)
    return float(any(answer == _without_punctuation(r) for r in references))


_NUMBER = re.compile(
    r"(?:(?<![A-Za-z\d.)])(?P<sign>[-\u2212\u2013])[$€£¥]?)?"  # after a letter or number it is a hyphen or an operator
    r"(?<![A-Za-z\d])(?<!\d\.)"  # the 2 of m2 and the 15 of 3.14.15 are no numbers of their own
    r"(?P<whole>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?P<exponent>[eE][-+\u2212]?\d+)?"
    r"(?:\s?/\s?(?P<under>\d+(?:\.\d+)?))?"
)
_MOST_DIGITS = 1000


def _last_number(text: str) -> Decimal | None:
    """The last number in a text: 1,200 is a number, and so are 1/2, 2e-3, -$5 and .5; None without one."""
    found = None
    for found in _NUMBER.finditer(_normalised(text)):  # noqa: B007 – the last one
        pass
    if found is None:
        return None
    try:
        written = found["whole"].replace(",", "") + (found["exponent"] or "").replace("\u2212", "-")
        value = Decimal(written) / Decimal(found["under"] or 1)
    except DecimalException:
        return None
    if abs(value.adjusted()) > _MOST_DIGITS:
        return None
    return -value if found["sign"] else value


@instance_metric("numeric_match", unread=lambda reference: "" if _last_number(reference) is not None else reference)
def numeric_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the last number in the prediction is the last number in a reference, up to a billionth of it.

    A comma separates thousands and a point decimals. Signs count; units and all other text do not.
    """
    answer = _last_number(prediction)
    exact = [number for number in map(_last_number, references) if number is not None]
    if answer is None:
        return 0.0
    return float(any(abs(answer - number) <= abs(number) * Decimal("1e-9") for number in exact))


@instance_metric("accuracy")
def accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is a reference, up to case and surrounding white space; punctuation counts."""
    answer = _folded(prediction)
    return float(any(answer == _folded(r) for r in references))


@instance_metric("accuracy_exact")
def accuracy_exact(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is a reference up to surrounding white space; case counts."""
    return float(prediction.strip() in {r.strip() for r in references})


# ----- metrics of all predictions. scikit-learn and scipy are imported late: `import dyads.tasks` must stay light.


def to_number(text: str) -> float:
    """The number in a text; 0 if there is none, or if it is too large for a finite sum of squares."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if abs(value) < 1e100 else 0.0


def to_digits(text: str) -> float:
    """The number in a text of digits with at most one point; 0 for any other text, signs and exponents included."""
    return to_number(text) if re.fullmatch(r"\d+\.?\d*|\.\d+", text.strip()) else 0.0


def _correlation(
    how: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    parse: Callable[[str], float] = to_number,
) -> float:
    guesses, exact = [parse(p) for p in predictions], [to_number(r[-1]) for r in references]
    if len(set(guesses)) < 2 or len(set(exact)) < 2:
        return 0.0
    from scipy.stats import pearsonr, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly equal numbers: rounding may leave 0/0
        value = float((pearsonr if how == "pearson" else spearmanr)(guesses, exact).statistic)
    return value if abs(value) <= 1.0 else 0.0


@corpus_metric("pearson")
def pearson(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Pearson's correlation, -1..1, with the last references, which are the exact numbers."""
    return _correlation("pearson", predictions, references)


@corpus_metric("pearson_digits")
def pearson_digits(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Pearson's correlation, -1..1, with 0 for a prediction other than digits with at most one point."""
    return _correlation("pearson", predictions, references, to_digits)


@corpus_metric("spearman")
def spearman(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Spearman's rank correlation, -1..1, with the last references, which are the exact numbers."""
    return _correlation("spearman", predictions, references)


@label_metric("matthews")
def matthews(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Matthews' correlation coefficient, -1..1."""
    if len(set(predicted)) < 2 or len(set(expected)) < 2:
        return 0.0  # 0/0: scikit-learn returns 0 too, with a warning
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(expected, predicted))


@corpus_metric("matthews_exact")
def matthews_exact(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Matthews' correlation coefficient, -1..1, of texts: every different one is a class. First references count."""
    texts = [p.strip() for p in predictions], [r[0].strip() for r in references]
    ids = {text: i for i, text in enumerate(dict.fromkeys(texts[0] + texts[1]))}
    predicted, expected = ([ids[text] for text in side] for side in texts)
    return matthews(predicted, expected)


@label_metric("f1")
def f1(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """F1 of class 1, the second label; 0 if it is neither expected nor predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score([e == 1 for e in expected], [p == 1 for p in predicted], zero_division=0.0))


@label_metric("macro_f1")
def macro_f1(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Mean F1 of the classes that are expected or predicted."""
    from sklearn.metrics import f1_score

    classes = sorted({*expected, *predicted} - {NO_LABEL})
    return float(f1_score(expected, predicted, labels=classes, average="macro", zero_division=0.0))


@group_metric("group_accuracy")
def group_accuracy(correct: Sequence[bool], groups: Sequence[str]) -> float:
    """Share of groups with only correct predictions (MultiRC's exact match)."""
    whole: dict[str, bool] = {}
    for good, group in zip(correct, groups, strict=True):
        whole[group] = good and whole.get(group, True)
    return sum(whole.values()) / len(whole)

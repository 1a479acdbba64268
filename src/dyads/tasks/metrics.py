# SPDX-License-Identifier: Apache-2.0
"""When is an answer right, and how right?

Every metric has a name in one registry. An *instance metric* judges one prediction against its references (0..1) and a
task's score is the mean, times 100. The others judge all predictions of a task at once and have no per-instance values:
a *corpus metric* (Pearson, …) sees texts, a *label metric* (Matthews, F1, …) sees class ids, a *group metric* which of
the examples that belong together are right.

    rouge_l       max over references of F(P, R) = 2PR / (P + R),  P = lcs / |prediction|,  R = lcs / |reference|
    rouge_l_words the same over whitespace-separated words, for languages whose letters the English tokenizer drops
    exact_match   1 if the prediction equals a reference, both lower-cased, without punctuation, with white space folded
    accuracy      1 if the prediction is a reference up to case and surrounding white space
    accuracy_exact  1 if the prediction is a reference to the letter, up to surrounding white space
    pearson       correlation of predicted and exact numbers; -1..1
    pearson_digits  the same, where only digits with at most one point are a number: -1 and 1e0 count as 0
    spearman      the same of their ranks, ties sharing the mean rank
    matthews      correlation of predicted and expected classes, -1..1; k classes: Gorodkin's R_k
    matthews_exact  the same with every different text as a class of its own, case included
    f1            2PR / (P + R) of the second label
    macro_f1      mean over the labels that are expected or predicted of F1 for each
    group_accuracy  share of groups whose every prediction is right by `accuracy`

A prediction is the label that it equals up to case and surrounding white space. One that equals no label is wrong: it
is a class of its own for Matthews, counts against recall in F1, and has no F1 of its own in the mean. A text that is no
number counts as 0 in the correlations (MoRE's release does so). Where a correlation is 0/0, because all predictions or
all references are the same or there is only one, it is 0. `accuracy_exact`, `pearson_digits` and `matthews_exact` are
the metrics of MoRE's release (arXiv 2505.22694).
"""

from __future__ import annotations

import re
import string
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    "pearson",
    "pearson_digits",
    "rouge_l",
    "rouge_l_words",
    "spearman",
    "to_digits",
    "to_number",
]

NO_LABEL = -1
"""Class id of a prediction that equals no label."""

InstanceMetric = Callable[[str, Sequence[str]], float]
CorpusMetric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]
LabelMetric = Callable[[Sequence[int], Sequence[int]], float]
GroupMetric = Callable[[Sequence[bool], Sequence[str]], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """A registered metric. Exactly one of the four functions is set."""

    name: str
    per_instance: InstanceMetric | None = None
    over_corpus: CorpusMetric | None = None
    over_labels: LabelMetric | None = None
    over_groups: GroupMetric | None = None
    higher_is_better: bool = True

    def measure(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        *,
        labels: Sequence[str] = (),
        groups: Sequence[str] = (),
    ) -> tuple[float, tuple[float, ...]]:
        """(value, per-instance values), both times 100; only an instance metric has per-instance values.

        A label metric needs the task's labels in the order of their class ids, a group metric one group per prediction.
        """
        if self.per_instance is not None:
            values = tuple(100.0 * self.per_instance(p, r) for p, r in zip(predictions, references, strict=True))
            return sum(values) / len(values), values
        if self.over_corpus is not None:
            return 100.0 * self.over_corpus(predictions, references), ()
        if self.over_labels is not None:
            return 100.0 * self.over_labels(*class_ids(self.name, predictions, references, labels)), ()
        assert self.over_groups is not None
        right = [accuracy(p, r) == 1.0 for p, r in zip(predictions, references, strict=True)]
        return 100.0 * self.over_groups(right, groups), ()


def class_ids(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], labels: Sequence[str]
) -> tuple[list[int], list[int]]:
    """(predicted, expected); of several references the predicted one counts, else the first."""
    ids = {_plain(label): i for i, label in enumerate(labels)}
    predicted = [ids.get(_plain(p), NO_LABEL) for p in predictions]
    expected = []
    for guess, right in zip(predicted, references, strict=True):
        if strangers := [r for r in right if _plain(r) not in ids]:
            raise TaskError(
                f"metric '{name}': reference '{strangers[0]}' is none of the labels "
                f"{', '.join(labels) or '(none given)'}"
            )
        classes = [ids[_plain(r)] for r in right]
        expected.append(guess if guess in classes else classes[0])
    return predicted, expected


def _plain(text: str) -> str:
    return text.strip().casefold()


_METRICS: dict[str, Metric] = {}


def _add(new: Metric) -> None:
    if new.name in _METRICS:
        raise TaskError(f"a metric named '{new.name}' is already registered: choose another name")
    _METRICS[new.name] = new


def instance_metric(name: str, *, higher_is_better: bool = True) -> Callable[[InstanceMetric], InstanceMetric]:
    """Register a function (prediction, references) -> 0..1 under `name`."""

    def register(function: InstanceMetric) -> InstanceMetric:
        _add(Metric(name, per_instance=function, higher_is_better=higher_is_better))
        return function

    return register


def corpus_metric(name: str, *, higher_is_better: bool = True) -> Callable[[CorpusMetric], CorpusMetric]:
    """Register a function (predictions, references of each) -> value (1 is perfect) under `name`."""

    def register(function: CorpusMetric) -> CorpusMetric:
        _add(Metric(name, over_corpus=function, higher_is_better=higher_is_better))
        return function

    return register


def label_metric(name: str, *, higher_is_better: bool = True) -> Callable[[LabelMetric], LabelMetric]:
    """Register a function (predicted class ids or `NO_LABEL`, expected class ids) -> value under `name`."""

    def register(function: LabelMetric) -> LabelMetric:
        _add(Metric(name, over_labels=function, higher_is_better=higher_is_better))
        return function

    return register


def group_metric(name: str, *, higher_is_better: bool = True) -> Callable[[GroupMetric], GroupMetric]:
    """Register a function (right or not, group of each) -> value under `name`."""

    def register(function: GroupMetric) -> GroupMetric:
        _add(Metric(name, over_groups=function, higher_is_better=higher_is_better))
        return function

    return register


def metric(name: str) -> Metric:
    """The metric registered under `name`; an unknown name is refused with near names."""
    try:
        return _METRICS[name]
    except KeyError:
        raise TaskError(f"unknown metric '{name}'{did_you_mean(name, _METRICS)}") from None


def metric_names() -> list[str]:
    """The names of all registered metrics, in order of registration."""
    return list(_METRICS)


class _CachedTokenizer:
    """rouge-score's own tokenizer, remembering its answers: labels and references come back thousands of times."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer  # late: loads nltk, which `import dyads.tasks` must not

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


@instance_metric("rouge_l")
def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L as the official Super-NaturalInstructions scorer takes it: F-measure, Porter stemmer, best reference.

    Only a-z and 0-9 count as word characters, so text in other scripts always scores 0: see `rouge_l_words`.
    """
    return _best_rouge(False, prediction, references)


@instance_metric("rouge_l_words")
def rouge_l_words(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L over whitespace-separated words as they stand (no lower case, no stemmer), best reference."""
    return _best_rouge(True, prediction, references)


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


@instance_metric("exact_match")
def exact_match(prediction: str, references: Sequence[str]) -> float:
    """The official natural-instructions exact match. Articles stay (SQuAD's version drops them), accents too."""
    answer = _normalise(prediction)
    return float(any(answer == _normalise(r) for r in references))


@instance_metric("accuracy")
def accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the predicted label is a reference, up to case and surrounding white space; punctuation counts."""
    answer = _plain(prediction)
    return float(any(answer == _plain(r) for r in references))


@instance_metric("accuracy_exact")
def accuracy_exact(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is a reference up to surrounding white space; case counts."""
    return float(prediction.strip() in {r.strip() for r in references})


# ----- over all predictions. scikit-learn and scipy are loaded late: `import dyads.tasks` must stay light.


def to_number(text: str) -> float:
    """0 for what is no number, is not finite, or is so large that a sum of squares would not be."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if abs(value) < 1e100 else 0.0


def to_digits(text: str) -> float:
    """0 for what is not written with digits and at most one point: a sign or an exponent makes no number."""
    return to_number(text) if re.fullmatch(r"\d+\.?\d*|\.\d+", text.strip()) else 0.0


def _correlation(
    how: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    read: Callable[[str], float] = to_number,
) -> float:
    guesses, exact = [read(p) for p in predictions], [to_number(r[-1]) for r in references]
    if len(set(guesses)) < 2 or len(set(exact)) < 2:
        return 0.0
    from scipy.stats import pearsonr, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers that differ in their last digits only: rounding may leave 0/0
        value = float((pearsonr if how == "pearson" else spearmanr)(guesses, exact).statistic)
    return value if abs(value) <= 1.0 else 0.0


@corpus_metric("pearson")
def pearson(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Pearson's correlation, -1..1, with the last reference of each, which is the exact number."""
    return _correlation("pearson", predictions, references)


@corpus_metric("pearson_digits")
def pearson_digits(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Pearson's correlation, -1..1, of predictions that are written with digits and at most one point."""
    return _correlation("pearson", predictions, references, to_digits)


@corpus_metric("spearman")
def spearman(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Spearman's rank correlation, -1..1, with the last reference of each, which is the exact number."""
    return _correlation("spearman", predictions, references)


@label_metric("matthews")
def matthews(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Matthews' correlation coefficient, -1..1."""
    if len(set(predicted)) < 2 or len(set(expected)) < 2:
        return 0.0  # 0/0; scikit-learn says 0 too, with a warning
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(expected, predicted))


@corpus_metric("matthews_exact")
def matthews_exact(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Matthews' correlation coefficient, -1..1, of texts: each that differs is a class; the first reference counts."""
    texts = [p.strip() for p in predictions], [r[0].strip() for r in references]
    ids = {text: i for i, text in enumerate(dict.fromkeys(texts[0] + texts[1]))}
    predicted, expected = ([ids[text] for text in side] for side in texts)
    return matthews(predicted, expected)


@label_metric("f1")
def f1(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """F1 of class 1, the second label; 0 where it is neither expected nor predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score([e == 1 for e in expected], [p == 1 for p in predicted], zero_division=0.0))


@label_metric("macro_f1")
def macro_f1(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Mean of F1 over the classes that are expected or predicted."""
    from sklearn.metrics import f1_score

    classes = sorted({*expected, *predicted} - {NO_LABEL})
    return float(f1_score(expected, predicted, labels=classes, average="macro", zero_division=0.0))


@group_metric("group_accuracy")
def group_accuracy(right: Sequence[bool], groups: Sequence[str]) -> float:
    """Share of groups that are right in every part (MultiRC's exact match)."""
    whole: dict[str, bool] = {}
    for good, group in zip(right, groups, strict=True):
        whole[group] = good and whole.get(group, True)
    return sum(whole.values()) / len(whole)

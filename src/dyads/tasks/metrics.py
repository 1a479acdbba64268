# SPDX-License-Identifier: Apache-2.0
"""When is an answer right, and how right?

Every metric has a name in one registry. An *instance metric* judges one prediction against its references (0..1) and a
task's score is the mean, times 100. A *corpus metric* (Matthews, Pearson, …) judges all predictions of a task at once
and has no per-instance values.

    rouge_l       max over references of F(P, R) = 2PR / (P + R),  P = lcs / |prediction|,  R = lcs / |reference|
    rouge_l_words the same over whitespace-separated words, for languages whose letters the English tokenizer drops
    exact_match   1 if the prediction equals a reference, both lower-cased, without punctuation, with white space folded
    accuracy      1 if the prediction is a reference up to case and surrounding white space
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from dyads.errors import TaskError, did_you_mean

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

__all__ = [
    "Metric",
    "accuracy",
    "corpus_metric",
    "exact_match",
    "instance_metric",
    "metric",
    "metric_names",
    "rouge_l",
    "rouge_l_words",
]

InstanceMetric = Callable[[str, Sequence[str]], float]
CorpusMetric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """A registered metric. Exactly one of `per_instance` and `over_corpus` is set."""

    name: str
    per_instance: InstanceMetric | None = None
    over_corpus: CorpusMetric | None = None
    higher_is_better: bool = True

    def measure(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[float, tuple[float, ...]]:
        """(value, per-instance values), both times 100; a corpus metric has no per-instance values."""
        if self.per_instance is not None:
            values = tuple(100.0 * self.per_instance(p, r) for p, r in zip(predictions, references, strict=True))
            return sum(values) / len(values), values
        assert self.over_corpus is not None
        return 100.0 * self.over_corpus(predictions, references), ()


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
    answer = prediction.strip().casefold()
    return float(any(answer == r.strip().casefold() for r in references))

# SPDX-License-Identifier: Apache-2.0
"""Are the metrics the official ones, to the number?"""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from dyads.errors import TaskError
from dyads.tasks.metrics import accuracy, corpus_metric, exact_match, instance_metric, metric, rouge_l, rouge_l_words


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # lcs(the cat sat, the cat ran away) = the cat: P = 2/3, R = 2/4, F = 2·(1/3)/(7/6) = 4/7
    assert rouge_l("the cat sat", ["the cat ran away"]) == pytest.approx(4 / 7)
    assert rouge_l("a b c d", ["d c b a"]) == pytest.approx(1 / 4)


def test_rouge_l_takes_the_best_reference():
    assert rouge_l("b", ["a", "b", "a b"]) == 1.0


def test_rouge_l_stems_folds_case_and_ignores_punctuation():
    assert rouge_l("Running dogs!", ["run, dog"]) == 1.0
    assert rouge_l("Jumping", ["jumped"]) == 1.0


def test_rouge_l_of_an_empty_prediction_is_zero():
    assert rouge_l("", ["a"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("He bought two books yesterday.", "yesterday he was buying a book"),
        ("nationally", "nation"),
        ("(4, 5)", "(3, 5)"),
        ("naïve café", "naive cafe"),
        ("", "?"),
    ],
)
def test_rouge_l_equals_the_package_with_its_own_tokenizer(prediction, reference):
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, [reference]) == expected
    assert rouge_l(prediction, [reference]) == expected  # the second time from the cache


def test_rouge_l_words_sees_letters_that_rouge_l_drops():
    assert rouge_l("да нет", ["да"]) == 0.0
    assert rouge_l_words("да нет", ["да"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("Paris.", "paris", 1.0),
        ("  New\n York ", "new york", 1.0),
        ("(1, 2)", "1 2", 1.0),
        ("the cat", "cat", 0.0),  # SQuAD's version would drop the article
        ("well-known", "well known", 0.0),  # punctuation goes without leaving a blank
        ("¿si?", "si", 0.0),  # only ASCII punctuation
    ],
)
def test_exact_match_normalises_as_the_official_evaluation(prediction, reference, right):
    assert exact_match(prediction, ["something else", reference]) == right


def test_accuracy_strips_and_folds_case_only():
    assert accuracy(" Yes\n", ["yes"]) == 1.0
    assert accuracy("yes.", ["yes"]) == 0.0


def test_measure_gives_the_mean_and_the_instances_in_percent():
    assert metric("accuracy").measure(["a", "b", "c", "d"], [["a"], ["x"], ["c"], ["d"]]) == (
        75.0,
        (100.0, 0.0, 100.0, 100.0),
    )


def test_unknown_metric_is_refused_with_near_names():
    with pytest.raises(TaskError, match="unknown metric 'rogue_l' – did you mean 'rouge_l'"):
        metric("rogue_l")


def test_a_name_is_registered_once():
    with pytest.raises(TaskError, match="'rouge_l' is already registered"):
        instance_metric("rouge_l")(lambda prediction, references: 0.0)


def test_a_metric_over_all_predictions_has_no_instances(monkeypatch):
    monkeypatch.setattr("dyads.tasks.metrics._METRICS", {})
    corpus_metric("share_of_a")(lambda predictions, references: predictions.count("a") / len(predictions))
    assert metric("share_of_a").measure(["a", "b"], [["a"], ["a"]]) == (50.0, ())

# SPDX-License-Identifier: Apache-2.0
"""Metrics: values of the official scorers and of formulas, edge cases, the registry."""

from __future__ import annotations

import math

import numpy
import pytest
from rouge_score.rouge_scorer import RougeScorer

from dyads.errors import TaskError
from dyads.tasks.metrics import (
    NO_LABEL,
    accuracy,
    accuracy_exact,
    corpus_metric,
    exact_match,
    f1,
    group_accuracy,
    group_metric,
    instance_metric,
    label_metric,
    macro_f1,
    matthews,
    matthews_exact,
    metric,
    numeric_match,
    pearson,
    pearson_digits,
    rouge_l,
    rouge_l_words,
    sni_exact_match,
    spearman,
)


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


def test_rouge_l_equals_the_package_with_its_own_tokenizer():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for prediction, reference in [
        ("He bought two books yesterday.", "yesterday he was buying a book"),
        ("nationally", "nation"),
        ("(4, 5)", "(3, 5)"),
        ("naïve café", "naive cafe"),
        ("", "?"),
    ]:
        expected = scorer.score(reference, prediction)["rougeL"].fmeasure
        assert rouge_l(prediction, [reference]) == expected
        assert rouge_l(prediction, [reference]) == expected  # from the cache


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
def test_sni_exact_match_normalises_as_the_official_evaluation(prediction, reference, right):
    assert sni_exact_match(prediction, ["something else", reference]) == right


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("  New\n York ", "New York", 1.0),
        ("caf\u0065\u0301", "caf\u00e9", 1.0),  # decomposed and composed
        ("\u1112\u1161\u11ab\u1100\u1173\u11af", "한글", 1.0),
        ("你好，世界！", "你好,世界!", 1.0),  # full-width punctuation
        ("ＡＢＣ　１２", "ABC 12", 1.0),
        ("ｶﾞ", "ガ", 1.0),
        ("a\u00a0b", "a b", 1.0),
        ("paris", "Paris", 0.0),
        ("-5", "5", 0.0),
        ("\u22125", "5", 0.0),
        ("C++", "C#", 0.0),
        ("", "?", 0.0),
        ("好。", "好！", 0.0),
        ("resume", "résumé", 0.0),
        ("x²", "x2", 0.0),
        ("½", "1/2", 0.0),
    ],
)
def test_exact_match_normalises_characters_and_blanks_only(prediction, reference, right):
    assert exact_match(prediction, ["something else", reference]) == right
    assert exact_match(reference, [prediction]) == right


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("The answer is 42.", "42", 1.0),
        ("3 + 4 = 7", "7.0", 1.0),
        ("$1,200.50", "1200.5", 1.0),
        ("-5", "5", 0.0),
        ("\u22125 °C", "-5", 1.0),
        ("-$5", "-5", 1.0),
        ("10-5", "5", 1.0),  # an operator, or a hyphen
        ("x = -5", "-5", 1.0),
        ("25 m2", "25", 1.0),
        ("25 m²", "25", 1.0),
        ("5x2", "5", 1.0),
        ("答案是５。", "5", 1.0),
        ("so it is...5", "5", 1.0),
        ("1/2", "0.5", 1.0),
        ("2", "1/2", 0.0),
        ("2e-3", ".002", 1.0),
        ("0.333333", "1/3", 0.0),
        ("0.30000000000000004", "0.3", 1.0),
        ("12,34", "1234", 0.0),  # no thousands
        ("1,234,567", "1234567", 1.0),
        ("1/0", "0", 0.0),
        ("1e999999999", "1", 0.0),
        ("9" * 2000, "1", 0.0),
        ("-0", "0", 1.0),
        ("none", "0", 0.0),
        ("", "5", 0.0),
        ("5", "no number", 0.0),
        ("#### 18", "First 9, then 18 are left. #### 18", 1.0),
    ],
)
def test_numeric_match_compares_the_last_numbers(prediction, reference, right):
    assert numeric_match(prediction, [reference]) == right
    assert numeric_match(prediction, ["77", reference]) == right


def test_a_metric_knows_what_it_cannot_compare():
    unread = metric("rouge_l").unread
    assert [unread(text) for text in ("Paris", "café, naïve", "1º", "5", "")] == [""] * 5
    assert [unread(text) for text in ("北京 2008", "α = 5", "?!", "да", "…")] == ["北京", "α", "?!", "да", "…"]
    unread = metric("numeric_match").unread
    assert (unread("about 5"), unread("five")) == ("", "five")
    assert metric("exact_match").unread is None


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
    for register in (instance_metric, corpus_metric, label_metric, group_metric):
        with pytest.raises(TaskError, match="'rouge_l' is already registered"):
            register("rouge_l")(lambda first, second: 0.0)


def test_a_metric_over_all_predictions_has_no_instances(monkeypatch):
    monkeypatch.setattr("dyads.tasks.metrics._METRICS", {})
    corpus_metric("share_of_a")(lambda predictions, references: predictions.count("a") / len(predictions))
    assert metric("share_of_a").measure(["a", "b"], [["a"], ["a"]]) == (50.0, ())


def of(name, predictions, references, labels=("no", "yes")):
    return metric(name).measure(predictions, [[r] for r in references], labels=labels)[0]


def test_matthews_is_the_correlation_of_two_classes():
    # tp 3, tn 1, fp 2, fn 1: (3·1 - 2·1) / sqrt(5·4·3·2)
    predicted, expected = [1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 1]
    assert matthews(predicted, expected) == pytest.approx(1 / math.sqrt(120))
    assert matthews(expected, expected) == 1.0
    assert matthews([1 - p for p in expected], expected) == pytest.approx(-1.0)


def test_matthews_of_one_class_or_one_example_is_zero():
    for predicted, expected in [([1, 1], [0, 1]), ([0, 1], [1, 1]), ([1], [1])]:
        assert matthews(predicted, expected) == 0.0


def test_an_answer_that_is_no_label_is_a_class_of_its_own_for_matthews():
    # R_k of three classes: (2·3 - 3) / sqrt((9 - 4 - 1) (9 - 1 - 1 - 1))
    assert of("matthews", ["yes", "no", "perhaps"], ["yes", "no", "no"]) == pytest.approx(100 * 3 / math.sqrt(24))
    assert of("matthews", ["perhaps", "maybe"], ["yes", "no"]) == 0.0


def test_f1_judges_the_second_label():
    # tp 2, fp 1, fn 1
    answers, right = ["yes", "yes", "yes", "no", "no"], ["yes", "yes", "no", "yes", "no"]
    assert of("f1", answers, right) == pytest.approx(100 * 2 / 3)
    assert of("f1", answers, right, labels=("yes", "no")) == pytest.approx(50.0)
    assert of("f1", [" YES ", "what", "no"], ["yes", "yes", "no"]) == pytest.approx(100 * 2 / 3)


def test_f1_without_a_true_positive_is_zero():
    for predicted, expected in [([0, 0], [0, 0]), ([0, 0], [1, 1]), ([1, 1], [0, 0])]:
        assert f1(predicted, expected) == 0.0


def test_macro_f1_is_the_mean_over_classes_that_occur():
    # F1 of class 0: 2/3, of class 1: 0, of class 2: 1
    assert macro_f1([0, 0, 2], [0, 1, 2]) == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert macro_f1([0, 0], [0, 0]) == 1.0  # other classes occur nowhere
    # no label: the recall of class 1 falls, but what is no label has no F1 of its own
    assert macro_f1([0, NO_LABEL], [0, 1]) == pytest.approx(1 / 2)
    assert macro_f1([NO_LABEL], [0]) == 0.0


def test_of_several_right_labels_the_predicted_one_counts():
    assert metric("f1").measure(["yes"], [["no", "yes"]], labels=("no", "yes"))[0] == 100.0


def test_a_reference_that_is_no_label_is_refused():
    with pytest.raises(TaskError, match="metric 'f1': reference 'si' is not one of the labels no, yes"):
        of("f1", ["yes"], ["si"])
    with pytest.raises(TaskError, match=r"reference 'yes' is not one of the labels \(none given\)"):
        of("matthews", ["yes"], ["yes"], labels=())


def test_pearson_is_the_correlation_and_spearman_that_of_ranks():
    guesses, exact = ["1.0", "2", " 4.0\n"], [["1"], ["3"], ["2"]]
    # deviations (-4/3, -1/3, 5/3) and (-1, 1, 0)
    assert pearson(guesses, exact) == pytest.approx(1 / math.sqrt(42 / 9 * 2))
    assert spearman(guesses, exact) == pytest.approx(0.5)
    assert spearman(["1", "10", "11"], [["0"], ["1"], ["5"]]) == 1.0
    assert pearson(["3", "2", "1"], [["1"], ["2"], ["3"]]) == pytest.approx(-1.0)


def test_a_text_that_is_no_number_counts_as_zero():
    exact = [["1"], ["3"], ["2"]]
    for text in ("", "four", "nan", "-inf", "9e999", "1e200", "1.2.3"):
        assert pearson([text, "2", "1"], exact) == pearson(["0", "2", "1"], exact)
        assert spearman([text, "2", "1"], exact) == spearman(["0", "2", "1"], exact)


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_a_constant_or_a_single_number_has_no_correlation(correlation):
    for predictions, exact in [(["1", "1.0"], ["1", "2"]), (["1", "2"], ["3", "3"]), (["1"], ["1"])]:
        assert correlation(predictions, [[e] for e in exact]) == 0.0


def test_numbers_that_differ_in_their_last_digit_only_raise_no_warning():
    assert -1.0 <= pearson(["1.0", "1.0000000000000002", "1.0"], [["1"], ["2"], ["3"]]) <= 1.0


def test_pearson_digits_counts_a_sign_or_an_exponent_as_zero():
    # deviations (-2, 1, 1) and (-1, 1, 0): 3 / sqrt(6 · 2)
    exact = [["1"], ["3"], ["2"]]
    for text in ("-1", "+1", "1e0", "1_0", "1.2.3", ".", "", "\N{SUPERSCRIPT TWO}"):
        assert pearson_digits([text, "3", "3"], exact) == pytest.approx(3 / math.sqrt(12))
    assert pearson_digits(["1.5", " 3. ", ".5"], exact) == pearson(["1.5", "3", "0.5"], exact)


def test_matthews_exact_has_a_class_for_every_text():
    # right 2 of 4, expected (2, 2), predicted (1, 1, 1, 1): (2·4 - 4) / sqrt((16 - 4) (16 - 8))
    predicted, expected = ["yes", "Yes", "no", "what"], [["yes"], ["yes"], ["no"], ["no"]]
    assert matthews_exact(predicted, expected) == pytest.approx(4 / math.sqrt(12 * 8))
    assert matthews_exact([" yes\n", "no"], [["yes"], ["no"]]) == 1.0
    # two strange texts are two classes here, and together one class for `matthews`
    assert of("matthews", ["yes", "no", "a", "b"], ["yes", "no", "yes", "no"]) == pytest.approx(100 * 4 / math.sqrt(80))
    assert matthews_exact(["yes", "no", "a", "b"], [["yes"], ["no"], ["yes"], ["no"]]) == pytest.approx(
        4 / math.sqrt(8 * 12)
    )


def test_accuracy_exact_folds_no_case():
    assert (accuracy_exact(" yes\n", ["yes"]), accuracy_exact("Yes", ["yes"]), accuracy("Yes", ["yes"])) == (1, 0, 1)


def test_the_last_reference_is_the_exact_number():
    assert pearson(["1", "2", "3"], [["9.0", "1"], ["0.0", "2"], ["5.0", "3"]]) == pytest.approx(1.0)


def test_a_group_is_right_if_all_of_it_is():
    assert group_accuracy([True, False, True, True], ["a", "a", "b", "b"]) == 0.5
    assert metric("group_accuracy").measure(["x", "y"], [["X"], ["z"]], groups=["a", "b"]) == (50.0, ())


def test_correlations_agree_with_numpy():
    x, y = numpy.random.RandomState(0).rand(2, 50).round(2)
    texts, exact = [str(v) for v in x], [[str(v)] for v in y]
    assert pearson(texts, exact) == pytest.approx(numpy.corrcoef(x, y)[0, 1])


def test_matthews_of_several_classes_agrees_with_the_correlation_of_indicators():
    expected, predicted = numpy.random.RandomState(1).randint(0, 3, (2, 60))
    one_hot = numpy.eye(3)
    t, p = one_hot[expected], one_hot[predicted]
    t, p = t - t.mean(0), p - p.mean(0)
    expected_value = (t * p).sum() / math.sqrt((t * t).sum() * (p * p).sum())
    assert matthews(predicted.tolist(), expected.tolist()) == pytest.approx(expected_value)

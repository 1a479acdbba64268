# SPDX-License-Identifier: Apache-2.0
"""Intervals against scipy and against variances worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dyads.comparing.intervals import Array, Interval, Sample, holm, sign_flip_p
from dyads.comparing.tables import range_text, signed_text

ONE = np.array([1.0])


def sample(*tasks: list[list[float]], seedless: bool = False) -> Sample:
    """Of (seeds, instances) for each task."""
    instances = [np.array(task, dtype=np.float64) for task in tasks]
    return Sample(np.stack([x.mean(axis=1) for x in instances], axis=1), instances, seedless=seedless)


def half_width(interval: Interval) -> float:
    return (interval.high - interval.low) / 2


def test_one_seed_gives_the_t_interval_and_p_of_scipy() -> None:
    values = np.random.default_rng(3).normal(2, 15, size=12)
    theirs = stats.ttest_1samp(values, 0.0)
    ours = sample([list(values)]).interval(ONE)
    low, high = theirs.confidence_interval(0.95)
    assert (ours.value, ours.low, ours.high, ours.p) == pytest.approx((values.mean(), low, high, theirs.pvalue))
    assert not ours.over_seeds
    assert sample([list(values)], seedless=True).interval(ONE).over_seeds


def test_one_seed_of_each_of_two_methods_gives_scipys_paired_test() -> None:
    a, b = np.random.default_rng(4).normal(5, 9, size=(2, 30)) + np.linspace(0, 80, 30)
    theirs = stats.ttest_rel(a, b)
    for paired in (True, False):  # different single seeds: the instances are paired all the same
        ours = sample([list(a)]).minus(sample([list(b)]), paired=paired).interval(ONE)
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
        assert ours.p == pytest.approx(theirs.pvalue)


def test_tasks_are_strata_with_satterthwaites_degrees_of_freedom() -> None:
    # variances 50 and 1/3 of the values; macro weights 1/2, micro 2/6 and 4/6
    x = sample([[0.0, 10.0]], [[3.0, 3.0, 4.0, 4.0]])
    for weights in (np.array([1 / 2, 1 / 2]), np.array([2 / 6, 4 / 6])):
        one, two = weights[0] ** 2 * 50 / 2, weights[1] ** 2 * (1 / 3) / 4
        freedom = (one + two) ** 2 / (one**2 / 1 + two**2 / 3)
        expected = stats.t.ppf(0.975, freedom) * math.sqrt(one + two)
        assert half_width(x.interval(weights)) == pytest.approx(expected)
    assert half_width(x.interval(np.array([0.0, 1.0]))) == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(1 / 3 / 4))


def test_seeds_that_shift_all_instances_alike_give_the_t_interval_of_their_scores() -> None:
    ours = sample([[10.0] * 50, [14.0] * 50, [15.0] * 50]).interval(ONE)
    theirs = stats.ttest_1samp([10.0, 14.0, 15.0], 0.0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs))
    assert ours.over_seeds


@pytest.mark.parametrize("apart", [0.1, 0.6])
def test_what_seeds_and_instances_share_is_counted_once(apart: float) -> None:
    x = np.array([[0.0, 1.0, 2.0, 5.0], [1.0, 2.0, 1.0, 4.0], [-1.0, 2.0, 4.0, 3.0]]) + np.array(
        [[0], [apart], [-apart]]
    )
    k, n = x.shape
    over_seeds, over_instances, every = x.mean(axis=1), x.mean(axis=0), x.mean()
    s = ((over_seeds - every) ** 2).sum() / (k - 1)
    i = ((over_instances - every) ** 2).sum() / (n - 1) / n
    r = ((x - over_seeds[:, None] - over_instances + every) ** 2).sum() / ((k - 1) * (n - 1)) / n
    variance = i + (s - r) / k
    freedom = variance**2 / (i**2 / (n - 1) + (s / k) ** 2 / (k - 1))
    expected = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    assert expected > stats.t.ppf(0.975, k - 1) * math.sqrt(s / k)
    assert half_width(sample(x.tolist()).interval(ONE)) == pytest.approx(expected)


def test_an_interval_is_never_narrower_than_that_of_the_seeds_scores() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=(3, 60)) + rng.normal(0, 2, size=60) + np.array([[0.0], [0.5], [1.5]])
    found = sample(x.tolist()).interval(ONE)
    theirs = stats.ttest_1samp(x.mean(axis=1), 0.0)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert found.p == pytest.approx(theirs.pvalue)


def test_the_variance_is_at_least_what_seeds_and_instances_share() -> None:
    x = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])  # no effect of a seed or an instance
    residual = 8 / 3 / 2
    assert half_width(sample(x.tolist()).interval(ONE)) == pytest.approx(
        stats.t.ppf(0.975, np.inf) * math.sqrt(residual / 4)
    )


def test_paired_seeds_cancel_and_others_add_up() -> None:
    a, b = sample([[10.0] * 9, [30.0] * 9]), sample([[7.0] * 9, [27.0] * 9])
    paired = a.minus(b, paired=True).interval(ONE)
    assert (paired.value, half_width(paired)) == pytest.approx(
        (3.0, stats.t.ppf(0.975, 8) * 10)
    )  # no spread: next test
    apart = a.minus(b, paired=False).interval(ONE)
    assert apart.value == 3.0
    assert half_width(apart) == pytest.approx(stats.t.ppf(0.975, 2) * math.sqrt(200 / 2 + 200 / 2))  # Welch
    theirs = stats.ttest_ind([10.0, 30.0], [7.0, 27.0], equal_var=False).confidence_interval(0.95)
    assert (apart.low, apart.high) == pytest.approx(tuple(theirs))


def test_a_reference_without_seeds_is_paired_with_every_seed() -> None:
    reference = sample([[1.0, 2.0, 3.0]], seedless=True)
    method = sample([[3.0, 3.0, 6.0], [5.0, 2.0, 4.0]])
    difference = method.minus(reference, paired=True)
    assert difference.over_seeds
    found, expected = (x.interval(ONE) for x in (difference, sample([[2.0, 1.0, 3.0], [4.0, 0.0, 1.0]])))
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_one_method_with_one_seed_leaves_the_instances_alone() -> None:
    one, three = sample([[1.0, 2.0, 6.0]]), sample([[0.0, 2.0, 2.0], [9.0, 9.0, 9.0], [3.0, 5.0, 7.0]])
    found = one.minus(three, paired=False).interval(ONE)
    assert not found.over_seeds
    theirs = stats.ttest_rel([1.0, 2.0, 6.0], [4.0, 16 / 3, 6.0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(theirs))


def test_one_instance_shows_no_spread() -> None:
    alone = sample([[3.0]]).interval(ONE)
    assert (alone.low, alone.high, alone.p) == (-math.inf, math.inf, 1.0)
    beside = sample([[3.0]], [[1.0, 2.0, 6.0]]).interval(np.array([0.5, 0.5]))
    one, three = 0.25 * 7.0, 0.25 * 7.0 / 3
    freedom = (one + three) ** 2 / (three**2 / 2)
    assert half_width(beside) == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(one + three))


@pytest.mark.parametrize("seeds", [1, 5])
def test_without_any_spread_the_error_is_that_of_one_more_instance(seeds: int) -> None:
    alike = sample([[2.0] * 20] * seeds, [[0.0] * 40] * seeds)
    found = alike.interval(np.array([0.5, 0.5]))
    assert found.value == 1.0
    assert half_width(found) == pytest.approx(stats.t.ppf(0.975, 39) * 0.5 * 100 / 41)  # of the larger task
    assert found.p == pytest.approx(2 * stats.t.sf(1.0 / (0.5 * 100 / 41), 39))
    assert half_width(alike.interval(np.array([1.0, 0.0]))) == pytest.approx(stats.t.ppf(0.975, 19) * 100 / 21)
    assert sample([[0.0, 0.0]]).interval(ONE).p == 1.0


def test_methods_that_are_always_right_are_not_shown_to_be_equal_by_few_instances() -> None:
    """Of two methods one is wrong on a share of the instances: |D| ≤ 1 is false, and is said in at most 5 %."""
    for n, wrong in ((20, 5.0), (50, 3.0), (100, 2.0), (200, 1.5)):
        false = 0.0
        for differ in range(n // 100 + 1):  # more make a difference above 1
            x = sample([[100.0] * differ + [0.0] * (n - differ)])
            if x.interval(ONE, null=1.0).p < 0.05:
                false += stats.binom.pmf(differ, n, wrong / 100)
        assert false <= 0.05, (n, wrong)


def test_p_and_level_are_those_of_a_shifted_t_test() -> None:
    values = np.random.default_rng(3).normal(2, 15, size=12)
    ours = sample([list(values)]).interval(ONE, level=0.99, null=5.0)
    theirs = stats.ttest_1samp(values, 5.0)
    assert ours.p == pytest.approx(theirs.pvalue)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.99)))
    for bound in (ours.low, ours.high):
        assert sample([list(values)]).interval(ONE, null=bound).p == pytest.approx(0.01)


def test_the_expected_half_width_is_the_present_one_and_shrinks_with_seeds_and_instances() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(0, 3, size=(4, 40)) + rng.normal(0, 4, size=40) + rng.normal(0, 1, size=(4, 1))
    found = sample(x.tolist())
    assert found.half_width(ONE, level=0.95, seeds=4) == pytest.approx(half_width(found.interval(ONE)), rel=0.02)
    wide = [found.half_width(ONE, level=0.95, seeds=k) for k in (4, 6, 10, 1000)]
    assert wide == sorted(wide, reverse=True)
    k, n = x.shape
    rest = x - x.mean(axis=0) - x.mean(axis=1, keepdims=True) + x.mean()
    alone = x.mean(axis=0).var(ddof=1) / n - (rest**2).sum() / ((k - 1) * (n - 1)) / n / k
    assert wide[-1] == pytest.approx(1.96 * math.sqrt(alone), rel=0.05), "many seeds leave the instances' part"
    assert found.half_width(ONE, level=0.95, seeds=1000, instances=100) < wide[-1] / 5


def test_the_expected_half_width_is_that_of_new_seeds_and_instances() -> None:
    rng = np.random.default_rng(6)

    def draw(k: int, n: int) -> Sample:
        x = rng.normal(0, 2, size=(k, 1)) + rng.normal(0, 9, size=n) + rng.normal(0, 5, size=(k, n))
        return sample(x.tolist())

    planned = [draw(5, 50).half_width(ONE, level=0.95, seeds=20, instances=4.0) for _ in range(300)]
    done = [half_width(draw(20, 200).interval(ONE)) for _ in range(300)]
    assert np.mean(planned) == pytest.approx(np.mean(done), rel=0.1)


def test_the_expected_half_width_is_at_least_what_seeds_and_instances_share() -> None:
    x = np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])  # no effect of a seed or an instance
    found = sample(x.tolist())
    now = half_width(found.interval(ONE))
    assert found.half_width(ONE, level=0.95, seeds=4) == pytest.approx(now)
    assert found.half_width(ONE, level=0.95, seeds=8, instances=2.0) == pytest.approx(now / 2)


def test_one_seed_gives_no_expected_half_width() -> None:
    assert sample([[1.0, 2.0, 6.0]]).half_width(ONE, level=0.95, seeds=5) == math.inf
    assert sample([[1.0, 2.0, 6.0]], seedless=True).half_width(ONE, level=0.95, seeds=1) == pytest.approx(
        stats.t.ppf(0.975, 2) * math.sqrt(7 / 3)
    )


def test_no_table_has_a_negative_zero() -> None:
    equal = -Interval(0.0, 0.0, 0.04, 1.0, True)
    assert [math.copysign(1.0, x) for x in (equal.value, equal.high)] == [1.0, 1.0]
    assert (signed_text(equal), range_text(equal)) == ("+0.0", "0.0 to 0.0")
    assert signed_text(-Interval(0.06, 0.0, 0.1, 1.0, True)) == "-0.1"


def test_the_other_way_round_is_the_mirror() -> None:
    there = sample([[1.0, 2.0, 6.0]]).interval(ONE)
    back = sample([[-1.0, -2.0, -6.0]]).interval(ONE)
    assert (-there) == back


def test_holm_multiplies_by_the_number_of_hypotheses_left() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])  # 2 · 0.03, 3 · 0.01, then at least 2 · 0.03
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_margin_of_wins_is_judged_by_all_flips_of_seeds() -> None:
    always: Array = np.ones((6, 4))
    assert sign_flip_p(always) == 2 / 2**6
    assert sign_flip_p(always[:1]) == 1.0  # one seed: any margin is as wide after the flip
    assert sign_flip_p(np.zeros((6, 4))) == 1.0
    # margins by seed 4 and -2: their sum is 2, and 6 where one is flipped
    assert sign_flip_p(np.array([[1.0, 2.0, 1.0, 1.0], [-1.0, -1.0, -1.0, 1.0]])) == 1.0
    assert sign_flip_p(np.array([[1.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, -9.0]])) == 1 / 2
    assert sign_flip_p(np.ones((20, 3))) == pytest.approx(
        1 / 4096
    )  # a sample of the flips, the observed one among them

# SPDX-License-Identifier: Apache-2.0
"""Mixture: probabilities of the formulas, and schedules that are complete and repeatable."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain
from math import exp
from pathlib import Path

import pytest
from pydantic import ValidationError

from dyads.data.mixture import KINDS, WINDOW, MixtureSpec, draw_probabilities, padding_share, schedule
from dyads.errors import ConfigError, TaskError

SIZES = (50, 7, 0, 23)
LENGTHS = [[(13 * i) % 40 + 1 for i in range(n)] for n in SIZES]
VARIANTS = [  # every kind, and one_task with the kinds that draw tasks in different ways
    ("proportional", "mixed"),
    ("temperature", "one_task"),
    ("uniform", "mixed"),
    ("balanced", "one_task"),
    ("round_robin", "mixed"),
    ("round_robin", "one_task"),
]


def make(kind="proportional", batches="mixed", steps=24, batch_size=6, seed=0, window=8, lengths=LENGTHS):
    spec = MixtureSpec(kind=kind, batches=batches, temperature=2 if kind == "temperature" else None)
    return schedule(lengths, spec=spec, steps=steps, batch_size=batch_size, seed=seed, window=window)


@pytest.mark.parametrize(
    ("kind", "temperature", "expected"),
    [
        ("proportional", None, [0.1, 0.9]),
        ("temperature", 1.0, [0.1, 0.9]),
        ("temperature", 2.0, [1 / 4, 3 / 4]),  # sqrt(10) : sqrt(90) = 1 : 3
        ("temperature", 1e9, [0.5, 0.5]),
        ("uniform", None, [0.5, 0.5]),
        ("round_robin", None, [0.5, 0.5]),
        ("balanced", None, [exp(0.1) / (exp(0.1) + exp(0.9)), exp(0.9) / (exp(0.1) + exp(0.9))]),
    ],
)
def test_probabilities_follow_their_formula(kind, temperature, expected):
    assert draw_probabilities([10, 90], kind, temperature) == pytest.approx(expected, rel=1e-6)


def test_balanced_gives_the_weights_of_the_more_release_on_glue():
    # train sizes of CoLA, MNLI, MRPC, QNLI, QQP, RTE, SST-2, STS-B
    sizes = [8551, 392702, 3668, 104743, 363846, 2490, 67349, 5749]
    expected = [0.110, 0.165, 0.109, 0.122, 0.160, 0.109, 0.117, 0.110]
    assert draw_probabilities(sizes, "balanced") == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_without_examples_is_never_drawn(kind):
    chances = draw_probabilities(SIZES, kind, 3.0)
    assert chances[2] == 0
    assert sum(chances) == pytest.approx(1)
    assert 2 not in {task for batch in make(kind) for task, _ in batch}


@pytest.mark.parametrize(("kind", "batches"), VARIANTS)
def test_every_example_of_a_task_is_read_before_any_is_read_again(kind, batches):
    plan = make(kind, batches, steps=64, window=1)
    for task, size in enumerate(SIZES):
        read = [index for batch in plan for t, index in batch if t == task]
        passes = [read[start : start + size] for start in range(0, len(read), max(size, 1))]
        assert all(sorted(one) == list(range(size)) for one in passes if len(one) == size)
        assert len(set(read)) == min(len(read), size)
        assert len(passes) < 3 or passes[0] != passes[1]


@pytest.mark.parametrize(("kind", "batches"), VARIANTS)
def test_a_longer_schedule_starts_with_the_shorter_one(kind, batches):
    longest = make(kind, batches, steps=40)
    assert [len(batch) for batch in longest] == [6] * 40
    for steps in (0, 1, 7, 8, 13):  # windows have 8 batches
        assert make(kind, batches, steps=steps) == longest[:steps]


@pytest.mark.parametrize(("kind", "batches"), VARIANTS)
def test_sorting_by_length_changes_the_batches_of_a_window_and_not_its_examples(kind, batches):
    drawn, bucketed = make(kind, batches, window=1), make(kind, batches, window=8)
    assert drawn != bucketed
    for start in range(0, 24, 8):
        window = slice(start, start + 8)
        assert sorted(chain(*drawn[window])) == sorted(chain(*bucketed[window]))


def test_sorting_by_length_saves_padding():
    many = [task * 20 for task in LENGTHS]
    assert padding_share(make(lengths=many, window=8), many, 6) < 0.5 * padding_share(
        make(lengths=many, window=1), many, 6
    )


@pytest.mark.parametrize("batches", ["mixed", "one_task"])
@pytest.mark.parametrize(("n", "batch_size"), [(1, 2), (4, 4), (16, 16), (32, 8), (40, 8), (100, 16), (128, 16)])
def test_few_examples_stay_in_the_batches_that_drew_them(n, batch_size, batches):
    """Sorted, every pass would have the same batches, and copies of an example would share one."""
    lengths = [list(range(10, 10 + n))]
    plan = make("uniform", batches, steps=64, batch_size=batch_size, lengths=lengths, window=WINDOW)
    assert plan == make("uniform", batches, steps=64, batch_size=batch_size, lengths=lengths, window=1)


def test_small_tasks_of_a_mixture_stay_and_the_others_are_sorted_around_them():
    lengths = [[50], list(range(10, 2010)), [20, 30, 40, 60, 80]]
    drawn, bucketed = (make("uniform", batch_size=8, steps=64, lengths=lengths, window=w) for w in (1, 8))
    assert [[e for e in batch if e[0] != 1] for batch in bucketed] == [[e for e in b if e[0] != 1] for b in drawn]
    for start in range(0, 64, 8):
        ranges = sorted(sorted(i for task, i in batch if task == 1) for batch in bucketed[start : start + 8])
        assert sorted(chain(*ranges)) == list(chain(*ranges))


def test_batches_of_a_window_are_not_left_in_the_order_of_length():
    longest = [max(LENGTHS[t][i] for t, i in batch) for batch in make(steps=32)]
    windows = [longest[start : start + 8] for start in range(0, 32, 8)]
    assert all(window != sorted(window) for window in windows)
    assert len({window.index(max(window)) for window in windows}) > 1  # every window has an order of its own


def test_one_task_batches_hold_one_task():
    for kind in KINDS:
        assert all(len({task for task, _ in batch}) == 1 for batch in make(kind, "one_task"))


def test_round_robin_takes_tasks_in_turn():
    assert [batch[0][0] for batch in make("round_robin", "one_task", steps=7)] == [0, 1, 3, 0, 1, 3, 0]
    assert [task for task, _ in make("round_robin", steps=1, window=1)[0]] == [0, 1, 3, 0, 1, 3]


@pytest.mark.parametrize("batches", ["mixed", "one_task"])
def test_shares_approach_the_probabilities(batches):
    plan = make("temperature", batches, steps=800)
    drawn = Counter(task for batch in plan for task, _ in batch)
    for task, chance in enumerate(draw_probabilities(SIZES, "temperature", 2.0)):
        assert drawn[task] / 4800 == pytest.approx(chance, abs=0.05)


def test_a_seed_gives_the_same_schedule_and_another_seed_another():
    assert make(seed=3) == make(seed=3)
    assert make(seed=3) != make(seed=4)


def test_lengths_do_not_change_which_examples_a_window_holds():
    other = [[100 - n for n in task] for task in LENGTHS]
    first, second = make(steps=8), make(steps=8, lengths=other)
    assert sorted(chain(*first)) == sorted(chain(*second))


def test_nothing_to_draw_from_is_refused():
    for sizes in ([], [0, 0], [3, -1]):
        with pytest.raises(TaskError, match="nothing to draw from"):
            draw_probabilities(sizes, "uniform")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_probabilities([1], "proportionl"), "unknown kind 'proportionl' – did you mean 'proportional'"),
        (lambda: draw_probabilities([1], "temperature"), "needs a temperature above 0, got None"),
        (lambda: draw_probabilities([1], "temperature", 0.0), "above 0, got 0.0"),
        (lambda: make(batch_size=0), "batch_size ≥ 1"),
        (lambda: make(window=0), "window ≥ 1"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "temperature"}, "kind: temperature needs a value"),
        ({"temperature": 2.0}, "temperature: 2.0 needs kind: temperature, got kind: proportional"),
        ({"kind": "temperature", "temperature": -1}, "greater than 0"),
        ({"batches": "one"}, "'mixed' or 'one_task'"),
        ({"knd": "uniform"}, "knd"),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        MixtureSpec(**options)


def test_padding_is_counted_in_the_parts_of_a_batch():
    lengths = [[3, 5], [10]]
    batches = [[(0, 0), (0, 1), (1, 0), (1, 0)]]
    assert padding_share(batches, lengths, 4) == pytest.approx(12 / 40)
    assert padding_share(batches, lengths, 2) == pytest.approx(2 / 30)
    assert padding_share(batches, lengths, 1) == 0


def test_the_table_of_padding_in_the_docs():
    page = (Path(__file__).parents[2] / "docs/step-cost.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| 1/(\d+) \|((?: \d+ % \|){4})$", page, re.MULTILINE)
    assert len(rows) == 3
    for share, shown in rows:
        lengths = [[50] * 5000] * (int(share) - 1) + [[600] * 5000]
        made = [make(steps=512, batch_size=16, window=window, lengths=lengths) for window in (1, 8, 32, 128)]
        assert [f"{100 * padding_share(batches, lengths, 16):.0f}" for batches in made] == re.findall(r"\d+", shown)

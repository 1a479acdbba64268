# SPDX-License-Identifier: Apache-2.0
"""Splits: disjoint in prompts, of the requested size, and the same for a seed."""

from __future__ import annotations

import pytest
import torch

from dyads.errors import TaskError
from dyads.tasks.divide import divide, halve, take
from dyads.tasks.task import Example


def examples(prompts):
    return [Example(str(i), p, ("x",)) for i, p in enumerate(prompts)]


def ids(part):
    return [e.id for e in part]


def test_parts_have_their_sizes_and_keep_the_order():
    rest, test, validation = divide(examples(map(str, range(100))), [10, 5], salt="s", task="t")
    assert (len(rest), len(test), len(validation)) == (85, 10, 5)
    assert ids(rest) == sorted(ids(rest), key=int)
    assert sorted(ids(rest) + ids(test) + ids(validation), key=int) == list(map(str, range(100)))


def test_identical_prompts_stay_on_one_side():
    parts = divide(examples([str(i % 7) for i in range(70)]), [20, 10], salt="s", task="t")
    prompts = [{e.prompt for e in part} for part in parts]
    assert [len(part) for part in parts] == [40, 20, 10]
    assert len(set.union(*prompts)) == sum(map(len, prompts))


def test_a_part_is_not_left_empty_by_large_groups():
    rest, test = divide(examples(["a"] * 5 + ["b"] * 3 + ["c"] * 9), [1], salt="s", task="t")
    assert {e.prompt for e in test} == {"b"}
    assert {e.prompt for e in rest} == {"a", "c"}


def test_the_order_of_the_file_does_not_matter_but_the_salt_does():
    given = examples(map(str, range(50)))
    first = {e.prompt for e in divide(given, [10], salt="s", task="t")[1]}
    assert first == {e.prompt for e in divide(given[::-1], [10], salt="s", task="t")[1]}
    assert first != {e.prompt for e in divide(given, [10], salt="other", task="t")[1]}


def test_a_later_part_does_not_change_an_earlier_one():
    given = examples(map(str, range(50)))
    assert divide(given, [10], salt="s", task="t")[1] == divide(given, [10, 7], salt="s", task="t")[1]


@pytest.mark.parametrize("prompts", [[], ["a"] * 9, ["a", "b"]])
def test_too_few_prompts_are_refused(prompts):
    with pytest.raises(TaskError, match=f"task 't' cannot be divided into 3 splits: it has {len(prompts)} usable"):
        divide(examples(prompts), [1, 1], salt="s", task="t")


def test_sizes_that_leave_nothing_are_refused():
    with pytest.raises(TaskError, match="splits of 9 and a rest"):
        divide(examples("abc"), [9], salt="s", task="t")


def test_a_larger_limit_only_adds():
    given = examples(map(str, range(30)))
    small, large = take(given, 5, salt="s"), take(given, 12, salt="s")
    assert len(small) == 5
    assert set(ids(small)) < set(ids(large))
    assert ids(large) == sorted(ids(large), key=int)
    assert take(given, None, salt="s") == take(given, 99, salt="s") == tuple(given)


def test_a_group_stays_on_one_side_and_is_taken_whole():
    grouped = [Example(f"{g}-{i}", f"prompt {g} {i}", ("x",), group=f"g{g}") for g in range(8) for i in range(3)]
    rest, part = divide(grouped, [7], salt="s", task="t")
    assert (len(part), len(rest)) == (6, 18)
    assert not {e.group for e in rest} & {e.group for e in part}
    taken = [take(grouped, limit, salt="s") for limit in (7, 13)]
    assert [len(t) for t in taken] == [6, 12]
    assert set(taken[0]) < set(taken[1])
    assert len(take(grouped, 2, salt="s")) == 3, "nothing at all would be no training split"


def test_halves_are_those_of_torchs_permutation():
    for n in (1, 2, 7, 277, 1043):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1189)).tolist()
        first, second = halve(examples(f"prompt {i}" for i in range(n)), seed=1189)
        assert [int(e.id) for e in first] == sorted(order[: n // 2])
        assert [int(e.id) for e in second] == sorted(order[n // 2 :])

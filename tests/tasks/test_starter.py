# SPDX-License-Identifier: Apache-2.0
"""The starter family: correct and conflicting answers, disjoint splits, the same for a seed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from pydantic import ValidationError

from dyads.tasks import SPLITS, load
from dyads.tasks.starter import ANIMALS, STARTER_TASKS, THINGS, StarterSpec


def small(**options):
    return {t.name: t for t in load(StarterSpec(**{"train_per_task": 40, **options}))}


def answer(name, words, instruction):
    """Every task once more, in other words than the file's."""
    at = instruction.rstrip("?").split()[-1]
    animals = sum(w in ANIMALS for w in words)
    return {
        "first_word": words[0],
        "last_word": words[len(words) - 1],
        "word_after": dict(pairwise(words)).get(at),
        "word_before": dict(pairwise(words[::-1])).get(at),
        "longest_word": sorted(words, key=len)[-1],
        "drop_first": " ".join(words).partition(" ")[2],
        "reverse_words": " ".join(words[::-1]),
        "sort_words": " ".join(sorted(words)),
        "initials": " ".join(w[:1] for w in words),
        "count_words": {3: "3", 4: "4", 5: "5"}[len(words)],
        "has_animal": "yes" if animals else "no",
        "no_animal": "no" if animals else "yes",
    }[name]


def test_there_are_a_dozen_tasks_of_the_asked_size():
    tasks = small(validation_per_task=7, test_per_task=9)
    assert tuple(tasks) == STARTER_TASKS
    assert len(tasks) == 12
    assert {(len(t.train), len(t.validation), len(t.test)) for t in tasks.values()} == {(40, 7, 9)}
    assert {t.metrics for t in tasks.values()} == {("sni_exact_match", "rouge_l")}


def test_answers_are_right():
    for name, task in small().items():
        for example in task.train + task.validation + task.test:
            words, instruction, cue = example.prompt.split("\n")
            assert cue == "Answer: "
            assert example.references == (answer(name, words.removeprefix("Words: ").split(), instruction),)


def test_no_list_of_words_stands_in_two_splits():
    lists = {s: {e.prompt.split("\n")[0] for t in small().values() for e in t.split(s)} for s in SPLITS}
    assert len(set.union(*lists.values())) == sum(map(len, lists.values()))


def test_the_tasks_conflict_over_the_same_lists():
    tasks = small()
    for k in range(10):
        asked = {t.test[k].prompt.split("\n")[0] for t in tasks.values()}
        answers = {t.test[k].references for t in tasks.values()}
        assert len(asked) == 1
        assert len(answers) >= 6


def test_pairs_differ_in_a_word_and_have_opposite_answers():
    tasks = small()
    for yes, no in zip(tasks["has_animal"].test, tasks["no_animal"].test, strict=True):
        assert yes.prompt.replace(" an animal", " no animal") == no.prompt
        assert {yes.references[0], no.references[0]} == {"yes", "no"}
    share = sum(e.references == ("yes",) for e in tasks["has_animal"].test) / len(tasks["has_animal"].test)
    assert share == 0.5


def test_a_seed_gives_the_same_tasks_and_another_seed_others():
    assert small() == small()
    assert not {e.prompt for e in small()["initials"].test} & {e.prompt for e in small(seed=1)["initials"].test}


def test_a_size_or_a_choice_of_names_does_not_change_the_test_questions():
    assert small()["sort_words"].test == small(names=("sort_words",), train_per_task=3)["sort_words"].test


def test_prompts_and_answers_are_short():
    longest = max(len(e.prompt.split()) for t in small().values() for e in t.test)
    assert longest <= 16  # about 30 tokens
    assert len(set(ANIMALS + THINGS)) == len(ANIMALS) + len(THINGS)


def test_wrong_names_are_refused():
    with pytest.raises(ValidationError, match="unknown starter task 'last_wrd' – did you mean 'last_word'"):
        StarterSpec(names=("last_wrd",))
    for names in ((), ("initials", "initials")):
        with pytest.raises(ValidationError, match="names must be one or more different starter tasks"):
            StarterSpec(names=names)

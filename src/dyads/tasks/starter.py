# SPDX-License-Identifier: Apache-2.0
"""Family `starter`: twelve small text tasks over lists of words, generated from a seed, without any data.

All tasks use the same lists in the same form and differ in a short instruction only:

    Words: river stone lamp
    Which word comes first?
    Answer: river

so the correct answer to one list depends on the task. The instructions of `has_animal` / `no_animal` and `word_after` /
`word_before` differ in one word and have opposite answers.
A list of one split is in no other split of any task. The headline metric, `sni_exact_match`, ignores case and
punctuation; no answer depends on either.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Literal

from pydantic import Field, field_validator

from dyads.errors import did_you_mean
from dyads.tasks.family import FamilySpec, Suite, register_family
from dyads.tasks.task import Task
from dyads.tasks.template import Template

__all__ = ["STARTER_TASKS", "StarterSpec"]

VERSION = 1
MAX_NEW_TOKENS = 20
MOST_PER_SPLIT = 20_000

_ANIMALS = """
    bear cat cow deer dog duck eagle fish fox goat horse lion monkey mouse owl pig rabbit sheep tiger whale wolf
"""
_THINGS = """
    apple arm bank bell boat book bottle bread bridge brush bus cake camera candle car carpet chair cheese church
    clock cloud coat coffee corn cup desk door dress drum egg engine farm fence field finger fire flag floor
    flower forest fork garden gate glass glove gold grass guitar hammer hand hat hill hotel house ice iron island
    jacket juice key kitchen knife ladder lake lamp leaf lemon letter library map market milk mirror moon mountain
    museum needle nest night nose oil onion orange oven page paint paper park pencil piano picture plate pocket
    queen rain ring river road rock roof rope salt school sea shirt shoe shop silver snow soap spoon square star
    stone storm street sugar sun table tea telephone tent tower train tree umbrella valley village wall watch
    water wheel window winter wood yard
"""
ANIMALS, THINGS = _ANIMALS.split(), _THINGS.split()

Words = tuple[str, ...]
Answer = Callable[[Words, str], str]

# name: (category, instruction, function of the list and of `{word}`, which is neither its first nor its last word)
_TASKS: dict[str, tuple[str, str, Answer]] = {
    "first_word": ("pick", "Which word comes first?", lambda w, _: w[0]),
    "last_word": ("pick", "Which word comes last?", lambda w, _: w[-1]),
    "word_after": ("pick", "Which word comes right after {word}?", lambda w, at: w[w.index(at) + 1]),
    "word_before": ("pick", "Which word comes right before {word}?", lambda w, at: w[w.index(at) - 1]),
    "longest_word": ("pick", "Which word has the most letters?", lambda w, _: max(w, key=len)),
    "drop_first": ("rewrite", "Write the list without its first word.", lambda w, _: " ".join(w[1:])),
    "reverse_words": ("rewrite", "Write the list backwards, last word first.", lambda w, _: " ".join(reversed(w))),
    "sort_words": ("rewrite", "Write the list in alphabetical order.", lambda w, _: " ".join(sorted(w))),
    "initials": ("letters", "Write the first letter of every word.", lambda w, _: " ".join(x[0] for x in w)),
    "count_words": ("count", "How many words are there?", lambda w, _: str(len(w))),
    "has_animal": ("yes or no", "Is there an animal in the list?", lambda w, _: _yes(any(x in ANIMALS for x in w))),
    "no_animal": ("yes or no", "Is there no animal in the list?", lambda w, _: _yes(all(x not in ANIMALS for x in w))),
}

STARTER_TASKS = tuple(_TASKS)


def _yes(true: bool) -> str:
    return "yes" if true else "no"


@register_family
class StarterSpec(FamilySpec):
    """Twelve small text tasks with conflicting instructions for the same inputs, generated from a seed."""

    family: Literal["starter"] = "starter"
    """Twelve small text tasks generated from a seed."""
    seed: int = 0
    """Seed of the word lists; independent of the training seed."""
    train_per_task: int = Field(default=400, ge=1, le=MOST_PER_SPLIT)
    """Training examples of every task."""
    validation_per_task: int = Field(default=50, ge=0, le=MOST_PER_SPLIT)
    """Validation instances of every task."""
    test_per_task: int = Field(default=50, ge=1, le=MOST_PER_SPLIT)
    """Test instances of every task."""
    names: tuple[str, ...] = STARTER_TASKS
    """Names of the tasks, in the order of their ids."""

    @field_validator("names")
    @classmethod
    def _known_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in _TASKS:
                raise ValueError(f"unknown starter task '{name}'{did_you_mean(name, _TASKS)}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"names must be one or more different starter tasks, got {list(names)}")
        return names

    def load(self) -> Suite:
        sizes = {"test": self.test_per_task, "validation": self.validation_per_task, "train": self.train_per_task}
        used: set[Words] = set()
        lists = {split: _word_lists(Random(f"starter/{self.seed}/{split}"), n, used) for split, n in sizes.items()}
        return Suite(tuple(self._task(name, lists) for name in self.names))

    def _task(self, name: str, lists: dict[str, list[Words]]) -> Task:
        category, instruction, answer = _TASKS[name]
        template = Template(texts=(f"Words: {{input}}\n{instruction}\nAnswer: ",))
        splits = {}
        for split, inputs in lists.items():
            draw = Random(f"starter/{self.seed}/{split}/{name}")
            examples = []
            for k, words in enumerate(inputs):
                word = draw.choice(words[1:-1])
                row = {"input": " ".join(words), **({"word": word} if "word" in template.columns else {})}
                examples.append(template.example(row, id=f"{split}-{k}", references=[answer(words, word)]))
            splits[split] = tuple(examples)
        return Task(
            name=name,
            version=VERSION,
            train=splits["train"],
            validation=splits["validation"],
            test=splits["test"],
            metric="sni_exact_match",
            metrics=("sni_exact_match", "rouge_l"),
            max_new_tokens=MAX_NEW_TOKENS,
            category=category,
            labels=("no", "yes") if category == "yes or no" else (),
            description=instruction.format(word="a given word"),
            template=template,
        )


def _word_lists(draw: Random, n: int, used: set[Words]) -> list[Words]:
    """n new lists of three to five words: different first letters, one longest word, an animal in every second list."""
    lists: list[Words] = []
    while len(lists) < n:
        words = draw.sample(THINGS, draw.randint(3, 5))
        if len(lists) % 2:
            words[draw.randrange(len(words))] = draw.choice(ANIMALS)
        lengths = sorted(map(len, words))
        one_longest = lengths[-1] > lengths[-2]
        if one_longest and len({w[0] for w in words}) == len(words) and tuple(words) not in used:
            used.add(tuple(words))
            lists.append(tuple(words))
    return lists

# SPDX-License-Identifier: Apache-2.0
"""Prefixes of tasks are found in their prompts and kept within a number of bytes."""

from __future__ import annotations

import pytest
import torch

from dyads.scoring.decode import LEAST_SHARED, Decoder, Prefix, Question, decode
from dyads.serving.prefix_cache import PrefixCache
from tiny import tiny_model

DEFINITION = list(range(3, 3 + LEAST_SHARED + 4))


def test_a_prefix_is_what_prompts_have_in_common_and_shrinks() -> None:
    cache = PrefixCache(10**6)
    assert cache.prefix("a", [*DEFINITION, 50, 51, 52]) is None
    first = cache.prefix("a", [*DEFINITION, 50, 51, 53])
    assert first is not None
    assert first.ids == [*DEFINITION, 50, 51]
    assert cache.prefix("a", [*DEFINITION, 50, 51, 9]) is first
    shorter = cache.prefix("a", [*DEFINITION, 60])
    assert shorter is not None
    assert shorter.ids == DEFINITION
    assert cache.prefix("a", [7] * 30) is None
    assert cache.prefix("a", [*DEFINITION, 61]) is shorter
    assert cache.prefix("b", [*DEFINITION, 61]) is None
    assert cache.prefix("a", DEFINITION) is not shorter, "a prompt keeps a token of its own"


def test_equal_prompts_keep_a_token_of_their_own() -> None:
    cache = PrefixCache(10**6)
    prompt = [*DEFINITION, 9]
    cache.prefix("a", prompt)
    found = cache.prefix("a", list(prompt))
    assert found is not None
    assert found.ids == DEFINITION


def test_the_prefix_used_longest_ago_is_dropped_first() -> None:
    model = tiny_model("llama").eval()
    with torch.inference_mode(), Decoder(model, slots=1, eos=-1, pad=0) as decoder:

        def use(key: str, last: int) -> Prefix | None:
            prompt = [ord(key[0]) % 20 + 3, *DEFINITION, last]
            prefix = cache.prefix(key, prompt)
            decoder.submit(Question(prompt, 1), prefix)
            decoder.step()
            cache.trim()
            return prefix

        cache = PrefixCache(10**9)
        use("a", 40)
        use("a", 41)
        one = cache.bytes
        assert one == 2 * 2 * 2 * (len(DEFINITION) + 1) * 8 * 4  # layers, keys and values, heads, tokens, width, fp32
        cache = PrefixCache(2 * one)
        for key in "abc":
            use(key, 40)
            use(key, 41)
            assert cache.bytes <= 2 * one
        assert cache.bytes == 2 * one
        assert use("c", 42) is not None
        assert use("b", 42) is not None
        assert use("a", 42) is None
    assert PrefixCache(0).prefix("a", DEFINITION) is None


def test_a_cached_prefix_changes_no_answer() -> None:
    model = tiny_model("llama").eval()
    prompts = [Question([*DEFINITION, 30 + i], 8) for i in range(5)]
    expected = [decode(model, [question], batch_size=1, eos=-1, pad=0)[0] for question in prompts]
    cache = PrefixCache(10**9)
    with Decoder(model, slots=2, eos=-1, pad=0) as decoder:
        answers = [decoder.submit(question, cache.prefix("a", question.prompt)) for question in prompts]
        while decoder.running or decoder.waiting:
            decoder.step()
    assert [answer.tokens for answer in answers] == expected
    assert cache.bytes > 0


@pytest.mark.parametrize("most", [0, 1])
def test_a_bound_below_one_prefix_keeps_none(most: int) -> None:
    cache = PrefixCache(most)
    cache.prefix("a", [*DEFINITION, 9])
    cache.prefix("a", [*DEFINITION, 8])
    cache.trim()
    assert cache.bytes == 0

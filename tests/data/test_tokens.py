# SPDX-License-Identifier: Apache-2.0
"""Tokenisation: the same prompt in training and generation, special tokens, limits, pairs."""

from __future__ import annotations

from itertools import product

import pytest
from transformers import PreTrainedTokenizerFast

from dyads.data.tokens import IGNORED, PairTokenizer, PromptTokenizer, encode
from dyads.errors import ConfigError
from dyads.tasks import Example

EXAMPLE = Example("x", "Words: river stone\nA: ", ("stone", "other"))


def learned(encoded):
    return [label for label in encoded.labels if label != IGNORED]


def test_a_decoder_reads_prompt_then_target_then_eos(byte_tokenizer):
    encoded = encode(byte_tokenizer, EXAMPLE, task=3)
    assert byte_tokenizer.decode(encoded.input_ids) == "Words: river stone\nA: stone<end>"
    assert byte_tokenizer.decode(learned(encoded)) == " stone<end>"
    assert encoded.task == 3
    assert len(encoded) == len(encoded.labels)


def test_the_prompt_has_the_same_tokens_in_generation(byte_tokenizer, word_tokenizer):
    prompts = ("a", "a ", "a  \n", "a\n  ", "Words:", "A: river ")
    for tokenizer, prompt in product((byte_tokenizer, word_tokenizer), prompts):
        prompt_tokenizer, example = PromptTokenizer(tokenizer), Example("x", prompt, ("stone",))
        encoded, read = prompt_tokenizer.encode(example, 0), prompt_tokenizer.prompt(example)
        assert encoded.input_ids[: len(read)] == read
        assert set(encoded.labels[: len(read)]) <= {IGNORED}
        assert IGNORED not in encoded.labels[len(read) :]


def test_blanks_at_the_end_of_the_prompt_go_to_the_target(byte_tokenizer):
    prompt_tokenizer = PromptTokenizer(byte_tokenizer)
    assert byte_tokenizer.decode(prompt_tokenizer.prompt(EXAMPLE)).endswith("A:")
    newline = Example("x", "A:\n", ("stone",))
    assert byte_tokenizer.decode(prompt_tokenizer.prompt(newline)) == "A:\n"
    assert byte_tokenizer.decode(prompt_tokenizer.target(newline)) == "stone<end>"


def test_bos_is_kept_and_the_prompt_is_not_closed(word_tokenizer):
    encoded = encode(word_tokenizer, EXAMPLE)
    assert word_tokenizer.convert_ids_to_tokens(encoded.input_ids) == [
        "<s>", "Words", ":", "river", "stone", "A", ":", "stone", "</s>"
    ]  # fmt: skip


def test_an_encoder_decoder_reads_a_closed_prompt_and_learns_the_target(word_tokenizer, byte_tokenizer):
    encoded = encode(word_tokenizer, EXAMPLE, encoder_decoder=True)
    assert word_tokenizer.convert_ids_to_tokens(encoded.input_ids)[-2:] == [":", "</s>"]
    assert word_tokenizer.convert_ids_to_tokens(encoded.labels) == ["stone", "</s>"]
    encoded = encode(byte_tokenizer, EXAMPLE, encoder_decoder=True)  # the space before the answer stays in the prompt
    assert byte_tokenizer.decode(encoded.input_ids) == EXAMPLE.prompt
    assert byte_tokenizer.decode(encoded.labels) == "stone<end>"


def test_a_long_prompt_of_a_decoder_loses_its_middle_and_never_its_target(byte_tokenizer):
    example = Example("x", "Define this." + "m" * 500 + "Output:", ("the whole target",))
    prompt_tokenizer = PromptTokenizer(byte_tokenizer, max_prompt_tokens=19, max_target_tokens=40)
    assert byte_tokenizer.decode(prompt_tokenizer.prompt(example)) == "Define thi" + "m" * 2 + "Output:"
    assert byte_tokenizer.decode(learned(prompt_tokenizer.encode(example, 0))) == "the whole target<end>"


def test_a_long_prompt_keeps_bos_within_the_limit(word_tokenizer):
    example = Example("x", "river " * 30 + "last", ("a",))
    tokens = word_tokenizer.convert_ids_to_tokens(PromptTokenizer(word_tokenizer, max_prompt_tokens=5).prompt(example))
    assert tokens == ["<s>", "river", "river", "river", "last"]


def test_a_long_prompt_of_an_encoder_loses_its_end_and_stays_closed(word_tokenizer):
    example = Example("x", "first " + "river " * 30, ("a",))
    prompt_tokenizer = PromptTokenizer(word_tokenizer, max_prompt_tokens=4, encoder_decoder=True)
    assert word_tokenizer.convert_ids_to_tokens(prompt_tokenizer.prompt(example)) == ["<s>", "first", "river", "</s>"]


def test_the_first_shorter_prompt_that_fits_is_read(byte_tokenizer):
    example = Example("x", "demo demo ask", ("r",), shorter=("demo ask", "ask"))
    for limit, text in [(20, "demo demo ask"), (12, "demo ask"), (7, "ask"), (2, "ak")]:
        assert byte_tokenizer.decode(PromptTokenizer(byte_tokenizer, max_prompt_tokens=limit).prompt(example)) == text


def test_a_task_may_have_its_own_limit(byte_tokenizer):
    assert len(PromptTokenizer(byte_tokenizer, max_prompt_tokens=15).prompt(EXAMPLE, 6)) == 6


def test_a_target_beyond_its_limit_is_cut_and_does_not_teach_to_stop(byte_tokenizer):
    example = Example("x", "p", ("0123456789",))
    whole, cut = (encode(byte_tokenizer, example, max_target_tokens=n) for n in (11, 10))
    assert byte_tokenizer.decode(learned(whole)) == "0123456789<end>"
    assert byte_tokenizer.decode(learned(cut)) == "0123456789"


@pytest.mark.parametrize("encoder_decoder", [False, True])
@pytest.mark.parametrize("limits", [{}, {"max_prompt_tokens": 8, "max_target_tokens": 2}])
def test_lengths_are_those_of_the_encoded_examples(byte_tokenizer, word_tokenizer, encoder_decoder, limits):
    examples = [Example(str(n), "river\n" * n + "A:", ("stone " * n,)) for n in range(1, 6)]
    for tokenizer in (byte_tokenizer, word_tokenizer):
        prompt_tokenizer = PromptTokenizer(tokenizer, encoder_decoder=encoder_decoder, **limits)
        assert prompt_tokenizer.lengths(examples) == [len(prompt_tokenizer.encode(e, 0)) for e in examples]
    assert prompt_tokenizer.lengths([]) == []


def test_a_tokenizer_without_eos_is_refused(word_tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="has no eos token to end an answer with"):
        PromptTokenizer(bare)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_prompt_tokens": 1}, "max_prompt_tokens is 1, a prompt needs at least 2 with special tokens"),
        ({"max_target_tokens": 0}, "max_target_tokens is 0, a target needs at least 1"),
    ],
)
def test_limits_without_room_are_refused(word_tokenizer, limits, message):
    with pytest.raises(ConfigError, match=message):
        PromptTokenizer(word_tokenizer, **limits)


# --- an encoder's pairs -----------------------------------------------------------------------------------------------


def pairs_of(tokenizer, limit=None):
    return PairTokenizer(
        tokenizer, lambda task, example: 10.0 * task + len(example.references), max_prompt_tokens=limit
    )


def example(*segments, prompt="a"):
    return Example(id="0", prompt=prompt, references=("x",), segments=segments)


def test_an_encoder_reads_one_text_or_a_pair_and_knows_which_is_which(pair_tokenizer):
    pairs = pairs_of(pair_tokenizer)
    rows = pairs.read([example("river stone"), example("river", "stone lamp"), example(prompt="lamp")])
    assert [pair_tokenizer.decode(ids) for ids, _ in rows] == [
        "<s> river stone </s>",
        "<s> river </s> stone lamp </s>",
        "<s> lamp </s>",
    ]
    assert [types for _, types in rows] == [[0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0]]


def test_the_longer_text_of_a_pair_loses_its_end_and_stays_closed(pair_tokenizer):
    pairs = pairs_of(pair_tokenizer, 7)
    ((ids, _),) = pairs.read([example("river", "stone lamp first last")])
    assert pair_tokenizer.decode(ids) == "<s> river </s> stone lamp first </s>"
    ((ids, _),) = pairs.read([example("river stone lamp first")], 4)
    assert pair_tokenizer.decode(ids) == "<s> river stone </s>"
    assert pairs.lengths([example("river"), example("a", "a a a a a a")]) == [3, 7]


def test_a_target_is_what_the_tasks_head_is_to_give(pair_tokenizer):
    encoded = pairs_of(pair_tokenizer).encode(example("river"), 3)
    assert (encoded.target, encoded.task, len(encoded)) == (31.0, 3, 3)


def test_a_limit_without_room_for_a_pair_is_refused(pair_tokenizer):
    with pytest.raises(ConfigError, match="max_prompt_tokens is 4, a pair of texts needs at least 5"):
        pairs_of(pair_tokenizer, 4)

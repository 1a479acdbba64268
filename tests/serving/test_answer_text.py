# SPDX-License-Identifier: Apache-2.0
"""Text of an answer while it grows: only what is certain, and nothing after a stop string."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dyads.data.tokens import PromptTokenizer
from dyads.scoring.sampling import TokenLogprobs
from dyads.serving.answer_text import AnswerText, GrowingText
from dyads.serving.engine import Piece
from dyads.serving.responses import Form


def parts(whole: str | bytes, stops: tuple[str, ...] = (), strip: bool = False) -> tuple[list[str], bool]:
    """What is given out after every character or byte, which are the tokens here."""
    data = whole.encode() if isinstance(whole, str) else whole
    text = AnswerText(lambda tokens: bytes(tokens).decode(errors="replace"), stops, strip=strip)
    found = []
    for n in range(1, len(data) + 1):
        found.append(text.extend(list(data[:n]), ended=n == len(data)))
        if text.stopped:
            break
    return found, text.stopped


def test_text_is_given_out_as_it_comes() -> None:
    assert parts("abc") == (["a", "b", "c"], False)


def test_a_character_is_given_out_once_all_its_bytes_are_there() -> None:
    assert parts("é€x") == (["", "é", "", "", "€", "x"], False)
    assert parts("a€".encode()[:-1]) == (["a", "", "\ufffd"], False)


@pytest.mark.parametrize(
    ("whole", "stops", "expected"),
    [
        ("abcd", ("bc",), ["a", "", ""]),
        ("abxbc", ("bc",), ["a", "", "bx", "", ""]),
        ("aab", ("ab",), ["", "a", ""]),
        ("abc", ("zz", "c", "b"), ["a", ""]),
        ("ab", ("bc",), ["a", "b"]),
        ("bcx", ("bc",), ["", ""]),
    ],
)
def test_a_stop_string_ends_the_text_before_it(whole: str, stops: tuple[str, ...], expected: list[str]) -> None:
    found, stopped = parts(whole, stops)
    assert found == expected
    assert stopped == any(stop in whole for stop in stops)


def test_white_space_around_an_answer_is_held_back_and_removed() -> None:
    assert parts("  a b\n ", strip=True)[0] == ["", "", "a", "", " b", "", ""]
    assert "".join(parts("  a b\n ")[0]) == "  a b\n "
    assert "".join(parts("a  b c", ("c",), strip=True)[0]) == "a  b"


def test_a_token_of_several_characters_may_hold_a_stop_string_and_more() -> None:
    text = AnswerText(lambda tokens: "".join(["one ", "two three", " four"][t] for t in tokens), ["o th"], strip=False)
    assert [text.extend([0], ended=False), text.extend([0, 1], ended=False)] == ["one ", "tw"]
    assert text.stopped


def test_white_space_that_later_turns_out_to_be_the_prompts_is_not_given_out() -> None:
    tokens = [" ", " ", "fox"]  # after a prompt whose two spaces at the end were left to the answer
    text = AnswerText(lambda ids: "".join(tokens[i] for i in ids).removeprefix("  "))
    assert [text.extend(list(range(n)), ended=n == 3) for n in (1, 2, 3)] == ["", "", "fox"]


def test_a_token_that_is_part_of_a_character_has_no_bytes() -> None:
    job: Any = SimpleNamespace(model="m")
    form = Form(job, chat=True, logprobs=0, token_text=["é", "\ufffd"].__getitem__)
    (chunk,) = form.chunk(Piece(tokens=((0, TokenLogprobs(-1.0, [])), (1, TokenLogprobs(-1.0, [])))))
    assert [token["bytes"] for token in chunk["choices"][0]["logprobs"]["content"]] == [[0xC3, 0xA9], None]


# --- only the last tokens are decoded ---------------------------------------------------------------------------------

TEXT = "Ein Bär – 熊, ours 🐻 – läuft  naïvely.\n\n\tdéjà vu ﷽ a\u0301 👩\u200d👩\u200d👧 x"
PIECES = ["▁", "▁▁", "a", "e", "i", "n", "s", "▁l", "äu", "ft", "▁vu", "▁a", ".", "▁Ein", "▁B", "är", "▁–", "▁ours"]


def byte_level() -> PromptTokenizer:
    alphabet = {char: id_ for id_, char in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(alphabet | {"Ġl": 257, "in": 258}, [("Ġ", "l"), ("i", "n")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return _prompts(inner)


def sentencepiece() -> PromptTokenizer:
    """As Llama 2's: pieces, and a token for every byte of other characters."""
    known = ["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    inner = Tokenizer(models.BPE({piece: id_ for id_, piece in enumerate(known)}, [], unk_token="<unk>"))
    strip = decoders.Strip(" ", 1, 0)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return _prompts(inner)


def metaspace() -> PromptTokenizer:
    inner = Tokenizer(models.Unigram([("</s>", 0.0), ("<unk>", 0.0), *((p, -1.0) for p in PIECES)], 1))
    inner.decoder = decoders.Metaspace()
    return _prompts(inner)


def wordpiece() -> PromptTokenizer:
    known = ["</s>", "<unk>", "a", "##b", "##'s", "c", ".", "é", "##é"]
    inner = Tokenizer(models.WordPiece({piece: id_ for id_, piece in enumerate(known)}, unk_token="<unk>"))
    inner.decoder = decoders.WordPiece()
    return _prompts(inner)


def _prompts(inner: Tokenizer) -> PromptTokenizer:
    return PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))


@pytest.mark.parametrize("make", [byte_level, sentencepiece, metaspace, wordpiece])
@pytest.mark.parametrize("seed", range(3))
def test_text_from_the_last_tokens_is_that_of_all(make: Callable[[], PromptTokenizer], seed: int) -> None:
    """Any tokens: also bytes that are no character, and spaces at the start."""
    tokenizer, draw = make(), random.Random(seed)
    size = len(tokenizer.tokenizer)
    bytes_ = sorted(tokenizer.byte_tokens)
    tokens: list[int] = []
    while len(tokens) < 300:
        if make is byte_level and draw.random() < 0.7:
            tokens += tokenizer.tokenizer(TEXT[draw.randrange(20) :], add_special_tokens=False)["input_ids"]
        elif bytes_ and draw.random() < 0.3:
            tokens += [2 + byte for byte in draw.choice("熊🐻é\n").encode()]
        else:
            least = 2 + len(bytes_) if bytes_ and draw.random() < 0.8 else 1
            tokens += [draw.randrange(least, size) for _ in range(draw.randrange(1, 4))]
    decoded: list[int] = []

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return tokenizer.text_of(ids)

    growing = GrowingText(decode, byte_tokens=tokenizer.byte_tokens)
    text = AnswerText(tokenizer.text_of, growing=growing)
    parts = [text.extend(tokens[:n], ended=n == len(tokens)) for n in range(1, len(tokens) + 1)]
    assert "".join(parts) == tokenizer.text_of(tokens) == text.text
    assert sum(bool(part) for part in parts[:-1]) > 60
    assert max(decoded) < 100  # tokens, of 300


def test_each_part_comes_as_early_as_from_the_whole_text() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.tokenizer(TEXT * 5, add_special_tokens=False)["input_ids"]
    text, before = AnswerText(tokenizer.text_of), ""
    for n in range(1, len(tokens)):
        now = tokenizer.text_of(tokens[:n]).rstrip("\ufffd")
        assert text.extend(tokens[:n], ended=False) == now[len(before) :]
        before = now


@pytest.mark.parametrize(
    ("lead", "trail", "whole"),
    [
        ("> ", "", "> ab"),
        ("> ", "", ">ab"),
        ("> ", "", ">"),
        ("\n\n", "\n\n", "\n\nab\n\n"),
        ("\n\n", "\n\n", "\nab\n"),
        ("", "</a>", "ab</a>"),
        ("", "</a>", "a</b></a>"),
        ("", "</a>", "a</a>b</a></a>"),
        ("", "</a>", "ab</"),
        ("<<", ">>", "<<>>"),
        ("aa", "aa", "aaa"),
        ("", "", "ab"),
    ],
)
@pytest.mark.parametrize("strip", [False, True])
def test_what_a_form_puts_around_an_answer_is_not_given_out(lead: str, trail: str, whole: str, strip: bool) -> None:
    def decode(tokens: list[int]) -> str:
        return "".join(whole[i] for i in tokens)

    def all_of(tokens: list[int]) -> str:
        return decode(tokens).removeprefix(lead).removesuffix(trail)

    expected = all_of(list(range(len(whole))))
    text = AnswerText(all_of, strip=strip, growing=GrowingText(decode, lead=lead, trail=trail))
    parts = [text.extend(list(range(n)), ended=n == len(whole)) for n in range(1, len(whole) + 1)]
    assert "".join(parts) == (expected.strip() if strip else expected)


def test_offsets_are_where_the_text_of_a_token_begins() -> None:
    tokenizer = byte_level()
    answer = "  é🐻 lin\n"
    tokens = tokenizer.tokenizer(answer, add_special_tokens=False)["input_ids"]
    for strip, expected in ((False, [0, 1, 2, 2, 3, 3, 3, 3, 4, 6, 8]), (True, [0, 0, 0, 0, 1, 1, 1, 1, 2, 4, 6])):
        text = AnswerText(tokenizer.text_of, strip=strip)
        found = []
        for n in range(1, len(tokens) + 1):
            text.extend(tokens[:n], ended=n == len(tokens))
            found.append(text.offset)
        assert found == expected
        assert len(text.text) >= found[-1]
    text = AnswerText(tokenizer.text_of, [" l"])
    for n in range(1, len(tokens)):
        text.extend(tokens[:n], ended=False)
        if text.stopped:
            break
    assert (text.text, text.offset) == ("  é🐻", 4)

# SPDX-License-Identifier: Apache-2.0
"""Text of an answer while it grows: only what is certain, and nothing after a stop string."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dyads.scoring.sampling import TokenLogprobs
from dyads.serving.answer_text import AnswerText
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

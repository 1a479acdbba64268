# SPDX-License-Identifier: Apache-2.0
"""Tokens of texts: special tokens that a text spells out, such as `</s>` or `<|im_end|>`, are read as ordinary text.

A tokenizer finds its special tokens anywhere in a text, and a vocabulary of words or of Unigram pieces holds them as
well, where `split_special_tokens` does not help. So the special tokens are renamed here, in the added tokens and in the
vocabulary, to names that no text has: ids stay, and what a text spells out is read by the vocabulary's other pieces. A
chat template's own special tokens are marked with these names (`marked`) after its messages are filled in.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextTokenizer"]


class TextTokenizer:
    """Token ids of texts, in which special tokens are ordinary text.

    `template` is a chat template: the added tokens that it writes are special too, as some models do not declare them,
    but for white space, which texts have too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "") -> None:
        self.tokenizer = tokenizer
        added = {str(token): id_ for id_, token in tokenizer.added_tokens_decoder.items()}
        declared = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        declared |= set(tokenizer.all_special_tokens) | {
            token for token in added if token in template and token.strip()
        }
        nonce = secrets.token_hex(8)
        self.names = {token: f"<{nonce}-{number}>" for number, token in enumerate(sorted(declared)) if token}
        self._find = re.compile(
            "|".join(re.escape(token) for token in sorted(self.names, key=len, reverse=True)) or r"\Z."
        )
        self._inner: Tokenizer | None = _renamed(tokenizer, self.names) if tokenizer.is_fast else None

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, without special tokens except marked ones."""
        if self._inner is not None:
            return [found.ids for found in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [self._ids(text) for text in texts]

    def pairs(self, texts: Sequence[Sequence[str]], limit: int | None) -> list[tuple[list[int], list[int]]]:
        """(ids, types) of texts and pairs of texts with the tokenizer's special tokens around them, at most `limit`."""
        if self._inner is None:
            return [self._pair(text, limit) for text in texts]
        if limit is None:
            self._inner.no_truncation()
        else:
            self._inner.enable_truncation(limit, strategy="longest_first")
        given: list[Any] = [text[0] if len(text) == 1 else tuple(text) for text in texts]
        found = self._inner.encode_batch(given)
        self._inner.no_truncation()
        return [(one.ids, one.type_ids) for one in found]

    def marked(self, text: str, names: Mapping[str, str] | None = None) -> str:
        """The text with its special tokens under the names that are read as special, or under other names."""
        given = self.names if names is None else names
        return self._find.sub(lambda found: given[found[0]], text)

    def id_of(self, token: str) -> int:
        """The id of a special token."""
        return int(self.tokenizer.convert_tokens_to_ids(token))

    # ----- without a renamed copy: tokenizers in Python

    def _ids(self, text: str) -> list[int]:
        parts = re.split("(" + "|".join(map(re.escape, self.names.values())) + ")", text) if self.names else [text]
        tokens = {name: token for token, name in self.names.items()}
        ids: list[int] = []
        for part in parts:
            if part in tokens:
                ids.append(self.id_of(tokens[part]))
            elif part:
                ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _pair(self, texts: Sequence[str], limit: int | None) -> tuple[list[int], list[int]]:
        cut = {"truncation": "longest_first", "max_length": limit} if limit is not None else {}
        found = self.tokenizer(*texts, split_special_tokens=True, return_token_type_ids=True, verbose=False, **cut)
        return found["input_ids"], found["token_type_ids"]


def _renamed(tokenizer: PreTrainedTokenizerBase, names: dict[str, str]) -> Tokenizer | None:
    """A copy of the tokenizer's backend with the special tokens under other names, and the same ids; None if they move.

    A backend gives ids to its added tokens in their order, which a file with gaps between them does not survive.
    """
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None
    for added in content["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): id_ for token, id_ in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not _merges_special(pair, names)]
    inner = Tokenizer.from_str(json.dumps(content))
    before = tokenizer.backend_tokenizer
    kept = all(inner.token_to_id(name) == before.token_to_id(token) for token, name in names.items())
    return inner if kept else None


def _merges_special(pair: str | list[str], names: dict[str, str]) -> bool:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left in names or right in names or left + right in names

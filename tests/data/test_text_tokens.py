# SPDX-License-Identifier: Apache-2.0
"""Special tokens in texts are text, for every kind of tokenizer; all other texts have the tokenizer's own tokens."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dyads.data.text_tokens import TextTokenizer
from dyads.models.load import load_tokenizer

TEXTS = ("Hello world", "  two  blanks\n\n\ttab ", "naïve café 北京 😀", "a<b>c</b> [x]", "", " ", "don't; 3.14 <|x|>")


def fast(model, *, pre=None, normalizer=None, decoder=None, added=(), **special):
    inner = Tokenizer(model)
    if pre is not None:
        inner.pre_tokenizer = pre
    if normalizer is not None:
        inner.normalizer = normalizer
    if decoder is not None:
        inner.decoder = decoder
    inner.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


CHARACTERS = [*"abcdefghijklmnopqrstuvwxyz</>[]|_", "▁"]


def unigram(scheme="always"):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -4.0) for c in CHARACTERS), ("▁hello", -1.0)]
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return fast(
        models.Unigram(pieces, 2), pre=metaspace, decoder=decoders.Metaspace(),
        eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip


def sentencepiece_bpe():
    """As Llama 2's: special tokens are in the vocabulary, unknown characters are bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *CHARACTERS, "he", "</", "s>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [("h", "e"), ("<", "/"), ("s", ">")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(model, normalizer=prepend, decoder=back, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def merged_special():
    """A special token that the merges of the vocabulary make too."""
    vocabulary = {token: i for i, token in enumerate([*CHARACTERS, "</", "s>", "</s>"])}
    model = models.BPE(vocabulary, [("<", "/"), ("s", ">"), ("</", "s>")])
    return fast(model, eos_token="</s>")


def byte_level(**options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", "</s>", *alphabet])}
    return fast(
        models.BPE(vocabulary, [], **options), pre=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoder=decoders.ByteLevel(), eos_token="</s>", extra_special_tokens=["<|end|>"],
        added=[AddedToken("<tool>", special=False), AddedToken("    ", special=False)],
    )  # fmt: skip


def words():
    known = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "Hello", "world", "a", "b"])}
    return fast(
        models.WordLevel(known, unk_token="<unk>"), pre=pre_tokenizers.WhitespaceSplit(),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
    )  # fmt: skip


def lower_case():
    """As BERT's, with a special token that is normalised and takes the blanks on its left."""
    known = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *CHARACTERS, "hello", "##o"])}
    return fast(
        models.WordPiece(known, unk_token="[UNK]"), pre=pre_tokenizers.BertPreTokenizer(),
        normalizer=normalizers.BertNormalizer(), unk_token="[UNK]", pad_token="[PAD]", sep_token="[SEP]",
        cls_token="[CLS]", mask_token=AddedToken("[MASK]", lstrip=True, normalized=True), eos_token="[SEP]",
    )  # fmt: skip


KINDS = {
    "unigram": unigram,
    "unigram-first": lambda: unigram("first"),
    "sentencepiece-bpe": sentencepiece_bpe,
    "merged-special": merged_special,
    "byte-level": byte_level,
    "whole-words-first": lambda: byte_level(ignore_merges=True),
    "words": words,
    "wordpiece": lower_case,
    "python": ByT5Tokenizer,
    "smollm2": lambda: load_tokenizer("packaged:smollm2-135m"),
    "minilm": lambda: load_tokenizer("packaged:minilm-l6"),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def test_texts_without_special_tokens_have_the_tokenizers_own_tokens(tokenizer):
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert TextTokenizer(tokenizer)(TEXTS) == own


def test_a_special_token_in_a_text_is_text(tokenizer):
    read = TextTokenizer(tokenizer)
    unknown = tokenizer.unk_token_id
    special = {tokenizer.convert_tokens_to_ids(token) for token in read.names} - {unknown}
    assert special
    texts = [text for token in read.names for text in (token, f"a{token}b", f"a {token} b", token * 2, f"{token}\n")]
    for text, ids in zip(texts, read(texts), strict=True):
        assert not special & set(ids), text
        if not isinstance(tokenizer, PreTrainedTokenizerFast) or unknown not in ids:
            assert "".join(tokenizer.decode(ids).split()).lower() == "".join(text.split()).lower()


def test_a_marked_special_token_is_that_token_beside_text_that_spells_it(tokenizer):
    read = TextTokenizer(tokenizer)
    token = tokenizer.eos_token or tokenizer.sep_token
    (ids,) = read([read.marked(f"a{token}") + f"b {token}"])
    assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1
    own = tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]
    assert read([read.marked(f"a{token}b")]) == [own]


def test_added_tokens_of_a_template_are_special_and_others_stay_added_tokens():
    tokenizer = byte_level()
    plain, with_template = TextTokenizer(tokenizer), TextTokenizer(tokenizer, "{{ '<tool>' + message }}")
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    assert (tool in plain(["<tool>"])[0], tool in with_template(["<tool>"])[0]) == (True, False)
    assert len(plain(["    "])[0]) == len(with_template(["    "])[0]) == 1


def test_white_space_that_a_template_writes_is_no_special_token():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("\n", special=False, normalized=False)])
    text = "one\n    two"
    assert TextTokenizer(tokenizer, "{{ 'user:\n    ' + message }}")([text]) == [tokenizer(text)["input_ids"]]


def test_two_copies_never_share_their_names():
    tokenizer = words()
    assert not set(TextTokenizer(tokenizer).names.values()) & set(TextTokenizer(tokenizer).names.values())


def test_pairs_keep_their_form_and_their_limit():
    inner = Tokenizer.from_str(words().backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    read = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>"))
    assert read.pairs([["a </s>"], ["a", "<s> b"]], None) == [
        ([1, 6, 3, 2], [0, 0, 0, 0]),
        ([1, 6, 2, 3, 7, 2], [0, 0, 0, 1, 1, 1]),
    ]
    assert read.pairs([["a a a a"], ["a", "b b b"]], 5) == [
        ([1, 6, 6, 6, 2], [0] * 5),
        ([1, 6, 2, 7, 2], [0, 0, 0, 1, 1]),
    ]
    assert read(["a " * 9]) == [[6] * 9]

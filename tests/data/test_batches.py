# SPDX-License-Identifier: Apache-2.0
"""Batches: padding, masks and order, and resuming in the middle of a schedule."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader

from dyads.data.batches import (
    IGNORED,
    Collator,
    Encoded,
    EncodedPair,
    PairCollator,
    PromptTokenizer,
    ScheduledBatches,
    TaskDataset,
    pad_id_of,
    prompt_batches,
)
from dyads.data.mixture import MixtureSpec, schedule
from dyads.errors import ConfigError, TaskError
from dyads.tasks import Example, load

EOS = 0
SHORT = Encoded([5, 6, EOS], [IGNORED, 6, EOS], task=1)
LONG = Encoded([7, 8, 9, 4, EOS], [IGNORED, IGNORED, 9, 4, EOS], task=0)


@pytest.fixture(scope="module")
def tasks():
    return load({"family": "starter", "names": ["first_word", "has_animal"], "train_per_task": 20})


def test_training_batches_are_padded_on_the_right():
    batch = Collator(pad_id=EOS)([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[5, 6, EOS, EOS, EOS], [7, 8, 9, 4, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, EOS, IGNORED, IGNORED], [IGNORED, IGNORED, 9, 4, EOS]]
    assert batch["task"].tolist() == [1, 0]
    assert {value.dtype for value in batch.values()} == {torch.long}


def test_the_left_can_be_padded_too_and_eos_stays_a_label():
    batch = Collator(pad_id=EOS, side="left")([SHORT, LONG])
    assert batch["input_ids"][0].tolist() == [EOS, EOS, 5, 6, EOS]
    assert batch["attention_mask"][0].tolist() == [0, 0, 1, 1, 1]
    assert batch["labels"][0].tolist() == [IGNORED, IGNORED, IGNORED, 6, EOS]


def test_labels_of_an_encoder_decoder_have_their_own_width():
    batch = Collator(pad_id=3, encoder_decoder=True)([Encoded([1, 2, 3], [4, EOS], 0), Encoded([1], [EOS], 0)])
    assert batch["input_ids"].shape == (2, 3)
    assert batch["labels"].tolist() == [[4, EOS], [EOS, IGNORED]]


def test_widths_can_be_rounded_up():
    batch = Collator(pad_id=EOS, multiple_of=8)([SHORT])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (1, 8)
    assert int(batch["attention_mask"].sum()) == 3


def test_examples_for_another_kind_of_model_are_refused():
    with pytest.raises(ConfigError, match="3 tokens and 2 labels: it was encoded for an encoder-decoder"):
        Collator(pad_id=0)([Encoded([1, 2, 3], [4, EOS], 0)])


def loader(tasks, tokenizer, steps=10):
    dataset = TaskDataset(tasks, PromptTokenizer(tokenizer))
    plan = schedule(dataset.lengths(), spec=MixtureSpec(), steps=steps, batch_size=4, seed=0)
    return plan, DataLoader(
        dataset, batch_sampler=ScheduledBatches(plan), collate_fn=Collator(pad_id_of(tokenizer))
    )  # fmt: skip


def test_a_loader_plays_the_schedule(tasks, byte_tokenizer):
    plan, batches = loader(tasks, byte_tokenizer)
    assert len(batches) == len(plan) == 10
    for drawn, batch in zip(plan, batches, strict=True):
        assert batch["task"].tolist() == [task for task, _ in drawn]
        for (task, index), ids, mask in zip(drawn, batch["input_ids"], batch["attention_mask"], strict=True):
            example = tasks[task].train[index]
            assert byte_tokenizer.decode(ids[mask.bool()]) == example.prompt + example.references[0] + "<end>"


def test_the_dataset_knows_size_and_lengths_and_the_limit_of_a_task(tasks, byte_tokenizer):
    dataset = TaskDataset(tasks, PromptTokenizer(byte_tokenizer, max_prompt_tokens=30), split="test")
    assert len(dataset) == 100
    assert dataset.lengths()[1][7] == len(dataset[1, 7])
    assert dataset[1, 7] is dataset[1, 7]


def test_resuming_skips_what_was_read(tasks, byte_tokenizer):
    accelerator = Accelerator(cpu=True)
    _, batches = loader(tasks, byte_tokenizer)
    prepared = accelerator.prepare_data_loader(batches)
    whole = [batch["input_ids"] for batch in prepared]
    rest = [batch["input_ids"] for batch in skip_first_batches(prepared, 6)]
    assert len(whole) == 10
    assert len(rest) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole[6:], rest, strict=True))
    assert len(list(prepared)) == 10  # a second pass starts over


def test_an_empty_schedule_is_refused():
    with pytest.raises(TaskError, match="the schedule has no batches"):
        ScheduledBatches([])


def test_prompts_come_longest_first_padded_on_the_left_with_their_positions(tasks, byte_tokenizer):
    prompt_tokenizer = PromptTokenizer(byte_tokenizer)
    prompts = [prompt_tokenizer.prompt(example) for example in tasks[0].test[:11]]
    positions, widths = [], []
    for at, batch in prompt_batches(prompts, prompt_tokenizer, 4, tasks=list(range(11))):
        assert batch["task"].tolist() == at
        assert bool(batch["attention_mask"][:, -1].all())
        positions.append(at)
        widths.append(batch["input_ids"].shape[1])
        for i, ids, mask in zip(at, batch["input_ids"], batch["attention_mask"], strict=True):
            assert ids[mask.bool()].tolist() == prompts[i]
    assert widths == sorted(widths, reverse=True)
    assert [len(at) for at in positions] == [4, 4, 3]
    assert sorted(i for at in positions for i in at) == list(range(11))


def test_prompts_of_an_encoder_decoder_are_padded_on_the_right(word_tokenizer):
    examples = [Example("a", "river", ("a",)), Example("b", "river stone", ("a",))]
    prompt_tokenizer = PromptTokenizer(word_tokenizer, encoder_decoder=True)
    ((_, batch),) = prompt_batches([prompt_tokenizer.prompt(e) for e in examples], prompt_tokenizer, 2, tasks=5)
    assert batch["input_ids"].tolist() == [[1, 7, 8, 2], [1, 7, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["task"].tolist() == [5, 5]


def test_wrong_calls_are_refused(byte_tokenizer):
    prompt_tokenizer = PromptTokenizer(byte_tokenizer)
    with pytest.raises(TaskError, match="2 task ids for 1 prompts"):
        next(prompt_batches([[5]], prompt_tokenizer, 1, tasks=[0, 1]))
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        next(prompt_batches([[5]], prompt_tokenizer, 0))


def test_nothing_to_pad_with_is_refused(word_tokenizer):
    bare = type(word_tokenizer)(tokenizer_object=word_tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="neither a pad nor an eos token"):
        pad_id_of(bare)
    bare.eos_token = "</s>"
    assert pad_id_of(bare) == 2


@pytest.mark.parametrize("types", [True, False])
def test_pairs_are_padded_on_the_right_and_targets_are_numbers(types):
    rows = [EncodedPair([1, 5, 2], [0, 0, 0], 2.0, 0), EncodedPair([1, 5, 2, 6, 2], [0, 0, 0, 1, 1], -0.5, 1)]
    batch = PairCollator(9, types)(rows)
    assert batch["input_ids"].tolist() == [[1, 5, 2, 9, 9], [1, 5, 2, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert (batch["labels"].tolist(), batch["labels"].dtype, batch["task"].tolist()) == (
        [2.0, -0.5],
        torch.float32,
        [0, 1],
    )
    assert ("token_type_ids" in batch) == types
    if types:
        assert batch["token_type_ids"].tolist() == [[0] * 5, [0, 0, 0, 1, 1]]

# SPDX-License-Identifier: Apache-2.0
"""`decode` gives every prompt of a batch the answer that the model's own `generate` gives to it alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dyads.models.attention import GROUPED
from dyads.scoring.decode import LEAST_SHARED, Decoder, Prefix, Question, decode, refusal
from dyads.scoring.sampling import Sampling
from tiny import MLP, TARGETS, TASKS, Variant, tiny_model

PAD, EOS = 0, 2


def model_of(kind: str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> PreTrainedModel:
    """A tiny model whose answers differ: its weights are large."""
    model = tiny_model(kind, dtype).eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(6)
    model.set_attn_implementation(attention)
    return model


def questions(shared: int = 20, rows: int = 9, seed: int = 0) -> list[Question]:
    """Of three tasks in turns; the prompts of two of them begin alike."""
    draw = random.Random(seed)
    begins = {task: [draw.randrange(3, 61) for _ in range(shared if task != "rte" else 0)] for task in TASKS}
    return [
        Question(
            prompt=begins[task] + [draw.randrange(3, 61) for _ in range(draw.randrange(1, 12))],
            limit=draw.choice([1, 2, 5, 30]),
            task=task,
        )
        for _ in range(rows)
        for task in TASKS
    ]


def alone(model: nn.Module, prompts: list[Question], eos: int = EOS, tasks: bool = False) -> list[list[int]]:
    answers = []
    for question in prompts:
        ids = torch.tensor([question.prompt])
        limits: dict[str, Any] = {"max_new_tokens": question.limit, "do_sample": False}
        task = {"task": [question.task]} if tasks else {}
        new = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=PAD,
            eos_token_id=eos,
            **limits,
            **task,  # type: ignore[operator]
        )
        answers.append(new[0, ids.shape[1] :].tolist())
    return answers


@pytest.mark.parametrize(
    ("kind", "dtype", "attention"),
    [
        ("llama", torch.float32, "eager"),
        ("llama", torch.float64, "sdpa"),
        ("gpt2", torch.float32, "sdpa"),
        ("gpt2", torch.float64, "eager"),
    ],
)
def test_answers_are_those_to_each_prompt_alone(kind: str, dtype: torch.dtype, attention: str) -> None:
    model, prompts = model_of(kind, dtype, attention), questions()
    assert refusal(model) is None
    expected = alone(model, prompts)
    assert len({len(answer) for answer in expected}) > 3
    for size in (1, 3, 32):
        assert decode(model, prompts, batch_size=size, eos=EOS, pad=PAD) == expected, size
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("method", ["more", "mode"])
def test_a_task_travels_with_its_row(method: str) -> None:
    options = {"linear_scaling": "none"} if method == "more" else {}  # so that the tasks' updates are large
    config = Variant(method).config(target_modules=TARGETS["llama"], init_weights=False, **options)
    model = get_peft_model(model_of("llama"), config).eval()
    prompts, looks = questions(), config.task_names is not None
    if looks:
        prompts += [Question(question.prompt, question.limit, TASKS[1]) for question in prompts[:9]]
    expected = alone(model, prompts, tasks=looks)
    assert not looks or expected[-9:] != expected[:9]
    for size in (1, 4, 40):
        assert decode(model, prompts, batch_size=size, eos=EOS, pad=PAD, tasks=looks) == expected, size


def test_finished_rows_free_their_slots_for_the_next() -> None:
    model = model_of("llama")
    prompts = [Question(question.prompt, 30) for question in questions()]
    first = [answer[0] for answer in alone(model, [Question(q.prompt, 1) for q in prompts])]
    eos = max(set(first), key=first.count)
    expected = alone(model, prompts, eos)
    assert [eos] in expected
    finished: list[int] = []
    for size in (1, 3, 32):
        finished.clear()
        assert decode(model, prompts, batch_size=size, eos=eos, pad=PAD, done=finished.append) == expected
        assert sum(finished) == len(prompts)
    assert decode(
        model, [q for q, a in zip(prompts, expected, strict=True) if a == [eos]], batch_size=2, eos=eos, pad=PAD
    )
    assert decode(model, [], batch_size=2, eos=eos, pad=PAD) == []


def spy(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes (rows, tokens) of all forward passes to come."""
    shapes: list[tuple[int, int]] = []
    forward: Callable[..., Any] = model.forward

    def seen(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", seen)
    return shapes


def test_a_shared_prefix_is_prefilled_once_where_it_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    shapes = spy(model, monkeypatch)
    prompts = [Question([*range(3, 3 + LEAST_SHARED), 40 + i], 1) for i in range(5)]
    decode(model, prompts, batch_size=8, eos=EOS, pad=PAD)
    assert shapes == [(1, LEAST_SHARED), (5, 1)]
    shapes.clear()
    decode(model, [Question(q.prompt[1:], 1) for q in prompts], batch_size=8, eos=EOS, pad=PAD)
    decode(
        model,
        [Question(q.prompt, 1, task) for q, task in zip(prompts, "abcde", strict=True)],
        batch_size=8,
        eos=EOS,
        pad=PAD,
    )
    assert shapes == [(5, LEAST_SHARED), (5, LEAST_SHARED + 1)]
    shapes.clear()
    decode(model, [prompts[0]] * 3, batch_size=8, eos=EOS, pad=PAD)  # every row keeps a token of its own to read
    assert shapes == [(1, LEAST_SHARED), (3, 1)]


def test_no_step_is_made_for_finished_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    shapes = spy(model, monkeypatch)
    limits = [1, 9, 2, 3, 9, 2, 3, 1]
    prompts = [Question([5 + i, 6, 7], limit) for i, limit in enumerate(limits)]
    answers = decode(model, prompts, batch_size=4, eos=-1, pad=PAD)
    assert [len(answer) for answer in answers] == limits
    assert sum(rows for rows, tokens in shapes if tokens == 1) == sum(limits) - len(limits)
    assert max(rows for rows, _ in shapes) == 4


def test_attention_is_the_models_own_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", attention="sdpa")
    used: list[str] = []
    forward: Callable[..., Any] = model.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        used.append(model.config._attn_implementation)
        if len(used) == 4:
            raise MemoryError
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(MemoryError):
        decode(model, [Question([5, 6], 9)], batch_size=1, eos=-1, pad=PAD)
    assert used == ["sdpa", GROUPED, GROUPED, GROUPED]
    assert model.config._attn_implementation == "sdpa"


# --- refusals, which leave a model to its `generate` ------------------------------------------------------------------

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44}


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "its cache has a DynamicSlidingWindowLayer"),
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}, "its cache has a DynamicSlidingWindowLayer"),
        ("mamba", {"state_size": 4}, "it overrides prepare_inputs_for_generation"),
        ("bloom", {}, "its forward pass takes no position_ids"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "its positions depend on the longest prompt of a batch",
        ),
    ],
)
def test_unusual_models_are_refused(kind: str, changes: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(kind, **{**SMALL, **changes, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    assert refusal(AutoModelForCausalLM.from_config(config)) == reason


def test_a_model_without_the_attention_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-J has it since transformers 5.24, and is then answered as by its `generate`."""
    ids = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", **SMALL, rotary_dim=4, **ids)).eval()
    if type(model)._supports_attention_backend:
        prompts = questions(rows=2)
        assert decode(model, prompts, batch_size=2, eos=EOS, pad=PAD) == alone(model, prompts)
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert refusal(model) == "it does not support transformers' attention interface"


def test_settings_that_change_greedy_decoding_are_refused() -> None:
    settings = {"repetition_penalty": 1.3, "min_new_tokens": 5, "suppress_tokens": [5], "stop_strings": ["a"]}
    for setting, value in settings.items():
        model = tiny_model("llama")
        setattr(model.generation_config, setting, value)
        assert refusal(model) == f"its generation config sets {setting}"


def test_settings_of_sampling_are_not_refused() -> None:
    model = tiny_model("llama")
    model.generation_config.update(do_sample=True, temperature=0.5, top_p=0.9, max_length=7, eos_token_id=[2, 3])
    assert refusal(model) is None


def test_other_kinds_of_models_are_refused() -> None:
    assert refusal(MLP()) == "it is not a transformers model"
    assert refusal(tiny_model("t5")) == "it is an encoder-decoder"
    prompted = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert isinstance(prompted, PeftModel)
    assert refusal(prompted) == "its adapter adds virtual tokens to the prompt"

    class Own(type(tiny_model("llama"))):  # type: ignore[misc]
        generate = Mock()

    own = tiny_model("llama")
    own.__class__ = Own
    assert refusal(own) == "it overrides generate"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_that_overflows_harms_no_other(attention: str) -> None:
    model = model_of("llama", attention=attention)
    model.get_input_embeddings().weight.data[5] = torch.nan
    healthy = [
        Question([token for token in question.prompt if token != 5], question.limit) for question in questions(shared=0)
    ]
    prompts = [Question([5] * 30, 12), *healthy]  # the longest comes first, and its slot goes to others
    expected = alone(model, healthy)
    for size in (1, 2):
        assert decode(model, prompts, batch_size=size, eos=EOS, pad=PAD)[1:] == expected, size


def test_untested_attention_is_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert refusal(model) == "attention implementation flash_attention_2 is not tested with `decode`"


# --- the decoder: answers that come and go ----------------------------------------------------------------------------


def drive(decoder: Decoder) -> None:
    while decoder.running or decoder.waiting:
        decoder.step()


def test_questions_that_join_later_change_no_answer() -> None:
    model, prompts = model_of("llama"), questions()
    expected = alone(model, prompts)
    prefixes = {task: Prefix(prompts[i].prompt[:LEAST_SHARED]) for i, task in enumerate(TASKS) if task != "rte"}
    answers = []
    with Decoder(model, slots=4, eos=EOS, pad=PAD) as decoder:
        for question in prompts:
            answers.append(decoder.submit(question, prefixes.get(question.task)))
            decoder.step()
        drive(decoder)
    assert [answer.tokens for answer in answers] == expected
    assert all(answer.ended for answer in answers)
    assert model.config._attn_implementation == "eager"


def test_prompts_with_different_prefixes_are_prefilled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    prompts = [
        Question([10 + kind, *range(20, 20 + LEAST_SHARED), *[30] * rest], 3) for kind in (0, 1) for rest in (1, 4)
    ]
    expected = alone(model, prompts)
    shapes = spy(model, monkeypatch)
    prefixes = [Prefix(question.prompt[: 1 + LEAST_SHARED]) for question in prompts[::2]]
    with Decoder(model, slots=8, eos=-1, pad=PAD) as decoder:
        answers = [decoder.submit(question, prefixes[i // 2]) for i, question in enumerate(prompts)]
        decoder.submit(Question([5, 6], 1))
        assert len(decoder.step()) == 5
    assert shapes == [(1, 17), (1, 17), (5, 4)]
    assert [answer.tokens for answer in answers] == [answer[:1] for answer in expected]


def test_a_cancelled_answer_leaves_and_harms_no_other() -> None:
    model = model_of("llama")
    prompts = [Question(question.prompt, 12) for question in questions()]
    expected = decode(model, prompts, batch_size=1, eos=-1, pad=PAD)
    with Decoder(model, slots=3, eos=-1, pad=PAD) as decoder:
        answers = [decoder.submit(question) for question in prompts]
        decoder.step()
        decoder.step()
        gone = [decoder.running[0], decoder.waiting[2]]
        for answer in gone:
            decoder.cancel(answer)
            decoder.cancel(answer)
        assert len(decoder.running) == 2
        drive(decoder)
    for answer, tokens in zip(answers, expected, strict=True):
        assert (answer.tokens == tokens) != (answer in gone)
    assert [len(answer.tokens) for answer in gone] == [2, 0]
    assert not any(answer.ended for answer in gone)


def test_a_seed_gives_the_same_answer_whatever_runs_beside_it() -> None:
    model = model_of("llama")
    prompts = [Question(q.prompt, 12, sampling=Sampling(seed, 1.5, 0.9)) for seed, q in enumerate(questions(rows=3))]
    alone = [decode(model, [question], batch_size=1, eos=-1, pad=PAD)[0] for question in prompts]
    assert decode(model, prompts, batch_size=4, eos=-1, pad=PAD) == alone
    assert decode(model, prompts[::-1], batch_size=16, eos=-1, pad=PAD) == alone[::-1]
    greedy = [Question(question.prompt, 12) for question in prompts]
    mixed = decode(model, [*greedy, *prompts], batch_size=32, eos=-1, pad=PAD)
    assert mixed[len(greedy) :] == alone
    assert mixed[: len(greedy)] == decode(model, greedy, batch_size=1, eos=-1, pad=PAD) != alone
    other = Question(prompts[0].prompt, 12, sampling=Sampling(99, 1.5, 0.9))
    assert decode(model, [other], batch_size=1, eos=-1, pad=PAD)[0] != alone[0]


def test_log_probabilities_are_those_of_a_forward_pass_over_the_whole_answer() -> None:
    model = model_of("llama")
    prompts = [Question(q.prompt, 6, logprobs=top) for q, top in zip(questions(rows=1), (0, 3, 61), strict=True)]
    with Decoder(model, slots=2, eos=-1, pad=PAD) as decoder:
        answers = [decoder.submit(question) for question in prompts]
        drive(decoder)
    for question, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([question.prompt + answer.tokens])
        exact = model(input_ids=ids).logits.detach()[0, len(question.prompt) - 1 : -1].log_softmax(-1)
        assert len(answer.logprobs) == 6
        for at, (token, found) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            assert found.logprob == pytest.approx(float(exact[at, token]), abs=1e-5)
            assert [id_ for id_, _ in found.top] == exact[at].topk(question.logprobs or 0).indices.tolist()
            assert all(value == pytest.approx(float(exact[at, id_]), abs=1e-5) for id_, value in found.top)


def test_a_decoder_can_be_used_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = model_of("llama"), questions()
    expected = alone(model, prompts[:4])
    with Decoder(model, slots=4, eos=EOS, pad=PAD) as decoder:
        for question in prompts:
            decoder.submit(question)
        decoder.step()
        with monkeypatch.context() as broken:
            broken.setattr(model, "forward", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                decoder.step()
        decoder.clear()
        assert not decoder.running
        assert not decoder.waiting
        answers = [decoder.submit(question) for question in prompts[:4]]
        drive(decoder)
    assert [answer.tokens for answer in answers] == expected


def test_short_answers_after_long_ones_read_a_short_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    widths = []
    forward: Callable[..., Any] = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **kwargs: widths.append(kwargs["attention_mask"].shape[1]) or forward(**kwargs)
    )
    with Decoder(model, slots=4, eos=-1, pad=PAD) as decoder:
        for length in (60, 5):
            decoder.submit(Question([7] * length, 3))
            drive(decoder)
    assert widths[:3] == [60, 96, 96]
    assert widths[3:] == [5, 32, 32]


# --- bounds of memory -------------------------------------------------------------------------------------------------


def test_rows_times_columns_of_the_cache_stay_within_their_bound() -> None:
    model, prompts = model_of("llama"), questions()
    long = [Question([*range(3, 43)], 9), Question([*range(3, 38)], 2)]
    prompts = [*prompts[:9], long[0], *prompts[9:18], long[1], *prompts[18:]]
    expected = alone(model, prompts)
    for slots, bound in ((8, 8 * 32), (8, 3 * 64), (3, 64), (1, 64), (8, 10_000)):
        with Decoder(model, slots=slots, eos=EOS, pad=PAD, cache_tokens=bound) as decoder:
            answers = [decoder.submit(question) for question in prompts]
            most = 0
            while decoder.running or decoder.waiting:
                most = max(most, len(decoder.step()))
                for layer in decoder._batch.cache.layers:
                    for buffer in (layer.keys, layer.values):
                        rows, _, width, _ = buffer.shape
                        assert rows <= slots
                        assert rows * width <= bound
            assert [answer.tokens for answer in answers] == expected
        assert most >= min(slots, bound // 64)  # most answers end within 64 tokens, and run beside each other


def test_short_answers_after_a_long_one_have_the_whole_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    shapes = spy(model, monkeypatch)
    with Decoder(model, slots=4, eos=-1, pad=PAD, cache_tokens=4 * 32) as decoder:
        decoder.submit(Question([5] * 60, 3))
        decoder.submit(Question([5] * 4, 8))
        for _ in range(3):
            decoder.submit(Question([6] * 4, 2))
        drive(decoder)
    assert shapes[:3] == [(1, 60), (1, 1), (1, 1)]
    assert shapes[3] == (4, 4)


def test_a_question_longer_than_the_bound_is_answered_alone() -> None:
    model = model_of("llama")
    prompts = [Question([*range(3, 53)], 6), Question([5, 6], 6), Question([*range(5, 50)], 6)]
    with Decoder(model, slots=4, eos=-1, pad=PAD, cache_tokens=32) as decoder:
        answers = [decoder.submit(question) for question in prompts]
        while decoder.running or decoder.waiting:
            assert len(decoder.step()) == 1
    assert [answer.tokens for answer in answers] == alone(model, prompts, -1)


def test_prompts_are_prefilled_within_a_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = model_of("llama"), questions(rows=4)
    prompts += [Question([*range(3, 3 + n)], 4, "rte") for n in (40, 33, 17, 16, 8)]
    expected = alone(model, prompts)
    prefixes = {task: Prefix(prompts[i].prompt[:18]) for i, task in enumerate(TASKS) if task != "rte"}
    shapes = spy(model, monkeypatch)
    with Decoder(model, slots=32, eos=EOS, pad=PAD, prefill_tokens=16) as decoder:
        answers = [decoder.submit(question, prefixes.get(question.task)) for question in prompts]
        drive(decoder)
    assert [answer.tokens for answer in answers] == expected
    read = [rows * width for rows, width in shapes if width > 1]
    assert max(read) == 16
    assert shapes.count((1, 16)) == 2 + 2 + 2 + 1 + 1  # two shared prefixes, and four long prompts, in parts


def test_short_answers_join_one_that_ran_beside_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    prompts = [Question([5] * 40, 3), Question([7, 8], 14), *(Question([9, token], 4) for token in range(10, 14))]
    expected = alone(model, prompts, -1)
    shapes = spy(model, monkeypatch)
    with Decoder(model, slots=8, eos=-1, pad=PAD, cache_tokens=4 * 32) as decoder:
        answers = [decoder.submit(question) for question in prompts]
        drive(decoder)
    assert [answer.tokens for answer in answers] == expected
    assert shapes[:4] == [(2, 40), (2, 1), (2, 1), (3, 2)]  # two rows of 64 columns, then four of 32


def test_a_prompt_that_is_read_in_parts_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the keys and values of one such prompt at most are kept twice."""
    model = model_of("llama")
    prompts = [Question([*range(3, 3 + n)], 2) for n in (20, 20, 3, 3)]
    expected = alone(model, prompts, -1)
    shapes = spy(model, monkeypatch)
    with Decoder(model, slots=8, eos=-1, pad=PAD, prefill_tokens=8) as decoder:
        answers = [decoder.submit(question) for question in prompts]
        drive(decoder)
    assert [answer.tokens for answer in answers] == expected
    assert shapes == [*[(1, 8), (1, 8), (1, 3), (1, 1)] * 2, (2, 3), (4, 1)]

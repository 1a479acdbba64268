# SPDX-License-Identifier: Apache-2.0
"""The official client of OpenAI gets the answers of `dyads generate`, whatever other requests run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from dyads.runs.folder import RunFolder
from dyads.scoring.decode import Answer, Decoder
from dyads.scoring.evaluate import generate
from dyads.serving.server import Server
from made_runs import TASKS
from made_servers import served, wait_until

WORDS = ("fox lamp river", "tree stone tree fox", "river", "lamp fox stone tree river fox")


@pytest.fixture(scope="module")
def server(made: dict[str, RunFolder]) -> Iterator[Server]:
    with served(made, slots=4) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(client: OpenAI, model: str, text: str, **options: Any) -> str:
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)
    return answer.choices[0].message.content or ""


def generated(run: RunFolder, task: str, texts: tuple[str, ...]) -> list[str]:
    template = run.templates()[task]
    examples = [template.example({template.input_column or "input": text}) for text in texts]
    return generate(run, examples, [task] * len(texts), batch_size=1)


@pytest.fixture(scope="module")
def expected(made: dict[str, RunFolder]) -> dict[tuple[str, str], str]:
    """Greedy answers by model and input."""
    return {
        (f"{name}/{task}", text): answer
        for name, run in made.items()
        for task in TASKS
        for text, answer in zip(WORDS, generated(run, task, WORDS), strict=True)
    }


def test_models_are_the_base_and_every_task_of_every_run(client: OpenAI, made: dict[str, RunFolder]) -> None:
    names = {model.id for model in client.models.list()}
    assert client.models.retrieve("more/first_word").id == "more/first_word"
    with pytest.raises(NotFoundError):
        client.models.retrieve("more/last_word")
    assert names == {"tiny-llama", "mode", "lora", *(f"{run}/{task}" for run in made for task in TASKS)}


def test_greedy_answers_are_those_of_generate_with_all_tasks_at_once(
    client: OpenAI, expected: dict[tuple[str, str], str]
) -> None:
    assert len(set(expected.values())) > 6
    asked = [*expected, *expected][::-1]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda key: said(client, *key), asked))
    assert found == [expected[key] for key in asked]


def test_a_stream_has_the_same_text(client: OpenAI, expected: dict[tuple[str, str], str]) -> None:
    model, text = f"more/{TASKS[0]}", WORDS[1]
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected[model, text]
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] in (
        ["stop"],
        ["length"],
    )
    usage = chunks[-1].usage
    whole = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}])
    assert usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_a_whole_prompt_is_read_as_generate_reads_it(client: OpenAI, made: dict[str, RunFolder]) -> None:
    prompt = "Words: fox lamp\nAnswer: "
    expected = generate(made["more"], [prompt], [TASKS[1]])
    found = client.completions.create(model=f"more/{TASKS[1]}", prompt=prompt)
    assert [found.choices[0].text] == expected
    expected = generate(made["mode"], [prompt], [None])
    stream = client.completions.create(model="mode", prompt=[prompt], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]


def test_a_seed_gives_one_answer_alone_and_among_others(client: OpenAI) -> None:
    def drawn(seed: int) -> str:
        return said(client, "mode/first_word", WORDS[0], temperature=1.5, top_p=0.95, seed=seed, max_tokens=20)

    alone = [drawn(seed) for seed in range(4)]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(said, client, "lora", "fox", temperature=1.0, max_tokens=40) for _ in range(8)]
        among = list(pool.map(drawn, range(4)))
        assert all(other.result() is not None for other in others)
    assert among == alone


def test_an_answer_ends_before_a_stop_string_that_several_tokens_make(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny-llama", "prompt": "fox lamp", "max_tokens": 30, "temperature": 1}
    for seed in range(9):
        whole = client.completions.create(**options, seed=seed).choices[0].text
        words = whole.split(" ")
        if len(words) > 12:
            break
    options["seed"] = seed
    stop = f"{words[7][-1]} {words[8]} {words[9][0]}"
    at = whole.index(stop)
    for stops in (stop, ["never that", stop]):
        found = client.completions.create(**options, stop=stops)
        assert found.choices[0].text == whole[:at]
        assert found.choices[0].finish_reason == "stop"
        assert found.usage is not None
        assert found.usage.completion_tokens < 30
        stream = client.completions.create(**options, stop=stops, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == whole[:at]
    longer = client.completions.create(**options, stop=stop + " never")
    assert longer.choices[0].text == whole


def test_log_probabilities_come_with_every_token(client: OpenAI) -> None:
    found = client.chat.completions.create(
        model="more/first_word",
        messages=[{"role": "user", "content": WORDS[0]}],
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert bytes(token.bytes or []).decode() == token.token
    plain = client.completions.create(model="tiny-llama", prompt="fox", max_tokens=4, logprobs=2, temperature=0)
    details = plain.choices[0].logprobs
    assert details is not None
    assert details.tokens is not None
    assert details.top_logprobs is not None
    assert len(details.tokens) == 4
    for token, value, top in zip(details.tokens, details.token_logprobs or [], details.top_logprobs, strict=True):
        assert top[token] == value == max(top.values())


def test_limits_of_an_answer_end_it(client: OpenAI) -> None:
    found = client.completions.create(model="tiny-llama", prompt="fox", max_tokens=3)
    assert found.usage is not None
    assert found.usage.completion_tokens == 3
    assert found.choices[0].finish_reason == "length"
    with pytest.raises(BadRequestError, match="max_tokens is 5000, and the server writes at most 1024 tokens"):
        client.completions.create(model="tiny-llama", prompt="fox", max_tokens=5000)
    with pytest.raises(BadRequestError, match="reads 127") as refusal:
        client.completions.create(model="tiny-llama", prompt="fox " * 200)
    assert refusal.value.code == "context_length_exceeded"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n: "),
    ({"temperature": 3}, "temperature: "),
    ({"top_p": -1}, "top_p: "),
    ({"presence_penalty": 0.5}, "presence_penalty: "),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias: "),
    ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
    ({"extra_body": {"best": 1}}, "unknown key 'best'"),
    ({"extra_body": {"columns": {"words": "a"}}}, "unknown column 'words'"),
    ({"messages": []}, "messages: "),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "reads one message"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_the_server_does_not_have_is_refused(client: OpenAI, changes: dict[str, Any], message: str) -> None:
    body: dict[str, Any] = {"model": "more/first_word", "messages": [{"role": "user", "content": "fox"}], **changes}
    with pytest.raises(BadRequestError) as refusal:
        client.chat.completions.create(**body)
    assert message in refusal.value.message
    assert refusal.value.type == "invalid_request_error"


def test_an_unknown_model_is_refused_with_the_nearest_names(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="did you mean 'more/first_word'") as refusal:
        said(client, "more/frist_word", "fox")
    assert refusal.value.code == "model_not_found"
    with pytest.raises(NotFoundError):  # the gates need a task
        said(client, "more", "fox")


def test_a_conversation_with_a_model_without_a_task(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="mode",
        messages=[
            {"role": "system", "content": "fox"},
            {"role": "user", "content": [{"type": "text", "text": "lamp"}, {"type": "text", "text": " river"}]},
        ],
        max_tokens=4,
    )
    transcript = client.completions.create(model="mode", prompt="fox\n\nUser: lamp river\nAssistant:", max_tokens=4)
    assert answer.choices[0].message.content == transcript.choices[0].text


def test_a_cancelled_stream_frees_its_row(client: OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Decoder.step

    def slowly(self: Decoder) -> list[Answer]:  # or the answer ends before its client is gone
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Decoder, "step", slowly)
    stream = client.completions.create(model="tiny-llama", prompt="fox", max_tokens=100, stream=True)
    wait_until(lambda: server.engine.running == 1)  # not for text: the first tokens may have none
    stream.close()
    wait_until(lambda: server.engine.is_idle)
    assert 'dyads_requests_total{model="tiny-llama",outcome="cancelled"}' in server.engine.metrics.text().decode()

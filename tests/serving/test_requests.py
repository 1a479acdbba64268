# SPDX-License-Identifier: Apache-2.0
"""Requests that are malformed, too large, too many, unauthorised, slow or dropped, and errors of the model."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from click.testing import CliRunner

from dyads.cli import main
from dyads.errors import ConfigError
from dyads.runs.folder import RunFolder
from dyads.serving.connection import Connection
from dyads.serving.errors import ServingError
from dyads.serving.limits import Keys, Limits, RateLimit
from dyads.serving.server import Options, Server
from made_servers import served, wait_until

KEY = {"Authorization": "Bearer one"}
SPECIAL = {"<pad>", "<s>", "</s>", "<unk>"}
PROMPT = {"model": "tiny-llama", "prompt": "fox lamp", "max_tokens": 4}


@pytest.fixture(scope="module")
def server(made: dict[str, RunFolder]) -> Iterator[Server]:
    limits = Limits(body_bytes=2000, keys=Keys(["one", "schlüssel"]), rate=RateLimit(60, burst=100_000))
    with served({"more": made["more"]}, slots=2, waiting=3, prompt_tokens=40, limits=limits) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, headers=KEY, timeout=60) as client:
        yield client


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


class Gate:
    """Holds the model's forward passes back until it is opened."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        (batch,) = server.models.batches
        step: Callable[[], Any] = batch.decoder.step
        monkeypatch.setattr(batch.decoder, "step", lambda: self.opened.wait(60) and step())


@pytest.fixture
def gate(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(server, monkeypatch)
    yield gate
    gate.opened.set()
    wait_until(lambda: server.engine.is_idle)


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "there is no body"),
        (b"{", "the body is not JSON"),
        (b"[1, 2]", "the body: "),
        (b"\xff\xfe{}", "the body is not JSON"),
        (b"[" * 1900, "the body"),
        (b'{"model": "tiny-llama", "prompt": "half \\ud800"}', "prompt: Input should be a valid string"),
        (b'{"model": "tiny-llama", "prompt": "a", "temperature": NaN}', "temperature: "),
        (b'{"model": "tiny-llama", "prompt": "a", "seed": 1e400}', "seed: "),
        (b'{"model": "tiny-llama", "prompt": "a", "seed": ' + b"9" * 60 + b"}", "seed: "),
        (b'{"model": "tiny-llama", "prompt": "a", "max_tokens": true}', "max_tokens: "),
        (b'{"model": "tiny-llama", "prompt": [5, 100000]}', "token 100000 is not among the"),
        (b'{"model": "tiny-llama", "prompt": [5, -1]}', "prompt.1: "),
        (b'{"model": "tiny-llama", "prompt": ["a", "b"]}', "prompt"),
        (b'{"model": "tiny-llama", "prompt": " "}', "the prompt is empty"),
        (b'{"model": null, "prompt": "a"}', "model: "),
        (b'{"model": "tiny-llama"}', "prompt: "),
        (b'{"model": "tiny-llama", "prompt": "a", "top-k": 5}', "unknown key 'top-k'"),
        (
            b'{"model": "tiny-llama", "prompt": "' + b"fox " * 60 + b'"}',
            "the prompt has 60 tokens, and 'tiny-llama' reads 40",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_bodies_are_refused(client: httpx.Client, body: bytes, message: str) -> None:
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert message in error_of(response, 400)["message"]


def test_a_body_of_another_type_is_refused(client: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = client.post("/v1/completions", content=json.dumps(PROMPT), headers={"Content-Type": kind})
        error_of(response, 400)


def test_bodies_that_are_too_large_are_refused_however_they_are_sent(client: httpx.Client) -> None:
    large = json.dumps({**PROMPT, "prompt": "x" * 3000}).encode()
    whole = client.post("/v1/completions", content=large)
    in_chunks = client.post("/v1/completions", content=iter([large[:1500], large[1500:]]))
    for response in (whole, in_chunks):
        assert error_of(response, 413)["message"] == "the body has more than 2,000 bytes"


def test_a_body_that_does_not_come_is_given_up(client: httpx.Client, server: Server) -> None:
    limits = server.options.limits
    limits.body_seconds, before = 0.2, limits.body_seconds
    try:
        with _connected(server) as sock:
            sock.sendall(_request(b"{}", length=500))
            assert b" 408 " in sock.recv(1000)
    finally:
        limits.body_seconds = before


def test_other_paths_and_methods_are_refused_in_the_same_form(client: httpx.Client) -> None:
    assert "there is no such path" in error_of(client.get("/v1/embeddings"), 404)["message"]
    error_of(client.get("/v1/completions"), 405)
    assert client.get("/docs").status_code == 404


# --- keys, rate, host -------------------------------------------------------------------------------------------------


def test_keys_are_needed_where_there_are_some(client: httpx.Client, server: Server) -> None:
    for header in ("", "Bearer two", "Bearer", "one", "Basic one", "Bearer one two"):
        response = httpx.get(f"{server.address}/v1/models", headers={"Authorization": header})
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    error_of(httpx.get(f"{server.address}/metrics"), 401)
    error_of(httpx.post(f"{server.address}/v1/completions", json=PROMPT), 401)
    assert client.get("/v1/models").status_code == 200
    second = {b"Authorization": "Bearer schlüssel".encode()}
    assert httpx.get(f"{server.address}/v1/models", headers=second).status_code == 200
    for path in ("/health", "/ready", "/"):
        assert httpx.get(server.address + path).status_code == 200


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n  two \n")
    assert [Keys.of_file(file).check(b"Bearer " + key) for key in (b"one", b"two")] == [0, 1]
    with pytest.raises(ServingError):
        Keys.of_file(file).check(b"Bearer # ours")
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="has no API key: write one a line"):
        Keys.of_file(file)
    with pytest.raises(ConfigError, match="cannot read the API keys"):
        Keys.of_file(tmp_path / "absent")


def test_requests_a_minute_are_counted_for_every_client() -> None:
    now = [0.0]
    limit = RateLimit(30, burst=2, clock=lambda: now[0])
    for client in ("a", "b"):
        limit.check(client)
        limit.check(client)
    with pytest.raises(ServingError, match="more than 30 requests a minute: try again in 2 s") as refusal:
        limit.check("a")
    assert refusal.value.headers == {"Retry-After": "2"}
    now[0] = 2.1
    limit.check("a")
    with pytest.raises(ServingError):
        limit.check("a")
    now[0] = 1000.0
    limit.check("a")
    limit.check("a")
    with pytest.raises(ServingError):
        limit.check("a")
    for client in range(20_000):  # type: ignore[assignment]
        limit.check(client)
    assert len(limit._buckets) <= 10_000


def test_a_client_with_too_many_requests_waits(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.options.limits, "rate", RateLimit(1, burst=1))
    codes = [httpx.get(f"{server.address}/v1/models", headers=KEY) for _ in range(2)]
    assert codes[0].status_code == 200
    assert error_of(codes[1], 429)["type"] == "rate_limit_error"
    assert 0 < int(codes[1].headers["retry-after"]) <= 60


def test_the_address_in_a_header_is_not_believed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.options.limits, "keys", Keys())
    monkeypatch.setattr(server.options.limits, "rate", RateLimit(1, burst=1))
    statuses = []
    for header in ("X-Forwarded-For", "X-Real-IP", "Forwarded"):
        value = {"Forwarded": "for=10.0.0.9"}.get(header, "10.0.0.9")
        statuses.append(httpx.get(f"{server.address}/v1/models", headers={header: value}).status_code)
    assert statuses == [200, 429, 429]


def test_the_address_in_a_header_of_a_trusted_proxy_is_that_of_the_client(made: dict[str, RunFolder]) -> None:
    limits = Limits(rate=RateLimit(1, burst=1))
    with served({"more": made["more"]}, limits=limits, trusted_proxies=["127.0.0.0/8"]) as behind:
        for address, status in (("10.0.0.1", 200), ("10.0.0.2", 200), ("10.0.0.1", 429), ("10.9.9.9, 10.0.0.2", 429)):
            response = httpx.get(f"{behind.address}/v1/models", headers={"X-Forwarded-For": address})
            assert response.status_code == status, address


@pytest.mark.parametrize("given", ["*", "localhost", "10.0.0.1/8"])
def test_a_trusted_proxy_is_an_address_or_a_network(made: dict[str, RunFolder], given: str) -> None:
    arguments = ["serve", str(made["more"].path), "--port", "0", "--trusted-proxy", given]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--trusted-proxy takes an address or a network" in " ".join(result.output.split())


def test_wrong_keys_are_limited_before_a_right_one_could_be_found(
    server: Server, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.options.limits, "wrong_keys", RateLimit(0.5, burst=2))
    for _ in range(5):
        assert client.get("/v1/models").status_code == 200  # right keys do not count
    for path in ("/v1/models", "/metrics"):
        error_of(httpx.get(server.address + path, headers={"Authorization": "Bearer guess"}), 401)
    refused = httpx.post(f"{server.address}/v1/completions", json=PROMPT)
    assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
    assert 0 < int(refused.headers["retry-after"]) <= 120
    error_of(client.get("/v1/models"), 429)
    assert client.get("/health").status_code == 200


def test_wrong_keys_are_limited_by_default(made: dict[str, RunFolder]) -> None:
    limits = Limits(keys=Keys(["one"]))
    with served({"more": made["more"]}, limits=limits) as server, httpx.Client(base_url=server.address) as client:
        statuses = [client.get("/v1/models").status_code for _ in range(30)]
    assert statuses == [401] * 20 + [429] * 10


def test_a_page_of_another_name_cannot_reach_a_server_on_loopback(client: httpx.Client, server: Server) -> None:
    port = server.address.rpartition(":")[2]
    assert error_of(client.get("/health", headers={"Host": f"evil.example:{port}"}), 400)["code"] == "wrong_host"
    for host in ("localhost", f"127.0.0.1:{port}", "[::1]", f"[::1]:{port}", "LOCALHOST"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    for host in ("", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:80:80", "[::1].evil.example"):
        assert error_of(client.get("/v1/models", headers={"Host": host}), 400)["code"] == "wrong_host", host


def test_other_names_of_the_server_are_given(made: dict[str, RunFolder]) -> None:
    with served({"more": made["more"]}, allowed_hosts=["Models.example:443"]) as named:
        for host, status in (("models.example:80", 200), ("localhost", 200), ("evil.example", 400)):
            assert httpx.get(f"{named.address}/health", headers={"Host": host}).status_code == status
        with socket.create_connection(httpx.URL(named.address).netloc.decode().split(":")) as probe:
            probe.sendall(b"GET /health HTTP/1.0\r\n\r\n")  # no browser leaves the header out
            assert probe.recv(100).split()[1] == b"200"
        refused = httpx.get(f"{named.address}/health", headers={"Host": "evil.example"})
        assert "--allowed-host evil.example" in error_of(refused, 400)["message"]
    with served({"more": made["more"]}, allowed_hosts=["*"]) as named:
        assert httpx.get(f"{named.address}/health", headers={"Host": "any.example"}).status_code == 200


def test_a_server_for_other_machines_answers_to_its_name_and_to_addresses(made: dict[str, RunFolder]) -> None:
    with served({"more": made["more"]}, host="0.0.0.0") as open_:
        port = open_.address.rpartition(":")[2]
        own = f"http://127.0.0.1:{port}/health"
        for host, status in ((socket.gethostname(), 200), ("192.0.2.7:80", 200), ("[2001:db8::1]", 200), ("x.y", 400)):
            assert httpx.get(own, headers={"Host": host}).status_code == status, host


# --- connections ------------------------------------------------------------------------------------------------------


def _read_until(sock: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        new = sock.recv(1000)
        assert new, received
        received += new
    return received


def _is_closed(sock: socket.socket) -> bool:
    """Whether the server closes the connection, within the seconds of its timeout."""
    try:
        while received := sock.recv(1000):
            assert received
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    ("before", "begun"),
    [
        (b"", b""),
        (b"", b"GET /hea"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /health HTTP/1.1\r\nHo"),
    ],
)
def test_a_connection_whose_header_does_not_come_is_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch, before: bytes, begun: bytes
) -> None:
    """Sent byte by byte, on a new connection and after an answer."""
    monkeypatch.setattr(server.options.limits, "header_seconds", 0.5)
    with _connected(server) as sock:
        sock.sendall(before)
        if before:
            _read_until(sock, b'"ok"')
        began = time.monotonic()
        for byte in begun:
            with suppress(OSError):
                sock.sendall(bytes([byte]))
                time.sleep(0.03)
        assert _is_closed(sock)
        assert time.monotonic() - began < 30


def test_a_header_that_comes_in_parts_is_read(server: Server) -> None:
    with _connected(server) as sock:
        for _ in range(2):
            for part in (b"GET /health HT", b"TP/1.1\r\nHost: localhost\r\n", b"\r\n"):
                sock.sendall(part)
                time.sleep(0.02)
            _read_until(sock, b'"ok"')


def test_an_answer_may_take_longer_than_a_header(
    server: Server, client: httpx.Client, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.options.limits, "header_seconds", 0.1)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/v1/completions", json=PROMPT)
        wait_until(lambda: server.engine.waiting == 1)
        time.sleep(0.3)
        gate.opened.set()
        assert asked.result().status_code == 200


def test_connections_beyond_the_limit_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = server.server_state.connections
    wait_until(lambda: not open_)
    monkeypatch.setattr(server.options.limits, "connections", 2)
    with _connected(server) as first, _connected(server) as second:
        wait_until(lambda: len(open_) == 2)
        with _connected(server) as third:
            received = _read_until(third, b"}}")
            assert received.startswith(b"HTTP/1.1 503 ")
            assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "connections"
            assert _is_closed(third)
        first.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        _read_until(first, b'"ok"')
        second.close()
        wait_until(lambda: len(open_) == 1)
        assert httpx.get(f"{server.address}/health").status_code == 200


def test_a_connection_that_does_not_read_its_answer_is_closed() -> None:
    """With an answer that is larger than the buffers of the sockets."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (64 << 20)})

    limits = Limits(reading_seconds=0.3)
    config: dict[str, Any] = {"http": partial(Connection, limits=limits), "lifespan": "off", "log_config": None}
    server = uvicorn.Server(uvicorn.Config(app, port=0, **config))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        open_ = server.server_state.connections
        with socket.create_connection(listening.getsockname()) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_until(lambda: len(open_) == 1)
            wait_until(lambda: not open_)
    finally:
        server.should_exit = True
        thread.join()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_cache_of_a_server_is_bounded(made: dict[str, RunFolder]) -> None:
    with served({"more": made["more"]}, slots=8, cache_tokens=128, prefill_tokens=16) as small:
        (batch,) = small.models.batches

        def ask(words: int) -> dict[str, Any]:
            body = {"model": "tiny-llama", "prompt": "fox " * words, "max_tokens": 60}
            found: dict[str, Any] = httpx.post(f"{small.address}/v1/completions", json=body, timeout=60).json()
            return found

        with ThreadPoolExecutor(12) as pool:
            sizes = [100, 3, 3, 80, 3, 3, 3, 111, 3, 3, 3, 40]
            answers = list(pool.map(ask, sizes))
        for words, answer in zip(sizes, answers, strict=True):
            assert answer["usage"]["prompt_tokens"] == words
            assert answer["usage"]["total_tokens"] <= 112
            assert answer["choices"][0]["finish_reason"] in ("stop", "length")
        assert "the prompt has 112 tokens, and 'tiny-llama' reads 111" in ask(112)["error"]["message"]
        for layer in batch.decoder._batch.cache.layers:
            rows, _, width, _ = layer.keys.shape
            assert rows * width <= 128
        assert [answer["choices"][0]["text"] for answer in answers[1:3]] == [answers[1]["choices"][0]["text"]] * 2


# --- errors in the parts of a body ------------------------------------------------------------------------------------


def test_an_error_names_the_part_of_the_body_that_it_is_in(client: httpx.Client) -> None:
    def param(path: str, **body: Any) -> Any:
        return error_of(client.post(path, json={"model": "tiny-llama", **body}), 400)["param"]

    long = "fox " * 60
    assert param("/v1/completions", prompt=long) == "prompt"
    assert param("/v1/completions", prompt=" ") == "prompt"
    assert param("/v1/completions", prompt=[5] * 60) == "prompt"
    assert param("/v1/completions", prompt=[100_000]) == "prompt"
    for model in ("tiny-llama", "more/first_word"):
        assert param("/v1/chat/completions", model=model, messages=[{"role": "user", "content": long}]) == "messages"


def test_offsets_of_tokens_are_their_places_in_the_text(client: httpx.Client) -> None:
    body = {"model": "tiny-llama", "prompt": "fox lamp", "max_tokens": 30, "logprobs": 0, "temperature": 1.5, "seed": 4}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert len(offsets) == len(tokens) > 5
    for token, offset in zip(tokens, offsets, strict=True):
        # Special tokens have no text, and words have spaces between them.
        assert token in SPECIAL or choice["text"][offset:].lstrip().startswith(token)
    assert offsets == sorted(offsets)
    stream = client.post("/v1/completions", json={**body, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in stream.split("\n") if line.startswith("data: {")]
    found = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert [offset for one in found for offset in one] == offsets


# --- queue, readers, clients ------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_readiness_says_so(client: httpx.Client, gate: Gate, server: Server) -> None:
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(client.post, "/v1/completions", json=PROMPT) for _ in range(3)]
        wait_until(lambda: server.engine.waiting == 3)
        refused = client.post("/v1/completions", json=PROMPT)
        assert error_of(refused, 503)["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1"
        error_of(client.get("/ready"), 503)
        assert client.get("/health").status_code == 200
        metrics = client.get("/metrics").text
        assert "dyads_waiting 3.0" in metrics
        assert 'dyads_refused_total{status="503"}' in metrics
        gate.opened.set()
        assert len({one.result().json()["choices"][0]["text"] for one in asked}) == 1
    assert client.get("/ready").json() == {"status": "ready"}


def _connected(server: Server) -> socket.socket:
    host, port = server.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def _request(body: bytes, length: int | None = None) -> bytes:
    headers = {
        "Host": "localhost",
        "Authorization": "Bearer one",
        "Content-Type": "application/json",
        "Content-Length": length or len(body),
    }
    lines = ["POST /v1/completions HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.mark.parametrize("stream", [True, False])
def test_the_row_of_a_client_that_is_gone_leaves_the_batch(
    client: httpx.Client, gate: Gate, server: Server, stream: bool
) -> None:
    with _connected(server) as sock:
        sock.sendall(_request(json.dumps({**PROMPT, "max_tokens": 90, "stream": stream}).encode()))
        wait_until(lambda: server.engine.waiting == 1)
    before = _outcomes(client)["cancelled"]
    gate.opened.set()
    wait_until(lambda: server.engine.is_idle)
    assert _outcomes(client)["cancelled"] == before + 1
    answer = client.post("/v1/completions", json=PROMPT).json()
    assert answer["usage"]["completion_tokens"] == 4


def _outcomes(client: httpx.Client) -> dict[str, float]:
    pairs = re.findall(r'dyads_requests_total\{model="tiny-llama",outcome="(\w+)"\} (\S+)', client.get("/metrics").text)
    return {"cancelled": 0.0, **{name: float(value) for name, value in pairs}}


def test_a_slow_reader_holds_up_no_other_and_gets_everything(client: httpx.Client, server: Server) -> None:
    with _connected(server) as sock:
        body = {**PROMPT, "max_tokens": 80, "temperature": 1.0, "seed": 5, "logprobs": 5, "stream": True}
        sock.sendall(_request(json.dumps(body).encode()))
        for _ in range(3):
            assert client.post("/v1/completions", json=PROMPT).status_code == 200
        wait_until(lambda: server.engine.is_idle)
        received = b""
        while b"[DONE]" not in received:
            received += sock.recv(97)
    texts = re.findall(rb'"text": "([^"]*)"', received)
    whole = client.post("/v1/completions", json={**body, "stream": False}).json()
    assert b"".join(texts).decode() == whole["choices"][0]["text"]


def test_a_client_that_never_reads_is_dropped(server: Server) -> None:
    """On the response itself, since the buffers of a socket hold a whole answer."""
    from dyads.serving.engine import Piece
    from dyads.serving.responses import AnswerResponse, Form

    cancelled: list[Any] = []
    ended: list[Any] = []

    async def ask() -> None:
        pieces = asyncio.Queue[Piece]()
        pieces.put_nowait(Piece("a"))

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(60)

        async def receive() -> Any:
            await asyncio.sleep(60)

        class Job:
            model, answer_tokens = "m", 1

        form = Form(Job(), False, None, str)  # type: ignore[arg-type]
        how: dict[str, Any] = {"stream": True, "cancel": cancelled.append, "ended": ended.append}
        await AnswerResponse(form, pieces, reading_seconds=0.05, **how)({"type": "http"}, receive, send)

    asyncio.run(ask())
    assert len(cancelled) == 1
    assert ended == [None]


# --- errors, logs, page -----------------------------------------------------------------------------------------------


def test_an_error_of_the_model_ends_its_requests_and_no_others(
    client: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (batch,) = server.models.batches

    def fail() -> Any:
        raise RuntimeError("out of memory, at fox lamp")

    with monkeypatch.context() as broken, caplog.at_level(logging.INFO, "dyads.serving"):
        broken.setattr(batch.decoder, "step", fail)
        assert error_of(client.post("/v1/completions", json=PROMPT), 500)["type"] == "server_error"
        stream = client.post("/v1/completions", json={**PROMPT, "stream": True})
        events = [line for line in stream.text.split("\n") if line]
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "internal_error"
        assert events[-1] == "data: [DONE]"
    assert client.post("/v1/completions", json=PROMPT).status_code == 200
    assert "a request failed: RuntimeError at test_requests.py:" in caplog.text
    assert "fox" not in caplog.text
    assert "Traceback" not in caplog.text


def test_an_error_in_the_text_of_one_answer_ends_that_one_only(
    client: httpx.Client, server: Server, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.models.models["more/first_word"]
    monkeypatch.setattr(type(model.tokenizer), "text_of", _failing_for(model.tokenizer))
    chat = {"model": "more/first_word", "messages": [{"role": "user", "content": "fox"}]}
    with ThreadPoolExecutor(2) as pool:
        broken = pool.submit(client.post, "/v1/chat/completions", json=chat)
        sound = pool.submit(client.post, "/v1/completions", json=PROMPT)
        wait_until(lambda: server.engine.waiting == 2)
        gate.opened.set()
        error_of(broken.result(), 500)
        assert sound.result().json()["usage"]["completion_tokens"] == 4


def _failing_for(tokenizer: Any) -> Callable[..., str]:
    right = type(tokenizer).text_of

    def text_of(self: Any, ids: Any) -> str:
        if self is tokenizer:
            raise ValueError("no text")
        text: str = right(self, ids)
        return text

    return text_of


def test_text_is_logged_only_where_it_is_wanted(
    client: httpx.Client, server: Server, made: dict[str, RunFolder], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        client.post("/v1/completions", json=PROMPT)
        wait_until(lambda: "tiny-llama: 2 + 4 tokens" in caplog.text)
    assert "fox" not in caplog.text.replace(server.address, "")
    with served({"more": made["more"]}, log_text=True) as open_, caplog.at_level(logging.INFO, "dyads.serving"):
        answer = httpx.post(f"{open_.address}/v1/completions", json=PROMPT, timeout=60).json()
        wait_until(lambda: "prompt 'fox lamp', answer " in caplog.text)
        assert repr(answer["choices"][0]["text"]) in caplog.text


def test_metrics_count_tokens_and_time_by_model(client: httpx.Client) -> None:
    def value(name: str, text: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    body = {"model": "more/first_word", "messages": [{"role": "user", "content": "fox lamp"}], "max_tokens": 3}
    counted = ("prompt_tokens_total", "answer_tokens_total", "time_to_first_token_seconds_count")
    names = [f'dyads_{name}{{model="more/first_word"}}' for name in counted]
    before = client.get("/metrics").text
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    after = client.get("/metrics").text
    moved = [value(name, after) - value(name, before) for name in names]
    assert moved == [usage["prompt_tokens"], usage["completion_tokens"], 1]
    assert value("dyads_batch_rows_count", after) > value("dyads_batch_rows_count", before)
    assert value("dyads_running", after) == 0


def test_an_idle_engine_has_counted_every_request(
    client: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, idle = server.engine.metrics.ended, []
    monkeypatch.setattr(
        server.engine.metrics, "ended", lambda *given: idle.append(server.engine.is_idle) or ended(*given)
    )
    assert client.post("/v1/completions", json=PROMPT).status_code == 200
    assert idle == [False]


def test_the_page_stands_alone_and_inserts_text_only(client: httpx.Client) -> None:
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    page = response.text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://|src=|@import", page)
    assert "textContent" in page
    assert "light dark" in page


def test_an_engine_that_cannot_start_ends_its_requests_and_the_command(
    made: dict[str, RunFolder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With requests that come before and after the failure."""
    begun, answers = threading.Event(), list[httpx.Response]()

    def fail(self: Any) -> Any:
        begun.wait(60)
        raise RuntimeError("no memory for fox lamp")

    def ask(address: str) -> None:
        for stream in (True, False):
            with suppress(httpx.TransportError):
                answers.append(httpx.post(f"{address}/v1/completions", json={**PROMPT, "stream": stream}, timeout=60))

    server = Server({"more": made["more"]}, Options(port=0))
    monkeypatch.setattr(type(server.models.batches[0].decoder), "__enter__", fail)
    clients = [threading.Thread(target=ask, args=(server.address,)) for _ in range(3)]
    for client in clients:
        client.start()
    threading.Thread(target=lambda: (wait_until(lambda: server.engine.waiting == 3), begun.set())).start()
    with pytest.raises(ServingError, match=r"its engine failed: RuntimeError at test_requests.py:\d+$"):
        server.run()
    for client in clients:
        client.join()
    first = [response for response in answers if response.status_code == 200]
    assert len(first) == 3  # streams, which had begun
    for response in first:
        events = [line for line in response.text.split("\n") if line]
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "failed"
        assert events[-1] == "data: [DONE]"
    assert all(response.status_code == 503 for response in answers if response not in first)
    assert server.engine.is_idle
    assert "the engine failed: RuntimeError at test_requests.py:" in caplog.text
    assert "fox" not in caplog.text
    begun.set()
    result = CliRunner().invoke(main, ["serve", str(made["more"].path), "--port", "0"])
    assert result.exit_code == 2
    assert "its engine failed" in " ".join(result.output.split())


def test_a_stopping_server_ends_what_runs(made: dict[str, RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": "tiny-llama", "prompt": "fox", "max_tokens": 100, "temperature": 1, "seed": 3, "stream": True}
    for grace, ended in ((60.0, "finish"), (0.3, "error")):
        with served({"more": made["more"]}, grace_seconds=grace) as server:
            (batch,) = server.models.batches
            step: Callable[[], Any] = batch.decoder.step
            pause = 0.0 if ended == "finish" else 0.1
            monkeypatch.setattr(batch.decoder, "step", lambda s=step, p=pause: time.sleep(p) or s())
            with httpx.stream("POST", f"{server.address}/v1/completions", json=body, timeout=60) as stream:
                lines = stream.iter_lines()
                next(lines)
                server.should_exit = True
                wait_until(lambda s=server: not s.engine.is_ready)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            last = json.loads(rest[-2].removeprefix("data: "))
            if ended == "finish":
                assert last["choices"][0]["finish_reason"] in ("stop", "length")
            else:
                assert last["error"]["code"] == "stopping"
        assert server.engine.is_idle
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.address}/health")


def test_a_stopping_server_refuses_new_requests(client: httpx.Client, made: dict[str, RunFolder]) -> None:
    with served({"more": made["more"]}) as server:
        server.engine.close()
        error_of(httpx.get(f"{server.address}/ready"), 503)
        assert error_of(httpx.post(f"{server.address}/v1/completions", json=PROMPT), 503)["code"] == "stopping"

# SPDX-License-Identifier: Apache-2.0
"""Mixed load for a while: no wrong output, memory stays flat, no foreign traceback, and every stream ends.

SERVING_SECONDS sets how long it takes (60 by default); LOG.md has the outcome of ten minutes.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from dyads.runs.folder import RunFolder
from dyads.scoring.evaluate import generate
from dyads.serving.limits import Limits
from dyads.serving.server import Server
from launched import environment
from made_runs import TASKS
from made_servers import served, wait_until

SECONDS = float(os.environ.get("SERVING_SECONDS", "60"))
WORDS = ("fox lamp river", "tree stone tree fox", "river", "lamp fox stone tree river fox")
CLIENTS = 12


class Load:
    """Clients that behave well and badly, in turns drawn at random."""

    def __init__(self, server: Server, expected: dict[tuple[str, str], str]) -> None:
        self.server, self.expected = server, expected
        self.drawn: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.end = 0.0

    def client(self, number: int) -> None:
        draw = random.Random(number)
        kinds: list[Callable[[random.Random, httpx.Client], None]] = [
            self.answers, self.answers, self.streams, self.streams_slowly, self.draws,
            self.closes_a_stream, self.drops_its_connection, self.is_malformed, self.is_too_large,
        ]  # fmt: skip
        with httpx.Client(base_url=self.server.address, timeout=60) as http:
            while time.monotonic() < self.end:
                kind = draw.choice(kinds)
                try:
                    kind(draw, http)
                except Exception as error:
                    self.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}"[:300])
                self.counts[kind.__name__] += 1

    def _asked(self, draw: random.Random) -> tuple[str, str, dict[str, object]]:
        model, text = draw.choice(list(self.expected))
        return model, text, {"model": model, "messages": [{"role": "user", "content": text}]}

    def _check(self, kind: str, found: str, model: str, text: str) -> None:
        if found != self.expected[model, text]:
            self.wrong.append(f"{kind}: {model} answers {text!r} with {found!r}")

    def answers(self, draw: random.Random, http: httpx.Client) -> None:
        model, text, body = self._asked(draw)
        response = http.post("/v1/chat/completions", json=body)
        if response.status_code == 503:  # the queue is full
            return
        self._check("answers", response.json()["choices"][0]["message"]["content"], model, text)

    def streams(self, draw: random.Random, http: httpx.Client, pause: float = 0.0) -> None:
        model, text, body = self._asked(draw)
        said, ended = "", False
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            if response.status_code == 503:
                return
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    said += event["choices"][0]["delta"].get("content", "")
                    time.sleep(pause)
        assert ended, "the stream did not end"
        self._check("streams", said, model, text)

    def streams_slowly(self, draw: random.Random, http: httpx.Client) -> None:
        self.streams(draw, http, pause=0.05)

    def draws(self, draw: random.Random, http: httpx.Client) -> None:
        seed = draw.randrange(5)
        body = {"model": "lora", "prompt": "fox", "temperature": 1.0, "top_p": 0.9, "seed": seed, "max_tokens": 30}
        response = http.post("/v1/completions", json=body)
        if response.status_code == 200:
            text = response.json()["choices"][0]["text"]
            if self.drawn.setdefault(seed, text) != text:
                self.wrong.append(f"seed {seed} gives {text!r} and {self.drawn[seed]!r}")

    def closes_a_stream(self, draw: random.Random, http: httpx.Client) -> None:
        _, _, body = self._asked(draw)
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            next(response.iter_lines(), None)

    def drops_its_connection(self, draw: random.Random, http: httpx.Client) -> None:
        host, port = self.server.address.removeprefix("http://").split(":")
        body = json.dumps(self._asked(draw)[2]).encode()
        headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{headers}\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as sock:
            sock.sendall((head.encode() + body)[: draw.choice([30, 200, 10_000])])
            time.sleep(draw.choice([0, 0.01]))

    def is_malformed(self, draw: random.Random, http: httpx.Client) -> None:
        content = draw.choice([b"", b"{", b"[]", b'{"model": 1}', b"\xff", json.dumps({"model": "none"}).encode()])
        response = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
        assert 400 <= response.status_code < 500, response.text
        assert response.json()["error"]["message"]

    def is_too_large(self, draw: random.Random, http: httpx.Client) -> None:
        body = {"model": "tiny-llama", "prompt": "fox " * draw.choice([500, 5000])}
        assert http.post("/v1/completions", json=body).status_code in (400, 413)


@pytest.mark.slow
def test_mixed_load(made: dict[str, RunFolder], caplog: pytest.LogCaptureFixture) -> None:
    expected = {}
    for name, run in made.items():
        for task in TASKS:
            template = run.templates()[task]
            examples = [template.example({template.input_column or "input": text}) for text in WORDS]
            answers = generate(run, examples, [task] * len(WORDS), batch_size=1)
            expected |= {(f"{name}/{task}", text): answer for text, answer in zip(WORDS, answers, strict=True)}
    failures: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: failures.append(record.getMessage())  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING), served(made, slots=8, limits=Limits(body_bytes=10_000)) as server:
        logging.getLogger().addHandler(handler)
        load, memory = Load(server, expected), []
        begin = time.monotonic()
        load.end = begin + SECONDS
        threads = [threading.Thread(target=load.client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while time.monotonic() < load.end:
            time.sleep(SECONDS / 40)
            gc.collect()
            memory.append((time.monotonic() - begin, psutil.Process().memory_info().rss))
        for thread in threads:
            thread.join()
        wait_until(lambda: server.engine.is_idle)
    logging.getLogger().removeHandler(handler)
    print({"requests": sum(load.counts.values()), **load.counts})
    print([round(size / 1e6) for _, size in memory])
    assert (load.wrong, failures) == ([], [])
    assert min(load.counts.values()) > 5
    early = max(size for at, size in memory if SECONDS / 4 <= at < SECONDS / 2)  # after all buffers were needed once
    late = max(size for at, size in memory if at >= SECONDS * 3 / 4)
    assert late < 1.05 * early


@pytest.mark.slow
def test_a_command_stopped_by_sigterm_ends_its_streams_and_succeeds(made: dict[str, RunFolder]) -> None:
    command = [sys.executable, "-m", "dyads.cli", "serve", f"a={made['more'].path}", str(made["mode"].path)]
    process = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    names = []
    for line in process.stdout:
        if " models at " in line:
            break
        names.append(line.strip())
    address = line.split(" models at ")[1].split(" ")[0]
    assert names[:2] == ["tiny-llama", "a/first_word"]
    body = {"model": "tiny-llama", "prompt": "fox", "max_tokens": 100, "temperature": 1, "seed": 3, "stream": True}
    wait_until(lambda: _answers(f"{address[:-3]}/health"))
    with httpx.stream("POST", f"{address}/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == "stopped\n"
    assert "Traceback" not in err
    assert "fox" not in err


@pytest.mark.slow
def test_the_example_trains_serves_and_asks(made: dict[str, RunFolder], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(made["more"].recipe().resolved_yaml(), encoding="utf-8")
    example = Path(__file__).parents[2] / "examples" / "serve_openai_client.py"
    command = [sys.executable, str(example), str(recipe), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = [line.split(": ")[0] for line in done.stdout.splitlines() if line.startswith("run/")]
    assert said == [*(f"run/{task}" for task in TASKS), "run/first_word, drawn"]


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def test_the_run_of_a_name_is_found_or_refused(made: dict[str, RunFolder], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from dyads.cli import main

    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["serve", *arguments])
        assert result.exit_code == 2, result.output
        return " ".join(result.output.split())

    more, mode = (str(made[name].path) for name in ("more", "mode"))
    assert "are both called 'more': give one another name" in refused(more, f"more={mode}")
    assert "'a/b' is no name of a model" in refused(f"a/b={more}")
    assert "there is no folder" in refused(str(tmp_path / "absent"))
    assert "lets other machines send requests: add --api-keys FILE" in refused(more, "--host", "0.0.0.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1, port {port}" in refused(more, "--port", port)

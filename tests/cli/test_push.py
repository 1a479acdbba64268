# SPDX-License-Identifier: Apache-2.0
"""`dyads push` against a stand-in of the hub: a local server that keeps the files of a commit."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import close_session, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM

import dyads  # noqa: F401  # registers the methods with PEFT
import forked
from dyads.cli import main
from dyads.runs.folder import RunFolder

Trained = Callable[..., RunFolder]


class Hub(ThreadingHTTPServer):
    """Repositories in memory: their settings, and the files of their commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        hub, path = self.server, self.path.partition("?")[0]
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses:
            self._reply({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._reply({"url": f"{hub.address}/me/mine"})
        elif path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif path == "/api/models/me/mine/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            self._reply({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif path == "/api/models/me/mine/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    hub.messages.append(line["value"]["summary"])
                else:
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._reply({"commitUrl": f"{hub.address}/me/mine/commit/{'a' * 40}", "commitOid": "a" * 40})
        else:
            self._reply({"error": f"no such address: {path}"}, 404)

    def do_GET(self) -> None:
        self._reply({"error": "Repository not found"}, 401 if self.server.refuses else 404)

    def _reply(self, content: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def push(hub: Hub, run: RunFolder, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k.lower() not in ("http_proxy", "https_proxy", "all_proxy")}

    def work() -> None:
        constants.ENDPOINT, constants.HF_HUB_OFFLINE = hub.address, False  # read from the environment at import
        close_session()
        main(["push", str(run.path), *arguments])

    return forked.run(work, env={**environment, "HF_TOKEN": "hf_stand_in"})


def test_a_pushed_adapter_is_loaded_from_its_files(hub: Hub, trained: Trained, tmp_path: Path) -> None:
    run = trained("more")
    done = push(hub, run, "me/mine", "--private", "--licence", "Apache-2.0")
    assert (done.returncode, done.stdout) == (0, f"{hub.address}/me/mine\n"), done.stderr
    assert [(repository["name"], repository["organization"]) for repository in hub.created] == [("mine", "me")]
    assert "private" in str(hub.created[0].get("visibility", hub.created[0].get("private")))
    assert hub.tokens == {"Bearer hf_stand_in"}
    assert hub.messages == ["Adapter more"]
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "templates.json"}
    card = hub.files["README.md"].decode()
    assert "license: apache-2.0" in card
    assert 'PeftModel.from_pretrained(base, "me/mine")' in card
    for name, content in hub.files.items():
        assert str(run.path.parent).encode() not in content, f"{name} has a path of this machine"

    for name, content in hub.files.items():
        (tmp_path / "downloaded").mkdir(exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(content)
    ids, base = torch.tensor([[5, 6, 7]]), run.recipe().model.name
    logits = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(place))
        .eval()(input_ids=ids, task="has_animal")
        .logits
        for place in (run.adapter, tmp_path / "downloaded")
    ]
    assert torch.equal(*logits)


def test_a_refused_login_names_the_command_that_mends_it(hub: Hub, trained: Trained) -> None:
    hub.refuses = True
    done = push(hub, trained("lora"), "me/mine")
    assert done.returncode == 2
    assert "cannot upload to 'me/mine'" in done.stderr
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.files == {}


@pytest.mark.parametrize("name", ["mine", "me/mine/x", "me/-mine", "me/../x"])
def test_a_name_that_is_no_repository_is_refused_before_anything_is_sent(name: str, trained: Trained) -> None:
    result = CliRunner().invoke(main, ["push", str(trained("lora").path), name])
    assert result.exit_code == 2
    assert "write it as OWNER/NAME" in result.output


def test_without_a_connection_the_settings_to_check_are_named(trained: Trained) -> None:
    result = CliRunner().invoke(main, ["push", str(trained("lora").path), "me/mine"])  # HF_HUB_OFFLINE is set in tests
    assert result.exit_code == 2
    assert "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE" in result.output


def test_a_damaged_or_missing_adapter_is_refused(trained: Trained) -> None:
    run = trained("lora")
    (run.adapter / "adapter_config.json").write_text("{}")
    assert (
        "is damaged: adapter_config.json has 2 bytes" in CliRunner().invoke(main, ["push", str(run.path), "a/b"]).output
    )
    for path in run.adapter.iterdir():
        path.unlink()
    assert "has no adapter" in CliRunner().invoke(main, ["push", str(run.path), "a/b"]).output

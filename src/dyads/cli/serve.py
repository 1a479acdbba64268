# SPDX-License-Identifier: Apache-2.0
"""`dyads serve`: the models of runs behind an HTTP endpoint in OpenAI's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dyads.console import printable

if TYPE_CHECKING:
    from dyads.runs.folder import RunFolder


@click.command(
    short_help="Answer over HTTP, in OpenAI's protocol.",
    epilog="""\b
The model's name in a request chooses the task: RUN/TASK is a task of the run,
and the user's message is its input, as --input of `dyads generate`. RUN alone
is a run whose gates do not look at the task. The base model has its own name.
/v1/models lists all names. Answers are greedy unless the request has a
temperature. The page at / tries several tasks side by side. More is in
docs/serving.md.
\b
Examples:
  dyads serve runs/mine
  dyads serve runs/mine old=backup/mine --port 9000
  dyads serve runs/mine --host 0.0.0.0 --api-keys keys.txt --rate 60""",
)
@click.argument("runs", nargs=-1, required=True, metavar="[NAME=]RUN...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Others than this machine need --api-keys.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Answers at once.")
@click.option(
    "--cache-tokens",
    type=click.IntRange(min=256),
    default=65_536,
    show_default=True,
    help="Answers at once times tokens of the longest, with its prompt: bounds the memory.",
)
@click.option(
    "--prefill-tokens",
    type=click.IntRange(min=16),
    default=4096,
    show_default=True,
    help="Tokens of prompts that are read at once.",
)
@click.option("--queue", type=click.IntRange(min=1), default=256, show_default=True, help="Requests that wait.")
@click.option(
    "--max-prompt-tokens", type=click.IntRange(min=1), help="Default: as many as the run's model reads in training."
)
@click.option("--max-answer-tokens", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option("--max-body-kib", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option(
    "--prefix-cache-mib",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Keys and values of the prefixes that prompts of a task share.",
)
@click.option("--api-keys", type=click.Path(path_type=Path), help="File with one key a line, one of which is needed.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Requests a minute, per key or address.")
@click.option("--connections", type=click.IntRange(min=1), default=512, show_default=True, help="Open at once.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A further name of the server, in the header Host; '*': any. Repeatable.",
)
@click.option(
    "--trusted-proxy",
    "trusted_proxies",
    multiple=True,
    metavar="ADDRESS",
    help="An address or network whose X-Forwarded-For is believed. Repeatable.",
)
@click.option("--open-to-all", is_flag=True, help="Allow another --host without --api-keys.")
@click.option(
    "--grace", type=click.FloatRange(min=0), default=30, show_default=True, help="Seconds for answers at the end."
)
@click.option("--log-text", is_flag=True, help="Log prompts and answers, which are left out otherwise.")
def command(
    runs: tuple[str, ...],
    host: str,
    port: int,
    batch_size: int,
    cache_tokens: int,
    prefill_tokens: int,
    queue: int,
    max_prompt_tokens: int | None,
    max_answer_tokens: int,
    max_body_kib: int,
    prefix_cache_mib: int,
    api_keys: Path | None,
    rate: float | None,
    connections: int,
    allowed_hosts: tuple[str, ...],
    trusted_proxies: tuple[str, ...],
    open_to_all: bool,
    grace: float,
    log_text: bool,
) -> None:
    """Serve the tasks of the runs in the folders RUN."""
    from dyads.errors import ConfigError
    from dyads.runs.folder import RunFolder

    named: dict[str, RunFolder] = {}
    for run in runs:
        name, path = _named(run)
        folder = RunFolder.open(path)
        if name in named:
            raise ConfigError(
                f"'{named[name].path}' and '{path}' are both called '{name}': give one another name, as NAME={path}"
            )
        named[name] = folder
    if host not in ("127.0.0.1", "localhost", "::1") and api_keys is None and not open_to_all:
        raise ConfigError(
            f"--host {host} lets other machines send requests: add --api-keys FILE, or --open-to-all to serve without"
        )
    for proxy in trusted_proxies:
        _check_network(proxy)
    _check_installed()
    import logging

    from dyads.serving.limits import Keys, Limits, RateLimit
    from dyads.serving.server import Options, Server

    keys = Keys.of_file(api_keys) if api_keys is not None else Keys()
    limits = Limits(
        answer_tokens=max_answer_tokens,
        body_bytes=max_body_kib << 10,
        connections=connections,
        keys=keys,
        rate=RateLimit(rate),
    )
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("dyads.serving").setLevel(logging.INFO)
    options = Options(
        host=host,
        port=port,
        slots=batch_size,
        cache_tokens=cache_tokens,
        prefill_tokens=prefill_tokens,
        waiting=queue,
        prompt_tokens=max_prompt_tokens,
        prefix_bytes=prefix_cache_mib << 20,
        grace_seconds=grace,
        log_text=log_text,
        allowed_hosts=allowed_hosts,
        trusted_proxies=trusted_proxies,
        limits=limits,
    )
    server = Server(named, options)
    for model in server.models.models:
        click.echo(printable(f"  {model}"))
    click.echo(f"{len(server.models.models)} models at {server.address}/v1 (Ctrl-C ends)")
    server.run()
    click.echo("stopped")


def _named(run: str) -> tuple[str, Path]:
    """The name and the folder of an argument: of its folder's name where it gives none."""
    from dyads.errors import ConfigError

    name, equals, path = run.partition("=")
    if not equals or Path(run).exists():
        name, path = Path(run).resolve().name, run
    if not name or "/" in name or not name.isprintable() or name != name.strip():
        raise ConfigError(f"{run!r}: '{name}' is no name of a model; write NAME=RUN, without / in NAME")
    return name, Path(path)


def _check_network(given: str) -> None:
    from ipaddress import ip_network

    from dyads.errors import ConfigError

    try:
        ip_network(given)
    except ValueError as error:
        raise ConfigError(
            f"--trusted-proxy takes an address or a network, as 127.0.0.1 or 10.0.0.0/8: {error}"
        ) from None


def _check_installed() -> None:
    from importlib.util import find_spec

    from dyads.errors import ConfigError

    if lacking := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise ConfigError(f"serving needs {', '.join(lacking)}: `pip install 'dyads[serve]'`")

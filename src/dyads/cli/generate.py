# SPDX-License-Identifier: Apache-2.0
"""`dyads generate`: let the adapter of a run answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command(
    short_help="Answer prompts with the adapter of a run.",
    epilog="""\b
A file holds one JSON object a line with a "prompt" and, where lines differ in it, a "task" (name or id):
  {"prompt": "Words: fox lake\\nReverse them.\\nAnswer:", "task": "reverse_words"}
The answers are the same objects with a "prediction".
\b
Examples:
  dyads generate runs/demo/mode --prompt "Words: fox lake ..." --task reverse_words
  dyads generate runs/demo/mode --file questions.jsonl --out answers.jsonl""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What the model reads; repeatable.")
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), help="Prompts from a JSONL file.")
@click.option("--task", help="The task of the prompts; needed where the method looks at the task.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write JSONL there, not to the screen.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
def command(
    run: Path,
    prompts: tuple[str, ...],
    file: Path | None,
    task: str | None,
    out: Path | None,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    """Answer prompts with the adapter in the folder RUN."""
    from dyads.errors import ConfigError
    from dyads.runs.folder import RunFolder

    if bool(prompts) == (file is not None):
        raise click.UsageError("give either --prompt or --file")
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"cannot write '{out}': there is no folder '{out.parent}'")
    folder = RunFolder.open(run)
    rows = _read(file) if file is not None else [{"prompt": prompt} for prompt in prompts]
    from dyads.runs.evaluate import generate

    answers = generate(
        folder,
        [row["prompt"] for row in rows],
        [task if row.get("task") is None else row["task"] for row in rows],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    if file is None and out is None:
        for answer in answers:
            click.echo(answer)
        return
    lines = [{**row, "prediction": answer} for row, answer in zip(rows, answers, strict=True)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        click.echo(f"{len(lines)} answers written to {out}", err=True)


def _read(file: Path) -> list[dict[str, Any]]:
    from dyads.errors import ConfigError

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read '{file}': {error}") from error
    rows = [_row(line, f"{file}:{i}") for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not rows:
        raise ConfigError(f"'{file}' has no lines")
    return rows


def _row(line: str, where: str) -> dict[str, Any]:
    from dyads.errors import ConfigError

    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigError(f'{where}: no object with a text under "prompt": {line[:60]}')
    if not row["prompt"].strip():
        raise ConfigError(f"{where}: the prompt is empty")
    if isinstance(row.get("task"), bool) or not isinstance(row.get("task"), str | int | None):
        raise ConfigError(f"{where}: a task is a name or an id, got {json.dumps(row['task'])}")
    return row

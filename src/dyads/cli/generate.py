# SPDX-License-Identifier: Apache-2.0
"""`dyads generate`: answers of a run's model to prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dyads.runs.folder import RunFolder

_EXAMPLE = '{"prompt": "…", "task": "…"}'


@click.command(
    short_help="Answer prompts with the adapter of a run.",
    epilog="""\b
A file has one JSON object per line, with a "prompt" and optionally a "task"
(name or id):
  {"prompt": "Words: fox lake\\nReverse them.\\nAnswer: ", "task": "sort_words"}
The output is the same objects with a "prediction". For an encoder with heads
a prompt is a text or a pair of texts, "prompt": ["…", "…"], the task is
needed, and the answer is one of its labels or a number.
\b
For a task name that the run does not know, --unseen decides: refuse it,
answer as the nearest known task (by the prompts or by --description), or with
the mean of all known tasks. An encoder has no head for such a task.
\b
Examples:
  dyads generate runs/demo/mode --task sort_words --prompt "Words: fox ..."
  dyads generate runs/demo/mode --file questions.jsonl --out answers.jsonl""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A prompt; repeatable.")
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), help="Read prompts from a JSONL file.")
@click.option("--task", help="The task of the prompts; needed where the method looks at the task.")
@click.option("--unseen", type=click.Choice(["error", "nearest", "mean"]), default="error", show_default=True)
@click.option("--description", metavar="TEXT", help="Describes the unseen task; for --unseen nearest.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write JSONL to this file.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
def command(
    run: Path,
    prompts: tuple[str, ...],
    file: Path | None,
    task: str | None,
    unseen: str,
    description: str | None,
    out: Path | None,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    """Answer prompts with the adapter in the folder RUN."""
    from dyads.errors import ConfigError
    from dyads.runs.folder import RunFolder

    if bool(prompts) == (file is not None):
        raise click.UsageError("give either --prompt or --file")
    if description is not None and unseen != "nearest":
        raise click.UsageError("--description is for --unseen nearest")
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"cannot write '{out}': there is no folder '{out.parent}'")
    folder = RunFolder.open(run)
    if file is not None:
        questions = _read(file, task)
    else:
        questions = [_Prompt(f"--prompt {prompt[:40]!r}", {"prompt": prompt}, task) for prompt in prompts]
    _check_tasks(folder, questions, unseen)
    from dyads.scoring.evaluate import generate

    answers = generate(
        folder,
        [question.row["prompt"] for question in questions],
        [question.task for question in questions],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        unseen=unseen,
        description=description,
        on_stand_in=partial(click.echo, err=True),
    )
    if file is None and out is None:
        for answer in answers:
            click.echo(answer)
        return
    lines = [{**question.row, "prediction": answer} for question, answer in zip(questions, answers, strict=True)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        click.echo(f"{len(lines)} answers written to {out}", err=True)


@dataclass(frozen=True)
class _Prompt:
    """A prompt as it was given; `where` is its file and line, or its option, for messages."""

    where: str
    row: dict[str, Any]
    task: str | int | None


def _read(file: Path, task: str | None) -> list[_Prompt]:
    """The prompts of a file; `task` is for lines without one."""
    from dyads.errors import ConfigError
    from dyads.tasks.rows import read_jsonl

    try:
        rows = read_jsonl(file, error=ConfigError, remedy=f"write one line {_EXAMPLE} per prompt")
    except FileNotFoundError:
        raise ConfigError(f"no file '{file}'; write one line {_EXAMPLE} per prompt") from None
    except OSError as error:
        raise ConfigError(f"cannot read '{file}': {error.strerror}") from error
    if not rows:
        raise ConfigError(f"'{file}' is empty; write one line {_EXAMPLE} per prompt")
    return [_prompt(row.place, dict(row.fields), task) for row in rows]


def _prompt(where: str, row: dict[str, Any], task: str | None) -> _Prompt:
    from dyads.errors import ConfigError

    if "prompt" not in row:
        there = f"there is only {', '.join(row)}" if row else "the object is empty"
        raise ConfigError(f'{where}: "prompt" is missing ({there}); write {_EXAMPLE}')
    parts = row["prompt"] if isinstance(row["prompt"], list) and row["prompt"] else [row["prompt"]]
    if not all(isinstance(part, str) for part in parts):
        raise ConfigError(f'{where}: "prompt" must be text, got {json.dumps(row["prompt"])[:60]}; put it in quotes')
    if not all(part.strip() for part in parts):
        raise ConfigError(f'{where}: "prompt" is empty; write the text for the model, or remove the line')
    if isinstance(row.get("task"), bool) or not isinstance(row.get("task"), str | int | None):
        raise ConfigError(f'{where}: "task" must be a name or an id, got {json.dumps(row["task"])[:60]}')
    return _Prompt(where, row, task if row.get("task") is None else row["task"])


def _check_tasks(folder: RunFolder, questions: Sequence[_Prompt], unseen: str) -> None:
    """Refuse a missing or unknown task, with its file and line, before a model is loaded.

    With a policy for unseen tasks, unknown names pass.
    """
    from dyads.errors import ConfigError, did_you_mean

    method, known = folder.recipe().method, folder.task_names()
    if not known:
        return  # an older run, whose tasks are known only once its adapter is loaded
    heads = folder.heads.is_file()
    gates = getattr(method.peft_config(known), "task_names", None) if method.trains else None
    for question in questions:
        task = question.task
        if task is None and (heads or gates is not None):
            why = "every task has its own head" if heads else f"the gates of '{method.name}' look at the task"
            in_file = "" if question.where.startswith("--prompt") else '"task": "NAME" to the line, or '
            raise ConfigError(
                f"{question.where}: no task, and {why}; add {in_file}--task NAME{did_you_mean('', gates or known)}"
            )
        names = gates or known
        if isinstance(task, str) and unseen != "error":
            continue
        if task is not None and not (task in names if isinstance(task, str) else 0 <= task < len(names)):
            raise ConfigError(f"{question.where}: the run does not know task '{task}'{did_you_mean(str(task), names)}")

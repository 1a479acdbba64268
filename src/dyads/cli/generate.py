# SPDX-License-Identifier: Apache-2.0
"""`dyads generate`: answers of a run's model to inputs of its tasks, or to raw prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dyads.console import Reporter, TextReporter, json_line, printable
from dyads.errors import visible

if TYPE_CHECKING:
    from dyads.runs.folder import RunFolder
    from dyads.tasks import Example
    from dyads.tasks.template import Template

_EXAMPLE = '{"task": "…", "input": "…"}'
_PASSED_ON = ("id", "label", "labels", "metric", "output", "prediction", "prompt", "references", "split", "task")
"""Columns that a row may have besides those of the task's prompt."""


@click.command(
    short_help="Answer with the adapter of a run.",
    epilog="""\b
--input is put into the form that the task had in training; where the form has
several columns, give each by --column. --prompt is the whole text that the
model reads, in whatever form.
\b
A file, JSONL or CSV, has one row per line: the columns of the task's rows, or
a "prompt", and a "task" unless --task gives it. The output is the same rows
with a "prediction". For an encoder with heads a prompt is a text or a pair of
texts, "prompt": ["…", "…"], and the answer a label or a number.
\b
For a task name that the run does not know, --unseen decides: refuse it,
answer as the nearest known task (by the prompts or by --description), or with
the mean of all known tasks. An encoder has no head for such a task.
\b
Examples:
  dyads generate runs/mine --task opposite --input hot
  dyads generate runs/glue --task mnli --column premise="…" \\
    --column hypothesis="…"
  dyads generate runs/mine --file questions.jsonl --out answers.jsonl
  dyads generate runs/mine --task opposite --prompt "Name the opposite. …" """,
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--task", help="The task, by name. Default: the run's only one.")
@click.option("--input", "inputs", multiple=True, metavar="TEXT", help="An input of the task; repeatable.")
@click.option("--column", "columns", multiple=True, metavar="NAME=TEXT", help="Another column; repeatable.")
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), help="Read rows from a JSONL or CSV file.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A whole prompt; repeatable.")
@click.option("--unseen", type=click.Choice(["error", "nearest", "mean"]), default="error", show_default=True)
@click.option("--description", metavar="TEXT", help="Describes the unseen task; for --unseen nearest.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write JSONL to this file.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Limit of an answer. Default: as in the evaluation.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
def command(
    run: Path,
    task: str | None,
    inputs: tuple[str, ...],
    columns: tuple[str, ...],
    file: Path | None,
    prompts: tuple[str, ...],
    unseen: str,
    description: str | None,
    out: Path | None,
    max_new_tokens: int | None,
    batch_size: int,
) -> None:
    """Answer with the adapter in the folder RUN."""
    from dyads.errors import ConfigError
    from dyads.runs.folder import RunFolder
    from dyads.runs.manifest import write_output

    if sum([bool(prompts), bool(inputs or columns), file is not None]) != 1:
        raise click.UsageError("give either --input (or --column), or --file, or --prompt")
    if description is not None and unseen != "nearest":
        raise click.UsageError("--description is for --unseen nearest")
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"cannot write '{out}': there is no folder '{out.parent}'")
    folder = RunFolder.open(run)
    if file is not None:
        questions = _read(file, task)
    elif prompts:
        questions = [_Question(f"--prompt {prompt[:40]!r}", {"prompt": prompt}, task) for prompt in prompts]
    else:
        questions = _given(inputs, columns, task)
    form = _Forms(folder)
    questions = [form.of_only_task(question) for question in questions]
    _check_tasks(folder, questions, unseen)
    examples = [form.example(question) for question in questions]
    for warning in form.warnings:
        click.echo(printable(warning), err=True)
    TextReporter().waiting(f"reading {run} and its model")
    from dyads.scoring.evaluate import generate

    answers = generate(
        folder,
        examples,
        [question.task for question in questions],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        unseen=unseen,
        description=description,
        on_stand_in=lambda stand_in: click.echo(printable(str(stand_in)), err=True),
        reporter=TextReporter() if file is not None else Reporter(),
    )
    if file is None and out is None:
        for answer in answers:
            click.echo(printable(answer))
        return
    lines = [{**question.row, "prediction": answer} for question, answer in zip(questions, answers, strict=True)]
    if out is None:
        for line in lines:
            click.echo(json_line(line))
    else:
        text = "".join(visible(json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
        write_output(out, text)
        click.echo(printable(f"{len(lines)} answers written to {out}"), err=True)


@dataclass(frozen=True)
class _Question:
    """A row as it was given; `where` is its file and line, or its option, for messages."""

    where: str
    row: dict[str, Any]
    task: str | int | None


class _Forms:
    """Renders rows by the templates of a run, and notes raw prompts that lack the form of their task."""

    def __init__(self, folder: RunFolder) -> None:
        self.templates, self.names = folder.templates(), folder.task_names()
        self.path = folder.path
        self.has_heads, self.has_chat = folder.heads.is_file(), folder.chat_template() is not None
        self._raw: dict[str | None, list[str]] = {}

    def of_only_task(self, question: _Question) -> _Question:
        """The question with the run's task, where it names none and the run has one."""
        if question.task is None and len(self.names) == 1:
            return _Question(question.where, question.row, self.names[0])
        return question

    def example(self, question: _Question) -> Any:
        """What the model is to answer: an Example in the task's form, or the raw prompt."""
        name = self._name(question.task)
        if self._is_raw(question, name):
            self._note(question, name)
            return question.row["prompt"]
        return self._rendered(question, name, self._template(question, name))

    def _is_raw(self, question: _Question, name: str | None) -> bool:
        """Whether the row has the whole prompt, and "prompt" is no column of its task."""
        columns = self.templates[name].columns if name in self.templates else ()
        return "prompt" in question.row and ("prompt" not in columns or question.where.startswith("--prompt"))

    def _name(self, task: str | int | None) -> str | None:
        return (
            self.names[task] if isinstance(task, int) and 0 <= task < len(self.names) else str(task) if task else None
        )

    def _template(self, question: _Question, name: str | None) -> Template:
        from dyads.errors import ConfigError, did_you_mean

        if name is None:
            in_file = "" if question.where.startswith("--") else '"task": "NAME" to the line, or '
            raise ConfigError(
                f"{question.where}: no task, so no form to put it into; add {in_file}--task NAME"
                f"{did_you_mean('', self.names)}"
            )
        if name not in self.templates:
            why = (
                f"the run has no form of task '{name}'" if self.templates else f"'{self.path}' keeps no forms of tasks"
            )
            raise ConfigError(f'{question.where}: {why}: give the whole text as --prompt, or as "prompt" in a file')
        return self.templates[name]

    def _rendered(self, question: _Question, name: str | None, template: Template) -> Example:
        from dyads.errors import ConfigError, TaskError, did_you_mean
        from dyads.tasks.messages import CONVERSATIONS, MESSAGES

        row = {}
        for column, value in question.row.items():
            if column == _INPUT:
                row[_input_column(template, question, name)] = value
            elif column in template.columns:
                row[column] = value
            elif column == CONVERSATIONS and template.conversation:
                row[MESSAGES] = value
            elif column not in _PASSED_ON:
                near = get_close_matches(column, [c for c in template.columns if c not in question.row], n=1)
                if near or question.where.startswith("--"):
                    raise ConfigError(
                        f"{question.where}: unknown column '{column}' of task '{name}'"
                        f"{did_you_mean(column, template.columns)}"
                    )
        # An empty cell leaves the column out, as in training.
        row = {
            key: value for key, value in row.items() if value is not None and (value or key not in template.defaults)
        }
        try:
            return template.example(row, place=question.where)
        except TaskError as error:
            raise ConfigError(str(error)) from error

    def _note(self, question: _Question, name: str | None) -> None:
        if self.has_heads or not isinstance(question.row["prompt"], str):
            return
        known = [self.templates[name]] if name in self.templates else [] if name else list(self.templates.values())
        if known and not any(self._fits(template, question.row["prompt"]) for template in known):
            self._raw.setdefault(name, []).append(question.where)

    def _fits(self, template: Template, prompt: str) -> bool:
        """Whether a raw prompt has the form of training; a text is never in the form of a chat template."""
        return not (self.has_chat and template.chat) and template.fits(prompt)

    @property
    def warnings(self) -> list[str]:
        """A warning for every task whose raw prompts lack its form."""
        found = []
        for name, places in self._raw.items():
            many = f"{places[0]} and {len(places) - 1} more" if len(places) > 1 else places[0]
            of = f"of task '{name}'" if name else "of any task of the run"
            what = f"Warning: {many}: not in the form {of}, in which the adapter was trained; read as it is."
            lines = [click.wrap_text(what, width=80)]
            if name:
                chat = ", as a user's message of the chat template" * (self.has_chat and self.templates[name].chat)
                lines += [f"The form is{chat}:", *(f"  | {line}" for line in self.templates[name].form.split("\n"))]
            given = (
                "--task NAME --input TEXT puts"
                if places[0].startswith("--")
                else 'The task\'s columns in place of "prompt" put'
            )
            lines.append(f"{given} a text into it.")
            found.append("\n".join(lines))
        return found


_INPUT = "--input"
"""Key of a text whose column depends on the task."""


def _input_column(template: Template, question: _Question, name: str | None) -> str:
    """The column that --input fills."""
    from dyads.errors import ConfigError

    column = template.input_column or ("input" if "input" in template.columns else None)
    if column is None or column in question.row:
        raise ConfigError(
            f"{question.where}: the prompts of task '{name}' have the columns {', '.join(template.columns)}: give each"
            " by --column NAME=TEXT"
        )
    return column


def _given(inputs: Sequence[str], columns: Sequence[str], task: str | None) -> list[_Question]:
    """The rows of --input, each with all of --column."""
    from dyads.errors import ConfigError

    row = {}
    for column in columns:
        name, equals, text = column.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--column {column}: write it as NAME=TEXT")
        if name.strip() in row:
            raise ConfigError(f"--column {name.strip()} is given twice: remove one")
        row[name.strip()] = text
    if not inputs:
        return [_Question(f"--column {columns[0][:40]!r}", row, task)]
    return [_Question(f"--input {text[:40]!r}", {_INPUT: text, **row}, task) for text in inputs]


def _read(file: Path, task: str | None) -> list[_Question]:
    """The rows of a file; `task` is for rows without one."""
    from dyads.errors import ConfigError, TaskError
    from dyads.tasks.rows import read_csv, read_jsonl

    try:
        if file.suffix.lower() == ".csv":
            rows = read_csv(file)[1]
        else:
            rows = read_jsonl(file, error=ConfigError, remedy=f"write one line {_EXAMPLE} per question")
    except FileNotFoundError:
        raise ConfigError(f"no file '{file}'; write one line {_EXAMPLE} per question") from None
    except OSError as error:
        raise ConfigError(f"cannot read '{file}': {error.strerror}") from error
    except TaskError as error:
        raise ConfigError(str(error)) from error
    if not rows:
        raise ConfigError(f"'{file}' is empty; write one line {_EXAMPLE} per question")
    return [_question(row.place, row.fields, task) for row in rows]


def _question(where: str, fields: Mapping[str, Any], task: str | None) -> _Question:
    from dyads.errors import ConfigError

    row = dict(fields)
    if not row.keys() - {"task"}:
        there = f"there is only {', '.join(row)}" if row else "the object is empty"
        raise ConfigError(f'{where}: there is no input ({there}); write {_EXAMPLE}, or a "prompt"')
    if "prompt" in row:
        parts = row["prompt"] if isinstance(row["prompt"], list) and row["prompt"] else [row["prompt"]]
        if not all(isinstance(part, str) for part in parts):
            raise ConfigError(f'{where}: "prompt" must be text, got {json.dumps(row["prompt"])[:60]}; put it in quotes')
        if not all(part.strip() for part in parts):
            raise ConfigError(f'{where}: "prompt" is empty; write the text for the model, or remove the line')
    if isinstance(row.get("task"), bool) or not isinstance(row.get("task"), str | int | None):
        raise ConfigError(f'{where}: "task" must be a name or an id, got {json.dumps(row["task"])[:60]}')
    return _Question(where, row, row.get("task") if row.get("task") not in (None, "") else task)


def _check_tasks(folder: RunFolder, questions: Sequence[_Question], unseen: str) -> None:
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
            in_file = "" if question.where.startswith("--") else '"task": "NAME" to the line, or '
            raise ConfigError(
                f"{question.where}: no task, and {why}; add {in_file}--task NAME{did_you_mean('', gates or known)}"
            )
        names = gates or known
        if isinstance(task, str) and unseen != "error":
            continue
        if task is not None and not (task in names if isinstance(task, str) else 0 <= task < len(names)):
            raise ConfigError(f"{question.where}: the run does not know task '{task}'{did_you_mean(str(task), names)}")

# SPDX-License-Identifier: Apache-2.0
r"""The command `dyads`: a click group that finds its verbs, and prints a DyadsError as one message.

Every module in this package is a verb. To add `dyads greet`, write the file `cli/greet.py`; nothing else changes, and
the tests of the command line include it:

    '''`dyads greet`: a greeting for a run.'''

    from pathlib import Path

    import click


    @click.command(short_help="Greet a run.", epilog="\b\nExample:\n  dyads greet runs/demo/mode")
    @click.argument("run", type=click.Path(path_type=Path))
    def command(run: Path) -> None:
        '''Greet the run in the folder RUN.'''
        from dyads.runs.folder import RunFolder

        click.echo(f"hello {RunFolder.open(run).recipe().name}")

- The click command is named `command`, its `short_help` fits one line of `dyads --help`, and its epilog has an example.
- At the top a verb imports only click, dyads.console and the standard library, so that `dyads --help` is quick; heavy
  imports (torch, PEFT, pydantic, …) stand in the function that uses them.
- A verb that takes long has the decorator `reports`, which adds `--quiet` and `--json` and passes a `reporter`.
- A refusal is a DyadsError (dyads/errors.py) that says what was given, what is allowed and what mends it.
"""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeVar

import click

from dyads import __version__
from dyads.console import JsonReporter, Reporter, TextReporter, escape_logs, printable, tolerate_encodings
from dyads.errors import DyadsError, did_you_mean, visible
from dyads.runs.signals import ends_by_signal
from dyads.training.memory import keep_memory

__all__ = ["command_line", "main", "reports", "resumable"]

_ARGUMENTS = "dyads.arguments"
"""Key of the whole command line in a context's `meta`."""
Command = TypeVar("Command", bound=Callable[..., Any])


def reports(command: Command) -> Command:
    """Add `--quiet` and `--json` to a verb; its function gets the `reporter` that they choose."""

    @click.option("--quiet", is_flag=True, help="Print errors only.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line, for programs.")
    @wraps(command)
    def with_reporter(*arguments: Any, quiet: bool, as_json: bool, **options: Any) -> Any:
        if quiet and as_json:
            raise click.UsageError("give either --quiet or --json")
        reporter = Reporter() if quiet or not _is_main() else JsonReporter() if as_json else TextReporter()
        return command(*arguments, reporter=reporter, **options)

    return with_reporter  # type: ignore[return-value]


def _is_main() -> bool:
    """Whether this is the only process, or the one of several (torchrun, accelerate launch) that writes and reports."""
    return os.environ.get("RANK", "0") == "0"


def command_line(context: click.Context, *, without: Sequence[str] = (), more: Sequence[str] = ()) -> str:
    """The command that is running, quoted for a shell, without some of its arguments and with more."""
    arguments = [a for a in context.meta.get(_ARGUMENTS, ()) if a not in without]
    return (subprocess.list2cmdline if sys.platform == "win32" else shlex.join)(["dyads", *arguments, *more])


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """On Ctrl-C, print how far the run in the folder `out` came and the command that continues it."""
    try:
        yield
    except KeyboardInterrupt:
        if not _is_main():
            click.get_current_context().exit(130)
        from dyads.runs.folder import RunFolder
        from dyads.training.progress import state_of

        context, folder = click.get_current_context(), RunFolder(out)
        if not folder.is_run:
            click.echo("\ninterrupted before the run began: nothing was written", err=True)
            context.exit(130)
        again = command_line(context, without=("--resume", "--auto-resume"), more=("--resume",))
        click.echo(printable(f"\ninterrupted {state_of(folder)}\nTo continue:\n  {again}"), err=True)
        context.exit(130)


class _Refusal(click.ClickException):
    def __init__(self, message: str, exit_code: int = DyadsError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click has one for the class


class _Verbs(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in iter_modules(__path__) if module.name != "__main__")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            ctx.fail(f"there is no verb '{args[0]}'{did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with ends_by_signal():
                return super().invoke(ctx)
        except DyadsError as error:
            if ctx.params["debug"]:
                raise
            raise _Refusal(str(error), error.exit_code) from error
        except OSError as error:  # a full disk, a folder that is read-only, a file of another user
            if ctx.params["debug"] or error.errno == errno.EPIPE:  # click ends quietly when a pipe is closed
                raise
            where = f": '{error.filename}'" if error.filename else ""
            raise _Refusal(visible(f"{error.strerror or error}{where}")) from error
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            ctx.exit(130)


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
From nothing to a comparison:
  dyads train recipes/demo/lora.yaml --out runs/demo/lora
  dyads train recipes/demo/mode.yaml --out runs/demo/mode
  dyads compare runs/demo/lora runs/demo/mode
`dyads VERB --help` has examples for each verb.""",
)
@click.version_option(__version__, prog_name="dyads")
@click.option("--debug", is_flag=True, help="Show the whole traceback of an error.")
def main(debug: bool) -> None:
    """One adapter for many tasks: train it, score it, compare it."""
    # PEFT 0.21 calls a method that transformers 5.23 renames; the user of a command cannot change that.
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
    keep_memory()
    tolerate_encodings()
    escape_logs()

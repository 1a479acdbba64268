# SPDX-License-Identifier: Apache-2.0
"""`dyads push`: upload of a run's adapter, with a model card, to a repository of the model hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from dyads.errors import RunError, reason_of


@click.command(
    short_help="Upload an adapter with its model card to the hub.",
    epilog="""\b
Examples:
  dyads push runs/mine my-name/my-adapter
  dyads push runs/mine my-team/my-adapter --private --licence apache-2.0
Others load it with PEFT, as its model card shows. `hf auth login` stores the
token that an upload needs; HF_ENDPOINT names another hub.""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Create a private repository. An existing one stays as it is.")
@click.option("--licence", "--license", help="The adapter's, for the hub. Default: a packaged base model's, else none.")
def command(run: Path, repository: str, private: bool, licence: str | None) -> None:
    """Upload the adapter of RUN to the repository OWNER/NAME, which is created where there is none.

    The adapter's files, the form of its prompts and a model card (base model, tasks, scores, licence, command) are
    uploaded; data and predictions are not.
    """
    from dyads.runs.adapter import check_adapter
    from dyads.runs.card import write_shared
    from dyads.runs.folder import RunFolder

    folder = RunFolder.open(run)
    if not folder.recipe().method.trains:
        raise RunError(f"'{run}' is a run of {folder.recipe().method.name}, which trains nothing: it has no adapter")
    check_adapter(folder)
    with TemporaryDirectory() as place:
        write_shared(folder, Path(place), repository, licence)
        url = _upload(Path(place), repository, f"Adapter {folder.recipe().name}", private)
    click.echo(url)


def _upload(files: Path, repository: str, message: str, private: bool) -> str:
    """Upload all files of a folder as one commit; returns the address of the repository."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    what = f"cannot upload to '{repository}'"
    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise RunError(f"{what}: {reason_of(error)}; write it as OWNER/NAME") from error
    api = HfApi()
    additions = [CommitOperationAdd(path.name, path) for path in sorted(files.iterdir())]
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.create_commit(url.repo_id, additions, commit_message=message)
    except Exception as error:  # huggingface_hub, its HTTP client and the system raise many kinds of errors
        response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, LocalTokenNotFoundError) or getattr(response, "status_code", None) in (401, 403):
            remedy = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        else:
            remedy = "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
        raise RunError(f"{what}: {reason_of(error)}; {remedy}") from error
    return str(url)

# SPDX-License-Identifier: Apache-2.0
"""`dyads report`: scored runs as one HTML page, and its figures as files."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from dyads.console import printable


@click.command(
    short_help="Write one HTML page about scored runs.",
    epilog="""\b
Examples:
  dyads report runs/demo           # every run in that folder, to report.html
  dyads report runs/demo --open --baseline "LoRA 9"
  dyads report runs/demo --out demo.html --figures figures""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The file to write; an earlier one is replaced.",
)
@click.option("--open", "opens", is_flag=True, help="Open the page in the browser.")
@click.option("--baseline", metavar="LABEL", help="Show differences from this run name only.")
@click.option("--no-model", is_flag=True, help="Load no base model: no analysis of gates that look at tokens.")
@click.option(
    "--no-instances",
    is_flag=True,
    help="Leave out all texts of the data (prompts, references, answers, tokens), to pass the page on.",
)
@click.option(
    "--figures",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write every figure into this folder, as in a paper; needs `pip install 'dyads[report]'`.",
)
@click.option(
    "--figure-format",
    "formats",
    multiple=True,
    type=click.Choice(["pdf", "png", "svg"]),
    help="Format of the figures; may be repeated. Default: pdf and png.",
)
def command(
    runs: tuple[Path, ...],
    out: Path,
    opens: bool,
    baseline: str | None,
    no_model: bool,
    no_instances: bool,
    figures: Path | None,
    formats: tuple[str, ...],
) -> None:
    """Write one HTML page about RUNs, which are those of `dyads compare`.

    The page has the outcome with intervals, the differences by task, every instance with all answers, the curves of the
    trainings, what the adapters learned, their costs, and how to repeat them. It is one file that needs no network.

    Gates that look at tokens (MoDE, MoLORA) are analysed on a few instances of each task, for which the base model is
    loaded once for each such method.
    """
    from dyads.comparing.comparison import compare
    from dyads.errors import RunError
    from dyads.report.page import page_of
    from dyads.runs.manifest import write_output

    for place in (out, figures):
        if place is not None and not place.absolute().parent.is_dir():  # refused before the work, not after
            raise RunError(f"cannot write '{place}': there is no folder '{place.parent}'")
    if formats and figures is None:
        raise click.UsageError("--figure-format is for --figures FOLDER")
    comparison = compare(runs, baseline=baseline)
    if figures is not None:
        from dyads.report.figures import write_figures

        written = write_figures(comparison, figures, formats or ("pdf", "png"), model=not no_model)
        click.echo(printable(f"{len(written)} figures written to {figures}"), err=True)
    page = page_of(
        comparison,
        model=not no_model,
        instances=not no_instances,
        progress=lambda label: click.echo(printable(f"reading {label}"), err=True),
    )
    write_output(out, page)
    click.echo(printable(f"written to {out} ({len(page.encode()) / 1e6:.1f} MB)"), err=True)
    if opens:
        webbrowser.open(out.absolute().as_uri())

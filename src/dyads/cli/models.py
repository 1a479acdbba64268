# SPDX-License-Identifier: Apache-2.0
"""`dyads models`: list of the base models that Python packages carry."""

from __future__ import annotations

import click

from dyads.console import json_line


@click.command(
    short_help="List the packaged base models.",
    epilog="""\b
Examples:
  dyads models
  dyads train recipes/demo/mode.yaml --set model.name=packaged:smollm2-135m""",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per model.")
def command(as_json: bool) -> None:
    """List the base models that need no model hub, with size, licence and folder.

    As `model: {name: …}` of a recipe, a hub id or the folder of a transformers model works as well.
    """
    from dyads.models.packaged import PACKAGED, PREFIX, whereabouts

    for key, packaged in PACKAGED.items():
        folder, there = whereabouts(key)
        name, size = PREFIX + key, sum(f.stat().st_size for f in folder.glob("*")) if folder and there else None
        if as_json:
            facts = {"name": name, "hub_id": packaged.hub_id, "kind": packaged.kind, "parameters": packaged.parameters}
            place = {"licence": packaged.licence, "folder": str(folder) if folder else None, "bytes": size}
            click.echo(json_line({**facts, **place, "install": packaged.install}))
            continue
        click.secho(name, bold=True)
        on_disk = f", {size / 1e6:.0f} MB on disk" if size else ""
        state = "" if there else ", written at the first use"
        lines = {
            "model": f"{packaged.hub_id} ({packaged.kind})",
            "size": f"{packaged.parameters} parameters{on_disk}",
            "licence": packaged.licence,
            "folder": f"{folder}{state}" if folder else "none: its package is not installed",
            "install": "" if folder else packaged.install,
            "note": packaged.note,
        }
        for label, text in lines.items():
            if label == "note":
                text = click.wrap_text(text, width=68, subsequent_indent=" " * 12)
            if text:
                click.echo(f"  {label:10}{text}")  # paths and commands are not broken into lines
        click.echo()
    if not as_json:
        click.echo("A hub id or the folder of a transformers model is a `model.name` too.")

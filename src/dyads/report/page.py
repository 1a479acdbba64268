# SPDX-License-Identifier: Apache-2.0
"""The page: one HTML file with a comparison, its instances, trainings, adapters and costs, that needs no network.

Tables and dot plots are HTML and SVG from a Jinja2 template with autoescape. Instances, curves and heat maps are drawn
by the page's script from compressed JSON; it sets texts as texts, never as markup. A content security policy allows
that script alone, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dyads import __version__
from dyads.comparing.comparison import Comparison
from dyads.errors import visible, visible_in
from dyads.report.content import content_of, curves_of, marks
from dyads.report.instances import first, instances_of, kept
from dyads.report.learned import learned_by

__all__ = ["SECTIONS", "page_of"]

SECTIONS = (
    ("outcome", "Outcome"),
    ("differ", "Differences"),
    ("instances", "Instances"),
    ("training", "Training"),
    ("learned", "Learned"),
    ("cost", "Cost"),
    ("again", "Again"),
)


def page_of(
    comparison: Comparison,
    *,
    model: bool = True,
    instances: bool = True,
    progress: Callable[[str], object] = lambda name: None,
) -> str:
    """The page as HTML. `model` says whether base models may be loaded, which analyses of token gates need.

    Without `instances` the page has no text of the data: no prompt, reference or answer, and no tokens.
    """
    learned, learned_notes = learned_by(comparison, model=model, tokens=instances, progress=progress)
    methods = [
        {"label": column.label, "shown": column.shown, "colour": colour, "reference": column.reference}
        for column, colour in zip(comparison.columns, marks(comparison), strict=True)
    ]
    data: dict[str, Any] = {
        "methods": visible_in(methods),
        "curves": visible_in(curves_of(comparison)),
        "learned": learned,
        **instances_of(comparison),
    }
    packed, left = kept(data if instances else first(data, 0))
    left_out = ""
    if not instances:
        left_out = "The page was written without instances (--no-instances); `dyads show RUN --task NAME` prints them."
    elif left is not None:
        most = max(task.n for task in comparison.tasks)
        left_out = (
            f"The page has the first {left} of at most {most} instances of a task, to stay small; `dyads show RUN"
            " --task NAME` prints all."
        )
    script, style = _file("page.js"), _file("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    content = content_of(comparison)
    texts = {
        "commands": visible(content.pop("commands"), keep="\n"),
        "recipes": [{key: visible(text, keep="\n") for key, text in r.items()} for r in content.pop("recipes")],
    }
    content = {
        **visible_in(content),
        **texts,
        "sections": SECTIONS,
        "learned": [entry["name"] for entry in data["learned"]],
        "learned_notes": visible_in(learned_notes),
        "instances": instances,
        "left_out": left_out,
        "version": __version__,
    }
    # Our own files and base64; everything from runs passes through autoescape.
    trusted = {"script": Markup(script), "style": Markup(style), "data": packed, "script_hash": Markup(digest)}
    return environment.from_string(_file("page.html")).render({**content, **trusted})


def _file(name: str) -> str:
    return files("dyads.report").joinpath(name).read_text(encoding="utf-8")

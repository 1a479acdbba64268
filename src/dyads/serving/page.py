# SPDX-License-Identifier: Apache-2.0
"""The page at `/`, on which several tasks are tried side by side."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import HTMLResponse

__all__ = ["PAGE"]

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PAGE = HTMLResponse((Path(__file__).parent / "page.html").read_text(encoding="utf-8"), headers=_HEADERS)

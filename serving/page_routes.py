"""The page at /: three files without a build step, that may load and run nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse

FOLDER = Path(__file__).resolve().parent / "page"
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
# text of catalogues and users is shown on it: even if it were taken for markup, no script of it would run
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page's files."""

    async def page(http: Request) -> FileResponse:
        return FileResponse(FOLDER / FILES[http.url.path], headers=HEADERS)

    for path in FILES:
        app.add_route(path, page, include_in_schema=False)

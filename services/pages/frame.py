"""A page's frame: its headers, its templates, its assets, and the forms that come back from it."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException

from services.pages.shading import number
from services.problem import Problem

SHARED = Path(__file__).parent / "static"
"""`page.css` and `icon.svg`, the look of every page."""
TEMPLATES = Path(__file__).parent / "templates"
"""The document around every page, signing in and out, shaded tokens."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`: browsers then send forms without saying where they come from.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def environment(site: str, templates: Path) -> Environment:
    """The templates of `site`, whose pages lie below /`site`/, and the shared ones. Everything is escaped, and a name
    that is not there is an error."""
    made = Environment(
        loader=FileSystemLoader([templates, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["site"] = site
    made.filters["number"] = number
    return made


async def render(templates: Environment, name: str, status: int, facts: dict[str, Any]) -> Response:
    text = await asyncio.to_thread(templates.get_template(name).render, facts)
    challenge = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return HTMLResponse(text, status, {**HEADERS, **challenge})


async def asset(files: dict[str, Path], name: str) -> Response:
    """One of `files`, by the name in its URL. Raises Problem (404)."""
    path = files.get(name)
    if path is None:
        raise Problem(404, "Not Found")
    content = await asyncio.to_thread(path.read_bytes)
    return Response(content, headers={**HEADERS, "Cache-Control": "max-age=300"}, media_type=KINDS[path.suffix])


async def body(request: Request, kind: str, most_bytes: int) -> bytes:
    """Raises Problem: 415 not of the media type `kind`, 413 too large, 408 it never came."""
    given = request.headers.get("content-type", "").partition(";")[0].strip()
    if given != kind:
        raise Problem(415, "Not a form", f"Content-Type: {kind} is needed (got {given:.100})")
    found = bytearray()
    try:
        async for chunk in request.stream():
            found += chunk
            if len(found) > most_bytes:
                raise Problem(413, "The form is too large", f"at most {most_bytes} bytes")
    except HTTPException as error:
        raise Problem(error.status_code, str(error.detail)) from error
    return bytes(found)


async def form(request: Request, most_bytes: int) -> bytes:
    """An urlencoded form as it came. Raises Problem, as `body` does."""
    return await body(request, "application/x-www-form-urlencoded", most_bytes)

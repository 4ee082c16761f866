"""`GET /` and `POST /`: the form, and beside it what the server says of the completions in it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException

from reward_server.compat import ScoreGroups
from reward_server.evaluate import Means
from reward_server.playground import results, session
from reward_server.playground.form import MOST_BYTES, MOST_COMPLETIONS, Faults, Form, FormFault, faults_of, read
from reward_server.playground.tokens import SHADINGS, STEPS, number
from reward_server.presets import PRESETS
from reward_server.spec_store import DEFAULT, NamedSpec, Specs
from reward_server.specs import SpecError, check_spec
from services.access import HttpSettings
from services.problem import Problem

HERE = Path(__file__).parent
ASSETS = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
PATHS = frozenset({"/", "/playground/session", *(f"/playground/{name}" for name in ASSETS)})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`: browsers then send forms without saying where they come from.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
EXAMPLE = Form(
    prompt="47+58",
    answer="105",
    completions=["units 7+8=15 tens 4+5+1=10 answer 105", "maybe 95"],
)
"""In words that the demo's model has, too."""
EXAMPLE_SPECS = (DEFAULT, "intuitor_plus_accuracy", "grpo", "exact_match")
"""The first one that the server can compute is chosen on the first visit."""
KINDS = ("Of this server", "Presets", "One reward alone")
"""Of specs, in the order in which they are listed."""

TEMPLATES = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["number"] = number


@dataclass(frozen=True)
class Choice:
    """A spec to choose. `reason` says why this server cannot compute it."""

    named: NamedSpec
    reason: str = ""

    @property
    def kind(self) -> str:
        if self.named.version or self.named.name == DEFAULT:
            return KINDS[0]
        return KINDS[1] if self.named.name in PRESETS else KINDS[2]

    @property
    def formula(self) -> str:
        return " + ".join(f"{term.weight:g} \u00d7 {term.key}" for term in self.named.spec.rewards)


def router(
    score_groups: ScoreGroups,
    specs: Specs,
    means: Means,
    model: str | None,
    settings: HttpSettings,
    seconds: Callable[[Request], float],
) -> APIRouter:
    """`seconds`: how long a request may take. Hand `PATHS` to `create_app` as its pages."""
    routes = APIRouter(include_in_schema=False)

    async def show(
        request: Request, form: Form | None, faults: Faults, status: int = 200, found: results.Results | None = None
    ) -> Response:
        try:
            choices = await _choices(specs, means)
        except Problem as problem:
            choices, faults, status = [], {**faults_of("", problem), **faults}, max(status, problem.status)
        return await _page(
            "page.html",
            status,
            form=form or _example(choices, means),
            faults=faults,
            choices=choices,
            results=found,
            model=model,
            scorer=means.scorer,
            has_session="rlif.refusal" in request.scope,
            most_completions=MOST_COMPLETIONS,
        )

    @routes.get("/")
    async def first(request: Request) -> Response:
        if session.refusal(request, settings):
            return await _page("signin.html", 401, message="")
        return await show(request, None, {})

    @routes.post("/")
    async def sent(request: Request) -> Response:
        if session.refusal(request, settings):
            return await _page("signin.html", 401, message="")
        try:
            session.check_origin(request)
            form, action = read(await _body(request))
        except Problem as problem:
            return await show(request, None, faults_of("", problem), problem.status)
        if action == "add":
            more = [*form.completions, ""][:MOST_COMPLETIONS]
            return await show(request, replace(form, completions=more), {})
        if action.startswith("remove-"):
            kept = [text for place, text in enumerate(form.completions) if action != f"remove-{place}"]
            return await show(request, replace(form, completions=kept or [""]), {})
        try:
            found = await results.ask(form, request, score_groups, means, model, seconds(request))
        except FormFault as fault:
            return await show(request, form, fault.faults, 422)
        faults: Faults = {}
        for one in found.problems:
            faults = {**faults_of("", one), **faults}
        return await show(request, form, faults, max((one.status for one in found.problems), default=200), found)

    @routes.post("/playground/session")
    async def sign_in_or_out(request: Request) -> Response:
        answer = RedirectResponse("/", 303, HEADERS)
        try:
            session.check_origin(request)
            given = parse_qs((await _body(request)).decode(errors="replace"))
        except Problem as problem:
            return await _page("signin.html", problem.status, message=f"{problem.title}: {problem.detail}")
        if "end" in given:
            session.end(answer)
        elif not session.start(request, answer, settings, given.get("token", [""])[0].strip()):
            return await _page("signin.html", 401, message="The token is not the one this server knows")
        return answer

    @routes.get("/playground/{name}")
    async def asset(name: str) -> Response:
        if name not in ASSETS:
            raise Problem(404, "Not Found")
        content = await asyncio.to_thread((HERE / "static" / name).read_bytes)
        return Response(content, headers={**HEADERS, "Cache-Control": "max-age=300"}, media_type=ASSETS[name])

    return routes


async def _page(template: str, status: int, **facts: Any) -> Response:
    facts = {**facts, "shadings": SHADINGS, "steps": range(STEPS)}
    text = await asyncio.to_thread(TEMPLATES.get_template(template).render, facts)
    challenge = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return HTMLResponse(text, status, {**HEADERS, **challenge})


async def _body(request: Request) -> bytes:
    """Raises Problem: 413 too large, 408 it never came, 415 not a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/x-www-form-urlencoded":
        raise Problem(415, "Not a form", f"Content-Type: application/x-www-form-urlencoded is needed (got {kind:.100})")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BYTES:
                raise Problem(413, "The form is too large", f"at most {MOST_BYTES} bytes")
    except HTTPException as error:
        raise Problem(error.status_code, str(error.detail)) from error
    return bytes(body)


async def _choices(specs: Specs, means: Means) -> list[Choice]:
    found = []
    for named in await specs.all():
        try:
            check_spec(named.spec, means.have)
            found.append(Choice(named))
        except SpecError as error:
            found.append(Choice(named, error.reason))
    return sorted(found, key=lambda choice: KINDS.index(choice.kind))


def _example(choices: list[Choice], means: Means) -> Form:
    usable = [choice.named.name for choice in choices if not choice.reason]
    has_chat = means.encoder is None or bool(means.encoder.tokenizer.chat_template)
    spec = next((name for name in EXAMPLE_SPECS if name in usable), "")
    return replace(EXAMPLE, kind="chat" if has_chat else "text", spec=spec)

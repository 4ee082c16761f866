"""The console's pages: overview, samples, dead letters, control. Whole without JavaScript, but for what moves."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import orjson
from fastapi import APIRouter, Request, Response

from services.access import HttpSettings
from services.clients import CallError
from services.console import control, curves, live, preview
from services.console.overview import Overview, duration, look
from services.console.samples import SORTS, Choice, prompt_of
from services.console.source import Desk, Source, sit_down
from services.console.tokens import MOST_CHARACTERS, view
from services.pages import frame, session
from services.pages.shading import SHADINGS, STEPS
from services.problem import Problem
from services.redis import DeadlineExceeded

HERE = Path(__file__).parent
UPLOT = HERE / "static" / "uplot"
ASSETS = {
    "page.css": frame.SHARED / "page.css",
    "console.css": HERE / "static" / "console.css",
    "uplot.css": UPLOT / "uPlot.min.css",
    "uplot.js": UPLOT / "uPlot.iife.min.js",
    "charts.js": HERE / "static" / "charts.js",
    "live.js": HERE / "static" / "live.js",
    "tokens.js": frame.SHARED / "tokens.js",
    "control.js": HERE / "static" / "control.js",
    "icon.svg": frame.SHARED / "icon.svg",
}
VIEWS = ("curves", "events", "samples", "group", "dead", "control", "preview", "session")
PATHS = frozenset({"/", *(f"/console/{name}" for name in (*VIEWS, *ASSETS))})
TEMPLATES = frame.environment("console", HERE / "templates")
TEMPLATES.filters["duration"] = duration
TEMPLATES.filters["prompt_of"] = prompt_of


def router(source: Source, settings: HttpSettings) -> APIRouter:
    """Its routes and those that control the run. Hand `PATHS` to `create_app` as its pages."""
    desk = sit_down(source)

    @asynccontextmanager
    async def open_desk(_: Any) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await desk.close()

    routes = APIRouter(lifespan=open_desk)
    _add_data(routes, desk, settings)
    _add_pages(routes, desk, settings)
    routes.include_router(control.router(desk))
    return routes


def _add_pages(routes: APIRouter, desk: Desk, settings: HttpSettings) -> None:
    async def show(request: Request, template: str, **facts: Any) -> Response:
        """The page, or what stands in its way: no session, or no redis."""
        if session.refusal(request, settings):
            return await session.ask(TEMPLATES)
        status = int(facts.pop("status", 200))
        shared = {"run": desk.run_id, "has_session": "rlif.refusal" in request.scope, "place": template}
        return await frame.render(TEMPLATES, template, status, {**shared, **facts})

    async def away(request: Request, error: DeadlineExceeded) -> Response:
        return await show(request, "away.html", reason=str(error), status=503)

    @routes.get("/", include_in_schema=False)
    async def overview(request: Request) -> Response:
        if session.refusal(request, settings):
            return await session.ask(TEMPLATES)
        now = await look(desk)
        if now.trouble:
            return await show(request, "away.html", reason=now.trouble, status=503)
        try:
            others = await curves.runs_to_compare(desk)
        except DeadlineExceeded as error:
            return await away(request, error)
        return await show(request, "overview.html", now=now, others=others)

    @routes.get("/console/samples", include_in_schema=False)
    async def samples(request: Request) -> Response:
        if session.refusal(request, settings):
            return await session.ask(TEMPLATES)
        choice = Choice.of(request.query_params)
        try:
            page = await desk.samples.page(choice)
        except DeadlineExceeded as error:
            return await away(request, error)

        def to(number: int) -> str:
            return "/console/samples?" + urlencode({**request.query_params, "page": number})

        return await show(
            request, "samples.html", choice=choice, page=page, sorts=SORTS, to=to, given=request.query_params
        )

    @routes.get("/console/group", include_in_schema=False)
    async def group(request: Request, entry: str = "", shade: bool = False) -> Response:
        if session.refusal(request, settings):
            return await session.ask(TEMPLATES)
        try:
            found = await desk.samples.group(entry)
        except DeadlineExceeded as error:
            return await away(request, error)
        if found is None:
            return await show(request, "gone.html", status=404)
        seen = await view(desk, found, shade)
        facts = {"shadings": SHADINGS, "steps": range(STEPS), "most_characters": MOST_CHARACTERS}
        return await show(request, "group.html", entry=entry, view=seen, **facts)

    @routes.get("/console/dead", include_in_schema=False)
    async def dead(request: Request) -> Response:
        if session.refusal(request, settings):
            return await session.ask(TEMPLATES)
        try:
            letters = await desk.queue.dead()
        except DeadlineExceeded as error:
            return await away(request, error)
        return await show(request, "dead.html", letters=letters[::-1][: control.MOST_LETTERS], count=len(letters))

    @routes.get("/console/control", include_in_schema=False)
    async def controls(request: Request) -> Response:
        if session.refusal(request, settings):
            return await session.ask(TEMPLATES)
        now = await look(desk)
        if now.trouble:
            return await show(request, "away.html", reason=now.trouble, status=503)
        text, note = await _spec_text(desk, now)
        return await show(request, "control.html", now=now, spec_text=text, note=note)

    @routes.post("/console/session", include_in_schema=False)
    async def sign_in_or_out(request: Request) -> Response:
        return await session.sign_in_or_out(request, settings, TEMPLATES)

    @routes.get("/console/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        return await frame.asset(ASSETS, name)


async def _spec_text(desk: Desk, now: Overview) -> tuple[str, str]:
    """The run's spec as JSON, and why there is none."""
    if not desk.rewards:
        return "", "No reward server is known here: give its address with --reward."
    if not now.spec:
        return "", "What the run's spec is called is not known: its orchestrator has not reported yet."
    try:
        entry = await desk.rewards[0].get_spec(now.spec, deadline_seconds=5)
    except CallError as error:
        return "", f"The reward server did not say what the spec is: {error}"
    note = ""
    if entry.built_in and entry.name != desk.run_id:
        note = (
            f"The recipe names the built-in spec {entry.name}, which cannot be replaced: a preview works, applying "
            "does not. List the rewards in the recipe to be able to change them."
        )
    return entry.spec.model_dump_json(indent=2, exclude_defaults=True), note


def _add_data(routes: APIRouter, desk: Desk, settings: HttpSettings) -> None:
    """What the pages' scripts ask for."""

    def admit(request: Request) -> None:
        refusal = session.refusal(request, settings)
        if refusal:
            raise refusal

    def panel(now: Overview) -> str:
        return TEMPLATES.get_template("state.html").render(now=now)

    @routes.get("/console/curves", include_in_schema=False)
    async def curve_points(request: Request) -> Response:
        admit(request)
        try:
            found = await curves.answer(desk, request.query_params.getlist("over"))
            return Response(orjson.dumps(found), headers=frame.HEADERS, media_type="application/json")
        except DeadlineExceeded as error:
            raise Problem(503, "The run cannot be read", str(error), retry_after=2) from error

    @routes.get("/console/events", include_in_schema=False)
    async def events(request: Request, since: int = 0, undone: int = 0) -> Response:
        admit(request)
        return await live.stream(desk, since, undone, panel)

    @routes.post("/console/preview", include_in_schema=False)
    async def preview_spec(request: Request) -> Response:
        admit(request)
        session.check_origin(request)
        spec = preview.read_spec(await frame.body(request, "application/json", preview.MOST_BYTES))
        try:
            found = await preview.preview(desk, spec)
        except DeadlineExceeded as error:
            raise Problem(503, "The run cannot be read", str(error), retry_after=2) from error
        return await frame.render(TEMPLATES, "preview.html", 200, {"preview": found})

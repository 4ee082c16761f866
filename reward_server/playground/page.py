"""`GET /` and `POST /`: the form, and beside it what the server says of the completions in it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from reward_server.compat import ScoreGroups
from reward_server.evaluate import Means
from reward_server.playground import results
from reward_server.playground.form import MOST_BYTES, MOST_COMPLETIONS, Faults, Form, FormFault, faults_of, read
from reward_server.presets import PRESETS
from reward_server.spec_store import DEFAULT, NamedSpec, Specs
from reward_server.specs import SpecError, check_spec
from services.access import HttpSettings
from services.pages import frame, session
from services.pages.shading import SHADINGS, STEPS
from services.problem import Problem

HERE = Path(__file__).parent
ASSETS = {
    "page.css": frame.SHARED / "page.css",
    "page.js": HERE / "static" / "page.js",
    "tokens.js": frame.SHARED / "tokens.js",
    "icon.svg": frame.SHARED / "icon.svg",
}
PATHS = frozenset({"/", "/playground/session", *(f"/playground/{name}" for name in ASSETS)})
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

TEMPLATES = frame.environment("playground", HERE / "templates")


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
            return await session.ask(TEMPLATES)
        return await show(request, None, {})

    @routes.post("/")
    async def sent(request: Request) -> Response:
        if session.refusal(request, settings):
            return await session.ask(TEMPLATES)
        try:
            session.check_origin(request)
            form, action = read(await frame.form(request, MOST_BYTES))
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
        return await session.sign_in_or_out(request, settings, TEMPLATES)

    @routes.get("/playground/{name}")
    async def asset(name: str) -> Response:
        return await frame.asset(ASSETS, name)

    return routes


async def _page(template: str, status: int, **facts: Any) -> Response:
    return await frame.render(TEMPLATES, template, status, {**facts, "shadings": SHADINGS, "steps": range(STEPS)})


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

"""A browser's way in where the API wants a token: a signed cookie for rlif's pages alone.

The cookie is an expiry (Unix seconds) and its HMAC-SHA256 under the API token. It holds no secret, nothing is kept of
it here, and it ends when the token is changed. No route of the API looks at it.
"""

import hmac
import time
from urllib.parse import parse_qs, urlsplit

from fastapi import Request, Response
from fastapi.responses import RedirectResponse
from jinja2 import Environment

from services.access import HttpSettings
from services.pages import frame
from services.problem import Problem

COOKIE = "rlif_session"
SECONDS = 12 * 3600
MOST_BYTES = 4096
"""Of the form with the token."""


def _signature(expiry: str, token: str) -> str:
    return hmac.new(token.encode(), b"rlif session until " + expiry.encode(), "sha256").hexdigest()


def is_valid(cookie: str, token: str, now: float) -> bool:
    expiry, _, signature = cookie.partition(".")
    if not hmac.compare_digest(signature.encode(), _signature(expiry, token).encode()):
        return False
    return now < int(expiry)


def refusal(request: Request, settings: HttpSettings) -> Problem | None:
    """Why the caller may not use the page; none when no token is needed, or a bearer token or a session was sent."""
    refused: Problem | None = request.scope.get("rlif.refusal")
    if refused is None or settings.api_token is None:
        return refused
    return None if is_valid(request.cookies.get(COOKIE, ""), settings.api_token, time.time()) else refused


def start(request: Request, response: Response, settings: HttpSettings, given: str) -> bool:
    """Set the cookie if `given` is the API's token, or the admin's."""
    known = [token.encode() for token in (settings.api_token, settings.admin_token) if token]
    is_known = [hmac.compare_digest(given.encode(), token) for token in known]
    if settings.api_token is None or not any(is_known):
        return False
    expiry = str(int(time.time()) + SECONDS)
    value = f"{expiry}.{_signature(expiry, settings.api_token)}"
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, value, max_age=SECONDS, httponly=True, samesite="strict", secure=secure)
    return True


def end(response: Response) -> None:
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")


def check_origin(request: Request) -> None:
    """A browser names the page a form was sent from. Raises Problem (403): it is not one of ours."""
    origin = request.headers.get("origin")
    try:
        is_ours = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    except ValueError:  # such as http://[
        is_ours = False
    if not is_ours:
        raise Problem(403, "The form comes from another site", f"Origin: {origin:.200}")


async def ask(templates: Environment, status: int = 401, message: str = "") -> Response:
    """The page that asks for the token; `message` is what was wrong with what came."""
    return await frame.render(templates, "signin.html", status, {"message": message})


async def sign_in_or_out(request: Request, settings: HttpSettings, templates: Environment) -> Response:
    """The answer to the form with the token, or to the one that ends the session: the way home, or the page that asks
    again."""
    answer = RedirectResponse("/", 303, frame.HEADERS)
    try:
        check_origin(request)
        given = parse_qs((await frame.form(request, MOST_BYTES)).decode(errors="replace"))
    except Problem as problem:
        return await ask(templates, problem.status, f"{problem.title}: {problem.detail}")
    if "end" in given:
        end(answer)
    elif not start(request, answer, settings, given.get("token", [""])[0].strip()):
        return await ask(templates, 401, "The token is not the one this server knows")
    return answer

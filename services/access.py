"""Who may call a service: tokens, the names it answers to, and what may change its state."""

import base64
import hmac
import ipaddress
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import Scope

from services.problem import Problem
from services.startup import StartupError


@dataclass(frozen=True)
class HttpSettings:
    host: str = "127.0.0.1"
    api_token: str | None = None
    admin_token: str | None = None
    max_body_bytes: int = 64 * 2**20
    max_concurrent: int = 1024
    """Trainers that post one sample a call have a whole batch of calls open."""
    body_seconds: float = 60.0
    """How long a client may be silent in the middle of a body, before it loses its place to others."""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def settings_from_environment(host: str) -> HttpSettings:
    """Tokens come from RLIF_API_TOKEN and RLIF_ADMIN_TOKEN alone. Raises StartupError: no token beyond loopback, or
    one for both."""
    api_token = os.environ.get("RLIF_API_TOKEN") or None
    admin_token = os.environ.get("RLIF_ADMIN_TOKEN") or None
    if api_token is None and not is_loopback(host):
        raise StartupError(f"--host {host}: set RLIF_API_TOKEN to serve beyond this machine, or bind to 127.0.0.1")
    if api_token is not None and api_token == admin_token:
        raise StartupError("RLIF_ADMIN_TOKEN: is the same as RLIF_API_TOKEN, so that every caller could change state")
    return HttpSettings(host=host, api_token=api_token, admin_token=admin_token)


def check_host(settings: HttpSettings, headers: Headers) -> None:
    """Raises Problem. Where no token is asked, a page could make its own name mean this machine: it would be obeyed."""
    given = headers.get("host")
    if settings.api_token or given is None:  # browsers always name the host
        return
    name = _host_name(given)
    if not is_loopback(name) and name != settings.host.lower():
        valid = f"localhost, 127.0.0.1, [::1] or {settings.host}"
        detail = f"{valid} (got {given:.100}); with RLIF_API_TOKEN set the server may have any name"
        raise Problem(421, "The server has no such name", detail, "Host")


def _host_name(host: str) -> str:
    """Of a Host header, without the port and the brackets of IPv6; empty when it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def authorise(settings: HttpSettings, scope: Scope, headers: Headers) -> None:
    """Notes in `scope["rlif.admin"]` whether the caller may change state. Raises Problem."""
    api, admin = settings.api_token, settings.admin_token
    scheme, _, given = headers.get("authorization", "").partition(" ")
    is_bearer = scheme.lower() == "bearer"
    token = given.strip() if is_bearer else _password(given) if scheme.lower() == "basic" else ""
    # A browser sends Basic credentials by itself, also where another site's page asks it to.
    is_api, is_admin = _same(token, api), is_bearer and _same(token, admin)
    if (api or admin) and token and not (is_api or is_admin):
        raise Problem(401, "Wrong token", "Authorization: the token is not the one this server knows")
    if api and not (is_api or is_admin):
        raise Problem(401, "Token needed", "Authorization: send `Bearer <token>`")
    # Without an admin token, whoever may call a loopback server may also change it.
    scope["rlif.admin"] = is_admin if admin else is_loopback(settings.host)


def _password(credentials: str) -> str:
    """Of Basic authorization: what a client sends for http://:TOKEN@host, and all that some trainers' clients can."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _same(given: str, known: str | None) -> bool:
    return known is not None and hmac.compare_digest(given.encode(), known.encode())


def _check_admin(request: Request) -> None:
    if not request.scope.get("rlif.admin"):
        raise Problem(403, "Admin token needed", "this route changes state: send the admin token as bearer token")


require_admin = Depends(_check_admin)

"""`--sandbox`: which sandbox, from one word."""

import os

from reward_server.sandbox.provider import Sandbox
from services.startup import StartupError

CHOICES = "none, bubblewrap, http://HOST:PORT (rlif serve sandbox), sandboxfusion=URL, piston=URL or e2b"
TOKEN = "RLIF_SANDBOX_TOKEN"
"""The environment variable with the bearer token of an rlif sandbox service."""


def choose(text: str) -> Sandbox | None:
    """None for `none`. Raises StartupError naming what would be valid."""
    kind, _, url = text.partition("=")
    if text == "none":
        return None
    if text == "bubblewrap":
        from reward_server.sandbox.bubblewrap import Bubblewrap

        return Bubblewrap()
    if text.startswith(("http://", "https://")):
        from reward_server.sandbox.remote import RemoteSandbox

        return RemoteSandbox(text, os.environ.get(TOKEN) or None)
    if text == "e2b":
        from reward_server.sandbox.e2b import E2B

        return E2B()
    if kind in ("sandboxfusion", "piston") and url.startswith(("http://", "https://")):
        from reward_server.sandbox.piston import Piston
        from reward_server.sandbox.sandboxfusion import SandboxFusion

        return SandboxFusion(url) if kind == "sandboxfusion" else Piston(url)
    raise StartupError(f"--sandbox {text}: choose {CHOICES}")

"""The console on its own, for any run whose Redis can be reached."""

from collections.abc import Callable
from importlib.metadata import version

from fastapi import FastAPI

from services.access import HttpSettings
from services.console import pages
from services.console.source import Source
from services.http import create_app


def create(source: Source, settings: HttpSettings, ready: Callable[[], dict[str, str]] = dict) -> FastAPI:
    """Raises StartupError: a URL is none."""
    app = create_app("console", version("rlif"), settings, ready, pages=pages.PATHS)
    app.include_router(pages.router(source, settings))
    return app

"""`rlif console`, `rlif report`: look at a run, while it goes on or afterwards."""

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services import logs
from services.cli.watch import watch
from services.recipe_sections import REDIS_SCHEMES, of_scheme
from services.startup import StartupError


def console(
    run: Annotated[str, typer.Option("--run", help="The run's name: `run.name` of its recipe.")],
    redis: Annotated[str | None, typer.Option(help="Redis URL of the run; RLIF_REDIS_URL when left out.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="URL of a reward server of the run, to shade tokens and change the spec.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="The run's folder: curves of the runs beside it can be laid over.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8300,
    host: Annotated[
        str, typer.Option(help="Address to bind; beyond loopback RLIF_API_TOKEN must be set.")
    ] = "127.0.0.1",
) -> None:
    """A web page of a run: its numbers, samples, dead letters and controls. The orchestrator serves the same."""
    watch("console")
    url = redis or os.environ.get("RLIF_REDIS_URL")
    if not url:
        raise StartupError("--redis (or RLIF_REDIS_URL): give the URL of the run's redis")
    try:
        of_scheme(url, *REDIS_SCHEMES)
    except ValueError as error:
        raise StartupError(f"--redis: {error}") from error
    from services.access import settings_from_environment
    from services.console.app import create
    from services.console.source import Source
    from services.http import serve

    settings = settings_from_environment(host)
    app = create(Source(url, run, tuple(reward or ()), run_dir), settings)
    _check_redis(url)

    def tell(bound: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        Console().print(f"console http://{shown}:{bound}/", highlight=False, soft_wrap=True)

    serve(app, host, port, drain_seconds=2, listening=tell)


def _check_redis(url: str) -> None:
    """Raises StartupError: none answers there, or it refuses the login."""
    from redis.exceptions import RedisError

    from services.redis import connect_sync, shown

    with connect_sync(url) as client:
        try:
            client.ping()
        except (RedisError, TypeError) as error:  # TypeError: an option that there is not
            # With an @ behind the ? the address may be half a password, which the library quotes.
            reason = type(error).__name__ if "@" in url.partition("?")[2] else str(error)
            raise StartupError(f"--redis: no redis answers at {shown(url)}: {reason}") from error


def report(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    out: Annotated[Path, typer.Argument(help="HTML file to write.")],
    over: Annotated[
        list[Path] | None, typer.Option(help="Folder of another run whose curves are laid over; may be repeated.")
    ] = None,
) -> None:
    """Write what the console shows of a run into one file that can be mailed."""
    logs.configure("WARNING")
    from services.console.report import write

    asyncio.run(write(run, out, over or []))
    Console().print(f"{out}: {out.stat().st_size / 1e3:.0f} kB", highlight=False)

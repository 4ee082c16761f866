"""A run as one static file that can be mailed: state, curves, samples, dead letters. It asks nobody for anything."""

import base64
import hashlib
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
from markupsafe import Markup

from services import recipe as recipes
from services.console.curves import columns, curves
from services.console.overview import look
from services.console.pages import ASSETS, TEMPLATES
from services.console.source import Desk, Source, sit_down
from services.console.tokens import plain
from services.redis import EmbeddedRedis, connect_sync
from services.run_folder import only_one
from services.startup import StartupError
from services.steps import StepsError, read_steps

GROUPS = 50
LETTERS = 50
MOST_CHARACTERS = 4000
"""Of a text in the report."""
START = """
const found = JSON.parse(document.getElementById("found").textContent);
Charts.show(document.getElementById("charts"), document.getElementById("legend"), found);
"""


async def write(run_dir: Path, out: Path, over: Sequence[Path] = ()) -> None:
    """The run in `run_dir`, with the curves of the runs in the folders `over` laid over its own.

    Its private redis is started for the time, where that is not running. Raises StartupError: it is no run's folder, or
    `out` cannot be written; and DeadlineExceeded where its redis does not answer.
    """
    if not (run_dir / "recipe.yaml").exists():
        raise StartupError(f"{run_dir} holds no run: there is no recipe.yaml")
    chosen = recipes.load(run_dir / "recipe.yaml")
    url = recipes.redis_url(chosen)
    if url is None:
        raise StartupError(f"{run_dir}: its recipe names no redis (queue.url, or RLIF_REDIS_URL)")
    with ExitStack() as stack:
        own = EmbeddedRedis(run_dir.resolve() / "redis") if (run_dir / "redis").is_dir() else None
        if own is not None and own.url == url and not _answers(url):
            stack.enter_context(only_one(run_dir))
            stack.enter_context(own)
        desk = sit_down(Source(url, chosen.run.name))
        try:
            text = await _text(desk, run_dir, over)
        finally:
            await desk.close()
    try:
        out.write_text(text)
    except OSError as error:
        raise StartupError(f"cannot write {out}: {error.strerror}") from error


def _answers(url: str) -> bool:
    with connect_sync(url) as client:
        try:
            return bool(client.ping())
        except Exception:
            return False


async def _text(desk: Desk, run_dir: Path, over: Sequence[Path]) -> str:
    rows = _rows(run_dir)
    wanted = curves({name for row in rows.values() for name, value in row.items() if _is_number(value)})
    runs = [{"name": desk.run_id, "curves": columns(rows, wanted)}]
    runs += [{"name": path.name, "curves": columns(_rows(path), wanted)} for path in over]
    found = {"charts": [vars(one) for one in wanted], "runs": runs, "step": max(rows)}
    now = await look(desk)
    if now.trouble:
        raise StartupError(now.trouble)
    groups, letters = await desk.samples.last(GROUPS), await desk.queue.dead()
    style = "\n".join(ASSETS[name].read_text() for name in ("page.css", "uplot.css", "console.css"))
    script = "\n".join(ASSETS[name].read_text() for name in ("uplot.js", "charts.js")) + START
    return TEMPLATES.get_template("report.html").render(
        run=desk.run_id,
        now=now,
        views=[plain(group) for group in groups],
        letters=letters[::-1][:LETTERS],
        most_characters=MOST_CHARACTERS,
        made_at=time.strftime("%Y-%m-%d %H:%M %Z"),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        style=Markup(style),
        script=Markup(script),
        # Inside a script element nothing but `<` could end it.
        found=Markup(orjson.dumps(found).decode().replace("<", "\\u003c")),
    )


def _rows(run_dir: Path) -> dict[int, dict[str, Any]]:
    try:
        return {row["step"]: row for row in read_steps(run_dir / "steps.jsonl")}
    except StepsError as error:
        raise StartupError(str(error)) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hash(text: str) -> str:
    """As a content-security policy names the text of an element."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert not re.search(r"</(?:style|script)", text)
    return f"'sha256-{digest}'"

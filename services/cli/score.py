"""`rlif score`: score completions from the command line, by a model loaded for it or by a running server."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from reward_server.scorer.metrics import METRICS, TOP_K
from services import logs
from services.api import ScoreItem, ScoreResponse
from services.startup import StartupError

if TYPE_CHECKING:
    from services.clients import BlockingRewardClient

BATCH_ITEMS = 64
LOADING_SECONDS = 3600.0
"""How long a model may take to load; the first time it is downloaded."""
FIELDS = tuple(ScoreItem.model_fields)
AT_ITEM = re.compile(r"items\[(\d+)\]")
"""The field of a refusal that is about one item."""


@contextmanager
def _reward_url(
    url: str | None, model: str | None, reference_model: str | None, dtype: str, device: str
) -> Iterator[str]:
    if url:
        yield url
        return
    from services.cli.child import serving

    options = ["--model", str(model), "--dtype", dtype, "--device", device]
    options += [] if reference_model is None else ["--reference-model", reference_model]
    with ExitStack() as stack:
        with Console(stderr=True).status(f"loading {model}"):
            own = stack.enter_context(serving("reward", *options, deadline_seconds=LOADING_SECONDS))
        yield own


def _client(url: str) -> "BlockingRewardClient":
    from services.clients import BlockingRewardClient

    try:
        return BlockingRewardClient(url, os.environ.get("RLIF_API_TOKEN"), retry_seconds=10)
    except ValueError as error:
        raise StartupError(f"--url {error}") from error


def _read_items(path: Path) -> list[tuple[dict[str, Any], ScoreItem]]:
    """Rows of a JSONL file with their score items; further columns are kept. Raises StartupError naming the line."""
    rows = []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise StartupError(f"--file {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((row, ScoreItem.model_validate({key: row[key] for key in FIELDS if key in row})))
        except (ValidationError, ValueError, TypeError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise StartupError(f"--file {path}, line {number}: {why.removeprefix('Value error, ')}") from error
    if not rows:
        raise StartupError(f"--file {path}: no rows")
    return rows


def _aside(out: Path) -> Path:
    return out.with_name(out.name + ".part")


def _check_writable(out: Path) -> None:
    """Before a model is loaded for nothing. Raises StartupError."""
    if out.is_dir():
        raise StartupError(f"--out {out}: is a folder; name a file")
    try:
        _aside(out).touch()
        _aside(out).unlink()
    except OSError as error:
        raise StartupError(f"--out {out}: {error.strerror}") from error


def _show(response: ScoreResponse, metrics: list[str], console: Console) -> None:
    table = Table("completion", "tokens", *metrics, box=None)
    for number, result in enumerate(response.results):
        values = (f"{result.scores[name]:.4f}" if name in result.scores else "-" for name in metrics)
        table.add_row(str(number), str(result.n_tokens), *values)
    console.print(table)
    console.print(f"{response.model}, version {response.weight_version}, vocabulary {response.vocab_size}", style="dim")


def _score_batch(client: Any, items: list[ScoreItem], options: dict[str, Any]) -> list[dict[str, Any]]:
    """What is added to each item's row; an item that the server refuses has `error` and keeps none of the others."""
    from services.clients import Refused

    answers: list[dict[str, Any]] = [{} for _ in items]
    left = list(range(len(items)))
    while left:
        try:
            response = client.score([items[place] for place in left], **options)
        except Refused as refusal:
            faults = {int(found[1]): error for error in refusal.errors if (found := AT_ITEM.match(error["field"]))}
            if not faults:
                raise
            for number, error in faults.items():
                answers[left[number]] = {"error": error["message"]}
            left = [place for number, place in enumerate(left) if number not in faults]
        else:
            for place, result in zip(left, response.results, strict=True):
                answers[place] = result.model_dump(exclude_none=True)
            break
    return answers


def _score_file(client: Any, source: Path, out: Path, options: dict[str, Any], console: Console) -> int:
    """Returns how many rows could not be scored."""
    everything = _read_items(source)
    rows, refused = iter(everything), 0
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    aside = _aside(out)
    try:
        with Progress(*columns, console=console) as progress, aside.open("w") as sink:
            task = progress.add_task("score", total=len(everything))
            while batch := list(islice(rows, BATCH_ITEMS)):
                answers = _score_batch(client, [item for _, item in batch], options)
                for (row, _), answer in zip(batch, answers, strict=True):
                    sink.write(json.dumps({**row, **answer}) + "\n")
                    refused += "error" in answer
                progress.advance(task, len(batch))
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return refused


def score(
    model: Annotated[str | None, typer.Option(help="Hugging Face name or local folder to score with.")] = None,
    url: Annotated[str | None, typer.Option(help="A running reward server instead of a model.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt, as the model sees it.")] = None,
    completion: Annotated[list[str] | None, typer.Option(help="A completion; may be given several times.")] = None,
    file: Annotated[Path | None, typer.Option(help="JSONL: prompt|messages|prompt_token_ids, completion|...")] = None,
    out: Annotated[Path | None, typer.Option(help="Where --file's rows go, with `scores` added.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help=f"{', '.join(METRICS)}; may be given several times.")] = None,
    preset: Annotated[str, typer.Option(help="Self-certainty as in: paper, open_r1, verl.")] = "paper",
    temperature: Annotated[float, typer.Option(help="Divides the logits.", min=1e-3, max=100)] = 1.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens that topk_confidence is of.", min=1, max=256)] = TOP_K,
    last: Annotated[int | None, typer.Option(help="Score only the last so many tokens.", min=1)] = None,
    reference_model: Annotated[
        str | None, typer.Option(help="Frozen model, for kl_to_reference (with --model).")
    ] = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="Values of each token, too.")] = False,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16 (with --model).")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda (with --model).")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Self-certainty (and other scorer metrics) of completions."""
    logs.configure("WARNING")
    if (model is None) == (url is None):
        raise StartupError("give exactly one of --model and --url")
    if reference_model is not None and model is None:
        raise StartupError(f"--reference-model {reference_model}: a running server has its own; it goes with --model")
    inline = prompt is not None and bool(completion)
    if inline == (file is not None and out is not None) or (file is None) != (out is None):
        raise StartupError("give either --prompt with --completion, or --file with --out")
    if preset not in ("paper", "open_r1", "verl"):
        raise StartupError(f"--preset {preset}: choose paper, open_r1 or verl")
    if per_token and not (as_json or file):
        raise StartupError("--per-token: its values come with --json, or in --out's rows")
    if file is not None and out is not None:
        _read_items(file)
        _check_writable(out)
    from services.clients import CallError, Refused

    console = Console(stderr=as_json)
    options: dict[str, Any] = {
        "metrics": metric or ["self_certainty"],
        "preset": preset,
        "temperature": temperature,
        "top_k": top_k,
        "last": last,
        "per_token": per_token,
    }
    with _reward_url(url, model, reference_model, dtype, device) as address, _client(address) as client:
        try:
            if file is not None and out is not None:
                refused = _score_file(client, file, out, options, console)
                if refused:
                    console.print(f"rlif: {refused} rows could not be scored; {out} has `error` there", style="red")
                    raise typer.Exit(1)
                return
            response = client.score([ScoreItem(prompt=prompt, completion=text) for text in completion or []], **options)
        except CallError as error:
            console.print(f"rlif: {error}", style="red", highlight=False, markup=False)
            raise typer.Exit(2 if isinstance(error, Refused) else 1) from error
    if as_json:
        typer.echo(response.model_dump_json(exclude_none=True))
    else:
        _show(response, metric or ["self_certainty"], console)

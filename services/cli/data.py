"""`rlif data prepare`: a data set made ready to train on."""

import asyncio
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services import prompts
from services.contract import Reference
from services.model_folder import quiet_hub
from services.preparation import manifest
from services.preparation.known import KNOWN
from services.preparation.prepare import Filters, prepare, write
from services.recipe import explain
from services.recipe_sections import Data, Fields
from services.rows import FILES, DataError, Row, is_local
from services.startup import StartupError

app = typer.Typer(no_args_is_help=True, help="Data sets made ready to train on.")

SHOWN = 20
"""Answers that do not verify, named one by one in the manifest; the others are counted."""
COLUMNS = tuple(name for name in Fields.model_fields if name != "reference")
OPTIONS = {"data.path: ": "", "data.split": "--split", "data.fields": "--fields"}
OPTIONS |= {"data.answer_pattern": "--answer-pattern", "model.path": "--tokenizer"}
NO_REFERENCE = ("id", "source", "prompt", "messages")


@app.callback()
def root() -> None:
    """Data sets made ready to train on."""


def _range(option: str, text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    low, _, high = text.partition(":")
    try:
        found = float(low), float(high)
    except ValueError as error:
        raise StartupError(f"{option} {text}: write LOW:HIGH, as in 0.1:0.9") from error
    if not found[0] <= found[1]:
        raise StartupError(f"{option} {text}: the lower end comes first")
    return found


def _fields(text: str | None) -> Fields | None:
    """`prompt=question,answer=answer`, and `reference.NAME=COLUMN` for what else the rewards read."""
    if text is None:
        return None
    tree: dict[str, Any] = {"reference": {}}
    for pair in text.split(","):
        key, found, column = pair.partition("=")
        if not found or not key or not column:
            raise StartupError(f"--fields {text}: write prompt=COLUMN,answer=COLUMN")
        if key.startswith("reference."):
            tree["reference"][key.removeprefix("reference.")] = column
        elif key in COLUMNS:
            tree[key] = column
        else:
            valid = ", ".join([*COLUMNS, "reference.NAME"])
            raise StartupError(f"--fields {pair}: there is no field {key!r}; choose from {valid}")
    try:
        return Fields.model_validate(tree)
    except ValidationError as error:
        raise StartupError(f"--fields {text}: {explain(error)}") from error


def _verify(rows: list[Row], reward: str, workers: int, console: Console) -> dict[str, Any]:
    """What the reward says of the rows' own answers."""
    from reward_server import golds

    asked = [row for row in rows if row.get("answer") is not None]
    references = [
        Reference.model_validate({name: row[name] for name in row if name not in NO_REFERENCE}) for row in asked
    ]
    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("verifying", total=len(references))
        scores = asyncio.run(golds.check(references, reward, workers, lambda: progress.advance(bar)))
    failed = [(row, score) for row, score in zip(asked, scores, strict=True) if not golds.is_right(score)]
    shown = [
        {"id": row["id"], "answer": row["answer"][:200], "outcome": str(score.outcome), "detail": score.detail[:200]}
        for row, score in failed[:SHOWN]
    ]
    return {"reward": reward, "answers": len(asked), "not_verified": len(failed), "which": shown}


def _data(what: str, file: Path | None, **given: Any) -> Data:
    """Where the rows are, and what their columns mean; what is given wins. Raises StartupError naming the option."""
    known = KNOWN.get(what)
    settings: dict[str, Any] = {"path": what}
    if known is not None:
        for option in ("fields", "answer_pattern"):
            if given[option] is not None:
                raise StartupError(f"--{option.replace('_', '-')}: the columns of {what!r} are known")
        settings = {
            "path": known.path if file is None else str(file),
            **{name: getattr(known, name) for name in ("config", "split", "source", "fields", "answer_pattern")},
        }
    elif file is not None:
        raise StartupError(f"--file {file}: is for a data set known by name ({', '.join(KNOWN)}), not {what!r}")
    try:
        return Data.model_validate(settings | {name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise StartupError(explain(error)) from error


def _at_a_commit(data: Data) -> Data:
    """A data set on the hub at the commit that its revision names now. Raises StartupError: the hub does not say."""
    if is_local(data.path):
        return data
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(data.path, revision=data.revision).sha
    except Exception as error:  # the hub client raises from half a dozen unrelated trees
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StartupError(
            f"{data.path!r} is no data set known by name ({', '.join(KNOWN)}), no file or folder here, and not to be "
            f"had from the Hugging Face hub: {reason}"
        ) from error
    return data.model_copy(update={"revision": commit})


def _in_options(message: str) -> str:
    """A message that names a recipe's keys, with the options that they are here."""
    for key, option in OPTIONS.items():
        message = message.replace(key, option)
    return message


def _account(data: Data, filters: Filters, seed: int, prompt: str | None) -> dict[str, Any]:
    """What the manifest says of source and settings: files with their checksums."""

    def file(path: Path) -> dict[str, str]:
        return {"path": str(path), "sha256": manifest.sha256(path)}

    source = data.model_dump(include={"path", "config", "split", "revision"})
    if Path(data.path).is_file():
        source = dict(file(Path(data.path)))
    settings = filters.model_dump(mode="json")
    settings["decontaminate"] = [file(path) for path in filters.decontaminate]
    settings["pass_rates"] = [file(path) for path in filters.pass_rates]
    return {"source": source, "seed": seed, "prompt": prompt, "filters": settings}


@app.command("prepare")
def prepare_command(
    what: Annotated[str, typer.Argument(help=f"{', '.join(KNOWN)}; or a JSONL or Parquet file, or a name on the hub.")],
    out: Annotated[Path, typer.Argument(help="The file to write (JSONL); its manifest goes beside it.")],
    file: Annotated[Path | None, typer.Option(help="A local copy of a data set known by name.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a data set on the hub.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a data set on the hub.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    fields: Annotated[
        str | None, typer.Option(help="Columns of any other data set: prompt=COLUMN,answer=COLUMN,tests=..,id=..")
    ] = None,
    answer_pattern: Annotated[str | None, typer.Option(help="Regex whose group cuts the answer out.")] = None,
    source: Annotated[str | None, typer.Option(help="What rewards know the data set by.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the order, and each problem's template.", min=0)] = 0,
    prompt: Annotated[str | None, typer.Option(help="Prompt to put around each problem, as intuitor-3b@1.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Model whose tokenizer counts --max-prompt-tokens.")] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="With --tokenizer, longer prompts are left out; 512 when left out.", min=1)
    ] = None,
    pass_rates: Annotated[
        list[Path] | None, typer.Option(help="Earlier results (JSONL: id or task_id, and a rate).")
    ] = None,
    pass_rate_field: Annotated[str, typer.Option(help="The field of --pass-rates, from 0 to 1.")] = "pass_rate",
    keep: Annotated[str | None, typer.Option(help="Pass rates to keep, as 0.1:0.9.")] = None,
    decontaminate: Annotated[list[Path] | None, typer.Option(help="Evaluation set: what is in it is left out.")] = None,
    rating: Annotated[str | None, typer.Option(help="code_contests: ratings to keep, as 800:1600.")] = None,
    max_tests: Annotated[int | None, typer.Option(help="Tests of a task to keep, public ones first.", min=1)] = None,
    limit: Annotated[int | None, typer.Option(help="Rows to keep, of the shuffled ones.", min=1)] = None,
    verify: Annotated[bool, typer.Option(help="Check that every answer satisfies its own reward.")] = True,
    workers: Annotated[int, typer.Option(help="Processes that verify.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Write rows that a recipe trains on as they are (`data: {path: OUT}`), and a manifest that accounts for each."""
    known = KNOWN.get(what)
    if out.suffix != ".jsonl":
        raise StartupError(f"{out}: the file to write ends in .jsonl")
    if (keep is None) == bool(pass_rates):
        raise StartupError("--pass-rates and --keep belong together: give both or neither")
    if max_prompt_tokens is not None and tokenizer is None:
        raise StartupError(f"--max-prompt-tokens {max_prompt_tokens}: name the model that counts them, --tokenizer")
    if rating is not None and what != "code_contests":
        raise StartupError(f"--rating {rating}: only the problems of code_contests are rated")
    try:
        prompt = None if prompt is None else prompts.named(prompt).name
    except ValueError as error:
        raise StartupError(f"--prompt: {error}") from error
    data = _data(
        what, file, config=config, split=split, revision=revision, source=source, answer_pattern=answer_pattern,
        fields=_fields(fields),
    )  # fmt: skip
    filters = Filters(
        rating=_range("--rating", rating), decontaminate=decontaminate or [], pass_rates=pass_rates or [],
        pass_rate_field=pass_rate_field, keep=_range("--keep", keep) or (0.0, 1.0), tokenizer=tokenizer,
        max_prompt_tokens=None if tokenizer is None else max_prompt_tokens or 512, max_tests=max_tests, limit=limit,
    )  # fmt: skip
    given = {"--file": [file] if file else [], "--decontaminate": filters.decontaminate}
    for option, paths in {**given, "--pass-rates": filters.pass_rates}.items():
        for path in paths:
            if path.suffix not in FILES:
                raise StartupError(f"{option} {path}: a file must end in {', '.join(FILES)}")
            if not path.is_file():
                raise StartupError(f"{option} {path}: there is no such file")
    quiet_hub()
    data = _at_a_commit(data)
    console = Console(stderr=True)
    with console.status(f"reading {data.path}"):
        try:
            prepared = prepare(data, known, filters, seed, prompt)
        except DataError as error:
            raise StartupError(_in_options(str(error))) from error
    account = {"data_set": what, **_account(data, filters, seed, prompt)}
    grader = known.grader if known is not None else "math_verify"
    if verify and grader is not None and "answer" in prepared.rows[0]:
        account["verified"] = _verify(prepared.rows, grader, workers, console)
    made = write(prepared, out, account)
    if as_json:
        typer.echo(json.dumps(made))
        return
    _tell(made, out)


def _overrides(made: dict[str, Any], out: Path) -> list[str]:
    """With these any recipe reads the file: what it says of its own source's columns and answers is taken back."""
    of_its_own = ["fields", "answer_pattern"]
    if "messages" in made["columns"]:
        of_its_own += ["prompt", "system_prompt"]
    return [f"data.path={out}", *(f"data.{key}=null" for key in of_its_own)]


def _tell(made: dict[str, Any], out: Path) -> None:
    console = Console()
    console.print(f"{out}: {made['rows']['out']} of {made['rows']['in']} rows", highlight=False)
    for name, count in made["dropped"].items():
        console.print(f"  {name.replace('_', ' '):<20} {count} left out", highlight=False)
    if checked := made.get("verified"):
        share = checked["not_verified"] / max(1, checked["answers"])
        console.print(
            f"  {checked['reward']:<20} {checked['not_verified']} of {checked['answers']} answers do not verify "
            f"against themselves ({share:.2%})",
            highlight=False,
        )
        for outcome, count in Counter(one["outcome"] for one in checked["which"]).items():
            first = next(one for one in checked["which"] if one["outcome"] == outcome)
            console.print(
                f"    {outcome} {count}, as {first['answer']!r}", highlight=False, markup=False, soft_wrap=True
            )
    overrides = " ".join(map(shlex.quote, _overrides(made, out)))
    console.print(f"  in a recipe: {overrides}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"  sha256 {made['sha256']}; manifest: {manifest.beside(out)}", highlight=False, soft_wrap=True)

"""`rlif eval`: benchmarks answered by a model and judged by a reward server. `rlif compare`: runs side by side."""

import asyncio
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services import logs
from services.model_folder import quiet_hub
from services.startup import StartupError

if TYPE_CHECKING:
    from services.evaluation.protocol import Protocol

TASKS = "gsm8k, math500, livecodebench, cruxeval_o, mmlu_pro, ifeval, alpaca_eval"
FAMILIES = "1.5b,3b"


def _token(name: str) -> str | None:
    return os.environ.get(name) or None


def _chosen(given: str, valid: list[str], option: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in valid:
            raise StartupError(f"{option} {name}: choose from {', '.join(valid)}")
    if not names:
        raise StartupError(f"{option}: choose from {', '.join(valid)}")
    return list(dict.fromkeys(names))


def _default_out(name: str) -> Path:
    return Path("runs") / f"eval-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-')}"


def evaluate(
    model: Annotated[str | None, typer.Option(help="Hugging Face name or local folder; servers are started.")] = None,
    url: Annotated[str | None, typer.Option(help="A running rollout server, or any OpenAI-compatible one.")] = None,
    tasks: Annotated[str, typer.Option(help=f"Comma-separated, of {TASKS}.")] = "gsm8k,math500",
    preset: Annotated[str, typer.Option(help="Protocol: paper (greedy) or open_r1.")] = "paper",
    prompt: Annotated[
        str | None, typer.Option(help="Prompt around mathematical problems, as intuitor-7b@1; none: the bare problem.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No chat template: for models that have none.")] = False,
    samples: Annotated[int, typer.Option(help="Answers to each question, for pass@k and maj@k.", min=1)] = 1,
    seeds: Annotated[int, typer.Option(help="Repetitions of it all with seeds of their own.", min=1)] = 1,
    temperature: Annotated[float | None, typer.Option(help="Instead of the protocol's.", min=0, max=100)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Instead of the protocol's.", min=1)] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each task.", min=1)] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the tasks' files; else they come from the hub.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for answers and figures; a later call goes on there.")
    ] = None,
    certainty: Annotated[
        bool, typer.Option("--certainty", help="What self-certainty knows of right and wrong.")
    ] = False,
    reward_url: Annotated[str | None, typer.Option(help="A running reward server, instead of one of its own.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="For alpaca_eval: http://HOST:PORT/v1 of the judge.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name there.")] = None,
    judge_key_env: Annotated[str | None, typer.Option(help="RLIF_KEY_... variable with the judge's key.")] = None,
    token_env: Annotated[str, typer.Option(help="Variable with the token of --url.")] = "RLIF_API_TOKEN",
    model_name: Annotated[str | None, typer.Option(help="Which model of an OpenAI-compatible --url.")] = None,
    engine: Annotated[str, typer.Option(help="transformers or vllm (with --model).")] = "transformers",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda (with --model).")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16 (with --model).")] = "float32",
    sandbox: Annotated[
        str | None, typer.Option(help="Where programs run (as in `rlif serve reward`); bubblewrap for tasks with code.")
    ] = None,
    in_flight: Annotated[int, typer.Option(help="Answers asked for at once.", min=1)] = 64,
    beside: Annotated[
        str, typer.Option(help="Rows of the paper: 1.5b, 3b, 7b, 14b, qwen3-14b, llama-3b, olmo-7b.")
    ] = FAMILIES,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Answer benchmarks and judge the answers: accuracy with intervals, pass@k, maj@k, beside the paper's figures.

    Nothing is done twice: stopped or killed, the same command goes on where it was.
    """
    logs.configure("WARNING")
    quiet_hub()
    from services.clients import CallError, credentials
    from services.evaluation import paper, report, run
    from services.evaluation.answers import WeightsChanged
    from services.evaluation.tasks import BENCHMARKS

    if (model is None) == (url is None):
        raise StartupError("give exactly one of --model and --url")
    families = _chosen(beside, list(paper.FAMILIES), "--beside")
    benchmarks = [BENCHMARKS[name] for name in _chosen(tasks, list(BENCHMARKS), "--tasks")]
    if (judge_url is None) != (judge_model is None):
        raise StartupError("--judge-url and --judge-model belong together: give both or neither")
    if certainty and url is not None and reward_url is None:
        raise StartupError("--certainty with --url: name a reward server that has the model, --reward-url")
    protocol = _protocol(preset, prompt, plain, samples, seeds, temperature, max_tokens)
    try:
        name = credentials(url)[0] if url is not None else str(model)
    except ValueError as error:
        raise StartupError(f"--url: {error}") from error
    chosen = run.Settings(
        model=name,
        benchmarks=benchmarks,
        protocol=protocol,
        out=out or _default_out(name),
        folder=None if model is None else _folder(model),
        url=url,
        url_token=_token(token_env),
        model_name=model_name,
        reward_url=reward_url,
        token=_token("RLIF_API_TOKEN"),
        admin_token=_token("RLIF_ADMIN_TOKEN"),
        engine=engine,
        device=device,
        dtype=dtype,
        sandbox=sandbox,
        data=data,
        limit=limit,
        certainty=certainty,
        judge=None
        if judge_url is None or judge_model is None
        else run.JudgeModel(judge_url, judge_model, judge_key_env),
        in_flight=in_flight,
    )
    from services.cli.child import serving

    aside, console = Console(stderr=True), Console(stderr=as_json)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=aside) as shown:
            results = asyncio.run(run.evaluate(chosen, serving, _progress(shown)))
    except (CallError, WeightsChanged) as error:
        aside.print(f"rlif: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        aside.print(f"what was answered is kept in {chosen.out}: the same command goes on", highlight=False)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(results.model_dump_json())
    else:
        tables = (report.figures_table, report.several_table, report.certainty_table)
        for table in (*(made(results) for made in tables), report.beside_paper(results, families)):
            if table is not None:
                console.print(table)
        for line in report.remarks(results):
            console.print(line, style="yellow", highlight=False, markup=False)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no plot: matplotlib is not installed (pip install 'rlif[demo]')", style="dim")
    else:
        console.print(
            f"plot    {report.plot(results, families, chosen.out / 'results.png')}", highlight=False, soft_wrap=True
        )
    console.print(f"figures {chosen.out / 'results.json'}", highlight=False, soft_wrap=True)
    if empty := [task.title for task in results.tasks if task.value is None]:
        aside.print(f"rlif: no answer could be judged: {', '.join(empty)}", style="red", highlight=False, markup=False)
        raise typer.Exit(1)


def _progress(shown: Progress) -> Callable[[str, int], Callable[[int], None]]:
    def begin(what: str, total: int) -> Callable[[int], None]:
        task = shown.add_task(what, total=total)
        return lambda count: shown.advance(task, count)

    return begin


def _folder(model: str) -> Path:
    from services.model_folder import model_folder

    return model_folder(model, None)


def _protocol(
    preset: str,
    prompt: str | None,
    plain: bool,
    samples: int,
    seeds: int,
    temperature: float | None,
    max_tokens: int | None,
) -> "Protocol":
    """Raises StartupError: an option that is not valid, or several answers to be drawn where all are the same."""
    from services.evaluation.protocol import PRESETS, Protocol
    from services.prompts import named

    base = PRESETS[_chosen(preset, list(PRESETS), "--preset")[0]]
    changes = {
        "prompt": base.prompt if prompt is None else None if prompt == "none" else prompt,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "plain": plain,
        "samples": samples,
        "seeds": list(range(seeds)),
    }
    changes = {key: value for key, value in changes.items() if value is not None or key == "prompt"}
    try:
        protocol = Protocol.model_validate(base.model_dump() | changes)
        if protocol.prompt is not None:
            named(protocol.prompt)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise StartupError(f"--{'-'.join(map(str, fault['loc'])).replace('_', '-')}: {fault['msg']}") from error
    except ValueError as error:
        raise StartupError(f"--prompt: {error}") from error
    if protocol.temperature == 0 and samples * seeds > 1:
        asked = f"--samples {samples}" if samples > 1 else f"--seeds {seeds}"
        raise StartupError(f"{asked}: greedy answers are the same each time; give --temperature as well")
    return protocol


def compare(
    runs: Annotated[list[str], typer.Argument(help="Folders of evaluations or runs, as FOLDER or LABEL=FOLDER.")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Evaluations, training runs and control arms side by side: every arm against the first, with significance.

    Runs of one label are one arm; the label is the folder's name without the seed's number at its end.
    """
    from services.evaluation import comparison

    made = comparison.compare(comparison.arms(runs))
    if as_json:
        typer.echo(made.model_dump_json())
        return
    console = Console()
    for table in comparison.tables(made):
        console.print(table)
    for note in made.notes:
        console.print(note, style="yellow", highlight=False)

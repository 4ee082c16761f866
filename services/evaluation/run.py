"""An evaluation from beginning to end: questions, answers, verdicts, figures. What is in the ledger is not done again.

Each server is started only when there is something for it to do, and the model that answers is gone from memory before
a scorer is loaded.
"""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from services.clients import CallError, RewardClient, RolloutClient
from services.contract import Version
from services.evaluation import answers, ledger, report, sources
from services.evaluation.benchmark import Benchmark
from services.evaluation.figures import figures, item_values, judged
from services.evaluation.grading import CHECK_SECONDS, grade, judges, open_groups
from services.evaluation.identity import checksum
from services.evaluation.ledger import Ledger
from services.evaluation.protocol import Asked, Protocol, asked
from services.evaluation.results import ItemValue, Results
from services.evaluation.sources import Questions
from services.evaluation.tasks import alpaca_eval
from services.spec import RewardTerm
from services.startup import StartupError

log = logging.getLogger(__name__)

TEMPLATE = "chat template"
"""What the refusal of a conversation names."""

Serve = Callable[..., AbstractContextManager[str]]
"""`services.cli.child.serving`: a server for as long as it is needed."""
Progress = Callable[[str, int], Callable[[int], None]]
"""(what is being done, how many of it) -> called with how many more are done."""
LOADING_SECONDS = 3600.0
"""How long a model may take to load."""


@dataclass(frozen=True)
class JudgeModel:
    """A language model that judges, behind an OpenAI-compatible server."""

    url: str
    model: str
    key_env: str | None = None


@dataclass(frozen=True)
class Settings:
    """Exactly one of `folder` (a model on this machine, run by servers of our own) and `url` (a running server).
    `model` is how the model is called in the report. `reward_url` is a running reward server; none: our own."""

    model: str
    benchmarks: list[Benchmark]
    protocol: Protocol
    out: Path
    folder: Path | None = None
    url: str | None = None
    url_token: str | None = None
    model_name: str | None = None
    reward_url: str | None = None
    token: str | None = None
    admin_token: str | None = None
    engine: str = "transformers"
    device: str = "auto"
    dtype: str = "float32"
    sandbox: str | None = None
    data: Path | None = None
    limit: int | None = None
    certainty: bool = False
    judge: JudgeModel | None = None
    in_flight: int = 64
    deadline_seconds: float = 3600.0


@dataclass
class Plan:
    """One benchmark's part. `refused` says why, by key, there is no answer."""

    benchmark: Benchmark
    terms: tuple[RewardTerm, ...]
    questions: Questions
    wanted: list[Asked]
    refused: dict[str, str] = field(default_factory=dict)

    def tell_refused(self) -> None:
        if self.refused:
            first = next(iter(self.refused.values()))
            remedy = " (--prompt none leaves the system message out, --plain the template)" if TEMPLATE in first else ""
            log.warning("%s: %d answers were refused: %s%s", self.benchmark.name, len(self.refused), first, remedy)


def _terms(benchmark: Benchmark, judge: JudgeModel | None) -> tuple[RewardTerm, ...]:
    if not benchmark.judge:
        return benchmark.terms
    if judge is None:
        raise StartupError(
            f"--tasks {benchmark.name}: a language model judges it; name one with --judge-url and --judge-model"
        )
    return alpaca_eval.judged_by(judge.url, judge.model, judge.key_env)


async def evaluate(chosen: Settings, serve: Serve, progress: Progress) -> Results:
    """Raises StartupError before anything is asked, CallError when a server cannot be used, and WeightsChanged; the
    answers that were had until then are kept."""
    terms = [_terms(benchmark, chosen.judge) for benchmark in chosen.benchmarks]
    questions = [sources.load(benchmark, chosen.data, chosen.limit) for benchmark in chosen.benchmarks]
    if chosen.folder is not None:
        identity = f"{checksum(chosen.folder)}, {chosen.engine}, {chosen.dtype}"
        server: answers.Server | None = None
    else:
        assert chosen.url is not None
        server = await answers.connect(chosen.url, chosen.model_name, chosen.url_token, chosen.deadline_seconds)
        identity = server.identity
    plans = [
        Plan(benchmark, those, found, list(asked(benchmark, found.items, chosen.protocol, identity)))
        for benchmark, those, found in zip(chosen.benchmarks, terms, questions, strict=True)
    ]
    with ledger.opened(chosen.out) as kept:
        try:
            await _answer(chosen, plans, server, identity, kept, serve, progress)
        finally:
            if server is not None:
                await server.close()
        results, items = await _judge(chosen, plans, identity, kept, serve, progress)
        report.write(chosen.out, results, items)
    return results


async def _answer(
    chosen: Settings,
    plans: Sequence[Plan],
    server: answers.Server | None,
    identity: str,
    kept: Ledger,
    serve: Serve,
    progress: Progress,
) -> None:
    async def ask(server: answers.Server) -> None:
        for plan in plans:
            advance = progress(f"{plan.benchmark.name}: answers", len(plan.wanted))
            plan.refused = await answers.ask(server, plan.wanted, kept, chosen.in_flight, advance)
            plan.tell_refused()

    if server is not None:
        await ask(server)
    elif any(one.key not in kept.answers for plan in plans for one in plan.wanted):
        options = ("--model", str(chosen.folder), "--engine", chosen.engine, *_hardware(chosen))
        with serve("rollout", *options, deadline_seconds=LOADING_SECONDS) as url:
            client = RolloutClient(url, chosen.token)
            async with client:
                await ask(answers.Rollouts(client, identity, None, chosen.deadline_seconds))


def _hardware(chosen: Settings) -> tuple[str, ...]:
    return "--device", chosen.device, "--dtype", chosen.dtype


def _client(chosen: Settings, url: str) -> RewardClient:
    try:
        return RewardClient(url, chosen.token, chosen.admin_token)
    except ValueError as error:
        raise StartupError(f"--reward-url {error}") from error


@asynccontextmanager
async def _reward_client(chosen: Settings, serve: Serve) -> AsyncIterator[RewardClient]:
    if chosen.reward_url is not None:
        async with _client(chosen, chosen.reward_url) as client:
            yield client
        return
    code = any(benchmark.runs_code for benchmark in chosen.benchmarks)
    options = ["--sandbox", chosen.sandbox or ("bubblewrap" if code else "none")]
    if chosen.certainty:
        options += ["--model", str(chosen.folder), *_hardware(chosen)]
    with serve("reward", *options, deadline_seconds=LOADING_SECONDS) as url:
        async with _client(chosen, url) as client:
            yield client


async def _scorer(chosen: Settings, identity: str) -> str | None:
    """Which weights say how certain an answer is; none where nobody asks. Raises StartupError."""
    if not chosen.certainty:
        return None
    if chosen.reward_url is None:
        return f"{identity.split(',')[0]}, {chosen.dtype}"
    async with _client(chosen, chosen.reward_url) as client:
        try:
            served = await client.model(CHECK_SECONDS)
        except CallError as error:
            raise StartupError(f"--certainty needs a reward server with a model: {error}") from error
    return f"{served['model']} {Version.model_validate(served['weight_version'])}, {served['dtype']}"


async def _judge(
    chosen: Settings, plans: Sequence[Plan], identity: str, kept: Ledger, serve: Serve, progress: Progress
) -> tuple[Results, list[ItemValue]]:
    scorer = await _scorer(chosen, identity)
    panels = []
    for plan in plans:
        known = [kept.answers[one.key] for one in plan.wanted if one.key in kept.answers]
        tokens = all(answer.token_ids is not None for answer in known)
        panels.append(judges(plan.benchmark, plan.terms, chosen.protocol.samples, scorer, tokens))
    every = [(plan, name, judge) for plan, panel in zip(plans, panels, strict=True) for name, judge in panel.items()]
    if any(open_groups(judge, plan.wanted, kept) for plan, _, judge in every):
        async with _reward_client(chosen, serve) as client:
            for plan, name, judge in every:
                advance = progress(f"{plan.benchmark.name}: {name}", len(plan.wanted))
                await grade(client, judge, plan.wanted, kept, chosen.deadline_seconds, advance)
    tasks, items = [], []
    for plan, panel in zip(plans, panels, strict=True):
        found = judged(plan.benchmark, plan.wanted, panel["right"], kept)
        tasks.append(figures(plan.benchmark, plan.questions, found, panel, kept, chosen.protocol, scorer))
        items += item_values(found)
    return Results(model=chosen.model, identity=identity, protocol=chosen.protocol, tasks=tasks), items

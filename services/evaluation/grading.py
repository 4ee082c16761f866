"""Verdicts by a reward server: verification runs in its killable processes, programs in its sandbox.

Up to four specs judge a benchmark's answers: who is right; the plurality of an item's answers; the scorer's certainty;
and the vote weighted by it. Each has verdicts of its own, so that asking for one more does not repeat the others.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from services.api import CompletionText, RewardGroup
from services.clients import CallError, Refused, RewardClient
from services.contract import Outcome, Score, Task
from services.evaluation.benchmark import Benchmark
from services.evaluation.ledger import Ledger, Verdict
from services.evaluation.protocol import Asked
from services.spec import RewardSpec, RewardTerm
from services.startup import StartupError

CALL_COMPLETIONS = 64
CALLS_IN_FLIGHT = 2
CHECK_SECONDS = 30.0


@dataclass(frozen=True)
class Judge:
    """`key`: the spec, and the scorer's weights where they speak. `of_group`: it compares the answers of an item, so it
    needs all of them. `whole`: it judges the completion, not what the benchmark reads of it. `by_reference`: it
    compares with what the item says is right.
    """

    spec: RewardSpec
    key: str
    of_group: bool = False
    whole: bool = False
    by_reference: bool = False

    @property
    def term(self) -> str:
        return self.spec.rewards[0].key

    def key_of(self, one: Asked) -> str:
        """Names its verdict on an answer in the ledger: what decides the verdict, besides the answer, is in it."""
        return f"{self.key} {one.item.reference_id}" if self.by_reference else self.key


def _judge(*terms: RewardTerm, scorer: str = "", **how: bool) -> Judge:
    spec = RewardSpec(rewards=list(terms))
    return Judge(spec, f"{spec.spec_id} {scorer}".strip(), **how)


def judges(
    benchmark: Benchmark, terms: Sequence[RewardTerm], samples: int, scorer: str | None, tokens: bool
) -> dict[str, Judge]:
    """By what they are asked: `right`, and where it applies `majority`, `certainty` and `borda`. `scorer` identifies
    the scorer model's weights; none: nobody asks for certainty. Without `tokens` of the answers only their texts could
    be scored, and `borda` sees just what the benchmark reads of those: it is left out."""
    found = {"right": _judge(*terms, by_reference=True)}
    if scorer is not None:
        found["certainty"] = _judge(RewardTerm(name="self_certainty"), scorer=scorer, whole=True)
    if samples == 1 or benchmark.vote is None:
        return found
    # Who wins depends on how many vote, so their number is part of the spec.
    label, vote = f"majority@{samples}", benchmark.vote
    found["majority"] = _judge(RewardTerm(name="majority_vote", label=label, params=vote), of_group=True)
    if scorer is not None and tokens:
        weighted = {**vote, "weights": "borda"}
        term = RewardTerm(name="certainty_weighted_vote", label=f"borda@{samples}", params=weighted)
        found["borda"] = _judge(term, scorer=scorer, of_group=True)
    return found


async def install(client: RewardClient, judge: Judge) -> str:
    """See that the server knows the judge's spec; returns the name that it has there. Raises StartupError: the server
    lacks what the spec needs (a sandbox, a scorer, a package), or does not let us put it."""
    name = f"evaluation-{judge.spec.spec_id}"
    try:
        try:
            await client.get_spec(name, deadline_seconds=CHECK_SECONDS)
        except Refused as error:
            if error.status != 404:
                raise
            await client.put_spec(name, judge.spec, CHECK_SECONDS)
    except CallError as error:
        raise StartupError(f"the answers cannot be judged: {error}") from error
    return name


async def grade(
    client: RewardClient,
    judge: Judge,
    wanted: Sequence[Asked],
    ledger: Ledger,
    deadline_seconds: float,
    progress: Callable[[int], None],
) -> None:
    """Have a verdict on every answer that is there and has no final one. Raises CallError and StartupError."""
    groups = open_groups(judge, wanted, ledger)
    progress(len(wanted) - sum(map(len, groups)))
    if not groups:
        return
    name = await install(client, judge)
    slots = asyncio.Semaphore(CALLS_IN_FLIGHT)

    async def some(batch: Sequence[Sequence[Asked]]) -> None:
        async with slots:
            bodies = [_body(judge, group, ledger) for group in batch]
            try:
                scored = await client.rewards(bodies, name, deadline_seconds)
                ledger.add(
                    [
                        Verdict(answer=one.key, spec=judge.key_of(one), components=score.components)
                        for group, scores in zip(batch, scored.groups, strict=True)
                        for one, score in zip(group, scores.scores, strict=True)
                    ]
                )
                progress(sum(map(len, batch)))
                return
            except Refused as error:
                if error.status in (401, 403):
                    raise
                if len(batch) == 1:  # a record that no verdict can be had on, an answer too long
                    failed = {term.key: Score.failed(Outcome.error, str(error)) for term in judge.spec.rewards}
                    ledger.add([Verdict(answer=one.key, spec=judge.key_of(one), components=failed) for one in batch[0]])
                    progress(len(batch[0]))
                    return
        await asyncio.gather(*(some([group]) for group in batch))

    try:
        async with asyncio.TaskGroup() as tasks:
            for batch in _calls(groups):
                tasks.create_task(some(batch))
    except* CallError as several:
        raise several.exceptions[0] from several


def open_groups(judge: Judge, wanted: Sequence[Asked], ledger: Ledger) -> list[list[Asked]]:
    """The answers that lack a final verdict, those to one item with one seed together."""

    def is_open(one: Asked) -> bool:
        verdict = ledger.verdicts.get((one.key, judge.key_of(one)))
        return verdict is None or not verdict.is_final

    found = []
    for _, several in itertools.groupby(wanted, key=lambda one: (one.item.id, one.seed)):
        group = list(several)
        answered = [one for one in group if one.key in ledger.answers]
        left = [one for one in answered if is_open(one)]
        if judge.of_group and left and len(answered) == len(group):
            found.append(group)
        elif left and not judge.of_group:
            found.append(left)
    return found


def _calls(groups: Sequence[list[Asked]]) -> Iterator[list[list[Asked]]]:
    size = max(1, CALL_COMPLETIONS // max(map(len, groups)))
    for start in range(0, len(groups), size):
        yield list(groups[start : start + size])


def _body(judge: Judge, group: Sequence[Asked], ledger: Ledger) -> RewardGroup:
    first, answers = group[0], [ledger.answers[one.key] for one in group]
    task = Task(
        task_id=first.item.id,
        source=first.benchmark.name,
        messages=first.messages,
        prompt=first.prompt,
        reference=first.item.judged_by(),
    )
    completions = [
        CompletionText(
            text=answer.text if judge.whole else first.benchmark.judged(answer.text),
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
        )
        for answer in answers
    ]
    return RewardGroup(
        group_id=first.key, task=task, prompt_token_ids=answers[0].prompt_token_ids, completions=completions
    )

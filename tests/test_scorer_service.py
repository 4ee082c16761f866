"""Concurrent scoring: shared rounds, weights that change underneath, waits with deadlines, private failures."""

import asyncio
import logging
import shutil
import threading
import time
import uuid

import pytest
import torch
from tiny import make_tiny_model

from reward_server.scorer.items import TokenItem
from reward_server.scorer.metrics import METRICS
from reward_server.scorer.service import ScorerService, ScoringFailed
from reward_server.scorer.transformers import TransformersScorer
from services.contract import Version

ALL = tuple(name for name, metric in METRICS.items() if not metric.needs_reference)


def v(step: int, lineage: int = 0) -> Version:
    return Version(lineage=lineage, version=step)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(10, 280, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def items(count: int, seed: int = 0) -> list[TokenItem]:
    return [TokenItem(tokens(2 + i % 5, seed + i), tokens(1 + 7 * i % 20, 99 + seed + i), ALL) for i in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("versions")
    return [make_tiny_model(made / str(seed), seed=seed, scale=8.0) for seed in range(3)]


@pytest.fixture
def scorer(folders):
    return TransformersScorer(str(folders[0]), "float32", "cpu", max_batch_tokens=400)


@pytest.fixture
async def start():
    """`await start(scorer, ...)` -> a running service, stopped after the test."""
    services = []

    async def begin(scorer, **settings) -> ScorerService:
        service = ScorerService(scorer, **settings)
        services.append(service)
        await service.start()
        return service

    yield begin
    for service in services:
        await service.stop()


def spy(scorer, monkeypatch):
    """Record (items, version) of every round while it runs."""
    rounds = []
    score = scorer.score

    def spied(batch, *options):
        version = scorer.version
        results = score(batch, *options)
        assert scorer.version == version
        rounds.append((list(batch), version))
        return results

    monkeypatch.setattr(scorer, "score", spied)
    return rounds


def hold(scorer, monkeypatch):
    """The next round waits until the returned event is set; `entered` says that it has begun."""
    entered, release, score = threading.Event(), threading.Event(), scorer.score

    def held(batch, *options):
        entered.set()
        assert release.wait(30)
        return score(batch, *options)

    monkeypatch.setattr(scorer, "score", held)
    return entered, release


async def until(condition, seconds=20.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen in time"
        await asyncio.sleep(0.005)


async def test_many_requests_together_score_like_one_by_one(scorer, start, monkeypatch):
    calls = [items(1 + n % 4, seed=100 * n) for n in range(40)]
    alone = [scorer.score(call) for call in calls]
    rounds = spy(scorer, monkeypatch)
    service = await start(scorer)
    together = await asyncio.gather(*(service.score(call) for call in calls))
    for expected, got in zip(alone, together, strict=True):
        assert got.version == v(0)
        for one, other in zip(expected, got.results, strict=True):
            assert one.n_tokens == other.n_tokens
            assert other.scores == pytest.approx(one.scores, rel=1e-5, abs=1e-5)
            assert other.per_token.keys() == one.per_token.keys()
    assert len(rounds) < len(calls), "nothing was batched"
    assert all(sum(map(len, batch)) <= 400 for batch, _ in rounds)


async def test_deterministic_calls_are_never_merged(scorer, start, monkeypatch):
    calls = [items(3, seed=100 * n) for n in range(8)]
    alone = [scorer.score(call) for call in calls]
    rounds = spy(scorer, monkeypatch)
    service = await start(scorer, deterministic=True)
    together = await asyncio.gather(*(service.score(call) for call in calls))
    assert len(rounds) == len(calls)
    for expected, got in zip(alone, together, strict=True):
        assert [one.scores for one in expected] == [other.scores for other in got.results]  # to the last bit


async def test_no_round_mixes_versions_while_weights_swap(scorer, folders, start, monkeypatch):
    """Every result equals, to float32 rounding, that of the version that it names."""
    asked = items(4)
    expected = {}
    for step, folder in enumerate(folders):
        expected[step] = TransformersScorer(str(folder), "float32", "cpu").score(asked)
    spy(scorer, monkeypatch)
    service = await start(scorer)
    answers = []

    async def ask():
        while len({answer.version for answer in answers}) < 3:
            answers.append(await service.score(asked))

    async def swap():
        for step in (1, 2):
            seen = len(answers)
            await until(lambda seen=seen: len(answers) > seen + 5)
            await service.load(v(step), folders[step])

    await asyncio.wait_for(asyncio.gather(swap(), *(ask() for _ in range(6))), 60)
    for answer in answers:
        for one, other in zip(expected[answer.version.version], answer.results, strict=True):
            assert other.scores == pytest.approx(one.scores, rel=1e-5, abs=1e-5)


async def test_weights_wait_for_the_running_round(scorer, folders, start, monkeypatch):
    entered, release = hold(scorer, monkeypatch)
    service = await start(scorer)
    running = asyncio.create_task(service.score(items(1)))
    await until(entered.is_set)
    loading = asyncio.create_task(service.load(v(1), folders[1]))
    await asyncio.sleep(0.2)
    assert not loading.done() and scorer.version == v(0)
    release.set()
    assert (await running).version == v(0)
    await loading
    assert (await service.score(items(1))).version == v(1)


async def test_match_waits_for_the_version(scorer, folders, start, caplog):
    caplog.set_level(logging.INFO)
    service = await start(scorer, follow="match")
    waiting = asyncio.create_task(service.score(items(1), min_weight_version=v(2)))
    await service.load(v(1), folders[1])
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert "waits for weight version 0.2 from the trainer; 0.0 is served" in caplog.text
    assert (await service.score(items(1), min_weight_version=v(1))).version == v(1)
    await service.load(v(2), folders[2])
    assert (await asyncio.wait_for(waiting, 10)).version == v(2)
    await service.load(v(0, lineage=1), folders[0])  # a restored trainer: lower step, newer lineage
    assert (await service.score(items(1), min_weight_version=v(2))).version == v(0, lineage=1)


async def test_match_gives_up_with_a_clear_error(scorer, start):
    service = await start(scorer, follow="match")
    with pytest.raises(TimeoutError, match=r"waited 0.05 s for weight version 0.7 from the trainer; 0.0 is served"):
        await service.score(items(1), min_weight_version=v(7), deadline_seconds=0.05)
    assert (await service.score(items(1))).version == v(0)


@pytest.mark.parametrize("follow", ["online", "frozen"])
async def test_other_modes_do_not_wait(scorer, start, follow):
    service = await start(scorer, follow=follow)
    assert (await service.score(items(1), min_weight_version=v(7), deadline_seconds=20)).version == v(0)


async def test_frozen_refuses_weights(scorer, folders, start):
    service = await start(scorer, follow="frozen")
    with pytest.raises(ValueError, match="frozen"):
        await service.load(v(1), folders[1])
    assert (await service.score(items(1))).version == v(0)


async def test_ema_mode(folders, start):
    averaged = TransformersScorer(str(folders[0]), "float32", "cpu", ema_decay=0.9)
    service = await start(averaged, follow="ema")
    before = await service.score(items(1))
    await service.load(v(1), folders[1])
    after = await service.score(items(1))
    assert after.version == v(1)
    newest = TransformersScorer(str(folders[1]), "float32", "cpu").score(items(1))[0].scores
    assert after.results[0].scores not in (before.results[0].scores, newest)
    for follow, decay in (("ema", None), ("online", 0.9)):
        plain = TransformersScorer(str(folders[0]), "float32", "cpu", ema_decay=decay)
        with pytest.raises(ValueError, match="ema_decay"):
            ScorerService(plain, follow=follow)


async def test_a_refused_version_leaves_the_old_one_serving(scorer, folders, start, tmp_path):
    service = await start(scorer)
    before = await service.score(items(2))
    shutil.copytree(folders[1], tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="not readable"):
        await service.load(v(1), tmp_path / "torn")
    after = await service.score(items(2))
    assert after.version == v(0) and after.results[0].scores == before.results[0].scores
    await service.load(v(2), folders[2])
    assert (await service.score(items(2))).version == v(2)


@pytest.mark.parametrize("follow", ["online", "match"])
async def test_follows_what_a_trainer_publishes(scorer, folders, start, tmp_path, redis_url, follow):
    """Real redis, real files: publisher -> follower -> the next round."""
    from safetensors.torch import load_file

    from services.redis import connect_sync
    from services.weights.follow import Follower
    from services.weights.publish import Publisher

    run = uuid.uuid4().hex
    service = await start(scorer, follow=follow)
    follower = Follower(redis_url, run, "reward-0", "reward", "http://here", service.load, poll_seconds=0.05)
    await follower.start()
    try:
        with connect_sync(redis_url) as redis:
            publisher = Publisher(redis, run, tmp_path / "weights")
            for step in (1, 2):
                tensors = load_file(folders[step] / "model.safetensors")
                await asyncio.to_thread(publisher.publish, v(step), tensors.items(), folders[step])
                if follow == "online":
                    await follower.at_least(v(step), 20)
                answer = await service.score(items(3), min_weight_version=v(step), deadline_seconds=20)
                fresh = TransformersScorer(str(folders[step]), "float32", "cpu").score(items(3))
                assert answer.version == v(step)
                assert [result.scores for result in answer.results] == [result.scores for result in fresh]
    finally:
        await follower.stop()


async def test_a_bad_item_is_named_and_harms_nobody(scorer, start):
    service = await start(scorer)
    good = asyncio.create_task(service.score(items(2)))
    with pytest.raises(ValueError, match=r"items\[1\].completion_token_ids: 999 is not a token id"):
        await service.score([items(1)[0], TokenItem([5], [999])])
    assert len((await good).results) == 2


async def test_a_call_that_breaks_the_model_fails_alone(scorer, start, monkeypatch):
    poison = TokenItem([5, 6], [7, 7, 7])
    forward = scorer._score_batch

    def breaks(batch):
        if any(item == poison for sequence in batch for _, item in sequence.items):
            raise RuntimeError("out of memory")
        return forward(batch)

    monkeypatch.setattr(scorer, "_score_batch", breaks)
    service = await start(scorer)
    calls = [items(2), [poison], items(1), items(2, seed=5)]
    answers = await asyncio.gather(*(service.score(call) for call in calls), return_exceptions=True)
    assert isinstance(answers[1], ScoringFailed) and "out of memory" in str(answers[1])
    assert [len(answers[n].results) for n in (0, 2, 3)] == [2, 1, 2]
    assert service.state() == "ok"


async def test_a_stuck_round_fails_its_calls_and_the_next_is_served(scorer, folders, start, monkeypatch):
    entered, release = hold(scorer, monkeypatch)
    service = await start(scorer, stuck_seconds=0.3)
    stuck = asyncio.create_task(service.score(items(1)))
    await until(entered.is_set)
    with pytest.raises(ScoringFailed, match="did not finish within 0.3 s"):
        await stuck
    monkeypatch.undo()
    assert len((await service.score(items(3))).results) == 3
    await service.load(v(1), folders[1])
    assert (await service.score(items(1))).version == v(1)
    release.set()


async def test_the_deadline_of_a_waiting_call(scorer, start, monkeypatch):
    entered, release = hold(scorer, monkeypatch)
    service = await start(scorer)
    first = asyncio.create_task(service.score(items(1)))
    await until(entered.is_set)
    with pytest.raises(TimeoutError, match=r"scoring 2 items \(\d+ tokens\) took longer than 0.1 s"):
        await service.score(items(2), deadline_seconds=0.1)
    release.set()
    monkeypatch.undo()
    rounds = spy(scorer, monkeypatch)
    assert len((await first).results) == 1
    assert len((await service.score(items(3))).results) == 3
    assert [len(batch) for batch, _ in rounds] == [3], "the call that was given up was scored all the same"


async def test_a_call_that_was_given_up_is_not_scored_to_its_end(scorer, start, monkeypatch):
    batches, forward, entered, release = [], scorer._score_batch, threading.Event(), threading.Event()

    def held(batch):
        batches.append(len(batch))
        entered.set()
        assert release.wait(30)
        return forward(batch)

    monkeypatch.setattr(scorer, "_score_batch", held)
    monkeypatch.setattr(scorer, "max_batch_tokens", 1)
    service = await start(scorer)
    call = asyncio.create_task(service.score(items(20)))
    await until(entered.is_set)
    call.cancel()
    await asyncio.sleep(0)
    release.set()
    assert len((await service.score(items(1))).results) == 1
    assert batches == [1, 1]


async def test_a_cancelled_caller_frees_its_place(scorer, start, monkeypatch):
    entered, release = hold(scorer, monkeypatch)
    service = await start(scorer)
    first = asyncio.create_task(service.score(items(1)))
    await until(entered.is_set)
    second = asyncio.create_task(service.score(items(1)))
    await asyncio.sleep(0)
    second.cancel()
    release.set()
    assert len((await first).results) == 1
    assert len((await service.score(items(2))).results) == 2


async def test_stopping_fails_what_still_waits(scorer, monkeypatch):
    entered, release = hold(scorer, monkeypatch)
    service = ScorerService(scorer)
    assert service.state() == "not started"
    await service.start()
    tasks = [asyncio.create_task(service.score(items(1))) for _ in range(2)]
    await until(entered.is_set)
    tasks.append(asyncio.create_task(service.score(items(1))))
    await asyncio.sleep(0.05)
    stopping = asyncio.create_task(service.stop())
    release.set()
    await stopping
    answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert all(isinstance(answer, ScoringFailed) for answer in answers)
    assert service.state() == "stopped"
    with pytest.raises(ScoringFailed, match="not running: stopped"):
        await service.score(items(1))


async def test_a_caller_that_is_alone_never_waits_for_others(tiny_model, monkeypatch):
    from reward_server.scorer import service as module

    monkeypatch.setattr(module, "PAUSE_SECONDS", 60.0)
    monkeypatch.setattr(module, "LINGER_SECONDS", 60.0)
    service = ScorerService(TransformersScorer(str(tiny_model), "float32", "cpu"))
    await service.start()
    try:
        for _ in range(3):  # one after the other: the call before is no company
            await service.score([TokenItem([9, 8], [7])], deadline_seconds=20)
    finally:
        await service.stop()


async def test_calls_on_their_way_join_the_round(tiny_model, monkeypatch):
    from reward_server.scorer import service as module

    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(module, "LINGER_SECONDS", 20.0)
    scorer = TransformersScorer(str(tiny_model), "float32", "cpu")
    sizes, score = [], scorer.score
    monkeypatch.setattr(scorer, "score", lambda items, unwanted: (sizes.append(len(items)), score(items, unwanted))[1])
    service = ScorerService(scorer)
    await service.start()
    try:
        first = [asyncio.create_task(service.score([TokenItem([9, 8], [7])])) for _ in range(2)]
        await asyncio.sleep(0.1)
        late = asyncio.create_task(service.score([TokenItem([9, 8], [6])]))
        await asyncio.gather(*first, late)
    finally:
        await service.stop()
    assert sizes == [3]

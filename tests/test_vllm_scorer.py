"""The scorer on the real vLLM engine: parity with the transformers scorer, shared prompts, weights, server routes.

An engine takes most of half a minute to start. One service is asked directly, in the order of this file, by tests of
one event loop; one server is asked over HTTP; the last tests start what they need.
"""

import asyncio
import json
import math
import random
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from rollout_weights import publish, publish_adapters
from served import served
from tiny import make_tiny_model

from reward_server.scorer.items import TokenItem
from reward_server.scorer.metrics import METRICS
from reward_server.scorer.transformers import TransformersScorer
from services.contract import Version
from services.redis import connect_sync
from services.startup import StartupError
from services.weights.broadcast import Broadcaster
from services.weights.follow import Follower
from services.weights.publish import Publisher
from services.weights.sender import BROADCASTS, Sender

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

ALL = tuple(name for name in METRICS if name != "kl_to_reference")
DATA = Path(__file__).parents[2] / "shared/data/gsm8k_train.jsonl"
STEP_TOKENS = 96
"""Small, so that most sequences are cut into several steps; not a multiple of the cache's blocks of 32."""
EOS = 2
RUN = f"scorer-{uuid.uuid4().hex[:8]}"


def v(step: int, lineage: int = 0) -> Version:
    return Version(lineage=lineage, version=step)


def tokens(count: int, seed: int) -> list[int]:
    """Ordinary tokens, no EOS among them."""
    return torch.randint(10, 280, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Untied and 128 wide: linear layers of a size that vLLM would prepack. 300 entries: vLLM pads them to 320."""
    made = tmp_path_factory.mktemp("versions")
    wide = {"hidden": 128, "vocab_size": 300, "tied": False, "scale": 5.0}
    return [make_tiny_model(made / str(seed), seed=seed, **wide) for seed in range(3)]


@pytest.fixture(scope="module")
def oracles(folders) -> list[TransformersScorer]:
    return [TransformersScorer(str(folder), "float32", "cpu") for folder in folders]


def vllm_settings(folder: Path, **more):
    from reward_server.scorer.vllm import VllmSettings

    given = {"max_batch_tokens": STEP_TOKENS, "max_batch_sequences": 32, "threads": 1, **more}
    return VllmSettings(folder, "tiny", "float32", "cpu", **given)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(folders):
    from reward_server.scorer.vllm import VllmService

    made = VllmService(vllm_settings(folders[0]), follow="match")
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def cached(service, monkeypatch):
    """Tokens that came out of the prefix cache, of every request from now on."""
    found, encode = [], service.llm.encode

    async def counted(*given):
        async for output in encode(*given):
            found.append(output.num_cached_tokens)
            yield output

    monkeypatch.setattr(service.llm, "encode", counted)
    return found


@pytest.fixture(scope="module")
def real(oracles) -> list[TokenItem]:
    """100 real sequences: 25 questions of GSM8K (or as many made-up ones) with four completions each.

    Every fifth prompt is cut to a whole number of cache blocks.
    """
    draw = random.Random(7)
    tokenizer = oracles[0].tokenizer
    if DATA.exists():
        rows = [json.loads(line) for line in DATA.read_text().splitlines()[:200]]
    else:
        words = "apples sold each cost of then half twice how many are left 12 7 3.50 so # = + per week".split()
        rows = [{name: " ".join(draw.choices(words, k=60)) for name in ("question", "answer")} for _ in range(200)]
    items = []
    for number in range(25):
        prompt = tokenizer(rows[number]["question"]).input_ids[: draw.randint(40, 300)]
        if number % 5 == 0:
            prompt = prompt[: max(32, len(prompt) // 32 * 32)]
        for other in (number, 30 + 3 * number, 31 + 3 * number, 32 + 3 * number):
            answer = tokenizer(rows[other]["answer"]).input_ids[: draw.randint(1, 250)]
            items.append(TokenItem(prompt, answer, ALL))
    return items


def check(results, expected, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    assert len(results) == len(expected)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.n_tokens == theirs.n_tokens
        assert ours.per_token.keys() == theirs.per_token.keys()
        for name, values in theirs.per_token.items():
            slack = 10 if name == "varentropy" else 1  # a difference of squares
            np.testing.assert_allclose(ours.per_token[name], values, rtol=rtol, atol=atol * slack, err_msg=name)
            assert ours.scores[name] == pytest.approx(theirs.scores[name], rel=rtol, abs=atol * slack), name


# ---- parity ----------------------------------------------------------------------------------------------------


async def test_a_hundred_real_sequences_equal_the_transformers_scorer(service, oracles, real, cached):
    expected = oracles[0].score(real)
    scored = await service.score(real)
    assert scored.version == v(0)
    check(scored.results, expected)
    assert len(cached) == 100 and sum(1 for count in cached if count) >= 70, "prompts were not shared"
    again = await service.score(real)  # what was cached does not reach into what is scored
    check(again.results, expected)
    assert len(cached) == 200
    for item, count in zip(real, cached[100:], strict=True):
        assert count <= (len(item.prompt_ids) - 1) // 32 * 32


async def test_without_sharing_the_scores_are_the_same(service, oracles, real, cached, monkeypatch):
    monkeypatch.setattr(service, "share_prefixes", False)
    check((await service.score(real[:40])).results, oracles[0].score(real[:40]))
    assert cached == [0] * 40


async def test_prompts_around_the_blocks_of_the_cache(service, oracles, cached):
    """The row that predicts the first completion token is the last prompt token's: it is never taken from the cache."""
    asked = [
        TokenItem(tokens(length, length), tokens(count, 1000 + count), ALL)
        for length in (1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 192)
        for count in (1, 2, 32, 40)
    ]
    check((await service.score(asked)).results, oracles[0].score(asked))
    cached.clear()
    check((await service.score(asked)).results, oracles[0].score(asked))
    assert cached == [(len(item.prompt_ids) - 1) // 32 * 32 for item in asked], "less was shared than could be"


async def test_equal_siblings_are_each_scored_whole(service, oracles):
    item = TokenItem(tokens(64, 5), tokens(70, 6), ALL)
    results = (await service.score([item] * 9)).results
    check(results, oracles[0].score([item]) * 9)


async def test_a_prompt_that_is_a_completion_elsewhere(service, oracles):
    """What one item scores, another may share as its prompt, and the other way round."""
    start, middle, end = tokens(64, 8), tokens(64, 9), tokens(40, 10)
    asked = [
        TokenItem(start, middle + end, ALL),
        TokenItem(start + middle, end, ALL),
        TokenItem(start[:32], start[32:] + middle, ALL),
    ]
    for order in (asked, asked[::-1]):
        check((await service.score(order)).results, oracles[0].score(order))


@pytest.mark.parametrize("preset", ["paper", "verl", "open_r1"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
async def test_presets_and_temperatures(service, oracles, preset, temperature):
    texts = [(tokens(64, 11), tokens(100, 12)), (tokens(64, 11), tokens(30, 13)), (tokens(3, 14), tokens(1, 15))]
    asked = [TokenItem(*text, ALL, temperature, preset) for text in texts]
    asked += [replace(item, metrics=("self_certainty",)) for item in asked]
    check((await service.score(asked)).results, oracles[0].score(asked))


async def test_items_of_one_call_may_differ_in_everything(service, oracles):
    prompt = tokens(70, 20)
    asked = [
        TokenItem(prompt, tokens(5 + n, 20 + n), (name,), 0.5 + n / 8, preset, 1 + 3 * n)
        for n, (name, preset) in enumerate(zip(ALL, ["paper", "open_r1", "verl"] * 4, strict=False))
    ]
    asked.append(TokenItem(prompt, tokens(9, 50), ("topk_confidence",), top_k=256))
    check((await service.score(asked)).results, oracles[0].score(asked))


async def test_ends_of_completions(service, oracles):
    prompt, text = tokens(32, 30), tokens(20, 31)
    asked = [
        TokenItem(prompt, []),
        TokenItem(prompt, [EOS], ALL),
        TokenItem(prompt, [*text, EOS], ALL),
        TokenItem(prompt, [*text, EOS, 7, 8, EOS], ALL),
        TokenItem([EOS, *prompt, EOS], text, ALL, preset="open_r1"),
    ]
    scored = await service.score(asked)
    assert [result.n_tokens for result in scored.results] == [0, 1, 21, 21, 20]
    assert scored.results[0].scores == {}
    check(scored.results, oracles[0].score(asked))
    check([scored.results[3]], [scored.results[2]], atol=1e-5)
    longest = TokenItem(tokens(1000, 32), tokens(24, 33), ALL)
    check((await service.score([longest])).results, oracles[0].score([longest]))
    assert (await service.score([])).results == []


async def test_bad_items_are_named(service):
    good = TokenItem(tokens(5, 40), tokens(5, 41))
    bad = {
        r"items\[1\].completion_token_ids: 300 is not a token id": TokenItem([5], [300]),
        r"items\[1\].prompt: is empty": TokenItem([], [5]),
        r"items\[1\].completion: with its prompt it has 1025 tokens": TokenItem([5] * 1000, [5] * 25),
        r"items\[1\].metrics: kl_to_reference needs a reference model": TokenItem([5], [5], ("kl_to_reference",)),
    }
    for message, item in bad.items():
        with pytest.raises(ValueError, match=message):
            await service.score([good, item])


async def test_a_request_that_vllm_takes_up_again_loses_no_row(service, oracles, cached, monkeypatch):
    """As after a preemption: the first answer lacks rows (here, they are cut off), so it is asked again, uncached."""
    rows, cut = service._rows, []

    async def short(ids, asked, version, use_cache):
        table = await rows(ids, asked, version, use_cache)
        cut.append(use_cache)
        return table[3:] if use_cache else table

    monkeypatch.setattr(service, "_rows", short)
    item = TokenItem(tokens(64, 5), tokens(70, 6), ALL)
    check((await service.score([item])).results, oracles[0].score([item]))
    assert cut == [True, False] and cached[-1] == 0


async def test_many_calls_at_once(service, oracles, real):
    calls = [real[4 * n : 4 * n + 4] for n in range(25)]
    answers = await asyncio.gather(*(service.score(call) for call in calls))
    for call, answer in zip(calls, answers, strict=True):
        check(answer.results, oracles[0].score(call))


async def test_a_deadline_ends_a_call_and_what_it_asked_of_vllm(service, oracles):
    long = [TokenItem(tokens(500, n), tokens(500, n + 1), ALL) for n in range(60)]
    with pytest.raises(TimeoutError, match=r"scoring 60 items \(60000 tokens\) took longer than 0.2 s"):
        await service.score(long, deadline_seconds=0.2)
    call = asyncio.ensure_future(service.score(long))
    await asyncio.sleep(0.2)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    item = TokenItem(tokens(5, 40), tokens(5, 41))
    check((await service.score([item], deadline_seconds=20)).results, oracles[0].score([item]))
    assert not service.llm.output_processor.has_unfinished_requests()


# ---- weights ---------------------------------------------------------------------------------------------------


async def test_no_call_mixes_versions_while_weights_change(service, folders, oracles):
    asked = [TokenItem(tokens(64, 60), tokens(30 + n, 61 + n), ALL) for n in range(6)]
    expected = [oracle.score(asked) for oracle in oracles]
    answers, stop = [], asyncio.Event()

    async def ask():
        while not stop.is_set():
            answers.append(await service.score(asked))

    callers = [asyncio.ensure_future(ask()) for _ in range(4)]
    for step in (1, 2):
        waiting = asyncio.ensure_future(service.score(asked, min_weight_version=v(step), deadline_seconds=60))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await service.load(v(step), folders[step])
        assert (await waiting).version == v(step)
        await asyncio.sleep(0.3)
    stop.set()
    await asyncio.gather(*callers)
    assert {answer.version for answer in answers} == {v(0), v(1), v(2)}
    for answer in answers:
        check(answer.results, expected[answer.version.version])


async def test_waiting_for_a_version_gives_up_with_a_clear_error(service):
    with pytest.raises(TimeoutError, match=r"waited 0.05 s for weight version 0.7 from the trainer; 0.2 is served"):
        await service.score([TokenItem([5], [6])], min_weight_version=v(7), deadline_seconds=0.05)


async def test_weights_of_another_model_are_refused(service, oracles, tmp_path):
    other = make_tiny_model(tmp_path / "other", hidden=64, vocab_size=300, tied=False)
    with pytest.raises(ValueError, match=r"is \[\d+.*the model's is"):
        await service.load(v(3), other)
    item = TokenItem(tokens(40, 70), tokens(40, 71), ALL)
    scored = await service.score([item])
    assert scored.version == v(2) and service.state() == "ok"
    check(scored.results, oracles[2].score([item]))


async def test_weights_that_break_off_stop_the_scoring_until_whole_ones_come(service, folders, oracles, monkeypatch):
    item = TokenItem(tokens(40, 70), tokens(40, 71), ALL)

    async def fails(*_, **__):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(service.llm, "collective_rpc", fails)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        await service.load(v(4), folders[1])
    assert service.state() == "the weights of version 0.4 were not loaded completely"
    monkeypatch.undo()
    from reward_server.scorer.base import ScoringFailed

    with pytest.raises(ScoringFailed, match="were not loaded completely"):
        await service.score([item])
    await service.load(v(4), folders[1])
    scored = await service.score([item])
    assert scored.version == v(4)
    check(scored.results, oracles[1].score([item]))


# ---- the server ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def publisher(redis_url, tmp_path_factory):
    with connect_sync(redis_url) as redis:
        yield Publisher(redis, RUN, tmp_path_factory.mktemp("weights"), keep=2)


@pytest.fixture(scope="module")
def url(folders, redis_url):
    from reward_server.app import Settings, create

    settings = Settings(
        model=str(folders[2]),
        engine="vllm",
        device="cpu",
        threads=1,
        max_model_len=512,
        max_batch_tokens=256,
        follow="match",
        redis_url=redis_url,
        run_id=RUN,
        broadcasts=True,
        verifier_workers=1,
    )
    with served(create(settings), deadline_seconds=280) as url:
        yield url


def score_body(items: list[TokenItem], wanted: Version | None = None) -> dict:
    bodies = [{"prompt_token_ids": item.prompt_ids, "completion_token_ids": item.completion_ids} for item in items]
    body = {"items": bodies, "metrics": items[0].metrics, "per_token": True}
    return body if wanted is None else body | {"min_weight_version": wanted.model_dump()}


def post(url: str, path: str, body: dict) -> dict:
    answer = httpx.post(url + path, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def scorer_state(url: str) -> str:
    return httpx.get(url + "/readyz").json()["dependencies"]["scorer"]


async def test_followed_weights_score_like_a_fresh_engine(service, url, folders, publisher, oracles, real):
    """`service` was led through other weights to version 2's in place; the server was started on them."""
    asked = [replace(item, completion_ids=item.completion_ids[:200]) for item in real[:30]]
    await service.load(v(0, lineage=1), folders[2])
    followed = (await service.score(asked)).results
    fresh = await asyncio.to_thread(post, url, "/v1/score", score_body(asked))
    assert fresh["weight_version"] == v(0).model_dump() and fresh["vocab_size"] == 300
    for one, other in zip(followed, fresh["results"], strict=True):
        for name, values in one.per_token.items():
            np.testing.assert_allclose(values, other["per_token"][name], rtol=1e-5, atol=2e-4, err_msg=name)

    for step in (1, 2):  # the server follows what a trainer publishes, to version 1's weights and back
        await asyncio.to_thread(publish, publisher, v(step), folders[step])
        answer = await asyncio.to_thread(post, url, "/v1/score", score_body(asked, v(step)))
        assert answer["weight_version"] == v(step).model_dump()
        for one, other in zip(oracles[step].score(asked), answer["results"], strict=True):
            assert other["n_tokens"] == one.n_tokens
            assert other["scores"] == pytest.approx(one.scores, rel=1e-4, abs=1e-3)


async def test_broadcast_weights_score_like_files(url, folders, redis_url, oracles, real, tmp_path):
    """gloo in place of NCCL; the first version is a file, and so is what the trainer leaves behind."""
    asked = real[:8]
    with connect_sync(redis_url) as redis:
        sender = Sender(redis, RUN, "gloo", torch.device("cpu"), seconds=30)
        broadcaster = Broadcaster(sender, "nccl", tmp_path, bucket_bytes=100_000)
        sent = BROADCASTS.labels("sent")._value.get()
        try:
            for step, number in enumerate((1, 0, 2)):
                wanted = v(step, lineage=1)
                location = await asyncio.to_thread(publish, broadcaster, wanted, folders[number])
                assert location.exists() == (step == 0)
                answer = await asyncio.to_thread(post, url, "/v1/score", score_body(asked, wanted))
                assert answer["weight_version"] == wanted.model_dump()
                for one, other in zip(oracles[number].score(asked), answer["results"], strict=True):
                    assert other["scores"] == pytest.approx(one.scores, rel=1e-4, abs=1e-3)
        finally:
            await asyncio.to_thread(broadcaster.close)
        assert BROADCASTS.labels("sent")._value.get() == sent + 2


async def test_routes(url, oracles):
    model = httpx.get(url + "/v1/model").json()
    assert model["backend"] == "vllm" and model["device"] == "cpu" and model["max_tokens"] == 512
    assert scorer_state(url) == "ok"
    body = {"items": [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "2 + 2 =", "completion": ""}]}
    results = post(url, "/v1/score", body)["results"]
    ids = [oracles[0].tokenizer(text).input_ids for text in ("2 + 2 =", " 4")]
    (expected,) = oracles[2].score([TokenItem(*ids)])
    assert results[0]["scores"] == pytest.approx(expected.scores, rel=1e-4)
    assert results[1]["n_tokens"] == 0 and results[1]["scores"] == {}
    refused = httpx.post(url + "/v1/score", json=body | {"metrics": ["kl_to_reference"]}, timeout=60)
    assert refused.status_code == 422 and "reference" in refused.text


async def test_self_certainty_as_a_reward(url, oracles):
    task = {"task_id": "t", "source": "s", "prompt": "How many?"}
    texts = ["Four, I think.", "4", ""]
    group = {"group_id": "g", "task": task, "completions": [{"text": text} for text in texts]}
    (scored,) = post(url, "/v1/rewards", {"spec": "self_certainty", "groups": [group]})["groups"]
    prompt = oracles[0].tokenizer("How many?").input_ids
    for text, one in zip(texts[:2], scored["scores"][:2], strict=True):
        (expected,) = oracles[2].score([TokenItem(prompt, oracles[0].tokenizer(text).input_ids)])
        value = one["components"]["self_certainty"]["value"]
        assert value == pytest.approx(expected.scores["self_certainty"], rel=1e-4)
    assert not scored["scores"][2]["valid"]
    assert scored["scorer_weight_version"] == httpx.get(url + "/v1/model").json()["weight_version"]


async def test_adapters_are_merged_into_the_model_that_the_engine_was_started_with(url, folders, publisher, real):
    merged = await asyncio.to_thread(publish_adapters, publisher, v(3, 1), folders[2])
    (one,) = [replace(item, completion_ids=item.completion_ids[:40]) for item in real[:1]]
    (found,) = (await asyncio.to_thread(post, url, "/v1/score", score_body([one], v(3, 1))))["results"]
    with torch.no_grad():
        logits = merged(torch.tensor([one.prompt_ids + one.completion_ids])).logits[0, len(one.prompt_ids) - 1 : -1]
    expected = (logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1]))[: found["n_tokens"]].mean()
    assert found["scores"]["self_certainty"] == pytest.approx(expected.item(), rel=1e-4)


async def test_an_engine_that_died_is_unready_and_a_refusal(url):
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    engines = [psutil.Process(pid) for pid in mine if "EngineCore" in " ".join(_title(pid))]
    assert engines, "no engine process was found"
    for engine in engines:
        with suppress(psutil.NoSuchProcess):  # one may take the other with it
            engine.kill()
    for _ in range(100):
        if (state := await asyncio.to_thread(scorer_state, url)) != "ok":
            break
        await asyncio.sleep(0.2)
    assert "vLLM's engine died" in state and httpx.get(url + "/readyz").status_code == 503
    body = {"items": [{"prompt": "2 + 2 =", "completion": " 4"}]}
    refused = await asyncio.to_thread(httpx.post, url + "/v1/score", json=body, timeout=60)
    assert refused.status_code == 500 and "vLLM's engine died" in refused.text


def _title(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline() + [psutil.Process(pid).name()]
    except psutil.NoSuchProcess:
        return []


# ---- refusals --------------------------------------------------------------------------------------------------


async def test_what_cannot_work_is_refused_before_anything_starts(folders, tmp_path):
    from reward_server.app import Settings
    from reward_server.scorer.engines import scorer_service

    def refuses(message: str, **settings) -> None:
        with pytest.raises(StartupError, match=message):
            scorer_service(Settings(**{"model": str(folders[0]), "engine": "vllm", "device": "cpu", **settings}))

    refuses("choose one of transformers, vllm", engine="sglang")
    refuses("vLLM serves no moving average", follow="ema")
    refuses("the installed vLLM is a CPU build", device="cuda")
    refuses("the vllm engine holds no second model", reference_model=str(folders[1]))
    refuses("the transformers engine runs on one device", engine="transformers", tensor_parallel_size=2)
    refuses("no such folder", model=str(tmp_path / "none"))
    config = json.loads((folders[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["PhiForCausalLM"]}))
    refuses("its architecture is PhiForCausalLM; --engine vllm scores Qwen2ForCausalLM", model=str(tmp_path))


@pytest.mark.slow
async def test_two_ranks_share_the_head(folders, oracles, real, redis_url, tmp_path):
    """Tensor parallelism for real: each rank holds half of the (padded) vocabulary; some steps have no scored row. Both
    are ranks of a broadcast, too."""
    from reward_server.scorer.vllm import VllmService

    made = VllmService(vllm_settings(folders[0], tensor_parallel_size=2, broadcasts=True))
    await made.start()
    run = f"ranks-{uuid.uuid4().hex[:8]}"
    following = Follower(redis_url, run, "two", "reward", "", made.load, receive=made.receive)
    try:
        check((await made.score(real[:24])).results, oracles[0].score(real[:24]))
        await made.load(v(1), folders[1])
        check((await made.score(real[:24])).results, oracles[1].score(real[:24]))
        await following.start()
        with connect_sync(redis_url) as redis:
            sender = Sender(redis, run, "gloo", torch.device("cpu"), seconds=30)
            broadcaster = Broadcaster(sender, "nccl", tmp_path, bucket_bytes=100_000)
            for step, number in enumerate((0, 2)):
                await asyncio.to_thread(publish, broadcaster, v(step, lineage=1), folders[number])
                await following.at_least(v(step, lineage=1), 60)
                check((await made.score(real[:8])).results, oracles[number].score(real[:8]))
            await asyncio.to_thread(broadcaster.close)
    finally:
        await following.stop()
        await made.stop()

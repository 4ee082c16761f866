"""The real vLLM engine behind the real server: logprobs, determinism, following weights, vLLM's OpenAI routes.

The engine takes most of a minute to start, so one server serves all tests, in the order of this file; one more is
started to compare with.
"""

import asyncio
import json
import os
import uuid
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from rollout_weights import publish, publish_adapters
from served import served
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.api import RolloutRequest
from services.clients import Refused, RolloutClient
from services.contract import Sampling, Version, VersionSpan
from services.redis import connect_sync
from services.weights.broadcast import Broadcaster
from services.weights.publish import Publisher
from services.weights.sender import BROADCASTS, Sender

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

RUN = f"vllm-{uuid.uuid4().hex[:8]}"
NEWEST = Version(lineage=1, version=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    place = tmp_path_factory.mktemp("versions")
    # Untied and 128 wide: linear layers of a size that vLLM would prepack.
    return [make_tiny_model(place / str(seed), seed=seed, hidden=128, tied=False) for seed in range(4)]


@pytest.fixture(scope="module")
def oracles(folders):
    return [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders]


@pytest.fixture(scope="module")
def publisher(redis_url, tmp_path_factory):
    with connect_sync(redis_url) as redis:
        yield Publisher(redis, RUN, tmp_path_factory.mktemp("weights"), keep=2)


@pytest.fixture(scope="module")
def app(folders, redis_url):
    from rollout_server.app import Settings, create

    settings = Settings(
        str(folders[0]),
        engine="vllm",
        served_model_name="tiny",
        device="cpu",
        threads=1,
        max_model_len=256,
        max_batch_sequences=32,
        redis_url=redis_url,
        run_id=RUN,
        broadcasts=True,
    )
    return create(settings)


@pytest.fixture(scope="module")
def url(app):
    with served(app, deadline_seconds=280) as url:
        yield url


def ask(text: str = "The sun", n: int = 3, wanted: Version | None = None, **sampling) -> RolloutRequest:
    chosen = Sampling(**{"max_tokens": 16, "seed": 5, **sampling})
    return RolloutRequest(group_id=text[:100], prompt=text, n=n, sampling=chosen, min_weight_version=wanted)


def check_logprobs(group, oracle, temperature: float = 1.0, atol: float = 1e-4) -> None:
    for one in group.completions:
        with torch.no_grad():
            ids = group.prompt_token_ids + one.token_ids
            logits = oracle(torch.tensor([ids])).logits[0, len(group.prompt_token_ids) - 1 : -1]
        expected = torch.log_softmax(logits / temperature, -1)[range(len(one.token_ids)), one.token_ids]
        np.testing.assert_allclose(one.logprobs, expected.numpy(), atol=atol)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.6},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.8},
        {"temperature": 0.0},
    ],
)
async def test_logprobs_are_at_the_temperature_before_the_filters(url, oracles, sampling):
    async with RolloutClient(url) as client:
        answer = await client.rollouts([ask(**sampling), ask("12 + 30 =", 2, **sampling)], deadline_seconds=120)
    assert answer.weight_version == Version() and answer.model == "tiny"
    for group in answer.groups:
        check_logprobs(group, oracles[0], sampling["temperature"] or 1.0)
        for one in group.completions:
            assert one.finish_reason in ("stop", "length")
            assert one.weight_version == Version() and not one.version_spans


async def test_filters_filter(url, oracles):
    async with RolloutClient(url) as client:
        answer = await client.rollouts([ask(n=4, top_k=2, max_tokens=8)])
    for one in answer.groups[0].completions:
        ids = answer.groups[0].prompt_token_ids
        for place, token in enumerate(one.token_ids):
            with torch.no_grad():
                best = oracles[0](torch.tensor([ids + one.token_ids[:place]])).logits[0, -1].topk(2).indices
            assert token in best.tolist()


async def test_a_seed_repeats_and_copies_differ(url):
    async with RolloutClient(url) as client:
        first, again = await client.rollouts([ask()]), await client.rollouts([ask()])
        noise = [client.rollouts([ask(f"noise {place}", 4, seed=None)]) for place in range(6)]
        amid = (await asyncio.gather(client.rollouts([ask()]), *noise))[0]
        other = await client.rollouts([ask(seed=6)])
    texts = [[one.token_ids for one in answer.groups[0].completions] for answer in (first, again, amid, other)]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert len({tuple(token_ids) for token_ids in texts[0]}) == 3


async def test_ends_of_completions(url):
    """EOS and stop strings mean what they mean with the other engine."""
    async with RolloutClient(url) as client:
        [free] = (await client.rollouts([ask(n=1, max_tokens=60, seed=1)])).groups
        stop = free.completions[0].text[6:8]
        [stopped] = (await client.rollouts([ask(n=1, max_tokens=60, seed=1, stop=[stop])])).groups
        with pytest.raises(Refused) as raised:
            await client.rollouts([ask("x" * 100), ask("x" * 256)])
        [bounded] = (await client.rollouts([ask("x" * 250, 1, max_tokens=60)])).groups
    one, whole = stopped.completions[0], free.completions[0]
    assert one.finish_reason == "stop" and whole.text.startswith(one.text) and stop not in one.text
    assert one.token_ids == whole.token_ids[: len(one.token_ids)]
    assert raised.value.fields == {"requests[1].prompt"}
    assert len(bounded.completions[0].token_ids) <= 6


# ---- vLLM's own OpenAI server behind our gate ------------------------------------------------------------------


def post(url: str, path: str, body: dict) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=60)


def test_openai_routes_answer(url):
    assert [card["id"] for card in httpx.get(url + "/v1/models").json()["data"]] == ["tiny"]
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 6, "n": 2, "seed": 1, "logprobs": 1}
    whole = post(url, "/v1/completions", body)
    assert whole.headers["x-request-id"] and len(whole.json()["choices"]) == 2
    assert len(whole.json()["choices"][0]["logprobs"]["token_logprobs"]) <= 6
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "seed": 1}
    answer = post(url, "/v1/chat/completions", chat).json()
    assert answer["choices"][0]["message"]["role"] == "assistant" and answer["usage"]["completion_tokens"] <= 5
    streamed = post(url, "/v1/chat/completions", chat | {"stream": True})
    lines = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    parts = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1]]
    assert lines[-1] == "[DONE]" and "".join(parts) == answer["choices"][0]["message"]["content"]


def test_nothing_else_of_vllm_is_reachable(url):
    for path in ("/pause", "/collective_rpc", "/update_weights", "/v1/responses", "/invocations", "/tokenize"):
        assert post(url, path, {}).status_code == 404
    assert post(url, "/v1/completions", {"model": "other", "prompt": "a"}).status_code == 404


# ---- following weights -----------------------------------------------------------------------------------------


async def made_while_publishing(url, publisher, versions: dict[int, Path], max_tokens: int) -> list:
    """Groups that four clients asked for one after the other while those versions came."""
    stop, seen = asyncio.Event(), []

    async def load(client: RolloutClient, worker: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            asked = ask(f"{worker}:{count}", 2, seed=count, max_tokens=max_tokens)
            seen.extend((await client.rollouts([asked])).groups)

    async with RolloutClient(url) as client:
        workers = [asyncio.ensure_future(load(client, worker)) for worker in range(4)]
        for step, folder in versions.items():
            await asyncio.to_thread(publish, publisher, Version(version=step), folder)
            answer = await client.rollouts([ask(wanted=Version(version=step))], deadline_seconds=60)
            assert answer.weight_version >= Version(version=step)
            async with asyncio.timeout(60):
                while step not in {one.weight_version.version for group in seen for one in group.completions}:
                    await asyncio.sleep(0.05)
        stop.set()
        await asyncio.gather(*workers)
    return seen


async def test_no_completion_mixes_versions_under_load(url, publisher, folders, oracles):
    for group in await made_while_publishing(url, publisher, {1: folders[1], 2: folders[2]}, 40):
        for one in group.completions:
            assert not one.version_spans
            single = group.model_copy(update={"completions": [one]})
            check_logprobs(single, oracles[one.weight_version.version])


async def test_what_is_kept_in_flight_goes_on_with_the_new_weights(url, app, publisher, folders, oracles):
    engine = app.state.engine
    engine.settings = replace(engine.settings, in_flight="keep")
    # Several, for in the moment that one comes nobody may be in the middle of anything.
    versions = {3: folders[1], 4: folders[2], 5: folders[1], 6: folders[2]}
    mixed, makers = 0, {number: oracles[2 - number % 2] for number in (2, *versions)}
    for group in await made_while_publishing(url, publisher, versions, 120):
        for one in group.completions:
            spans = one.version_spans or [VersionSpan(start=0, weight_version=one.weight_version)]
            assert spans[0].start == 0 and spans[0].weight_version == one.weight_version
            mixed += len(spans) > 1
            for span, end in zip(spans, [span.start for span in spans[1:]] + [len(one.token_ids)], strict=True):
                part = {"token_ids": one.token_ids[span.start : end], "logprobs": one.logprobs[span.start : end]}
                before = group.prompt_token_ids + one.token_ids[: span.start]
                update = {"prompt_token_ids": before, "completions": [one.model_copy(update=part)]}
                check_logprobs(group.model_copy(update=update), makers[span.weight_version.version])
    assert mixed


async def test_what_is_aborted_in_flight_is_begun_again(url, app, publisher, folders, oracles):
    from rollout_server.calls import BEGUN_AGAIN

    engine = app.state.engine
    engine.settings = replace(engine.settings, in_flight="abort")
    versions = {7: folders[1], 8: folders[2], 9: folders[1], 10: folders[2]}
    makers = {number: oracles[2 - number % 2] for number in (6, *versions)}
    for group in await made_while_publishing(url, publisher, versions, 120):
        for one in group.completions:
            assert not one.version_spans and one.finish_reason in ("stop", "length")
            check_logprobs(group.model_copy(update={"completions": [one]}), makers[one.weight_version.version])
    assert BEGUN_AGAIN.labels("vllm")._value.get() > 0 and engine._begun_again == 0


async def test_adapters_are_merged_into_the_model_that_the_engine_was_started_with(url, publisher, folders):
    version = Version(version=11)
    merged = await asyncio.to_thread(publish_adapters, publisher, version, folders[0])
    async with RolloutClient(url) as client:
        answer = await client.rollouts([ask(n=4, wanted=version)], deadline_seconds=60)
    assert answer.weight_version == version
    check_logprobs(answer.groups[0], merged)


async def test_followed_weights_equal_a_fresh_engine(url, publisher, folders, oracles):
    """After following version N, tokens and logprobs are those of an engine that was started on version N."""
    from rollout_server.engines.base import EngineSettings, Prompt
    from rollout_server.engines.vllm import VllmEngine

    folder = await asyncio.to_thread(publish, publisher, NEWEST, folders[3])
    asked = [ask(text, 4, NEWEST, temperature=0.8, max_tokens=24) for text in ("The sun", "a", "12 + 30 =")]
    async with RolloutClient(url) as client:
        answer = await client.rollouts(asked, deadline_seconds=60)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fresh = VllmEngine(
        EngineSettings(folder, "tiny", "float32", "cpu", threads=1, max_model_len=256, max_batch_sequences=32)
    )
    await fresh.start()
    prompts = [Prompt(one.group_id, tokenizer(one.prompt).input_ids, one.n, one.sampling) for one in asked]
    expected = await fresh.generate(prompts)
    await fresh.stop()
    assert answer.weight_version == NEWEST
    for group, completions in zip(answer.groups, expected, strict=True):
        check_logprobs(group, oracles[3], 0.8)
        assert [one.token_ids for one in group.completions] == [one.token_ids for one in completions]
        for one, other in zip(group.completions, completions, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize(("transport", "kind", "lineage"), [("nccl", "gloo", 2), ("ipc", "ipc", 3)])
async def test_broadcast_weights_are_those_that_were_sent(
    url, app, redis_url, folders, oracles, tmp_path, transport, kind, lineage
):
    """gloo instead of NCCL and a mapped file instead of a GPU's memory; small buckets, so that layers are cut."""
    failed = BROADCASTS.labels("failed")._value.get()
    with connect_sync(redis_url) as redis:
        sender = Sender(redis, RUN, kind, torch.device("cpu"), seconds=30)
        broadcaster = Broadcaster(sender, transport, tmp_path, snapshot_every=50, bucket_bytes=100_000)
        try:
            for step in (0, 1, 2, 3):
                wanted = Version(lineage=lineage, version=step)
                location = await asyncio.to_thread(publish, broadcaster, wanted, folders[step % 4])
                assert location.exists() == (step == 0)
                async with RolloutClient(url) as client:
                    answer = await client.rollouts([ask(f"step {step}", wanted=wanted)], deadline_seconds=60)
                assert answer.weight_version == wanted
                check_logprobs(answer.groups[0], oracles[step % 4])
        finally:
            await asyncio.to_thread(broadcaster.close)
        assert BROADCASTS.labels("failed")._value.get() == failed
    assert not app.state.engine.death()


async def test_weights_of_another_model_are_refused(url, publisher, tmp_path, oracles):
    other = make_tiny_model(tmp_path / "other", hidden=64)
    await asyncio.to_thread(publish, publisher, Version(lineage=4), other)
    await asyncio.sleep(1)
    async with RolloutClient(url) as client:
        answer = await client.rollouts([ask()])
    assert answer.weight_version == Version(lineage=3, version=3)
    check_logprobs(answer.groups[0], oracles[3])
    assert os.environ["VLLM_SERVER_DEV_MODE"] == "0"

"""The rollout server over real HTTP, following real weights from a real redis."""

import asyncio
import json
import socket
import time
import uuid

import httpx
import numpy as np
import orjson
import pytest
import torch
from rollout_weights import publish
from served import served
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from rollout_server.app import Settings, create
from services import codec
from services.access import HttpSettings
from services.api import RolloutRequest, RolloutsResponse
from services.clients import Refused, RolloutClient, Unavailable
from services.contract import Message, Sampling, Version
from services.redis import connect_sync
from services.startup import StartupError
from services.weights.publish import Publisher

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def url(tiny_model):
    """A server that follows nothing."""
    app = create(Settings(str(tiny_model), device="cpu", threads=1, served_model_name="tiny", max_model_len=200))
    with served(app) as url:
        yield url


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Five versions of the model: folders."""
    place = tmp_path_factory.mktemp("versions")
    return [make_tiny_model(place / str(seed), seed=seed) for seed in range(5)]


@pytest.fixture
def run(folders, redis_url, tmp_path):
    """(url, publisher) of a server that follows a run of its own."""
    run_id = f"rollout-{uuid.uuid4().hex[:8]}"
    settings = Settings(str(folders[0]), device="cpu", threads=1, redis_url=redis_url, run_id=run_id, poll_seconds=0.05)
    with connect_sync(redis_url) as redis, served(create(settings)) as url:
        yield url, Publisher(redis, run_id, tmp_path / "weights", keep=2)


def ask(text: str = "abc", n: int = 2, wanted: Version | None = None, **sampling) -> RolloutRequest:
    chosen = Sampling(**{"max_tokens": 12, "seed": 5, **sampling})
    return RolloutRequest(group_id=text[:100], prompt=text, n=n, sampling=chosen, min_weight_version=wanted)


def post(url: str, path: str, body: dict, **options) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=30, **options)


def logprobs_by(folder, prompt_ids, token_ids, temperature=1.0) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + token_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)[range(len(token_ids)), token_ids].numpy()


# ---- one call --------------------------------------------------------------------------------------------------


async def test_groups_come_in_order_and_repeat_by_seed(url):
    async with RolloutClient(url) as client:
        asked = [ask("abc", 3), ask("a longer prompt", 2, temperature=0.7), ask("z", 1, max_tokens=3)]
        first, second = await client.rollouts(asked), await client.rollouts(asked)
    assert first == second and first.model == "tiny" and first.weight_version == Version()
    assert [len(group.completions) for group in first.groups] == [3, 2, 1]
    assert len(first.groups[2].completions[0].token_ids) == 3
    for group in first.groups:
        for one in group.completions:
            assert one.finish_reason in ("stop", "length") and len(one.token_ids) == len(one.logprobs) > 0


async def test_messages_prompt_and_token_ids_mean_the_same(url):
    messages = [Message(role="system", content="be short"), Message(role="user", content="hi")]
    async with RolloutClient(url) as client:
        by_messages = await client.rollouts(
            [RolloutRequest(group_id="g", messages=messages, sampling=Sampling(max_tokens=8, seed=1))]
        )
        ids = by_messages.groups[0].prompt_token_ids
        by_ids = await client.rollouts(
            [RolloutRequest(group_id="g", prompt_token_ids=ids, sampling=Sampling(max_tokens=8, seed=1))]
        )
        text = "<system>be short<user>hi<assistant>"
        by_text = await client.rollouts(
            [RolloutRequest(group_id="g", prompt=text, sampling=Sampling(max_tokens=8, seed=1))]
        )
    assert by_messages == by_ids == by_text


def test_json_and_msgpack_answers_agree(url):
    body = {"requests": [ask().model_dump(mode="json")]}
    plain = post(url, "/v1/rollouts", body)
    packed = post(url, "/v1/rollouts", body, headers={"Accept": "application/msgpack"})
    assert plain.headers["content-type"] == "application/json"
    assert packed.headers["content-type"] == "application/msgpack"
    # The numbers are float32 inside; JSON writes them as the doubles that equal them.
    assert codec.unpack_as(RolloutsResponse, packed.content) == RolloutsResponse.model_validate(plain.json())


def test_the_model_is_described_and_the_server_ready(url):
    model = httpx.get(url + "/v1/model").json()
    assert model["weight_version"] == {"lineage": 0, "version": 0} and model["vocab_size"] == 288
    assert (model["model"], model["max_model_len"], model["engine"]) == ("tiny", 200, "transformers")
    assert httpx.get(url + "/readyz").json()["dependencies"] == {"engine": "ok"}
    assert "rlif_rollout_tokens_total" in httpx.get(url + "/metrics").text


@pytest.mark.parametrize(
    "change, field, says",
    [
        ({"prompt": "x" * 200}, "requests[1].prompt", "at most 199 tokens"),
        ({"prompt": ""}, "requests[1].prompt", "no tokens"),
        ({"prompt": None, "prompt_token_ids": [3, 288]}, "requests[1].prompt_token_ids", "0 to 287 (got 288)"),
        ({"prompt": None, "prompt_token_ids": [-1]}, "requests[1].prompt_token_ids", "0 to 287 (got -1)"),
        ({"sampling": {"temperature": -1}}, "requests[1].sampling.temperature", "greater than or equal to 0"),
        ({"sampling": {"temperature": 1e-40}}, "requests[1].sampling.temperature", "at least 0.0001"),
        ({"sampling": {"stop": [""]}}, "requests[1].sampling.stop[0]", "at least 1 character"),
        ({"prompt": "x" * 100_000}, "requests[1].prompt", "at most 25600 characters for 200 tokens"),
        ({"n": 0}, "requests[1].n", "greater than or equal to 1"),
        ({"nn": 1}, "requests[1].nn", "not permitted"),
    ],
)
def test_bad_requests_name_their_field(url, change, field, says):
    body = {"requests": [{"group_id": "a", "prompt": "a"}, {"group_id": "b", "prompt": "b", **change}]}
    answer = post(url, "/v1/rollouts", body)
    assert answer.status_code == 422 and answer.headers["content-type"] == "application/problem+json"
    [error] = answer.json()["errors"]
    assert error["field"] == field and says in error["message"]


def test_a_call_that_asks_for_more_tokens_than_fit_in_memory_is_refused(url):
    one = {"group_id": "a", "prompt": "a", "n": 1024, "sampling": {"max_tokens": 2**40}}
    answer = post(url, "/v1/rollouts", {"requests": [one] * 100})
    assert answer.status_code == 422 and "20377600 tokens, at most 16777216" in answer.json()["detail"]
    answer = post(url, "/v1/completions", {"prompt": ["a"] * 100, "n": 1024, "max_tokens": None})
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == "n"


def test_a_version_nobody_publishes_is_a_503_that_says_so(url):
    body = {"requests": [ask(wanted=Version(version=3)).model_dump(mode="json")]}
    started = time.monotonic()
    answer = post(url, "/v1/rollouts", body, headers={"X-Deadline-Seconds": "0.5"})
    assert time.monotonic() - started < 30
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
    assert "serves version 0.0, version 0.3 was asked for" in answer.json()["detail"]


def test_a_client_that_hangs_up_frees_the_engine(url):
    body = orjson.dumps({"requests": [ask(n=1024, max_tokens=190).model_dump(mode="json")] * 4})
    host, port = url.removeprefix("http://").split(":")
    calm = post(url, "/v1/rollouts", {"requests": [ask(n=1, max_tokens=1).model_dump(mode="json")]})
    with socket.create_connection((host, int(port))) as client:
        head = "POST /v1/rollouts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}"
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        time.sleep(0.5)
        assert 'rlif_rollout_calls_in_flight{engine="transformers"} 1.0' in httpx.get(url + "/metrics").text
    # Those 4096 completions take far longer than this; the answer can only come because they were given up.
    after = httpx.post(
        url + "/v1/rollouts", json={"requests": [ask(n=1, max_tokens=1).model_dump(mode="json")]}, timeout=5
    )
    assert after.json() == calm.json()
    assert 'rlif_rollout_calls_in_flight{engine="transformers"} 0.0' in httpx.get(url + "/metrics").text


def test_every_route_asks_for_the_token(tiny_model):
    http = HttpSettings(api_token="secret")
    with served(create(Settings(str(tiny_model), http=http, device="cpu", threads=1))) as url:
        for path in ("/v1/rollouts", "/v1/completions", "/v1/chat/completions"):
            assert post(url, path, {}).status_code == 401
            assert post(url, path, {}, headers={"Authorization": "Bearer secret"}).status_code == 422
        assert httpx.get(url + "/v1/models").status_code == 401
        assert httpx.get(url + "/healthz").status_code == 200


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model": "/no/such/folder"}, "--model /no/such/folder: no such folder"),
        ({"dtype": "int7"}, "--dtype int7: choose one of float32, bfloat16"),
        ({"engine": "ollama"}, "--engine ollama: choose one of transformers, vllm"),
        ({"redis_url": "http://x", "run_id": "r"}, "redis url"),
        ({"redis_url": "redis://x"}, "both the Redis URL and the name of the run"),
    ],
)
def test_settings_that_cannot_work_are_one_clear_line(tiny_model, change, says):
    with pytest.raises(StartupError) as raised:
        create(Settings(**{"model": str(tiny_model), "device": "cpu", **change}))
    assert says in str(raised.value) and "\n" not in str(raised.value)


# ---- following weights -----------------------------------------------------------------------------------------


async def test_published_weights_are_followed(run, folders):
    url, publisher = run
    published = Version(lineage=0, version=1)
    await asyncio.to_thread(publish, publisher, published, folders[1])
    async with RolloutClient(url) as client:
        answer = await client.rollouts([ask(wanted=published, temperature=0.8)], deadline_seconds=30)
    [group] = answer.groups
    assert answer.weight_version == published
    for one in group.completions:
        assert one.weight_version == published and not one.version_spans
        expected = logprobs_by(folders[1], group.prompt_token_ids, one.token_ids, 0.8)
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)


async def test_a_newer_lineage_is_taken_although_its_step_is_lower(run, folders):
    url, publisher = run
    async with RolloutClient(url, retry_seconds=0) as client:
        for version, folder in [(Version(version=4), folders[1]), (Version(lineage=1, version=2), folders[2])]:
            await asyncio.to_thread(publish, publisher, version, folder)
            answer = await client.rollouts([ask(wanted=version)], deadline_seconds=30)
            assert answer.weight_version == version
        with pytest.raises(Unavailable, match="serves version 1.2, version 2.0 was asked for"):
            await client.rollouts([ask(wanted=Version(lineage=2))], deadline_seconds=0.5)


async def test_weights_of_another_model_leave_the_old_ones_serving(run, folders, tmp_path):
    url, publisher = run
    other = make_tiny_model(tmp_path / "other", hidden=32)
    await asyncio.to_thread(publish, publisher, Version(version=1), other)
    async with RolloutClient(url) as client:
        before = await client.rollouts([ask()])
        await asyncio.to_thread(publish, publisher, Version(version=2), folders[2])
        after = await client.rollouts([ask(wanted=Version(version=2))], deadline_seconds=30)
    assert before.weight_version == Version() and after.weight_version == Version(version=2)


async def test_no_completion_mixes_versions_under_load(run, folders):
    """While versions change under constant load, every completion's logprobs are those of the version it names."""
    url, publisher = run
    seen: dict[Version, list] = {}
    stop = asyncio.Event()

    async def load(client: RolloutClient, worker: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            asked = [ask(f"prompt {worker} {place}", 2, seed=count, max_tokens=30) for place in range(2)]
            answer = await client.rollouts(asked)
            for group in answer.groups:
                seen.setdefault(group.completions[0].weight_version, []).append(group)

    async with RolloutClient(url) as client:
        workers = [asyncio.ensure_future(load(client, worker)) for worker in range(4)]
        for step in range(1, 5):
            await asyncio.to_thread(publish, publisher, Version(version=step), folders[step])
            await client.rollouts([ask(wanted=Version(version=step))], deadline_seconds=30)
            await asyncio.sleep(0.2)
        stop.set()
        await asyncio.gather(*workers)
    assert {version.version for version in seen} >= {2, 3, 4}
    for version, groups in seen.items():
        for group in groups[:4] + groups[-4:]:  # the ones next to a change
            for one in group.completions:
                assert one.weight_version == version
                expected = logprobs_by(folders[version.version], group.prompt_token_ids, one.token_ids)
                np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)


def test_a_late_server_catches_up_by_itself(folders, redis_url, tmp_path):
    run_id = f"late-{uuid.uuid4().hex[:8]}"
    with connect_sync(redis_url) as redis:
        publish(Publisher(redis, run_id, tmp_path, keep=2), Version(version=7), folders[1])
    settings = Settings(str(folders[0]), device="cpu", threads=1, redis_url=redis_url, run_id=run_id)
    with served(create(settings)) as url:
        body = {"requests": [ask(wanted=Version(version=7)).model_dump(mode="json")]}
        assert post(url, "/v1/rollouts", body).json()["weight_version"] == {"lineage": 0, "version": 7}
        assert httpx.get(url + "/readyz").json()["dependencies"] == {"engine": "ok", "redis": "ok"}


# ---- OpenAI ----------------------------------------------------------------------------------------------------


def events(url: str, path: str, body: dict) -> list[dict]:
    answer = post(url, path, {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


COMPLETION = {"model": "tiny", "prompt": "abc", "max_tokens": 20, "seed": 5, "n": 2, "logprobs": 2}


def test_openai_completions_are_the_rollouts(url):
    answer = post(url, "/v1/completions", COMPLETION).json()
    [group] = post(url, "/v1/rollouts", {"requests": [ask(max_tokens=20).model_dump(mode="json")]}).json()["groups"]
    for index, (choice, completion) in enumerate(zip(answer["choices"], group["completions"], strict=True)):
        assert (choice["index"], choice["text"]) == (index, completion["text"])
        assert choice["finish_reason"] == completion["finish_reason"]
        assert choice["logprobs"]["token_logprobs"] == completion["logprobs"]
        assert choice["logprobs"]["text_offset"][0] == 0 and len(choice["logprobs"]["top_logprobs"][0]) == 2
    made = sum(len(completion["token_ids"]) for completion in group["completions"])
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": made, "total_tokens": 3 + made}
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"


@pytest.mark.parametrize("stop", [None, ["q", "Z"]])
def test_openai_completion_stream_adds_up(url, stop):
    body = COMPLETION | {"stop": stop}
    whole = post(url, "/v1/completions", body).json()
    chunks = events(url, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        told = [value for part in parts for value in part["logprobs"]["token_logprobs"]]
        assert told == choice["logprobs"]["token_logprobs"]
    assert len(chunks) > 4


def test_openai_chat_whole_and_streamed(url):
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 15,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = post(url, "/v1/chat/completions", body).json()
    [choice] = whole["choices"]
    assert choice["message"]["role"] == "assistant" and whole["object"] == "chat.completion"
    content = choice["logprobs"]["content"]
    assert len(content) == whole["usage"]["completion_tokens"] and len(content[0]["top_logprobs"]) == 2
    assert content[0]["top_logprobs"][0]["logprob"] >= content[0]["logprob"]
    chunks = events(url, "/v1/chat/completions", body)
    parts = [part for chunk in chunks for part in chunk["choices"]]
    assert parts[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["delta"]["content"] for part in parts) == choice["message"]["content"]
    assert parts[-1]["finish_reason"] == choice["finish_reason"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_openai_prompts_of_every_kind(url):
    ids = [[104, 105], [100]]
    by_lists = post(url, "/v1/completions", {"prompt": ids, "max_tokens": 4, "seed": 1}).json()["choices"]
    by_one = [
        post(url, "/v1/completions", {"prompt": one, "max_tokens": 4, "seed": 1}).json()["choices"][0] for one in ids
    ]
    assert [choice["text"] for choice in by_lists] == [choice["text"] for choice in by_one]
    texts = post(url, "/v1/completions", {"prompt": ["ab", "cd"], "max_tokens": 4, "seed": 1}).json()["choices"]
    assert [choice["index"] for choice in texts] == [0, 1]


def test_openai_models_and_refusals(url):
    assert [card["id"] for card in httpx.get(url + "/v1/models").json()["data"]] == ["tiny"]
    wrong = post(url, "/v1/completions", COMPLETION | {"model": "gpt-5"})
    assert wrong.status_code == 404 and wrong.json()["errors"][0]["field"] == "model"
    for change, says in [
        ({"frequency_penalty": 0.5}, "not supported by the transformers engine: frequency_penalty"),
        ({"prompt": []}, "prompt"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop"),
    ]:
        refused = post(url, "/v1/completions", COMPLETION | change)
        assert refused.status_code == 422 and says in refused.text
    assert post(url, "/v1/completions", COMPLETION | {"frequency_penalty": 0, "user": "me"}).status_code == 200


async def test_refusals_reach_the_client_as_such(url):
    async with RolloutClient(url) as client:
        with pytest.raises(Refused) as raised:
            await client.rollouts([ask("x" * 300)])
    assert raised.value.fields == {"requests[0].prompt"}

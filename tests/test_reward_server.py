"""The reward server over real HTTP, with a tiny scorer model and real verifier processes."""

import asyncio
import time
import uuid

import httpx
import pytest
import torch
from scoring_oracle import model_oracle
from served import served
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward_server.app import Settings, create
from reward_server.rewards import REWARDS
from services.access import HttpSettings
from services.api import CompletionText, RewardGroup
from services.clients import Refused, RewardClient
from services.contract import Outcome, Reference, Task, Version
from services.keys import Keys
from services.redis import connect_sync
from services.spec import RewardSpec, RewardTerm
from services.startup import StartupError
from services.weights.publish import Publisher

pytestmark = pytest.mark.alone

SPEC = {"rewards": [{"name": "length", "params": {"scale": 1}}], "combine": {"normalize": "none"}}


@pytest.fixture(scope="module")
def rules():
    """A server without a model and without a default spec."""
    with served(create(Settings())) as url, httpx.Client(base_url=url, timeout=120) as client:
        wait_ready(client)
        yield client


@pytest.fixture(scope="module")
def scorer(tiny_model):
    with served(create(Settings(model=str(tiny_model), default_spec="intuitor"))) as url:
        with httpx.Client(base_url=url, timeout=120) as client:
            wait_ready(client)
            yield client


@pytest.fixture(scope="module")
def oracle_model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()


def wait_ready(client):
    ends = time.monotonic() + 60
    while (answer := client.get("/readyz")).status_code != 200:
        assert time.monotonic() < ends, answer.text
        time.sleep(0.05)


def group(texts, answer=None, prompt="2+2?", **extra):
    task = {"task_id": "t", "prompt": prompt, **({"reference": {"answer": answer}} if answer is not None else {})}
    return {"group_id": "g", "task": task, "completions": [{"text": text} for text in texts], **extra}


def rewards(client, groups, spec=None, **options):
    return client.post("/v1/rewards", json={"groups": groups, "spec": spec}, **options)


def problem(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status and body["title"]
    return body


def fields(answer, status=422):
    return [error["field"] for error in problem(answer, status)["errors"]]


# ---- rewards -----------------------------------------------------------------------------------------------------


def test_verifiable_rewards_over_http(rules):
    answer = rewards(rules, [group(["\\boxed{4}", "\\boxed{5}", "no idea"], "4")], "math_verify")
    assert answer.status_code == 200
    (scored,) = answer.json()["groups"]
    assert [item["components"]["math_verify"]["outcome"] for item in scored["scores"]] == [
        "correct",
        "wrong",
        "no_answer",
    ]
    assert [item["reward"] for item in scored["scores"]] == [1.0, 0.0, 0.0]
    first, second, third = (item["advantage"] for item in scored["scores"])
    assert first > 0 > second == third
    assert all(item["valid"] for item in scored["scores"])
    assert scored["scorer_weight_version"] is None


def test_hostile_answers_beside_good_ones(rules):
    hostile = ["9^9^9^9", "\\boxed{10^{10^{10}}}", "\\boxed{(10^9)!}", "\\boxed{" + "(" * 60 + "1" + ")" * 60 + "}"]
    answer = rewards(
        rules, [group([*hostile, "\\boxed{4}", "\\boxed{5}"], "4")], "grpo", headers={"X-Deadline-Seconds": "4"}
    )
    assert answer.status_code == 200
    scores = answer.json()["groups"][0]["scores"]
    for item in scores[:4]:
        component = item["components"]["math_verify"]
        assert component["outcome"] in ("timeout", "error") and component["value"] is None
        assert (item["valid"], item["reward"], item["advantage"]) == (False, None, 0.0)
    right, wrong = scores[4:]
    assert right["components"]["math_verify"]["outcome"] == "correct"
    assert right["advantage"] == -wrong["advantage"] > 0.7


async def test_a_good_request_beside_a_hostile_one_is_answered_first(rules):
    async with httpx.AsyncClient(base_url=rules.base_url, timeout=60) as client:

        async def ask(texts):
            return await client.post("/v1/rewards", json={"groups": [group(texts, "4")], "spec": "grpo"})

        hostile = asyncio.create_task(ask(["9^9^9^9", "\\boxed{(10^9)!}"] * 3))
        await asyncio.sleep(0.3)
        good = await ask(["\\boxed{4}"] * 4)
        assert not hostile.done()
        assert [item["reward"] for item in good.json()["groups"][0]["scores"]] == [1.0] * 4
        outcomes = {
            item["components"]["math_verify"]["outcome"] for item in (await hostile).json()["groups"][0]["scores"]
        }
        assert outcomes <= {"timeout", "error"}


def test_listing(rules, scorer):
    listed = {item["name"]: item for item in rules.get("/v1/rewards").json()["rewards"]}
    assert list(listed) == list(REWARDS)
    assert listed["self_certainty"]["available"] is False and "model" in listed["self_certainty"]["unavailable_because"]
    assert listed["math_verify"]["available"] and listed["math_verify"]["needs"] == ["reference.answer", "math-verify"]
    assert listed["math_verify"]["range"] == [0.0, 1.0]
    assert "regex" in listed["exact_match"]["params"]["properties"]
    assert all(item["description"] and item["params"]["type"] == "object" for item in listed.values())
    with_model = {item["name"]: item for item in scorer.get("/v1/rewards").json()["rewards"]}
    assert with_model["self_certainty"]["available"] is True


def test_metrics_count_outcomes_and_the_queue(rules):
    rewards(rules, [group(["\\boxed{4}"], "4")], "math_verify")
    text = rules.get("/metrics").text
    for line in [
        'rlif_reward_scores_total{outcome="correct",reward="math_verify"}',
        'rlif_reward_seconds_count{reward="math_verify"}',
        'rlif_verifier_waiting_checks{lane="fast"} 0.0',
        "rlif_verifier_processes ",
    ]:
        assert line in text


# ---- what is refused -----------------------------------------------------------------------------------------------


def post(client, body, content_type="application/json"):
    return client.post("/v1/rewards", content=body, headers={"Content-Type": content_type})


def test_malformed_bodies_name_the_field(rules):
    assert fields(post(rules, b'{"groups": [')) == ["body"]
    assert fields(post(rules, b'{"groups": [NaN]}')) == ["body"]
    assert fields(post(rules, b"\xc1", "application/msgpack")) == ["body"]
    assert fields(post(rules, b"{}")) == ["groups"]
    assert fields(rules.post("/v1/rewards", json={"groups": "all"})) == ["groups"]
    wrong = group(["x"])
    wrong["completions"][0]["text"] = 5
    assert fields(rewards(rules, [wrong], "random")) == ["groups[0].completions[0].text"]
    extra = {**group(["x"]), "colour": "red"}
    assert fields(rewards(rules, [extra], "random")) == ["groups[0].colour"]
    assert fields(rewards(rules, [{**group(["x"]), "completions": []}], "random")) == ["groups[0].completions"]


def test_missing_reference_over_long_text_and_unknown_specs_name_the_field(rules):
    assert fields(rewards(rules, [group(["4"], "4"), group(["4"])], "exact_match")) == [
        "groups[1].task.reference.answer"
    ]
    assert fields(rewards(rules, [group(["x", "y" * 1_000_001])], "random")) == ["groups[0].completions[1].text"]
    answer = rewards(rules, [group(["x"])], "nonsense")
    assert fields(answer) == ["spec"] and "math_verify" in answer.json()["detail"]
    answer = rewards(rules, [group(["x"])])
    assert fields(answer) == ["spec"] and "default" in answer.json()["detail"]
    answer = rewards(rules, [group(["x"])], "intuitor")
    assert fields(answer) == ["spec"] and "self_certainty" in answer.json()["detail"]


def test_without_a_model_scoring_says_so(rules):
    problem(rules.get("/v1/model"), 404)
    problem(rules.post("/v1/score", json={"items": [{"prompt": "a", "completion": "b"}]}), 404)
    states = rules.get("/readyz").json()["dependencies"]
    assert states == {"verifier": "ok", "specs": "ok"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"default_spec": "nonsense"}, "intuitor"),
        ({"default_spec": "intuitor"}, "self_certainty"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"redis_url": "http://x", "run_id": "r"}, "http://x"),
        ({"redis_url": "redis://localhost"}, "name"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_start(settings, says):
    with pytest.raises(StartupError, match=says) as refusal:
        create(Settings(**settings))
    assert "\n" not in str(refusal.value)


# ---- specs ---------------------------------------------------------------------------------------------------------


def test_put_use_replace_and_delete_a_spec(rules):
    assert rules.get("/v1/specs/mine").status_code == 404
    put = rules.put("/v1/specs/mine", json=SPEC).json()
    assert (put["name"], put["version"], put["built_in"]) == ("mine", 1, False)
    assert put["spec_id"] == RewardSpec.model_validate(SPEC).spec_id
    (scored,) = rewards(rules, [group(["abc", "a"])], "mine").json()["groups"]
    assert [item["advantage"] for item in scored["scores"]] == [3.0, 1.0]
    assert scored["spec_id"] == put["spec_id"]
    again = rules.put("/v1/specs/mine", json={"rewards": [{"name": "random"}]}).json()
    assert again["version"] == 2 and again["spec_id"] != put["spec_id"]
    assert rewards(rules, [group(["abc"])], "mine").json()["groups"][0]["spec_id"] == again["spec_id"]
    names = {item["name"] for item in rules.get("/v1/specs").json()["specs"]}
    assert {"mine", "intuitor", "math_verify"} < names
    assert rules.delete("/v1/specs/mine").status_code == 204
    problem(rules.delete("/v1/specs/mine"), 404)
    assert fields(rewards(rules, [group(["abc"])], "mine")) == ["spec"]
    assert rules.put("/v1/specs/mine", json=SPEC).json()["version"] == 4
    rules.delete("/v1/specs/mine")


def test_bad_specs_are_refused_by_field(rules):
    def refused(spec, name="bad"):
        return fields(rules.put(f"/v1/specs/{name}", json=spec))

    assert refused({"rewards": []}) == ["rewards"]
    assert refused({"rewards": [{"name": "nonsense"}]}) == ["rewards[0].name"]
    assert refused({"rewards": [{"name": "self_certainty"}]}) == ["rewards[0].name"]
    assert refused({"rewards": [{"name": "length", "params": {"scale": 0}}]}) == ["rewards[0].params.scale"]
    assert refused({"rewards": [{"name": "random"}, {"name": "random"}]}) == ["rewards"]
    assert refused({**SPEC, "combine": {"normalize": "loudly"}}) == ["combine.normalize"]
    assert refused(SPEC, "a b") == ["name"]
    assert fields(rules.put("/v1/specs/intuitor", json=SPEC), 409) == ["name"]
    assert fields(rules.delete("/v1/specs/random"), 409) == ["name"]


def test_default_can_be_put_over_and_comes_back(scorer):
    assert scorer.get("/v1/specs/default").json()["built_in"] is True
    scorer.put("/v1/specs/default", json=SPEC)
    (scored,) = rewards(scorer, [group(["abc"])]).json()["groups"]
    assert list(scored["scores"][0]["components"]) == ["length"]
    assert scorer.delete("/v1/specs/default").status_code == 204
    (scored,) = rewards(scorer, [group(["abc"])]).json()["groups"]
    assert list(scored["scores"][0]["components"]) == ["self_certainty"]


def test_tokens_guard_what_they_should():
    http = HttpSettings(api_token="reader", admin_token="chief")
    with served(create(Settings(http=http, verifier_workers=1))) as url, httpx.Client(base_url=url) as client:
        reader, chief = {"Authorization": "Bearer reader"}, {"Authorization": "Bearer chief"}
        problem(client.get("/v1/specs"), 401)
        assert client.get("/v1/specs", headers=reader).status_code == 200
        problem(client.put("/v1/specs/mine", json=SPEC, headers=reader), 403)
        problem(client.put("/v1/specs/mine", json=SPEC, headers={"Authorization": "Bearer other"}), 401)
        assert client.put("/v1/specs/mine", json=SPEC, headers=chief).status_code == 200
        problem(client.delete("/v1/specs/mine", headers=reader), 403)
        assert client.delete("/v1/specs/mine", headers=chief).status_code == 204


def test_specs_in_redis_outlive_a_restart_and_reach_replicas(redis_url):
    settings = Settings(redis_url=redis_url, run_id=f"specs-{uuid.uuid4().hex}", verifier_workers=1)
    with served(create(settings)) as first, served(create(settings)) as second:
        assert httpx.put(f"{first}/v1/specs/mine", json=SPEC).json()["version"] == 1
        assert httpx.get(f"{second}/v1/specs/mine").json()["version"] == 1
        assert httpx.put(f"{second}/v1/specs/mine", json=SPEC).json()["version"] == 2
    with served(create(settings)) as third:
        found = httpx.get(f"{third}/v1/specs/mine").json()
        assert found["version"] == 2 and found["spec_id"] == RewardSpec.model_validate(SPEC).spec_id
        assert httpx.delete(f"{third}/v1/specs/mine").status_code == 204
        problem(httpx.get(f"{third}/v1/specs/mine"), 404)


def test_a_stored_spec_that_is_none_harms_only_its_name(redis_url):
    run_id = f"specs-{uuid.uuid4().hex}"
    with served(create(Settings(redis_url=redis_url, run_id=run_id, verifier_workers=1))) as url:
        with connect_sync(redis_url) as redis:
            for place, poison in enumerate([b"garbage", b"[]", b'{"spec": {"rewards": 1}}', b'"text"']):
                redis.hset(Keys(run_id).specs, f"bad{place}", poison)
                assert "put it anew" in problem(httpx.get(f"{url}/v1/specs/bad{place}"), 503)["detail"]
            redis.hset(Keys(run_id).specs, b"\xff", b"\xff")
        assert httpx.get(f"{url}/v1/specs").status_code == 200
        assert httpx.put(f"{url}/v1/specs/bad0", json=SPEC).json()["version"] == 1
        assert httpx.get(f"{url}/v1/specs/bad0").status_code == 200
        assert httpx.delete(f"{url}/v1/specs/bad1").status_code == 204
        problem(httpx.get(f"{url}/v1/specs/bad1"), 404)
        with connect_sync(redis_url) as redis:
            redis.delete(Keys(run_id).specs)
            redis.set(Keys(run_id).specs, "another type")
        assert "WRONGTYPE" in problem(httpx.get(f"{url}/v1/specs"), 503)["detail"]


# ---- the scorer ----------------------------------------------------------------------------------------------------


def test_score_is_the_oracle(scorer, oracle_model, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    body = {
        "items": [
            {"prompt": "one and one is", "completion": " two"},
            {"prompt_token_ids": [9, 8], "completion_token_ids": [7]},
        ],
        "metrics": ["self_certainty", "token_entropy", "mean_logprob"],
        "per_token": True,
    }
    answer = scorer.post("/v1/score", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    pairs = [(tokenizer("one and one is").input_ids, tokenizer(" two").input_ids), ([9, 8], [7])]
    for result, (prompt, completion) in zip(found["results"], pairs, strict=True):
        wanted = model_oracle(oracle_model, prompt, completion)
        assert result["n_tokens"] == len(completion) == len(result["tokens"])
        assert result["scores"]["self_certainty"] == pytest.approx(wanted["self_certainty"].mean().item(), rel=1e-4)
        assert result["scores"]["mean_logprob"] == pytest.approx(wanted["mean_logprob"].mean().item(), rel=1e-4)
        assert result["per_token"]["token_entropy"] == pytest.approx(
            wanted["token_entropy"].tolist(), rel=1e-3, abs=1e-5
        )
    assert found["results"][0]["tokens"] == [" ", "t", "w", "o"]
    assert found["vocab_size"] == 288 and found["weight_version"] == {"lineage": 0, "version": 0}
    assert found["model"] == str(tiny_model)
    model = scorer.get("/v1/model").json()
    assert (model["vocab_size"], model["backend"], model["follow"]) == (288, "transformers", "online")


def test_score_takes_chat_messages_and_empty_completions(scorer, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    items = [
        {"messages": messages, "completion": "ho"},
        {"prompt_token_ids": tokenizer(text).input_ids, "completion": "ho"},
        {"prompt": "hi", "completion": ""},
    ]
    first, second, empty = scorer.post("/v1/score", json={"items": items}).json()["results"]
    assert first["scores"] == second["scores"] and first["scores"]["self_certainty"] > 0
    assert (empty["n_tokens"], empty["scores"]) == (0, {})
    assert "per_token" not in first


def test_bad_score_requests_name_the_field(scorer):
    def refused(item=None, **extra):
        return fields(scorer.post("/v1/score", json={"items": [item or {"prompt": "a", "completion": "b"}], **extra}))

    assert refused(metrics=["self_certainty", "nonsense"]) == ["metrics[1]"]
    assert refused(temperature=0) == ["temperature"]
    assert refused(preset="mine") == ["preset"]
    assert refused({"prompt": "a"}) == ["items[0]"]
    assert refused({"prompt": "", "completion": "b"}) == ["items[0].prompt"]
    assert refused({"prompt_token_ids": [999], "completion": "b"}) == ["items[0].prompt_token_ids"]
    assert refused({"prompt": "a", "completion_token_ids": [-1]}) == ["items[0].completion_token_ids"]
    assert refused({"prompt": "a", "completion": "b" * 2000}) == ["items[0].completion"]
    assert fields(scorer.post("/v1/score", json={"items": []})) == ["items"]


def test_self_certainty_reward_is_the_oracle(scorer, oracle_model, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer("2+2?").input_ids
    texts = ["four", "4", "it is four, I think"]
    (scored,) = rewards(scorer, [group(texts)]).json()["groups"]
    values = [item["components"]["self_certainty"]["value"] for item in scored["scores"]]
    wanted = [
        model_oracle(oracle_model, prompt, tokenizer(text).input_ids)["self_certainty"].mean().item() for text in texts
    ]
    assert values == pytest.approx(wanted, rel=1e-4)
    assert [item["reward"] for item in scored["scores"]] == values
    assert sum(item["advantage"] for item in scored["scores"]) == pytest.approx(0, abs=1e-6)
    assert scored["scorer_weight_version"] == {"lineage": 0, "version": 0}
    ids = {"prompt_token_ids": prompt}
    by_ids = group(texts, prompt="something else", **ids)
    by_ids["completions"] = [{"text": text, "token_ids": tokenizer(text).input_ids} for text in texts]
    (same,) = rewards(scorer, [by_ids]).json()["groups"]
    assert [item["reward"] for item in same["scores"]] == pytest.approx(values, rel=1e-6)


def test_a_completion_that_cannot_be_scored_leaves_the_others(scorer):
    mixed = group(["fine", "", "x" * 3000, "also fine"])
    (scored,) = rewards(scorer, [mixed]).json()["groups"]
    outcomes = [item["components"]["self_certainty"]["outcome"] for item in scored["scores"]]
    assert outcomes == ["ok", "skipped", "error", "ok"]
    assert [item["valid"] for item in scored["scores"]] == [True, False, False, True]
    assert "1024" in scored["scores"][2]["components"]["self_certainty"]["detail"]


def test_mixes_over_http(scorer):
    (scored,) = rewards(scorer, [group(["\\boxed{4}", "\\boxed{5}", "?"], "4")], "intuitor_plus_accuracy").json()[
        "groups"
    ]
    assert {name for item in scored["scores"] for name in item["components"]} == {"self_certainty", "math_verify"}
    assert rewards(scorer, [group(["\\boxed{4}", "5"], "4")], "open_r1_mix").status_code == 200


async def test_the_client_speaks_to_the_server(scorer):
    async with RewardClient(str(scorer.base_url)) as client:
        task = Task(task_id="t", prompt="2+2?", reference=Reference(answer="4"))
        asked = RewardGroup(group_id="g", task=task, completions=[CompletionText(text="\\boxed{4}")])
        answer = await client.rewards([asked], spec="grpo")
        assert answer.groups[0].scores[0].components["math_verify"].outcome == Outcome.correct
        spec = RewardSpec(rewards=[RewardTerm(name="random")])
        assert (await client.put_spec("of-client", spec)).spec_id == spec.spec_id
        await client.delete_spec("of-client")
        with pytest.raises(Refused) as refusal:
            await client.rewards([asked], spec="of-client")
        assert refusal.value.fields == {"spec"}
        assert (await client.model())["vocab_size"] == 288


def test_new_weights_are_followed_and_named(tiny_model, redis_url, tmp_path):
    run_id = f"follow-{uuid.uuid4().hex}"
    settings = Settings(
        model=str(tiny_model),
        default_spec="intuitor",
        follow="match",
        redis_url=redis_url,
        run_id=run_id,
        verifier_workers=1,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
    with served(create(settings)) as url, connect_sync(redis_url) as redis:
        with httpx.Client(base_url=url, timeout=60) as client:
            (before,) = rewards(client, [group(["four"])]).json()["groups"]
            late = rewards(
                client,
                [group(["four"], min_weight_version={"lineage": 0, "version": 1})],
                headers={"X-Deadline-Seconds": "0.5"},
            )
            assert problem(late, 504)["detail"]
            published = Publisher(redis, run_id, tmp_path / "weights")
            tensors = [(name, tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight"]
            published.publish(Version(lineage=0, version=1), tensors, tiny_model)
            (after,) = rewards(client, [group(["four"], min_weight_version={"lineage": 0, "version": 1})]).json()[
                "groups"
            ]
    assert before["scorer_weight_version"] == {"lineage": 0, "version": 0}
    assert after["scorer_weight_version"] == {"lineage": 0, "version": 1}
    assert after["scores"][0]["reward"] < before["scores"][0]["reward"]


# ---- other trainers ------------------------------------------------------------------------------------------------


def test_openrlhf_lists(rules):
    body = {
        "query": ["2+2?\\boxed{4}", "2+2?\\boxed{5}", "1+1?2"],
        "prompts": ["2+2?", "2+2?", "1+1?"],
        "labels": ["4", 4, 2],
    }
    answer = rules.post("/get_reward", params={"spec": "math_verify"}, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "rewards": [1.0, 0.0, 1.0],
        "scores": [1.0, 0.0, 1.0],
        "extra_logs": {
            "math_verify": [1.0, 0.0, 1.0],
            "math_verify/present": [1.0, 1.0, 1.0],
            "valid": [1.0, 1.0, 1.0],
        },
    }
    assert fields(rules.post("/get_reward", json={**body, "labels": ["4"]})) == ["body"]
    broken = {**body, "prompts": ["2+2?", "another", "1+1?"]}
    assert fields(rules.post("/get_reward", params={"spec": "random"}, json=broken)) == ["query[1]"]
    no_labels = {**body, "labels": None}
    assert fields(rules.post("/get_reward", params={"spec": "math_verify"}, json=no_labels)) == ["labels"]


def test_slime_single_answers(rules):
    def ask(response, label, **options):
        body = {"prompt": "2+2?", "response": response, "label": label}
        return rules.post("/reward", params={"spec": "grpo", **options}, json=body)

    assert ask("\\boxed{4}", "4").json() == 1.0
    assert ask("\\boxed{5}", "4").json() == 0.0
    refused = ask("\\boxed{4}", "}{")
    assert fields(refused) == ["response"] and "unparsable" in refused.json()["detail"]
    assert ask("\\boxed{4}", "}{", missing="-0.5").json() == -0.5
    assert fields(ask("\\boxed{4}", None)) == ["label"]

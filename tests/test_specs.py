"""Specs over HTTP while a run goes on: put, read, listed, versioned, deleted; bad ones refused whole; in Redis too."""

import uuid

import httpx
import msgpack
import pytest
from served import served

from reward_server.app import Settings, create
from reward_server.spec_store import KEPT_VERSIONS

LENGTH = {"rewards": [{"name": "length"}]}
RANDOM = {"rewards": [{"name": "random"}]}


@pytest.fixture(scope="module", params=["memory", "redis"])
def client(request, redis_url):
    follow = {"redis_url": redis_url, "run_id": f"specs-{uuid.uuid4().hex}"} if request.param == "redis" else {}
    with served(create(Settings(default_spec="grpo", **follow))) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


def put(client, name, spec):
    answer = client.put(f"/v1/specs/{name}", json=spec)
    assert answer.status_code == 200, answer.text
    return answer.json()


def group(texts, **extra):
    task = {"task_id": "t", "source": "quiz", "prompt": "2+2?", "reference": {"answer": "4"}}
    return {"group_id": "g", "task": task, "completions": [{"text": text} for text in texts], **extra}


def rewards(client, spec, *groups):
    return client.post("/v1/rewards", json={"spec": spec, "groups": list(groups)})


def test_versions_of_a_name(client):
    first, second = put(client, "mine", LENGTH), put(client, "mine", RANDOM)
    assert (first["version"], second["version"]) == (1, 2)
    assert client.get("/v1/specs/mine").json() == second
    assert client.get("/v1/specs/mine", params={"version": 1}).json() == first
    assert client.get("/v1/specs/mine/versions").json() == {"versions": [first, second]}
    assert client.delete("/v1/specs/mine").status_code == 204
    assert client.get("/v1/specs/mine").status_code == 404
    assert client.get("/v1/specs/mine", params={"version": 2}).json() == second
    again = put(client, "mine", LENGTH)
    assert again["version"] == 4  # the delete was a change, too
    assert [item["version"] for item in client.get("/v1/specs/mine/versions").json()["versions"]] == [1, 2, 4]
    assert [item["name"] for item in client.get("/v1/specs").json()["specs"]].count("mine") == 1


def test_versions_that_are_not_there(client):
    put(client, "other", LENGTH)
    for name, version in [("other", 9), ("other", 0), ("nobody", 1)]:
        answer = client.get(f"/v1/specs/{name}", params={"version": version})
        assert answer.status_code == 404 and answer.json()["errors"][0]["field"] == "version"
    assert client.get("/v1/specs/nobody/versions").status_code == 404
    assert client.get("/v1/specs/other", params={"version": -1}).status_code == 422
    built_in = client.get("/v1/specs/grpo/versions").json()["versions"]
    assert [item["version"] for item in built_in] == [0]
    assert client.get("/v1/specs/grpo", params={"version": 0}).json() == built_in[0]


def test_old_versions_are_forgotten_one_by_one(client):
    for number in range(KEPT_VERSIONS + 2):
        put(client, "busy", {"rewards": [{"name": "length", "weight": number + 1}]})
    kept = [item["version"] for item in client.get("/v1/specs/busy/versions").json()["versions"]]
    assert kept == list(range(3, KEPT_VERSIONS + 3))


def test_a_scored_group_names_its_spec_and_the_spec_is_found_by_it(client):
    put(client, "found", {"rewards": [{"name": "length", "weight": 0.125}]})
    (scored,) = rewards(client, "found", group(["a", "bb"])).json()["groups"]
    put(client, "found", RANDOM)
    client.delete("/v1/specs/found")
    (origin,) = client.get("/v1/specs", params={"spec_id": scored["spec_id"]}).json()["specs"]
    assert (origin["name"], origin["version"]) == ("found", 1)
    assert origin["spec"]["rewards"][0]["weight"] == 0.125
    assert client.get("/v1/specs", params={"spec_id": "nonsense"}).json() == {"specs": []}


def test_the_default_may_be_replaced_and_comes_back(client):
    started_with = client.get("/v1/specs/default").json()
    put(client, "default", LENGTH)
    (scored,) = rewards(client, None, group(["a", "bb"])).json()["groups"]
    assert set(scored["scores"][0]["components"]) == {"length"}
    assert client.delete("/v1/specs/default").status_code == 204
    assert client.get("/v1/specs/default").json() == started_with


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"rewards": [{"name": "length"}, {"name": "nonsense"}]}, "rewards[1].name"),
        ({"rewards": [{"name": "length"}, {"name": "self_certainty"}]}, "rewards[1].name"),
        ({"rewards": [{"name": "length"}, {"name": "length"}]}, "rewards"),
        ({"rewards": [{"name": "length", "gate": {"reward": "random", "at_least": 1}}]}, "rewards"),
        ({"rewards": [{"name": "length", "schedule": {"kind": "ramp", "end": 0}}]}, "rewards[0].schedule.ramp.end"),
        ({"rewards": [{"name": "length"}], "combine": {"skip_unanimous": "math_verify"}}, "body"),
        ({"rewards": [{"name": "length"}], "combine": {"normalise": "rank"}}, "combine.normalise"),
        ({"rewards": []}, "rewards"),
    ],
)
def test_a_bad_spec_is_refused_whole(client, spec, field):
    before = put(client, "kept", LENGTH)
    answer = client.put("/v1/specs/kept", json=spec)
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert client.get("/v1/specs/kept").json() == before


def test_schedules_go_by_the_version_that_made_the_group(client):
    put(
        client,
        "first-then",
        {
            "rewards": [
                {"name": "length", "params": {"scale": 1}, "schedule": {"kind": "switch", "at": 10}},
                {"name": "math_verify", "schedule": {"kind": "switch", "at": 10, "before": 0, "after": 1}},
            ]
        },
    )
    texts = ["\\boxed{4}", "so it is \\boxed{5}"]
    early, late = (group(texts, weight_version={"lineage": 2, "version": version}) for version in (9, 10))
    before, after = rewards(client, "first-then", early, late).json()["groups"]
    assert before["scores"][0]["advantage"] < 0 < before["scores"][1]["advantage"]
    assert after["scores"][0]["advantage"] > 0 > after["scores"][1]["advantage"]
    assert before["scores"][0]["components"].keys() == after["scores"][0]["components"].keys()
    answer = rewards(client, "first-then", early, group(texts))
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == ["groups[1].weight_version"]


def test_unanimous_groups_are_named_and_not_valid(client):
    rewarded = [{"name": "length"}, {"name": "math_verify", "weight": 0}]
    put(client, "selective", {"rewards": rewarded, "combine": {"skip_unanimous": "math_verify"}})
    solved, mixed = group(["\\boxed{4}", "it is \\boxed{4}"]), group(["\\boxed{4}", "it is \\boxed{5}"])
    first, second = rewards(client, "selective", solved, mixed).json()["groups"]
    assert first["skipped"] and "math_verify" in first["skipped"] and not second["skipped"]
    assert [score["valid"] for score in first["scores"]] == [False, False]
    assert [score["valid"] for score in second["scores"]] == [True, True]
    assert first["scores"][0]["components"]["length"]["value"] is not None


def test_raw_values_are_metrics(client):
    put(client, "measured", {"rewards": [{"name": "random"}, {"name": "length", "weight": 0, "params": {"scale": 1}}]})

    def seen():
        lines = client.get("/metrics").text.splitlines()
        return float(
            next(line for line in lines if line.startswith('rlif_reward_value_sum{reward="length"}')).split()[1]
        )

    rewards(client, "measured", group(["a"]))
    before = seen()
    rewards(client, "measured", group(["abc", "abcde"]))
    assert seen() == before + 8


@pytest.mark.parametrize(
    ("schedule", "field"),
    [
        ({"kind": "ramp", "end": "9" * 25}, "ramp.end"),
        ({"kind": "switch", "at": "9" * 25}, "switch.at"),
        ({"kind": "alternate", "every": "9" * 401, "factors": [0, 1]}, "alternate.every"),
    ],
)
def test_numbers_that_no_store_can_hold_are_refused(client, schedule, field):
    answer = client.put("/v1/specs/huge", json={"rewards": [{"name": "length", "schedule": schedule}]})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == f"rewards[0].schedule.{field}"


def test_a_version_beyond_any_number_of_steps_is_refused(client):
    put(client, "ramp", {"rewards": [{"name": "length", "schedule": {"kind": "ramp", "end": 100}}]})
    answer = rewards(client, "ramp", group(["4"], weight_version={"version": "9" * 401}))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "groups[0].weight_version.version"
    assert rewards(client, "ramp", group(["4"], weight_version={"version": 2**63 - 1})).status_code == 200


@pytest.mark.parametrize("value", [b"bytes", float("nan"), float("inf")])
def test_what_json_has_no_word_for_is_refused_in_msgpack_too(client, value):
    headers = {"Content-Type": "application/msgpack"}
    spec = {"rewards": [{"name": "json_schema", "params": {"json_schema": {"const": value}}}]}
    answer = client.put("/v1/specs/strange", content=msgpack.packb(spec), headers=headers)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "rewards[0].params.json_schema.const"
    asked = group(["4"])
    for part, field in [("metadata", "metadata.deep[0]"), ("reference", "reference.deep[0]")]:
        task = {**asked["task"], part: {"deep": [value]}}
        body = {"spec": "length", "groups": [{**asked, "task": task}]}
        answer = client.post("/v1/rewards", content=msgpack.packb(body), headers=headers)
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == f"groups[0].task.{field}"


def test_a_schema_that_speaks_of_token_ids_reads_the_same_in_msgpack(client):
    schema = {"dependentRequired": {"token_ids": ["x"]}, "const": {"logprobs": [0.1], "prompt_token_ids": [2**40]}}
    spec = {"rewards": [{"name": "json_schema", "params": {"json_schema": schema}}]}
    put(client, "schema", spec)
    for path in ("/v1/specs", "/v1/specs/schema"):
        packed = client.get(path, headers={"Accept": "application/msgpack"})
        assert packed.headers["content-type"] == "application/msgpack"
        assert msgpack.unpackb(packed.content) == client.get(path).json()

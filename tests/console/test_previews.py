"""Another spec: previewed as scoring would have it, and put on every reward server."""

import asyncio

import httpx
import pytest
from console.watched import SPEC, Page, console, scored_by_server
from served import served

from reward_server import app as reward_app
from services.api import CompletionText, RewardGroup
from services.clients import RewardClient
from services.console import preview
from services.console.source import sit_down
from services.contract import Version
from services.problem import Problem
from services.spec import RewardSpec


def test_a_spec_of_no_name_is_not_asked_for(run):
    run.status(orchestrator={"state": "starting"})
    with console(run, "http://127.0.0.1:9") as client:
        page = client.get("/console/control")
    assert page.status_code == 200 and "its orchestrator has not reported yet" in page.text


def test_a_spec_is_previewed_and_applied(run, reward_url):
    groups = scored_by_server(reward_url)
    run.keep(groups)
    changed = SPEC.model_copy(
        update={"rewards": [SPEC.rewards[0].model_copy(update={"weight": -1.0}), SPEC.rewards[1]]}
    )
    with console(run, reward_url) as client:
        assert "exact_match" in client.get("/console/control").text
        same = client.post("/console/preview", json=SPEC.model_dump(mode="json"))
        assert same.status_code == 200, same.text
        text = " ".join(Page(same.text).text.split())
        assert f"last {len(groups)} groups, {4 * len(groups)} completions" in text and SPEC.spec_id in text
        assert "1.00 correlation" in text and "0.0 %" in text and "0.000 on average" in text
        other = " ".join(Page(client.post("/console/preview", json=changed.model_dump(mode="json")).text).text.split())
        assert "1.00 correlation" not in other and changed.spec_id in other

        def field_of(body, status=422):
            answer = client.post("/console/preview", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == status, answer.text
            return answer.json()["errors"][0]["field"] if "errors" in answer.json() else None

        assert field_of(b"{") == "spec"
        assert field_of(b'{"rewards": []}') == "rewards"
        assert field_of(b'{"rewards": [{"name": "nobody"}]}') == "spec.rewards[0].name"
        field_of(b" " * 70_000, 413)
        new = {
            "rewards": [{"name": "length"}, {"name": "repetition"}, {"name": "exact_match", "params": {"regex": "(5)"}}]
        }
        assert "exact_match, repetition" in client.post("/console/preview", json=new).text

        put = client.put("/v1/run/spec", json=changed.model_dump(mode="json"))
        assert put.status_code == 200 and put.json()["spec_id"] == changed.spec_id and put.json()["name"] == "mine"
        assert client.put("/v1/run/spec", json={"rewards": [{"name": "nobody"}]}).status_code == 422
    assert httpx.get(f"{reward_url}/v1/specs/mine").json()["spec_id"] == changed.spec_id


def test_what_an_unknown_spec_measured_does_not_count(run, reward_url):
    groups = [group.model_copy(update={"spec_id": "0" * 16}) for group in scored_by_server(reward_url, 2)]
    run.keep(groups)
    with console(run, reward_url) as client:
        page = client.post("/console/preview", json=SPEC.model_dump(mode="json"))
    assert page.status_code == 200 and "exact_match, length" in page.text


def applied(run, urls, name):
    async def ask():
        desk = sit_down(run.source(*urls))
        try:
            return await preview.apply(desk, name, SPEC)
        finally:
            await desk.close()

    return asyncio.run(ask())


def test_servers_that_share_a_store_get_one_version(run, reward_url):
    urls = (reward_url, reward_url.replace("127.0.0.1", "localhost"))
    name = run.name  # fresh
    assert [applied(run, urls, name), applied(run, urls, name)] == [1, 2]
    assert httpx.get(f"{reward_url}/v1/specs/{name}").json()["spec_id"] == SPEC.spec_id


def test_servers_that_did_not_get_the_spec_are_named(run, reward_url):
    nobody = "http://127.0.0.1:9"
    with served(reward_app.create(reward_app.Settings(verifier_workers=1))) as third:
        with pytest.raises(Problem) as caught:
            applied(run, (reward_url, nobody, third), "partly")
        for url in (reward_url, third):
            assert httpx.get(f"{url}/v1/specs/partly").json()["spec_id"] == SPEC.spec_id
        with pytest.raises(Problem, match="does not answer"):
            applied(run, (nobody, third), "nowhere")
        assert httpx.get(f"{third}/v1/specs/nowhere").status_code == 404
    assert caught.value.status == 503
    there, _, missing = caught.value.detail.partition("not (")
    assert reward_url in there and third in there and nobody in missing and third not in missing


def test_a_preview_is_what_scoring_would_have_said(reward_url):
    """Advantages of any spec over the same components, recombined and scored."""
    groups = scored_by_server(reward_url, 8)
    specs = [
        SPEC,
        {"rewards": [{"name": "length", "weight": -0.3}, {"name": "exact_match"}], "combine": {"normalize": "rank"}},
        {"rewards": [{"name": "exact_match", "sources": ["quiz"]}], "combine": {"skip_unanimous": "exact_match"}},
        {
            "rewards": [
                {"name": "length", "gate": {"reward": "exact_match", "at_least": 1}},
                {"name": "exact_match", "weight": 2.0, "clip": [0.0, 0.5]},
            ],
            "combine": {"order": "sum_then_normalize"},
        },
    ]
    for body in specs:
        spec = RewardSpec.model_validate(body)
        httpx.put(f"{reward_url}/v1/specs/tried", json=spec.model_dump(mode="json")).raise_for_status()

        async def ask():
            async with RewardClient(reward_url) as client:
                bodies = [
                    RewardGroup(
                        group_id=group.group_id,
                        task=group.task.model_copy(update={"source": "quiz"}),
                        completions=[
                            CompletionText(text=made.text, finish_reason="stop", token_ids=[1] * len(made.text))
                            for made in group.completions
                        ],
                    )
                    for group in groups
                ]
                measured = (await client.rewards(bodies, "mine")).groups
                scored = (await client.rewards(bodies, "tried")).groups
                kept = [
                    {
                        "group_id": one.group_id,
                        "source": "quiz",
                        "size": 4,
                        "components": {
                            key: [score.components[key].model_dump(mode="json") for score in one.scores]
                            for key in one.scores[0].components
                        },
                    }
                    for one in measured
                ]
                return scored, kept

        scored, kept = asyncio.run(ask())
        body = {"spec": spec.model_dump(mode="json"), "groups": kept}
        answer = httpx.post(f"{reward_url}/v1/specs/preview", json=body).json()
        assert answer["missing"] == [] and answer["spec_id"] == spec.spec_id
        for one, other in zip(answer["groups"], scored, strict=True):
            assert [score["advantage"] for score in one["scores"]] == [score.advantage for score in other.scores]
            assert [score["valid"] for score in one["scores"]] == [score.valid for score in other.scores]
            assert one["skipped"] == other.skipped


def test_bad_previews_name_the_field(reward_url):
    score = {"value": 1.0, "outcome": "ok"}
    good = {"group_id": "g", "size": 2, "components": {"length": [score, score]}}
    scheduled = {"rewards": [{"name": "length", "schedule": {"kind": "switch", "at": 3}}]}
    for spec, group, field in [
        ({"rewards": [{"name": "nobody"}]}, good, "spec.rewards[0].name"),
        ({"rewards": [{"name": "length"}]}, {**good, "size": 3}, "groups[0]"),
        (scheduled, good, "groups[0].weight_version"),
    ]:
        answer = httpx.post(f"{reward_url}/v1/specs/preview", json={"spec": spec, "groups": [group]})
        assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field, answer.text
    routed = {"rewards": [{"name": "length", "sources": ["quiz"]}]}
    for source, valid in [("quiz", True), ("other", False)]:
        body = {"spec": routed, "groups": [{**good, "source": source}]}
        answer = httpx.post(f"{reward_url}/v1/specs/preview", json=body).json()
        assert [score["valid"] for score in answer["groups"][0]["scores"]] == [valid] * 2 and answer["missing"] == []
    late = {**good, "weight_version": Version(version=3).model_dump()}
    answer = httpx.post(f"{reward_url}/v1/specs/preview", json={"spec": scheduled, "groups": [late]}).json()
    assert [score["valid"] for score in answer["groups"][0]["scores"]] == [False, False]

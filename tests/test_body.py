"""Bodies of requests: what a big or strange one may cost, and that a refusal names the field."""

import msgpack
import orjson
import pytest
from pydantic import BaseModel, ValidationError

from reward_server.compat import OneAnswer, QueryLists
from reward_server.rewards import REWARDS
from rollout_server.openai import ChatBody, CompletionBody
from services.api import RewardsRequest, RolloutsRequest, ScoreRequest
from services.body import MOST_CONTAINERS, MOST_VALUES, NotPlain, TooMuch, read_json, read_msgpack
from services.contract import Group, ScoredGroup
from services.spec import RewardSpec

pytestmark = pytest.mark.alone

BODIES = [RewardsRequest, RolloutsRequest, ScoreRequest, RewardSpec, QueryLists, OneAnswer, CompletionBody, ChatBody]
STREAM = [Group, ScoredGroup]
PARAMS = [reward.params for reward in REWARDS.values()]


def patient_lists(schema: object) -> list[dict]:
    """The list schemas inside a core schema that go on after the first bad item."""
    if isinstance(schema, dict):
        is_patient = schema.get("type") in ("list", "set", "tuple-variable") and not schema.get("fail_fast")
        return [schema] * is_patient + [found for part in schema.values() for found in patient_lists(part)]
    return [found for part in schema for found in patient_lists(part)] if isinstance(schema, list) else []


@pytest.mark.parametrize("model", [*BODIES, *STREAM, *PARAMS], ids=lambda model: model.__name__)
def test_no_list_makes_an_error_of_every_item(model: type[BaseModel]):
    assert patient_lists(model.__pydantic_core_schema__) == []


def test_a_million_bad_items_or_fields_are_few_errors():
    bad = [{}] * 10_000
    with pytest.raises(ValidationError) as told:
        ScoreRequest(items=[{"prompt": "x", "completion_token_ids": bad}] * 100)
    assert told.value.error_count() == 1
    with pytest.raises(ValidationError) as told:
        ScoreRequest(items=[], **{f"a{number}": 1 for number in range(10_000)})
    assert told.value.error_count() == 1 and "known fields are" in str(told.value)


def nested(values: bytes) -> bytes:
    return b'{"metadata": {"a": [' + values + b"]}}"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (b",".join([b"[]"] * MOST_CONTAINERS), "lists and objects"),
        (b",".join([b"{}"] * MOST_CONTAINERS), "lists and objects"),
        (b",".join([b"0"] * (MOST_VALUES + 2)), "values"),
        (b",".join([b'""'] * (MOST_VALUES + 2)), "values"),
    ],
)
def test_a_body_of_too_many_values_is_refused_before_they_are_made(values, said, monkeypatch):
    monkeypatch.setattr("services.body.orjson.loads", lambda _: pytest.fail("the body was parsed"))
    with pytest.raises(TooMuch, match=said):
        read_json(nested(values))


def test_what_stands_in_texts_is_not_counted():
    text = '[{,"\\' * MOST_CONTAINERS + "\\\\"
    body = {"text": text, text[:100]: ["\\", '"', text]}
    assert read_json(orjson.dumps(body)) == body


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([[]] * (MOST_CONTAINERS + 1), "lists and objects"),
        ([[0] * (MOST_VALUES // 2)] * 3, "values"),
        ([msgpack.ExtType(1, bytes(2 * MOST_VALUES))] * 3, "values"),
    ],
)
def test_a_msgpack_body_of_too_many_values_is_refused(value, said):
    with pytest.raises(TooMuch, match=said):
        read_msgpack(msgpack.packb({"a": value}))


@pytest.mark.parametrize("claim", [b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xdd\x7f\xff\xff\xff" * 500])
def test_a_msgpack_body_that_claims_more_than_it_holds_is_refused(claim):
    with pytest.raises(ValueError):
        read_msgpack(claim)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (b"bytes", "bytes"),
        (msgpack.Timestamp(1), "Timestamp"),
    ],
)
def test_what_json_has_no_word_for_is_refused_under_its_path(value, said):
    with pytest.raises(NotPlain, match=said) as told:
        read_msgpack(msgpack.packb({"groups": [{}, {"metadata": {"a": ["x", {"b": value}]}}]}))
    assert told.value.path == ("groups", 1, "metadata", "a", 1, "b")
    with pytest.raises(NotPlain, match="keys must be strings"):
        read_msgpack(msgpack.packb({"a": {b"key": 1}}))
    plain = {"a": [1, 2**64 - 1, -1.5, "x", None, True, {"b": []}]}
    assert read_msgpack(msgpack.packb(plain)) == plain
